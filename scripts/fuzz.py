"""Feed the parsers of files that people did not write themselves with bytes that a coverage-guided fuzzer makes up.

    python scripts/fuzz.py suite --seconds 900 --out /tmp/fuzz

Targets: suite (TOML), labels (label, class and subset files), image (decoding and preprocessing), checkpoint (weights
files). A value, or the error that is meant for the person who gave the file, is the accepted outcome. Anything else is
a finding, and so is an input that takes 10 seconds of computing: it is kept under OUT/TARGET/findings, one for each
place in the code, and the fuzzer goes on. A crash of the interpreter and too much memory stop it. It starts from
tests/faults/corpus/TARGET, which the tests replay, and needs atheris (pip install atheris). The corpus that it grows
stays in OUT/TARGET/corpus.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

CORPUS = Path(__file__).parents[1] / "tests" / "faults" / "corpus"
INSTRUMENTED = ["orthattack", "PIL", "tomllib", "tomli", "csv", "safetensors"]
SLOW = 10.0

Target = Callable[[bytes], None]


def suite(folder: Path) -> Target:
    from orthattack.eval import plugin
    from orthattack.eval.errors import EvaluationError
    from orthattack.eval.suite import make_suite, read_suite

    path = folder / "suite.toml"

    def run(data: bytes) -> None:
        path.write_bytes(data)
        try:
            found = read_suite(path)
            if any(plugin.is_plugin(attack.name) and attack.name[:8] != "foolbox:" for attack in found.attacks):
                return  # names code to be imported, which is the user's own
            entries = found.entries()
            found.baselines()
            assert entries
            assert make_suite(found.config(), "again") == found
        except EvaluationError as error:
            if "\n" in str(error):
                raise ValueError("a message of several lines") from error

    return run


def labels(folder: Path) -> Target:
    """The first byte says what the rest is: a label file, a class file or a subset."""
    import torch

    from orthattack.eval.data.dataset import read_names
    from orthattack.eval.data.load import load_dataset
    from orthattack.eval.errors import EvaluationError
    from orthattack.eval.models.classifier import Classifier
    from orthattack.eval.models.preprocessing import Preprocessing

    model = Classifier("model", torch.nn.Identity(), Preprocessing(8, 8), ("apple", "cat", "zebra"), 3, "fuzz")
    data_folder, path = folder / "data", folder / "list.csv"
    for name in ("cat/0.png", "cat/1.png", "zebra/a b.png"):
        (data_folder / name).parent.mkdir(parents=True, exist_ok=True)
        (data_folder / name).touch()
    whole = load_dataset(str(data_folder), model)

    def run(data: bytes) -> None:
        kind, content = data[:1], data[1:]
        path.write_bytes(content)
        try:
            if kind == b"s":
                found = whole.subset(read_names(path))
            elif kind == b"c":
                found = load_dataset(str(data_folder), model, classes=path)
            else:
                found = load_dataset(str(data_folder), model, labels=path)
        except EvaluationError:
            return
        assert len(found) == len(found.labels) == len(set(found.names)) > 0
        assert all(0 <= label < 3 for label in found.labels)
        assert found.fingerprint()
        root = data_folder.resolve()
        assert all((root / name).resolve().is_relative_to(root) for name in found.names)

    return run


def image(folder: Path) -> Target:  # noqa: ARG001 - nothing is written
    from PIL import Image

    Image.init()
    from orthattack.eval.models.preprocessing import DecodeError, Preprocessing, decode

    preprocessing = Preprocessing(10, 8)

    def run(data: bytes) -> None:
        try:
            pixels = preprocessing(decode(data))
        except DecodeError:
            return
        assert pixels.shape == (3, 8, 8)
        assert 0 <= float(pixels.min()) <= float(pixels.max()) <= 1

    return run


def checkpoint(folder: Path) -> Target:
    """The first byte says which ending the file has."""
    from torch import nn

    from orthattack.eval.errors import EvaluationError
    from orthattack.eval.models.classifier import checked, from_checkpoint
    from orthattack.eval.models.preprocessing import Preprocessing
    from orthattack.eval.models.weights import read_checkpoint

    safe, other = folder / "w.safetensors", folder / "w.pt"

    def build(count: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(12, count))

    def run(data: bytes) -> None:
        path = safe if data[:1] == b"s" else other
        path.write_bytes(data[1:])
        try:
            file = read_checkpoint(path)
            file.listed("classes")
            classifier = checked(from_checkpoint("model", "model", build, Preprocessing(2, 2), file))
        except EvaluationError:
            return
        assert classifier.num_classes >= 2
        assert classifier.describe()

    return run


TARGETS: dict[str, Callable[[Path], Target]] = {
    "suite": suite,
    "labels": labels,
    "image": image,
    "checkpoint": checkpoint,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", choices=TARGETS)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/fuzz"), help="where the corpus and findings go")
    args = parser.parse_args()

    import atheris
    import pandas  # noqa: F401 - these are not instrumented
    import pydantic  # noqa: F401
    import torch
    import torchvision  # noqa: F401
    from torch._weights_only_unpickler import Unpickler

    warnings.simplefilter("ignore")  # of damaged files there are many
    torch.set_num_threads(1)
    Unpickler.load = atheris.instrument_func(Unpickler.load)  # type: ignore[method-assign]
    out = (args.out / args.target).resolve()
    for name in ("corpus", "findings"):
        (out / name).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        with atheris.instrument_imports(include=INSTRUMENTED):
            run = TARGETS[args.target](Path(folder))
        words = out / "words.dict"
        words.write_text("".join(f'"{_escaped(word)}"\n' for word in _words(args.target)))
        options = [
            f"-max_total_time={args.seconds}", f"-seed={args.seed}", f"-dict={words}", "-print_final_stats=1",
            "-timeout=3600", "-rss_limit_mb=4096", "-max_len=4096", f"-artifact_prefix={out / 'findings'}/",
        ]  # fmt: skip
        keep = _Findings(run, out / "findings")
        atheris.Setup([sys.argv[0], *options, str(out / "corpus"), str(CORPUS / args.target)], keep)
        atheris.Fuzz()  # ends the process
    return 0


class _Findings:
    """Keeps the first input for each place where something unexpected is raised, and goes on."""

    def __init__(self, run: Target, folder: Path) -> None:
        self._run, self._folder = run, folder
        self._seen: set[str] = set()

    def __call__(self, data: bytes) -> None:
        start = time.process_time()
        try:
            self._run(data)
            if time.process_time() - start > SLOW:  # not the clock's: the process may be paused
                raise TimeoutError(f"{time.process_time() - start:.0f} s")
        except Exception as error:
            frames = traceback.extract_tb(error.__traceback__)
            place = f"{type(error).__name__} " + " ".join(f"{Path(f.filename).name}:{f.lineno}" for f in frames[-3:])
            if place not in self._seen:
                self._seen.add(place)
                stem = self._folder / hashlib.sha256(place.encode()).hexdigest()[:12]
                stem.with_suffix(".input").write_bytes(data)
                stem.with_suffix(".txt").write_text("".join(traceback.format_exception(error)), errors="replace")
                print(f"FINDING {len(self._seen)}: {place}: {error}"[:300], flush=True)


def _words(target: str) -> list[bytes]:
    """What the fuzzer may put into its inputs: keys and magic numbers that it would take long to guess."""
    if target == "suite":
        from orthattack.eval.attacks.ours import OURS
        from orthattack.eval.suite import AttackSpec, DataSpec, ModelSpec, Suite

        keys = [key for spec in (Suite, DataSpec, ModelSpec, AttackSpec) for key in spec.model_fields]
        others = ["[[models]]", "[[attacks]]", "[data]", "seed", "inf", "nan", "-1", "1e400", "4/255", "true", "alpha",
                  "restarts", "scope", "enforce", "loss", "directions", "foolbox:LinfPGD", "cifar10-samples", "linf",
                  "l2", "l1", "cifar10-robust", '"""', "1979-05-27T07:32:00Z", "99999999999999999999"]  # fmt: skip
        return [word.encode() for word in dict.fromkeys([*keys, *OURS, *others])]
    return {
        "labels": [b"file,label\n", b"folder,label\n", b"wnid,index\n", b"cat/0.png", b"cat/1.png", b"../", b"\r\n",
                   b'"', b"zebra", b"\x00", b"\xef\xbb\xbf", b"cat", b"\n# "],
        "image": [b"\x89PNG\r\n\x1a\n", b"IHDR", b"IDAT", b"IEND", b"PLTE", b"tRNS", b"acTL", b"fcTL", b"fdAT", b"iCCP",
                  b"GIF89a", b"\xff\xd8\xff\xe0", b"JFIF\x00", b"\xff\xda", b"\xff\xc0", b"\xff\xc2", b"Exif\x00\x00",
                  b"II*\x00", b"MM\x00*", b"BM", b"RIFF", b"WEBPVP8L", b"WEBPVP8X", b"ANIM", b"ANMF", b"P6\n", b"P5\n",
                  b"P7\n", b"%!PS-Adobe", b"MPF\x00", b"Adobe\x00"],
        "checkpoint": [b"{\"", b"__metadata__", b"dtype", b"F32", b"BF16", b"I64", b"shape", b"data_offsets",
                       b"1.weight", b"1.bias", b"PK\x03\x04", b"PK\x01\x02", b"PK\x05\x06", b"data.pkl",
                       b"\x80\x02",
                       b"ctorch._utils\n_rebuild_tensor_v2\n", b"cos\nsystem\n", b"ccollections\nOrderedDict\n",
                       b"classes", b"mean", b"std", b"state_dict"],
    }[target]  # fmt: skip


def _escaped(word: bytes) -> str:
    return "".join(chr(c) if 32 <= c < 127 and c not in b'"\\' else f"\\x{c:02x}" for c in word)


if __name__ == "__main__":
    sys.exit(main())

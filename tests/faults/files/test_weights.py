"""Weights files that do not fit, are damaged or hostile, through the command line: one line, exit code 2, nothing run.

What each message says of missing, unexpected and misshapen weights is in tests/eval/test_models.py.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch
import torchvision
from safetensors.torch import save, save_file

ARCHITECTURE = "squeezenet1_1"
HEAD = "classifier.1.weight"


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return torchvision.models.get_model(ARCHITECTURE, num_classes=10).state_dict()


class Code:
    """Leaves a file behind, if it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> tuple[object, tuple[str, str]]:
        return (open, (self.path, "w"))


def saved(content: object, **options: object) -> bytes:
    stream = io.BytesIO()
    torch.save(content, stream, **options)
    return stream.getvalue()


def claiming(header: bytes, length: int | None = None) -> bytes:
    return struct.pack("<Q", len(header) if length is None else length) + header + bytes(64)


def evaluate(evaluated, dataset, path):
    return evaluated("--model", ARCHITECTURE, "--weights", path, "--data", dataset, "--image-size", 32)


def refused(evaluated, dataset, path, message):
    told = evaluate(evaluated, dataset, path)
    assert (told.code, told.out) == (2, "")
    assert message in told.err
    assert told.err.count("\n") == 1
    assert not (dataset.parent / "run" / "manifest.json").exists()


def test_whole_weights_are_evaluated(state, dataset, evaluated, tmp_path):
    """So that what is refused below is refused for its fault."""
    save_file(state, tmp_path / "w.safetensors")
    assert evaluate(evaluated, dataset, tmp_path / "w.safetensors").code == 0


SAFETENSORS = {
    "missing": (lambda s: save({k: v for k, v in s.items() if k != "features.0.bias"}), "1 missing (features.0.bias)"),
    "extra": (lambda s: save({**s, "more": torch.ones(1)}), "1 unexpected (more)"),
    "shape": (
        lambda s: save({**s, "features.0.bias": torch.ones(7)}),
        "1 of another shape (features.0.bias is (7,) in the file, (64,) in the model)",
    ),
    "nan": (lambda s: save({**s, "features.0.bias": torch.full((64,), torch.nan)}), "has NaN or infinite weights"),
    "infinite": (lambda s: save({**s, "features.0.bias": torch.full((64,), torch.inf)}), "has NaN or infinite"),
    "empty": (lambda s: b"", "is empty: fetch it again"),
    "truncated": (lambda s: save(s)[:-1000], "is not a whole safetensors file"),
    "header cut": (lambda s: save(s)[:100], "is not a whole safetensors file"),
    "huge header": (lambda s: claiming(b'{"a":1}', 2**62), "is not a whole safetensors file"),
    "huge tensor": (
        lambda s: claiming(b'{"a":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,64]}}'),
        "is not a whole safetensors file",
    ),
    "huge and empty": (
        # Of no bytes at all, but said to be the weights of 10**12 classes.
        lambda s: claiming(
            json.dumps({HEAD: {"dtype": "F32", "shape": [10**12, 0], "data_offsets": [0, 0]}}).encode() + b" "
        )[:-64],
        "does not look like weights of squeezenet1_1",
    ),
    "deep metadata": (
        lambda s: save(s, {"classes": "[" * 100_000}),
        None,  # is no list, and is ignored
    ),
    "mean": (lambda s: save(s, {"mean": "[0, 0, 1" + "0" * 400 + "]"}), "it must be three finite numbers"),
    "std": (lambda s: save(s, {"std": "[1, 1, 0]"}), "it must be three finite numbers, std > 0"),
    "names": (lambda s: save(s, {"classes": '["a"]'}), "names 1 classes but has weights for 10"),
}


@pytest.mark.parametrize("kind", SAFETENSORS)
def test_safetensors_that_cannot_be_used_are_refused(kind, state, dataset, evaluated, tmp_path):
    content, message = SAFETENSORS[kind]
    path = tmp_path / "w.safetensors"
    path.write_bytes(content(state))
    if message is None:
        assert evaluate(evaluated, dataset, path).code == 0
    else:
        refused(evaluated, dataset, path, message)


def test_class_names_that_are_no_text_do_not_stop_a_report(state, dataset, evaluated, tmp_path):
    names = [f"<b>{k}</b>\\ud800" for k in range(10)]
    save_file(state, tmp_path / "w.safetensors", {"classes": "[" + ", ".join(f'"{name}"' for name in names) + "]"})
    for k in range(10):
        (dataset / str(k)).rename(dataset / f"<b>{k}<")
    (tmp_path / "classes.csv").write_text("folder,label\n" + "".join(f"<b>{k}<,{k}\n" for k in range(10)))
    done = evaluated(
        "--model", ARCHITECTURE, "--weights", tmp_path / "w.safetensors", "--data", dataset, "--image-size", 32,
        "--classes", tmp_path / "classes.csv",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "<b>3</b>" not in (tmp_path / "run" / "report.html").read_text(encoding="utf-8")


def bombed() -> bytes:
    """A PyTorch file that is compressed, as PyTorch's never are: 256 MB of zeros in 250 kB."""
    stream = io.BytesIO()
    whole = zipfile.ZipFile(io.BytesIO(saved({"a": torch.zeros(4)})))
    with whole, zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as bomb:
        for entry in whole.infolist():
            content = whole.read(entry)
            bomb.writestr(entry.filename, bytes(2**28) if entry.filename.endswith("data/0") else content)
    return stream.getvalue()


PYTORCH = {
    "empty": (lambda s: b"", "is empty: fetch it again"),
    "truncated": (lambda s: saved(s)[:-1000], "is cut off, or damaged"),
    "legacy, truncated": (
        lambda s: saved(s, _use_new_zipfile_serialization=False)[:-1000],
        "is neither a safetensors nor a PyTorch file, or damaged (unexpected EOF, expected",
    ),
    "text": (lambda s: b"hello", "is text, not weights"),
    "list": (lambda s: saved([1, 2]), "is not a state dict"),
    "numbers": (lambda s: saved({"a": 1}), "is not a state dict"),
    "sparse": (lambda s: saved({HEAD: torch.eye(3).to_sparse()}), "is no plain tensor"),
    "complex": (lambda s: saved({HEAD: torch.ones(3, dtype=torch.complex64)}), "is no plain tensor"),
    "a view": (
        # One number, said to be the weights of a thousand million classes.
        lambda s: saved({**s, HEAD: torch.ones(1).expand(10**9, 512, 1, 1)}),
        "is no plain tensor whose numbers are in the file",
    ),
    "compressed": (lambda s: bombed(), "is refused: it is compressed"),
}


@pytest.mark.parametrize("kind", PYTORCH)
def test_pytorch_files_that_cannot_be_used_are_refused(kind, state, dataset, evaluated, tmp_path):
    content, message = PYTORCH[kind]
    path = tmp_path / "w.pt"
    path.write_bytes(content(state))
    refused(evaluated, dataset, path, message)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle", "pickle 0", "called safetensors"])
def test_code_in_a_weights_file_is_refused_and_not_run(form, state, dataset, evaluated, tmp_path):
    trace = tmp_path / "was run"
    content = {**state, "more": Code(trace)}
    data = {
        "zip": lambda: saved(content),
        "legacy": lambda: saved(content, _use_new_zipfile_serialization=False),
        "pickle": lambda: pickle.dumps(Code(trace)),
        "pickle 0": lambda: pickle.dumps(Code(trace), protocol=0),
        "called safetensors": lambda: saved(content),
    }[form]()
    path = tmp_path / ("w.safetensors" if form == "called safetensors" else "w.pt")
    path.write_bytes(data)
    refused(evaluated, dataset, path, "is refused: it holds more than tensors, and loading it could run code")
    assert not trace.exists()
    if form.startswith("pickle"):  # the file is what it is meant to be
        pickle.loads(data).close()
        assert trace.exists()


def test_paths_that_are_no_files_are_refused(dataset, evaluated, tmp_path):
    refused(evaluated, dataset, tmp_path, "is a folder")
    refused(evaluated, dataset, tmp_path / "none.pt", "does not exist")
    refused(evaluated, dataset, "IMAGENET1K_" + "x" * 5000, "has no weights")
    refused(evaluated, dataset, "x" * 5000 + ".pt", "does not exist")

"""Measure how strong the attacks are beside Foolbox's and torchattacks', at equal eps, steps and step size.

    python benchmarks/strength.py --weights FILE --data FOLDER [--out FOLDER] [--norms linf l2] [--rows NAME ...]

On a torchvision ResNet-18 with 20 classes at 64x64 and a folder of 20 class folders. Every attack gets the same images,
those that the model classifies correctly, in the same chunks; its output is judged here, by the model as it is stored:
prediction, norm and cosine recomputed from the returned images. The attacks see the same function in a faster form,
with its normalisation layers folded into the convolutions and, where no gradient is asked for, its weights packed once.

A row is one attack in one norm. Each chunk of it goes to the row's file as soon as it is finished, so a run that is
stopped at any moment goes on with the next chunk when the same command is given again; random numbers depend on row and
chunk alone, so the result is the same. Then the table is printed in Markdown. With --out benchmarks/strength it starts
from the rows of docs/strength.md; --report prints what is there and attacks nothing. On a machine that is busy with
other things, two processes with a thread each (--threads 1 --parts 2 --part 0, and 1) do more than one with two.

Foolbox and torchattacks are needed: pip install torchattacks --no-deps
"""

from __future__ import annotations

import argparse
import json
import platform
import time
import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import foolbox
import torch
import torchattacks
from safetensors import safe_open
from tabulate import tabulate
from torch import Tensor, nn
from torch.fx.experimental.optimization import fuse
from torchvision.datasets import ImageFolder
from torchvision.models import resnet18
from torchvision.transforms import ToTensor

import orthattack.attacks
from orthattack import Normalized, alignment
from orthattack.eval.attacks.counter import CallCounter

EPS = {"linf": 4 / 255, "l2": 0.5}
STEPS = (10, 20, 50)
CLASSES, SIZE = 20, 64
CHUNK, SMALL_CHUNK = 250, 32  # the small ones for the rows that take an hour
# A quarter of our AutoAttack's default steps and a tenth of its queries.
AUTO_STEPS, QUERIES = 25, 500
Record = dict[str, Any]
Runner = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Setting:
    """A model, the ball, and the seed of the random numbers."""

    model: nn.Module
    norm: str
    seed: int

    @property
    def eps(self) -> float:
        return EPS[self.norm]

    @property
    def torchattacks_norm(self) -> str:
        return {"linf": "Linf", "l2": "L2"}[self.norm]


def foolbox_pgd(s: Setting, steps: int) -> Runner:
    attack = {"linf": foolbox.attacks.LinfPGD, "l2": foolbox.attacks.L2PGD}[s.norm](
        rel_stepsize=2.5 / steps, steps=steps
    )
    model = foolbox.PyTorchModel(s.model, bounds=(0, 1))
    return lambda images, labels: attack(model, images, labels, epsilons=s.eps)[1]


def torchattacks_pgd(s: Setting, steps: int) -> Runner:
    attack = torchattacks.PGD if s.norm == "linf" else torchattacks.PGDL2
    runner: Runner = attack(s.model, eps=s.eps, alpha=2.5 * s.eps / steps, steps=steps, random_start=True)
    return runner


def torchattacks_apgd(s: Setting, steps: int) -> Runner:
    runner: Runner = torchattacks.APGD(s.model, norm=s.torchattacks_norm, eps=s.eps, steps=steps, seed=s.seed)
    return runner


def torchattacks_auto(s: Setting, _: int) -> Runner:
    runner: Runner = torchattacks.AutoAttack(
        s.model, norm=s.torchattacks_norm, eps=s.eps, n_classes=CLASSES, seed=s.seed
    )
    return runner


def ours(name: str) -> Callable[[Setting, int], Runner]:
    def make(s: Setting, steps: int) -> Runner:
        options: dict[str, Any] = {"norm": s.norm, "eps": s.eps, "generator": torch.Generator().manual_seed(s.seed)}
        if name.endswith("AutoAttack"):
            options["queries"] = QUERIES
        else:  # It changes no success, only the calls: a sample that has fallen takes no more steps.
            options["early_stop"] = True
        runner: Runner = getattr(orthattack.attacks, name)(s.model, steps=steps, **options)
        return runner

    return make


ROWS: dict[str, tuple[Callable[[Setting, int], Runner], int, int]] = {
    **{
        f"{name}-{steps}": (make, steps, CHUNK)
        for steps in STEPS
        for name, make in {
            "Foolbox PGD": foolbox_pgd,
            "torchattacks PGD": torchattacks_pgd,
            "PGD": ours("PGD"),
            "OrthoPGD": ours("OrthoPGD"),
        }.items()
    },
    "torchattacks APGD-100": (torchattacks_apgd, 100, CHUNK),
    "APGD-100": (ours("APGD"), 100, CHUNK),
    "OrthoAPGD-100": (ours("OrthoAPGD"), 100, CHUNK),
    "torchattacks AutoAttack": (torchattacks_auto, 0, SMALL_CHUNK),
    "AutoAttack": (ours("AutoAttack"), AUTO_STEPS, 2 * SMALL_CHUNK),
    "OrthoAutoAttack": (ours("OrthoAutoAttack"), AUTO_STEPS, 2 * SMALL_CHUNK),
}
"""How to make each attack, its steps, and how many images a chunk has at most."""


class Fast(nn.Module):
    """A model for many evaluations: what needs no gradient goes through a copy with its weights packed beforehand."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            # Superseded by torch.compile, which would need a C++ compiler, and compile anew for each batch size.
            traced = torch.jit.trace(model, torch.rand(CHUNK, 3, SIZE, SIZE))  # type: ignore[no-untyped-call]
            self.packed = torch.jit.optimize_for_inference(traced)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model(images) if images.requires_grad else self.packed(images)
        return logits


def load_model(weights: Path) -> tuple[nn.Module, nn.Module]:
    """The classifier of images in [0, 1] as it is stored, in float32, and the same function in a faster form."""
    model = resnet18(num_classes=CLASSES)
    with safe_open(weights, framework="pt") as file:
        model.load_state_dict({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    model.eval().requires_grad_(False)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    fast = Normalized(fuse(model).to(memory_format=torch.channels_last), mean, std).eval().requires_grad_(False)
    return Normalized(model, mean, std).eval(), Fast(fast).eval()


def load_images(folder: Path) -> tuple[Tensor, Tensor]:
    """All photographs and their classes, class after class."""
    photographs = ImageFolder(str(folder), transform=ToTensor())
    if len(photographs.classes) != CLASSES or photographs[0][0].shape != (3, SIZE, SIZE):
        raise SystemExit(f"{folder} must have {CLASSES} class folders of {SIZE}x{SIZE} photographs")
    images, labels = zip(*photographs, strict=True)
    return torch.stack(images), torch.tensor(labels)


def predictions(model: nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        return torch.cat([model(part).argmax(1) for part in torch.split(images, CHUNK)])


def attack_chunk(
    name: str, norm: str, model: nn.Module, fast: nn.Module, images: Tensor, labels: Tensor, first: int, stride: int
) -> Record:
    """The images first, first + stride, first + 2 stride, ...: what the attack returned, judged here."""
    make, steps, _ = ROWS[name]
    seed = zlib.crc32(f"{norm} {name} {first}".encode())
    torch.manual_seed(seed)
    counter = CallCounter(fast).eval()
    x, y = images[first::stride], labels[first::stride]
    wall, busy = time.perf_counter(), time.process_time()
    adversarials = make(Setting(counter, norm, seed), steps)(x, y).detach()
    wall, busy = time.perf_counter() - wall, time.process_time() - busy
    if float(adversarials.min()) < 0 or float(adversarials.max()) > 1:
        raise RuntimeError(f"{name} returned images outside [0, 1]")
    robust = predictions(model, adversarials) == y
    delta = adversarials.double() - x.double()
    flat = delta.flatten(1)
    return {
        "norm": norm,
        "attack": name,
        "first": first,
        "stride": stride,
        "robust": "".join("01"[r] for r in robust.tolist()),
        "fooled_only_fast": int((robust & (predictions(fast, adversarials) != y)).sum()),
        "max_norm": float((flat.abs().amax(1) if norm == "linf" else flat.norm(dim=1)).max()),
        "max_abs_cosine": float(alignment(delta, x.double()).abs().max()),
        "forward_calls": counter.forward_calls / len(x),
        "gradient_calls": counter.gradient_calls / len(x),
        "seconds": wall,
        "cpu_seconds": busy,
        "threads": torch.get_num_threads(),
        "versions": {p: version(p) for p in ("orthattack", "torch", "foolbox", "torchattacks")},
        "machine": platform.machine(),
    }


def read(path: Path) -> list[Record]:
    """The chunks of a row that are there."""
    records: list[Record] = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        try:
            records.append(json.loads(line))
        except ValueError:  # noqa: PERF203 -- of a run that was killed while it wrote: the chunk is attacked again
            continue
    return records


def append(path: Path, record: Record) -> None:
    """Add a chunk in one write, so that processes that share a row do not mix their lines."""
    is_torn = path.exists() and not path.read_bytes().endswith(b"\n")
    with path.open("ab", buffering=0) as file:
        file.write(("\n" * is_torn + json.dumps(record) + "\n").encode())


def cells(name: str, norm: str, records: list[Record], total: int, correct: int) -> list[str]:
    """A line of the table."""
    seen = sum(len(r["robust"]) for r in records)
    if seen == 0:
        return [name, "not measured"]
    robust = sum(r["robust"].count("1") for r in records)
    # Of the images that were misclassified to begin with, as many go with a part of the chunks.
    share = 100 * robust / (total * seen / correct)

    def mean(key: str) -> float:
        return float(sum(r[key] * len(r["robust"]) for r in records) / seen)

    return [
        name,
        f"{share:.1f} %" + ("" if seen == correct else f" ({seen} of {correct} images)"),
        f"{max(r['max_abs_cosine'] for r in records):.1e}",
        f"{max(r['max_norm'] for r in records) / EPS[norm]:.7f}",
        f"{mean('gradient_calls'):.0f}",
        f"{mean('forward_calls'):.0f}",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/strength"))
    parser.add_argument("--norms", nargs="+", choices=list(EPS), default=list(EPS))
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="NAME")
    parser.add_argument("--parts", type=int, default=1, help="how many processes share the chunks of each row")
    parser.add_argument("--part", type=int, default=0, help="which of them this is, from 0")
    parser.add_argument("--report", action="store_true", help="print the tables of what is there")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)

    model, fast = load_model(args.weights)
    images, labels = load_images(args.data)
    total = len(images)
    with torch.inference_mode():
        apart = max(float((model(x) - fast(x)).abs().max()) for x in torch.split(images, CHUNK))
    if apart > 1e-4:
        raise RuntimeError(f"the faster form of the model has other logits, by up to {apart:.1e}")
    correct = predictions(model, images) == labels
    images, labels = images[correct], labels[correct]
    print(f"{total} images, clean accuracy {100 * len(images) / total:.1f} %, logits apart by {apart:.1e}", flush=True)

    for norm in args.norms:
        table = []
        for name in args.rows:
            path = args.out / f"{norm} {name}.jsonl"
            done = {k for r in read(path) for k in range(r["first"], len(images), r["stride"])}
            stride = -(-len(images) // ROWS[name][2])
            missing = [] if args.report else [first for first in range(stride) if first not in done]
            for first in (k for k in missing if k % args.parts == args.part):
                record = attack_chunk(name, norm, model, fast, images, labels, first, stride)
                append(path, record)
                print(
                    f"{norm} {name}, chunk {first} of {stride}: {record['robust'].count('1')} of "
                    f"{len(record['robust'])} robust, {record['seconds']:.0f} s, {record['cpu_seconds']:.0f} CPU s",
                    flush=True,
                )
            table.append(cells(name, norm, read(path), total, len(images)))
        head = ["attack", "robust accuracy", "max |cos|", "max norm / eps", "gradients", "forwards"]
        print(f"\n{norm}, eps {EPS[norm]:.6g}\n")
        print(tabulate(table, head, tablefmt="github", disable_numparse=True), flush=True)


if __name__ == "__main__":
    main()

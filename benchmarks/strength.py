"""Measure how strong the attacks are beside Foolbox's and torchattacks', at equal eps, steps and step size.

    python benchmarks/strength.py --weights FILE --data FOLDER [--out FOLDER] [--norms linf l2] [--rows NAME ...]

On a torchvision ResNet-18 with 20 classes at 64x64 and a folder of class folders. Every attack gets the same images,
those that the model classifies correctly, in the same batches; its output is judged here: prediction, norm and cosine
recomputed from the returned images. A row (one attack, one norm) is written to the folder as soon as it is finished, so
a run that is stopped goes on where it was when the same command is given again; then the table is printed in Markdown.
With --out benchmarks/strength it starts from the rows of docs/strength.md.

Foolbox and torchattacks are needed: pip install torchattacks --no-deps
"""

from __future__ import annotations

import argparse
import json
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import foolbox
import torch
import torchattacks
from tabulate import tabulate
from torch import Tensor, nn

import orthattack
from orthattack import alignment
from orthattack.eval.attacks import CallCounter
from orthattack.eval.data import Batch, load_photographs
from orthattack.eval.models import load_classifier

EPS = {"linf": 4 / 255, "l2": 0.5}
STEPS = (10, 20, 50)
QUERIES = 1000
Runner = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Setting:
    """A model and the ball."""

    model: nn.Module
    norm: str
    classes: int

    @property
    def eps(self) -> float:
        return EPS[self.norm]

    @property
    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(0)


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
    runner: Runner = torchattacks.APGD(s.model, norm={"linf": "Linf", "l2": "L2"}[s.norm], eps=s.eps, steps=steps)
    return runner


def torchattacks_auto(s: Setting, _: int) -> Runner:
    norm = {"linf": "Linf", "l2": "L2"}[s.norm]
    runner: Runner = torchattacks.AutoAttack(s.model, norm=norm, eps=s.eps, n_classes=s.classes, seed=0)
    return runner


def ours(name: str) -> Callable[[Setting, int], Runner]:
    def make(s: Setting, steps: int) -> Runner:
        options: dict[str, Any] = {"norm": s.norm, "eps": s.eps, "generator": s.generator}
        if name.endswith("AutoAttack"):
            options["queries"] = QUERIES
        else:  # It changes no success, only the calls: a sample that has fallen takes no more steps.
            options["early_stop"] = True
        runner: Runner = getattr(orthattack, name)(s.model, steps=steps, **options)
        return runner

    return make


ROWS: dict[str, tuple[Callable[[Setting, int], Runner], int]] = {
    **{
        f"{name}-{steps}": (make, steps)
        for steps in STEPS
        for name, make in {
            "Foolbox PGD": foolbox_pgd,
            "torchattacks PGD": torchattacks_pgd,
            "PGD": ours("PGD"),
            "OrthoPGD": ours("OrthoPGD"),
        }.items()
    },
    "torchattacks APGD-100": (torchattacks_apgd, 100),
    "APGD-100": (ours("APGD"), 100),
    "OrthoAPGD-100": (ours("OrthoAPGD"), 100),
    "torchattacks AutoAttack": (torchattacks_auto, 0),
    "AutoAttack": (ours("AutoAttack"), 100),
    "OrthoAutoAttack": (ours("OrthoAutoAttack"), 100),
}


def measure(setting: Setting, name: str, images: Tensor, labels: Tensor, batch_size: int) -> dict[str, object]:
    """One row: what the attack returned, judged here."""
    make, steps = ROWS[name]
    counter = CallCounter(setting.model).eval()
    attack = make(Setting(counter, setting.norm, setting.classes), steps)
    torch.manual_seed(0)
    robust: list[bool] = []
    sizes, cosines, seconds = [0.0], [0.0], 0.0
    for x, y in zip(torch.split(images, batch_size), torch.split(labels, batch_size), strict=True):
        start = time.perf_counter()
        adversarials = attack(x, y).detach()
        seconds += time.perf_counter() - start
        with torch.inference_mode():
            robust += (setting.model(adversarials).argmax(1) == y).tolist()
        delta = adversarials.double() - x.double()
        flat = delta.flatten(1)
        sizes.append(float((flat.abs().amax(1) if setting.norm == "linf" else flat.norm(dim=1)).max()))
        cosines.append(float(alignment(delta, x.double()).abs().max()))
        if float(adversarials.min()) < 0 or float(adversarials.max()) > 1:
            raise RuntimeError(f"{name} returned images outside [0, 1]")
    return {
        "norm": setting.norm,
        "attack": name,
        "robust": "".join("01"[r] for r in robust),
        "max_norm": max(sizes),
        "max_abs_cosine": max(cosines),
        "forward_calls": counter.forward_calls / len(images),
        "gradient_calls": counter.gradient_calls / len(images),
        "seconds": seconds,
        "threads": torch.get_num_threads(),
        "versions": {p: version(p) for p in ("orthattack", "torch", "foolbox", "torchattacks")},
        "machine": platform.machine(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weights", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/strength"))
    parser.add_argument("--norms", nargs="+", choices=list(EPS), default=list(EPS))
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS), metavar="NAME")
    parser.add_argument("--limit", type=int, help="only the first images (of the shuffled set)")
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)

    classifier = load_classifier("resnet18", args.weights, image_size=64)
    model = classifier.model.eval().requires_grad_(False)
    photographs = load_photographs(str(args.data), classifier).limited(args.limit)
    batches = [b for b in photographs.batches(250, classifier.preprocessing) if isinstance(b, Batch)]
    images, labels = torch.cat([b.images for b in batches]), torch.cat([b.labels for b in batches])
    with torch.inference_mode():
        correct = torch.cat([model(x).argmax(1) for x in torch.split(images, 250)]) == labels
    total = len(images)
    images, labels = images[correct], labels[correct]
    print(f"{total} images, clean accuracy {100 * len(images) / total:.1f} %")

    for norm in args.norms:
        table = []
        for name in args.rows:
            path = args.out / f"{norm} {name}.json"
            if not path.exists():
                row = measure(Setting(model, norm, classifier.num_classes), name, images, labels, args.batch_size)
                partial = path.with_suffix(".partial")
                partial.write_text(json.dumps(row) + "\n", encoding="utf-8")
                partial.replace(path)
            row = json.loads(path.read_text(encoding="utf-8"))
            table.append(
                [
                    name,
                    f"{100 * row['robust'].count('1') / total:.1f} %",
                    f"{row['max_abs_cosine']:.1e}",
                    f"{row['max_norm'] / EPS[norm]:.7f}",
                    f"{row['gradient_calls']:.0f}",
                    f"{row['forward_calls']:.0f}",
                    f"{row['seconds']:.0f}",
                ]
            )
            print(f"{norm} {name}: {table[-1][1]}", flush=True)
        head = ["attack", "robust accuracy", "max |cos|", "max norm / eps", "gradients", "forwards", "seconds"]
        print(f"\n{norm}, eps {EPS[norm]:.6g}\n")
        print(tabulate(table, head, tablefmt="github", disable_numparse=True), flush=True)


if __name__ == "__main__":
    main()

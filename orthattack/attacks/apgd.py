"""APGD: projected gradient descent that sets its own step size, with and without the orthogonality."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from orthattack.attacks.ascent import Climb
from orthattack.attacks.base import Attack, GradientOptions
from orthattack.attacks.rules import AutoSparse, AutoStep
from orthattack.models import Model
from orthattack.threat import Norm


def climb_of(norm: Norm, steps: int, restarts: int = 1, rho: float = 0.75) -> Climb:
    """APGD's search, from random starts."""
    adaptive = AutoStep(rho)  # refuses a wrong rho in L1 too, where there is none
    rule, rate = (AutoSparse(), 1.0) if norm == "l1" else (adaptive, 2.0)
    return Climb(rule, steps, rate, random_start=True, restarts=restarts)


class APGD(Attack):
    """Auto-PGD (Croce & Hein 2020, arXiv:2003.01690): no step size to choose::

        z_{t+1} = project(x_t + alpha * sign(∇L(x_t)))
        x_{t+1} = project(x_t + 3/4 (z_{t+1} - x_t) + 1/4 (x_t - x_{t-1}))

    alpha starts at 2 eps. At checkpoints, each sample whose loss has stopped rising goes back to its best point with
    half the step size (`orthattack.attacks.rules.AutoStep` has the conditions). In L1 it is the number of pixels that a
    step moves that adapts (Croce & Hein 2021, arXiv:2103.01208; `orthattack.attacks.rules.AutoSparse`).

    Args:
        model: as for `PGD`, like `norm`, `eps`, `steps` and `restarts`, each from a random point.
        rho: share of the steps in which the loss must rise for the step size to stay, in (0, 1); not in L1.
        **options: as for `PGD`.
    """

    def __init__(
        self,
        model: Model,
        norm: Norm = "linf",
        eps: float | Tensor = 4 / 255,
        steps: int = 100,
        restarts: int = 1,
        rho: float = 0.75,
        **options: Unpack[GradientOptions],
    ) -> None:
        super().__init__(model, norm, eps, climb_of(norm, steps, restarts, rho), **options)


class OrthoAPGD(APGD, scope="image"):
    """`APGD` whose perturbation stays orthogonal to the image, exactly and at every step.

    z is OrthoPGD's best step, and the mixture with the momentum lies on the plane, so only the box needs projecting.
    Arguments as for `APGD`.
    """

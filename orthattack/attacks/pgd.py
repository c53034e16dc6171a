"""Projected gradient descent and its single-step case, with and without the orthogonality constraint."""

from __future__ import annotations

from typing import final

import torch

from orthattack.attacks.attack import Attack, Enforce, Reference
from orthattack.attacks.oracle import Precision
from orthattack.losses import Loss
from orthattack.model import Model
from orthattack.projection import Scope
from orthattack.threat import Norm, ThreatModel

__all__ = ["FGSM", "PGD", "OrthoFGSM", "OrthoPGD"]


@final
class OrthoPGD(Attack):
    """Projected gradient descent whose perturbation stays orthogonal to the image, exactly and at every step::

        x_{t+1} = argmax_y ⟨∇L(x_t), y⟩  subject to
                  ‖y - x_t‖ <= alpha,  ‖y - x‖ <= eps,  low <= y <= high,  ⟨y - x, x⟩ = 0

    Args:
        model: images (N, C, H, W) in `bounds` to logits (N, K); it normalises its input itself
            (see `orthattack.Normalized`) and comes back as it was. A plain function is taken as it is: put a module
            that it calls in evaluation mode first.
        norm: "linf" or "l2".
        eps: radius of the ball, in pixel units, e.g. ``4 / 255``.
        alpha: step size in pixel units; by default ``2.5 * eps / steps``, which reaches any point of the ball.
        steps: gradient steps per restart, at least 1.
        random_start: start at a random point of the threat model instead of the image.
        restarts: how often to start; the best result of each sample is kept.
        loss: "ce", "margin", "dlr", or a function of (logits, labels) returning (N,) values.
        targeted: labels are the classes to reach.
        scope: orthogonal as a whole "image", per "channel", or per "pixel" colour.
        reference: for ``enforce="gradient"``, project against the "clean" image or the current "iterate".
        enforce: "perturbation" keeps x_adv - x orthogonal to x; "gradient" only projects each gradient, the textbook
            form, whose signs and clips undo most of the projection (docs/method.md).
        early_stop: drop a sample from the batch as soon as it is fooled.
        bounds: smallest and largest pixel value.
        generator: source of the random starts; by default one of the attack's own, seeded from torch's seed.
        precision: "bfloat16" computes gradients under autocast; success is judged in the model's own precision.

    Raises:
        ValueError: an option out of its range; the call raises it for bad images, labels or models.

    Source: Madry et al. 2018, arXiv:1706.06083, for PGD; docs/method.md for the orthogonal step.

    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    >>> images, labels = torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 2, 0])
    >>> result = OrthoPGD(model, eps=8 / 255).run(images, labels)
    >>> bool((result.cosine <= 1e-6).all()), bool((result.norm <= 8 / 255 * (1 + 1e-6)).all())
    (True, True)
    """

    def __init__(
        self,
        model: Model,
        norm: Norm = "linf",
        eps: float = 4 / 255,
        alpha: float | None = None,
        steps: int = 10,
        random_start: bool = True,
        restarts: int = 1,
        loss: Loss = "ce",
        targeted: bool = False,
        scope: Scope = "image",
        reference: Reference = "clean",
        enforce: Enforce = "perturbation",
        early_stop: bool = False,
        bounds: tuple[float, float] = (0, 1),
        generator: torch.Generator | None = None,
        precision: Precision = "float32",
    ) -> None:
        super().__init__(
            model,
            threat=ThreatModel(norm, eps, bounds, scope),
            enforce=enforce,
            reference=reference,
            alpha=alpha,
            steps=steps,
            random_start=random_start,
            restarts=restarts,
            loss=loss,
            targeted=targeted,
            early_stop=early_stop,
            generator=generator,
            precision=precision,
        )


@final
class PGD(Attack):
    """Projected gradient descent (Madry et al. 2018, arXiv:1706.06083): OrthoPGD without the orthogonality::

        x_{t+1} = project(x_t + alpha * sign(∇L(x_t)))

    for L-infinity; for L2 the gradient is normalised instead of its sign taken. Arguments as for `OrthoPGD`.
    """

    def __init__(
        self,
        model: Model,
        norm: Norm = "linf",
        eps: float = 4 / 255,
        alpha: float | None = None,
        steps: int = 10,
        random_start: bool = True,
        restarts: int = 1,
        loss: Loss = "ce",
        targeted: bool = False,
        early_stop: bool = False,
        bounds: tuple[float, float] = (0, 1),
        generator: torch.Generator | None = None,
        precision: Precision = "float32",
    ) -> None:
        super().__init__(
            model,
            threat=ThreatModel(norm, eps, bounds, scope=None),
            alpha=alpha,
            steps=steps,
            random_start=random_start,
            restarts=restarts,
            loss=loss,
            targeted=targeted,
            early_stop=early_stop,
            generator=generator,
            precision=precision,
        )


@final
class OrthoFGSM(Attack):
    """One step of size eps from the image, orthogonal to it: ``OrthoPGD(steps=1, alpha=eps, random_start=False)``.

    The step is the best one there is: the exact solution of the linear program for L-infinity. Arguments as for
    `OrthoPGD`. Source: Goodfellow et al. 2015, arXiv:1412.6572, for FGSM.
    """

    def __init__(
        self,
        model: Model,
        norm: Norm = "linf",
        eps: float = 4 / 255,
        loss: Loss = "ce",
        targeted: bool = False,
        scope: Scope = "image",
        enforce: Enforce = "perturbation",
        bounds: tuple[float, float] = (0, 1),
        precision: Precision = "float32",
    ) -> None:
        super().__init__(
            model,
            threat=ThreatModel(norm, eps, bounds, scope),
            enforce=enforce,
            alpha=eps,
            loss=loss,
            targeted=targeted,
            precision=precision,
        )


@final
class FGSM(Attack):
    """The fast gradient sign method (Goodfellow et al. 2015, arXiv:1412.6572): one step of size eps from the image::

        x_adv = clip(x + eps * sign(∇L(x)))

    Equal, bit for bit, to ``PGD(steps=1, alpha=eps, random_start=False)``. Arguments as for `OrthoPGD`.
    """

    def __init__(
        self,
        model: Model,
        norm: Norm = "linf",
        eps: float = 4 / 255,
        loss: Loss = "ce",
        targeted: bool = False,
        bounds: tuple[float, float] = (0, 1),
        precision: Precision = "float32",
    ) -> None:
        super().__init__(
            model,
            threat=ThreatModel(norm, eps, bounds, scope=None),
            alpha=eps,
            loss=loss,
            targeted=targeted,
            precision=precision,
        )

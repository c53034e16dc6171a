"""Attacks with a step size set in advance: FGSM, PGD, MI-FGSM and NI-FGSM, with and without the orthogonality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, final

import torch
from torch import Tensor

from orthattack.attacks.ascent import Climb, rate
from orthattack.attacks.base import Attack, Enforce, Options, OrthoOptions
from orthattack.attacks.fast_copy import Optimize
from orthattack.attacks.rules import Reference, Schedule, ScheduledStep
from orthattack.attacks.scoring import Precision
from orthattack.losses import Loss
from orthattack.models import Model
from orthattack.projection import Scope
from orthattack.threat import Direction, Norm

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["FGSM", "MIFGSM", "NIFGSM", "PGD", "OrthoFGSM", "OrthoMIFGSM", "OrthoNIFGSM", "OrthoPGD"]


@final
class OrthoPGD(Attack):
    """Projected gradient descent whose perturbation stays orthogonal to the image, exactly and at every step::

        x_{t+1} = argmax_y ⟨∇L(x_t), y⟩  subject to
                  ‖y - x_t‖ <= alpha,  ‖y - x‖ <= eps,  low <= y <= high,  ⟨y - x, x⟩ = 0

    Args:
        model: images (N, C, H, W) in `bounds` to logits (N, K); it normalises its input itself
            (see `orthattack.Normalized`) and comes back as it was. A plain function is taken as it is: put a module
            that it calls in evaluation mode first.
        norm: "linf", "l2" or "l1".
        eps: radius of the ball, in pixel units, e.g. ``4 / 255``; one number, or (N,) with one per sample.
        alpha: step size in pixel units; by default ``2.5 * eps / steps``, which reaches any point of the ball.
        steps: gradient steps per restart, at least 1.
        random_start: start at a random point of the threat model instead of the image.
        restarts: how often to start; the best result of each sample is kept.
        loss: "ce", "margin", "dlr", "logit-difference" (see `orthattack.losses.attack_loss` for the formulas), or a
            function of (logits, labels) returning (N,) values.
        targeted: labels are the classes to reach.
        scope: orthogonal to the image as a whole "image", per "channel", or per "pixel" colour; None: not at all.
        reference: for ``enforce="gradient"``, project against the "clean" image or the current "iterate".
        enforce: "perturbation" keeps x_adv - x orthogonal to x; "gradient" only projects each gradient, the textbook
            form, whose signs and clips undo most of the projection (docs/method.md).
        early_stop: drop a sample from the batch as soon as it is fooled.
        bounds: smallest and largest pixel value.
        generator: source of the random starts; by default one of the attack's own, seeded from torch's seed.
        precision: "bfloat16" computes gradients under autocast; success is judged in the model's own precision. On an
            x86 CPU without AVX-512 that is far slower than "float32", and a warning says so.
        optimize: "auto" takes gradients of a faster copy of the model, its batch norms folded into the convolutions and
            its weights channels last; "compile" compiles that too. Success is judged by the model itself. Where no copy
            can be made, a warning says why and the model does the work.
        schedule: of the step size: "fixed", "linear" or "cosine" decay to 0.
        momentum: 0, or the factor by which the sum of the past gradients is kept at each step (MI-FGSM).
        nesterov: take the gradient where the momentum leads (NI-FGSM).
        eot_samples: evaluations to average for a model that draws at random.
        directions: what else the perturbation stays orthogonal to (see `orthattack.ThreatModel`), for example
            ``["constant"]`` for the mean brightness.

    Raises:
        ValueError: an option out of its range; the call raises it for bad images, labels or models.

    Source: Madry et al. 2018, arXiv:1706.06083, for PGD; docs/method.md for the orthogonal step.

    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    >>> images, labels = torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 2, 0])
    >>> result = OrthoPGD(model, eps=8 / 255).run(images, labels)
    >>> bool((result.cosine <= 1e-6).all()), bool((result.norm <= 8 / 255 * (1 + 1e-6)).all())
    (True, True)
    """

    family = "PGD"

    def __init__(
        self,
        model: Model,
        norm: Norm = "linf",
        eps: float | Tensor = 4 / 255,
        alpha: float | None = None,
        steps: int = 10,
        random_start: bool = True,
        restarts: int = 1,
        loss: Loss = "ce",
        targeted: bool = False,
        scope: Scope | None = "image",
        reference: Reference = "clean",
        enforce: Enforce = "perturbation",
        early_stop: bool = False,
        bounds: tuple[float, float] = (0, 1),
        generator: torch.Generator | None = None,
        precision: Precision = "float32",
        schedule: Schedule = "fixed",
        momentum: float = 0.0,
        nesterov: bool = False,
        eot_samples: int = 1,
        directions: Sequence[Direction] = (),
        optimize: Optimize = "none",
    ) -> None:
        super().__init__(
            model,
            norm,
            eps,
            _scheduled(ScheduledStep(schedule, momentum, nesterov), alpha, steps, random_start, restarts),
            scope=scope,
            loss=loss,
            targeted=targeted,
            early_stop=early_stop,
            bounds=bounds,
            generator=generator,
            precision=precision,
            optimize=optimize,
            eot_samples=eot_samples,
            directions=directions,
            enforce=enforce,
            reference=reference,
        )


@final
class PGD(Attack):
    """Projected gradient descent (Madry et al. 2018, arXiv:1706.06083): OrthoPGD without the orthogonality::

        x_{t+1} = project(x_t + alpha * sign(∇L(x_t)))

    for L-infinity; for L2 the gradient is normalised instead of its sign taken, for L1 the signs of the hundredth of
    the pixels with the largest gradient. Arguments as for `OrthoPGD`.
    """

    def __init__(
        self,
        model: Model,
        norm: Norm = "linf",
        eps: float | Tensor = 4 / 255,
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
        schedule: Schedule = "fixed",
        momentum: float = 0.0,
        nesterov: bool = False,
        eot_samples: int = 1,
        optimize: Optimize = "none",
    ) -> None:
        super().__init__(
            model,
            norm,
            eps,
            _scheduled(ScheduledStep(schedule, momentum, nesterov), alpha, steps, random_start, restarts),
            scope=None,
            loss=loss,
            targeted=targeted,
            early_stop=early_stop,
            bounds=bounds,
            generator=generator,
            precision=precision,
            optimize=optimize,
            eot_samples=eot_samples,
        )


@final
class OrthoFGSM(Attack):
    """One step of size eps from the image, orthogonal to it: ``OrthoPGD(steps=1, alpha=eps, random_start=False)``.

    The step is the best one there is: the exact solution of the linear program for L-infinity. Arguments as for
    `OrthoPGD`. Source: Goodfellow et al. 2015, arXiv:1412.6572, for FGSM.

    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    >>> images, labels = torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 2, 0])
    >>> float(OrthoFGSM(model, eps=8 / 255).run(images, labels).cosine.max()) <= 1e-6
    True
    """

    family = "FGSM"

    def __init__(
        self,
        model: Model,
        norm: Norm = "linf",
        eps: float | Tensor = 4 / 255,
        loss: Loss = "ce",
        targeted: bool = False,
        scope: Scope | None = "image",
        enforce: Enforce = "perturbation",
        bounds: tuple[float, float] = (0, 1),
        precision: Precision = "float32",
        eot_samples: int = 1,
        directions: Sequence[Direction] = (),
        optimize: Optimize = "none",
    ) -> None:
        super().__init__(
            model,
            norm,
            eps,
            Climb(ScheduledStep(), steps=1, rate=1.0),
            scope=scope,
            enforce=enforce,
            loss=loss,
            targeted=targeted,
            bounds=bounds,
            precision=precision,
            optimize=optimize,
            eot_samples=eot_samples,
            directions=directions,
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
        eps: float | Tensor = 4 / 255,
        loss: Loss = "ce",
        targeted: bool = False,
        bounds: tuple[float, float] = (0, 1),
        precision: Precision = "float32",
        eot_samples: int = 1,
        optimize: Optimize = "none",
    ) -> None:
        super().__init__(
            model,
            norm,
            eps,
            Climb(ScheduledStep(), steps=1, rate=1.0),
            scope=None,
            loss=loss,
            targeted=targeted,
            bounds=bounds,
            precision=precision,
            optimize=optimize,
            eot_samples=eot_samples,
        )


@final
class MIFGSM(Attack):
    """Iterated FGSM with momentum (Dong et al. 2018, arXiv:1710.06081), whose adversarials transfer better::

        v_{t+1} = decay · v_t + ∇L(x_t) / mean|∇L(x_t)|
        x_{t+1} = project(x_t + alpha * sign(v_{t+1}))

    Args:
        model: as for `OrthoPGD`, like `norm` and `eps`.
        alpha: step size in pixel units; by default ``eps / steps``.
        steps: gradient steps, at least 1.
        decay: how much of the momentum is kept at each step, at least 0.
        **options: `loss`, `targeted`, `early_stop`, `bounds`, `generator`, `precision`, `optimize`, `eot_samples`,
            as for `OrthoPGD`.
    """

    def __init__(
        self,
        model: Model,
        norm: Norm = "linf",
        eps: float | Tensor = 4 / 255,
        alpha: float | None = None,
        steps: int = 10,
        decay: float = 1.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(model, norm, eps, _momentum(alpha, steps, decay, False), scope=None, **options)


@final
class OrthoMIFGSM(Attack):
    """`MIFGSM` whose perturbation stays orthogonal to the image: each step is OrthoPGD's best one along v.

    The momentum itself is not projected, the step is, so nothing of the image's direction is left to accumulate.

    Args:
        model: arguments as for `MIFGSM`, and `scope`, `directions`, `enforce`, `reference` as for `OrthoPGD`.
    """

    family = "MIFGSM"

    def __init__(
        self,
        model: Model,
        norm: Norm = "linf",
        eps: float | Tensor = 4 / 255,
        alpha: float | None = None,
        steps: int = 10,
        decay: float = 1.0,
        scope: Scope | None = "image",
        **options: Unpack[OrthoOptions],
    ) -> None:
        super().__init__(model, norm, eps, _momentum(alpha, steps, decay, False), scope=scope, **options)


@final
class NIFGSM(Attack):
    """Iterated FGSM with Nesterov's momentum (Lin et al. 2020, arXiv:1908.06281)::

        v_{t+1} = decay · v_t + ∇L(y_t) / mean|∇L(y_t)|,   y_t = project(x_t + alpha · decay · v_t)
        x_{t+1} = project(x_t + alpha * sign(v_{t+1}))

    for L-infinity. In L2 and L1 both moves have the size of the norm: x_{t+1} is a step of size alpha from x_t along
    v_{t+1}, as `PGD` takes it, and y_{t+1} one of size alpha · decay from x_{t+1}.

    Arguments as for `MIFGSM`. The points y_t are candidates too.
    """

    def __init__(
        self,
        model: Model,
        norm: Norm = "linf",
        eps: float | Tensor = 4 / 255,
        alpha: float | None = None,
        steps: int = 10,
        decay: float = 1.0,
        **options: Unpack[Options],
    ) -> None:
        super().__init__(model, norm, eps, _momentum(alpha, steps, decay, True), scope=None, **options)


@final
class OrthoNIFGSM(Attack):
    """`NIFGSM` whose perturbation stays orthogonal to the image. Arguments as for `OrthoMIFGSM`."""

    family = "NIFGSM"

    def __init__(
        self,
        model: Model,
        norm: Norm = "linf",
        eps: float | Tensor = 4 / 255,
        alpha: float | None = None,
        steps: int = 10,
        decay: float = 1.0,
        scope: Scope | None = "image",
        **options: Unpack[OrthoOptions],
    ) -> None:
        super().__init__(model, norm, eps, _momentum(alpha, steps, decay, True), scope=scope, **options)


def _scheduled(rule: ScheduledStep, alpha: float | None, steps: int, random_start: bool, restarts: int) -> Climb:
    return Climb(rule, steps, rate(2.5, steps), alpha, random_start, restarts)


def _momentum(alpha: float | None, steps: int, decay: float, nesterov: bool) -> Climb:
    return Climb(ScheduledStep("fixed", decay, nesterov), steps, rate(1.0, steps), alpha)

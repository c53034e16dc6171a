"""MI-FGSM and NI-FGSM: iterated FGSM with momentum, with and without the orthogonality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor
from typing_extensions import Unpack

from orthattack.attacks.ascent import Climb, rate
from orthattack.attacks.base import Attack, GradientOptions
from orthattack.attacks.rules import Link, accumulated
from orthattack.models import Model
from orthattack.threat import Norm


class MIFGSM(Attack):
    """Iterated FGSM with momentum (Dong et al. 2018, arXiv:1710.06081), whose adversarials transfer better::

        v_{t+1} = decay · v_t + ∇L(x_t) / mean|∇L(x_t)|
        x_{t+1} = project(x_t + alpha * sign(v_{t+1}))

    Args:
        model: as for `PGD`, like `norm`, `eps` and `steps`.
        alpha: step size in pixel units; by default ``eps / steps``.
        decay: how much of the momentum is kept at each step, at least 0.
        links: what is done to each gradient before that, first to last, such as ``[smooth(gaussian(15))]`` or
            ``[variance(20)]`` of `orthattack.attacks.rules`.
        **options: as for `PGD`.
    """

    _looks_ahead: ClassVar[bool] = False

    def __init__(
        self,
        model: Model,
        norm: Norm = "linf",
        eps: float | Tensor = 4 / 255,
        alpha: float | None = None,
        steps: int = 10,
        decay: float = 1.0,
        links: Sequence[Link] = (),
        **options: Unpack[GradientOptions],
    ) -> None:
        rule = accumulated("fixed", decay, self._looks_ahead, links)
        super().__init__(model, norm, eps, Climb(rule, steps, rate(1.0, steps), alpha), **options)


class OrthoMIFGSM(MIFGSM, scope="image"):
    """`MIFGSM` whose perturbation stays orthogonal to the image: each step is OrthoPGD's best one along v.

    The momentum itself is not projected, the step is, so nothing of the image's direction is left to accumulate.
    Arguments as for `MIFGSM`.
    """


class NIFGSM(MIFGSM, family="NIFGSM"):
    """Iterated FGSM with Nesterov's momentum (Lin et al. 2020, arXiv:1908.06281)::

        v_{t+1} = decay · v_t + ∇L(y_t) / mean|∇L(y_t)|,   y_t = project(x_t + alpha · decay · v_t)
        x_{t+1} = project(x_t + alpha * sign(v_{t+1}))

    for L-infinity. In L2 and L1 both moves have the size of the norm: x_{t+1} is a step of size alpha from x_t along
    v_{t+1}, as `PGD` takes it, and y_{t+1} one of size alpha · decay from x_{t+1}.

    Arguments as for `MIFGSM`. The points y_t are candidates too.
    """

    _looks_ahead = True


class OrthoNIFGSM(NIFGSM, scope="image"):
    """`NIFGSM` whose perturbation stays orthogonal to the image. Arguments as for `OrthoMIFGSM`."""

"""NI-FGSM: iterated FGSM with Nesterov's momentum, with and without the orthogonality."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from orthattack.attacks.ascent import Climb, rate
from orthattack.attacks.base import Attack, GradientOptions
from orthattack.attacks.rules import Link, accumulated
from orthattack.models import Model
from orthattack.threat import Norm

if TYPE_CHECKING:
    from typing_extensions import Unpack


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
        links: Sequence[Link] = (),
        **options: Unpack[GradientOptions],
    ) -> None:
        rule = accumulated("fixed", decay, True, links)
        super().__init__(model, norm, eps, Climb(rule, steps, rate(1.0, steps), alpha), **options)


class OrthoNIFGSM(NIFGSM, scope="image"):
    """`NIFGSM` whose perturbation stays orthogonal to the image. Arguments as for `OrthoMIFGSM`."""

"""FGSM: one step of the gradient's signs, with and without the orthogonality."""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from orthattack.attacks.ascent import Climb
from orthattack.attacks.base import Attack, GradientOptions
from orthattack.attacks.rules import chain
from orthattack.models import Model
from orthattack.threat import Norm


class FGSM(Attack):
    """The fast gradient sign method (Goodfellow et al. 2015, arXiv:1412.6572): one step of size eps from the image::

        x_adv = clip(x + eps * sign(∇L(x)))

    Equal, bit for bit, to ``PGD(steps=1, alpha=eps, random_start=False, loss="margin")``. Arguments as for `PGD`, with
    "margin" as the `loss` by default.
    """

    def __init__(
        self, model: Model, norm: Norm = "linf", eps: float | Tensor = 4 / 255, **options: Unpack[GradientOptions]
    ) -> None:
        super().__init__(model, norm, eps, Climb(chain(), steps=1, rate=1.0), **options)


class OrthoFGSM(FGSM, scope="image"):
    """`FGSM` orthogonal to the image: ``OrthoPGD(steps=1, alpha=eps, random_start=False, loss="margin")``.

    The step is the best one there is: the exact solution of the linear program for L-infinity. Arguments as for
    `PGD`. Source: Goodfellow et al. 2015, arXiv:1412.6572, for FGSM.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    >>> images, labels = torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 2, 0])
    >>> float(OrthoFGSM(model, eps=8 / 255).run(images, labels).cosine.max()) <= 1e-6
    True
    """

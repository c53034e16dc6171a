"""The textbook form, ``enforce="gradient"``: each direction is projected before the step, and nothing else.

Its perturbations are as free as the plain attack's: signs and clips undo most of the projection (docs/method.md).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from torch import Tensor

from orthattack.arguments import check_choice
from orthattack.threat import ThreatModel

Enforce = Literal["perturbation", "gradient"]
Reference = Literal["clean", "iterate"]


def check_form(enforce: Enforce, reference: Reference) -> None:
    """ValueError for what is no form of orthogonality."""
    check_choice("enforce", enforce, get_args(Enforce))
    check_choice("reference", reference, get_args(Reference))
    if reference == "iterate" and enforce == "perturbation":
        raise ValueError(
            'reference="iterate" needs enforce="gradient": a perturbation is orthogonal to the clean image'
        )


@dataclass(frozen=True)
class GradientForm:
    """The projection of directions against what the threat model says of the `reference`, clean images or iterates."""

    threat: ThreatModel
    reference: Reference = "clean"

    def __call__(self, direction: Tensor, points: Tensor, images: Tensor) -> Tensor:
        """(N, C, H, W) the direction without its components along the clean `images` or the iterates `points`."""
        against = points if self.reference == "iterate" else images
        return self.threat.tangent(direction.to(against.dtype), against)  # finer than a half-precision model

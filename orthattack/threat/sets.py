"""What a region asks of the points that box and planes allow, and the simplest such set: `Free`, the box alone.

`plane.Plane` and `subspace.Subspace` are the others. They work on images y directly, not on perturbations:
`lower <= y <= upper` are numbers of the images' dtype, so a pixel at its bound is exact. x itself is always allowed,
which makes every problem feasible.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from orthattack.threat.norms import by_secant, by_threshold, greedy_step, in_l1_ball, unit


class Allowed(Protocol):
    """The allowed points y around a batch of images x: a box, and vectors b_j to which y - x is orthogonal.

    Points and gradients are (N, C, H, W) in the images' dtype, α, μ and radii (N, 1, 1, 1) in pixel units. What steps
    and projections return lies in the set as stored.
    """

    images: Tensor
    lower: Tensor
    upper: Tensor

    def boxed(self, lower: Tensor, upper: Tensor) -> Allowed:
        """The same set in another box, which holds x."""

    def tangent(self, gradient: Tensor) -> Tensor:
        """The gradient without its components along the b_j."""

    def unit_tangent(self, gradient: Tensor) -> Tensor:
        """The same at length 1 for the whole image; 0 stays 0."""
        return unit(self.tangent(gradient))

    def step(self, start: Tensor, gradient: Tensor, alpha: Tensor) -> Tensor:
        """max_y ⟨g, y⟩ subject to ``|y - s| <= α``: the best L-infinity step from s, a point of the set."""

    def sparse_step(self, start: Tensor, gradient: Tensor, alpha: Tensor, count: Tensor | int | None = None) -> Tensor:
        """The best L1 step, max_y ⟨g, y⟩ subject to ``‖y - s‖₁ <= α, |y - s| <= α / k``, k = `count` or `sparsity`.

        Where the second constraint keeps α from being spent, it is left out. Off the planes by what rounding costs, or
        of several planes by more: a projection follows.
        """

    def nearest(self, points: Tensor, shrink: Tensor | None = None) -> Tensor:
        """min_y ½‖y - p‖₂² + μ‖y - x‖₁: the projection of points p, with a threshold μ, `shrink`, if asked."""

    def nearest_in_l2_ball(self, points: Tensor, radius: Tensor) -> Tensor:
        """min_y ‖y - p‖₂ subject to ``‖y - x‖₂ <= radius``, up to some 1e-6 of the radius."""

    def near_in_l2_ball(self, points: Tensor, radius: Tensor) -> Tensor | None:  # noqa: ARG002
        """The same for points that a step has led out of the set, in the ball as stored, up to 1e-6 of the radius, if
        there is a quick search; x, in rare cases, where that fails."""
        return None

    def nearest_in_l1_ball(self, points: Tensor, radius: Tensor) -> Tensor:
        """min_y ‖y - p‖₂ subject to ``‖y - x‖₁ <= radius``, up to some 1e-6 of the radius."""

    def settle(self, points: Tensor) -> Tensor:
        """Points of the box near the set, moved into it as exactly as their dtype allows; the same if they are in it.

        ``|cos(y - x, b_j)|`` is then at most 1e-6 (float32) or 1e-12 (float64). Where that cannot be, y is x.
        """

    def release(self) -> None:
        """Give back the working memory; the next call takes it again."""


class Free(Allowed):
    """The box alone: lower <= y <= upper."""

    def __init__(self, images: Tensor, lower: Tensor, upper: Tensor) -> None:
        self.images, self.lower, self.upper = images, lower, upper

    def boxed(self, lower: Tensor, upper: Tensor) -> Free:
        return Free(self.images, lower, upper)

    def tangent(self, gradient: Tensor) -> Tensor:
        return gradient

    def step(self, start: Tensor, gradient: Tensor, alpha: Tensor) -> Tensor:
        signs = torch.sign(gradient)
        return torch.addcmul(start, signs, alpha, out=signs).clamp_(self.lower, self.upper)

    def sparse_step(self, start: Tensor, gradient: Tensor, alpha: Tensor, count: Tensor | int | None = None) -> Tensor:
        return greedy_step(start, gradient, alpha, self.lower, self.upper, count)

    def nearest(self, points: Tensor, shrink: Tensor | None = None) -> Tensor:
        points = points if shrink is None else soften(points.clone(), self.images, shrink)
        return points.clamp(self.lower, self.upper)

    nearest_in_l2_ball = by_secant

    def nearest_in_l1_ball(self, points: Tensor, radius: Tensor) -> Tensor:
        x = self.images
        d, found = in_l1_ball(points - x, self.lower - x, self.upper - x, radius, None, (), torch.zeros_like(radius))
        y = d.add_(x).clamp_(self.lower, self.upper)

        def search(some: Free, points: Tensor, radius: Tensor) -> Tensor:
            return by_threshold(some, points, radius)

        return completed(self, y, found, search, points, radius)

    def settle(self, points: Tensor) -> Tensor:
        return points

    def release(self) -> None:
        pass


Kind = TypeVar("Kind", bound=Allowed)


def completed(allowed: Kind, y: Tensor, found: Tensor, search: Callable[..., Tensor], *given: Tensor) -> Tensor:
    """y, and where it was not `found`, (N, 1, 1, 1), what a slower `search` finds in place, of the set and what is
    `given`, both of those samples alone; not on a GPU, which asking would stop."""
    if y.is_cuda or bool(found.all()):
        return y
    which = ~found.flatten()
    y[which] = search(some_of(allowed, which), *(t[which] for t in given))
    return y


def some_of(allowed: Kind, which: Tensor) -> Kind:
    """The same for some samples, (N,) bool."""
    some = copy.copy(allowed)
    some.release()
    for name, value in vars(some).items():
        if isinstance(value, Tensor):
            setattr(some, name, value[which])
        elif isinstance(value, tuple) and all(isinstance(each, Tensor) for each in value):
            setattr(some, name, tuple(each[which] for each in value))
    return some


def soften(points: Tensor, images: Tensor, shrink: Tensor) -> Tensor:
    """The soft threshold of the perturbation, in place: each ``|y_i - x_i|`` less `shrink`, down to 0."""
    delta = points.sub_(images)
    return delta.sub_(delta.clamp(-shrink, shrink)).add_(images)

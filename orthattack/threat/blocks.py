"""Planes of blocks of k×k pixels per channel: those of the channels of an image cut into its blocks."""

from __future__ import annotations

import copy

from torch import Tensor

from orthattack.projection import Scope, cut, joined
from orthattack.threat.plane import Plane

# Of few pixels round-off does not average out; what it leaves is settled.
_SLACK = 3.0


class Blocks:
    """The points y of a box with ⟨y - x, n⟩ = 0 in every block of pixels, a set of `sets.Allowed`.

    Args:
        scope: the blocks, such as "block8"; the rest is as for `Plane`.
    """

    def __init__(
        self, images: Tensor, lower: Tensor, upper: Tensor, scope: Scope, normal: Tensor | None = None,
        is_whole: bool = True,
    ) -> None:  # fmt: skip
        self.images, self.lower, self.upper, self._scope = images, lower, upper, scope
        x, low, high = map(self._cut, (images, lower, upper))
        self._plane = Plane(x, low, high, "channel", None if normal is None else self._cut(normal), _SLACK, is_whole)

    def boxed(self, lower: Tensor, upper: Tensor) -> Blocks:
        blocks = copy.copy(self)
        blocks.lower, blocks.upper = lower, upper
        blocks._plane = self._plane.boxed(self._cut(lower), self._cut(upper))
        return blocks

    def _cut(self, tensor: Tensor) -> Tensor:
        return cut(tensor, self._scope).contiguous()

    def _joined(self, blocks: Tensor) -> Tensor:
        return joined(blocks, self.images).contiguous()

    def tangent(self, gradient: Tensor) -> Tensor:
        return self._joined(self._plane.tangent(self._cut(gradient)))

    def unit_tangent(self, gradient: Tensor) -> Tensor:
        return self._joined(self._plane.unit_tangent(self._cut(gradient)))

    def step(self, start: Tensor, gradient: Tensor, alpha: Tensor) -> Tensor:
        return self._joined(self._plane.step(self._cut(start), self._cut(gradient), alpha))

    def sparse_step(self, start: Tensor, gradient: Tensor, alpha: Tensor, count: Tensor | int | None = None) -> Tensor:
        return self._joined(self._plane.sparse_step(self._cut(start), self._cut(gradient), alpha, count))

    def nearest(self, points: Tensor, shrink: Tensor | None = None) -> Tensor:
        return self._joined(self._plane.nearest(self._cut(points), shrink))

    def nearest_in_l2_ball(self, points: Tensor, radius: Tensor) -> Tensor:
        return self._joined(self._plane.nearest_in_l2_ball(self._cut(points), radius))

    def near_in_l2_ball(self, points: Tensor, radius: Tensor) -> Tensor | None:
        found = self._plane.near_in_l2_ball(self._cut(points), radius)
        return None if found is None else self._joined(found)

    def nearest_in_l1_ball(self, points: Tensor, radius: Tensor) -> Tensor:
        return self._joined(self._plane.nearest_in_l1_ball(self._cut(points), radius))

    def settle(self, points: Tensor) -> Tensor:
        return self._joined(self._plane.settle(self._cut(points)))

    def release(self) -> None:
        self._plane.release()

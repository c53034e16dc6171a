"""How often a model is asked: a model that counts its evaluations, whoever makes them."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Calls:
    """How often a model was asked."""

    forward: int = 0  # evaluations, per sample
    gradient: int = 0  # differentiations, per sample
    batches: int = 0  # evaluations of batches
    most: int | None = None  # evaluations that there may be


class BudgetSpentError(Exception):
    """A model is to be evaluated more often than may be."""


class CallCounter(nn.Module):
    """A model that counts, per sample, how often it is evaluated and differentiated, whoever does it.

    It also remembers its last answer without a gradient: an attack of ours that scores what it returns has then done
    the work of the judge, who sees the model's own answer on the pixels, not what the attack makes of it. What other
    code had evaluated is not to be recalled: it may have changed the model for the while. `calls` is kept by whoever
    reads it, out of reach of what is written to this module's attributes. `tell` is told of each evaluation, how many
    there were."""

    def __init__(
        self, model: nn.Module, calls: Calls | None = None, tell: Callable[[int], object] = lambda _: None
    ) -> None:
        super().__init__()
        self.model = model
        self._calls = Calls() if calls is None else calls
        self._tell = tell
        self._last: tuple[Tensor, Tensor] | None = None

    def forward(self, images: Tensor) -> Tensor:
        if self._calls.most is not None and self._calls.forward + len(images) > self._calls.most:
            raise BudgetSpentError
        self._calls.forward += len(images)
        self._calls.batches += 1  # not an attribute of the module, whose state would be another each time
        self._tell(self._calls.batches)
        if images.requires_grad:
            images.register_hook(self._count_gradient)  # type: ignore[no-untyped-call]
        logits: Tensor = self.model(images)
        # Only what the judge would compute too; copies, since an attack may write into either.
        own_precision = not torch.is_autocast_enabled(images.device.type)
        if own_precision and not images.requires_grad and not any(m.training for m in self.modules()):
            self._last = images.clone(), logits.detach().clone()
        return logits

    def __deepcopy__(self, memo: dict[int, Any]) -> nn.Module:
        """The model alone: what an attack does with a copy is not counted here."""
        return copy.deepcopy(self.model, memo)

    def forget(self) -> None:
        """Forget the last answer: it was another attack's."""
        self._last = None

    def recall(self, images: Tensor) -> tuple[Tensor, Tensor] | None:
        """The last answer (N, K) and which of `images` it does not answer (N,), if it was of as many; once only."""
        last, self._last = self._last, None
        if last is None or last[0].shape != images.shape:
            return None
        return last[1], (last[0] != images).flatten(1).any(1)

    def _count_gradient(self, gradient: Tensor) -> None:
        self._calls.gradient += len(gradient)

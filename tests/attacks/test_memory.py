"""What an attack holds while the model runs: a few image batches, whatever the norm."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from orthattack.attacks import PGD, OrthoPGD

STEPS = 3


class Held(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of all tensors that were made since it began and are still alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now: int = 0
        self.peak: int = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {tensor.untyped_storage()._cdata for tensor in tree_leaves((args, kwargs)) if torch.is_tensor(tensor)}
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if torch.is_tensor(tensor) and (key := tensor.untyped_storage()._cdata) not in known | set(self._known):
                self._known[key] = tensor.untyped_storage().nbytes()
                self.now += self._known[key]
                weakref.finalize(tensor.untyped_storage(), self._gone, key)
        self.peak = max(self.peak, self.now)
        return made

    def _gone(self, key: int) -> None:
        self.now -= self._known.pop(key)


def model_of(size: int) -> nn.Module:
    """A model whose activations are many times its images, as those of real ones are."""
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 32, 3, padding=1), nn.ReLU()
    return nn.Sequential(*layers, nn.AvgPool2d(size), nn.Flatten(), nn.Linear(32, 5)).eval().requires_grad_(False)


def peak(run: Callable[[], object]) -> int:
    held = Held()
    with held:
        run()
    return held.peak


@pytest.mark.parametrize("kind", [PGD, OrthoPGD])
@pytest.mark.parametrize(
    "options",
    [
        {"norm": "linf", "eps": 8 / 255},
        {"norm": "l2", "eps": 1.0},
        {"norm": "linf", "eps": 8 / 255, "early_stop": True},
        {"norm": "linf", "eps": 8 / 255, "restarts": 2},
    ],
)
def test_an_attack_holds_at_most_four_image_batches_beyond_the_bare_steps(kind: Any, options: dict[str, Any]) -> None:
    images, model = torch.rand(4, 3, 32, 32), model_of(32)
    labels = model(images).argmax(1)

    def bare() -> None:
        for _ in range(STEPS):
            leaf = images.clone().requires_grad_()
            torch.autograd.grad(nn.functional.cross_entropy(model(leaf), labels, reduction="sum"), leaf)

    attack: Callable[[Tensor, Tensor], object] = kind(model, steps=STEPS, random_start=True, optimize="none", **options)
    more = peak(lambda: attack(images, labels)) - peak(bare)
    small = 0.2 * images.nbytes  # losses, labels, counts
    assert more <= 4 * images.nbytes + small

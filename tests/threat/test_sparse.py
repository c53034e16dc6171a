"""The best L1 step on planes, of a few pixels first: against a linear program's solver and against all pixels."""

from __future__ import annotations

from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog
from scipy.sparse import block_diag, csr_matrix, hstack
from torch import Tensor

from orthattack.threat import sparse
from tests.conftest import gradient_kinds, image_kinds, make_gradient, make_images, seeds

SHAPES = {"image": (3, 10, 10), "channel": (3, 10, 10), "blocks": (20, 4, 4)}
DIMS = {"image": (-3, -2, -1), "channel": (-2, -1), "blocks": (-2, -1)}


def problem(scope: str, image: str, gradient: str, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """g without its components along n, n, and how far up and down: at most 0.05, some not at all."""
    n, dims = make_images(image, (1, *SHAPES[scope]), seed, torch.float64), DIMS[scope]
    g = make_gradient(gradient, n, seed)
    g = g - n * (g * n).sum(dims, keepdim=True) / n.square().sum(dims, keepdim=True).clamp(min=1e-12)
    return g, n, (1 - n).clamp(max=0.05), n.clamp(max=0.05)


def full(value: float) -> Tensor:
    return torch.full((1, 1, 1, 1), value, dtype=torch.float64)


def best(g: Tensor, n: Tensor, up: Tensor, down: Tensor, alpha: float, dims: tuple[int, ...]) -> float:
    """The linear program's value, of moves up and down, both at least 0."""
    rows = n[0].reshape(-1 if len(dims) == 2 else 1, 1, n[0].numel() // (n.shape[1] if len(dims) == 2 else 1)).numpy()
    planes = csr_matrix(block_diag(list(rows)))
    gain, size = g.flatten().numpy(), float(g.abs().max())
    if size == 0:
        return 0.0
    solved = linprog(
        np.concatenate([-gain, gain]) / size,
        A_ub=np.ones((1, 2 * gain.size)),
        b_ub=[alpha],
        A_eq=hstack([planes, -planes]),
        b_eq=np.zeros(planes.shape[0]),
        bounds=np.stack([np.zeros(2 * gain.size), torch.cat([up.flatten(), down.flatten()]).numpy()], 1),
    )
    assert solved.status == 0
    return float(-solved.fun) * size


@given(
    st.sampled_from(list(SHAPES)), image_kinds, gradient_kinds, seeds, st.sampled_from([0.02, 0.4, 100.0]),
    st.sampled_from([0, sparse._SORTED]),
)  # fmt: skip
def test_the_step_is_the_linear_programs(scope, image, gradient, seed, alpha, most_sorted):
    g, n, up, down = problem(scope, image, gradient, seed)
    with mock.patch.object(sparse, "_SORTED", most_sorted):
        move, spent = sparse.best_sparse(g, n, n, 0 * n, 0 * n + 1, full(0.05), full(alpha), 8, DIMS[scope])
    assert bool(((move >= -down - 1e-12) & (move <= up + 1e-12)).all())
    along = (move * n).sum(DIMS[scope]).abs()
    assert bool((along <= 1e-9 * (1e-3 + (move * n).abs().sum(DIMS[scope]))).all())
    assert float(move.abs().sum()) <= alpha * (1 + 1e-9)
    assert float(spent) >= float(move.abs().sum()) * (1 - 1e-9)
    value = best(g, n, up, down, alpha, DIMS[scope])
    assert float((g * move).sum()) == pytest.approx(value, rel=2e-5, abs=1e-9 * float(g.abs().sum()) * alpha)


@pytest.mark.parametrize("scope", SHAPES)
def test_few_pixels_are_looked_at_where_they_suffice_and_all_where_they_do_not(monkeypatch, scope):
    looked, beyond = [], sparse._beyond
    monkeypatch.setattr(sparse, "_beyond", lambda *args: looked.append(args[0].shape) or beyond(*args))
    g, n, up, down = problem(scope, "uniform", "normal", 0)
    within = (n, 0 * n, 0 * n + 1, full(0.05))
    few, _ = sparse.best_sparse(g, n, *within, full(0.4), 8, DIMS[scope])
    (part,) = looked
    assert part.numel() < 0.7 * g.numel()
    torch.testing.assert_close(few, beyond(g, n, up, down, full(0.4), 8, DIMS[scope])[0], rtol=0, atol=1e-3)
    many, _ = sparse.best_sparse(g, n, *within, full(8.0), 8, DIMS[scope])
    assert looked[1:] == [part, g.shape]
    # In a batch, those for which they suffice are not looked at again, and each is what it is alone.
    del looked[:]
    both = (torch.cat([each, each]) for each in (g, n, *within))
    together, _ = sparse.best_sparse(*both, torch.cat([full(0.4), full(8.0)]), 8, DIMS[scope])
    assert looked == [(2, *part[1:]), g.shape]
    assert torch.equal(together, torch.cat([few, many]))

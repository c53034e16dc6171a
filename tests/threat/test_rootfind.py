"""The search for one multiplier, on functions whose root is known."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from orthattack.threat.rootfind import at_jump, ends_of, search, try_all

LARGEST = torch.finfo(torch.float64).max / 4


class Falling:
    """f(λ) = ⟨clip(p - λx, -w, w), x⟩ per row, as `Plane` has it, and how often it was asked for."""

    def __init__(self, rows: int, seed: int, dtype: torch.dtype = torch.float64) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.x = torch.rand(rows, 100, generator=generator, dtype=torch.float64).to(dtype)
        self.p = torch.randn(rows, 100, generator=generator, dtype=torch.float64).to(dtype)
        self.p += torch.linspace(-1, 2, rows, dtype=dtype).view(-1, 1)
        self.width = 0.7
        self.calls = 0

    def __call__(self, multiplier: Tensor) -> Tensor:
        self.calls += 1
        return ((self.p - multiplier * self.x).clamp(-self.width, self.width) * self.x).sum(1, keepdim=True)

    def rows(self, rows: slice) -> Falling:
        part = type(self)(1, 0)
        part.x, part.p = self.x[rows], self.p[rows]
        return part

    @property
    def ends(self) -> tuple[Tensor, Tensor]:
        most = self.width * self.x.sum(1, keepdim=True)
        return most, -most

    @property
    def scale(self) -> Tensor:
        return ((self.p * self.x).sum(1, keepdim=True) / self.x.square().sum(1, keepdim=True)).abs()

    @property
    def near(self) -> tuple[Tensor, Tensor]:
        norm2 = self.x.square().sum(1, keepdim=True)
        return (self.p * self.x).sum(1, keepdim=True) / norm2, -norm2

    def root(self) -> Tensor:
        low, high = torch.full_like(self.scale, -1e3), torch.full_like(self.scale, 1e3)
        for _ in range(100):
            middle = (low + high) / 2
            above = self(middle) > 0
            low, high = torch.where(above, middle, low), torch.where(above, high, middle)
        return (low + high) / 2


class Stairs(Falling):
    """The same for the linear program of a step: each pixel jumps from one end to the other where p = λx."""

    def __call__(self, multiplier: Tensor) -> Tensor:
        self.calls += 1
        return (torch.where(self.p > multiplier * self.x, self.width, -self.width) * self.x).sum(1, keepdim=True)


def tolerances(f: Falling, size: float) -> Tensor:
    return torch.full_like(f.scale, size)


@pytest.mark.parametrize("starts_near", [False, True])
@pytest.mark.parametrize("size", [1e-4, 1e-8, 1e-12])
def test_the_bracket_holds_the_root_and_its_mixture_the_tolerance(size, starts_near):
    f = Falling(60, 0)
    a, fa, b, fb = search(f, f.scale, tolerances(f, size), f.ends, f.near if starts_near else None)
    assert torch.equal(fa, f(a))
    torch.testing.assert_close(fb, f(b), rtol=0, atol=1e-12)
    assert (fa >= 0).all()
    assert (fb <= 0).all()
    assert (a <= f.root() + 1e-12).all()
    assert (b >= f.root() - 1e-12).all()
    # The gap of the mixture, as docs/method.md has it.
    assert (fa * -fb * (b - a) <= size * (1 + 1e-9) * (fa - fb)).all()


@pytest.mark.parametrize(
    ("kind", "size", "starts_near", "trials"),
    [(Falling, 1e-4, False, 484), (Falling, 1e-8, False, 593), (Falling, 1e-8, True, 411), (Stairs, 1e-4, False, 798),
     (Stairs, 1e-8, False, 1716), (Stairs, 1e-8, True, 1612)],
)  # fmt: skip
def test_the_search_is_short(kind, size, starts_near, trials):
    """The trials of 60 searches together, 7 to 10 each, or 13 to 29 where f jumps; a few may differ by round-off."""
    f, calls = kind(60, 0), 0
    for i in range(60):
        one = f.rows(slice(i, i + 1))
        search(one, one.scale, tolerances(one, size), one.ends, one.near if starts_near else None)
        calls += one.calls
    assert calls == pytest.approx(trials, abs=2)


def test_the_search_gives_up_at_last_and_keeps_the_dtype():
    f = Stairs(2, 0, torch.float32)
    a, fa, b, fb = search(f, f.scale, tolerances(f, 0), f.ends, None)
    assert f.calls == 200 + 1
    assert a.dtype == fa.dtype == b.dtype == fb.dtype == torch.float32
    torch.testing.assert_close(a, f.root())
    torch.testing.assert_close(b, f.root())
    assert (fa > 0).all()
    assert (fb < 0).all()


def test_a_group_does_not_depend_on_the_others():
    f = Falling(7, 1)
    sizes = torch.logspace(-2, -12, 7, dtype=torch.float64).view(-1, 1)
    together = search(f, f.scale, sizes, f.ends, f.near)
    for i in range(7):
        one = f.rows(slice(i, i + 1))
        alone = search(one, one.scale, sizes[i : i + 1], one.ends, one.near)
        for batch, single in zip(together, alone, strict=True):
            assert torch.equal(batch[i : i + 1], single)


def test_a_search_that_starts_at_the_root_asks_once():
    one = torch.ones(1, 1, dtype=torch.float64)
    asked = []

    def residual(multiplier: Tensor) -> Tensor:
        asked.append(multiplier.item())
        return 1 - multiplier

    a, fa, b, fb = search(residual, one, 0 * one, (5 * one, -5 * one), (one, -one))
    assert asked == [1]
    assert [t.item() for t in (a, fa, b, fb)] == [1, 0, LARGEST, -5]


@pytest.mark.parametrize("off", [1.001, 0.999])
def test_a_search_that_starts_near_the_root_of_a_line_goes_there_in_one_step(off):
    f = Falling(1, 2)
    f.p, f.width = f.p + 1, 1e9
    root, slope = f.near
    asked = []

    def residual(multiplier: Tensor) -> Tensor:
        asked.append(multiplier.item() / root.item())
        return f(multiplier)

    search(residual, 3 * f.scale, tolerances(f, 1e-13), f.ends, (off * root, slope))
    assert asked[0] == pytest.approx(off, abs=1e-12)
    assert asked[1] == pytest.approx(1, abs=5e-6)
    assert len(asked) == 3  # one beyond the root, so that there is a bracket


def test_a_function_without_a_root_gives_an_end():
    """f above 0 everywhere, as where no pixel may be darker: the bracket's upper end is λ = infinity, with f = 0."""
    one = torch.ones(1, 1, dtype=torch.float64)
    a, fa, b, fb = search(lambda m: one + 0 * m, one, 1e-8 * one, (one, 0 * one), None)
    assert (fa.item(), fb.item(), b.item()) == (1, 0, LARGEST)
    assert abs(a.item()) < LARGEST
    a, fa, b, fb = search(lambda m: -one + 0 * m, one, 1e-8 * one, (0 * one, -one), None)
    assert (fa.item(), fb.item(), a.item()) == (0, -1, -LARGEST)
    assert abs(b.item()) < LARGEST


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_ends_are_those_of_all_multipliers(dtype):
    f = Falling(4, 3, dtype)
    a, fa, b, fb = ends_of(f, f.scale)
    largest = torch.finfo(dtype).max / 4
    assert a.dtype == fa.dtype == dtype
    assert (a == -largest).all()
    assert (b == largest).all()
    torch.testing.assert_close((fa, fb), f.ends)
    # A row that cannot be darker, or brighter, but for round-off: f must have a root all the same.
    a, fa, b, fb = ends_of(lambda m: torch.tensor([[-1e-9], [2.0], [1e-9]], dtype=dtype) + 0 * m, f.scale[:3])
    assert fa.flatten().tolist() == pytest.approx([0, 2, 1e-9])
    assert fb.flatten().tolist() == pytest.approx([-1e-9, 0, 0])


def test_trying_all_pivots_gives_the_narrowest_bracket_in_whatever_order_they_come():
    f = Falling(5, 4)
    generator = torch.Generator().manual_seed(0)
    pivots = f.root() + torch.randn(9, 5, 1, generator=generator, dtype=torch.float64)
    pivots[3] = f.root()  # f there is 0 but for round-off, on either side
    values = torch.stack([f(pivot) for pivot in pivots])
    a, fa, b, fb = try_all(f, f.scale, pivots)
    for i in range(5):
        lows = [p for p, v in zip(pivots[:, i, 0].tolist(), values[:, i, 0].tolist(), strict=True) if v >= 0]
        highs = [p for p, v in zip(pivots[:, i, 0].tolist(), values[:, i, 0].tolist(), strict=True) if v < 0]
        assert a[i].item() == max(lows, default=-LARGEST)
        assert b[i].item() == min(highs, default=LARGEST)
    within: Callable[[Tensor], Tensor] = lambda t: (t.abs() < LARGEST).squeeze(1)  # noqa: E731
    assert torch.equal(fa[within(a)], f(a)[within(a)])
    assert torch.equal(fb[within(b)], f(b)[within(b)])


def test_a_pivot_on_the_root_is_the_lower_end():
    one = torch.ones(1, 1, dtype=torch.float64)
    a, fa, b, fb = try_all(lambda m: (2 - m).clamp(-1, 1), one, torch.tensor([1.5, 2.0, 2.5]).view(3, 1, 1).double())
    assert [t.item() for t in (a, fa, b, fb)] == [2, 0, 2.5, -0.5]


@given(st.integers(1, 30), st.integers(0, 2**20), st.booleans())
def test_the_jump_across_zero_is_the_one_that_trying_all_finds(count, seed, ties):
    """Falling stairs with jumps of all sizes, 0 among them, and with `ties` several at one place."""
    generator = torch.Generator().manual_seed(seed)
    at = torch.randn(4, count, generator=generator, dtype=torch.float64)
    at = (2 * at).round() if ties else at
    jump = torch.rand(4, count, generator=generator, dtype=torch.float64).sub_(0.2).clamp_(min=0)
    top = jump.sum(1, keepdim=True) * torch.rand(4, 1, generator=generator, dtype=torch.float64)

    def f(multiplier: Tensor) -> Tensor:
        return top - (jump * (at < multiplier)).sum(1, keepdim=True)

    a, b = at_jump(at, jump, top)
    places = at.sort(dim=1).values
    pivots = [*(places[:, 1:] / 2 + places[:, :-1] / 2).T.unsqueeze(2)]
    _, most, _, least = try_all(f, top, pivots)
    assert (a < b).all()
    assert (f(a) >= 0).all()
    assert (f(b) <= 1e-12).all()
    met = (most <= 1e-12) | (least >= -1e-12)  # 0 between two jumps, so that either may be taken
    assert (met | ((f(a) - most).abs() + (f(b) - least).abs() <= 1e-12)).all()

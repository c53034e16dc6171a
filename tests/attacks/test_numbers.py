"""Random numbers: they are SplitMix64's, on every device, and each sample's own."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor

import orthattack
from orthattack import ThreatModel
from orthattack.attacks import numbers
from orthattack.attacks.numbers import Draws, Streams, normal, split, uniform
from tests.conftest import examples
from tests.pretend import pretended

KEYS = st.integers(-(2**63), 2**63 - 1)
DTYPES = {torch.float64: 53, torch.float32: 24, torch.float16: 11, torch.bfloat16: 8}
# Vigna's splitmix64.c from the state 1234567, as Rosetta Code lists them.
PUBLISHED = [
    6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821
]  # fmt: skip


def splitmix64(state: int) -> Iterator[int]:
    """The published algorithm on Python's integers."""
    while True:
        state = (state + 0x9E3779B97F4A7C15) % 2**64
        z = state
        z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
        yield z ^ (z >> 31)


class Reference:
    """A sample's random numbers: each drawing is a stream of its own, from the next output of the sample's."""

    def __init__(self, key: int) -> None:
        self._drawings = splitmix64(key)

    def uniform(self, *shape: int, digits: int = 53) -> Tensor:
        outputs = itertools.islice(splitmix64(next(self._drawings)), math.prod(shape))
        return torch.tensor([(z >> (64 - digits)) / 2**digits for z in outputs], dtype=torch.float64).view(shape)

    def normal(self, *shape: int) -> Tensor:
        count = math.prod(shape)
        half = (count + 1) // 2
        u, v = self.uniform(2, half).numpy()
        radius = np.sqrt(-2 * np.log(1 - u))
        made = np.concatenate([radius * np.cos(2 * np.pi * v), radius * np.sin(2 * np.pi * v)])
        return torch.from_numpy(made[:count]).view(shape)


def streams(keys: list[int] | None, count: int = 0, seed: int = 0) -> Streams:
    count = count if keys is None else len(keys)
    return Streams(torch.Generator().manual_seed(seed), keys, count, torch.device("cpu"))


def test_the_published_outputs():
    assert [z % 2**64 for z in split(torch.tensor([1234567]), 5)[0].tolist()] == PUBLISHED
    assert list(itertools.islice(splitmix64(1234567), 5)) == PUBLISHED


@examples(40)
@given(st.lists(KEYS, min_size=1, max_size=3), st.integers(0, 40), st.integers(0, 2**40))
def test_outputs_are_those_of_the_reference_from_any_state_and_number_on(keys, count, first):
    found = split(torch.tensor(keys), count, first)
    for key, row in zip(keys, found.tolist(), strict=True):
        expected = itertools.islice(splitmix64(key + first * 0x9E3779B97F4A7C15), count)
        assert [z % 2**64 for z in row] == list(expected)


@examples(40)
@given(st.lists(KEYS, min_size=1, max_size=4), st.sampled_from(list(DTYPES)), st.data())
def test_numbers_of_samples_are_those_of_the_reference_whatever_is_drawn_at_a_time(keys, dtype, data):
    """In drawings of some of the samples each, uniform ones bit for bit."""
    references, own = [Reference(key) for key in keys], streams(keys)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(numbers, "_ON_CPU", data.draw(st.integers(1, 50)))
        for _ in range(3):
            rows = data.draw(st.lists(st.integers(0, len(keys) - 1), min_size=1, max_size=len(keys), unique=True))
            shape = data.draw(st.sampled_from([(), (1,), (7,), (2, 3), (3, 2, 2), (0, 2)]))
            draws = Draws(own, torch.tensor(rows), dtype)
            if data.draw(st.booleans()):
                expected = [references[row].uniform(*shape, digits=DTYPES[dtype]) for row in rows]
                assert torch.equal(draws.uniform(*shape).double(), torch.stack(expected))
            else:
                expected = torch.stack([references[row].normal(*shape) for row in rows])
                tolerance = 1e-13 if dtype == torch.float64 else torch.finfo(dtype).eps
                torch.testing.assert_close(draws.normal(*shape).double(), expected, rtol=tolerance, atol=1e-7)


def test_the_ends_of_the_range_are_safe(monkeypatch):
    """u = 0 and the largest u, of all outputs 0 and all 2^64 - 1."""
    for output, largest in ((0, 0.0), (-1, 1.0)):
        monkeypatch.setattr(numbers, "split", lambda s, n, first=0, z=output: torch.full((len(s), n), z))
        for dtype, digits in DTYPES.items():
            drawn = uniform(torch.tensor([5]), (3,), dtype)
            assert drawn.tolist() == [[largest * (1 - 2.0**-digits)] * 3]
        drawn = normal(torch.tensor([5]), (4,), torch.float64)
        assert drawn.abs().max() == pytest.approx(largest * math.sqrt(2 * 53 * math.log(2)))


@pytest.mark.parametrize(("draw", "distribution"), [(uniform, "uniform"), (normal, "norm")])
def test_numbers_have_their_distribution_along_a_sample_across_samples_and_across_drawings(draw, distribution):
    alone = draw(torch.tensor([2**62 + 1]), (30_000,), torch.float64)[0]
    across = draw(torch.arange(30_000), (1,), torch.float64)[:, 0]
    own, first = streams([3]), torch.tensor([0])
    drawings = Draws(own, first, torch.float64)
    in_turn = torch.cat([getattr(drawings, draw.__name__)(10) for _ in range(500)]).flatten()
    for drawn in (alone, across, in_turn):
        assert stats.kstest(drawn.numpy(), distribution).pvalue > 0.01


def test_bits_are_fair():
    """The 24 bits that a float32 has, in samples of neighbouring keys: a chi-square test of each."""
    drawn = (uniform(torch.arange(100), (1000,)).double() * 2**24).long()
    ones = torch.stack([(drawn >> bit & 1).sum() for bit in range(24)]).double().numpy()
    statistic = ((ones - 50_000) ** 2 / 25_000).sum()
    assert 0.005 < stats.chi2(24).cdf(statistic) < 0.995


@pytest.mark.parametrize("distance", [1, 2, 64, -1, 2**32])
def test_neighbours_are_not_correlated(distance):
    """Samples of neighbouring keys, drawings after each other, and numbers after each other."""
    keys = torch.arange(2000) * 7 + 1
    here, there = Draws(streams(keys.tolist()), keys // 7, torch.float64), streams((keys + distance).tolist())
    first, second = here.uniform(20), here.uniform(20)
    others = Draws(there, keys // 7, torch.float64).uniform(20)
    for a, b in ((first, others), (first, second), (first[:, 1:], first[:, :-1]), (first[1:], first[:-1])):
        correlation = np.corrcoef(a.flatten().numpy(), b.flatten().numpy())[0, 1]
        assert abs(correlation) < 3.5 / math.sqrt(a.numel())


def test_numbers_depend_neither_on_the_batch_nor_its_order_nor_on_who_has_left():
    keys = [5, -3, 2**63 - 1, 0, 8]
    together = Draws(streams(keys), torch.arange(5), torch.float32)
    first, second, third = together.uniform(3, 4), together.normal(7), together.uniform(2)
    order = torch.tensor([3, 0, 4])
    some = Draws(streams([keys[row] for row in order]), torch.arange(3), torch.float32)
    assert torch.equal(some.uniform(3, 4), first[order])
    torch.testing.assert_close(some.normal(7), second[order], rtol=1e-6, atol=1e-7)
    left, everyone = streams(keys), torch.arange(5)
    Draws(left, everyone, torch.float32).uniform(3, 4)
    Draws(left, everyone[1:], torch.float32).normal(7)
    assert torch.equal(Draws(left, everyone[2:], torch.float32).uniform(2), third[2:])
    cut = Draws(streams(keys), everyone, torch.float32)
    parts = [cut.part(slice(k, k + 2)) for k in (4, 0, 2)]
    assert torch.equal(torch.cat([part.uniform(3, 4) for part in parts]), first[[4, 0, 1, 2, 3]])


def test_without_seeds_they_are_drawn_once_from_the_generator_when_they_are_needed():
    generator, like = (torch.Generator().manual_seed(4) for _ in range(2))
    own, everyone = Streams(generator, None, 3, torch.device("cpu")), torch.arange(3)
    assert torch.equal(generator.get_state(), like.get_state())
    drawn = [own.uniform(everyone[1:], (5,), torch.float32), own.uniform(everyone, (5,), torch.float32)]
    keys = torch.randint(2**63 - 1, (3,), generator=like).tolist()
    assert torch.equal(generator.get_state(), like.get_state())
    assert torch.equal(drawn[0], torch.stack([Reference(key).uniform(5, digits=24) for key in keys[1:]]).float())
    assert torch.equal(drawn[1][:1], Reference(keys[0]).uniform(5, digits=24).float()[None])
    assert not torch.equal(drawn[1][1:], drawn[0])


def test_a_gpu_draws_the_same_and_is_asked_nothing(monkeypatch):
    keys, shape = [1, -2, 3], (3, 20)
    expected = [getattr(Draws(streams(keys), torch.arange(3), torch.float32), kind)(*shape) for kind in KINDS]
    with pretended(monkeypatch) as mode:
        index = torch.arange(3, device="cuda")
        mode.asked.clear()
        for kind, there in zip(KINDS, expected, strict=True):
            own = Streams(torch.Generator(), keys, 3, torch.device("cuda"))
            found = getattr(Draws(own, index, torch.float32).part(slice(0, 3)), kind)(*shape)
            assert found.is_cuda
            assert torch.equal(found.as_subclass(Tensor), there)
        assert not mode.asked


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
def test_a_real_gpu_draws_the_same():
    keys, shape = torch.arange(-5, 5) * 2**59, (3, 51, 50)
    for dtype in DTYPES:
        assert torch.equal(uniform(keys.cuda(), shape, dtype).cpu(), uniform(keys, shape, dtype))
    drawn, expected = normal(keys.cuda(), shape).cpu(), normal(keys, shape)
    torch.testing.assert_close(drawn, expected, rtol=2e-7, atol=1e-12)
    assert (drawn == expected).double().mean() > 0.999


KINDS = ("uniform", "normal")


@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.1), ("l2", 0.5), ("l1", 2.0)])
def test_random_starts_are_the_samples_own(norm, eps):
    """An attack's, seen at its first step, is the region's with the reference's numbers."""
    images = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    seen: list[Tensor] = []

    def model(x: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        return x.flatten(1)[:, :4] * 1.0

    attack = orthattack.OrthoPGD(model, norm, eps, steps=1, optimize="none")
    attack.run(images, torch.zeros(3, dtype=torch.long), seeds=[7, 8, 9])
    references = [Reference(seed) for seed in (7, 8, 9)]

    def draw(shape, draws, dtype):
        kind = "normal" if draws is torch.randn else "uniform"
        return torch.stack([getattr(own, kind)(*shape[1:]) for own in references]).to(dtype)

    expected = ThreatModel(norm, eps, scope="image").around(images).random_start(draw)
    assert min(float((x - expected).abs().max()) for x in seen if x.shape == expected.shape) <= 1e-12

"""Random numbers: each sample's own, drawn where the images are, and the same there as on any other device.

Number j of a stream is a hash of the stream's state and of j, so that nothing has to be drawn one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from orthattack.arguments import uploaded

KIND = "SplitMix64"
"""What draws the samples' own numbers, for records of results: to be changed whenever a seed's numbers do."""

# SplitMix64's, as signed numbers.
_STEP, _FIRST, _SECOND = (odd - 2**64 for odd in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))
# How many numbers are drawn at a time: what stays in a processor's cache, or keeps a GPU busy.
_ON_CPU, _ON_GPU = 2**18, 2**22


def split(states: Tensor, count: int, first: int = 0) -> Tensor:
    """Outputs of SplitMix64, `count` from number `first` on, from each state (N,): (N, count), int64, to be read as
    unsigned.

    Output j, from 0, is mix(state + (j + 1) γ). Products and sums wrap around, on every device.

    Source: Steele, Lea & Flood 2014, doi:10.1145/2660193.2660195, with the constants of Vigna's splitmix64.c.
    """
    steps = torch.arange(first + 1, first + count + 1, device=states.device).mul_(_STEP)
    return _mixed(states.unsqueeze(1) + steps)


def uniform(states: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """``(N, *shape)`` numbers in [0, 1), each row from its state (N,): the first bits of SplitMix64's outputs, as many
    as `dtype` has digits, so that each number is exact."""
    count = math.prod(shape)
    out = torch.empty(len(states), count, dtype=dtype, device=states.device)
    for rows, part in _blocks(out):
        _fill(out[rows, part], states[rows], part.start)
    return out.view(len(states), *shape)


def normal(states: Tensor, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> Tensor:
    """``(N, *shape)`` numbers of mean 0 and variance 1, each row from its state (N,).

    In float64, whose last digits, which depend on the device, are seldom seen in `dtype`.

    Source: Box & Muller 1958, doi:10.1214/aoms/1177706645: √(-2 ln(1 - u)) times the cosine and the sine of 2πv, with
    u, v uniform in [0, 1).
    """
    count = math.prod(shape)
    out = torch.empty(len(states), count, dtype=dtype, device=states.device)
    half = (count + 1) // 2
    cosines, sines = out[:, :half], out[:, half:]
    for rows, part in _blocks(cosines):
        u, v = torch.empty(2, *cosines[rows, part].shape, dtype=torch.float64, device=states.device)
        _fill(u, states[rows], part.start)
        _fill(v, states[rows], half + part.start)
        radius, angle = u.neg_().log1p_().mul_(-2).sqrt_(), v.mul_(2 * math.pi)  # 1 - u is not 0
        cosines[rows, part] = radius * angle.cos()
        own = sines[rows, part]
        own.copy_((radius * angle.sin_())[:, : own.shape[1]])
    return out.view(len(states), *shape)


class Streams:
    """Random numbers of a batch: those that all samples share, and each sample's own, which depend neither on its
    batch nor on the device.

    Args:
        generator: where shared numbers come from; with `seeds`, they start anew from its seed.
        seeds: of the samples' own, int64; None: drawn from the shared ones when they are first needed.
        count: how many samples there are.
        device: where their numbers are wanted.
    """

    def __init__(
        self, generator: torch.Generator, seeds: Sequence[int] | None, count: int, device: torch.device
    ) -> None:
        anew = generator if seeds is None else torch.Generator(generator.device).manual_seed(generator.initial_seed())
        self.shared, self._count, self._device = anew, count, device
        self._states = None if seeds is None else uploaded(torch.tensor(seeds, dtype=torch.long), device)

    def uniform(self, index: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """``(n, *shape)``, uniform in [0, 1), for the samples at `index`."""
        return uniform(self._next(index), shape, dtype)

    def normal(self, index: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """``(n, *shape)``, of mean 0 and variance 1, for the samples at `index`."""
        return normal(self._next(index), shape, dtype)

    def _next(self, index: Tensor) -> Tensor:
        """(n,) the states that these samples' next drawings begin with: the next output of each sample's stream."""
        if self._states is None:
            seeds = torch.randint(2**63 - 1, (self._count,), generator=self.shared, device=self.shared.device)
            self._states = uploaded(seeds, self._device)
        drawn = split(self._states[index], 1).squeeze(1)
        self._states[index] += _STEP
        return drawn


class Draws:
    """Random numbers for a batch, each sample's from its own stream, so that they do not depend on its neighbours.

    Args:
        streams: of all samples.
        index: (N,) positions of these among them.
        dtype: of the numbers.
    """

    def __init__(self, streams: Streams, index: Tensor, dtype: torch.dtype) -> None:
        self._streams, self._index, self._dtype = streams, index, dtype

    def uniform(self, *shape: int) -> Tensor:
        """``(N, *shape)``, uniform in [0, 1)."""
        return self._streams.uniform(self._index, shape, self._dtype)

    def normal(self, *shape: int) -> Tensor:
        """``(N, *shape)``, of mean 0 and variance 1."""
        return self._streams.normal(self._index, shape, self._dtype)

    def part(self, rows: slice) -> Draws:
        """Those of some consecutive samples."""
        return Draws(self._streams, self._index[rows], self._dtype)


def _mixed(z: Tensor) -> Tensor:
    """SplitMix64's hash, in place."""
    other = torch.empty_like(z)
    for bits, factor in ((30, _FIRST), (27, _SECOND), (31, 1)):
        z.bitwise_xor_(_shifted(z, bits, other)).mul_(factor)
    return z


def _shifted(z: Tensor, bits: int, out: Tensor) -> Tensor:
    """A shift to the right, as of unsigned numbers."""
    return torch.bitwise_right_shift(z, bits, out=out).bitwise_and_(2 ** (64 - bits) - 1)


def _fill(out: Tensor, states: Tensor, first: int) -> None:
    """Write uniform numbers, from number `first` on, into `out`."""
    digits = 1 - round(math.log2(torch.finfo(out.dtype).eps))
    z = split(states, out.shape[1], first)
    out.copy_(_shifted(z, 64 - digits, z)).mul_(2.0**-digits)


def _blocks(out: Tensor) -> Iterator[tuple[slice, slice]]:
    """Rows and columns that are drawn at a time."""
    size = _ON_GPU if out.is_cuda else _ON_CPU
    count, width = out.shape[0], max(1, min(size, out.shape[1]))
    for start in range(0, count, size // width):
        rows = slice(start, min(count, start + size // width))
        for first in range(0, out.shape[1], width):
            yield rows, slice(first, min(out.shape[1], first + width))

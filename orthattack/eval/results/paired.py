"""Statistics of stored outcomes: an attack beside its baseline on the same images, and beside the best known."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Paired:
    """Two attacks, or two runs, on the same images; robust is what is classified correctly, clean and adversarial."""

    n: int  # images that both scored
    both: int  # robust under both
    first_only: int  # robust under the first and not under the second
    second_only: int  # robust under the second and not under the first

    @classmethod
    def of(cls, first: NDArray[np.bool_], second: NDArray[np.bool_]) -> Paired:
        """Count two columns of robust or not, (N,), of the same images in the same order."""
        if first.shape != second.shape:
            raise ValueError(f"two columns of the same images are of one length; found {first.shape}, {second.shape}")
        counts = (first & second).sum(), (first & ~second).sum(), (~first & second).sum()
        return cls(len(first), *map(int, counts))

    @property
    def difference(self) -> float | None:
        """Robust accuracy under the first less under the second; below 0 the first is stronger. None of no images."""
        return (self.first_only - self.second_only) / self.n if self.n else None

    def interval(self) -> tuple[float, float] | None:
        """Tango's score interval (1998, doi:10.1002/(SICI)1097-0258(19980430)17:8<891::AID-SIM780>3.0.CO;2-B), 95 %.

        The differences δ that a score test of "the difference is δ" does not reject. Where the two agree on all of n
        images it is ± z² / (n + z²), which is Wilson's bound for 0 of n. None of no images.
        """
        return _tango(self.n, self.first_only, self.second_only)

    @property
    def p(self) -> float | None:
        """McNemar's test (1947, doi:10.1007/BF02295996), exact: the binomial test on the images they differ on.

        1 where they differ on none; None of no images.
        """
        if self.n == 0:
            return None
        from scipy.special import bdtr  # scipy.stats takes a second to import

        differ = self.first_only + self.second_only
        return min(1.0, 2 * float(bdtr(min(self.first_only, self.second_only), differ, 0.5))) if differ else 1.0


@functools.lru_cache(maxsize=4096)  # many pairs of a run have the same counts
def _tango(n: int, first_only: int, second_only: int, z: float = 1.959963984540054) -> tuple[float, float] | None:
    if n == 0:
        return None
    difference = (first_only - second_only) / n

    def excess(delta: float) -> float:
        """The squared score statistic less z², times its variance, which vanishes at the ends."""
        # The likeliest share of `second_only` alone if the difference is delta, a root of 2n q² + b q + c = 0.
        b = (2 * n - first_only + second_only) * delta - first_only - second_only
        c = -second_only * delta * (1 - delta)
        q = (math.sqrt(max(b * b - 8 * n * c, 0.0)) - b) / (4 * n)
        variance = n * max(2 * q + delta * (1 - delta), 0.0)
        return (first_only - second_only - n * delta) ** 2 - z * z * variance

    low, high = (
        end if excess(end) <= 0 else _root(excess, difference, end) for end in (-1.0, 1.0)
    )  # where the end itself is not rejected, the interval reaches it
    return low, high


def _root(excess: Callable[[float], float], inside: float, outside: float) -> float:
    """Where a statistic meets its limit, by bisection."""
    for _ in range(60):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if excess(middle) <= 0 else (inside, middle)
    return inside


def optimality(distances: NDArray[Any], best: NDArray[Any]) -> float | None:
    """How close an attack that minimises the norm comes to the best that is known (Cinà et al. 2024, arXiv:2404.19460).

    With A the area under robust accuracy against ε, up to the ε₀ at which the best reaches its floor:

        (ρ ε₀ − A) / (ρ ε₀ − A_best),    ρ: clean accuracy, ρ ε₀: the area of an attack that fools nothing

    It is 1 where the attack is the best on every image and 0 where it fools nothing below ε₀. The curve is a step
    function, so its area is the mean of min(distance, ε₀), exactly; AttackBench takes the trapezoids between the steps.

    Args:
        distances: (N,), norm of the adversarial perturbation; 0 where the clean image is wrong, inf where not fooled.
        best: (N,), the smallest distance over all attacks, these distances among them.

    Returns:
        In [0, 1]; None where no image is fooled, or all at the same distance: nothing is left to be better at.
    """
    finite = best[np.isfinite(best)]
    reach = float(finite.max(initial=0.0))
    if reach == 0:
        return None
    nothing = float((best > 0).mean()) * reach
    gain = nothing - float(np.minimum(best, reach).mean())
    if gain <= 1e-12 * reach:
        return None
    return (nothing - float(np.minimum(distances, reach).mean())) / gain

"""What the numbers of an evaluation mean. Every rate is defined here, once."""

from __future__ import annotations

import math
from dataclasses import dataclass

_INTERVALS = "intervals: 95 %, Wilson"
_LEFT = (
    "robust accuracy: classified correctly, clean and adversarial, over all images scored",
    "success: newly fooled, over the images that were initially correct and scored",
)
_REACHED = (
    "robust accuracy: clean classified correctly, adversarial not as the target, over all images scored",
    "success: predicted as the target, over the images that were initially correct and scored",
)


def defined(targets: str | None = None, queries: int | None = None) -> list[str]:
    """What the rates are, of a run with classes to reach too: how these were chosen; and of one with a query budget."""
    what = [*_LEFT, _INTERVALS] if targets is None else [f"targets: {targets}", *_REACHED, _INTERVALS]
    if queries is not None:
        what.append(
            f"queries: at most {queries:,} evaluations of the model per image; what took more counts as not fooled. "
            "Attacks with code that is not ours are counted by the batch, and stopped there"
        )
    return what


@dataclass(frozen=True)
class Rate:
    """`count` out of `total`."""

    count: int
    total: int

    @property
    def value(self) -> float | None:
        """The share, or None of nothing: an empty set has no accuracy."""
        return self.count / self.total if self.total else None

    def interval(self, z: float = 1.959963984540054) -> tuple[float, float] | None:
        """Wilson's score interval (1927, doi:10.1080/01621459.1927.10502953), 95 % unless `z` says otherwise."""
        if self.total == 0:
            return None
        n, p = self.total, self.count / self.total
        centre = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, centre - half), min(1.0, centre + half)

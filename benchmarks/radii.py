"""What a constraint rules out: the radius that fooling a model takes under each, contrast reduction alone, and 8 bits.

All in L-infinity, on images that the model classifies correctly, in [0, 1] as 8-bit files have them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from foolbox.attacks import LinearSearchContrastReductionAttack
from foolbox.distances import linf
from torch import Tensor, nn

from benchmarks import defaults
from benchmarks.stored import Row
from benchmarks.study.numbers import over_seeds
from orthattack import PGD, MinimumNorm, fooled
from orthattack.eval.data.dataset import evenly
from orthattack.interop.foolbox import FromFoolbox

CONSTRAINTS: Mapping[str, Mapping[str, Any]] = {
    "nothing": {},
    "orthogonal to the image": {"scope": "image"},
    "… in each channel": {"scope": "channel"},
    "… in each pixel": {"scope": "pixel"},
    "mean": {"scope": "image", "normal": "constant"},
    "mean colour": {"scope": "channel", "normal": "constant"},
    "luma of each pixel": {"scope": "pixel", "normal": "luma"},
    "8×8 block means": {"scope": "block8", "normal": "constant"},
}
"""What is kept, as options of an attack."""

CONTRAST = {"contrast reduced, to grey": 0.5, "contrast reduced, to black": 0.0}
"""Foolbox's `target`; what goes to black is along the image."""

MODELS = {"cifar10-standard": (1, 1, 30), "cifar10-robust": (8, 1, 30), "efficientnet-lite0": (1, 6, 20)}
"""A radius that 8 bits can hold, in 255ths; how many times fewer images than asked for; gradients of a search."""

STEPS = 20


def tables(shared: Path, build: Path, limit: int, names: list[str] | None) -> Iterator[tuple[str, list[Row]]]:
    """Of each model, a row per search for the smallest radius and a row per attack at one radius, by image: norms in
    255ths, and "1" for what fools."""
    known = defaults.models(shared, build)
    for name, (eps, fewer, gradients) in MODELS.items():
        if names and name not in names:
            continue
        spec, data, _ = known[name]
        count = max(1, limit // fewer)
        classifier, images, labels = defaults.loaded(spec, data, 2 * count)
        images = (images * 255).round() / 255
        right = (~fooled(classifier.model, images, labels)).nonzero().flatten()
        chosen = right[evenly(count, len(right))]
        yield name, list(rows(classifier.model, images[chosen], labels[chosen], eps, gradients))


def rows(model: nn.Module, images: Tensor, labels: Tensor, eps: float, gradients: int) -> Iterator[Row]:
    """The rows of one model; `eps` in 255ths."""
    seeds = range(len(images))
    for kept, options in CONSTRAINTS.items():
        found = MinimumNorm(model, "linf", gradients=gradients, **options).run(
            images, labels, seeds=seeds, batch_size=25
        )
        yield {"kept": kept, "radii * 255": _in_255ths(found.norm), "fooled": _digits(found.success)}
    for kept, target in CONTRAST.items():
        attack = LinearSearchContrastReductionAttack(distance=linf, steps=50, target=target)
        found = FromFoolbox(model, attack, "linf", None).run(images, labels, batch_size=25)
        yield {"kept": kept, "radii * 255": _in_255ths(found.norm), "fooled": _digits(found.success)}
    for kept in ("nothing", "orthogonal to the image", "8×8 block means"):
        for bits, levels in (("", None), (", 8 bits", 256)):
            more = {"loss": "margin", "schedule": "fixed", "levels": levels, **CONSTRAINTS[kept]}
            attack = PGD(model, eps=eps / 255, steps=STEPS, early_stop=True, **more)
            found = attack.run(images, labels, seeds=seeds, batch_size=25)
            yield {"kept": kept + bits, "eps * 255": eps, "fooled": _digits(found.success)}
    for kept, target in CONTRAST.items():
        towards = target - images
        size = towards.abs().amax((1, 2, 3), keepdim=True)
        reduced = images + (eps / 255 / size).clamp(max=1) * towards
        yield {"kept": kept, "eps * 255": eps, "fooled": _digits(fooled(model, reduced, labels))}


def _in_255ths(norm: Tensor) -> list[float]:
    return [float(f"{255 * value:.4g}") for value in norm.tolist()]


def _digits(flags: Tensor) -> str:
    return "".join(map(str, flags.int().tolist()))


def relative(row: Row, plain: Row) -> tuple[float, float, float]:
    """The geometric mean of the radii over plain's, with its 95 % interval (Student's t of the logarithms), over images
    that both fool."""
    both = [k for k, pair in enumerate(zip(row["fooled"], plain["fooled"], strict=True)) if pair == ("1", "1")]
    return geometric_mean([row["radii * 255"][k] / plain["radii * 255"][k] for k in both])


def geometric_mean(ratios: Sequence[float]) -> tuple[float, float, float]:
    """With its 95 % interval, by Student's t of the logarithms."""
    middle, low, high = over_seeds(np.log(ratios).tolist())
    return math.exp(middle), math.exp(low), math.exp(high)


def median(row: Row) -> float:
    """The median radius in 255ths, infinite for what is not fooled."""
    radii = [r if of == "1" else math.inf for r, of in zip(row["radii * 255"], row["fooled"], strict=True)]
    return float(np.median(radii))


def searches(rows: Sequence[Row]) -> dict[str, Row]:
    """The rows with radii, by what is kept."""
    return {row["kept"]: row for row in rows if "radii * 255" in row}

"""The benchmark of the radii that constraints need: a linear model, where they are known, and the tables."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy.stats import sem, t

from benchmarks import constraint, radii
from benchmarks.stored import Table


def test_a_linear_model_needs_what_geometry_says():
    """Two classes, no bounds near: the L∞ radius is margin / ‖w‖₁, and more under a constraint."""
    generator = torch.Generator().manual_seed(0)
    images = (torch.rand(3, 3, 8, 8, generator=generator) * 50 + 100).round() / 255
    weight = torch.randn(3 * 64, generator=generator)
    weight -= weight.mean()  # so that a constant does nothing
    linear = torch.nn.Linear(3 * 64, 2)
    linear.weight.data, linear.bias.data = torch.stack([weight, -weight]), torch.zeros(2)
    model = torch.nn.Sequential(torch.nn.Flatten(), linear)
    logits = model(images).detach()
    labels = logits.argmax(1)
    exact = 255 * (logits[:, 0] - logits[:, 1]).abs() / 2 / weight.abs().sum()
    rows = list(radii.rows(model, images, labels, math.ceil(float(exact.max())), 20))
    found = radii.searches(rows)
    assert list(found) == [*radii.CONSTRAINTS, *radii.CONTRAST]
    assert found["nothing"]["radii * 255"] == pytest.approx(exact.tolist(), rel=3e-3)
    for kept in radii.CONSTRAINTS:
        assert found[kept]["fooled"] == "111"
        assert radii.relative(found[kept], found["nothing"])[0] >= 1 - 3e-3
    assert radii.relative(found["mean"], found["nothing"])[0] == pytest.approx(1, abs=0.03)
    # Less contrast is less of the same margin, and the answer stays; without any, the first class is the answer.
    assert found["contrast reduced, to black"]["fooled"] == "".join(map(str, labels.tolist()))
    at = {row["kept"]: row["fooled"] for row in rows if "eps * 255" in row}
    assert {at[kept + bits] for kept in list(radii.CONSTRAINTS)[:2] for bits in ("", ", 8 bits")} == {"111"}
    assert at["contrast reduced, to black"] == "000"


def test_relative_radii_have_the_interval_of_a_paired_t_test():
    first, second = [2.0, 3.0, 1.5, 9.0], [1.0, 2.0, 1.4, 4.0]
    row = {"radii * 255": first, "fooled": "1110"}
    plain = {"radii * 255": second, "fooled": "1111"}
    ratio, low, high = radii.relative(row, plain)
    logs = np.log(first[:3]) - np.log(second[:3])
    expected = np.exp(t.interval(0.95, 2, loc=logs.mean(), scale=sem(logs)))
    assert ratio == pytest.approx((2 * 1.5 * 1.5 / 1.4) ** (1 / 3))
    assert (low, high) == pytest.approx(tuple(expected))
    assert radii.median(row) == 2.5
    assert radii.median({"radii * 255": [1.0, 2.0, 3.0], "fooled": "100"}) == math.inf


def test_the_tables_compare_with_what_is_free():
    def rows(scale: float) -> list[dict[str, object]]:
        radius = {"fooled": "1111", "radii * 255": [1.0, 2.0, 3.0, 4.0]}
        search = [
            {"kept": "nothing", **radius},
            {"kept": "mean", **radius, "radii * 255": [scale, 2 * scale, 3 * scale, 4 * scale]},
            {"kept": "contrast reduced, to grey", "radii * 255": [50.0, 60.0, 99.0, 99.0], "fooled": "1100"},
        ]
        at = [{"kept": kept, "eps * 255": 8, "fooled": of} for kept, of in (("nothing", "1110"), ("mean", "1000"))]
        return [*search, *at]

    tables = [Table(name=name, hardware="h", versions={}, rows=rows(scale))
              for name, scale in (("efficientnet-lite0", 2.0), ("cifar10-standard", 1.5))]  # fmt: skip
    text = constraint.radii_tables(tables)
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in text["needed"].splitlines()]
    assert cells[0] == ["kept", "cifar10-standard, 4 images", "efficientnet-lite0, 4 images"]
    assert cells[2] == ["nothing", "median 2.5/255", "median 2.5/255"]
    assert cells[3] == ["mean", "1.50 [1.50, 1.50]", "2.00 [2.00, 2.00]"]
    assert cells[4][1] == "median inf/255 (2 of 4)"
    last = [cell.strip() for cell in text["fixed"].splitlines()[-1].strip("|").split("|")]
    assert last[0] == "mean"
    assert last[1].startswith("25 %, −50 [")

"""The benchmark of transfer: counts of images that both models know, and a row for each attack."""

from __future__ import annotations

import pytest
import torch

from benchmarks import report, transfer
from benchmarks.stored import Table


@pytest.mark.slow
def test_a_pair_is_measured_on_images_that_both_know(shared, tmp_path):
    ((name, rows),) = transfer.tables(shared, tmp_path, 4, ["cifar10-robust"])
    assert name == "cifar10-robust-to-cifar10-standard"
    assert [row["attack"] for row in rows] == list(transfer.attacks(torch.zeros(1, 3, 8, 8)))
    for row in rows:
        assert row["images"] == 4
        assert all(0 <= row[key] <= 4 for key in ("plain", "orthogonal", "plain, source", "orthogonal, source"))
    assert max(row["plain, source"] for row in rows) > 0


def test_the_table_has_rates_with_their_intervals():
    row = {"attack": "MI", "eps * 255": 8.0, "images": 50, "plain": 10, "orthogonal": 0, "plain, source": 50,
           "orthogonal, source": 49, "gradients": 10}  # fmt: skip
    text = report._transfer_table(Table(name="a-to-b", hardware="h", versions={}, rows=[row]))
    assert text.startswith("a → b, L∞, ε = 8/255, 50 images:")
    cells = [cell.strip() for cell in text.splitlines()[-1].strip("|").split("|")]
    assert cells == ["MI", "20 % (11 to 33)", "0 % (0 to 7)", "100 %", "98 %", "10"]

"""The README's Python runs as it is printed, and prints what it says."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn


def test_the_examples_run(capsys):
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    first, second, third = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    (printed,) = re.findall(r"```text\n(.*?)```", text, flags=re.DOTALL)
    exec(first, {})
    written = capsys.readouterr().out
    cosine = r"\d\.?\d*e-\d+"  # its last digits are the machine's
    varies = rf"{cosine}|22\d forward"  # one more for each image whose best point is not the last, by the random start
    assert re.sub(varies, "", written).split() == re.sub(varies, "", printed).split()
    assert float(re.search(cosine, written)[0]) <= 1e-6

    torch.manual_seed(0)
    classifier = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    names = {"my_classifier": classifier, "images": torch.rand(4, 3, 8, 8), "labels": torch.tensor([0, 1, 2, 3])}
    exec(second, names)
    assert names["adversarials"].shape == (4, 3, 8, 8)
    assert not torch.equal(names["adversarials"], names["images"])
    assert names["result"].cosine.max() <= 1e-6

    names["gradient"] = torch.randn(4, 3, 8, 8)
    exec(third, names)
    assert names["direction"].shape == (4, 3, 8, 8)

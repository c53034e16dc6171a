"""The README's Python example runs as it is printed."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from torch import nn


def test_the_example_runs(capsys):
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    torch.manual_seed(0)
    classifier = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5))
    names = {"my_classifier": classifier, "images": torch.rand(4, 3, 8, 8), "labels": torch.tensor([0, 1, 2, 3])}
    exec(code, names)
    assert names["adversarials"].shape == (4, 3, 8, 8)
    assert not torch.equal(names["adversarials"], names["images"])
    rate, cosine = (float(number) for number in re.findall(r"[\d.]+(?:e-\d+)?", capsys.readouterr().out)[:2])
    assert 0 <= rate <= 1
    assert 0 <= cosine <= 1e-6

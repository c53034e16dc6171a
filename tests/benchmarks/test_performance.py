"""The page on speed says what was measured, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import performance

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "performance.md"


def test_the_page_has_the_stored_tables():
    page, tables = PAGE.read_text(encoding="utf-8"), performance.tables(ROOT / "benchmarks" / "performance")
    assert len(tables) >= 4
    assert performance.filled(page, tables) == page
    for name in tables:
        assert f"<!-- {name} -->" in page, f"the page has no place for {name}"


def test_the_candidates_run_and_leave_the_model_trainable():
    pytest.importorskip("torchattacks")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.AvgPool2d(8), torch.nn.Flatten(), torch.nn.Linear(48, 5)).eval()
    images = performance.pictures(2, 32)
    labels = model(images).argmax(1)
    runs = performance.candidates(model, 2)
    assert len(runs) >= 14
    for run in runs.values():
        assert performance.timed(lambda run=run: run(images, labels)) > 0
    assert all(parameter.requires_grad for parameter in model.parameters())

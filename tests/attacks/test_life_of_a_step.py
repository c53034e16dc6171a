"""docs/life-of-a-step.md against the calls that are really made."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from orthattack import PGD

pytestmark = pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.10 does not say whose a method is")
ROOT = Path(__file__).parents[2]
PACKAGE = ROOT / "orthattack"
# What checks and lends, what records on GPUs only, and the random numbers, which plain PGD's steps draw none of.
ASIDE = {
    "arguments.py", "models.py", "lending.py", "assumptions.py", "attacks/configured.py", "replay.py",
    "attacks/numbers.py",
}  # fmt: skip


def told() -> list[tuple[str, str]]:
    """The calls of the page with their files, in its order."""
    calls = []
    for row in re.findall(r"^\| \d+ \| (.*?) \|", (ROOT / "docs" / "life-of-a-step.md").read_text("utf-8"), re.M):
        names, _, file = row.rpartition(" in [")
        calls += [(file.partition("]")[0], name) for name in re.findall(r"`([\w.]+)`", names or row)]
    return calls


def traced(steps: int) -> list[tuple[str, str]]:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    images, labels = torch.rand(2, 3, 2, 2, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1])
    PGD(model, steps=steps)(images, labels)  # whatever is looked up once
    calls = []

    def note(frame, event, _):
        path = Path(frame.f_code.co_filename)
        if event == "call" and path.is_relative_to(PACKAGE):
            calls.append((path.relative_to(PACKAGE).as_posix(), frame.f_code.co_qualname))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        PGD(model, steps=steps)(images, labels)
    finally:
        sys.setprofile(before)
    return calls


def test_the_calls_are_made_in_the_order_of_the_page():
    page, calls = told(), traced(1)
    assert len(page) >= 15
    at = 0
    for call in page:
        assert call in calls[at:], f"{call} is not made, or not there"
        at += calls[at:].index(call) + 1


def test_a_step_of_plain_pgd_is_followed_in_the_files_of_the_page():
    calls = traced(3)
    first, last = calls.index(("attacks/task.py", "Task.score")), calls.index(("attacks/task.py", "Best.result"))
    files = {file for file, _ in calls[first:last]} - ASIDE
    page = {file for file, _ in told()} | {"threat/norms.py"}
    assert files <= page
    assert len(files | {"attacks/ascent.py"}) <= 8

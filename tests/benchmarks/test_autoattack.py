"""The benchmark against the official AutoAttack: rows from a run, and their table."""

from __future__ import annotations

import pytest
import torch

from benchmarks import autoattack
from benchmarks.report import tables
from benchmarks.stored import keep, machine


def constant(model, images, labels, norm, eps):
    """Black images, and what they say of the first part."""
    assert (norm, eps, len(images)) == ("l2", 0.5, 4)
    return torch.zeros_like(images), {"clean": 1.0, "apgd-ce": 0.25}


def test_rows_are_judged_and_tabled(monkeypatch, tmp_path):
    monkeypatch.setattr(
        autoattack, "CANDIDATES", {"official": lambda m, x, *_: (x, {"apgd-ce": 1.0}), "AutoAttack": constant}
    )
    arguments = ("two", ("cifar10-standard", None, None), ("cifar10-samples", None), 4, "l2", 0.5)
    for only in (["official"], None, None):  # the second run has one left to do, the third none
        for found in autoattack.rows(*arguments, only, tmp_path / "build", tmp_path):
            keep("autoattack", "two", found, 1, tmp_path)
    assert not list(autoattack.rows(*arguments, None, tmp_path / "build", tmp_path))
    assert [row["attack"] for row in found] == ["official", "AutoAttack"]
    theirs, ours = found
    assert theirs["clean"] == ours["clean"] == pytest.approx(theirs["robust"].count("1") / 4)
    assert ours["robust"].count("1") <= theirs["robust"].count("1")
    fallen = theirs["robust"].count("1") - ours["robust"].count("1")
    assert fallen > 0
    assert ours["parts"] == "apgd-ce 25.0"
    text = tables(tmp_path)[f"autoattack/{machine()[0]}/two"]
    row = [cell.strip() for cell in text.splitlines()[-1].split("|")[1:-1]]
    robust = 25 * ours["robust"].count("1")
    assert row[1].startswith(f"{robust}.0 % [")
    assert [row[0], *row[2:5]] == ["AutoAttack", "apgd-ce 25.0", str(fallen), "0"]


@pytest.mark.slow
def test_the_official_code_is_asked_as_it_wants_to_be():
    pytest.importorskip("pyautoattack", reason="needs the official code: pip install pyautoattack --no-deps")
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 5))
    images = torch.rand(4, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    labels = model(images).argmax(1)
    adversarials, parts = autoattack.official(model, images, labels, "linf", 0.5)
    assert adversarials.shape == images.shape
    assert parts["apgd-ce"] <= 1


def test_a_second_start_goes_on_with_the_images_that_are_left(monkeypatch, tmp_path):
    asked, ends = [], [False, True]

    def attack(model, images, labels, norm, eps):
        if len(asked) == 1 and ends.pop():
            raise KeyboardInterrupt
        asked.append(len(images))
        return images, {"apgd-ce": 0.5} if len(asked) == 1 else {"apgd-ce": 0.5, "square": 0.0}

    monkeypatch.setattr(autoattack, "CANDIDATES", {"official": attack})
    monkeypatch.setattr(autoattack, "BATCH", 2)
    model = ("cifar10-standard", None, None)
    arguments = ("two", model, ("cifar10-samples", None), 4, "l2", 0.5, None, tmp_path / "build", tmp_path)
    with pytest.raises(KeyboardInterrupt):
        list(autoattack.rows(*arguments))
    ((row,),) = autoattack.rows(*arguments)
    assert asked == [2, 2]
    assert row["images"] == len(row["robust"]) == 4
    assert row["parts"] == "apgd-ce 50.0, square 0.0"

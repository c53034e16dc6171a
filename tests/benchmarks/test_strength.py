"""The benchmark of strength: what a run leaves in the tables, and what the pages make of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks import strength
from benchmarks.stored import Row, Stored, Table, keep


@pytest.fixture
def one(monkeypatch: pytest.MonkeyPatch) -> None:
    """A single model, which the package brings."""
    network = {"name": "cifar10-standard"}, {"source": "cifar10-samples"}, 1 / 255
    monkeypatch.setattr(strength, "models", lambda *_: {"one": network})
    monkeypatch.setitem(strength.RADII, "one", (0.1, 1.0))


@pytest.mark.usefixtures("one")
def test_a_table_of_a_run_is_not_measured_again(tmp_path, monkeypatch):
    def measured(limit: int) -> Iterator[tuple[str, list[Row]]]:
        return strength.tables(tmp_path, tmp_path / "build", limit, None, ["l1"], [2], tmp_path / "results")

    ((name, rows),) = measured(6)
    assert name == "one-l1-2"
    assert [row["attack"] for row in rows] == [
        "Foolbox PGD",
        "PGD",
        "OrthoPGD",
        "PGD, ce, fixed",
        "OrthoPGD, ce, fixed",
    ]
    for row in rows:
        assert len(row["robust"]) == row["images"] == 6
        assert row["robust"].count("1") + row["fooled"] == round(6 * row["clean"])
        assert 0 < row["max norm / eps"] <= 1 + 1e-5
        assert 0 < row["gradients"] <= 2
    by_name = {row["attack"]: row for row in rows}
    assert by_name["OrthoPGD"]["max |cos|"] <= 1e-6 < by_name["PGD"]["max |cos|"]
    assert by_name["Foolbox PGD"]["gradients"] == 2
    keep("strength", name, rows, 1, tmp_path / "results")
    assert not list(measured(6))
    assert not list(measured(5))
    keep("strength", name, [row for row in rows if row["attack"] != "PGD"], 1, tmp_path / "results")
    ((_, again),) = measured(5)  # of the stored images
    assert again == rows
    asked: list[str] = []

    def noted(network: object, data: dict[str, int], attacks: list[dict[str, str]], *_: object) -> list[Row]:
        asked.extend(attack["label"] for attack in attacks)
        return [{"attack": attack["label"], "limit": data["limit"]} for attack in attacks]

    monkeypatch.setattr(strength, "_rows", noted)
    ((_, more),) = measured(7)
    assert asked == [row["attack"] for row in more] == [row["attack"] for row in rows]
    assert {row["limit"] for row in more} == {7}


def _table(name: str, digits: dict[str, str], eps: float = 0.5) -> Table:
    rows = [
        {"attack": attack, "limit": 4, "images": 4, "eps": eps, "clean": 1.0, "robust": robust, "max |cos|": 0.1,
         "max norm / eps": 1.0, "gradients": 5.0, "fooled": robust.count("0")}
        for attack, robust in digits.items()
    ]  # fmt: skip
    return Table(name=name, hardware="some", versions={}, rows=rows)


def _cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text[text.index("|") :].splitlines()[2:]]


def test_the_pages_pair_ours_with_the_stronger_of_the_others():
    ten = {
        "Foolbox PGD": "1110", "torchattacks PGD": "1100", "PGD": "0010", "OrthoPGD": "0011",
        "PGD, ce, fixed": "1111", "OrthoPGD, ce, fixed": "1100",
    }  # fmt: skip
    hundred = {"Foolbox PGD": "1100", **dict.fromkeys((*strength.OURS, *strength.ALIKE.values()), "0000")}
    file = Stored(what="strength", machine="m", tables=[_table("a-b-l2-10", ten), _table("a-b-l2-100", hundred)])
    found = strength.pages([file])
    row, every = _cells(found["strength/summary"])
    assert row[:6] == ["L2, 0.5", "a-b", "4", "50.0", "25.0", "50.0"]
    assert row[6].startswith("-25.0 (")
    assert row[7].startswith("+25.0 (")
    assert every == ["L2", "all", *row[2:]]
    lost = _cells(found["strength/lost"])
    assert [row[:7] for row in lost] == [["a-b", "L2", "10", "PGD, ce, fixed", "torchattacks PGD", "0", "2"]]
    loss = _cells(found["strength/loss"])
    assert [row[:6] for row in loss[:2]] == [
        ["L2", "10", "PGD", "4 of 1", "100.0", "25.0"],
        ["L2", "10", "OrthoPGD", "4 of 1", "50.0", "50.0"],
    ]
    assert loss[0][6].startswith("-75.0 (")
    assert loss[1][7] == "+0.0, a-b"
    kept = {row[0]: row for row in _cells(found["strength/kept"])}
    assert kept["PGD"][1:] == ["8", "1.0e-01", "1.0000000", "28 %"]
    details = _cells(found["strength/l2"])
    assert details[0] == ["a-b", "4", "10", "75.0", "50.0", "25.0", "50.0", "100.0", "50.0"]
    assert details[1][3:6] == ["50.0", "–", "0.0"]


def test_of_two_machines_the_one_with_more_images_counts():
    names = ("Foolbox PGD", *strength.OURS, *strength.ALIKE.values())
    few, more = (dict.fromkeys(names, digits) for digits in ("11", "0000"))
    small = [row | {"images": 2} for row in _table("a-linf-10", few).rows]
    tables = {"m": Table(name="a-linf-10", hardware="", versions={}, rows=small), "n": _table("a-linf-10", more)}
    files = [Stored(what="strength", machine=name, tables=[table]) for name, table in tables.items()]
    for order in (files, files[::-1]):
        row, _ = _cells(strength.pages(order)["strength/summary"])
        assert row[2] == "4"
    assert strength.pages(files)["strength/lost"] == "None."
    assert strength.pages([]) == {}

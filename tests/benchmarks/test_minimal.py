"""The benchmark of minimal norms: what is measured and what is stored already, and what the pages make of it."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest
import torch

from benchmarks import minimal
from benchmarks.stored import Row, Stored, Table, keep

OURS = "MinimumNorm"
ORTHO = "OrthoMinimumNorm"


def _file(tables: dict[str, dict[str, list[float]]], machine: str = "m") -> Stored:
    more = {"gradients": 4.0, "evaluations": 5.0, "seconds": 90.0}
    found = [
        Table(name=name, hardware=f"some {machine}", versions={"adv-lib": "1"}, rows=[
            {"attack": attack, "norms": norms, **more} for attack, norms in rows.items()
        ])
        for name, rows in tables.items()
    ]  # fmt: skip
    return Stored(what="minimal", machine=machine, tables=found)


def _lines(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text[text.index("|") :].splitlines()[2:]]


def test_the_pages_compare_ours_with_the_best_of_the_others():
    """At best norms 1, 2 and 4, so a radius of 4 and (4 - 1) + (4 - 2) + 0 to gain; larger norms count as 4."""
    five = {OURS: [2.0, 2.0, 4.0], ORTHO: [4.0, 4.0, 5.0], "FMN": [1.0, 4.0, 4.001], "DDN": [9.0, 9.0, 9.0]}
    found = minimal.pages([_file({"a-b-l2-5": five, "a-b-l2-50": {ORTHO: [1.0, 2.0, 4.0]}})])
    assert list(found) == ["minimal/summary", "minimal/lost", "minimal/l2"]
    assert found["minimal/summary"].startswith("some m; adv-lib 1; 8 CPU minutes for all tables:")
    (row,) = _lines(found["minimal/summary"])  # not of 50 gradients, where there is nothing to compare with
    assert row[:8] == [
        "L2",
        "a-b",
        "3",
        "5",
        "**0.8000**",
        "0.0000",
        "1.710",
        "0.6000, FMN",
    ]  # (2 * 2 * 1.25) ** (1 / 3)
    assert row[8].startswith("1.000 [")  # (2 * 0.5 * 0.99975) ** (1 / 3)
    assert row[9:] == ["1, 1"]  # 4 and 4.001 are alike
    lost = _lines(found["minimal/lost"])
    assert [row[:7] for row in lost] == [["L2", "a-b", "5", "ortho", "FMN", "0.0000", "0.6000"]]
    assert lost[0][7].startswith("1.710 [")  # (4 * 1 * 5 / 4.001) ** (1 / 3)
    assert lost[0][8:] == ["0, 2"]
    assert _lines(found["minimal/l2"]) == [
        [OURS, "**0.8000**", "–", "90 %"],
        ["FMN", "0.6000", "–", "90 %"],
        [ORTHO, "0.0000", "**1.0000**", "50 %"],  # half the tables with a tenth
        ["DDN", "0.0000", "–", "90 %"],
    ]


def test_a_smaller_mean_norm_is_a_loss_even_where_optimality_is_not():
    rows = {OURS: [2.0, 2.0, 10.0], ORTHO: [1.0, 0.5, 10.0], "FMN": [0.2, 4.0, 10.0]}
    (row,) = _lines(minimal.pages([_file({"a-l1-5": rows})])["minimal/lost"])
    assert row[3:5] == ["plain", "FMN"]
    assert float(row[5]) > float(row[6])
    assert row[7].startswith("1.710 [")
    assert row[8:] == ["1, 1"]
    better = {OURS: [1.0, 1.0, 9.0], ORTHO: [1.0, 1.0, 9.0], "FMN": [1.0, 2.0, 9.0]}
    assert minimal.pages([_file({"a-l1-5": better})])["minimal/lost"] == "None."


def test_of_two_machines_the_table_of_more_images_counts():
    few, many = {OURS: [1.0], ORTHO: [1.0], "FMN": [1.0]}, {OURS: [1.0, 2.0], ORTHO: [1.0, 2.0], "FMN": [1.0, 2.0]}
    files = [_file({"a-linf-5": few}, "m"), _file({"a-linf-5": many}, "n")]
    for order in (files, files[::-1]):
        (row,) = _lines(minimal.pages(order)["minimal/summary"])
        assert row[2] == "2"
    assert minimal.pages([]) == {}


def test_tables_of_one_model_and_norm_are_of_the_same_images():
    file = _file({"a-linf-5": {OURS: [1.0, 2.0]}, "a-linf-9": {OURS: [1.0]}, "a-l2-9": {OURS: [1.0]}})
    with pytest.raises(ValueError, match=r"the tables of a-linf are of \[1, 2\] images"):
        minimal.pages([file])


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, str, int, int]]:
    """Of a single model, which the package brings, the attacks that are run: passes, norm, budget, images."""
    network = {"name": "cifar10-standard"}, {"source": "cifar10-samples"}, 1 / 255
    monkeypatch.setattr(minimal, "models", lambda *_: {"one": network})
    monkeypatch.setattr(minimal, "candidates", lambda _, passes: {"A": passes, "B": passes})
    found: list[tuple[int, str, int, int]] = []

    def measured(run: int, model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor, *where: object) -> Row:
        assert (model(images).argmax(1) == labels).all()
        assert len(set(labels.tolist())) == len(labels)  # of each class in turn
        found.append((run, *where, len(images)))  # type: ignore[arg-type]
        return {"norms": [1.0] * len(images), "gradients": 1.0, "evaluations": 1.0, "seconds": 0.0}

    monkeypatch.setattr(minimal, "measured", measured)
    return found


def test_what_is_stored_is_not_measured_again(tmp_path, asked):
    def tables(limit: int, norms: list[str], only: list[str] | None = None) -> Iterator[tuple[str, list[Row]]]:
        for name, rows in minimal.tables(tmp_path, tmp_path, limit, None, norms, [3, 7], only, tmp_path):
            keep("minimal", name, rows, 1, tmp_path)
            yield name, rows

    assert next(tables(4, ["l2"]))[0] == "one-l2-3"  # and ended there, after A
    found = [(name, [row["attack"] for row in rows]) for name, rows in tables(4, ["l2"])]
    assert found == [("one-l2-3", ["A", "B"]), ("one-l2-7", ["A"]), ("one-l2-7", ["A", "B"])]
    assert asked == [(6, "l2", 3, 4), (6, "l2", 3, 4), (14, "l2", 7, 4), (14, "l2", 7, 4)]
    assert not list(tables(4, ["l2"]))
    assert [name for name, _ in tables(4, ["l2", "l1"], ["B"])] == ["one-l1-3", "one-l1-7"]
    with pytest.raises(ValueError, match=r"one-l2-3 is stored with 4 images, .*these are 3: give --limit 4"):
        list(tables(3, ["l2"]))
    with pytest.raises(ValueError, match=r"no attack is called 'C'; there are \['A', 'B'\]"):
        list(tables(4, ["l2"], ["C"]))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # adv-lib's
def test_the_norms_are_those_of_a_linear_model():
    """What AttackBench stores of ours is the distance to the boundary, and its count is within the budget."""
    for package in ("attackbench", "adv_lib"):
        if find_spec(package) is None:  # which import what only the benchmark puts in place
            pytest.skip(f"needs {package}")
    torch.manual_seed(0)
    images = 0.4 + 0.2 * torch.rand(3, 3, 4, 4)
    linear = torch.nn.Linear(48, 2)
    model = torch.nn.Sequential(torch.nn.Flatten(), linear)
    logits = model(images).detach()
    labels = logits.argmax(1)
    slope = (linear.weight[0] - linear.weight[1]).detach()
    for norm, dual in (("linf", 1), ("l2", 2)):
        exact = (logits[:, 0] - logits[:, 1]).abs() / torch.linalg.vector_norm(slope, dual)
        row = minimal.measured(minimal.candidates(norm, 60)[OURS], model, images, labels, norm, 30)
        assert row["norms"] == pytest.approx(exact.tolist(), rel=1e-3)
        assert 0 < row["gradients"] <= 30
        assert row["gradients"] + row["evaluations"] <= 60

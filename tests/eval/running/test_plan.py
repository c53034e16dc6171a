"""What is left of a run, by the files that are there; which processes do which units."""

from __future__ import annotations

from dataclasses import replace

import pytest

from orthattack.eval.checks.probes import SAVED, TRANSFER
from orthattack.eval.running.plan import GALLERY, Plan, Todo, Unit
from orthattack.eval.storage.run_folder import RunFolder, Shard
from orthattack.eval.storage.schema import CLEAN_SCHEMA, ROW_SCHEMA
from orthattack.eval.suite import make_suite

CONTENT = {
    "models": ["cifar10-robust", "cifar10-standard"],
    "data": {"source": "cifar10-samples"},
    "eps": [0.1],
    "attacks": ["FGSM", "OrthoPGD"],
    "shard_size": 4,
    "check_images": 3,
}
COUNTS = {"a": 10, "b": 4}


def manifest(checks: bool):
    probes = [
        {"model": model, "label": label, "eps": 0.1}
        for model, other in (("a", "b"), ("b", "a"))
        for label in ("PGD", f"{TRANSFER}{other}")
    ]
    models = [
        {"label": label, "data": {"images": count}, "preprocessing": {"crop": 8}} for label, count in COUNTS.items()
    ]
    return {"models": models, "probes": probes if checks else []}


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.create()
    return folder


def planned(folder, checks=True, **more) -> Plan:
    suite = make_suite({**CONTENT, "checks": checks, **more}, "test")
    return Plan(suite, suite.entries(), manifest(checks), folder)


def write(folder, shard: Shard, rows: int) -> None:
    schema = CLEAN_SCHEMA if shard.kind == "clean" else ROW_SCHEMA
    folder.write(shard, {name: [None] * rows for name in schema.names} | {"position": list(range(rows))}, {})


def do(folder, plan: Plan, unit: Unit, which: list[int] | None = None, clean: bool = True) -> None:
    rows = len(plan.positions(unit))
    for k in unit.wanted if which is None else which:
        write(folder, plan.shard(unit, k), rows)
    if unit.stage == "attack" and clean:
        write(folder, Shard(unit.model, "clean", None, unit.chunk, "clean"), rows)


def test_a_run_that_has_not_begun_is_all_its_units(folder):
    plan = planned(folder)
    n = len(plan.probes["a"])
    assert n > 2
    assert plan.todo() == Todo(
        [
            *(Unit("a", "attack", chunk, (0, 1)) for chunk in range(3)),
            Unit("a", "probe", 0, tuple(range(n))),
            Unit("b", "attack", 0, (0, 1)),
            Unit("b", "probe", 0, tuple(range(n))),
        ],
        total=28,
        done=0,
        kept={},
    )
    assert planned(folder, checks=False).todo().units == [unit for unit in plan.todo().units if unit.stage == "attack"]
    assert planned(folder, checks=False).probes == {"a": [], "b": []}


def test_positions_of_chunks_and_checks(folder):
    plan = planned(folder)
    assert [list(plan.positions(Unit("a", "attack", chunk, ()))) for chunk in range(3)] == [
        [0, 1, 2, 3], [4, 5, 6, 7], [8, 9]
    ]  # fmt: skip
    assert list(plan.positions(Unit("b", "attack", 0, ()))) == [0, 1, 2, 3]
    for stage in ("probe", "transfer"):
        positions = list(plan.positions(Unit("a", stage, 0, ())))
        assert len(positions) == 3
        assert set(positions) <= set(range(10))


def test_images_that_are_kept(folder):
    assert planned(folder, save_images="none").kept("a") == frozenset()
    assert planned(folder, save_images="all").kept("a") == frozenset(range(10))
    assert planned(folder, save_images="gallery").kept("a") == frozenset(range(10))
    plan = planned(folder, save_images="gallery")
    plan._counts["a"] = 1000
    assert len(plan.kept("a")) == GALLERY
    assert GALLERY == 24
    assert max(plan.kept("a")) > 900


def test_what_is_done_is_not_wanted_again_and_is_counted(folder):
    plan = planned(folder)
    units = plan.todo().units
    do(folder, plan, units[0])
    do(folder, plan, units[2], which=[1])
    left = plan.todo()
    assert left.units == [units[1], replace(units[2], wanted=(0,)), *units[3:]]
    assert (left.total, left.done) == (28, 4 * 2 + 2)
    for unit in units[1:]:
        do(folder, plan, unit)
    assert plan.todo() == Todo([], 28, 28, {})


def test_a_chunk_without_the_models_own_rows_is_done_again_for_these(folder):
    plan = planned(folder)
    for unit in plan.todo().units:
        do(folder, plan, unit, clean=(unit.model, unit.chunk) != ("a", 1))
    assert plan.todo().units == [Unit("a", "attack", 1, ())]
    assert plan.todo().done == 28
    assert plan.left_of(Unit("a", "attack", 1, (0, 1))) == Unit("a", "attack", 1, ())
    assert plan.left_of(Unit("a", "attack", 0, (0, 1))) is None
    assert plan.left_of(Unit("a", "probe", 0, (0, 1))) is None


def test_a_shard_of_another_length_is_not_done(folder):
    plan = planned(folder)
    unit = Unit("a", "attack", 2, (0, 1))
    for k in (0, 1):
        write(folder, plan.shard(unit, k), 4 if k == 1 else 2)
    assert plan.todo().units[2] == replace(unit, wanted=(1,))
    write(folder, plan.shard(unit, 1), 4)
    assert plan.left_of(unit) == replace(unit, wanted=(1,))


def test_shards_of_the_work_are_disjoint_and_complete_whatever_is_done(folder):
    plan = planned(folder)
    units = plan.todo().units
    parts = [plan.todo((i, 4)) for i in (1, 2, 3, 4)]
    assert [unit for part in parts for unit in part.units] == [units[k] for k in (0, 4, 1, 5, 2, 3)]
    assert sum(part.total for part in parts) == 28
    do(folder, plan, units[1])
    again = [plan.todo((i, 4)) for i in (1, 2, 3, 4)]
    assert [part.units for part in again] == [p.units if k != 1 else p.units[1:] for k, p in enumerate(parts)]
    assert [part.done for part in again] == [0, 8, 0, 0]


def test_files_are_where_their_unit_says(folder):
    plan = planned(folder)
    assert plan.shard(Unit("a", "attack", 2, ()), 1) == Shard("a", "OrthoPGD", 0.1, 2)
    probe = plan.probes["a"][1]
    assert plan.shard(Unit("a", "probe", 0, ()), 1) == Shard("a", probe.label, probe.eps, 0, "checks")
    assert plan.shard(Unit("a", "transfer", 0, ()), 1) == Shard("a", f"{TRANSFER}b", 0.1, 0, "checks")


def test_transfer_comes_when_all_else_is_there(folder):
    plan = planned(folder)
    assert plan.last() == [Unit("a", "transfer", 0, (1,)), Unit("b", "transfer", 0, (3,))]
    units = plan.todo().units
    for unit in units:
        assert not plan.is_ready_for_last()
        do(folder, plan, unit)
    assert plan.is_ready_for_last()
    for shard in (plan.shard(units[2], 0), plan.shard(units[3], 1), Shard("b", "clean", None, 0, "clean")):
        path = folder.path / shard.path
        path.rename(path.with_suffix(".away"))
        assert not plan.is_ready_for_last()
        path.with_suffix(".away").rename(path)
    do(folder, plan, Unit("a", "transfer", 0, (1,)))
    assert plan.last() == [Unit("b", "transfer", 0, (3,))]
    assert planned(folder, checks=False).last() == []
    assert planned(folder, checks=False).is_ready_for_last()


def test_images_saved_in_8_bits_are_tried_when_all_else_is_there(folder):
    plan = planned(folder, save_images="all")
    plan.manifest["probes"].append({"model": "a", "label": f"{SAVED}FGSM", "eps": 0.1, "norm": "linf"})
    unit = Unit("a", "saved", 0, (4,))
    assert plan.last() == [Unit("a", "transfer", 0, (1,)), unit, Unit("b", "transfer", 0, (3,))]
    assert list(plan.positions(unit)) == list(range(10))
    assert plan.shard(unit, 4) == Shard("a", f"{SAVED}FGSM", 0.1, 0, "checks")
    do(folder, plan, unit)
    assert unit not in plan.last()


def test_what_images_take_is_of_those_to_keep_the_clean_ones_among_them(folder):
    image = 3 * 8 * 8 * 4
    assert planned(folder, save_images="all", eps=[0.1, 0.2]).image_bytes() == (10 + 4) * (1 + 4) * image
    assert planned(folder, save_images="none").image_bytes() == 0
    assert planned(folder, attacks=["FGSM"]).image_bytes() == (10 + 4) * 2 * image  # as few as are all in the gallery

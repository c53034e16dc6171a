"""Folders that somebody else prepared: links out of them, what no run writes, and damage of any kind to any file."""

from __future__ import annotations

import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from orthattack.eval import cli
from orthattack.eval.errors import EvaluationError
from orthattack.eval.report.text import reported
from orthattack.eval.storage.files import Disk
from orthattack.eval.storage.lock import working_in
from orthattack.eval.storage.run_folder import RunFolder
from tests.eval.synthetic import make_run
from tests.faults.files import fuzz
from tests.stored import assert_same, contents

REPORT = [f"{name}.json" for name in ("checks", "classes", "confusion")] + ["report.html", "results.csv"]
REPORT += ["results.json", "results.md"]
RUN = ["eval", "--model", "cifar10-robust", "cifar10-standard", "--limit", 4, "--attacks", "FGSM", "MinimumNorm"]
RUN += ["--steps", 2, "--shard-size", 2, "--save-images", "all", "--device", "cpu"]


@pytest.fixture(scope="module")
def whole(once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    return once("two-models", lambda folder: cli.main([*map(str, RUN), "--out", str(folder / "run")])) / "run"


@pytest.fixture
def precious(tmp_path) -> Path:
    """A file outside, which links lead to; it must stay as it is."""
    path = tmp_path / "precious"
    path.write_text("precious")
    yield path
    assert path.read_text() == "precious"


def link(path: Path, target: Path) -> None:
    path.unlink(missing_ok=True)
    path.symlink_to(target)


def second_name(path: Path, target: Path) -> None:
    path.unlink(missing_ok=True)
    path.hardlink_to(target)


@pytest.mark.parametrize("share", [None, (1, 2)])
@pytest.mark.parametrize("make", [link, second_name])
def test_a_lock_that_is_another_file_is_refused_and_not_truncated(tmp_path, precious, make, share):
    (tmp_path / "run" / "sessions").mkdir(parents=True)
    name = "whole.lock" if share is None else "shard-1-of-2.lock"
    make(tmp_path / "run" / "sessions" / name, precious)
    with (
        pytest.raises(
            EvaluationError, match=rf"could not lock .*sessions/{name} is a link, or no plain file: remove it"
        ),
        working_in(tmp_path / "run", share, {"process": 1}, pytest.fail),
    ):
        pass


def test_a_lock_that_is_a_pipe_holds_nobody_up(tmp_path):
    (tmp_path / "sessions").mkdir()
    os.mkfifo(tmp_path / "sessions" / "shard-1-of-2.lock")
    with (
        working_in(tmp_path, None, {}, pytest.fail),
        pytest.raises(EvaluationError, match="is at work already"),
        working_in(tmp_path, (2, 2), {}, pytest.fail),
    ):
        pass


@pytest.mark.parametrize("name", ["a.txt", "one/a.txt", "one/two/a.txt"])
def test_files_are_written_through_no_link(tmp_path, precious, name):
    """In place of the file, which is replaced, and of each folder above it, which is refused."""
    disk = Disk(tmp_path / "root")
    disk.write(name, b"first")
    link(tmp_path / "root" / name, precious)
    with pytest.raises(OSError, match=r"a\.txt is a link, or no plain file"):
        disk.read(name)
    assert not disk.create(name, b"second")
    disk.write(name, b"third")
    assert disk.read(name) == b"third"
    outside = tmp_path / "outside"
    outside.mkdir()
    for folder in list(Path(name).parents)[:-1]:
        path = tmp_path / "root" / folder
        path.rename(tmp_path / "kept")
        path.symlink_to(outside)
        for action in (disk.write, disk.create):
            with pytest.raises(OSError, match=f"{folder} is a link or a file, where a run has a folder of its own"):
                action(name, b"fourth")
        with pytest.raises(OSError, match="is a link or a file"):
            disk.read(name)
        path.unlink()
        (tmp_path / "kept").rename(path)
    assert list(outside.iterdir()) == []
    for name in ("../b.txt", "one/../../b.txt", "one/.."):
        with pytest.raises(OSError, match=r"is outside of|busy"):
            disk.write(name, b"out")
    assert not (tmp_path / "b.txt").exists()


SMALL = ["eval", "--model", "cifar10-robust", "--limit", 4, "--attacks", "FGSM", "--save-images", "all", "--no-checks"]


@pytest.fixture(scope="module")
def small(once: Callable[[str, Callable[[Path], object]], Path]) -> Path:
    return once("small", lambda folder: cli.main([*map(str, SMALL), "--out", str(folder / "run")])) / "run"


PLACES = ["sessions", "clean", "shards/cifar10-robust", "shards/cifar10-robust/FGSM", "images"]


@pytest.mark.slow
@pytest.mark.parametrize("place", PLACES)
def test_a_run_goes_on_through_no_link(small, orthattack, tmp_path, place):
    run, outside = fuzz.copied(small, tmp_path / "place"), tmp_path / "outside"
    for path in run.rglob("*.parquet"):  # so that there is something left to do
        path.unlink()
    (run / place).rename(outside)
    (run / place).symlink_to(outside)
    before = sorted(outside.rglob("*"))
    told = orthattack(*SMALL, "--out", run)
    assert told.code == 2
    assert f"{run / place} is a link or a file, where a run has a folder of its own: remove it" in told.err
    assert sorted(outside.rglob("*")) == before
    (run / place).unlink()
    assert orthattack(*SMALL, "--out", run).code == 0
    assert_same(contents(run), contents(small))


def test_a_report_is_written_through_no_link(tmp_path):
    run, outside = make_run(tmp_path / "run").path, tmp_path / "outside"
    outside.mkdir()
    names = REPORT
    for name in names:
        (outside / name).write_text("precious")
        link(run / name, outside / name)
    reported(RunFolder(run))
    assert {path.read_text() for path in outside.iterdir()} == {"precious"}
    assert [name for name in names if (run / name).is_symlink()] == []


@pytest.mark.parametrize("name", ["notes.txt", "sessions/notes.txt", "thesis"])
def test_a_folder_that_holds_more_than_a_run_is_left_alone(tmp_path, name):
    folder = make_run(tmp_path / "run")
    folder.create()
    (folder.path / "sessions").mkdir()
    (folder.path / name).write_text("mine")
    with pytest.raises(EvaluationError) as error:
        folder.create()
    assert str(error.value) == f"{folder} holds what no run writes ({name}): move it, or choose another folder"
    assert (folder.path / name).read_text() == "mine"


@pytest.mark.slow
def test_a_report_written_elsewhere_leaves_the_run_as_it_is(tmp_path, orthattack):
    def state() -> dict[Path, tuple[int, int]]:
        return {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in [run, *run.rglob("*")]}

    run = make_run(tmp_path / "run").path
    before = state()
    mounted = not subprocess.run(["mount", "--bind", run, run], capture_output=True).returncode
    if mounted:
        subprocess.run(["mount", "-o", "remount,ro,bind", run], check=True)
    try:
        told = orthattack("report", run, "--to", tmp_path / "elsewhere")
        refused = orthattack("report", run) if mounted else None
    finally:
        if mounted:
            subprocess.run(["umount", run], check=True)
    assert told.code == 0, told.err
    assert state() == before
    written = sorted(path.name for path in (tmp_path / "elsewhere").iterdir())
    assert written == REPORT
    if refused is not None:
        assert refused.code == 2
        assert f"could not write the report to {run} (Read-only file system): the results are kept" in refused.err


KINDS = ["manifest", "session", "lock", "clean", "shard", "minimal", "check", "images", "clean images", "check images",
         "checks", "page", "csv"]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_damage_of_any_kind_ends_in_one_line_or_is_mended(whole, tmp_path, orthattack, kind):
    """A sample of all kinds of damage, another one each time it is asked for: HOSTILE_SEED, HOSTILE_COUNT."""
    rng = random.Random(int(os.environ.get("HOSTILE_SEED", "0")))
    file = fuzz.samples(whole)[kind]
    known = fuzz.damages(file, rng)
    chosen = rng.sample(sorted(known), min(len(known), int(os.environ.get("HOSTILE_COUNT", "12"))))
    for name in chosen:
        for again in (False, True):
            run = fuzz.copied(whole, tmp_path / "place")
            known[name](run / file.relative_to(whole))
            command = [*RUN, "--out", run] if again else ["report", run, "--to", tmp_path / "to"]
            told = orthattack(*command)
            assert told.code in (0, 2), (name, told)
            assert told.code == 0 or any(line.startswith("orthattack: ") for line in told.err.splitlines()), (
                name,
                told,
            )
            outside = run.parent / "outside"  # where its links lead to
            assert not outside.exists() or outside.read_text() == "precious", name

"""What a stop in the middle of a shard loses, and what a person sees of a run meanwhile."""

from __future__ import annotations

import io
import re
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from orthattack.attacks import PGD
from orthattack.eval import evaluate
from orthattack.eval.results.stored_run import Run
from orthattack.eval.running import draft, progress
from orthattack.eval.running.chunk import Done
from orthattack.eval.running.plan import Todo, Unit
from orthattack.eval.storage.run_folder import RunFolder, Shard
from tests.eval.tiny import EPS, classifier, dataset
from tests.stored import assert_same, contents

BATCHES = [[0, 1], [2, 3], [4, 5], [6, 7], [8]]  # the last image is misclassified


class Drawing:
    """An attack that draws for its whole batch, counts its calls, and stops the run at some of them."""

    def __init__(self, stop_at: int | None = None, error: BaseException | None = None) -> None:
        self.calls, self.stop_at, self.error = 0, stop_at, error or KeyboardInterrupt()
        self.before: Callable[[], object] = lambda: None

    def __call__(self, model):
        def attack(images, labels):
            self.calls += 1
            self.before()
            if self.calls == self.stop_at:
                raise self.error
            return (images + EPS * torch.randn_like(images).sign()).clamp(0, 1)

        return attack


def run(place: object, attack: Drawing, attacks: dict[str, object] | None = None, **options: object) -> Run:
    mine = {"mine": attack, **(attacks or {})}
    options = {"eps": EPS, "batch_size": 2, "save_images": "all", "checks": False, "progress": False} | options
    return evaluate({"net": classifier()}, dataset(), mine, out=place, report=False, **options)


@pytest.fixture
def often(monkeypatch):
    """Every batch is kept."""
    monkeypatch.setattr(draft, "EVERY", 0.0)
    monkeypatch.setattr(draft, "COST", 0.0)


def frame(found: Run, attack: str = "mine"):
    return found.rows("net", attack, EPS).drop(columns="seconds")


def parts(path: Path) -> list[str]:
    return sorted(found.name for found in path.glob("unfinished/*.parquet"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Run:
    return run(tmp_path_factory.mktemp("whole") / "run", Drawing())


@pytest.mark.parametrize("shard_size", [128, 5])
@pytest.mark.parametrize("stop_at", [1, 4])
def test_a_run_that_is_interrupted_in_a_shard_makes_only_the_batches_that_are_left(
    tmp_path, capsys, shard_size, stop_at
):
    reference = Drawing()
    expected = run(tmp_path / "whole", reference, shard_size=shard_size)
    stopped = run(tmp_path / "run", Drawing(stop_at), shard_size=shard_size)
    assert stopped.status == "interrupted"
    kept = stopped.progress()[0]
    done = 2 * (stop_at - 1) + (stop_at == 4 and shard_size == 128)  # with the one that takes no attack
    if shard_size == 128:
        assert kept == done
        rows, all_rows = frame(stopped), frame(expected)
        assert rows.equals(all_rows[all_rows["position"].isin(rows["position"])].reset_index(drop=True))
    capsys.readouterr()
    again = Drawing()
    finished = run(tmp_path / "run", again, shard_size=shard_size)
    assert finished.status == "complete"
    assert again.calls == reference.calls - stop_at + 1
    assert_same(contents(tmp_path / "run"), contents(tmp_path / "whole"))
    assert not (tmp_path / "run" / "unfinished").exists()
    told = re.findall(r"resuming: (\d+) of 10 results kept", capsys.readouterr().err)
    assert told == [str(kept)] * (stop_at > 1)


def test_a_process_that_is_killed_has_kept_what_was_finished_some_seconds_ago(often, tmp_path, monkeypatch, whole):
    """A kill runs nothing more: what counts is what lies there at that moment."""
    monkeypatch.setattr(RunFolder, "keep", timed := Timed(RunFolder.keep))
    attack = Drawing()
    there: list[list[str]] = []
    attack.before = lambda: there.append(parts(tmp_path / "run"))
    run(tmp_path / "run", attack)
    assert [len(found) for found in there] == [0, 1, 2, 3, 4]  # each batch is there before the next begins
    assert timed.count == 10  # the clean images' too
    monkeypatch.setattr(draft, "EVERY", 3600.0)
    attack = Drawing()
    attack.before = lambda: there.append(parts(tmp_path / "rare"))
    run(tmp_path / "rare", attack)
    assert there[-1] == []
    assert timed.count == 10  # the clean images' too
    for name in ("run", "rare"):
        assert_same(contents(tmp_path / name), contents(whole.folder.path))


class Timed:
    """A method that is counted, and takes a while by the clock."""

    def __init__(self, method: Callable[..., object]) -> None:
        self.method, self.count = method, 0

    def __get__(self, owner: object, _: type) -> Callable[..., object]:
        def called(*arguments: object) -> object:
            self.count += 1
            return self.method(owner, *arguments)

        return called


def test_where_keeping_takes_long_it_is_done_less_often(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(draft, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    keep, kept = RunFolder.keep, []

    def slow(self, shard, first, columns, *arguments):
        clock[0] += 1.0
        kept.append((first, len(columns["position"])))
        keep(self, shard, first, columns, *arguments)

    monkeypatch.setattr(RunFolder, "keep", slow)
    attack = Drawing()
    attack.before = lambda: clock.__setitem__(0, clock[0] + 9.0)
    run(tmp_path / "run", attack)
    assert kept == [(0, 3), (3, 6)]  # after 9 s, and not before 25 s more


def test_in_a_store_it_is_the_same(often, whole):
    import fsspec

    place = f"memory://draft-{uuid.uuid4().hex}/run"
    assert run(place, Drawing(4)).status == "interrupted"
    files = fsspec.filesystem("memory")
    assert len(files.glob(f"{place}/unfinished/*.parquet")) == 3
    again = Drawing()
    finished = run(place, again)
    assert again.calls == 2
    assert frame(finished).equals(frame(whole))
    one, two = (dict(found.folder.images("net", "mine", EPS)) for found in (finished, whole))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[k], two[k]) for k in one)
    assert files.find(f"{place}/unfinished") == []


@pytest.mark.parametrize("ending", ["parquet", "safetensors"])
@pytest.mark.parametrize("damage", ["cut", "other"])
def test_a_part_that_is_damaged_is_put_aside_and_made_again(often, tmp_path, capsys, whole, ending, damage):
    run(tmp_path / "run", Drawing(4))
    second = sorted((tmp_path / "run" / "unfinished").glob(f"*.{ending}"))[1]
    content = second.read_bytes()
    second.write_bytes(content[: len(content) // 2] if damage == "cut" else b"x" * len(content))
    again = Drawing()
    finished = run(tmp_path / "run", again)
    assert again.calls == 4  # the first batch is kept; what came after the damage is not trusted
    assert re.search(
        r"unfinished/shards,net,mine,.*,000003-000005\.parquet was damaged \(.*and is made again",
        capsys.readouterr().err,
    )
    assert frame(finished).equals(frame(whole))
    aside = [path.name for path in (tmp_path / "run" / "unfinished").iterdir()]
    assert sorted(set(aside)) == sorted(aside)
    assert all(re.search(r"000003-000005\.damaged(-1)?$", name) for name in aside)
    assert run(tmp_path / "run", Drawing()).status == "complete"


def test_a_part_of_other_images_or_with_a_gap_is_not_taken(often, tmp_path, whole):
    run(tmp_path / "run", Drawing(5))
    found = sorted((tmp_path / "run" / "unfinished").glob("*.parquet"))
    assert len(found) == 4
    found[1].unlink()
    again = Drawing()
    assert frame(run(tmp_path / "run", again)).equals(frame(whole))
    assert again.calls == 4
    folder, shard = RunFolder(tmp_path / "other"), Shard("net", "mine", EPS, 0)
    rows = whole.folder.read_shard(shard).to_dict("list")
    rows = {name: [None if value != value else value for value in map(plain, column)] for name, column in rows.items()}
    folder.keep(shard, 0, {name: column[2:4] for name, column in rows.items()}, {}, 2)
    assert draft.Draft(folder, shard, [2, 3, 4]).todo == [4]
    assert draft.Draft(folder, shard, [1, 2, 3, 4]).todo == [1, 2, 3, 4]
    assert folder.kept(shard) == ([], {}, None)


def plain(value: object) -> object:
    import pandas as pd

    return None if value is pd.NA else value


def test_batches_that_were_halved_stay_so(tmp_path):
    """Of an attack that draws for a batch: the same companions before and after a stop."""

    class Greedy(Drawing):
        def __call__(self, model):
            attack = super().__call__(model)

            def limited(images, labels):
                if len(images) > 2:
                    raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
                return attack(images, labels)

            return limited

    expected = run(tmp_path / "whole", Greedy(), batch_size=4)
    assert run(tmp_path / "run", Greedy(4), batch_size=4).status == "interrupted"
    again = Greedy()
    finished = run(tmp_path / "run", again, batch_size=4)
    assert again.calls == 2
    assert frame(finished).equals(frame(expected))


def test_clean_images_are_kept_too(often, tmp_path, monkeypatch, whole):
    from orthattack.eval.running import chunk

    look, count = chunk.clean_columns, 0

    def stopping(*arguments):
        nonlocal count
        count += 1
        if count == 4:
            raise KeyboardInterrupt
        return look(*arguments)

    monkeypatch.setattr(chunk, "clean_columns", stopping)
    stopped = run(tmp_path / "run", Drawing())
    assert len(stopped.clean("net")) == 6
    assert frame(run(tmp_path / "run", Drawing())).equals(frame(whole))
    assert count == 4 + 2
    assert_same(contents(tmp_path / "run"), contents(whole.folder.path))


def test_what_is_left_of_a_shard_that_was_finished_is_removed_in_the_end(often, tmp_path, monkeypatch):
    """As by a process that was killed between the two."""
    monkeypatch.setattr(draft.Draft, "done", lambda _: None)
    run(tmp_path / "run", Drawing())
    assert not (tmp_path / "run" / "unfinished").exists()


# What a person sees


def test_a_log_has_a_line_now_and_then_with_steps_and_the_sessions_rate(tmp_path, monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)
    unit = Unit("net", "attack", 0, (0,))
    entries = [SimpleNamespace(label="PGD", eps=EPS, norm="linf")]
    monkeypatch.setattr(progress, "_PERIODS", (0.02, 0.02))
    with progress.Progress(SimpleNamespace(entries=entries), Todo([unit], 40, 10, {("net", 0, 0): 4}), True) as watch:
        watch.begin("net", "PGD at 8/255")
        watch.step("step 3/10")
        until = time.monotonic() + 20
        while "step 3/10" not in log.getvalue() and time.monotonic() < until:
            time.sleep(0.01)
        watch.done(unit, 0, Done(10, 3, 4))
        watch.done(unit, 0, Done(14, 6, 8))
        assert watch._bar.n == 24
        assert watch._bar.initial == 14
    lines = log.getvalue().splitlines()
    assert lines[0].startswith("orthattack: 14 of 40 img, 00:00 gone")
    assert any(line.endswith(", step 3/10 of PGD at 8/255, net") for line in lines)
    assert lines[-1].startswith("orthattack: 24 of 40 img, ")
    assert lines[-1].endswith(", PGD at 8/255: 75.0 % robust, net")


def test_without_memory_for_its_clock_the_bar_is_closed_before_the_reason_is_told(monkeypatch):
    log = io.StringIO()
    monkeypatch.setattr(sys, "stderr", log)

    def no_thread():
        raise RuntimeError("can't start new thread")

    bar = progress.Progress(SimpleNamespace(entries=[]), Todo([], 40, 10, {}), True)
    monkeypatch.setattr(bar._clock, "start", no_thread)
    with pytest.raises(RuntimeError, match="can't start"), bar:
        pass
    assert log.getvalue().startswith("orthattack: 10 of 40 img, ")
    assert bar._bar.disable  # closed: it says nothing more as Python ends


def test_the_steps_of_our_attacks_and_the_calls_of_others_are_told(tmp_path, monkeypatch):
    told: list[str] = []
    monkeypatch.setattr(progress.Progress, "step", lambda _, step: told.append(step))

    def asking(model):
        def attack(images, labels):
            for _ in range(3):
                model(images)
            return images

        return attack

    more = {
        "PGD": {"name": "PGD", "steps": 3, "random_start": False},
        "square": {"name": "Square", "queries": 4},
        "bisection": {"name": "Bisection", "attack": "PGD", "steps": 2, "trials": 1},
    }
    run(tmp_path / "run", asking, more, batch_size=16)
    assert told[:3] == ["call 1", "call 2", "call 3"]
    assert told[3:7] == [f"step {k}/3" for k in range(4)]
    assert "step 3/4" in told
    assert "step 2/2" in told


def test_a_pulse_changes_nothing_and_is_not_part_of_an_attack():
    images, labels = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    model = classifier().model
    plain_, told = PGD(model, eps=EPS, steps=4, random_start=False), []
    watched = PGD(model, eps=EPS, steps=4, random_start=False)
    watched._pulse = told.append
    assert watched.run(images, labels) == plain_.run(images, labels)
    assert told == [0, 1, 2, 3, 4]
    assert repr(watched) == repr(plain_)

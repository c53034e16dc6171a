"""Who may work in a folder: locks of the operating system, which one process can take twice by opening a file twice."""

from __future__ import annotations

import errno
import json

import pytest

from orthattack.eval.errors import EvaluationError
from orthattack.eval.storage import lock
from orthattack.eval.storage.lock import working_in

ME = {"host": "here", "process": 7, "started": "today"}


@pytest.fixture(autouse=True)
def hasty(monkeypatch):
    monkeypatch.setattr(lock, "_PATIENCE", 0.05)


def said_of(folder, part, about=ME):
    said = []
    with working_in(folder, part, about, said.append) as held:
        return held, said


def test_a_whole_run_keeps_everyone_out_and_lets_go(tmp_path):
    with working_in(tmp_path / "r", None, ME, pytest.fail) as held:
        assert held
        assert json.loads((tmp_path / "r" / "sessions" / "whole.lock").read_text()) == ME
        for part in (None, (1, 2)):
            with pytest.raises(EvaluationError) as error:
                said_of(tmp_path / "r", part)
            assert str(error.value) == (
                f"{tmp_path / 'r'} is at work already: process 7 on here, since today. Wait until it has finished, or "
                "stop it; or choose another folder; to share the work, start every process with --shard i/n"
            )
    assert said_of(tmp_path / "r", None, {**ME, "process": 8}) == (True, [])
    assert json.loads((tmp_path / "r" / "sessions" / "whole.lock").read_text())["process"] == 8


def test_shards_work_beside_each_other_but_not_twice_nor_beside_a_whole_run(tmp_path):
    with (
        working_in(tmp_path, (1, 3), {**ME, "shard": "1/3"}, pytest.fail) as first,
        working_in(tmp_path, (3, 3), {**ME, "process": 9, "shard": "3/3"}, pytest.fail) as third,
    ):
        assert first
        assert third
        assert sorted(path.name for path in (tmp_path / "sessions").iterdir()) == [
            "shard-1-of-3.lock", "shard-3-of-3.lock", "whole.lock"
        ]  # fmt: skip
        who = "process 7 on here, since today (shard 1/3), process 9 on here, since today (shard 3/3)"
        with pytest.raises(EvaluationError) as error:
            said_of(tmp_path, None)
        assert str(error.value) == (
            f"{tmp_path} is at work already: {who}. Wait until they have finished, or do a shard that nobody does with "
            "--shard i/n"
        )
        with pytest.raises(EvaluationError) as error:
            said_of(tmp_path, (3, 3))
        assert str(error.value) == (
            f"{tmp_path} is at work already: {who}. Wait until it has finished, or stop it; or choose another folder"
        )
        assert said_of(tmp_path, (2, 3)) == (True, [])
    assert said_of(tmp_path, None) == (True, [])


def test_a_folder_is_let_go_of_if_the_work_fails(tmp_path):
    with pytest.raises(KeyError), working_in(tmp_path, None, ME, pytest.fail):
        raise KeyError
    assert said_of(tmp_path, None) == (True, [])


def test_whoever_looks_in_passing_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "_PATIENCE", 30)
    flock, attempts = lock.fcntl.flock, []

    def busy(stream, how):
        attempts.append(how)
        if len(attempts) < 4:
            raise BlockingIOError
        flock(stream, how)

    monkeypatch.setattr(lock.fcntl, "flock", busy)
    assert said_of(tmp_path, None) == (True, [])
    assert attempts == [lock.fcntl.LOCK_EX | lock.fcntl.LOCK_NB] * 4


@pytest.mark.parametrize("part", [None, (1, 2)])
def test_a_file_system_without_locks_is_said_and_keeps_nobody_out(tmp_path, monkeypatch, part):
    def none(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(lock.fcntl, "flock", none)
    held, (said,) = said_of(tmp_path, part)
    assert not held
    assert said == f"{tmp_path} is on a file system without locks: see to it that no two processes do the same work"
    monkeypatch.setattr(lock, "_HAS_LOCKS", False)
    assert said_of(tmp_path, part) == (False, [said])


def test_a_holder_that_says_nothing_of_itself_is_another_process(tmp_path):
    with working_in(tmp_path, None, ME, pytest.fail):
        (tmp_path / "sessions" / "whole.lock").write_text("{")
        with pytest.raises(EvaluationError, match="is at work already: process None on None, since None"):
            said_of(tmp_path, None)
        (tmp_path / "sessions" / "whole.lock").unlink()
        (tmp_path / "sessions" / "whole.lock").touch()
        assert said_of(tmp_path, None) == (True, [])  # another file by the same name is another lock

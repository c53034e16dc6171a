"""Several processes on one run, and processes that are killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime, timedelta, timezone

import pytest

from orthattack.eval.errors import EvaluationError
from orthattack.eval.running import manifest as manifests
from orthattack.eval.running.draft import EVERY
from orthattack.eval.running.run import run_suite, suite_inputs
from orthattack.eval.storage.lock import working_in
from orthattack.eval.storage.run_folder import RunFolder
from orthattack.eval.suite import make_suite
from tests.stored import assert_same, contents, seconds

from .runs import (
    ended,
    hold,
    manifest,
    release,
    start,
    stored,
    wait_for,
    wait_for_held,
    workplace,
)

pytestmark = pytest.mark.skipif(os.name != "posix", reason="locks and signals are POSIX")


def test_a_second_process_on_the_same_run_is_refused_and_a_kill_leaves_no_lock(tmp_path, whole):
    place = workplace(tmp_path)
    hold(place, 6)
    first = start(place)
    wait_for_held(place, first)
    message = ended(start(place), code=2)
    assert f"run is at work already: process {first.pid} on " in message
    assert "to share the work, start every process with --shard i/n" in message
    assert "run is at work already" in ended(start(place, "--shard", "1/2"), code=2)
    first.send_signal(signal.SIGKILL)
    first.communicate()
    release(place)
    before = seconds(place / "run")
    ended(start(place))
    assert_same(contents(place / "run"), whole)
    assert before.items() <= seconds(place / "run").items()  # nothing was done twice
    assert [session["outcome"] for session in manifest(place)["sessions"]] == ["killed", "complete"]


def test_shards_at_the_same_time_store_the_same_and_the_last_one_reports(tmp_path, whole):
    place = workplace(tmp_path)
    hold(place, 2)
    shards = [start(place, "--shard", f"{i}/2") for i in (1, 2)]
    wait_for_held(place, shards[0])
    wait_for(lambda: len(list((place / "run" / "sessions").glob("*.json"))) == 2, "both sessions")
    again = ended(start(place, "--shard", "1/2"), code=2)
    assert f"process {shards[0].pid} on " in again
    assert "(shard 1/2)" in again
    alone = ended(start(place), code=2)
    assert "Wait until they have finished, or do a shard that nobody does with --shard i/n" in alone
    release(place)
    said = [ended(process) for process in shards]
    assert sorted("report: run/report.html" in text for text in said) in ([False, True], [True, True])
    assert_same(contents(place / "run"), whole)
    found = manifest(place)
    assert found["status"] == "complete"
    assert sorted(session["shard"] for session in found["sessions"]) == ["1/2", "2/2"]
    assert len(json.loads((place / "run" / "checks.json").read_text())) == 2 * 12
    assert (place / "run" / "report.html").exists()


def test_a_shard_that_was_killed_is_done_by_a_call_for_all_of_it(tmp_path, whole):
    place = workplace(tmp_path)
    text = ended(start(place, "--shard", "1/2"))
    assert "shard 1/2 is done; the last of the 2, or the command without --shard, completes run" in text
    assert not (place / "run" / "report.html").exists()
    assert manifest(place)["status"] == "interrupted"
    hold(place, len(stored(place)) + 2)
    second = start(place, "--shard", "2/2")
    wait_for_held(place, second)
    second.send_signal(signal.SIGKILL)
    second.communicate()
    release(place)
    ended(start(place))
    assert_same(contents(place / "run"), whole)
    assert [session["outcome"] for session in manifest(place)["sessions"]] == ["part", "killed", "complete"]


def test_of_many_that_start_at_once_one_creates_the_run(tmp_path):
    barrier, written = threading.Barrier(16), []

    def create(k):
        folder = RunFolder(tmp_path / "run")
        barrier.wait()
        folder.create()
        if folder.create_manifest({"who": k, "sessions": []}):
            written.append(k)
        folder.write_session({"id": folder.new_session_id("h", k), "outcome": "running", "warnings": []})

    threads = [threading.Thread(target=create, args=[k]) for k in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    found = RunFolder(tmp_path / "run").manifest()
    assert [found["who"]] == written
    assert len(found["sessions"]) == 16
    assert not list((tmp_path / "run").glob(".*"))


def test_a_lock_ends_with_its_process_and_is_passed_on_to_no_child(tmp_path):
    code = (
        "import subprocess, sys; from pathlib import Path; from orthattack.eval.storage.lock import working_in\n"
        "with working_in(Path(sys.argv[1]), None, {'process': 1}, print) as held:\n"
        "    assert held\n"
        "    child = subprocess.Popen(['sleep', '60'], stdout=subprocess.DEVNULL)\n"
        "    print(child.pid, flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    child = int(process.stdout.readline())
    try:
        with (
            pytest.raises(EvaluationError, match="is at work already: process 1 on"),
            working_in(tmp_path, None, {}, print),
        ):
            pass
        process.send_signal(signal.SIGKILL)
        process.communicate()
        with working_in(tmp_path, None, {}, print) as held:
            assert held
    finally:
        os.kill(child, signal.SIGKILL)


def test_a_file_system_without_locks_is_said_and_keeps_nobody_out(tmp_path, monkeypatch):
    def none(*_):
        raise OSError(37, "No locks available")

    monkeypatch.setattr("orthattack.eval.storage.lock.fcntl.flock", none)
    said = []
    with working_in(tmp_path, None, {}, said.append) as one, working_in(tmp_path, None, {}, said.append) as two:
        assert not one
        assert not two
    assert "is on a file system without locks: see to it that no two processes do the same work" in said[0]


@pytest.mark.parametrize("shard", ["0/2", "3/2", "1", "a/b", "1/0", "-1/2"])
def test_a_shard_that_is_none_is_refused(tmp_path, capsys, shard):
    from orthattack.eval import cli

    with pytest.raises(SystemExit):
        cli.main(["eval", "--out", str(tmp_path / "r"), f"--shard={shard}"])
    assert "must be I/N with I from 1 to N" in capsys.readouterr().err


def test_a_shard_needs_a_folder_that_the_others_know(capsys):
    from orthattack.eval import cli

    assert cli.main(["eval", "--shard", "1/2"]) == 2
    assert "--shard needs --out, the folder that all shards share" in capsys.readouterr().err


def test_a_clock_that_goes_backwards_changes_nothing(tmp_path, monkeypatch):
    suite = make_suite(
        {
            "models": ["cifar10-robust"],
            "data": {"source": "cifar10-samples", "limit": 6},
            "attacks": ["FGSM", "foolbox:FGSM"],
            "shard_size": 2,
            "checks": False,
        },
        "test",
    )
    run_suite(suite, suite_inputs(suite), RunFolder(tmp_path / "straight"), progress=False)
    clock = datetime(2026, 5, 1, tzinfo=timezone.utc)

    def back() -> str:
        nonlocal clock
        clock -= timedelta(days=400)
        return clock.isoformat(timespec="seconds")

    monkeypatch.setattr(manifests, "now", back)
    monkeypatch.setattr("orthattack.eval.running.run.now", back)
    monkeypatch.setattr(time, "time", lambda: clock.timestamp())
    folder, write, count = RunFolder(tmp_path / "run"), RunFolder.write, 0

    def stops(self, *arguments):
        nonlocal count
        count += 1
        if count % 4 == 0:
            raise KeyboardInterrupt
        write(self, *arguments)

    monkeypatch.setattr(RunFolder, "write", stops)
    for _ in range(10):
        if run_suite(suite, suite_inputs(suite), folder, progress=False):
            break
        for path in (tmp_path / "run").rglob("*.*"):  # what is there now seems to be from the future
            os.utime(path, (4e9, 4e9))
    sessions = folder.manifest()["sessions"]
    assert len(sessions) > 2
    assert [session["outcome"] for session in sessions] == ["interrupted"] * (len(sessions) - 1) + ["complete"]
    started = [session["started"] for session in sessions]
    assert started == sorted(started, reverse=True)
    for kind, attack in (("clean", "clean"), ("shards", "FGSM"), ("shards", "foolbox:FGSM")):
        rows = [
            RunFolder(tmp_path / name)
            .read(kind, "cifar10-robust", attack, None if kind == "clean" else 8 / 255)
            .drop(columns="seconds", errors="ignore")
            for name in ("straight", "run")
        ]
        assert len(rows[0]) == 6
        assert rows[0].equals(rows[1])


def test_a_background_job_that_is_asked_to_end_stops_in_order(tmp_path):
    """A shell lets background jobs ignore SIGINT; SIGTERM must not depend on it."""
    place = workplace(tmp_path)
    hold(place, 2)
    process = start(place, ignoring=True)
    wait_for_held(place, process)
    process.send_signal(signal.SIGTERM)
    told = ended(process, code=130)
    assert "orthattack: stopping, writing the report\n" in told
    assert (
        f"orthattack: interrupted; to resume:\n{sys.executable} -m orthattack eval suite.toml --device cpu --out run\n"
        in told
    )


LONG = """
import time
from pathlib import Path

import torch


def attack(model):
    def run(images, labels):
        with Path("times").open("a") as times:
            times.write(f"{time.time()}\\n")
        time.sleep(0.6)
        return (images + 0.03 * torch.randn_like(images).sign()).clamp(0, 1)

    return run
"""


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_stop_in_a_long_attack_on_one_shard_loses_some_seconds_of_it(tmp_path, how):
    """Of one shard of 20 batches, each of which is set down when it begins."""
    suite = """
models = ["cifar10-robust"]
attacks = ["long:attack"]
data = "cifar10-samples"
eps = "8/255"
batch_size = 1
checks = false
save_images = "all"
attack_misclassified = true
"""
    places = {name: workplace(tmp_path / name, suite) for name in ("whole", "run")}
    for place in places.values():
        (place / "long.py").write_text(LONG)
    place = places["run"]

    def begun() -> list[float]:
        return [float(line) for line in (place / "times").read_text().split()] if (place / "times").exists() else []

    process = start(place)
    wait_for(lambda: len(begun()) >= 15, "15 batches")
    process.send_signal(how)
    stopped = time.time()
    code = {signal.SIGKILL: -9}.get(how, 130)
    ended(process, code=code)
    assert not stored(place) or all("shards" not in path.parts for path in stored(place))
    first = begun()
    finished = [moment for moment in first[1:] if moment < stopped]  # a batch ends before the next begins
    before = 0.0 if how != signal.SIGKILL else EVERY + 2.0  # and what it takes to measure and write
    least = sum(moment < stopped - before for moment in finished)
    told = ended(start(place))
    kept = int(re.search(r"resuming: (\d+) of 20 results kept", told)[1])
    assert kept >= least >= 1
    assert len(begun()) - len(first) == 20 - kept
    ended(start(places["whole"]))
    assert_same(contents(place / "run"), contents(places["whole"] / "run"))

"""Disks that are full or damage files, and stores that fail now and then."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys

import fsspec
import pandas as pd
import pytest
from fsspec.implementations.local import LocalFileSystem
from fsspec.implementations.memory import MemoryFileSystem

from orthattack.eval import cli
from orthattack.eval.api import evaluate
from orthattack.eval.errors import EvaluationError
from orthattack.eval.report.text import reported
from orthattack.eval.results.stored_run import Run
from orthattack.eval.storage import files
from orthattack.eval.storage.run_folder import RunFolder

MODEL, DATA, ATTACKS = "cifar10-robust", {"source": "cifar10-samples", "limit": 6}, ["FGSM", "OrthoPGD"]
OPTIONS = {"steps": 2, "shard_size": 2, "batch_size": 2, "check_images": 2, "save_images": "all", "progress": False}


class Flaky(LocalFileSystem):
    """A disk behind a bad network: now and then a request fails, before its work, after half of it, or after all."""

    protocol = "flaky"
    cachable = False
    requests = itertools.count(1)
    every = 4
    broken = False

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(str(path).removeprefix("flaky://"))

    def _request(self, work, half=None):
        number = next(Flaky.requests)
        if Flaky.broken or number % Flaky.every == 0:
            if number % 3 == 1 and half is not None:
                half()
            if number % 3 == 2 and not Flaky.broken:
                work()
            raise ConnectionResetError(104, "Connection reset by peer")
        return work()

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        return self._request(
            lambda: super(Flaky, self).pipe_file(path, value, mode=mode, **kwargs),
            lambda: super(Flaky, self).pipe_file(path, value[: len(value) // 2], mode=mode, **kwargs),
        )

    def cat_file(self, path, *arguments, **kwargs):
        return self._request(lambda: super(Flaky, self).cat_file(path, *arguments, **kwargs))

    def ls(self, path, *arguments, **kwargs):
        return self._request(lambda: super(Flaky, self).ls(path, *arguments, **kwargs))

    def mv(self, *arguments, **kwargs):
        return self._request(lambda: super(Flaky, self).mv(*arguments, **kwargs))


@pytest.fixture
def flaky(monkeypatch):
    fsspec.register_implementation("flaky", Flaky, clobber=True)
    monkeypatch.setattr(files, "_PAUSE", 0.001)
    monkeypatch.setattr(Flaky, "every", 4)
    monkeypatch.setattr(Flaky, "broken", False)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The run on a disk."""
    return evaluate(MODEL, DATA, ATTACKS, out=tmp_path_factory.mktemp("plain") / "run", **OPTIONS)


def rows(run):
    frames = {attack: run.rows(MODEL, attack, 8 / 255) for attack in ATTACKS} | {"clean": run.clean(MODEL)}
    return {name: frame.drop(columns="seconds", errors="ignore") for name, frame in frames.items()}


def assert_same(one, two):
    for name, frame in rows(one).items():
        pd.testing.assert_frame_equal(frame, rows(two)[name], check_exact=True)
        assert len(frame) == 6
    before, after = (dict(run.folder.images(MODEL, "OrthoPGD", 8 / 255)) for run in (one, two))
    assert before.keys() == after.keys()
    assert all((before[k] == after[k]).all() for k in before)
    assert one.checks() == two.checks() != []


@pytest.mark.slow
def test_a_store_that_fails_now_and_then_ends_with_the_same_rows(tmp_path, flaky, plain):
    run = evaluate(MODEL, DATA, ATTACKS, out=f"flaky://{tmp_path}/run", **OPTIONS)
    assert next(Flaky.requests) > 60
    assert run.status == "complete"
    assert_same(plain, run)
    assert "<html" in (tmp_path / "run" / "report.html").read_text()
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert [session["outcome"] for session in manifest["sessions"]] == ["complete"]
    again = evaluate(MODEL, DATA, ATTACKS, out=f"flaky://{tmp_path}/run", **OPTIONS)
    assert_same(plain, again)
    # A store that lets a file grow while it is written never shows half of one under its name.
    for path in (tmp_path / "run").rglob("*.parquet"):
        pd.read_parquet(path)


def test_a_store_that_is_gone_ends_the_run_with_what_is_finished_and_goes_on(tmp_path, flaky, plain, monkeypatch):
    place, write, count, said = f"flaky://{tmp_path}/run", RunFolder.write, 0, []

    def breaks(self, *arguments):
        nonlocal count
        count += 1
        Flaky.broken = count == 5
        write(self, *arguments)

    monkeypatch.setattr(Flaky, "every", 10**9)
    monkeypatch.setattr(RunFolder, "write", breaks)
    monkeypatch.setattr(cli, "say", said.append)
    arguments = ["--model", MODEL, "--attacks", *ATTACKS, "--limit", "6", "--steps", "2", "--shard-size", "2"]
    arguments += ["--batch-size", "2", "--save-images", "all", "--no-checks", "--device", "cpu", "--out", place]
    assert cli.main(["eval", *arguments]) == 2
    assert len(list((tmp_path / "run").rglob("*.parquet"))) == 4
    assert said[0] == (
        f"{place} failed (ConnectionResetError: [Errno 104] Connection reset by peer); trying again, 2 of 6"
    )
    Flaky.broken = False
    monkeypatch.setattr(RunFolder, "write", write)
    assert cli.main(["eval", *arguments]) == 0
    run = Run.open(place)
    for name, frame in rows(plain).items():
        pd.testing.assert_frame_equal(frame, rows(run)[name], check_exact=True)


def test_what_a_store_means_is_not_asked_again(tmp_path, flaky, monkeypatch):
    asked = []

    def denied(self, path, *arguments, **kwargs):
        asked.append(path)
        raise PermissionError(13, "Access Denied")

    monkeypatch.setattr(Flaky, "cat_file", denied)
    monkeypatch.setattr(Flaky, "every", 10**9)
    folder = RunFolder(f"flaky://{tmp_path}/run")
    with pytest.raises(EvaluationError, match="is not the folder of a run"):
        folder.manifest()
    assert len(asked) == 1


def test_an_object_store_holds_a_run_and_its_report(tmp_path, plain):
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    try:
        run = evaluate(MODEL, DATA, ATTACKS, out="memory://bucket/run", **OPTIONS)
        assert_same(plain, run)
        names = [name.removeprefix("/bucket/run/") for name in MemoryFileSystem.store]
        assert {"manifest.json", "checks.json", "results.csv", "report.html"} <= set(names)
        assert not [name for name in names if "partial" in name or "lock" in name]
        assert cli.main(["report", "memory://bucket/run", "--to", str(tmp_path)]) == 0
        assert (tmp_path / "report.html").read_text() == (plain.folder.path / "report.html").read_text() or (
            "<html" in (tmp_path / "report.html").read_text()
        )
        assert not RunFolder("memory://bucket/run").create_manifest({"another": 1})
    finally:
        MemoryFileSystem.store.clear()


@pytest.mark.slow
def test_two_processes_share_a_run_in_an_object_store(plain):
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]
    try:
        shards = [evaluate(MODEL, DATA, ATTACKS, out="memory://b/s", shard=(i, 2), **OPTIONS) for i in (1, 2)]
        assert [shard.status for shard in shards] == ["interrupted", "complete"]
        assert_same(plain, shards[1])
    finally:
        MemoryFileSystem.store.clear()


def test_places_that_do_not_exist(capsys):
    assert cli.main(["eval", "--out", "nowhere://x/y"]) == 2
    assert "nowhere://x/y is not a place that fsspec knows" in capsys.readouterr().err


def test_a_store_whose_package_is_missing_names_it(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "s3fs", None)
    monkeypatch.setattr(sys.modules["fsspec.registry"], "_registry", {})
    assert cli.main(["report", "s3://bucket/run"]) == 2
    assert "s3://bucket/run cannot be used: Install s3fs" in capsys.readouterr().err


# Disks


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="limits of a process are POSIX")
def test_a_disk_that_is_full_ends_the_run_with_what_is_finished_and_goes_on(tmp_path, plain):
    """The kernel itself refuses to write files of more than 40 kB: the images of a shard, not its rows."""
    arguments = ["--model", MODEL, "--attacks", *ATTACKS, "--limit", "6", "--steps", "2", "--shard-size", "6"]
    arguments += [
        "--batch-size",
        "2",
        "--save-images",
        "all",
        "--no-checks",
        "--device",
        "cpu",
        "--out",
        tmp_path / "r",
    ]
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000)); "
    code = "import sys; from orthattack.eval.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", limit + code, "eval", *map(str, arguments)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 2, done.stderr
    assert f"could not write to {tmp_path / 'r'} (" in done.stderr
    assert "what is finished is kept; mend it, and start again with the same command" in done.stderr
    assert "Traceback" not in done.stderr
    assert not [path for path in (tmp_path / "r").rglob("*") if path.suffix in (".partial", ".parquet")]
    assert RunFolder(tmp_path / "r").manifest()["status"] == "interrupted"
    command[2] = code
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert len(RunFolder(tmp_path / "r").read("shards", MODEL, "OrthoPGD", 8 / 255)) == 6


@pytest.mark.slow  # files/test_disk.py has other damage in the fast lane
@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1] + b"?", lambda data: data[: len(data) // 2], lambda data: b""]
)
def test_a_truncated_file_is_made_again_and_kept_aside(tmp_path, plain, damage):
    run = evaluate(MODEL, DATA, ATTACKS, out=tmp_path / "run", **{**OPTIONS, "check_images": 1})
    victim = sorted((tmp_path / "run" / "shards").rglob("*.parquet"))[1]
    whole = victim.read_bytes()
    victim.write_bytes(damage(whole))
    again = evaluate(MODEL, DATA, ATTACKS, out=tmp_path / "run", **{**OPTIONS, "check_images": 1})
    for name, frame in rows(again).items():
        pd.testing.assert_frame_equal(frame, rows(plain)[name], check_exact=True)
    assert victim.with_suffix(".damaged").read_bytes() == damage(whole)
    assert "was damaged" in again.manifest["sessions"][-1]["notes"][0]
    assert run.status == again.status == "complete"


def test_a_report_names_a_file_that_is_damaged(tmp_path, capsys):
    evaluate(MODEL, DATA, ["FGSM"], out=tmp_path / "run", **{**OPTIONS, "checks": False})
    victim = sorted((tmp_path / "run" / "shards").rglob("*.parquet"))[0]
    victim.write_bytes(victim.read_bytes()[:100])
    with pytest.raises(
        EvaluationError, match=rf"{victim.name} is damaged .*: start the run again with the same command"
    ):
        reported(RunFolder(tmp_path / "run"))
    assert cli.main(["report", str(tmp_path / "run")]) == 2

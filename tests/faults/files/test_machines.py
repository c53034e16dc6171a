"""Machines that lack what most have: a language, a home, a temporary folder, paths that are text."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stored import assert_same, contents

RUN = ["eval", "--model", "cifar10-robust", "--limit", "2", "--attacks", "FGSM", "--no-checks", "--shard-size", "1"]
RUN += ["--save-images", "all", "--device", "cpu"]


def command(*arguments: str | bytes, **environment: str) -> subprocess.CompletedProcess[bytes]:
    kept = {key: os.environ[key] for key in ("PATH", "PYTHONPATH") if key in os.environ}
    return subprocess.run(
        [sys.executable, "-m", "orthattack", *arguments],
        capture_output=True, env={**kept, "OMP_NUM_THREADS": "1", **environment}, check=False,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="file systems elsewhere refuse names that are no text")
@pytest.mark.parametrize("name", ["ünï".encode(), b"\xff\xfe", b"x" * 240])
def test_a_bare_machine_does_the_same(tmp_path, name):
    plain = command(*RUN, "--out", str(tmp_path / "plain"), HOME=str(tmp_path))
    assert plain.returncode == 0, plain.stderr
    bare = {"LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "HOME": "/proc/none"}
    path = bytes(tmp_path) + b"/" + name
    for arguments in ([*RUN, "--out", path], ["report", path]):
        told = command(*arguments, TMPDIR="/proc/none", **bare)
        assert told.returncode == 0, told.stderr
        assert b"Traceback" not in told.stderr
        assert b"report: " in told.stdout
    assert_same(contents(tmp_path / "plain"), contents(Path(os.fsdecode(path)).rename(tmp_path / "renamed")))


@pytest.mark.slow
def test_a_name_that_the_system_refuses_is_one_line(tmp_path):
    told = command(*RUN, "--out", str(tmp_path / ("x" * 300)), HOME=str(tmp_path))
    assert told.returncode == 2
    assert told.stderr.decode().splitlines()[-1].startswith("orthattack: could not make the run folder")
    assert b"File name too long" in told.stderr

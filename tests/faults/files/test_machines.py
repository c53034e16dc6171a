"""Machines that lack what most have: a language, a home, a temporary folder, paths that are text."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from tests.faults.files.conftest import rows
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


LOADED = """
import os, resource
import matplotlib.pyplot, pandas, pyarrow.parquet, safetensors.torch, scipy.spatial, scipy.special, torch, torchvision
import orthattack.eval.api

pages = int(open("/proc/self/statm").read().split()[0])
limit = pages * os.sysconf("SC_PAGE_SIZE") + MORE * 2**20
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, and the kernel's limit of memory")
def test_too_little_memory_is_said_and_loses_nothing(tmp_path):
    """The same run is tried with too little to load PyTorch, and then with ever more beyond the libraries (OpenBLAS may
    wait for memory without end as it is loaded): it is said in one line, or done."""
    run = [*RUN, "--limit", "12", "--shard-size", "4", "--batch-size", "4", "--steps", "3"]
    told = limited("import resource; resource.setrlimit(resource.RLIMIT_AS, (2**29, 2**29))", *run, "--out", "x")
    assert told.returncode == 2, told.stderr
    assert re.search(r"^orthattack: out of memory \(.*what is finished is kept", told.stderr, re.MULTILINE)
    said = 0
    for more in (0, 4, 16, 64, 256):
        told = limited(LOADED.replace("MORE", str(more)), *run, "--out", str(tmp_path / "run"))
        assert "Traceback" not in told.stderr, told.stderr
        if told.returncode == 2:
            said += 1
            assert re.search("memory|allocate", told.stderr.splitlines()[-1]), told.stderr
        elif told.returncode != 0:  # compiled code of libraries may give up by itself, or nothing be scored
            fallen = told.returncode in (-signal.SIGSEGV, -signal.SIGABRT) or "OpenBLAS error" in told.stderr
            assert fallen or "no attack returned anything that could be scored" in told.stderr, told.stderr
    assert said >= 1
    for place in ("run", "plain"):
        assert limited("", *run, "--out", str(tmp_path / place)).returncode in (0, 1)
    for kind in ("clean", "shards"):
        found, plain = rows(tmp_path / "run", kind), rows(tmp_path / "plain", kind)
        assert found.index.is_unique
        failed = found["status"] == "error"  # images that did not fit even alone
        assert found[failed]["message"].str.contains("memory|allocate|clean image").all()
        pd.testing.assert_frame_equal(found[~failed], plain[~failed], check_exact=True)
    assert not [*(tmp_path / "run").rglob("*.damaged*"), *(tmp_path / "run").rglob("*.partial")]


def limited(before: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own, after some code."""
    code = f"{before}\nimport sys\nfrom orthattack.eval.cli import main\nsys.exit(main(sys.argv[1:]))"
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False, timeout=400,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip

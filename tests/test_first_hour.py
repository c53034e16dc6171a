"""What a user does in the first hour, with README and the documentation alone, as a script in an empty folder."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HOURS = Path(__file__).parent / "first_hour"
pytestmark = pytest.mark.slow


def done(command: list[str], folder: Path) -> str:
    """What a script prints, in an empty folder, where `orthattack` is this environment's."""
    script = folder / "bin" / "orthattack"
    script.parent.mkdir()
    script.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m orthattack "$@"\n')
    script.chmod(0o755)
    where = {"PATH": f"{script.parent}{os.pathsep}{os.environ['PATH']}", "PYTHON": sys.executable}
    work = folder / "work"
    work.mkdir()
    found = subprocess.run(
        command, cwd=work, env={**os.environ, **where}, capture_output=True, text=True, check=False, timeout=900
    )
    assert found.returncode == 0, f"{found.stdout}\n{found.stderr}"
    return found.stdout


def test_a_students(tmp_path):
    printed = done([sys.executable, str(HOURS / "student.py")], tmp_path)
    for line in ("cosine before", "fooled 13 of 20", "robust", "stored 20", "robust to both"):
        assert line in printed


@pytest.mark.skipif(find_spec("efficientnet_lite_pytorch") is None, reason="needs the extra imagenet")
@pytest.mark.skipif(os.name != "posix", reason="needs a shell")
def test_a_researchers(tmp_path):
    printed = done(["sh", str(HOURS / "researcher.sh")], tmp_path)
    for line in ("efficientnet-lite2", "clean accuracy", "runs/bench/report.html", "AttackResult: "):
        assert line in printed

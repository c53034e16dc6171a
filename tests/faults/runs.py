"""What the tests of faults share: a small suite, processes that work on it, and the comparison of what they stored."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

SUITE = """
models = ["cifar10-robust", "cifar10-standard"]
attacks = ["OrthoPGD", "slow:attack"]
eps = "8/255"
steps = 2
batch_size = 2
shard_size = 3
save_images = "all"
check_images = 2
[data]
source = "cifar10-samples"
limit = 9
"""

# An attack that waits while it is held, draws from the batch's random numbers, and tells who runs it.
SLOW = """
import os, signal, time
from pathlib import Path

import torch


def held():
    try:
        count = int(Path("hold").read_text())
    except (OSError, ValueError):
        return False
    return len(list(Path("run").rglob("*.parquet"))) >= count


def attack(model):
    def run(images, labels):
        Path("pids").mkdir(exist_ok=True)
        Path("pids", str(os.getpid())).touch()
        while held():
            time.sleep(0.05)
        return (images + 0.03 * torch.randn_like(images).sign()).clamp(0, 1)

    return run


def deadly(model):
    def run(images, labels):
        os.kill(os.getpid(), signal.SIGKILL)

    return run
"""


def workplace(folder: Path, suite: str = SUITE) -> Path:
    """A folder to work in, with the suite and its attack."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "suite.toml").write_text(suite)
    (folder / "slow.py").write_text(SLOW)
    return folder


def start(place: Path, *options: object, ignoring: bool = False, **more: Any) -> subprocess.Popen[str]:
    """Start `orthattack eval suite.toml --out run` in a workplace; `ignoring` SIGINT, if asked."""
    # A shell lets its background jobs ignore it, and what they start as well: these tests among them, perhaps.
    on_interrupt = signal.SIG_IGN if ignoring else signal.SIG_DFL
    return subprocess.Popen(
        [
            sys.executable,
            "-m",
            "orthattack",
            "eval",
            "suite.toml",
            "--device",
            "cpu",
            "--out",
            "run",
            *map(str, options),
        ],
        cwd=place,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, on_interrupt),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **more,
    )


def ended(process: subprocess.Popen[str], code: int = 0) -> str:
    """What a process printed, once it has ended with that exit code."""
    out, errors = process.communicate(timeout=600)
    assert process.returncode == code, out + errors
    return out + errors


def stored(place: Path) -> list[Path]:
    return sorted((place / "run").rglob("*.parquet"))


def wait_for(condition: Any, what: str, seconds: float = 400) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, f"waited in vain for {what}"
        time.sleep(0.02)


def hold(place: Path, count: int) -> None:
    """Make the slow attack wait as soon as there are so many shards."""
    (place / "hold").write_text(str(count))


def release(place: Path) -> None:
    (place / "hold").unlink()


def wait_for_held(place: Path, process: subprocess.Popen[str]) -> None:
    """Wait until a process has finished so much of its work that it is held."""
    count = int((place / "hold").read_text())
    wait_for(lambda: len(stored(place)) >= count or process.poll() is not None, f"{count} shards")
    assert process.poll() is None, process.communicate()


def manifest(place: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((place / "run" / "manifest.json").read_text())
    return found


def workers(place: Path) -> set[int]:
    """The processes that have run the slow attack."""
    return {int(path.name) for path in (place / "pids").glob("*")}


def alive(process: int) -> bool:
    try:
        state = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"

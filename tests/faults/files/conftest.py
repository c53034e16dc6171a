"""What the tests of faults share: the command line, and images to damage."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from orthattack.eval import cli

MODEL = "cifar10-robust"


@dataclass(frozen=True)
class Outcome:
    """What a command printed, and its exit code."""

    code: int
    out: str
    err: str


Command = Callable[..., Outcome]


@pytest.fixture
def orthattack(capsys: pytest.CaptureFixture[str]) -> Command:
    """The command line in this process."""

    def run(*arguments: object) -> Outcome:
        capsys.readouterr()
        code = cli.main([*map(str, arguments)])
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err
        return Outcome(code, captured.out, captured.err)

    return run


@pytest.fixture
def evaluated(orthattack: Command, tmp_path: Path) -> Command:
    """`orthattack eval` with FGSM on the model, unless the arguments say another, into tmp_path/run."""

    def run(*arguments: object) -> Outcome:
        given = [] if "--model" in arguments or "--no-model" in arguments else ["--model", MODEL]
        rest = [argument for argument in arguments if argument != "--no-model"]
        attacks = [] if "--attacks" in rest else ["--attacks", "FGSM"]
        return orthattack("eval", *given, *rest, *attacks, "--no-checks", "--out", tmp_path / "run")

    return run


def process(*arguments: object, code: str = "", cwd: Path | None = None) -> Outcome:
    """The command line in a process of its own, after `code`."""
    start = f"import sys; {code}\nfrom orthattack.eval.cli import main; sys.exit(main(sys.argv[1:]))"
    done = subprocess.run(
        [sys.executable, "-c", start, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return Outcome(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Ten class folders called 0 to 9, with one image each."""
    folder, rng = tmp_path / "data", np.random.default_rng(0)
    for k in range(10):
        (folder / str(k)).mkdir(parents=True)
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / str(k) / "a.png")
    return folder


def rows(run: Path, kind: str = "shards") -> pd.DataFrame:
    """All stored rows of a run of one attack at one radius, by the image's name."""
    found = [pd.read_parquet(path) for path in sorted((run / kind).rglob("*.parquet"))]
    return pd.concat(found).set_index("name").drop(columns="seconds", errors="ignore")

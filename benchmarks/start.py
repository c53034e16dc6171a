"""Seconds until work begins: imports, an evaluation's way to its first attack, and a finished run that is resumed."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from benchmarks.stored import Row
from benchmarks.timing import side_by_side

_BOTH = "import torch, torchvision"

# Ends the process where the first attack would begin, without any cleaning up.
_TO_THE_FIRST_ATTACK = """
import os, sys
from orthattack.eval.attacks.kind import OwnRunner
OwnRunner.__call__ = lambda *_, **__: os._exit(0)
from orthattack.eval.cli import main
sys.exit(main(sys.argv[1:]) or 3)
"""


def start_rows(rounds: int, units: int = 1000) -> list[Row]:
    """Of a finished run of so many units, 20 or more; 0: without evaluations."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        runs: dict[str, Callable[[], object]] = {
            what: partial(_run, ["-c", what])
            for what in ("import orthattack", "import torch", "from orthattack import OrthoPGD", _BOTH)
        }
        runs["orthattack --help"] = partial(_run, ["-m", "orthattack", "--help"])
        models = ["cifar10-standard"] + ["efficientnet-lite0"] * (find_spec("efficientnet_lite_pytorch") is not None)
        for model in models if units else []:
            runs[f"orthattack eval, to its first attack on {model}"] = partial(_first_attack, model, folder)
        if units:
            again = partial(_run, ["-m", "orthattack", *_finished(folder, units)])
            again()  # the first time it is computed
            runs[f"orthattack eval, resume of {units:,} finished units"] = again
        found = side_by_side(runs, rounds)
    return [{"command": name, "seconds": [round(s, 3) for s in times]} for name, times in found.items()]


def _run(arguments: Sequence[str]) -> None:
    subprocess.run([sys.executable, *arguments], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def _first_attack(model: str, folder: Path) -> None:
    data = "cifar10-samples" if model.startswith("cifar10") else "imagenet-samples"
    out = tempfile.mkdtemp(dir=folder)
    given = ["--model", model, "--data", data, "--attacks", "PGD", "--eps", "1/1020", "--limit", "8"]
    _run(["-c", _TO_THE_FIRST_ATTACK, "eval", *given, "--out", f"{out}/run"])


def _finished(folder: Path, units: int) -> list[str]:
    radii = [f"{k}/2550" for k in range(1, units // 20 + 1)]  # of 20 images, each of them a unit
    given = ["--model", "cifar10-standard", "--data", "cifar10-samples", "--attacks", "FGSM", "--eps", *radii]
    return ["eval", *given, "--shard-size", "1", "--attack-misclassified", "--out", str(folder / "finished")]

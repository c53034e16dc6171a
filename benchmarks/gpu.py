"""What a GPU is for the attacks: time per step beside the peers', the attack's own arithmetic, and what waits for it.

One command and some five minutes: the attacks' tests that need a GPU, steps of several models in batches of 32 and 256,
and one step of each kind beside the model's.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import arithmetic
from benchmarks.steps import step_rows
from benchmarks.stored import Row

CANDIDATES = (
    "Foolbox LinfPGD", "torchattacks PGD", "bare step", "bare step of the copy", "bare step, bfloat16",
    "PGD", "OrthoPGD", "OrthoPGD, early stop", "OrthoPGD, bfloat16", 'PGD, optimize="none"',
    'OrthoPGD, optimize="none"',
)  # fmt: skip
COMPILED = ("Foolbox LinfPGD", "bare step", "OrthoPGD", "OrthoPGD, compile")  # which takes most of a minute to compile
MODELS = (
    ("resnet50", 32),
    ("resnet50", 256),
    ("efficientnet-lite0", 32),
    ("efficientnet-lite0", 256),
    ("vit_b_16", 32),
)


def tables(seconds: float, rounds: int) -> Iterator[tuple[str, str, list[Row]]]:
    """What to store: of what kind, its name, and its rows; what there is no more time for is left out."""
    end = time.monotonic() + seconds
    for name, batch in MODELS:
        if time.monotonic() < end:
            steps = 10 if batch == 32 else 5
            yield "steps", f"{name}-{batch}-{steps}", step_rows(name, batch, 224, steps, rounds, CANDIDATES)
    if time.monotonic() < end:
        yield "arithmetic", "resnet50-32", arithmetic.rows(32, rounds, "resnet50")
    if time.monotonic() < end:
        yield "compiled", "resnet50-32-10", step_rows("resnet50", 32, 224, 10, rounds, COMPILED)


def tests(folder: Path) -> int:
    """Run the attacks' tests on the GPU; the exit status."""
    if not torch.cuda.is_available():
        print("no GPU: the tests on one are skipped", flush=True)
        return 0
    which = "cuda or real_gpu or generator_on_a_gpu or by_the_kernels"
    where = ("tests/attacks", "tests/test_replay.py", "tests/threat/test_fused.py", "tests/threat/test_fused_l2.py")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", which, *where]
    return subprocess.run(command, cwd=folder, check=False).returncode

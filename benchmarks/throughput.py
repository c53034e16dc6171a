"""How much of an evaluation's time is the attack: decoding, judging, storing and all else beside the bare attack.

A torchvision ResNet-18 at 224x224 with weights from a file (random ones: they change no time) and original-size images.
For each number of steps the bare attack runs on images that are decoded already, in the same batches, and then the
evaluation, from files to rows; both are timed in one process. Everything is attacked, also what the model gets wrong.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
import torchvision
from safetensors.torch import save_file

from benchmarks.stored import Row
from benchmarks.timing import seconds
from orthattack.eval.attacks.kind import Conditions
from orthattack.eval.results.stored_run import Run
from orthattack.eval.running.run import run_suite, suite_inputs
from orthattack.eval.storage.run_folder import RunFolder
from orthattack.eval.suite import Suite, make_suite


def rows(data: str, labels: str, steps: Sequence[int], attacks: Sequence[str], limit: int | None) -> list[Row]:
    torch.manual_seed(0)
    found: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary:
        weights = Path(temporary) / "weights.safetensors"
        save_file(torchvision.models.resnet18().state_dict(), weights)
        for count in steps:
            suite = make_suite(
                {
                    "models": [{"name": "resnet18", "weights": str(weights)}],
                    "data": {"source": data, "labels": labels, "limit": limit},
                    "attacks": list(attacks),
                    "steps": count,
                    "checks": False,
                    "attack_misclassified": True,
                },
                "throughput",
            )
            bare, images = bare_seconds(suite, count)
            folder = RunFolder(Path(temporary) / f"run-{count}")
            whole = seconds(partial(run_suite, suite, suite_inputs(suite), folder, progress=False))
            attack = float(Run(folder, folder.manifest()).table()["seconds"].sum())
            found.append(
                {"steps": count, "images": images, "bare attack, s": round(bare, 1), "evaluation, s": round(whole, 1),
                 "of it the attack, s": round(attack, 1), "throughput, %": round(100 * bare / whole, 1)}
            )  # fmt: skip
    return found


def bare_seconds(suite: Suite, steps: int) -> tuple[float, int]:
    """The attacks alone, on decoded images."""
    inputs = suite_inputs(suite)
    classifier = inputs.classifier("resnet18")
    dataset = inputs.dataset(classifier)
    images = torch.stack([dataset.load(k, classifier.preprocessing) for k in range(len(dataset))])
    labels = torch.tensor(dataset.labels)
    runners = [
        entry.kind.bind(classifier.model, Conditions(entry.norm, entry.eps, steps, 1000)) for entry in suite.entries()
    ]
    runners[0](images[:2], labels[:2], [0, 1])  # warm
    start = time.perf_counter()
    for runner in runners:
        for first in range(0, len(images), suite.shard_size):
            chunk = slice(first, min(first + suite.shard_size, len(images)))
            for at in range(chunk.start, chunk.stop, suite.batch_size):
                part = slice(at, min(at + suite.batch_size, chunk.stop))
                runner(images[part], labels[part], range(len(images[part])))
    return time.perf_counter() - start, len(images)

"""How much of an evaluation's time is the attack: decoding, judging, storing and all else beside the bare attack.

    python benchmarks/throughput.py --data FOLDER --labels CSV [--steps 10 50] [--attacks PGD OrthoPGD] [--threads 2]

A torchvision ResNet-18 at 224x224 with weights from a file (random ones: they change no time) and original-size
photographs. For each number of steps the bare attack runs on images that are decoded already, in the same batches, and
then the evaluation, from files to rows; both are timed in one process. Everything is attacked, also what the model
gets wrong.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import torch
import torchvision
from safetensors.torch import save_file
from tabulate import tabulate

from orthattack.eval.attacks.kind import Conditions
from orthattack.eval.results.stored_run import Run
from orthattack.eval.running.run import run_suite, suite_source
from orthattack.eval.storage.run_folder import RunFolder
from orthattack.eval.suite import Suite, make_suite


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--labels", required=True)
    parser.add_argument("--steps", type=int, nargs="+", default=[10, 50])
    parser.add_argument("--attacks", nargs="+", default=["PGD"])
    parser.add_argument("--limit", type=int)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        weights = Path(temporary) / "weights.safetensors"
        save_file(torchvision.models.resnet18().state_dict(), weights)
        for steps in args.steps:
            suite = make_suite(
                {
                    "models": [{"name": "resnet18", "weights": str(weights)}],
                    "data": {"source": args.data, "labels": args.labels, "limit": args.limit},
                    "attacks": args.attacks,
                    "steps": steps,
                    "checks": False,
                    "attack_misclassified": True,
                },
                "throughput",
            )
            bare, count = bare_seconds(suite, steps)
            start = time.perf_counter()
            folder = RunFolder(Path(temporary) / f"run-{steps}")
            assert run_suite(suite, suite_source(suite), folder, progress=False)
            whole = time.perf_counter() - start
            table = Run(folder, folder.manifest()).table()
            attack = float(table["seconds"].sum())
            rows.append([steps, count, f"{bare:.1f}", f"{whole:.1f}", f"{attack:.1f}", f"{100 * bare / whole:.1f} %"])
    head = ["steps", "images", "bare attack, s", "evaluation, s", "of it the attack, s", "throughput"]
    print(f"ResNet-18, 3x224x224, {', '.join(args.attacks)}, {args.threads} threads\n")
    print(tabulate(rows, head, "github", disable_numparse=True))


def bare_seconds(suite: Suite, steps: int) -> tuple[float, int]:
    """The attacks alone, on decoded images."""
    source = suite_source(suite)
    classifier = source.classifier("resnet18")
    photographs = source.photographs(classifier)
    images = torch.stack([photographs.load(k, classifier.preprocessing) for k in range(len(photographs))])
    labels = torch.tensor(photographs.labels)
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


if __name__ == "__main__":
    main()

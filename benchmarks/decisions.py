"""HopSkipJump beside Foolbox's, on the bundled models: median L2 norms at equal numbers of queries, all from the same
points, for each image the first of another class. Foolbox's smallest point at a query counts, whatever it returns.

    python -m benchmarks.decisions [--limit 10] [--queries 1000 5000]
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from contextlib import suppress

import foolbox
import torch
from torch import Tensor, nn

from orthattack import HopSkipJump, OrthoHopSkipJump
from orthattack.eval.data import load_dataset
from orthattack.eval.models import load_classifier


class _Recorder(nn.Module):
    """A model that notes the norm of the smallest point that has fooled it by each query, and stops at the last."""

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, queries: int) -> None:
        super().__init__()
        self.model, self.images, self.labels, self.queries = model, images, labels, queries
        self.smallest: list[Tensor] = [torch.full((len(images),), math.inf)]

    def forward(self, points: Tensor) -> Tensor:
        if len(self.smallest) > self.queries:
            raise InterruptedError
        logits: Tensor = self.model(points)
        norm = (points - self.images).flatten(1).norm(dim=1)
        fools = logits.argmax(1) != self.labels
        self.smallest.append(torch.where(fools, norm, math.inf).minimum(self.smallest[-1]))
        return logits


def theirs(model: nn.Module, images: Tensor, labels: Tensor, start: Tensor, budgets: Sequence[int]) -> list[Tensor]:
    """Foolbox's norms, (n,) at each budget."""
    recorder = _Recorder(model, images, labels, max(budgets)).eval()
    attack = foolbox.attacks.HopSkipJumpAttack(steps=10**6)
    torch.manual_seed(0)
    with suppress(InterruptedError):
        attack.run(foolbox.PyTorchModel(recorder, (0, 1)), images, labels, starting_points=start)
    return [recorder.smallest[budget] for budget in budgets]


def ours(
    kind: type[HopSkipJump], model: nn.Module, images: Tensor, labels: Tensor, start: Tensor, queries: int
) -> Tensor:
    """The norms, (n,), of one of our two."""
    attack = kind(model, "l2", queries=queries, generator=torch.Generator().manual_seed(0))
    result = attack.run(images, labels, start=start)
    assert int(result.forward_calls.max()) <= queries
    return torch.where(result.success, result.norm, math.inf)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=10)
    parser.add_argument("--queries", type=int, nargs="+", default=[1000, 5000])
    parser.add_argument("--models", nargs="+", default=["cifar10-robust", "cifar10-standard"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    print("| model | queries | Foolbox | HopSkipJump | OrthoHopSkipJump |\n|---|---|---|---|---|")
    for name in options.models:
        classifier = load_classifier(name)
        dataset, model = load_dataset("cifar10-samples", classifier), classifier.model.eval()
        every = torch.stack([dataset.load(k, classifier.preprocessing) for k in range(len(dataset))])
        classes = torch.tensor(dataset.labels)
        with torch.no_grad():
            right = model(every).argmax(1) == classes
        images, labels = every[right][: options.limit], classes[right][: options.limit]
        others = [int((labels != label).nonzero()[0]) for label in labels]
        shared = (model, images, labels, images[others])
        found = [theirs(*shared, options.queries)]
        found += [[ours(kind, *shared, n) for n in options.queries] for kind in (HopSkipJump, OrthoHopSkipJump)]
        for queries, norms in zip(options.queries, zip(*found, strict=True), strict=True):
            print(
                f"| {name} | {queries:,} | {' | '.join(f'{float(norm.median()):.3f}' for norm in norms)} |", flush=True
            )


if __name__ == "__main__":
    main()

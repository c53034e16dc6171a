"""Measure what detectors of a view of the image see of perturbations that keep it: docs/how-to/invariants.md's table.

    python -m scripts.measure_detectors FOLDER [--limit 600]

FOLDER is CIFAR-10's test set, a folder with one folder for each class. Detectors are logistic regressions on how rough
a view of the image is, fitted to plain PGD against the bundled standard model on half of the images and tried on the
others. No attack knows of them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor
from torch.nn.functional import avg_pool2d

from benchmarks.detector import roughness
from orthattack import PGD
from orthattack.eval.data.dataset import Batch
from orthattack.eval.data.load import load_dataset
from orthattack.eval.models.load import load_classifier

EPS, STEPS = 4 / 255, 10
ATTACKS: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    "2×2 block means": {"scope": "block2", "normal": "constant"},
    "8×8 block means": {"scope": "block8", "normal": "constant"},
    "luma": {"scope": "pixel", "normal": "luma"},
}
VIEWS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "16×16 thumbnail": lambda x: avg_pool2d(x, 2),
    "4×4 thumbnail": lambda x: avg_pool2d(x, 8),
    "luma": lambda x: torch.einsum("nchw,c->nhw", x, x.new_tensor([0.299, 0.587, 0.114])).unsqueeze(1),
    "all of it": lambda x: x,
}


def area(scores: np.ndarray, is_attacked: np.ndarray, pairs: int) -> str:
    """The area under the ROC curve with its 95 % interval, by a bootstrap of the images."""
    draws = np.random.default_rng(0).integers(0, pairs, (1000, pairs))
    found = [
        roc_auc_score(np.repeat([0, 1], pairs), np.concatenate([scores[:pairs][d], scores[pairs:][d]])) for d in draws
    ]
    low, high = np.percentile(found, [2.5, 97.5])
    return f"{roc_auc_score(is_attacked, scores):.2f} [{low:.2f}, {high:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder")
    parser.add_argument("--limit", type=int, default=600)
    options = parser.parse_args()
    classifier = load_classifier("cifar10-standard")
    dataset = load_dataset(options.folder, classifier).limited(options.limit)
    batch = next(iter(dataset.batches(options.limit, classifier.preprocessing)))
    assert isinstance(batch, Batch)
    x, y = batch.images, batch.labels
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    x, y = x[order], y[order]
    found = {}
    for name, more in ATTACKS.items():
        attack = PGD(classifier.model, eps=EPS, steps=STEPS, generator=torch.Generator().manual_seed(0), **more)
        results = [attack.run(*part) for part in zip(torch.split(x, 100), torch.split(y, 100), strict=True)]
        found[name] = torch.cat([result.adversarials for result in results])
        share = torch.cat([result.success for result in results]).double().mean()
        print(f"{name}: fooled or misclassified {100 * share:.1f} %", flush=True)
    half = len(x) // 2
    print("| a detector of the | " + " | ".join(f"sees {name}" for name in ATTACKS) + " |")
    print("|---" * (len(ATTACKS) + 1) + "|")
    for name, view in VIEWS.items():
        known = np.concatenate([roughness(view(x[:half])), roughness(view(found["plain"][:half]))])
        detector = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
        detector.fit(known, np.repeat([0, 1], half))
        cells = []
        for adversarials in found.values():
            tried = np.concatenate([roughness(view(x[half:])), roughness(view(adversarials[half:]))])
            count = len(x) - half
            cells.append(area(detector.decision_function(tried), np.repeat([0, 1], count), count))
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

"""Whether a detector that was trained on plain PGD misses perturbations under a constraint.

Clean images of CIFAR-10 against PGD's, all rounded to 8 bits as a file would. A small network sees the image; a
logistic regression sees how rough it is. Training is repeated with three seeds; test images are others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor, nn

from benchmarks import defaults
from benchmarks.radii import CONSTRAINTS
from benchmarks.stored import Row
from orthattack import PGD, fooled
from orthattack.eval.results.detection import threshold

MODELS = {"cifar10-standard": 2, "cifar10-robust": 8}
"""The radius in 255ths."""

PERTURBATIONS: Mapping[str, Mapping[str, Any]] = {
    "plain": {},
    **{kept: CONSTRAINTS[kept] for kept in ("orthogonal to the image", "… in each channel", "… in each pixel")},
    "8×8 block means kept": CONSTRAINTS["8×8 block means"],
}
RANDOM = "random signs, no attack"
SEEDS, STEPS, EPOCHS, BATCH = 3, 10, 8, 100
FALSE_POSITIVES = 0.05


def tables(shared: Path, build: Path, limit: int, names: list[str] | None) -> Iterator[tuple[str, list[Row]]]:
    """Of each model, a row per detector and kind of perturbation; `limit` images, 3/4 of them to train on."""
    known = defaults.models(shared, build)
    for name, eps in MODELS.items():
        if names and name not in names:
            continue
        spec, data, _ = known[name]
        classifier, images, labels = defaults.loaded(spec, data, limit)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        images, labels = (images[order] * 255).round() / 255, labels[order]
        yield name, list(rows(classifier.model, images, labels, eps))


def rows(model: nn.Module, images: Tensor, labels: Tensor, eps: float) -> Iterator[Row]:
    """The rows of one model; `eps` in 255ths."""
    known = 3 * len(images) // 4
    shown: dict[str, Tensor] = {}
    for kind, options in PERTURBATIONS.items():
        first = 0 if kind == "plain" else known
        result = PGD(model, eps=eps / 255, steps=STEPS, loss="margin", schedule="fixed", **options).run(
            images[first:], labels[first:], seeds=range(first, len(images)), batch_size=100
        )
        shown[kind] = (result.adversarials * 255).round() / 255
    seen = images[:known], shown["plain"][:known]
    test, shown["plain"] = images[known:], shown["plain"][known:]
    signs = torch.randint(0, 2, test.shape, generator=torch.Generator().manual_seed(0)) * 2.0 - 1
    shown[RANDOM] = (test + eps / 255 * signs).clamp(0, 1)
    for detector, trained in (("network", network), ("roughness", rough)):
        scorers = [trained(*seen, seed) for seed in range(SEEDS)]
        clean = np.stack([scorer(test) for scorer in scorers])
        scores = {kind: np.stack([scorer(x) for scorer in scorers]) for kind, x in shown.items()}
        plain = above(clean, scores["plain"])
        for kind, of in scores.items():
            matrix = above(clean, of)
            row: Row = {
                "detector": detector, "perturbation": kind, "eps * 255": eps, "images": len(test),
                "fooled": int(fooled(model, shown[kind], labels[known:]).sum()),
                "area": round(float(matrix.mean()), 4), "interval": interval(matrix),
                "by seed": [round(float(above(c[None], p[None]).mean()), 4) for c, p in zip(clean, of, strict=True)],
                "above plain": round(float((matrix - plain).mean()), 4), "its interval": interval(matrix - plain),
            }  # fmt: skip
            for seed in range(SEEDS):
                flagged = of[seed] > threshold(clean[seed], FALSE_POSITIVES)
                row[f"flagged, seed {seed}"] = "".join(map(str, flagged.astype(int)))
            yield row


class Network(nn.Module):
    """Four convolutions on the image and its high frequencies, the mean over the image, one score."""

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after, stride in ((6, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1)):
            layers += [
                nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(after), nn.ReLU()
            ]  # fmt: skip
        self.layers = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 1))

    def forward(self, images: Tensor) -> Tensor:
        high = images - nn.functional.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
        scores: Tensor = self.layers(torch.cat([images - 0.5, 16 * high], 1)).flatten()
        return scores


def network(clean: Tensor, perturbed: Tensor, seed: int) -> Any:
    """Train a `Network`; returns a function of images to their scores. A batch has each image twice, clean and not."""
    torch.manual_seed(seed)
    model = Network()
    steps = EPOCHS * (len(clean) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, total_steps=steps)
    answers = torch.cat([torch.zeros(BATCH), torch.ones(BATCH)])
    for _ in range(EPOCHS):
        for index in torch.split(torch.randperm(len(clean)), BATCH):
            if len(index) < BATCH:
                continue
            loss = nn.functional.binary_cross_entropy_with_logits(
                model(torch.cat([clean[index], perturbed[index]])), answers
            )
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    model.eval().requires_grad_(False)
    return lambda images: torch.cat([model(part) for part in torch.split(images, BATCH)]).double().numpy()


def roughness(view: Tensor) -> np.ndarray:
    """(N, F) logarithms of the mean size of first and second differences along rows, columns and both, per channel."""
    rows, columns = view.diff(dim=2), view.diff(dim=3)
    parts = [rows, columns, rows.diff(dim=2), columns.diff(dim=3), rows.diff(dim=3)]
    sizes = torch.stack([part.abs().mean((2, 3)) for part in parts], 1).flatten(1)
    features: np.ndarray = (sizes + 1e-4).log().double().numpy()
    return features


def rough(clean: Tensor, perturbed: Tensor, seed: int) -> Any:
    """Fit a logistic regression to a bootstrap of the pairs; returns a function of images to their scores."""
    index = torch.randint(0, len(clean), (len(clean),), generator=torch.Generator().manual_seed(seed))
    detector = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
    detector.fit(np.concatenate([roughness(clean[index]), roughness(perturbed[index])]), np.repeat([0, 1], len(index)))
    return lambda images: detector.decision_function(roughness(images))


def above(clean: NDArray[np.float64], perturbed: NDArray[np.float64]) -> NDArray[np.float64]:
    """Is perturbed image j scored above clean image i, (N, N): 1 or 0, 1/2 where equal; the mean over the S seeds.

    The mean of all entries is the area under the ROC curve.

    Args:
        clean, perturbed: scores (S, N).
    """
    first, second = clean[:, :, None], perturbed[:, None, :]
    found: NDArray[np.float64] = ((second > first) + (second == first) / 2).mean(0)
    return found


def interval(matrix: NDArray[np.float64]) -> list[float]:
    """The 95 % interval of the mean of such a matrix, or of the difference of two.

    DeLong's (1988, doi:10.2307/2531595) for scores that come in pairs, an image and its perturbation (Obuchowski 1997,
    doi:10.2307/2533958): each image counts by what its row and its column are above the mean.
    """
    middle = matrix.mean()
    each = matrix.mean(0) + matrix.mean(1) - 2 * middle
    half = 1.959963984540054 * each.std(ddof=1) / np.sqrt(len(matrix))
    return [round(float(np.clip(end, -1, 1)), 4) for end in (middle - half, middle + half)]

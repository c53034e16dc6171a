"""Whether a detector that was trained on plain PGD misses perturbations under a constraint.

Trained to tell PGD's images of CIFAR-10 from clean ones, it may learn noise instead of attacks; so it is also trained
to tell them from images that are clean, or have as much noise, or have what PGD does to another image. A small network
sees the image, a logistic regression how rough it is, another one what the attacked model answers. All images are
rounded to 8 bits, as a file would. Training is repeated with three seeds; test images are others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
CLEAN, RANDOM = "clean", "random signs of size ε"
RESIGNED, MOVED = "plain's sizes, random signs", "plain's of another image"
NO_ATTACK = (CLEAN, RANDOM, RESIGNED, MOVED)
AGAINST: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "clean": ((CLEAN,), ("network", "roughness")),
    "mixed": ((CLEAN, RESIGNED, MOVED), ("network", "answers")),
}
"""What plain PGD's images are to be told from, these in turn, and the detectors that learn it."""

SEEDS, STEPS, EPOCHS, BATCH = 3, 10, 8, 100
FALSE_POSITIVES = 0.05

Features = Callable[[Tensor], NDArray[np.float64]]


def tables(shared: Path, build: Path, limit: int, names: list[str] | None) -> Iterator[tuple[str, list[Row]]]:
    """Of each model, a row per detector and kind of perturbation; `limit` images, 3/4 of them to train on."""
    known = defaults.models(shared, build)
    for name, eps in MODELS.items():
        if names and name not in names:
            continue
        spec, data, _ = known[name]
        classifier, images, labels = defaults.loaded(spec, data, limit)
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        yield name, list(rows(classifier.model, _in_8_bits(images[order]), labels[order], eps))


def rows(model: nn.Module, images: Tensor, labels: Tensor, eps: float) -> Iterator[Row]:
    """The rows of one model; `eps` in 255ths. Of the images to test on, those that it classifies correctly."""
    known = 3 * len(images) // 4
    right = known + (~fooled(model, images[known:], labels[known:])).nonzero().flatten()
    test = images[right]

    def attacked(index: Tensor, options: Mapping[str, Any]) -> Tensor:
        attack = PGD(model, eps=eps / 255, steps=STEPS, **options)
        result = attack.run(images[index], labels[index], seeds=index.tolist(), batch_size=100)
        return _in_8_bits(result.adversarials)

    plain = attacked(torch.arange(known), {})
    seen = without_attack(images[:known], plain, eps, torch.Generator().manual_seed(0))
    shown = {kind: attacked(right, options) for kind, options in PERTURBATIONS.items()}
    shown |= without_attack(test, shown["plain"], eps, torch.Generator().manual_seed(1))
    fools = {kind: _digits(fooled(model, view, labels[right]).numpy()) for kind, view in shown.items()}
    detectors = {"network": network, "roughness": regression(roughness), "answers": regression(answers(model))}
    for against, (kinds, names) in AGAINST.items():
        told_from = in_turn([seen[kind] for kind in kinds])
        for name in names:
            scorers = [detectors[name](told_from, plain, seed) for seed in range(SEEDS)]
            scores = {kind: np.stack([scorer(view) for scorer in scorers]) for kind, view in shown.items()}
            quiet = in_turn([torch.from_numpy(scores[kind].T) for kind in kinds]).numpy().T
            of_plain = above(quiet, scores["plain"])
            for kind, of in scores.items():
                if (kind,) == kinds:
                    continue
                matrix = above(quiet, of)
                areas = [float(above(one[None], other[None]).mean()) for one, other in zip(quiet, of, strict=True)]
                row: Row = {
                    "against": against, "detector": name, "perturbation": kind, "eps * 255": eps,
                    "images": len(test), "fools": fools[kind],
                    "area": round(float(matrix.mean()), 4), "interval": interval(matrix),
                    "by seed": [round(area, 4) for area in areas],
                    "above plain": round(float((matrix - of_plain).mean()), 4),
                    "its interval": interval(matrix - of_plain),
                }  # fmt: skip
                for seed in range(SEEDS):
                    row[f"flagged, seed {seed}"] = _digits(of[seed] > threshold(quiet[seed], FALSE_POSITIVES))
                yield row


def in_turn(views: Sequence[Tensor]) -> Tensor:
    """Row 0 of the first, row 1 of the second, and so on, beginning again after the last; (N, ...) each."""
    return torch.stack([views[k % len(views)][k] for k in range(len(views[0]))])


def _in_8_bits(images: Tensor) -> Tensor:
    return (images * 255).round() / 255


def _digits(flags: NDArray[np.bool_]) -> str:
    return "".join(map(str, flags.astype(int)))


def without_attack(images: Tensor, plain: Tensor, eps: float, generator: torch.Generator) -> dict[str, Tensor]:
    """The images of `NO_ATTACK`, in 8 bits.

    `RESIGNED` has in each value as large a change as `plain`, with a random sign, or with the one that stays in [0, 1].
    `MOVED` has the perturbation of another image, so that all but its fit to the image is as in an attack.

    Args:
        images, plain: in 8 bits (N, C, H, W), and plain PGD's of them; N at least 2.
        eps: in 255ths.
    """
    delta = plain - images
    signs = torch.randint(0, 2, images.shape, generator=generator) * 2.0 - 1
    resigned = images + delta.abs() * signs
    outside = (resigned < -0.5 / 255) | (resigned > 1 + 0.5 / 255)
    order = torch.randperm(len(images), generator=generator)
    elsewhere = torch.empty_like(delta)
    elsewhere[order] = delta[order.roll(1)]
    found = {
        CLEAN: images,
        RANDOM: images + eps / 255 * signs,
        RESIGNED: torch.where(outside, images - delta.abs() * signs, resigned),
        MOVED: images + elsewhere,
    }
    return {kind: _in_8_bits(view.clamp(0, 1)) for kind, view in found.items()}


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


def roughness(view: Tensor) -> NDArray[np.float64]:
    """(N, F) logarithms of the mean size of first and second differences along rows, columns and both, per channel."""
    rows, columns = view.diff(dim=2), view.diff(dim=3)
    parts = [rows, columns, rows.diff(dim=2), columns.diff(dim=3), rows.diff(dim=3)]
    sizes = torch.stack([part.abs().mean((2, 3)) for part in parts], 1).flatten(1)
    features: NDArray[np.float64] = (sizes + 1e-4).log().double().numpy()
    return features


def answers(model: nn.Module) -> Features:
    """(N, 2K) log-probabilities of an image's classes, the likeliest first, and of the same classes after blurring it.

    An attack moves the answer, and a blur may move it back (as in Xu et al. 2018, arXiv:1704.01155).
    """

    @torch.no_grad()
    def features(view: Tensor) -> NDArray[np.float64]:
        found = []
        for part in torch.split(view, 500):
            blurred = nn.functional.avg_pool2d(part, 3, stride=1, padding=1, count_include_pad=False)
            first, second = (model(x).log_softmax(1) for x in (part, blurred))
            order = first.argsort(1, descending=True)
            found.append(torch.cat([first.gather(1, order), second.gather(1, order)], 1))
        numbers: NDArray[np.float64] = torch.cat(found).double().numpy()
        return numbers

    return features


def regression(features: Features) -> Callable[[Tensor, Tensor, int], Any]:
    """What fits a logistic regression to a bootstrap of pairs; that returns a function of images to their scores."""

    def fitted(clean: Tensor, perturbed: Tensor, seed: int) -> Any:
        index = torch.randint(0, len(clean), (len(clean),), generator=torch.Generator().manual_seed(seed))
        detector = make_pipeline(StandardScaler(), LogisticRegression(max_iter=5000))
        detector.fit(
            np.concatenate([features(clean[index]), features(perturbed[index])]), np.repeat([0, 1], len(index))
        )
        return lambda images: detector.decision_function(features(images))

    return fitted


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

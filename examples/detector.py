"""A detector in an evaluation: how many adversarial images evade it, also of an attack that knows it.

python examples/detector.py

Feature squeezing (Xu et al. 2018, arXiv:1704.01155) compares what a model says of an image and of the same image with
fewer grey levels and smoothed: where the two differ, it suspects an adversarial one. `DetectorEvasion` fools the model
and the detector at once. In a suite: detector = "examples.detector:squeezing".
"""

from __future__ import annotations

import argparse
import tempfile

import torch
from torch.nn import functional

from orthattack.eval import evaluate, load
from orthattack.eval.report.text import leaderboard_table

MODEL, DATA, EPS = "cifar10-robust", "cifar10-samples", 8 / 255


def squeezing(model):
    """Of a classifier the detector: images (N, 3, H, W) to scores (N,), at most 2."""

    def score(images):
        coarse = images + ((15 * images).round() / 15 - images).detach()  # 4 bits, and the image's gradient
        smooth = functional.avg_pool2d(functional.pad(images, (0, 1, 0, 1), mode="replicate"), 2, stride=1)
        said, *others = (model(one).softmax(1) for one in (images, coarse, smooth))
        return torch.stack([(said - other).abs().sum(1) for other in others]).amax(0)

    return score


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10)
    options = parser.parse_args()
    model, images, _ = load(MODEL, DATA)
    with torch.no_grad():
        threshold = float(squeezing(model)(images).sort().values[-2])  # flags one of the 20 clean images
    knows = {"name": "DetectorEvasion", "detector": squeezing(model), "threshold": threshold, "scope": "image"}
    attacks = {"PGD": "PGD", "OrthoPGD": "OrthoPGD", "evasion": knows}
    with tempfile.TemporaryDirectory() as folder:
        run = evaluate(
            MODEL, DATA, attacks, eps=EPS, steps=options.steps, detector=squeezing, checks=False, report=False,
            out=f"{folder}/run", progress=False,
        )  # fmt: skip
        print(leaderboard_table(run))


if __name__ == "__main__":
    main()

"""Measure the bundled models on the 10,000 CIFAR-10 test images and write their model card.

    python scripts/measure_demo_models.py DATA

DATA holds test.tar with JPEG files in test/CLASS/NNNN.jpg.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm
from train_demo_models import read_tar

from orthattack import PGD, OrthoPGD
from orthattack.eval.models import BUNDLED
from orthattack.eval.models.load import load_classifier
from orthattack.eval.results.rates import Rate

WEIGHTS = Path(__file__).parents[1] / "orthattack" / "eval" / "weights"
EPS, STEPS = 8 / 255, 20

CARD = """\
# The bundled models

Two CIFAR-10 classifiers for demonstrations and tests, not for use on anything that matters: torchvision's RegNet with
3 stages of 2 blocks (64, 128 and 192 channels, ungrouped convolutions, strides 2 (stem), 1, 2, 2), for 32x32 images,
1.28 million weights, stored as float16 safetensors with their class names and normalisation in the header.

Trained by `scripts/train_demo_models.py` on the 50,000 training images (JPEG copies of CIFAR-10):

- standard: `--kind standard --bfloat16 --epochs 30`;
- robust, on N-FGSM images (de Jorge et al. 2022, arXiv:2202.01181) with eps 7/255 and a noisy start of 10.5/255: three
  runs, each from the averaged weights of the one before, the first from the standard model, 6 epochs in all:
  `--epochs 14` stopped after 3 epochs, `--epochs 5 --lr 0.1 --seed 1` stopped after 1, and
  `--epochs 2 --lr 0.05 --seed 2`.

Measured by `scripts/measure_demo_models.py` on the 10,000 test images; PGD with {steps} steps, otherwise by default,
at eps 8/255; robust accuracy counts images classified correctly, clean and adversarial; 95 % intervals (Wilson):

| model | file | size | clean accuracy | robust accuracy, PGD-{steps} | robust accuracy, OrthoPGD-{steps} |
|---|---|---|---|---|---|
{rows}

These are upper bounds. Of 1,000 test images, the first two parts of AutoAttack with 25 steps leave 33.8 % [30.9, 36.8]
of cifar10-robust, PGD with 20 steps 33.7 % (docs/strength.md). PGD as published, on the cross-entropy in 20 steps of
2/255, leaves 38.1 % [37.2, 39.1] of the 10,000.

The 20 images that `orthattack eval` uses by default are the first 20 of these test images; the models have not
seen them.

CIFAR-10: Krizhevsky 2009, "Learning Multiple Layers of Features from Tiny Images".
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    args = parser.parse_args()
    images, labels = read_tar(args.data / "test.tar")
    rows = []
    for name, file in BUNDLED.items():
        model = load_classifier(name).model
        size = (WEIGHTS / file).stat().st_size / 1e6
        cells = [_shown(rate) for rate in measure(name, model, images, labels)]
        rows.append(f"| {name} | {file} | {size:.2f} MB | {' | '.join(cells)} |")
        print(rows[-1], flush=True)
    card = CARD.format(steps=STEPS, rows="\n".join(rows))
    (WEIGHTS / "MODEL_CARD.md").write_text(card, encoding="utf-8")


def measure(name: str, model: nn.Module, images: Tensor, labels: Tensor) -> list[Rate]:
    """Clean accuracy and robust accuracy under PGD and OrthoPGD."""
    generator = torch.Generator().manual_seed(0)
    attacks = [kind(model, eps=EPS, steps=STEPS, early_stop=True, generator=generator) for kind in (PGD, OrthoPGD)]
    right, robust = 0, [0, 0]
    for start in tqdm(range(0, len(images), 250), desc=name):
        x, y = images[start : start + 250].float().div(255), labels[start : start + 250]
        with torch.inference_mode():
            known = model(x).argmax(1) == y
        right += int(known.sum())
        for k, attack in enumerate(attacks):
            robust[k] += int((~attack.run(x[known], y[known]).success).sum())
    return [Rate(count, len(images)) for count in (right, *robust)]


def _shown(rate: Rate) -> str:
    interval = rate.interval()
    assert rate.value is not None
    assert interval is not None
    return f"{100 * rate.value:.1f} % [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


if __name__ == "__main__":
    main()

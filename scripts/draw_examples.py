"""Draw the README's picture: ImageNet images that OrthoPGD makes EfficientNet-lite0 misclassify.

    python -m scripts.draw_examples [--out docs/figures/examples.webp]

The images are Foolbox's, the model that of the extra "imagenet". What the picture claims is checked before it is drawn.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import matplotlib as mpl

mpl.use("agg")

import matplotlib.pyplot as plt
import torch
from PIL import Image

from orthattack import OrthoPGD, alignment
from orthattack.eval import load
from orthattack.eval.models.load import load_classifier

ROOT = Path(__file__).resolve().parents[1]
EPS, COLUMNS, COSINE = 4 / 255, 5, 1e-7


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "figures" / "examples.webp")
    out: Path = parser.parse_args().out
    classifier = load_classifier("efficientnet-lite0")
    model, images, labels = load(classifier, "imagenet-samples")
    attack = OrthoPGD(model, eps=EPS, generator=torch.Generator().manual_seed(0))
    result = attack.run(images, labels)
    chosen = result.success.nonzero().flatten()[:COLUMNS]
    x, y = images[chosen], result.adversarials[chosen]
    cosine = alignment(y.double() - x.double(), x.double()).abs().max().item()
    with torch.no_grad():
        before, after = model(x).argmax(1), model(y).argmax(1)
    assert len(chosen) == COLUMNS
    assert (before == labels[chosen]).all()
    assert (after != before).all()
    assert cosine < COSINE
    assert (y - x).abs().max() <= EPS * (1 + 1e-6)

    names = classifier.classes or ()
    fig, axes = plt.subplots(3, COLUMNS, figsize=(10, 6.7))
    rows = [("image", x, before), (f"perturbation × {1 / (2 * EPS):.0f}", 0.5 + (y - x) / (2 * EPS), None)]
    for row, (title, pictures, classes) in zip(axes, [*rows, ("adversarial", y, after)], strict=True):
        row[0].set_ylabel(title, fontsize=11)
        for k, ax in enumerate(row):
            ax.imshow(pictures[k].permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="none")
            ax.set(xticks=[], yticks=[])
            if classes is not None:
                ax.set_xlabel(names[int(classes[k])], fontsize=10, color="#b3261e" if classes is after else "black")
    fig.suptitle(f"OrthoPGD on EfficientNet-lite0, ε = 4/255, |cos(perturbation, image)| < {COSINE:.0e}", fontsize=12)
    fig.subplots_adjust(left=0.03, right=0.998, top=0.94, bottom=0.035, wspace=0.04, hspace=0.12)
    drawn = io.BytesIO()
    fig.savefig(drawn, dpi=100)
    Image.open(drawn).convert("RGB").save(out, quality=75, method=6)
    print(out, f"{out.stat().st_size / 1e3:.0f} kB")


if __name__ == "__main__":
    main()

"""Draw the figures of docs/how-to/invariants.md: what each kind of perturbation changes, and what it keeps.

    python -m scripts.draw_invariants [--out docs/figures]

The model is EfficientNet-lite0 (the extra "imagenet"), the image scikit-learn's flower.jpg. Each
figure is checked against what it claims before it is written.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("agg")

import matplotlib.pyplot as plt
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor
from torch.nn.functional import avg_pool2d, interpolate
from torchvision.models import MobileNet_V2_Weights

from orthattack import PGD
from orthattack.eval.models.load import load_classifier

ROOT = Path(__file__).resolve().parents[1]
LUMA = (0.299, 0.587, 0.114)
EPS = 4 / 255


def thumbnail(images: Tensor, _: Tensor) -> Tensor:
    """The means of 8×8 blocks: 28×28 pixels."""
    return avg_pool2d(images, 8)


def grey(images: Tensor, _: Tensor) -> Tensor:
    """The luma of each pixel."""
    return torch.einsum("nchw,c->nhw", images, torch.tensor(LUMA).to(images)).unsqueeze(1)


def mean_colour(images: Tensor, _: Tensor) -> Tensor:
    """The mean of each channel: one pixel."""
    return images.mean((2, 3), keepdim=True)


def contrast(images: Tensor, clean: Tensor) -> Tensor:
    """The part of each image that is along the clean one, ⟨y, x⟩ / ⟨x, x⟩ · x."""
    product, square = ((a * clean).sum((1, 2, 3), keepdim=True) for a in (images, clean))
    return product / square * clean


# What is kept: what it is called, the attack's options, how it is seen.
KEPT: Mapping[str, tuple[str, Mapping[str, Any], Callable[[Tensor, Tensor], Tensor]]] = {
    "thumbnail": ("thumbnail, 8×8 block means", {"scope": "block8", "normal": "constant"}, thumbnail),
    "luma": ("luma of each pixel", {"scope": "pixel", "normal": "luma"}, grey),
    "colour": ("mean colour", {"scope": "channel", "normal": "constant"}, mean_colour),
    "image": ("part along the image", {"scope": "image"}, contrast),
}


def shown(ax: Any, image: Tensor, title: str) -> None:
    """One image (1, C, H, W), its pixels as they are, a small one enlarged."""
    small = image.shape[-1] < 224
    picture = interpolate(image.float(), size=224, mode="nearest") if small else image.float()
    ax.imshow(picture[0].expand(3, -1, -1).permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="none")
    ax.set_title(title, fontsize=9)
    ax.set_axis_off()


def draw(name: str, model: Any, classes: list[str], clean: Tensor, out: Path) -> None:
    """One figure: image, perturbation, adversarial, what stayed before and after, and what plain PGD makes of it."""
    words, options, view = KEPT[name]
    x = clean.double()
    with torch.no_grad():
        label = model(clean).argmax(1)
    attacks = {"": PGD(model, eps=EPS, steps=20, **options), "plain": PGD(model, eps=EPS, steps=20)}
    found = {
        key: attack.replace(generator=torch.Generator().manual_seed(0)).run(clean, label)
        for key, attack in attacks.items()
    }
    assert all(result.success.all() for result in found.values())
    y, plain = (found[key].adversarials.double() for key in ("", "plain"))
    moved, plainly = ((view(z, x) - view(x, x)).abs().max().item() * 255 for z in (y, plain))
    assert moved <= 1e-5 < 0.02 < plainly, (name, moved, plainly)
    change = view(plain, x) - view(x, x)
    with torch.no_grad():
        fooled = int(model(y.float()).argmax(1))
    fig, axes = plt.subplots(1, 6, figsize=(12.6, 2.45))
    panels = [
        (x, f"image: {classes[int(label)]}"),
        (0.5 + (y - x) / (2 * EPS), f"perturbation, × {1 / (2 * EPS):.0f}"),
        (y, f"adversarial: {classes[fooled]}"),
        (view(x, x), f"{words}:\nof the image"),
        (view(y, x), f"of the adversarial,\nchanged by {moved:.0e}/255"),
        (
            0.5 + 127.5 / plainly * change,
            f"what plain PGD changes of it,\nup to {plainly:.2g}/255 (× {127.5 / plainly:.0f})",
        ),
    ]
    for ax, (picture, title) in zip(axes, panels, strict=True):
        shown(ax, picture, title)
    fig.subplots_adjust(left=0.005, right=0.995, top=0.84, bottom=0.01, wspace=0.03)
    fig.savefig(out / f"invariant-{name}.png", dpi=110)
    plt.close(fig)
    Image.open(out / f"invariant-{name}.png").convert("RGB").save(out / f"invariant-{name}.webp", quality=88, method=6)
    (out / f"invariant-{name}.png").unlink()
    print(
        f"{name}: {classes[int(label)]}, then {classes[fooled]}; {words} changed by {moved:.1e}/255, by plain PGD "
        f"by {plainly:.3g}/255"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "figures")
    out = parser.parse_args().out
    classifier = load_classifier("efficientnet-lite0")
    clean = classifier.preprocessing(Image.fromarray(load_sample_image("flower.jpg")))[None]
    for name in KEPT:
        draw(name, classifier.model, MobileNet_V2_Weights.IMAGENET1K_V1.meta["categories"], clean, out)


if __name__ == "__main__":
    main()

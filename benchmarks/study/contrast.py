"""Why gradients lie nearly at right angles to images: what a network's loss and features make of a change of contrast.

For every loss L and image x, ⟨∇L(x), x⟩ is the derivative of L(cx) by c at c = 1, and ⟨∇L(x), 1⟩ that of L(x + b) by b
at b = 0. So the gradient is nearly orthogonal to the image where contrast hardly matters. Whether that is special to
contrast takes other changes of the same length to tell: another image, noise with the image's spectrum, white noise.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from benchmarks.study.gradients import batches, loss_gradient, outputs_of_blocks, random_cosine
from benchmarks.study.panel import Group, Study
from orthattack.eval.models.classifier import Classifier

__all__ = ["DIRECTIONS", "SHIFTS", "central", "contrast", "curves", "directions", "lie", "sensitivity", "slopes"]

DIRECTIONS = ("contrast", "brightness", "pattern", "another image", "scrambled", "noise")
SHIFTS = (-0.5, -0.35, -0.2, -0.1, -0.05, 0.0, 0.05, 0.1, 0.2, 0.35, 0.5)
SHOWN = ("contrast", "brightness", "scrambled", "noise")
CHECKED = 10
STEP = 1e-5


def directions(images: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """Changes of each image (N, C, H, W), every one as long as the image it changes; zero where it is not defined.

    "contrast": the image x itself; "brightness": a constant; "pattern": x less its channels' means; "another image":
    that half the batch away; "scrambled": the pattern with random phases added to its Fourier transform, the same in
    all channels, so noise with the spectrum and the colours of the image; "noise": white, normal.
    """
    pattern = images - images.mean((2, 3), keepdim=True)
    white = torch.randn(images.shape, generator=generator, dtype=images.dtype)
    phases = torch.fft.rfft2(white[:, :1])  # of a real image, so that the product is one's too
    phases = phases / phases.abs().clamp(min=1e-30)
    scrambled = torch.fft.irfft2(torch.fft.rfft2(pattern) * phases, s=images.shape[-2:])
    found = {
        "contrast": images,
        "brightness": torch.ones_like(images),
        "pattern": pattern,
        "another image": images.roll(len(images) // 2, 0),
        "scrambled": scrambled,
        "noise": white,
    }
    length = _norm(images)
    return {name: d * (length / _norm(d).clamp(min=1e-30)).view(-1, 1, 1, 1) for name, d in found.items()}


def lie(model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator) -> pd.DataFrame:
    """A row per image and direction d: how the gradient g of its cross-entropy lies to d.

    `slope` is ⟨g, d⟩, the loss's derivative along d; `cosine` that over ‖g‖‖d‖, and `random` its mean size where d is a
    random direction. `homogeneous` is ⟨p - y, f⟩ of the
    probabilities p, the one-hot label y and the logits f: what the slope along x would be if f(cx) were c f(x).
    """
    g = loss_gradient(model, images, labels).double()
    with torch.no_grad():
        logits = model(images).double()
    off = logits.softmax(1) - nn.functional.one_hot(labels, logits.shape[1])
    loss = nn.functional.cross_entropy(logits, labels, reduction="none")
    parts = []
    for name, d in directions(images, generator).items():
        slope = (g * d.double()).sum((1, 2, 3))
        columns = {
            "slope": slope,
            "cosine": slope / (_norm(g) * _norm(d.double())).clamp(min=1e-300),
            "gradient": _norm(g),
            "loss": loss,
            "homogeneous": (off * logits).sum(1),
        }
        table = pd.DataFrame({key: values.numpy() for key, values in columns.items()})
        more = {"direction": name, "index": range(len(images)), "right": (logits.argmax(1) == labels).numpy()}
        parts.append(table.assign(**more, random=random_cosine(images[0].numel())))
    return pd.concat(parts, ignore_index=True)


def central(function: Callable[[Tensor], Tensor], images: Tensor, direction: Tensor, step: float = STEP) -> Tensor:
    """The derivative of a function of images, along a direction, by central differences; not of autograd."""
    with torch.no_grad():
        return (function(images + step * direction) - function(images - step * direction)) / (2 * step)


def slopes(study: Study, group: Group) -> pd.DataFrame:
    """A row per model, image and direction, of `lie`.

    For the first images, `numeric` is the slope of the model in float64 by central differences along the image and the
    constant, and `exact` that by autograd in float64; NaN elsewhere.
    """
    parts = []
    for label, classifier in study.classifiers(group).items():
        generator = torch.Generator().manual_seed(0)
        for first, batch in batches(study, group, classifier, group.images["slopes"]):
            table = lie(classifier.model, batch.images, batch.labels, generator)
            table["position"] = first + table.pop("index")
            if first == 0:
                table = table.merge(_numeric(classifier.model, batch.images, batch.labels), "left")
            parts.append(table.assign(model=label))
    return pd.concat(parts, ignore_index=True)


def _numeric(model: nn.Module, images: Tensor, labels: Tensor) -> pd.DataFrame:
    exact = copy.deepcopy(model).double()
    x, y = images[:CHECKED].double(), labels[:CHECKED]
    g = loss_gradient(exact, x, y)
    found = directions(x, torch.Generator())
    parts = []
    for name in ("contrast", "brightness"):
        slope = central(lambda z: nn.functional.cross_entropy(exact(z), y, reduction="none"), x, found[name])
        values = {"numeric": slope.numpy(), "exact": (g * found[name]).sum((1, 2, 3)).numpy()}
        parts.append(pd.DataFrame({"direction": name, "position": range(len(x)), **values}))
    return pd.concat(parts, ignore_index=True)


def contrast(study: Study, group: Group) -> pd.DataFrame:
    """`curves` of the group's models."""
    return curves(
        study.classifiers(group),
        lambda model: (
            (first, batch.images, batch.labels)
            for first, batch in batches(study, group, model, group.images["contrast"])
        ),
    )


def curves(
    models: Mapping[str, Classifier], shown: Callable[[Classifier], Iterable[tuple[int, Tensor, Tensor]]]
) -> pd.DataFrame:
    """A row per model, image, direction d and shift t: the loss at x + td, and whether it is still classified right.

    Along x that is L(cx) with c = 1 + t. The images are not clipped: a clip would make other changes of these.
    """
    parts = []
    for label, classifier in models.items():
        generator = torch.Generator().manual_seed(0)
        for first, x, y in shown(classifier):
            found = directions(x, generator)
            for name in SHOWN:
                for t in SHIFTS:
                    if t == 0 and name != SHOWN[0]:
                        continue
                    with torch.inference_mode():
                        logits = classifier.model(x + t * found[name]).double()
                    loss = nn.functional.cross_entropy(logits, y, reduction="none").numpy()
                    row: dict[str, Any] = {"model": label, "direction": name if t else "none", "shift": t}
                    row |= {"position": range(first, first + len(x)), "loss": loss}
                    parts.append(pd.DataFrame({**row, "right": (logits.argmax(1) == y).numpy()}))
    return pd.concat(parts, ignore_index=True)


def sensitivity(study: Study, group: Group) -> pd.DataFrame:
    """A row per model, block, image and direction d: ‖J d‖ / ‖f‖, J being the derivative of the block's output f by x.

    Along x it is 1 where f(cx) = c f(x), and 0 where f does not answer to contrast. "input" is the image itself;
    "logits" are taken less their mean, which no loss of ours sees. In float64, by central differences.
    """
    parts = []
    for label, classifier in study.classifiers(group).items():
        generator = torch.Generator().manual_seed(0)
        exact = copy.deepcopy(classifier.model).double()
        for first, batch in batches(study, group, classifier, group.images["sensitivity"]):
            x = batch.images.double()
            here = _features(exact, x)
            for name, d in directions(x, generator).items():
                ahead, behind = _features(exact, x + STEP * d), _features(exact, x - STEP * d)
                for block, f in here.items():
                    change = _norm(ahead[block] - behind[block]) / (2 * STEP) / _norm(f).clamp(min=1e-300)
                    row = {"model": label, "block": block, "direction": name, "change": change.numpy()}
                    parts.append(pd.DataFrame({**row, "position": range(first, first + len(x))}))
    return pd.concat(parts, ignore_index=True)


def _features(model: nn.Module, images: Tensor) -> dict[str, Tensor]:
    with torch.no_grad():
        logits, features = outputs_of_blocks(model, images)
    return {"input": images, **features, "logits": logits - logits.mean(1, keepdim=True)}


def _norm(values: Tensor) -> Tensor:
    """Of each image or output, the Euclidean length."""
    length: Tensor = values.flatten(1).norm(dim=1)
    return length

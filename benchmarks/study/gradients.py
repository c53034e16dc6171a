"""How much of a network's input gradient points along the image, where in it, and what signs and clips undo."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from benchmarks.study.panel import Group, Study
from orthattack import Normalized, OrthoFGSM, OrthoPGD, alignment, orthogonalize
from orthattack.attacks.scoring import input_gradient
from orthattack.eval.data.dataset import Batch
from orthattack.eval.models.classifier import Classifier
from orthattack.projection import Scope

__all__ = [
    "SCOPES",
    "batches",
    "blocks",
    "depth",
    "gradients",
    "loss_gradient",
    "outputs_of_blocks",
    "random_cosine",
]

SCOPES: tuple[Scope, ...] = ("image", "channel", "pixel")
MOST_BLOCKS = 8


def random_cosine(n: int) -> float:
    """E |cos| of a random direction with any fixed one in n dimensions: Γ(n/2) / (√π Γ((n+1)/2)), about √(2/πn)."""
    return math.exp(math.lgamma(n / 2) - math.lgamma((n + 1) / 2)) / math.sqrt(math.pi)


def loss_gradient(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The gradient of each image's cross-entropy."""
    leaf = images.clone().requires_grad_()
    return input_gradient(nn.functional.cross_entropy(model(leaf), labels, reduction="sum"), leaf)


def gradients(study: Study, group: Group) -> pd.DataFrame:
    """A row per model and image: how the gradient lies to the image, and what becomes of its projection."""
    parts = []
    for label, classifier in study.classifiers(group).items():
        generator = torch.Generator().manual_seed(0)
        for first, batch in batches(study, group, classifier, group.images["gradients"]):
            x, y = batch.images, batch.labels
            g = loss_gradient(classifier.model, x, y)
            noise = torch.randn(x.shape, generator=generator)
            # Half a batch away is an image of another class.
            columns = {
                "cosine": alignment(g, x),
                "cosine_other": alignment(g, x.roll(len(x) // 2, 0)),
                "cosine_constant": alignment(g, torch.ones_like(x)),
                "cosine_noise": alignment(noise, x),
                "image_constant": alignment(x, torch.ones_like(x)),
                "grey_share": _share(g, torch.ones_like(x), "pixel"),
            }
            for scope in SCOPES:
                columns[f"{scope}_cosine"] = _size(g, x, scope)
                columns[f"{scope}_share"] = _share(g, x, scope)
                columns[f"{scope}_share_noise"] = _share(noise, x, scope)
                columns |= {f"{scope}_{name}": v for name, v in _undone(classifier, g, x, y, scope, group.eps).items()}
            table = pd.DataFrame({name: values.double().numpy() for name, values in columns.items()})
            table.insert(0, "model", label)
            table.insert(1, "position", range(first, first + len(x)))
            parts.append(table)
    return pd.concat(parts, ignore_index=True)


def _share(gradient: Tensor, direction: Tensor, scope: Scope) -> Tensor:
    """How much of each gradient's squared length the projection takes away."""
    rest = orthogonalize(gradient.double(), direction.double(), scope)
    return 1 - rest.square().sum((1, 2, 3)) / gradient.double().square().sum((1, 2, 3))


def _undone(c: Classifier, g: Tensor, x: Tensor, y: Tensor, scope: Scope, eps: float) -> Mapping[str, Tensor]:
    """Mean |cos| over the vectors of the scope, after each thing that a step does to a projected gradient."""
    rest = orthogonalize(g, x, scope)
    signs = eps * rest.sign()
    short = 0.5 * rest / rest.flatten(1).norm(dim=1).clamp(min=1e-30).view(-1, 1, 1, 1)
    exact = OrthoFGSM(c.model, eps=eps, loss="ce", scope=scope).run(x, y).adversarials
    exact_l2 = OrthoPGD(c.model, "l2", 0.5, 0.5, 1, loss="ce", random_start=False, scope=scope)
    return {
        "flipped": (rest.sign() != g.sign()).flatten(1).double().mean(1),
        "plain_sign": _size(g.sign(), x, scope),
        "sign": _size(signs, x, scope),
        "sign_clip": _size((x + signs).clamp(0, 1) - x, x, scope),
        "l2_clip": _size((x + short).clamp(0, 1) - x, x, scope),
        "exact": _size(exact.double() - x.double(), x, scope),
        "exact_l2": _size(exact_l2.run(x, y).adversarials.double() - x.double(), x, scope),
    }


def _size(a: Tensor, b: Tensor, scope: Scope) -> Tensor:
    """Mean |cos| of an image's vectors, those left out in which either is zero."""
    cosine = alignment(a.double(), b.double(), scope).abs().reshape(len(a), -1)
    dims = {"image": (1, 2, 3), "channel": (2, 3), "pixel": (1,)}[scope]
    defined = ((a != 0).sum(dims) * (b != 0).sum(dims) > 0).reshape(len(a), -1)
    return (cosine * defined).sum(1) / defined.sum(1).clamp(min=1)


def depth(study: Study, group: Group) -> pd.DataFrame:
    """A row per model, block and image, from the input (block "input") to the last block before the classifier.

    ``backward``: cosine of the loss's gradient with respect to the block's output f, and f itself; ``forward``: of
    the image and the gradient, with respect to the image, of ⟨v, f⟩ with v random; `size` is how many numbers f has.
    """
    parts = []
    for label, classifier in study.classifiers(group).items():
        generator = torch.Generator().manual_seed(0)
        for first, batch in batches(study, group, classifier, group.images["depth"]):
            x, y = batch.images.clone().requires_grad_(), batch.labels
            logits, features = outputs_of_blocks(classifier.model, x)
            loss = nn.functional.cross_entropy(logits, y, reduction="sum")
            back = torch.autograd.grad(loss, [x, *features.values()], retain_graph=True)
            with torch.no_grad():
                rows = {"input": (alignment(back[0], x), torch.full((len(x),), torch.nan), x[0].numel())}
            for gradient, (name, f) in zip(back[1:], features.items(), strict=True):
                v = torch.randn(f.shape, generator=generator)
                (pulled,) = torch.autograd.grad((v * f).sum(), x, retain_graph=True)
                with torch.no_grad():
                    rows[name] = (alignment(_one_row(gradient), _one_row(f)), alignment(pulled, x), f[0].numel())
            for name, (backward, forward, size) in rows.items():
                parts.append(
                    pd.DataFrame(
                        {
                            "model": label,
                            "block": name,
                            "size": size,
                            "position": range(first, first + len(x)),
                            "backward": backward.detach().double().numpy(),
                            "forward": forward.detach().double().numpy(),
                        }
                    )
                )
    return pd.concat(parts, ignore_index=True)


def blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """A network's stages in order: its children that have weights, but for the normalisation layers and the classifier.

    Where nearly all weights are in one child, such as a RegNet's trunk, that child's children take its place; so do
    those of a list. Of many, some, evenly spaced, with the first and the last.
    """
    inner = model.model if isinstance(model, Normalized) else model
    found: list[tuple[str, nn.Module]] = []
    for name, child in inner.named_children():
        inside = [(key, part) for key, part in child.named_children() if _is_stage(part)]
        if inside and (isinstance(child, nn.ModuleList) or _weights(child) > 0.8 * _weights(inner)):
            found += inside
        elif _is_stage(child):
            found.append((name, child))
    if len(found) <= MOST_BLOCKS:
        return found
    return [found[round(k * (len(found) - 1) / (MOST_BLOCKS - 1))] for k in range(MOST_BLOCKS)]


def outputs_of_blocks(model: nn.Module, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """A model's logits, and what its `blocks` put out, by name."""
    features: dict[str, Tensor] = {}
    hooks = [block.register_forward_hook(partial(_keep, features, name)) for name, block in blocks(model)]
    try:
        return model(images), features
    finally:
        for hook in hooks:
            hook.remove()


def _is_stage(module: nn.Module) -> bool:
    """Whether it has weights elsewhere than in normalisation and linear layers, as a classifier has not."""
    leaves = (part for part in module.modules() if next(part.parameters(recurse=False), None) is not None)
    return any(not isinstance(leaf, nn.Linear | nn.LayerNorm | nn.modules.batchnorm._BatchNorm) for leaf in leaves)


def _keep(features: dict[str, Tensor], name: str, _module: nn.Module, _inputs: Any, output: Tensor) -> None:
    if isinstance(output, Tensor):
        features[name] = output


def _one_row(features: Tensor) -> Tensor:
    """Features of any shape, (N, ...), as (N, 1, 1, n), of which `alignment` takes all as one vector."""
    return features.flatten(1)[:, None, None]


def _weights(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def batches(study: Study, group: Group, classifier: Classifier, count: int) -> Iterator[tuple[int, Batch]]:
    """The images in batches, each of which goes through all classes, with the first one's position."""
    dataset = study.dataset(group, classifier, count)
    stride = -(-len(dataset) // group.batch)
    dealt = dataset.subset([name for start in range(stride) for name in dataset.names[start::stride]])
    position = 0
    for batch in dealt.batches(group.batch, classifier.preprocessing):
        if isinstance(batch, Batch):
            yield position, batch
            position += len(batch.images)

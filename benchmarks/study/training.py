"""What training has to do with it: how the alignment comes about, and whether it matters what one trains on."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.study.contrast import curves, lie
from benchmarks.study.panel import Group, Study, unpacked
from orthattack import PGD, Normalized, OrthoPGD
from orthattack.eval.data.dataset import Batch, ImageDataset
from orthattack.eval.data.load import load_dataset
from orthattack.eval.models.classifier import Classifier
from orthattack.eval.models.load import load_classifier
from orthattack.eval.results.outcomes import ROBUST

__all__ = ["ARMS", "BASE", "KINDS", "Kind", "network_path", "scratch", "small_network", "tuning", "twins"]

BASE = "cifar10-standard"
ARMS: dict[str, Callable[..., PGD | OrthoPGD] | None] = {
    "clean images": None,
    "PGD": partial(PGD, loss="ce"),
    "OrthoPGD, image": partial(OrthoPGD, loss="ce"),
    "OrthoPGD, pixel": partial(OrthoPGD, loss="ce", scope="pixel"),
}
Kind = Literal["batch norm", "biases"]
KINDS: tuple[Kind, ...] = get_args(Kind)
SCRATCH_RATE = 0.1
BATCH = 100
Moment = Callable[[int, nn.Module], None]


@dataclass(frozen=True)
class Set:
    """Decoded images in memory: (N, 3, H, W) uint8, labels (N,)."""

    images: Tensor
    labels: Tensor

    @classmethod
    def of(cls, dataset: ImageDataset, classifier: Classifier) -> Set:
        batches = [b for b in dataset.batches(1000, classifier.preprocessing) if isinstance(b, Batch)]
        return cls(
            torch.cat([(batch.images * 255).round().byte() for batch in batches]),
            torch.cat([batch.labels for batch in batches]),
        )

    def batches(self, size: int, generator: torch.Generator) -> Iterator[tuple[Tensor, Tensor]]:
        """Random batches of images in [0, 1], half of them mirrored, for ever."""
        while True:
            order = torch.randperm(len(self.images), generator=generator)
            for index in torch.split(order, size):
                if len(index) == size:
                    images = self.images[index].float() / 255
                    mirrored = torch.rand((size, 1, 1, 1), generator=generator) < 0.5
                    yield torch.where(mirrored, images.flip(-1), images), self.labels[index]

    def shown(self) -> Iterator[tuple[Tensor, Tensor]]:
        """All of them in order, as images in [0, 1]."""
        for images, labels in zip(torch.split(self.images, BATCH), torch.split(self.labels, BATCH), strict=True):
            yield images.float() / 255, labels


def train(
    model: nn.Module,
    batches: Iterator[tuple[Tensor, Tensor]],
    steps: int,
    lr: float,
    attack: Callable[[Tensor, Tensor], Tensor] | None = None,
    moment: Moment | None = None,
) -> None:
    """SGD with momentum and one cycle of the learning rate, on the images or on what the attack makes of them."""
    model.requires_grad_(True).train()
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps, pct_start=0.25)
    for step in range(steps):
        if moment is not None:
            moment(step, model)
        images, labels = next(batches)
        shown = images if attack is None else attack(images, labels)  # puts the model in evaluation mode, and back
        loss = nn.functional.cross_entropy(model(shown), labels)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
    if moment is not None:
        moment(steps, model)
    model.requires_grad_(False).eval()


def small_network(classes: int, kind: Kind = "batch norm") -> nn.Module:
    """Four convolutions, so another architecture than the bundled models': 245 thousand weights.

    "batch norm": each followed by one; "biases": biases instead, which compute the same functions, since at inference
    a batch norm is a fixed scale and shift per channel.
    """
    layers: list[nn.Module] = []
    for before, after in ((3, 32), (32, 64), (64, 128), (128, 128)):
        layers += [
            nn.Conv2d(before, after, 3, padding=1, bias=kind == "biases"),
            *([nn.BatchNorm2d(after)] if kind == "batch norm" else []),
            nn.ReLU(),
            nn.MaxPool2d(2),
        ]
    return nn.Sequential(*layers[:-1], nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, classes))


def prepared(network: nn.Module, classifier: Classifier) -> nn.Module:
    """The small network of images in [0, 1]."""
    return Normalized(network, classifier.preprocessing.mean, classifier.preprocessing.std)


def scratch(study: Study, group: Group) -> pd.DataFrame:
    """A row per kind of `small_network`, seed, moment of its training on clean images, test image and direction: `lie`.

    Networks of one seed see the same batches in the same order. They are kept in the work folder, for other stages.
    """
    base = load_classifier(BASE)
    seen = cache(lambda: _training_set(study, base))  # decoded only if something is to be trained
    test = Set.of(study.dataset(group, base, group.images["gradients"]), base)
    parts = [
        _trained(study, base, seen, test, kind, seed).assign(kind=kind, seed=seed)
        for seed in range(study.budget.seeds)
        for kind in KINDS
    ]
    return pd.concat(parts, ignore_index=True)


def _trained(study: Study, base: Classifier, seen: Callable[[], Set], test: Set, kind: Kind, seed: int) -> pd.DataFrame:
    """`_looked` at moments of the training of one small network; read back if that is done already."""
    path = network_path(study, kind, seed)
    table_path = path.with_suffix(".parquet")
    if not (path.exists() and table_path.exists()):
        total = study.budget.scratch_epochs * (len(seen().images) // 128)
        moments = {0, total, *(m for m in (30, 100) if m < total)}
        rows: list[pd.DataFrame] = []

        def look(step: int, model: nn.Module) -> None:
            if step in moments:
                rows.append(_looked(model, test).assign(step=step))

        torch.manual_seed(seed)
        network = small_network(base.num_classes, kind)
        batches = seen().batches(128, torch.Generator().manual_seed(seed))
        train(prepared(network, base), batches, total, SCRATCH_RATE, moment=look)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(network.state_dict(), path)
        partial_path = path.with_suffix(".partial")
        pd.concat(rows, ignore_index=True).to_parquet(partial_path, index=False)
        partial_path.rename(table_path)
    return pd.read_parquet(table_path)


def network_path(study: Study, kind: Kind = "batch norm", seed: int = 0) -> Path:
    """Where a small network is kept."""
    return study.work / "networks" / f"small-{kind.replace(' ', '-')}-{seed}.safetensors"


def twins(study: Study, group: Group) -> pd.DataFrame:
    """`curves` of the small networks; a row says the kind as its model, and the seed."""
    scratch(study, group)  # reads back what is trained
    base = load_classifier(BASE)
    test = Set.of(study.dataset(group, base, group.images["contrast"] // 2), base)
    parts = []
    for seed in range(study.budget.seeds):
        models: dict[str, Classifier] = {}
        for kind in KINDS:
            network = small_network(base.num_classes, kind)
            network.load_state_dict(load_file(network_path(study, kind, seed)))
            model = prepared(network, base).eval().requires_grad_(False)
            models[kind] = Classifier(kind, model, base.preprocessing, base.classes, base.num_classes, "this study")
        parts.append(
            curves(models, lambda _: ((BATCH * k, *batch) for k, batch in enumerate(test.shown()))).assign(seed=seed)
        )
    return pd.concat(parts, ignore_index=True)


def tuning(study: Study, group: Group) -> pd.DataFrame:
    """A row per arm, seed, measure and test image, of the bundled standard model trained on with each arm's images.

    Arms of one seed see the same batches in the same order, and take as many steps. Measures: "right" on the image as
    it is, and darkened and brightened; "robust" against attacks; "cosine", |cos(g, x)|. Arm "none" is the model itself.
    """
    base = load_classifier(BASE)
    seen = _training_set(study, base)
    models = {("none", 0): base}
    for seed in range(study.budget.seeds):
        for arm, attack in ARMS.items():
            models[arm, seed] = _tuned(study, base, seen, group.eps, arm, attack, seed)
    count = study.budget.tuned
    test = Set.of(study.dataset(group, base, count), base)
    attacks: list[dict[str, Any]] = [
        {"name": "PGD", "early_stop": True, "loss": "ce"},
        {"name": "OrthoPGD", "label": "OrthoPGD, image", "early_stop": True, "loss": "ce"},
        {"name": "OrthoPGD", "label": "OrthoPGD, pixel", "scope": "pixel", "early_stop": True, "loss": "ce"},
    ]
    rows: list[pd.DataFrame] = []
    for (arm, seed), classifier in models.items():
        run = study.attack(f"tuning {arm} {seed}", group, attacks, count, {arm: classifier}, eps=[group.eps])
        values: dict[str, Any] = {
            f"robust, {label}": run.outcomes(arm, label, group.eps).outcome == ROBUST for label in run.attacks
        }
        values["right"] = (run.clean(arm)["prediction"] == run.clean(arm)["label"]).to_numpy(bool)
        values["cosine"] = np.abs(run.gradient_cosines(arm))
        for name, factor in (("right, half as bright", 0.5), ("right, half as bright again", 1.5)):
            values[name] = torch.cat([
                classifier.model((factor * x).clamp(0, 1)).argmax(1) == y for x, y in test.shown()
            ]).numpy()  # fmt: skip
        rows += [
            pd.DataFrame({"arm": arm, "seed": seed, "measure": name, "position": range(len(column)),
                          "value": column.astype(np.float32)})
            for name, column in values.items()
        ]  # fmt: skip
    return pd.concat(rows, ignore_index=True)


def _tuned(
    study: Study, base: Classifier, seen: Set, eps: float, arm: str, make: Callable[..., Any] | None, seed: int
) -> Classifier:
    """The base model after training on an arm's images; read back if that is done already."""
    path = study.work / "networks" / f"{arm.replace(', ', '-').replace(' ', '-')}-{seed}.safetensors"
    model = copy.deepcopy(base.model)
    if path.exists():
        model.load_state_dict(load_file(path))
    else:
        budget = study.budget
        batches = seen.batches(budget.tuning_batch, torch.Generator().manual_seed(seed))
        generator = torch.Generator().manual_seed(seed)
        attack = None if make is None else make(model, eps=eps, steps=budget.tuning_attack_steps, generator=generator)
        train(model, batches, budget.tuning_steps, 0.02, attack)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file(model.state_dict(), partial)
        partial.rename(path)
    return Classifier(arm, model.eval().requires_grad_(False), base.preprocessing, base.classes, base.num_classes, arm)


def _training_set(study: Study, classifier: Classifier) -> Set:
    assert study.train is not None
    folder = unpacked(study.train, study.work, study.budget.train_images)
    return Set.of(load_dataset(str(folder), classifier), classifier)


def _looked(model: nn.Module, test: Set) -> pd.DataFrame:
    """Whether each test image is classified correctly, and how its gradient lies, in evaluation mode: see `lie`."""
    was_training = model.training
    model.eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    parts = []
    for k, (x, y) in enumerate(test.shown()):
        table = lie(model, x, y, generator)
        table["position"] = BATCH * k + table.pop("index")
        parts.append(table)
    model.train(was_training).requires_grad_(was_training)
    return pd.concat(parts, ignore_index=True)

"""How often adversarials fool a model that was not asked: by the attack, plain and orthogonal, as papers measure it.

The last iterate of ten steps on the cross-entropy, on images that all models of a group classify correctly. Each
source's adversarials are made once and judged by all models; a digit per image is stored, so that all can be paired.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks import defaults, trained
from benchmarks.stored import Row, Table
from orthattack import DIFGSM, MIFGSM, SINIFGSM, TIFGSM, VMIFGSM, fooled
from orthattack.attacks.rules import gaussian, smooth, variance
from orthattack.attacks.transforms import admix
from orthattack.eval.data import load_dataset
from orthattack.eval.models import load_classifier
from orthattack.eval.models.classifier import Classifier
from orthattack.eval.results.paired import Paired

FORMS = {"plain": None, "orthogonal": "image"}
"""Each form with its scope."""


@dataclass(frozen=True)
class Group:
    """Models that are shown the same images: each is a source, and a target of the others.

    Attributes:
        models: by name, what `load_classifier` takes. What ends in a number, as in "net-0", is trained with that seed.
        data: what `load_dataset` takes.
        eps: the radius.
        kernel: of TI, in pixels.
        neighbours: of VMI.
        attacks: how many of those of `attacks`, in order.
    """

    models: Mapping[str, Mapping[str, Any]]
    data: Mapping[str, str]
    eps: float
    kernel: int
    neighbours: int
    attacks: int


def groups(shared: Path, build: Path, names: Sequence[str] | None = None) -> dict[str, Group]:
    """The groups by name; networks are trained where it is among `names`."""
    known = defaults.models(shared, build)
    found = {}
    for name, members, *sizes in (
        ("cifar10", ("cifar10-standard", "cifar10-robust"), 5, 5, 7),
        ("tiny-imagenet-20", ("resnet18-tiny20-standard", "resnet18-tiny20-robust"), 5, 2, 4),
        ("imagenet", ("efficientnet-lite0", "efficientnet-lite2"), 15, 2, 4),
    ):
        models: dict[str, Mapping[str, Any]] = {member: known[member][0] for member in members}
        if name == "imagenet":
            models["efficientnet-lite1"] = {"name": "efficientnet-lite1", "image_size": 224}
        if name == "tiny-imagenet-20" and (names is None or name in names):
            for architecture in trained.ARCHITECTURES:
                for seed in range(trained.SEEDS):
                    path = trained.weights(shared, build, architecture, seed)
                    of = {"name": architecture, "image_size": 64, "weights": str(path)}
                    models[f"{architecture.split('_')[0]}-{seed}"] = of
        found[name] = Group(dict(sorted(models.items())), known[members[0]][1], 8 / 255, *sizes)
    return found


def attacks(others: Tensor, kernel: int, neighbours: int) -> dict[str, tuple[Any, dict[str, Any]]]:
    """The attacks by name; `others` are what Admix draws from."""
    links = [smooth(gaussian(kernel))]
    return {
        "MI": (MIFGSM, {}),
        "DI-MI": (DIFGSM, {}),
        "TI-MI": (TIFGSM, {"links": links}),
        f"VMI, {neighbours} neighbours": (VMIFGSM, {"links": [variance(neighbours)]}),
        "SI-NI": (SINIFGSM, {}),
        "Admix-MI": (MIFGSM, {"transform": admix(others, samples=1)}),
        "DI-TI-MI": (DIFGSM, {"links": links}),
    }


def tables(
    shared: Path, build: Path, limit: int, names: list[str] | None, sources: list[str] | None = None
) -> Iterator[tuple[str, list[Row]]]:
    """Of each source of the groups in `names`, a row per attack and form: which of at most `limit` images fool which
    model, "1" for those that do."""
    for name, group in groups(shared, build, names).items():
        if names and name not in names:
            continue
        loaded = {model: _loaded(spec) for model, spec in group.models.items()}
        images, labels = _known_to_all(list(loaded.values()), group.data, limit + 50)
        count = min(limit, len(images) - 10)
        images, others, labels = images[:count], images[count:], labels[:count]
        for source in loaded:
            if not sources or source in sources:
                yield source, list(_rows(name, group, loaded, source, images, others, labels))


def _rows(
    name: str,
    group: Group,
    loaded: Mapping[str, Classifier],
    source: str,
    images: Tensor,
    others: Tensor,
    labels: Tensor,
) -> Iterator[Row]:
    every = attacks(others, group.kernel, group.neighbours)
    for attack, (kind, more) in islice(every.items(), group.attacks):
        options = {"eps": group.eps, "alpha": group.eps / 10, "steps": 10, "loss": "ce", "keep": "last", **more}
        for form, scope in FORMS.items():
            result = kind(loaded[source].model, scope=scope, **options).run(
                images, labels, seeds=range(len(images)), batch_size=10 if images.shape[-1] > 64 else 50
            )
            row: Row = {"group": name, "attack": attack, "form": form, "eps * 255": round(255 * group.eps, 4),
                        "gradients": int(result.gradient_calls.max())}  # fmt: skip
            for target, classifier in loaded.items():
                held = fooled(classifier.model, result.adversarials, labels)
                row[f"fools {target}"] = "".join(map(str, held.int().tolist()))
            yield row


def _loaded(spec: Mapping[str, Any]) -> Classifier:
    return load_classifier(spec["name"], spec.get("weights"), spec.get("image_size"))


def _known_to_all(models: Sequence[Classifier], data: Mapping[str, str], limit: int) -> tuple[Tensor, Tensor]:
    """The first images of each class in turn, as the first model takes them, that all classify correctly."""
    first_model = models[0]
    dataset = load_dataset(data["source"], first_model, Path(data["labels"]) if "labels" in data else None)
    order = defaults.in_turns(dataset.labels)
    images, labels, found = [], [], 0
    for first in range(0, len(order), 50):
        if found >= limit:
            break
        x = torch.stack([dataset.load(k, first_model.preprocessing) for k in order[first : first + 50]])
        y = torch.tensor([dataset.labels[k] for k in order[first : first + 50]])
        wrong = torch.stack([fooled(of.model, x, y) for of in models]).any(0)
        images.append(x[~wrong])
        labels.append(y[~wrong])
        found += int((~wrong).sum())
    return torch.cat(images)[:limit], torch.cat(labels)[:limit]


@dataclass(frozen=True)
class Compared:
    """One attack's two forms from models of one kind to models of another.

    Attributes:
        plain, orthogonal: (P, N), is image n fooled, for each of P pairs of a source and a target.
    """

    plain: NDArray[np.bool_]
    orthogonal: NDArray[np.bool_]

    @classmethod
    def joined(cls, parts: Sequence[Compared]) -> Compared:
        """The pairs of all `parts`, of the same images."""
        return cls(np.concatenate([of.plain for of in parts]), np.concatenate([of.orthogonal for of in parts]))

    @property
    def pairs(self) -> list[Paired]:
        """Each pair of models: the first is what plain does not fool, so that a difference above 0 is a loss of the
        orthogonal form's."""
        return [Paired.of(~ortho, ~plain) for plain, ortho in zip(self.plain, self.orthogonal, strict=True)]

    def rate(self, form: str) -> float:
        """The share fooled, over all pairs."""
        return float(getattr(self, form).mean())

    @property
    def loss(self) -> float:
        """By how much less the orthogonal form fools."""
        return self.rate("plain") - self.rate("orthogonal")

    def interval(self) -> tuple[float, float]:
        """That of `loss`, 95 %: Tango's of one pair.

        Of several, which share their images, Wald's of the mean over the pairs, with half an image added to each of the
        four cells (Agresti & Min 2005, doi:10.1002/sim.1781): with few differences a bootstrap would be too narrow.
        """
        if len(self.plain) == 1:
            interval = self.pairs[0].interval()
            assert interval is not None
            return interval
        each = (self.plain.astype(float) - self.orthogonal).mean(0)
        n = len(each) + 2
        middle = each.sum() / n
        half = 1.959963984540054 * math.sqrt(((each**2).sum() + 1) / n - middle**2) / math.sqrt(n)
        return float(middle - half), float(middle + half)


def kind(model: str) -> str:
    """A model's name without its seed."""
    return re.sub(r"-\d+$", "", model)


def by_seed(stored: Sequence[Table], group: str) -> dict[int, list[Table]]:
    """For each seed that the names of a group's sources end in, what is stored of networks with this seed or none."""
    mine = [table for table in stored if table.rows[0]["group"] == group]
    suffixes = sorted({table.name.removeprefix(kind(table.name)) for table in mine} - {""})

    def belongs(key: str, suffix: str) -> bool:
        return key.removeprefix(kind(key)) in ("", suffix)

    return {
        int(suffix[1:]): [
            table.model_copy(
                update={"rows": [{key: x for key, x in row.items() if belongs(key, suffix)} for row in table.rows]}
            )
            for table in mine
            if belongs(table.name, suffix)
        ]
        for suffix in suffixes
    }


def compared(stored: Sequence[Table], group: str) -> dict[tuple[str, str], dict[str, Compared]]:
    """By source and target, both without seeds, and attack."""
    found: dict[tuple[str, str], dict[str, dict[str, list[NDArray[np.bool_]]]]] = {}
    for table in stored:
        for row in table.rows:
            if row["group"] != group:
                continue
            for key, digits in row.items():
                target = key.removeprefix("fools ")
                if target in (key, table.name):
                    continue
                forms = found.setdefault((kind(table.name), kind(target)), {}).setdefault(row["attack"], {})
                forms.setdefault(row["form"], []).append(np.array(list(digits)) == "1")
    return {
        pair: {attack: Compared(*(np.stack(forms[form]) for form in FORMS)) for attack, forms in of.items()}
        for pair, of in found.items()
    }

"""Which class each image is to become, in a targeted run: the same for all attacks."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from orthattack.attacks.goals import least_likely
from orthattack.eval.data.classes import read_table
from orthattack.eval.data.dataset import ImageDataset
from orthattack.eval.errors import EvaluationError
from orthattack.eval.running.judge import Judge


class Targets:
    """The classes to reach of a data set's images.

    Args:
        how: "random", drawn for each image from a seed and its name; "least-likely", the class with the smallest logit
            at the clean image; or a CSV file with columns file, an image's name, and target, a class index.
        dataset: the images.
        classes: how many classes the model has.

    Raises:
        EvaluationError: a file that cannot be read, or that leaves an image without a class other than its own.
    """

    def __init__(self, how: str, dataset: ImageDataset, classes: int) -> None:
        self.how, self._dataset, self._classes = how, dataset, classes
        self._listed: dict[str, int] = {}
        if how in ("random", "least-likely"):
            return
        path = Path(how)
        columns, rows = read_table(path, "targets")
        if not {"file", "target"} <= set(columns):
            raise EvaluationError(f"{path} must have columns file and target; it has {', '.join(columns) or 'none'}")
        for line, row in rows:
            if not re.fullmatch(r"\s*\d{1,9}\s*", row["target"] or ""):
                raise EvaluationError(f"{path}, line {line}: target must be a class index >= 0; got {row['target']!r}")
            self._listed[row["file"]] = int(row["target"])
        for name, label in zip(dataset.names, dataset.labels, strict=True):
            target = self._listed.get(name)
            if target is None:
                raise EvaluationError(f"{path} has no target for {name!r}: each image needs a row")
            if not 0 <= target < classes or target == label:
                raise EvaluationError(
                    f"{path}: the target of {name!r} must be a class below {classes} and not its label; got {target}"
                )

    def fingerprint(self) -> str:
        """What a run's manifest says of them, so that another file is another run."""
        if not self._listed:
            return self.how
        listed = [self._listed[name] for name in self._dataset.names]
        return f"listed, SHA-256 {hashlib.sha256(json.dumps(listed).encode()).hexdigest()[:16]}"

    def of(self, positions: Sequence[int], images: Tensor, seed: int, judge: Judge) -> Tensor:
        """(N,) the class to reach of the images at these positions, never their labels."""
        labels = torch.tensor([self._dataset.labels[k] for k in positions], device=images.device)
        if self.how == "least-likely":
            return least_likely(torch.stack(judge.logits(images)).mean(0).nan_to_num(), labels)
        names = [self._dataset.names[k] for k in positions]
        if self.how == "random":
            drawn = torch.tensor([_drawn(seed, name, self._classes - 1) for name in names], device=images.device)
            return drawn + (drawn >= labels)
        return torch.tensor([self._listed[name] for name in names], device=images.device)


def _drawn(seed: int, image: str, count: int) -> int:
    """A number below `count`, of the run's seed and the image alone."""
    digest = hashlib.sha256(json.dumps([seed, image, "target"]).encode()).digest()
    return int.from_bytes(digest, "big") % count

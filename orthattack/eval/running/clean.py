"""Clean accuracy alone: what tells in seconds whether model, preprocessing and labels fit, before any attack."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from itertools import zip_longest

import pandas as pd
import torch
from torch import Tensor

from orthattack.eval.attacks.counter import CallCounter
from orthattack.eval.attacks.seeds import drawing, joint_seed
from orthattack.eval.checks.clean import CLEAN_COLUMNS, clean_suspicions
from orthattack.eval.data.dataset import ImageDataset
from orthattack.eval.data.prefetch import Decoder
from orthattack.eval.errors import FAILURES, EvaluationError, out_of_memory, told
from orthattack.eval.models.classifier import Classifier
from orthattack.eval.results.rates import Rate
from orthattack.eval.running.judge import Judge, check_batches, clean_columns
from orthattack.eval.running.worker import Inputs
from orthattack.eval.suite import Suite


@dataclass(frozen=True)
class Clean:
    """A model on clean images.

    Attributes:
        model: its label.
        rows: of each image that could be read and classified, `label`, `prediction`, and whether that is `right`.
        left_out: why others were not, and how many for each reason.
        names: of the classes, where they are known.
        warnings: what looks like a mistake.
    """

    model: str
    rows: pd.DataFrame
    left_out: Counter[str]
    names: tuple[str, ...] | None
    warnings: tuple[str, ...]

    def accuracy(self, label: int | None = None) -> Rate:
        """Over all images, or those of one class."""
        rows = self.rows if label is None else self.rows[self.rows["label"] == label]
        return Rate(int(rows["right"].sum()), len(rows))

    def taken_for(self, label: int) -> int | None:
        """As which other class images of a class are most often classified, if any are."""
        wrong = self.rows.loc[(self.rows["label"] == label) & ~self.rows["right"], "prediction"]
        return None if wrong.empty else int(wrong.mode()[0])

    @property
    def labels(self) -> list[int]:
        """The classes that there are images of, in order."""
        return sorted(set(self.rows["label"].tolist()))

    def name(self, label: int) -> str:
        """What a class is called."""
        return str(label) if self.names is None else self.names[label]


def clean(suite: Suite, inputs: Inputs, device: torch.device | str) -> Iterator[Clean]:
    """Each model of a suite on its clean images, judged as a run judges them. EvaluationError: as a run's, or a model
    that fails on an image."""
    device = torch.device(device)
    for spec in suite.models:
        classifier = inputs.classifier(spec.label)
        check_batches(classifier, suite.batch_size)
        dataset = inputs.dataset(classifier)
        judge = Judge(
            CallCounter(classifier.model.to(device)).eval(), classifier.preprocessing.crop, device, suite.batch_size
        )
        left_out = Counter[str]()
        found = []
        for positions, images in _batches(dataset, classifier, suite.batch_size, left_out):
            labels = torch.tensor([dataset.labels[k] for k in positions], device=device)
            try:
                with drawing(joint_seed(positions)):
                    columns = clean_columns(judge, images.to(device), labels, with_gradient=False)
            except FAILURES as error:
                if out_of_memory(error):
                    raise
                raise EvaluationError(f"{spec.label} fails on {dataset.names[positions[0]]} ({told(error)})") from error
            found.append(pd.DataFrame({**columns, "label": labels.tolist()}))
        rows = pd.concat(found) if found else pd.DataFrame(columns=[*CLEAN_COLUMNS, "label", "prediction", "message"])
        rows["right"] = rows["wrong_share"] <= 0.5
        ok = rows["status"] == "ok"
        left_out.update(rows.loc[~ok, "message"])
        warnings = (*classifier.notes, *dataset.notes, *clean_suspicions(rows[ok], classifier.num_classes))
        names = classifier.classes or dataset.classes
        yield Clean(spec.label, rows.loc[ok, ["label", "prediction", "right"]], left_out, names, warnings)


def _batches(
    dataset: ImageDataset, classifier: Classifier, size: int, left_out: Counter[str]
) -> Iterator[tuple[list[int], Tensor]]:
    """Positions and images, the next ones decoded meanwhile; why an image cannot be read is counted."""
    decoder = Decoder(partial(dataset.load, preprocessing=classifier.preprocessing), ahead=not dataset.is_foreign)
    batches = [range(len(dataset))[k : k + size] for k in range(0, len(dataset), size)]
    try:
        for batch, following in zip_longest(batches, batches[1:], fillvalue=range(0)):
            taken = decoder.take(batch)
            decoder.begin(following)
            images = {k: image for k, image in taken.items() if isinstance(image, Tensor)}
            left_out.update(getattr(taken[k], "reason", str(taken[k])) for k in taken.keys() - images.keys())
            if images:
                yield [*images], torch.stack([*images.values()])
    finally:
        decoder.close()

"""A detector beside a classifier: what scores images, the more suspicious the larger, and is told no labels."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from orthattack.eval.attacks.seeds import drawing
from orthattack.eval.errors import FAILURES, EvaluationError, told
from orthattack.eval.models.classifier import Classifier
from orthattack.eval.plugin import kept_process
from orthattack.lending import guarded

DetectorMaker = Callable[[nn.Module], Any]
"""A person's function: of the classifier it makes a function, or a module, of images (N, 3, H, W) to scores (N,)."""


class Detector:
    """A detector on a device, to which its model goes, in evaluation mode. It is handed copies of the images, a batch
    at a time.

    Raises:
        EvaluationError: it cannot be made, or does not score two grey images.
    """

    def __init__(self, make: DetectorMaker, classifier: Classifier, device: torch.device) -> None:
        self._model, size, self.device = classifier.model.eval().to(device), classifier.preprocessing.crop, device
        try:
            with self._at_work(), drawing(0):
                self._score = make(self._model)
                if isinstance(self._score, nn.Module):
                    self._score = self._score.eval().to(device)
            with drawing(0):
                self.scores(torch.full((2, 3, size, size), 0.5, device=device), 2)
        except FAILURES as error:
            why = f"the detector fails on {classifier.name}, given a grey image: {told(error)}"
            raise EvaluationError(why) from error

    def scores(self, images: Tensor, batch_size: int) -> list[float]:
        """The score of each image, NaN where it has none."""
        with self._at_work(), torch.no_grad():
            found = [self._scored(part.clone()) for part in torch.split(images, batch_size)]
        numbers: list[float] = torch.cat(found).double().tolist()
        return numbers

    def _scored(self, images: Tensor) -> Tensor:
        scores, count = self._score(images), len(images)
        if not isinstance(scores, Tensor) or scores.shape not in ((count,), (count, 1)):
            what = f"shape {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
            raise ValueError(f"detector must return one score per image, a tensor of shape ({count},); got {what}")
        return scores.detach().reshape(-1).cpu()

    @contextmanager
    def _at_work(self) -> Iterator[None]:
        """What it changes of the process or the model is put back, and a changed model is an error."""
        with kept_process(), guarded(self._model, who="the detector", may_draw=True):
            yield

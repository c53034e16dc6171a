"""The steps and the results of an evaluation in TensorBoard: the example of a logger for any other dashboard."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from orthattack.attacks.task import ScoredStep
from orthattack.eval.errors import EvaluationError
from orthattack.eval.results.stored_run import Run
from orthattack.eval.storage.run_folder import shown_eps

__all__ = ["TensorBoard"]


class TensorBoard:
    """An `on_step` of `evaluate` that adds steps up over batches, and writes their means when it is closed.

    Scalars are called MODEL/ATTACK/EPS/WHAT: fooled, loss, margin and norm at each step, over the images still attacked
    there, and robust accuracy and success rate of `results`.

    Args:
        folder: where TensorBoard looks: ``tensorboard --logdir FOLDER``.

    Raises:
        EvaluationError: tensorboard is not installed.
    """

    def __init__(self, folder: Path | str) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise EvaluationError("TensorBoard needs tensorboard: pip install 'orthattack[tensorboard]'") from error
        self._writer = SummaryWriter(str(folder))
        self._sums: dict[tuple[str, int], Tensor] = {}

    def __call__(self, model: str, attack: str, eps: float | None, step: ScoredStep) -> None:
        """Take note of a batch of points that was scored."""
        values = [torch.ones_like(step.norm), step.success, step.loss, step.margin, step.norm]
        # Where the points are: nothing waits for a GPU.
        found = torch.stack([value.double() for value in values]).sum(1)
        key = _tag(model, attack, eps), step.step
        self._sums[key] = self._sums[key] + found if key in self._sums else found

    def results(self, run: Run) -> None:
        """Write the rates of a run."""
        for row in run.table().to_dict("records"):
            tag = _tag(row["model"], row["attack"], row["eps"], run.norm)
            for name in ("robust_accuracy", "success_rate"):
                if row[name] is not None:
                    self._writer.add_scalar(f"{tag}/{name}", row[name])

    def close(self) -> None:
        """Write the steps, and end the file."""
        for (tag, step), total in self._sums.items():
            count, *sums = total.tolist()
            for name, value in zip(("fooled", "loss", "margin", "norm"), sums, strict=True):
                self._writer.add_scalar(f"{tag}/{name}", value / count, step)
        self._sums.clear()
        self._writer.close()

    def __enter__(self) -> TensorBoard:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _tag(model: str, attack: str, eps: float | None, norm: str = "linf") -> str:
    return "/".join(part.replace("/", "_") for part in (model, attack, shown_eps(eps, norm)))

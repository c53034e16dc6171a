"""AutoAttack: gradient attacks with two losses and a query attack in sequence, each on what the others left."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor

from orthattack.arguments import check_count
from orthattack.attacks.ascent import Climb
from orthattack.attacks.base import Attack, GradientOptions
from orthattack.attacks.rules import AutoStep
from orthattack.attacks.scoring import NoGradientError
from orthattack.attacks.square import SquareSearch
from orthattack.attacks.task import Merit, Task
from orthattack.losses import Goal, attack_loss
from orthattack.models import Model
from orthattack.threat import Norm

if TYPE_CHECKING:
    from typing_extensions import Unpack


@dataclass(frozen=True)
class _Sequence:
    """The clean image, APGD on the cross-entropy, APGD towards the likeliest other classes, random squares."""

    steps: int
    targets: int
    queries: int
    merit: Merit = "margin"

    def __post_init__(self) -> None:
        for name in ("steps", "targets", "queries"):
            check_count(name, getattr(self, name))

    def options(self, eps: float | Tensor) -> dict[str, object]:  # noqa: ARG002
        return {"steps": self.steps, "targets": self.targets, "queries": self.queries}

    def __call__(self, task: Task, start: Tensor | None = None) -> None:
        task = replace(task, early_stop=True)  # a sample that has fallen needs nothing more
        images = task.region.images.to(task.region.dtype)
        task.score(images.clone(), 0, with_gradient=False)
        if start is not None:
            task.score(start, 0, with_gradient=False)
        if (left := task.unsolved()) is None:
            return
        try:
            self._climb(task, left)
        except NoGradientError:  # a model that autograd does not see through is what the squares are for
            task.best.skip(left.index)
        if (left := task.unsolved()) is not None:
            SquareSearch(self.queries)(left, None)

    def _climb(self, task: Task, standing: Task) -> None:
        """Both losses, on what is still `standing` of the task."""
        climb = Climb(AutoStep(), self.steps, rate=2.0, random_start=True)
        climb(replace(standing, loss=attack_loss("ce")), None)
        if (left := task.unsolved()) is None:
            return
        logits = left.oracle.logits(left.region.images.to(left.region.dtype), left.goal)
        classes = logits.shape[1]
        loss = attack_loss("dlr" if classes >= 4 else "margin")
        if left.goal.labels is None:
            climb(replace(left, loss=loss), None)
            return
        others = logits.scatter(1, left.goal.labels.unsqueeze(1), float("-inf"))
        ranked = others.argsort(dim=1, descending=True, stable=True)
        for k in range(min(self.targets, classes - 1)):
            goal = Goal(left.goal.labels, ranked[:, k])
            climb(replace(left, goal=goal, loss=loss), None)


class AutoAttack(Attack):
    """A parameter-free sequence after Croce & Hein 2020 (arXiv:2003.01690), each part on the samples still standing:

    1. the image itself, which may be misclassified already;
    2. APGD on the cross-entropy;
    3. APGD on the targeted DLR loss, towards each of the likeliest other classes in turn (the margin to them for a
       model with fewer than 4 classes);
    4. `Square`, which needs no gradient: what only it finds, the gradients were hiding.

    The published sequence has FAB between 3 and 4; it is not part of this one. A sample is dropped from the batch at
    the first point that fools the model. `AttackResult.loss` is the margin.

    Args:
        model: as for `PGD`, like `norm` and `eps`.
        steps: gradient steps of each APGD, at least 1.
        targets: how many other classes to try, at least 1.
        queries: evaluations per sample by the query attack, at least 1.
        **options: as for `PGD`; `loss` and `early_stop` make no difference.
    """

    def __init__(
        self,
        model: Model,
        norm: Norm = "linf",
        eps: float | Tensor = 4 / 255,
        steps: int = 100,
        targets: int = 9,
        queries: int = 5000,
        **options: Unpack[GradientOptions],
    ) -> None:
        super().__init__(model, norm, eps, _Sequence(steps, targets, queries), **options)


class OrthoAutoAttack(AutoAttack, scope="image"):
    """`AutoAttack` with every part orthogonal to the image: OrthoAPGD on both losses, then OrthoSquare.

    Args:
        model: arguments as for `AutoAttack`.
    """

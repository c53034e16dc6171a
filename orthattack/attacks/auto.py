"""AutoAttack: published attacks in sequence, each on what the others left."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from torch import Tensor
from typing_extensions import Unpack

from orthattack.arguments import check_choice, check_count, check_flag
from orthattack.attacks.apgd import climb_of
from orthattack.attacks.base import Attack, GradientOptions
from orthattack.attacks.fab import BoundarySearch
from orthattack.attacks.scoring import NoGradientError
from orthattack.attacks.square import SquareSearch
from orthattack.attacks.task import AttackResult, Merit, Task
from orthattack.losses import LossName, attack_loss
from orthattack.models import Model
from orthattack.threat import Norm

Part = Literal["apgd-ce", "apgd-dlr", "apgd-t", "fab", "fab-t", "square"]
Version = Literal["standard", "plus", "rand"]

VERSIONS: dict[Version, tuple[Part, ...]] = {
    "standard": ("apgd-ce", "apgd-t", "fab-t", "square"),
    "plus": ("apgd-ce", "apgd-dlr", "fab", "square", "apgd-t", "fab-t"),
    "rand": ("apgd-ce", "apgd-dlr"),
}
"""The published sequences."""


@dataclass(frozen=True)
class _Sequence:
    """The clean image, then each part on what still stands."""

    parts: tuple[Part, ...]
    steps: int
    targets: int
    queries: int
    restarts: int
    verbose: bool
    merit: Merit = "margin"

    def __post_init__(self) -> None:
        for name in ("steps", "targets", "queries", "restarts"):
            check_count(name, getattr(self, name))
        check_flag("verbose", self.verbose)

    def options(self, eps: float | Tensor) -> dict[str, object]:  # noqa: ARG002
        return {"steps": self.steps, "targets": self.targets, "queries": self.queries, "parts": list(self.parts)}

    def __call__(self, task: Task, start: Tensor | None = None) -> None:
        task = replace(task, early_stop=True)  # a sample that has fallen needs nothing more
        for piece, begin in task.pieces(start):
            piece.score(piece.region.images.to(piece.region.dtype).clone(), 0, with_gradient=False)
            if begin is not None:
                piece.score(begin, 0, with_gradient=False)
        self._tell(task, "the images themselves", time.perf_counter())
        is_blind = False
        for number, part in enumerate(self.parts):
            if (left := task.unsolved()) is None:
                return
            began, fallen = time.perf_counter(), task.best.success.clone()
            try:
                if part == "square" or not is_blind:
                    self._run(part, left)
            except NoGradientError:  # a model that autograd does not see through is what the squares are for
                if "square" not in self.parts:
                    raise
                is_blind = True
                task.best.skip(left.index)
            task.best.part.masked_fill_(task.best.success & ~fallen, number)
            self._tell(task, part, began)

    def _run(self, part: Part, left: Task) -> None:
        if part == "square":
            SquareSearch(self.queries)(left, None)
            return
        if part in ("fab", "fab-t"):
            is_targeted = part == "fab-t"
            BoundarySearch(self.steps, 1 if is_targeted else self.restarts, self.targets if is_targeted else None)(left)
            return
        goals = [left.goal]
        loss: LossName = "ce"
        if part != "apgd-ce":
            classes = left.logits().shape[1]
            goals = left.towards(self.targets) if part == "apgd-t" else goals
            loss = "dlr" if classes >= (3 if goals[0].targets is None else 4) else "margin"
        restarts = 1 if part == "apgd-t" else self.restarts
        climb = climb_of(left.best.norm, self.steps, restarts)
        for goal in goals:
            climb(replace(left, goal=goal, loss=attack_loss(loss)), None)

    def _tell(self, task: Task, part: str, began: float) -> None:
        if self.verbose:
            n, standing = len(task.index), int((~task.best.success).sum())
            taken = time.perf_counter() - began
            said = f"robust accuracy after {part}: {standing / n:.2%} ({standing} of {n}; {taken:.1f} s)"
            print(said, flush=True)  # noqa: T201


class AutoAttack(Attack):
    """The ensemble of Croce & Hein 2020 (arXiv:2003.01690), nothing to tune, each part on the samples still standing.

    The image itself comes first, which may be misclassified already; then the parts of a `version`:

    - "standard": APGD on the cross-entropy ("apgd-ce"), APGD on the DLR loss towards each of the likeliest other
      classes ("apgd-t"), `FAB` towards each of them ("fab-t"), `Square` ("square"), which needs no gradient: what only
      it finds, the gradients were hiding;
    - "plus": APGD on the cross-entropy and on the untargeted DLR loss ("apgd-dlr") and FAB ("fab"), from 5 starts each,
      Square, then "apgd-t" and "fab-t";
    - "rand", for models that draw: APGD on the cross-entropy and on the DLR loss, with 20 `eot_samples`.

    A sample is dropped from the batch at the first point that fools the model, and `AttackResult.part` says which part
    found it. `AttackResult.loss` is the margin. For a model with too few classes for the DLR loss, it is the margin
    that is climbed.

    Args:
        model: as for `PGD`, like `norm` and `eps`.
        steps: gradient steps of each APGD and FAB, at least 1.
        targets: how many other classes to try, at least 1.
        queries: evaluations per sample by the query attack, at least 1.
        version: which of the published sequences.
        parts: other parts than the version's, in their order.
        restarts: starts of "apgd-ce", "apgd-dlr" and "fab"; by default the version's.
        verbose: print robust accuracy and time after each part.
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
        version: Version = "standard",
        parts: Sequence[Part] | None = None,
        restarts: int | None = None,
        verbose: bool = False,
        **options: Unpack[GradientOptions],
    ) -> None:
        check_choice("version", version, get_args(Version))
        chosen = VERSIONS[version] if parts is None else checked_parts(parts)
        if restarts is None:
            restarts = 5 if version == "plus" or (version == "standard" and norm == "l1") else 1
        if version == "rand":
            options.setdefault("eot_samples", 20)
        self.version = version
        super().__init__(model, norm, eps, _Sequence(chosen, steps, targets, queries, restarts, verbose), **options)

    def after_each_part(self, result: AttackResult) -> dict[str, float]:
        """Robust accuracy of a result: of the "clean" images, and after each part."""
        stood = ~result.success | (result.part >= 0)
        found = {"clean": float(stood.double().mean())}
        for number, part in enumerate(self.parts):
            stood = stood & ~(result.success & (result.part == number))
            found[part] = float(stood.double().mean())
        return found


def checked_parts(parts: object) -> tuple[Part, ...]:
    """Names of parts; ValueError if one is none, or comes twice."""
    known = get_args(Part)
    if isinstance(parts, str) or not isinstance(parts, Sequence) or not parts or len(set(parts)) < len(parts):
        raise ValueError(f"parts must be a list of one or more different ones of {', '.join(known)}; got {parts!r}")
    for part in parts:
        check_choice("each of parts", part, known)
    return tuple(parts)


class OrthoAutoAttack(AutoAttack, scope="image"):
    """`AutoAttack` with every part orthogonal to the image. Arguments as for `AutoAttack`."""

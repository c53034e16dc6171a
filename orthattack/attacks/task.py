"""What a search works on: some samples of a batch, what it may ask about them, and the best point of each so far."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from orthattack.arguments import check_count, same_values
from orthattack.attacks.gradient_form import GradientForm
from orthattack.attacks.numbers import Draws, Streams
from orthattack.attacks.scoring import Evaluation, LossFunction, Oracle, Scorer
from orthattack.losses import Goal
from orthattack.threat import Norm, Region, ThreatModel, perturbation_norm

Keep = Literal["best", "last"]
Merit = Literal["loss", "margin", "norm"]
"""What says which of two points is better: the larger loss or margin, or, once both fool, the smaller norm."""


@dataclass(frozen=True, repr=False)
class AttackResult:
    """What an attack found, one entry per sample.

    Attributes:
        adversarials: (N, C, H, W), shape, dtype and device of the images.
        success: (N,) bool: the model, in its own precision, is fooled by exactly this adversarial (targeted: predicts
            the target).
        loss: (N,) the loss that the attack maximised, at the adversarial; negated if targeted. For attacks with
            several losses, the margin.
        steps: (N,) int64: gradient steps (Square: queries) from the start of its restart to the adversarial.
        cosine: (N,) largest ``|cos(delta, image)|`` over the vectors of the scope and with the directions, in float64.
        norm: (N,) norm of the perturbation, in the norm of the attack and in pixel units.
        zero_gradients: (N,) int64: at how many steps the loss had no usable gradient: zero, or not finite.
        forward_calls: (N,) int64: how often the model was evaluated on the sample.
        gradient_calls: (N,) int64: how often its gradient was.
        part: (N,) int64: which part of a sequence, such as `AutoAttack.parts`, fooled the sample, from 0; -1: none, or
            the image itself did.
        targets: (N,) int64: the class to reach; -1: any but the label.
    """

    adversarials: Tensor
    success: Tensor
    loss: Tensor
    steps: Tensor
    cosine: Tensor
    norm: Tensor
    zero_gradients: Tensor
    forward_calls: Tensor
    gradient_calls: Tensor
    part: Tensor
    targets: Tensor

    def __eq__(self, other: object) -> bool:
        """Whether all of it is the same."""
        return isinstance(other, AttackResult) and same_values(vars(self), vars(other))

    def __repr__(self) -> str:
        n = len(self.success)
        if n == 0:
            return "AttackResult: no images"
        norm, zero = self.norm.double(), self.samples_with_zero_gradient
        forwards, gradients = int(self.forward_calls.sum()), int(self.gradient_calls.sum())
        return (
            f"AttackResult: {int(self.success.sum())} of {n} fooled; norm {float(norm.median()):.4g} (median), "
            f"{float(norm.max()):.4g} (max); |cos| at most {float(self.cosine.max()):.2g};\n"
            f"{forwards} forward and {gradients} gradient calls"
            + (f", no usable gradient at least once for {zero} of {n}" if zero else "")
        )

    @property
    def samples_with_zero_gradient(self) -> int:
        """How many samples met a zero gradient at least once, which a masked gradient or a saturated loss makes."""
        return int((self.zero_gradients > 0).sum())


@dataclass(frozen=True)
class ScoredStep:
    """What `on_step` is told of each batch of points that is scored, one entry per sample; all copies.

    Attributes:
        step: number of the iterate, from 0 in each restart; of `Square`, of the query.
        index: (n,) positions in the batch: those that are still attacked.
        success: (n,) bool: whether the model is fooled. Where a pass only claims that, as in reduced precision, it is
            the claim.
        loss: (n,) what is climbed.
        margin: (n,) how far beyond the goal the logits are.
        norm: (n,) of the perturbation, in the norm of the attack and in pixel units.
    """

    step: int
    index: Tensor
    success: Tensor
    loss: Tensor
    margin: Tensor
    norm: Tensor


OnStep = Callable[[ScoredStep], object]


class Best:
    """The best point of each sample so far, and what it took.

    Args:
        images: (N, C, H, W) the clean ones.
        by: what makes a point better than another that fools as well, or as little; by "norm", the larger margin until
            something fools.
        norm: of the perturbation, in the norm of the threat model.
        keep: "last": what was offered last is the best.
    """

    def __init__(self, images: Tensor, by: Merit = "loss", norm: Norm = "linf", keep: Keep = "best") -> None:
        n, device = len(images), images.device
        self.success = torch.zeros(n, dtype=torch.bool, device=device)
        self.adversarials = images.clone()
        self.exact = torch.zeros_like(self.success)
        self.by: Merit = by
        self.images, self.norm, self._keeps_last = images, norm, keep == "last"
        self._merit = torch.full(
            (n,), -torch.inf, dtype=torch.promote_types(images.dtype, torch.float32), device=device
        )
        self._loss = self._merit.clone()  # which the merit is too, unless it is a norm
        self._steps, self._zero, self._forwards, self._gradients, self.stuck = torch.zeros(
            5, n, dtype=torch.long, device=device
        )
        self.unanswered = torch.zeros_like(self.success)  # whether some point's margin was not finite
        self.part, self.targets = torch.full_like(self._steps, -1), torch.full_like(self._steps, -1)

    def offer(
        self, index: Tensor, points: Tensor, evaluation: Evaluation, step: int, allowed: Tensor | None = None
    ) -> None:
        """Keep each of `points`, candidates of the samples at `index` or `allowed` ones of them, that beats what there
        is."""
        success, loss = evaluation.success, self._told(evaluation)
        merit = loss
        if self.by == "norm":
            length = perturbation_norm(points.double() - self.images[index].double(), self.norm)
            merit = torch.where(success, -length.to(merit.dtype), merit)
        better = success & ~self.success[index]
        # The later of two equals: a confident model's loss is exactly 0 long before its gradient is.
        better |= (success == self.success[index]) & (merit >= self._merit[index])
        better = torch.ones_like(better) if self._keeps_last else better
        better = better if allowed is None else better & allowed
        self._zero[index] += evaluation.unusable
        self.stuck[index] += evaluation.stuck
        self.unanswered[index] |= ~evaluation.margin.isfinite()
        self.count(index, evaluation.forward_calls, evaluation.gradient_calls)
        steps = torch.full_like(self._steps[index], step)
        kept = self.adversarials, self.success, self._merit, self._loss, self._steps, self.exact
        rows = None if points.is_cuda or len(index) == len(self.success) else index[better]  # which would stop a GPU
        for old, new in zip(kept, (points, success, merit, loss, steps, evaluation.exact), strict=True):
            chosen = better.view(-1, *[1] * (old.ndim - 1))
            if len(index) == len(old):  # all samples, in order: one pass
                torch.where(chosen, new, old, out=old)
            elif rows is None:
                old[index] = torch.where(chosen, new, old[index])
            else:
                old[rows] = new[better]

    def count(self, index: Tensor, forward_calls: Tensor | int, gradient_calls: Tensor | int = 0) -> None:
        """Count calls of the model for the samples at `index`."""
        self._forwards[index] += forward_calls
        self._gradients[index] += gradient_calls

    def skip(self, index: Tensor) -> None:
        """Count a step without a gradient for the samples at `index`, which no step was taken for."""
        self._zero[index] += 1
        self.stuck[index] += 1

    def judge(self, rows: Tensor, evaluation: Evaluation) -> None:
        """Replace success and loss by those of a final evaluation of the adversarials at `rows`."""
        self.success[rows] = evaluation.success
        self._loss[rows] = self._told(evaluation)
        self._forwards[rows] += evaluation.forward_calls

    def result(self, images: Tensor, threat: ThreatModel, size: int | None = None) -> AttackResult:
        """What was found; `size` samples are measured at a time, in float64."""
        count = max(1, len(images))
        parts = [slice(at, at + (size or count)) for at in range(0, count, size or count)]
        found = [threat.sizes(images[part], self.adversarials[part]) for part in parts]
        norm, cosine = (torch.cat(values) for values in zip(*found, strict=True))
        return AttackResult(
            self.adversarials, self.success, self._loss, self._steps, cosine, norm, self._zero, self._forwards,
            self._gradients, torch.where(self.success, self.part, -1), self.targets,
        )  # fmt: skip

    def _told(self, evaluation: Evaluation) -> Tensor:
        return (evaluation.loss if self.by == "loss" else evaluation.margin).to(self._merit.dtype)


class Turns:
    """Shared random numbers, alike for all samples, where some are searched after others: each search gets the same,
    and the stream is left where the one that draws most leaves it."""

    def __init__(self, shared: torch.Generator) -> None:
        self._shared, self._begin, self._farthest = shared, shared.get_state(), 0

    def next(self) -> Callable[..., Tensor]:
        """Draws, uniformly in float64, for one more search."""
        drawing, own = itertools.count(1), torch.Generator(self._shared.device).set_state(self._begin)

        def draw(*shape: int) -> Tensor:
            numbers = torch.rand(shape, generator=own, device=own.device, dtype=torch.float64)
            if (number := next(drawing)) > self._farthest:
                self._farthest = number
                self._shared.set_state(own.get_state())
            return numbers

        return draw


@dataclass
class Around:
    """Makes regions of some of all `images`, to be searched `size` at a time; of those `unseen` the oracle is to check
    its first answers."""

    images: Tensor
    threat: ThreatModel
    size: int
    oracle: Oracle
    unseen: int

    def __call__(self, index: Tensor) -> Region:
        if self.unseen > 0:
            self.oracle.unchecked, self.unseen = len(index), self.unseen - len(index)
        threat, eps = self.threat, self.threat.eps
        if isinstance(eps, Tensor) and eps.ndim > 0:
            threat = replace(threat, eps=eps[index.to(eps.device)])
        return threat.around(self.images[index])


@dataclass(frozen=True)
class Task:
    """What a search works on: some samples of a batch, and all that it may ask about them.

    Attributes:
        oracle: the model.
        loss: what to climb.
        goal: what counts as success.
        around: the allowed images, or what makes them when they are first needed.
        index: positions of these samples in the batch, for `best`.
        best: where to offer every point that was scored.
        early_stop: whether a sample is done as soon as it is fooled.
        streams: of random numbers.
        form: what is done to each direction before a step, for ``enforce="gradient"``.
        is_random: whether the model draws, so that a success is confirmed where it is found.
        on_step: who is told of every point that was scored.
        pulse: is told the number of each step, and nothing else of it, which costs nothing.
        limit: (n, 1, 1, 1) the radius of what may be found, where the region is larger than that; None: it is not.
        alike: draws the numbers that all samples share, where others are searched after these; see `Turns`.
    """

    oracle: Scorer
    loss: LossFunction
    goal: Goal
    around: Region | Around
    index: Tensor
    best: Best
    early_stop: bool
    streams: Streams
    form: GradientForm | None = None
    is_random: bool = False
    on_step: OnStep | None = None
    pulse: Callable[[int], object] | None = None
    limit: Tensor | None = None
    alike: Callable[..., Tensor] | None = None

    @property
    def region(self) -> Region:
        """The allowed images; ``region.images`` are the clean ones."""
        if not isinstance(self.around, Region):
            object.__setattr__(self, "around", self.around(self.index))
            return self.region
        return self.around

    @property
    def generator(self) -> torch.Generator:
        """Of random numbers that all samples share."""
        return self.streams.shared

    @property
    def draws(self) -> Draws:
        """Random numbers for these samples, each from its own stream."""
        return Draws(self.streams, self.index, self.region.images.dtype)

    def score(self, points: Tensor, step: int, with_gradient: bool, by_copy: bool = False) -> Evaluation:
        """Evaluate `points` of these samples, as they are stored, and offer them to `best`."""
        points = self.region.stored(points)
        # A sample that leaves the batch must be fooled for certain; the others are judged in the end. Every claim is
        # confirmed about a model that draws, so that points are compared by means over draws, and by the norm, where
        # a claim that does not hold would hide the larger one that does.
        solved = self.best.success[self.index] if self.early_stop else None
        if (self.is_random and solved is None) or self.best.by == "norm":
            solved = torch.zeros_like(self.index, dtype=torch.bool)
        allowed = None
        if self.limit is not None:  # what lies beyond it is asked about, and neither confirmed nor kept
            allowed = self.length(points) <= self.limit.flatten()
            solved = ~allowed if solved is None else solved | ~allowed
        if self.pulse is not None:
            self.pulse(step)
        self.region.release()
        evaluation = self.oracle.evaluate(
            points, self.goal, self.loss, solved, with_gradient, step, self.draws, by_copy
        )
        if allowed is not None:
            evaluation = replace(evaluation, success=evaluation.success & allowed)
        if evaluation.gradient is not None and self.region.threat.mask is not None:
            evaluation = replace(evaluation, gradient=self.region.masked(evaluation.gradient))
        self.best.offer(self.index, points, evaluation, step, allowed)
        if self.on_step is not None:
            told = (self.index, evaluation.success, evaluation.loss, evaluation.margin, self.length(points))
            self.on_step(ScoredStep(step, *(t.clone() for t in told)))
        return evaluation

    def length(self, points: Tensor, norm: Norm | None = None) -> Tensor:
        """(n,) the norms of the perturbations, in float64."""
        return perturbation_norm(points.double() - self.region.images.double(), norm or self.region.threat.norm)

    def gradient(self, points: Tensor) -> Tensor:
        """The loss's gradient (n, C, H, W) at any `points`: they need not be allowed, and are no candidates."""
        found = self.oracle.gradient(points, self.goal, self.loss, self.draws)
        self.best.count(self.index, found.forward_calls, found.gradient_calls)
        assert found.gradient is not None
        return self.region.masked(found.gradient)

    def select(self, rows: Tensor) -> Task:
        """The task for the samples at `rows`, positions in this task, only."""
        limit = None if self.limit is None else self.limit[rows]
        around = self.around.select(rows) if isinstance(self.around, Region) else self.around
        return replace(self, goal=self.goal.select(rows), around=around, index=self.index[rows], limit=limit)

    def pieces(self, start: Tensor | None = None) -> Iterator[tuple[Task, Tensor | None]]:
        """These samples, some after others if they are many, and where they start: points of their regions. What is as
        large as the images, some twenty tensors, is then as large as a piece."""
        if isinstance(self.around, Region):
            yield self, start
            return
        turns = Turns(self.generator)
        for rows in self._rows():
            piece = replace(self.select(rows), alike=turns.next())
            yield piece, start if start is None else piece.region.shrunk(start[rows].detach().to(self.best.images))

    def _rows(self) -> tuple[Tensor, ...]:
        rows = torch.arange(len(self.index), device=self.index.device)
        return (rows,) if isinstance(self.around, Region) else torch.split(rows, self.around.size)

    def logits(self) -> Tensor:
        """(n, K) of the model at the images."""
        images, rows = self.best.images, self._rows()
        return torch.cat([self.oracle.logits(images[self.index[r]], self.goal.select(r)) for r in rows])

    def random_start(self) -> Tensor:
        """A random point of the region, each sample's from its own stream."""
        kinds = {torch.rand: self.streams.uniform, torch.randn: self.streams.normal}
        return self.region.random_start(lambda shape, draws, dtype: kinds[draws](self.index, shape[1:], dtype))

    def uniform(self, *shape: int) -> Tensor:
        """Numbers in [0, 1) that are the same for all samples, in float64, where the generator is."""
        if self.alike is not None:
            return self.alike(*shape)
        return torch.rand(shape, generator=self.generator, device=self.generator.device, dtype=torch.float64)

    def towards(self, count: int) -> list[Goal]:
        """Goals towards each of the `count` likeliest other classes of the images, the likeliest first; the goal as it
        is if that is a target."""
        if self.goal.labels is None:
            return [self.goal]
        logits = self.logits()
        others = logits.scatter(1, self.goal.labels.unsqueeze(1), float("-inf"))
        ranked = others.argsort(dim=1, descending=True, stable=True)
        return [replace(self.goal, targets=ranked[:, k]) for k in range(min(count, logits.shape[1] - 1))]

    def unsolved(self) -> Task | None:
        """The task for the samples that no point fools yet, or None if there are none."""
        rows = (~self.best.success[self.index]).nonzero().squeeze(1)
        if len(rows) == len(self.index):
            return self
        return self.select(rows) if len(rows) > 0 else None


@dataclass(frozen=True)
class Counts:
    """A search whose options are counts, at least 1: its fields. None, as a default, and one restart go unsaid."""

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.default is not None or value is not None:
                check_count(field.name, value)

    def options(self, eps: float | Tensor) -> dict[str, Any]:  # noqa: ARG002
        return {name: n for name, n in vars(self).items() if n is not None and (name, n) != ("restarts", 1)}


class Search(Protocol):
    """Scores points of a task."""

    @property
    def merit(self) -> Merit:
        """What says which of two points is better."""

    def options(self, eps: float | Tensor) -> dict[str, Any]:
        """What the attack's repr shows of it, at a radius."""

    def __call__(self, task: Task, start: Tensor | None) -> None:
        """Search, from `start` (points of the region) if given."""

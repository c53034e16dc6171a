"""What an attack asks of a model: its loss, its success and its input gradient, checked."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Literal, Protocol, TypeVar

import torch
from torch import Tensor

from orthattack.arguments import check_labels
from orthattack.assumptions import DRAWS, NEEDED
from orthattack.attacks.numbers import Draws
from orthattack.losses import Goal, attack_loss, rival
from orthattack.models import Ensemble, Model, check_finite, checked_logits

Precision = Literal["float32", "bfloat16"]
LossFunction = Callable[[Tensor, Goal], Tensor]
Transform = Callable[[Tensor, Draws], Tensor]
"""Images (N, C, H, W) and random numbers to what gradients are taken at, (N, C', H', W'), differentiable."""

T = TypeVar("T")

_MARGIN = attack_loss("margin")


def has_bfloat16(device: torch.device) -> bool:
    """Whether a processor has arithmetic for bfloat16, and need not emulate it."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    if device.type != "cpu":
        return True
    capability = torch.backends.cpu.get_cpu_capability()
    if capability != "AVX512":  # AVX2: an x86 without; of others torch does not say
        return capability != "AVX2"
    # Newer releases of torch know which of those with AVX-512 have it.
    known = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return any(ask is None or ask() for ask in known)


class NoGradientError(ValueError):
    """A model is not connected to the images by autograd at all."""


@dataclass(frozen=True)
class Evaluation:
    """The model at a batch of points, per sample.

    Attributes:
        success: (N,) whether the goal is reached.
        loss: (N,) what the attack climbs.
        margin: (N,) how far beyond the goal the logits are, which compares points whatever the loss.
        gradient: (N, C, H, W) the way up, or None if not asked for.
        unusable: (N,) whether the loss had none: zero or not finite. Then it is the margin's.
        stuck: (N,) whether the margin had none either, and the gradient is zero now.
        forward_calls: (N,) evaluations of the model that this took.
        gradient_calls: (N,) differentiations.
        exact: (N,) whether the model itself, in its own precision, says all that; the rest are claims.
    """

    success: Tensor
    loss: Tensor
    margin: Tensor
    gradient: Tensor | None
    unusable: Tensor
    stuck: Tensor
    forward_calls: Tensor
    gradient_calls: Tensor
    exact: Tensor

    def select(self, index: Tensor) -> Evaluation:
        """The evaluation of the samples at `index` only."""
        return replace(self, **{name: value[index] for name, value in vars(self).items() if value is not None})

    @staticmethod
    def joined(parts: Sequence[Evaluation]) -> Evaluation:
        """The evaluations of consecutive samples as one."""
        known = [name for name, value in vars(parts[0]).items() if value is not None]
        return replace(parts[0], **{name: torch.cat([getattr(part, name) for part in parts]) for name in known})


class Scorer(Protocol):
    """What a search asks of a model, or of a model and a detector."""

    def evaluate(
        self, points: Tensor, goal: Goal, loss: LossFunction, solved: Tensor | None, with_gradient: bool, step: int = 0,
        draws: Draws | None = None, by_copy: bool = False,
    ) -> Evaluation:  # fmt: skip
        """Score `points`, iterate number `step`, and, if asked, say which way is up. Without a gradient the model does,
        or `by_copy` its faster copy, if there is one."""

    def gradient(self, points: Tensor, goal: Goal, loss: LossFunction, draws: Draws | None = None) -> Evaluation:
        """Which way is up at `points`, and no more than that: the rest is what the gradient's passes claim."""
        return self.evaluate(points, goal, loss, None, True, 0, draws)

    def judge(self, points: Tensor, goal: Goal, loss: LossFunction) -> Evaluation:
        """Score `points` for good, by the model itself: one that draws at random by several fresh answers."""

    def logits(self, points: Tensor, goal: Goal) -> Tensor:
        """The model's logits (N, K)."""


class Oracle:
    """A borrowed model: all that a search sees of it.

    Args:
        model: images to logits; what it says of a point is what counts.
        precision: of the passes that give gradients.
        gradient_model: what gradients are taken of in its place, or None.
        is_copy: whether that is a copy of the model, whose answers are claims about the model's.
        transforms: what is done to the points before these passes, one each: their gradients are averaged.
        eot_samples: how many passes are averaged for a model that draws at random: expectation over transformation
            (Athalye et al. 2018, arXiv:1707.07397). The loss, its gradient and the logits are means over them.
        is_random: whether the model draws at random. Then a success is only claimed by those logits; what confirms it
            are `NEEDED` of `DRAWS` fresh answers, single ones, however many are averaged.
        unchecked: for how many images, the next that are evaluated, labels and logits are checked.
    """

    def __init__(
        self,
        model: Model,
        precision: Precision = "float32",
        eot_samples: int = 1,
        gradient_model: Model | None = None,
        is_random: bool = False,
        unchecked: int = 0,
        is_copy: bool = True,
        transforms: Sequence[Transform] = (),
    ):
        self._model, self._samples, self._is_random, self.unchecked = model, eot_samples, is_random, unchecked
        self._gradient_model, self._transforms = model if gradient_model is None else gradient_model, transforms
        self._passes = eot_samples * max(1, len(transforms))  # for a gradient
        self._is_bfloat16 = precision == "bfloat16"
        self._is_rough = self._is_bfloat16 or gradient_model is not None
        self._has_copy = gradient_model is not None and is_copy
        # What the passes for gradients say is then nothing about the model, which is asked for itself.
        own = gradient_model is not None and not is_copy
        self._apart = " of ".join(["the transform"] * (len(transforms) > 0) + ["gradient_model"] * own)
        self._unwatched = {False, True}
        self._classes: dict[bool, int] = {}

    def evaluate(
        self, points: Tensor, goal: Goal, loss: LossFunction, solved: Tensor | None, with_gradient: bool,
        step: int = 0, draws: Draws | None = None, by_copy: bool = False,  # noqa: ARG002
    ) -> Evaluation:  # fmt: skip
        """Score `points` and, if asked, differentiate the loss there, in one forward pass per EOT sample.

        A rough pass, in reduced precision or by a faster copy, only claims a success, and so does every pass of a model
        that draws. For samples that are not `solved` yet, `judge` confirms it or not; with None the claim stands, for
        whoever asks to judge in the end. Without a gradient the pass is the model's own in full precision, or `by_copy`
        that of its copy, and the model's own is made too where the gradient is that of another model, or of
        transformed points. `step` is the number of the iterate, which makes a difference to other oracles.

        Where the loss is flat, a cross-entropy that is saturated for example, and the goal is not reached, the margin
        is climbed in its place: each sample for itself, in the same passes.
        """
        apart = with_gradient and self._apart != ""
        rough = self._is_rough and not apart if with_gradient else by_copy and self._has_copy
        calls = torch.full_like(goal.classes, self._passes if with_gradient else self._samples)
        own, forward_calls = None, calls
        if apart:
            asked = self._samples if self._is_random else 1
            own, forward_calls = self._pass(points, goal, loss, False, False, asked), calls + asked
        logits, value, gradient, unusable = self._pass(points, goal, loss, rough, with_gradient, None, draws)
        logits, value = (logits, value) if own is None else own[:2]
        success, margin = goal.reached(logits), goal.margin(logits)
        exact = torch.full_like(success, not rough)
        if (rough or self._is_random) and solved is not None:
            rows = (success & ~solved).nonzero().squeeze(1)
            success = torch.zeros_like(success)
            if len(rows) > 0:
                found = self.judge(points[rows], goal.select(rows), loss)
                success[rows], margin[rows], value[rows] = found.success, found.margin, found.loss
                exact[rows], forward_calls = True, forward_calls.index_add(0, rows, found.forward_calls)
        if self._is_random:  # its successes were picked for having been lucky, so they are judged anew in the end
            exact = ~success
        self.unchecked -= len(points)
        if gradient is None:
            no = torch.zeros_like(success)
            return Evaluation(success, value, margin, None, no, no, forward_calls, torch.zeros_like(calls), exact)
        gradient, stuck = _usable(gradient)
        return Evaluation(success, value, margin, gradient, unusable | stuck, stuck, forward_calls, calls, exact)

    def gradient(self, points: Tensor, goal: Goal, loss: LossFunction, draws: Draws | None = None) -> Evaluation:
        logits, value, gradient, unusable = self._pass(points, goal, loss, self._is_rough, True, None, draws)
        assert gradient is not None
        gradient, stuck = _usable(gradient)
        calls, reached = torch.full_like(goal.classes, self._passes), goal.reached(logits)
        exact = torch.zeros_like(stuck)
        return Evaluation(reached, value, goal.margin(logits), gradient, unusable | stuck, stuck, calls, calls, exact)

    def judge(self, points: Tensor, goal: Goal, loss: LossFunction) -> Evaluation:
        """Score `points` by the model itself: a success is one answer, or `NEEDED` of `DRAWS` if the model draws."""
        none = torch.zeros_like(goal.classes)
        no = torch.zeros_like(none, dtype=torch.bool)
        if not self._is_random:
            logits, value, *_ = self._pass(points, goal, loss, rough=False, with_gradient=False)
            calls = torch.full_like(none, self._samples)
            return Evaluation(goal.reached(logits), value, goal.margin(logits), None, no, no, calls, none, ~no)
        wrong = none
        values: list[Tensor] = []
        margins: list[Tensor] = []
        # As soon as no sample can still have enough of them, the rest of the draws is spared.
        while len(values) < DRAWS and bool((wrong + DRAWS - len(values) >= NEEDED).any()):
            logits, value, *_ = self._pass(points, goal, loss, rough=False, with_gradient=False, samples=1)
            wrong = wrong + goal.reached(logits)
            values.append(value)
            margins.append(goal.margin(logits))
        calls = torch.full_like(none, len(values))
        value, margin = torch.stack(values).mean(0), torch.stack(margins).mean(0)
        return Evaluation(wrong >= NEEDED, value, margin, None, no, no, calls, none, ~no)

    def logits(self, points: Tensor, goal: Goal) -> Tensor:
        """The logits (N, K) in full precision, the mean over the EOT samples."""
        return self._pass(points, goal, _MARGIN, rough=False, with_gradient=False)[0]

    def _pass(
        self, points: Tensor, goal: Goal, loss: LossFunction, rough: bool, with_gradient: bool,
        samples: int | None = None, draws: Draws | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:  # fmt: skip
        """Logits, loss and gradient, each the mean over the EOT samples, and over the transforms, one pass in memory at
        a time; and whether the loss was flat in all of them."""
        samples = self._passes if with_gradient else self._samples if samples is None else samples
        total: list[Tensor] = []
        for k in range(samples):
            if with_gradient:
                leaf = points.detach().requires_grad_()
                with torch.enable_grad(), _blamed(self._apart):
                    own = self._transforms[k % len(self._transforms)] if self._transforms else None
                    seen = leaf if own is None else _transformed(own, leaf, draws)
                    logits = self._forward(seen, goal, rough or self._apart != "")
                value, flat, gradient = _climbed(logits, goal, loss, leaf, True, self._apart or "the model")
                assert gradient is not None
                parts = [logits.detach(), value, flat.to(value.dtype), gradient]
            else:  # through which others, such as Foolbox's attacks, may differentiate for themselves
                logits = self._forward(points, goal, rough)
                value, flat, _ = _climbed(logits, goal, loss, points, False)
                parts = [logits, value, flat.to(value.dtype)]
            total = parts if not total else [a + b for a, b in zip(total, parts, strict=True)]
        means = total if samples == 1 else [part / samples for part in total]
        return means[0], means[1], means[3] if with_gradient else None, means[2] == 1

    def _forward(self, points: Tensor, goal: Goal, rough: bool) -> Tensor:
        written = points._version
        other = rough and self._apart != ""
        kept = points.detach().clone() if other in self._unwatched else None
        with torch.autocast(
            points.device.type, dtype=torch.bfloat16, enabled=rough and self._is_bfloat16 and points.requires_grad
        ):
            logits = (self._gradient_model if rough else self._model)(points)
        logits = checked_logits(logits, len(points))
        # With a gradient torch itself refuses what this counts; through `.data` or NumPy it goes uncounted.
        fine = [] if kept is None else [((points == kept) | (points.isnan() & kept.isnan())).all()]
        if self.unchecked > 0:
            inside = (goal.classes >= 0) & (goal.classes < logits.shape[1])
            fine += [logits.detach().isfinite().all(), inside.all()]
        if points._version != written or (fine and not bool(torch.stack(fine).all())):  # one question to a GPU
            if points._version != written or (kept is not None and not bool(fine[0])):
                raise ValueError(
                    "the model changes its input in place, and with it the adversarials: let it write images = images "
                    "- mean instead of images -= mean"
                )
            check_finite(logits.detach())
            check_labels(goal.classes, logits.shape[1])
        self._unwatched.discard(other)
        if self._classes.setdefault(other, logits.shape[1]) != logits.shape[1]:
            raise ValueError(
                f"model must return the same classes each time; got {self._classes[other]}, then {logits.shape[1]}"
            )
        return logits if logits.dtype.itemsize >= 4 else logits.float()


@contextmanager
def _blamed(what: str) -> Iterator[None]:
    """Name what takes the model's place in a pass, if anything does, in the errors there."""
    try:
        yield
    except (ValueError, TypeError, RuntimeError) as error:
        if what and not isinstance(error, torch.OutOfMemoryError):
            error.args = (f"{what}, in a pass for gradients: {error}",)
            if "transform" in what and isinstance(error, RuntimeError):  # torch's, of a shape or a dtype
                raise ValueError(str(error)) from error
        raise


def _transformed(transform: Transform, leaf: Tensor, draws: Draws | None) -> Tensor:
    """What a transform makes of a copy of the points; ValueError if that is no batch of as many."""
    assert draws is not None
    made = transform(leaf.clone(), draws)
    if not isinstance(made, Tensor) or made.ndim != 4 or len(made) != len(leaf) or not made.is_floating_point():
        found = f"{made.dtype} of shape {tuple(made.shape)}" if isinstance(made, Tensor) else type(made).__name__
        raise ValueError(f"transform must return a batch of as many images, {tuple(leaf.shape)}; got {found}")
    return made.clone()  # it may write into what it has returned


def _usable(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """A gradient with zeros for the samples whose own is zero or not finite anywhere, and which these are."""
    # NaN goes through both of these, and neither needs memory.
    largest = torch.maximum(gradient.amax((1, 2, 3)), -gradient.amin((1, 2, 3)))
    stuck = ~((largest > 0) & largest.isfinite())
    if gradient.is_cuda or bool(stuck.any()):  # asking would stop the GPU
        gradient = gradient.clone() if 0 in gradient.stride() else gradient  # a sum's is one number, expanded
        gradient.masked_fill_(stuck.view(-1, 1, 1, 1), 0)
    return gradient, stuck


def _climbed(
    logits: Tensor, goal: Goal, loss: LossFunction, points: Tensor, with_gradient: bool, who: str = "the model"
) -> tuple[Tensor, Tensor, Tensor | None]:
    """What is climbed at these logits, whether the loss itself is flat there, and the gradient by `points`.

    All per sample, (N,), (N,) and (N, C, H, W). The loss is differentiated by the logits first, and what comes of it
    then by the images: where it is nothing, the margin's slope takes its place, for one backward pass through the model
    in any case. A named loss's value is then the margin too, so that points of a plateau can be told apart. A
    cross-entropy is above 0 and the margin below where the goal is not reached, so they can be compared.
    """
    name = getattr(loss, "loss", None)
    name = "mean" if name is Ensemble.mean_loss else name
    if not with_gradient and name not in ("ce", "dlr", "mean"):
        value = loss(logits, goal)
        return value, torch.zeros_like(goal.classes, dtype=torch.bool), None
    source = logits.detach().requires_grad_()
    with torch.enable_grad():
        value = loss(source, goal)
        total = value.sum()
    slope = direct = None
    if total.requires_grad:
        # A function may depend on the images by another way than the logits, such as features it has kept.
        by = [source, points] if with_gradient and not isinstance(name, str) else [source]
        slope, direct = (*torch.autograd.grad(total, by, retain_graph=len(by) > 1, allow_unused=True), None)[:2]
    if slope is None and direct is None:
        raise ValueError("loss has no gradient with respect to the logits: compute it with differentiable functions")
    value = value.detach()
    if slope is None:
        return value, torch.zeros_like(goal.classes, dtype=torch.bool), direct
    # Below this a backward pass meets numbers that its dtype rounds to 0.
    limit = torch.finfo(points.dtype).tiny * (1 if points.dtype is torch.float16 else 1e8)
    largest = slope.abs().amax(1)
    flat = ~((largest > limit) & largest.isfinite())
    if name == "mean":  # of what softmax made of logits: flat in these where it is 0, and all others are nearly
        flat = flat | ((value == 0) & (_MARGIN(source.detach(), goal) < math.log(limit)))
    swap = flat
    if name == "ce":  # near log K for logits this close, where its digits and its slope hardly tell classes apart
        swap = swap | (source.amax(1) - source.amin(1) <= 1e-2)
    if slope.is_cuda or bool(swap.any()):  # asking would stop the GPU
        open_ = ~goal.reached(logits)
        flat, swap = flat & open_, swap & open_
        own = (goal.classes if goal.targets is None else goal.targets).unsqueeze(1)
        other = rival(source.scatter(1, own, -torch.inf), goal.rank)
        up = torch.zeros_like(slope).scatter(1, other, 1).scatter(1, own, -1)
        slope = torch.where(swap.unsqueeze(1), up if goal.targets is None else -up, slope)
        if isinstance(name, str):
            value = torch.where(swap, _MARGIN(source.detach(), goal), value)
    if not with_gradient:
        return value, flat, None
    return value, flat, input_gradient(logits, points, who, slope, direct)


class InBatches:
    """A scorer that is asked about at most `size` samples at a time, so that many fit into memory.

    The samples that still stand are packed anew at each step, so an attack that drops the fooled ones keeps its batches
    full to the end.
    """

    def __init__(self, scorer: Scorer, size: int) -> None:
        self._scorer, self._size = scorer, size

    def evaluate(
        self, points: Tensor, goal: Goal, loss: LossFunction, solved: Tensor | None, with_gradient: bool, step: int = 0,
        draws: Draws | None = None, by_copy: bool = False,
    ) -> Evaluation:  # fmt: skip
        def evaluate(r: Tensor, part: Draws | None) -> Evaluation:
            known = None if solved is None else solved[r]
            return self._scorer.evaluate(points[r], goal.select(r), loss, known, with_gradient, step, part, by_copy)

        return Evaluation.joined(self._each(evaluate, points, draws))

    def gradient(self, points: Tensor, goal: Goal, loss: LossFunction, draws: Draws | None = None) -> Evaluation:
        asked = self._each(lambda r, d: self._scorer.gradient(points[r], goal.select(r), loss, d), points, draws)
        return Evaluation.joined(asked)

    def judge(self, points: Tensor, goal: Goal, loss: LossFunction) -> Evaluation:
        judged = self._each(lambda r, _: self._scorer.judge(points[r], goal.select(r), loss), points)
        return Evaluation.joined(judged)

    def logits(self, points: Tensor, goal: Goal) -> Tensor:
        return torch.cat(self._each(lambda r, _: self._scorer.logits(points[r], goal.select(r)), points))

    def _each(self, ask: Callable[[Tensor, Draws | None], T], points: Tensor, draws: Draws | None = None) -> list[T]:
        """Answers about consecutive rows, with their random numbers."""
        rows = torch.split(torch.arange(len(points), device=points.device), self._size)
        parts = [slice(k * self._size, (k + 1) * self._size) for k in range(len(rows))]
        return [ask(r, draws and draws.part(part)) for r, part in zip(rows, parts, strict=True)]


def input_gradient(
    value: Tensor, leaf: Tensor, what: str = "the model", slope: Tensor | None = None, more: Tensor | None = None
) -> Tensor:
    """The gradient by `leaf` of a sum of per-sample values, or of `value` times a `slope`, plus what is known `more`.

    Raises:
        NoGradientError: there is none.
    """
    gradient = more
    if value.requires_grad:
        (found,) = torch.autograd.grad(value, leaf, slope, allow_unused=True)
        gradient = found if more is None or found is None else found + more
    if gradient is None:
        raise NoGradientError(
            f"{what} has no gradient with respect to the images: part of it is detached, runs under "
            f"torch.no_grad(), or leaves torch{'; Square needs none' if what == 'the model' else ''}"
        )
    return gradient

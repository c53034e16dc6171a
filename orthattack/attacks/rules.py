"""Step rules: how an ascent turns gradients into its next point. Each is data, an init and an update.

A rule keeps what it must remember in a `State`, tensors with one row per sample, so that samples can be dropped from
the batch at any time. Every point that a rule returns lies in the region, and is scored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol, get_args

import torch
from torch import Tensor
from torch.nn import functional

from orthattack.arguments import check_choice, check_count, check_flag, check_real, is_number, plain_fields
from orthattack.attacks.scoring import Evaluation
from orthattack.attacks.task import Task
from orthattack.lending import is_foreign
from orthattack.threat import Norm, Region

State = dict[str, Tensor]
Schedule = Literal["fixed", "linear", "cosine"]

# How far a pixel moves in an attack of a single L1 step, relative to the bounds, if few move: docs/attacks/fgsm.md.
_ONCE = 0.05


@dataclass(frozen=True)
class Ascent:
    """Where a batch may go and how a direction becomes a step.

    Attributes:
        task: the samples, with the ``region`` of the allowed images, ``draws`` and the ``gradient`` anywhere.
        alpha: (N, 1, 1, 1) the first step size, in pixel units.
        steps: how many steps there will be.
    """

    task: Task
    alpha: Tensor
    steps: int

    @property
    def region(self) -> Region:
        """The allowed images."""
        return self.task.region

    def step(self, points: Tensor, direction: Tensor, alpha: Tensor, count: Tensor | None = None) -> Tensor:
        """The step of size `alpha` from `points` along `direction` that stays in the region; see `Region.step`."""
        form, region = self.task.form, self.task.region
        if form is not None:
            direction = form(direction, points, region.images)
        return region.step(points, direction, alpha, count=count)

    def select(self, index: Tensor) -> Ascent:
        """The ascent of the samples at `index` only."""
        return replace(self, task=self.task.select(index), alpha=self.alpha[index])


class StepRule(Protocol):
    """What `Climb` asks of a rule."""

    def init(self, ascent: Ascent, points: Tensor) -> State:
        """What to remember before the first evaluation, each tensor with one row per sample."""

    def update(
        self, ascent: Ascent, state: State, points: Tensor, evaluation: Evaluation, step: int
    ) -> tuple[Tensor, State]:
        """The point after `points`, the iterate number `step` (from 0), and what to remember.

        `evaluation` is that of `points`, with a gradient.
        """


@dataclass(frozen=True)
class Iterate:
    """Where a link is asked.

    Attributes:
        ascent: the ascent; ``ascent.task`` has random numbers (``draws``), and the ``gradient`` anywhere.
        points: (N, C, H, W) the iterate, where the gradient was taken.
        step: its number, from 0.
        base: (N, C, H, W) where the step is taken from: the iterate, unless that looks ahead.
    """

    ascent: Ascent
    points: Tensor
    step: int
    base: Tensor


def _check_made(link: object, made: Any, direction: Tensor) -> None:
    """ValueError unless that is a direction like the one before, finite if that was, and a state of one row each."""
    update = f"{type(link).__name__}.update"
    if not isinstance(made, tuple) or len(made) != 2 or not isinstance(made[1], dict):
        raise ValueError(f"{update} must return a direction and a dict of what to remember; got {type(made).__name__}")
    if not isinstance(made[0], Tensor) or made[0].shape != direction.shape:
        found = tuple(made[0].shape) if isinstance(made[0], Tensor) else type(made[0]).__name__
        raise ValueError(f"{update} must return a direction of shape {tuple(direction.shape)}; got {found}")
    if not direction.is_cuda and not bool(made[0].isfinite().all()):  # asking would stop the GPU
        raise ValueError(f"{update} returned NaN or infinity: look for a division by the size of a zero direction")
    for name, value in made[1].items():
        if not isinstance(value, Tensor) or value.shape[:1] != direction.shape[:1]:
            raise ValueError(f"{update} must remember tensors with one row per sample; {name!r} is none")


class Link(Protocol):
    """A link of a `chain`: it makes one direction of another."""

    def init(self, ascent: Ascent, points: Tensor) -> State:
        """What to remember before the first step, each tensor with one row per sample."""

    def update(self, state: State, direction: Tensor, at: Iterate) -> tuple[Tensor, State]:
        """What becomes of the `direction` (N, C, H, W), and what to remember."""


@dataclass(frozen=True)
class Chain:
    """Links, then a step; made by `chain`."""

    links: tuple[Link, ...] = ()
    schedule: Schedule = "fixed"
    look_ahead: float = 0.0

    def __post_init__(self) -> None:
        plain_fields(self)
        check_choice("schedule", self.schedule, get_args(Schedule))
        check_real("look_ahead", self.look_ahead, "a finite number >= 0", low=0)
        links: tuple[object, ...] = self.links
        for link in links:
            if not callable(getattr(link, "init", None)) or not callable(getattr(link, "update", None)):
                raise ValueError(f"a link must have init and update, as momentum(1.0) has; got {link!r}")
            if isinstance(link, Chain):
                raise ValueError("a chain is no link: give its links, chain(*first.links, ...)")

    def init(self, ascent: Ascent, points: Tensor) -> State:
        made = [link.init(ascent, points) for link in self.links]
        state = {f"{k} {name}": value for k, own in enumerate(made) for name, value in own.items()}
        return {**state, "base": points} if self.look_ahead > 0 else state

    def update(
        self, ascent: Ascent, state: State, points: Tensor, evaluation: Evaluation, step: int
    ) -> tuple[Tensor, State]:
        assert evaluation.gradient is not None
        share = step / ascent.steps
        falling = {"fixed": 1.0, "linear": 1 - share, "cosine": (1 + math.cos(math.pi * share)) / 2}
        alpha = ascent.alpha * falling[self.schedule]
        direction, at = evaluation.gradient, Iterate(ascent, points, step, state.get("base", points))
        kept: State = {}
        for k, link in enumerate(self.links):
            own = {name[len(f"{k} ") :]: value for name, value in state.items() if name.startswith(f"{k} ")}
            made = link.update(own, direction, at)
            if is_foreign(type(link)):
                _check_made(link, made, direction)
            direction, own = made
            kept |= {f"{k} {name}": value for name, value in own.items()}
        count = None
        if ascent.steps == 1 and ascent.region.threat.norm == "l1":  # all of α at once
            low, high = ascent.region.threat.bounds
            count = (alpha / (_ONCE * (high - low))).clamp(1, max(1.0, direction[0].numel() / 5))
        base = ascent.step(at.base, direction, alpha, count)
        if self.look_ahead == 0:
            return base, kept
        kept["base"] = base
        if step + 1 == ascent.steps:
            return base, kept
        if ascent.region.threat.norm != "linf":
            return ascent.step(base, direction, self.look_ahead * alpha), kept
        ahead = torch.addcmul(base, direction, alpha.to(base.dtype), value=self.look_ahead)
        return ascent.region.project(ahead), kept


def chain(*links: Link, schedule: Schedule = "fixed", look_ahead: float = 0.0) -> Chain:
    """The rule that passes the gradient from link to link and steps along what comes out, d_t::

        x_{t+1} = step of size α_t from x_t along d_t
        y_{t+1} = x_{t+1} or, with look_ahead μ > 0,
                  L-infinity: the projection of x_{t+1} + α_t · μ · d_t
                  L2, L1: a step of size α_t · μ from x_{t+1} along d_t

    with α_t = α (fixed), α (1 - t/T) (linear) or α (1 + cos(π t/T)) / 2 (cosine). What is evaluated and scored are the
    y_t, and at the end x_T. ``chain()`` is PGD's rule, ``chain(normalize("l1"), momentum(1.0))`` that of MI-FGSM.

    Args:
        *links: `normalize`, `momentum`, `smooth`, `variance`, or objects with the methods of `Link`.
        schedule: of the step size.
        look_ahead: of NI-FGSM, whose look-ahead leaves the ball, while here it is projected, so that it counts as a
            candidate too. It is stated for L-infinity, whose unit is that of d, whose entries are about 1; in another
            norm so many entries of α are far more than α.

    Raises:
        ValueError: an option out of its range, or what is no link.

    Source: Lin et al. 2020, arXiv:1908.06281 (NI).
    """
    return Chain(links, schedule, look_ahead)


def accumulated(schedule: Schedule, momentum_: float, nesterov: bool, first: Sequence[Link] = ()) -> Chain:
    """The rule of MI-FGSM, of NI-FGSM, or without momentum PGD's, after the links that come `first`."""
    if not isinstance(first, Sequence):
        raise ValueError(f"links must be a list of links, such as [variance(20)]; got {first!r}")
    check_real("momentum", momentum_, "a finite number >= 0", low=0)
    check_flag("nesterov", nesterov)
    if nesterov and momentum_ == 0:
        raise ValueError("nesterov=True needs a momentum > 0")
    links = (normalize("l1"), momentum(momentum_)) if momentum_ > 0 else ()
    return chain(*first, *links, schedule=schedule, look_ahead=momentum_ if nesterov else 0.0)


class Stateless:
    """A rule, or a link, that remembers nothing."""

    def init(self, ascent: Ascent, points: Tensor) -> State:  # noqa: ARG002
        return {}


@dataclass(frozen=True)
class normalize(Stateless):  # noqa: N801
    """A link: the direction scaled to the norm of a vector of ones; a zero direction stays.

    Args:
        norm: "l1", so that the mean of the entries' sizes is 1 (MI-FGSM: Dong et al. 2018, arXiv:1710.06081), "l2" or
            "linf".
    """

    norm: Norm

    def __post_init__(self) -> None:
        check_choice("norm", self.norm, ("l1", "l2", "linf"))

    def update(self, state: State, direction: Tensor, at: Iterate) -> tuple[Tensor, State]:  # noqa: ARG002
        # In two divisions, for the mean of gradients of 1e-40 and of 1e38 is not a number of the same dtype.
        largest = direction.abs().amax((1, 2, 3), keepdim=True)
        direction = direction / torch.where(largest > 0, largest, 1)
        if self.norm == "linf":
            return direction, state
        sizes = direction.abs() if self.norm == "l1" else direction.square()
        mean = sizes.mean((1, 2, 3), keepdim=True)
        mean = mean if self.norm == "l1" else mean.sqrt()
        return direction / torch.where(mean > 0, mean, 1), state


@dataclass(frozen=True)
class momentum:  # noqa: N801
    """A link: ``v_{t+1} = decay · v_t + d_t`` (Dong et al. 2018, arXiv:1710.06081).

    Args:
        decay: how much is kept, at least 0.
    """

    decay: float = 1.0

    def __post_init__(self) -> None:
        plain_fields(self)
        check_real("decay", self.decay, "a finite number >= 0", low=0)

    def init(self, ascent: Ascent, points: Tensor) -> State:  # noqa: ARG002
        return {"velocity": torch.zeros_like(points)}

    def update(self, state: State, direction: Tensor, at: Iterate) -> tuple[Tensor, State]:  # noqa: ARG002
        velocity = float(self.decay) * state["velocity"] + direction
        return velocity, {"velocity": velocity}


@dataclass(frozen=True, eq=False)
class smooth(Stateless):  # noqa: N801
    """A link: each channel convolved with a kernel, zeros beyond the border (Dong et al. 2019, arXiv:1904.02884).

    The gradient of a mean over shifted images is about the gradient smoothed by the shifts' weights.

    Args:
        kernel: (k, k) or one for both axes (k,), of odd k.
    """

    kernel: Tensor = field(repr=False)

    def __post_init__(self) -> None:
        kernel = self.kernel
        if not isinstance(kernel, Tensor) or kernel.ndim not in (1, 2) or any(side % 2 == 0 for side in kernel.shape):
            raise ValueError(f"kernel must be a tensor (k, k) or (k,) of odd k; got {kernel!r}")
        if not bool(kernel.isfinite().all()) or not bool(kernel.any()):
            raise ValueError(f"kernel must be finite and not all 0; got {kernel!r}")
        square = torch.outer(kernel, kernel) if kernel.ndim == 1 else kernel
        object.__setattr__(self, "kernel", square.detach().clone())

    def update(self, state: State, direction: Tensor, at: Iterate) -> tuple[Tensor, State]:  # noqa: ARG002
        channels, (height, width) = direction.shape[1], self.kernel.shape
        weight = self.kernel.to(direction).expand(channels, 1, height, width)
        return functional.conv2d(direction, weight, padding=(height // 2, width // 2), groups=channels), state


def gaussian(size: int = 15, reach: float = 3.0) -> Tensor:
    """A kernel (size,) for `smooth`: the normal density at points from -`reach` to `reach`, of sum 1.

    The standard deviation is ``(size - 1) / (2 · reach)`` pixels: 2.3 by default, the kernel of Dong et al. 2019
    (arXiv:1904.02884) for images of 299 pixels. For 32 pixels, 5 is wide.
    """
    check_count("size", size)
    check_real("reach", reach, "a finite number of standard deviations > 0", low=0, above=True)
    bell = torch.exp(-torch.linspace(-reach, reach, size, dtype=torch.float64).square() / 2)
    return bell / bell.sum()


@dataclass(frozen=True)
class variance:  # noqa: N801
    """A link: the direction tuned by what the gradient was on average around the iterate before::

        d_t + u_t,    u_{t+1} = mean_i ∇L(x_t + r_i) - d_t,    r_i uniform in [-reach · eps, reach · eps]^n

    The neighbours are those of x_t where the gradient d_t is that of a point ahead, as in the authors' code.

    Args:
        samples: how many neighbours, each an evaluation and a gradient more, at least 1.
        reach: how far they are, in units of eps, at least 0.

    Source: Wang & He 2021, arXiv:2103.15571.
    """

    samples: int = 20
    reach: float = 1.5

    def __post_init__(self) -> None:
        plain_fields(self)
        check_count("samples", self.samples)
        check_real("reach", self.reach, "a finite number >= 0, in units of eps", low=0)

    def init(self, ascent: Ascent, points: Tensor) -> State:  # noqa: ARG002
        return {"variance": torch.zeros_like(points)}

    def update(self, state: State, direction: Tensor, at: Iterate) -> tuple[Tensor, State]:
        tuned = direction + state["variance"]
        if at.step + 1 == at.ascent.steps:  # nothing comes after
            return tuned, state
        task, points, mean = at.ascent.task, at.base, torch.zeros_like(direction)
        reach = (float(self.reach) * task.region.eps).to(points.dtype)
        for _ in range(self.samples):
            offset = (2 * task.draws.uniform(*points.shape[1:]) - 1).to(points.dtype)
            mean += task.gradient(points + reach * offset) / self.samples
        return tuned, {"variance": mean - direction}


@dataclass(frozen=True)
class AutoStep:
    """The automatic schedule of APGD: large steps that are halved where they stop paying, and momentum, see `APGD`.

    At checkpoints, whose distance shrinks from 22 % of the steps to 6 %, each sample's α is halved, and the sample goes
    back to its best point so far, if the loss rose in no more than a share `rho` of the steps since the last one, or if
    neither α nor the best loss changed there.

    Args:
        rho: that share, in (0, 1).

    Source: Croce & Hein 2020, arXiv:2003.01690.
    """

    rho: float = 0.75

    def __post_init__(self) -> None:
        if not is_number(self.rho) or not 0 < self.rho < 1:
            raise ValueError(f"rho must lie in (0, 1); got {self.rho!r}")

    def init(self, ascent: Ascent, points: Tensor) -> State:
        n, device = len(points), points.device
        loss = torch.full((n,), -torch.inf, device=device, dtype=torch.promote_types(points.dtype, torch.float32))
        return {
            "alpha": ascent.alpha,
            "previous": points,
            "best": points,
            "best_gradient": torch.zeros_like(points),
            "best_loss": loss,
            "checked_loss": loss,
            "loss": loss,
            "rises": torch.zeros(n, dtype=torch.long, device=device),
            "halved": torch.ones(n, dtype=torch.bool, device=device),
        }

    def update(
        self, ascent: Ascent, state: State, points: Tensor, evaluation: Evaluation, step: int
    ) -> tuple[Tensor, State]:
        s, loss, gradient = _with_best(state, points, evaluation)
        if step > 0:
            s["rises"] = s["rises"] + (loss > s["loss"])
        s["loss"] = loss
        if step == 0:
            s["checked_loss"] = loss
        window = self.checkpoints(ascent.steps).get(step)
        if window is not None:
            oscillates = s["rises"] <= self.rho * window
            stalls = ~s["halved"] & (s["checked_loss"] >= s["best_loss"])
            halve = oscillates | stalls
            s["halved"], s["checked_loss"] = halve, s["best_loss"]
            s["rises"] = torch.zeros_like(s["rises"])
            s["alpha"] = torch.where(halve.view(-1, 1, 1, 1), s["alpha"] / 2, s["alpha"])
            points, gradient = _where(halve, s["best"], points), _where(halve, s["best_gradient"], gradient)
        target = ascent.step(points, gradient, s["alpha"])
        if step > 0:
            mixed = points + 0.75 * (target - points) + 0.25 * (points - s["previous"])
            target = ascent.region.project(mixed)
        s["previous"] = points
        return target, s

    @staticmethod
    def checkpoints(steps: int) -> dict[int, int]:
        """The iterates at which to check, each with the number of steps since the one before."""
        window, smallest, less = (max(int(share * steps), 1) for share in (0.22, 0.06, 0.03))
        found, at = {}, window
        while at < steps:
            found[at] = window
            window = max(window - less, smallest)
            at += window
        return found


@dataclass(frozen=True)
class AutoSparse:
    """The automatic schedule of APGD in L1, whose steps move fewer and fewer pixels, and no momentum::

        x_{t+1} = project(x_t + α/k · sign(g) where abs(g) is one of its k largest),   g = ∇L(x_t), tangent

    At checkpoints, 4 % of the steps apart, each sample's k becomes 2/3 of the number of pixels that its best point so
    far changes. Where these are fewer than 95 % of what they were, α is again that of the start, and the sample goes
    back to that point; elsewhere α falls to 2/3 of itself, down to a tenth of the start's.

    Source: Croce & Hein 2021, arXiv:2103.01208.
    """

    def init(self, ascent: Ascent, points: Tensor) -> State:
        pixels = torch.full_like(ascent.alpha, float(points[0].numel()))
        dtype = torch.promote_types(points.dtype, torch.float32)
        return {
            "alpha": ascent.alpha,
            "count": (pixels / 5).clamp(min=1),
            "changed": pixels,
            "best": points,
            "best_gradient": torch.zeros_like(points),
            "best_loss": torch.full((len(points),), -torch.inf, device=points.device, dtype=dtype),
        }

    def update(
        self, ascent: Ascent, state: State, points: Tensor, evaluation: Evaluation, step: int
    ) -> tuple[Tensor, State]:
        s, _, gradient = _with_best(state, points, evaluation)
        if step > 0 and step % max(int(0.04 * ascent.steps), 1) == 0:
            images = ascent.region.images
            changed = (s["best"].to(images.dtype) != images).sum((1, 2, 3), keepdim=True).to(s["count"].dtype)
            fewer = changed < 0.95 * s["changed"]
            s["changed"], s["count"] = changed, (changed / 1.5).clamp(min=1)
            less = torch.maximum(s["alpha"] / 1.5, ascent.alpha / 10)
            s["alpha"] = torch.where(fewer, ascent.alpha, less)
            points = torch.where(fewer, s["best"], points)
            gradient = torch.where(fewer, s["best_gradient"], gradient)
        return ascent.region.project(self._moved(ascent, points, gradient, s["alpha"], s["count"])), s

    @staticmethod
    def _moved(ascent: Ascent, points: Tensor, gradient: Tensor, alpha: Tensor, count: Tensor) -> Tensor:
        """Not the best step in the box, `Region.step`, which moves others in place of pixels that are at a bound: with
        so many pixels the projection leaves less of each."""
        form, region = ascent.task.form, ascent.region
        g = gradient if form is None else form(gradient, points, region.images)
        g = region.threat.tangent(g.to(region.images.dtype), region.images)
        ranked = g.abs().flatten(1).sort(1, descending=True).values
        smallest = ranked.gather(1, (count.flatten(1).long() - 1).clamp(0, ranked.shape[1] - 1)).view_as(count)
        signs = g.sign() * (g.abs() >= smallest)
        moving = signs.abs().sum((1, 2, 3), keepdim=True).clamp(min=1)
        return points.to(g.dtype) + (alpha / moving).to(g.dtype) * signs


def _with_best(state: State, points: Tensor, evaluation: Evaluation) -> tuple[State, Tensor, Tensor]:
    """A state with each sample's point, and its gradient, of the largest loss so far; and loss and gradient of now."""
    assert evaluation.gradient is not None
    s, loss, gradient = dict(state), evaluation.loss.to(state["best_loss"].dtype), evaluation.gradient
    is_best = loss > s["best_loss"]
    s["best_loss"] = torch.where(is_best, loss, s["best_loss"])
    s["best"] = _where(is_best, points, s["best"])
    s["best_gradient"] = _where(is_best, gradient, s["best_gradient"])
    return s, loss, gradient


def _where(chosen: Tensor, a: Tensor, b: Tensor) -> Tensor:
    return torch.where(chosen.view(-1, 1, 1, 1), a, b)

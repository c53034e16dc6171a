"""An attack: a model, a threat model and a search for the best point in it.

`Attack` checks its input, borrows the model, lets the search run, and reports. A search (`orthattack.attacks.ascent`,
`orthattack.attacks.square`, `orthattack.attacks.auto`) decides which points to score; whatever it scores is offered to
`Best`, which keeps the best of each sample. Concrete attacks choose options.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any, ClassVar, TypedDict, get_args

import torch
from torch import Tensor

from orthattack.arguments import (
    check_batch,
    check_choice,
    check_count,
    check_flag,
    check_model,
    check_real,
    check_tensor,
    is_number,
    plain,
    same_values,
    warn,
    why_too_dark,
)
from orthattack.assumptions import PROBABILITIES, SIGMOIDS, Observer
from orthattack.attacks.configured import Configured
from orthattack.attacks.fast_copy import Optimize, fast_copy
from orthattack.attacks.goals import Targeted, aimed, check_targeted, turns
from orthattack.attacks.gradient_form import Enforce, GradientForm, Reference, check_form
from orthattack.attacks.numbers import Streams
from orthattack.attacks.rules import Schedule, variance
from orthattack.attacks.scoring import InBatches, Oracle, Precision, Scorer, Transform, has_bfloat16
from orthattack.attacks.task import Around, AttackResult, Best, Keep, Merit, OnStep, Search, Task
from orthattack.lending import borrowed, guarded, in_evaluation, is_foreign
from orthattack.losses import Goal, Loss, LossName, attack_loss
from orthattack.models import Model, explained
from orthattack.projection import Scope
from orthattack.threat import Direction, Mask, Norm, Normal, Region, ThreatModel, kept, perturbation_norm
from orthattack.threat.levels import snapped
from orthattack.threat.norms import BALLS

UNLIMITED = 1e30
"""Stands for no limit in a threat model, whose eps is finite."""


def unlimited(task: Task) -> Task:
    """The task without a radius, with points of any norm; only those within the task's own count."""
    region = task.region
    wide = replace(region.threat, eps=UNLIMITED).around(region.images.to(region.dtype))
    return replace(task, around=wide, limit=region.eps)


class Options(TypedDict, total=False):
    """What every attack accepts by keyword; see `orthattack.PGD` for what each means."""

    scope: Scope | None
    directions: Sequence[Direction]
    normal: Normal
    levels: int | None
    mask: Mask | None
    loss: Loss | None
    targeted: Targeted
    top_k: int
    confidence: float
    early_stop: bool
    bounds: tuple[float, float]
    generator: torch.Generator | None
    precision: Precision
    optimize: Optimize
    eot_samples: int
    on_step: OnStep | None


class GradientOptions(Options, total=False):
    """What every gradient attack accepts by keyword."""

    enforce: Enforce
    reference: Reference
    transform: Transform | Sequence[Transform] | None
    gradient_model: Model | None
    keep: Keep


@dataclass(frozen=True)
class Card:
    """What an attack says it is, for whoever runs it beside others.

    Attributes:
        family: what it is a form of, such as "PGD" for `PGD` and `OrthoPGD`: each other's baselines.
        scope: which vectors it is orthogonal to the normal's in, see `ThreatModel`; None: in none.
        directions: what else it is orthogonal to.
        exact: the perturbation itself keeps that; otherwise only each gradient is projected.
        minimal: it looks for the smallest perturbation instead of filling a ball.
        normal: what it is orthogonal to in those vectors.
        loss: what it climbs, where that decides between points; None: it has its own, or none.
        schedule: of its step size, if it has one to choose, see `PGD`.
    """

    family: str
    scope: Scope | None = None
    directions: Sequence[Direction] = ()
    exact: bool = True
    minimal: bool = False
    normal: Normal = "image"
    loss: Loss | None = None
    schedule: Schedule | None = None

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Card) and same_values(vars(self), vars(other))

    def __hash__(self) -> int:
        return hash((self.family, self.scope, self.exact, self.minimal))

    @property
    def keeps(self) -> tuple[str, ...]:
        """In words, what its perturbations, or its gradients if not exact, leave as it is: see `ThreatModel.keeps`."""
        return kept(self.scope, self.normal, self.directions)

    @property
    def is_orthogonal(self) -> bool:
        """Whether it is orthogonal to anything, exactly or not."""
        return self.scope is not None or len(self.directions) > 0


class Attack(Configured):
    """A model, a threat model and a search: call it with images and labels.

    ``attack(images, labels)`` returns the adversarial images, ``attack.run(images, labels)`` an `AttackResult`.
    Concrete attacks document their arguments. All are read as attributes, ``attack.eps``, and none can be set:
    ``attack.replace(eps=8 / 255)`` makes a new attack that differs in that alone.
    """

    norms: ClassVar[tuple[Norm, ...]] = ("linf", "l2", "l1")
    """The norms that it works in."""
    _family: ClassVar[str] = "Attack"
    _climbs: ClassVar[LossName] = "margin"
    """The loss by default, away from a label."""
    _pulse: Callable[[int], object] | None = None  # see `Task.pulse`

    def __init_subclass__(cls, family: str | None = None, **defaults: Any) -> None:
        if family is not None or "__init__" in vars(cls):  # one that changes defaults alone is of the same family
            cls._family = family or cls.__name__
        super().__init_subclass__(**defaults)

    def __init__(
        self,
        model: Model,
        norm: Norm,
        eps: float | Tensor | None,
        search: Search,
        *,
        scope: Scope | None = None,
        loss: Loss | None = None,
        targeted: Targeted = False,
        top_k: int = 1,
        confidence: float = 0.0,
        early_stop: bool = False,
        bounds: tuple[float, float] = (0, 1),
        generator: torch.Generator | None = None,
        precision: Precision = "float32",
        optimize: Optimize = "auto",
        eot_samples: int = 1,
        directions: Sequence[Direction] = (),
        normal: Normal = "image",
        levels: int | None = None,
        mask: Mask | None = None,
        enforce: Enforce = "perturbation",
        reference: Reference = "clean",
        transform: Transform | Sequence[Transform] | None = None,
        gradient_model: Model | None = None,
        keep: Keep = "best",
        on_step: OnStep | None = None,
    ) -> None:
        self._models = {"model": model} | ({} if gradient_model is None else {"gradient_model": gradient_model})
        for name, asked in self._models.items():
            check_model(name, asked)
        several = transform if isinstance(transform, Sequence) else () if transform is None else (transform,)
        self._transforms = tuple(several)
        if transform is not None and not self._transforms:
            raise ValueError("transform must be a function, or a list of one or more of them; got an empty list")
        for name, function in [*(("transform", one) for one in self._transforms), ("on_step", on_step)]:
            if not callable(function) and (function is not None or name == "transform"):
                raise ValueError(f"{name} must be a function; got {type(function).__name__}")
        check_form(enforce, reference)
        check_choice("precision", precision, get_args(Precision))
        check_choice("optimize", optimize, get_args(Optimize))
        check_targeted(targeted)
        check_count("top_k", top_k)
        check_real("confidence", confidence, "a finite difference of logits >= 0", low=0)
        check_flag("early_stop", early_stop)
        check_count("eot_samples", eot_samples)
        if not callable(search) or not callable(getattr(search, "options", None)) or not hasattr(search, "merit"):
            raise ValueError(f"search must have options, merit and be callable, as Climb has and is; got {search!r}")
        check_choice("search.merit", search.merit, get_args(Merit))
        if turns(targeted) is not None and (search.merit == "norm" or "targets" in self._names()):
            instead = "targets=9 takes nine in turn" if "targets" in self._names() else "leave it out"
            raise ValueError(f"{type(self).__name__} looks for classes to reach itself; got {targeted=!r}: {instead}")
        if loss == "kl" and targeted:
            raise ValueError(f'loss="kl" leads to no class; got {targeted=!r}: leave it out, or choose another loss')
        check_choice("keep", keep, get_args(Keep))
        if keep == "last" and (search.merit != "loss" or turns(targeted) is not None):
            raise ValueError('keep="last" is for attacks that climb one loss, such as MIFGSM: leave it out here')
        self.model = model
        if eps is None and search.merit != "norm":
            raise ValueError("eps must be a radius in pixel units, such as 8/255: only a minimal search goes without")
        radius = UNLIMITED if eps is None else eps
        self.threat = ThreatModel(norm, radius, bounds, scope, directions, normal, levels, mask)
        check_choice("norm", norm, self.norms)
        self.search = search
        self.enforce, self.reference = enforce, reference
        if loss is None:  # of targets, the margin sees one rival at a time, and is the weaker on standard models
            counts = top_k > 1 or confidence > 0  # from there on, which only the margin does
            loss = "ce" if targeted and top_k == 1 else "margin" if counts else self._climbs
        self.loss: Loss = loss
        self.targeted, self.top_k, self.confidence = targeted, top_k, float(confidence)
        self.early_stop, self.precision, self.eot_samples = early_stop, precision, eot_samples
        self.optimize: Optimize = optimize
        self.transform, self.gradient_model, self.on_step = transform, gradient_model, on_step
        self.keep: Keep = keep
        self._loss = attack_loss(self.loss)
        self._observer = Observer()
        self._knows_radius = False  # whether the caller was warned that it allows every image
        self.generator = _stream(generator)

    @property
    def card(self) -> Card:
        """What it is: its family, and what its perturbations are orthogonal to."""
        threat = self.threat
        is_minimal = self.search.merit == "norm"
        is_exact = self.enforce == "perturbation"
        loss = self.loss if self.search.merit == "loss" else None
        return Card(self._family, threat.scope, threat.directions, is_exact, is_minimal, threat.normal, loss)

    def __repr__(self) -> str:
        threat, known = self.threat, self._resolved()
        options = {name: known[name] for name in ("norm", "eps", *self.search.options(threat.eps))}
        if threat.is_orthogonal:
            options |= {"scope": threat.scope, "enforce": self.enforce}
        named = [d if isinstance(d, str) else type(d).__name__ for d in (threat.normal, *threat.directions)]
        if named[0] != "image":
            options["normal"] = named[0]
        if threat.directions:
            options["directions"] = named[1:]
        if threat.levels is not None:
            options["levels"] = threat.levels
        if threat.mask is not None:
            options["mask"] = threat.mask if isinstance(threat.mask, Tensor) else type(threat.mask).__name__
        for name, default in {"targeted": False, "top_k": 1, "confidence": 0.0}.items():
            options |= {name: known} if (known := getattr(self, name)) != default else {}
        return f"{type(self).__name__}({', '.join(f'{k}={_shown(v)}' for k, v in options.items())})"

    def _resolved(self) -> dict[str, Any]:
        eps = self.threat.eps
        is_unlimited = isinstance(eps, float) and eps == UNLIMITED
        return {**vars(self.threat), **({"eps": None} if is_unlimited else {}), **self.search.options(eps)}

    def _shared_by_copies(self) -> list[object]:
        return list(self._models.values())

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Adversarial images for (N, C, H, W) images and (N,) labels (targeted: the classes to reach)."""
        return self.run(images, labels).adversarials

    def run(
        self,
        images: Tensor,
        labels: Tensor,
        *,
        eps: float | Tensor | None = None,
        start: Tensor | None = None,
        seeds: Sequence[int] | None = None,
        batch_size: int | None = None,
    ) -> AttackResult:
        """Attack a batch and report.

        Each sample's adversarial is the best of all its iterates, in all restarts, the first and the last one
        included: one that fools the model if there is one, and of those (or of the others) the one with the highest
        loss. With `early_stop` it is the first that fools the model, with ``keep="last"`` the last iterate.

        Args:
            images: (N, C, H, W), floating point, inside the bounds; values off by round-off are clamped.
            labels: (N,), integers: the true classes or, with ``targeted=True``, the classes to reach.
            eps: another radius than the attack's, in pixel units; one number, or (N,) with one per sample.
            start: (N, C, H, W), where to start the first restart, for example the adversarials of a smaller radius;
                what is outside the threat model is pulled towards the images.
            seeds: one per sample, each below 2**63 in size: a sample's random numbers then come from its own stream
                and do not depend on its batch or on earlier calls. What all samples share (the squares of `Square`)
                starts anew from the seed of the attack's generator.
            batch_size: how many images the model is given at a time; by default all. With `early_stop`, the samples
                that still stand are packed into full batches at each step. It bounds the memory too: a few batches
                are searched at a time, with the random numbers of one search, but where a search, step rule, link,
                direction, normal or mask is code of yours, or `on_step` is given, which may look at all samples.

        Raises:
            ValueError: images or labels of the wrong kind (the message says what and where), or a model whose output
                is not (N, K) logits, is not finite, or does not depend differentiably on the images.
        """
        self._warn_of_radius(images, eps)
        result, stuck = self._run(images, labels, eps, start, self.search, self.early_stop, seeds, batch_size)
        self._warn_of_gradients(result, stuck)
        return result

    def _warn_of_radius(self, images: Tensor, eps: float | Tensor | None, name: str = "eps") -> None:
        """Warn once of a radius, of this name, that leaves the norm nothing to limit."""
        is_unlimited = eps is None and self.eps is None  # as with a Foolbox attack that minimises
        if self._knows_radius or is_unlimited or not isinstance(images, Tensor) or images.is_nested or images.ndim != 4:
            return
        threat, shape = self.threat if eps is None else replace(self.threat, eps=eps), images.shape[1:]
        if not threat.allows_everything(shape):
            return
        self._knows_radius = True
        largest, (low, high) = float(torch.as_tensor(threat.eps).max()), threat.bounds
        is_byte = 1 < largest < 255 * threat.diameter(shape) and max(abs(low), abs(high)) <= 1 and threat.norm != "l0"
        hint = f"did you mean {name}={largest:g}/255?" if is_byte else "choose a smaller radius"
        warn(
            f"{name}={largest:g} allows every image: in {threat.norm}, images of shape {tuple(shape)} in bounds "
            f"({low:g}, {high:g}) are at most {threat.diameter(shape):.4g} apart; {hint}"
        )

    def _run(
        self,
        images: Tensor,
        labels: Tensor,
        eps: float | Tensor | None,
        start: Tensor | None,
        search: Search,
        early_stop: bool,
        seeds: Sequence[int] | None = None,
        batch_size: int | None = None,
        is_first: bool = True,
        targets: Tensor | None = None,
    ) -> tuple[AttackResult, Tensor | None]:
        """The result, and at how many steps no loss had a gradient, None if its own had one at all; not `is_first`: odd
        logits are no error; with `targets`, those that the attack chose in an earlier call, which stay."""
        batch_size = plain(batch_size)
        if batch_size is not None:
            check_count("batch_size", batch_size)
        with torch.inference_mode(False), torch.no_grad(), ExitStack() as stack:
            x, labels = self._checked(images, labels)
            stack.enter_context(explained(self._models, x))
            lent = {name: stack.enter_context(borrowed(model, x.device)) for name, model in self._models.items()}
            if strangers := self._strangers(search):
                for model in reversed(self._models.values()):  # which may reach the model, which is looked at first
                    stack.enter_context(guarded(model, x[:batch_size], " or ".join(strangers)))
            threat = self.threat if eps is None else replace(self.threat, eps=eps)
            if start is not None:
                _check_start(start, x)
            several = turns(self.targeted) if search is self.search else None
            merit = search.merit if several is None else "margin"
            size = _piece(strangers, batch_size, len(x), threat)
            hides = strangers and size >= len(x)  # in pieces no stranger sees more than copies
            best = Best(x.clone() if hides else x, merit, threat.norm, self.keep)
            if len(x) == 0:
                return best.result(x, threat), None
            is_random = self._observed(lent, x)
            own = self._oracle(lent, x, is_random, len(x) if is_first else 0)
            asked = self._scorer(own, lent, is_random)
            oracle = asked if batch_size is None or batch_size >= len(x) else InBatches(asked, batch_size)
            streams = Streams(self.generator, None if seeds is None else checked_seeds(seeds, len(x)), len(x), x.device)
            index = torch.arange(len(x), device=x.device)
            form = GradientForm(threat, self.reference) if self.enforce == "gradient" and threat.is_orthogonal else None
            allowed = threat if form is None else threat.free()
            pieces = Around(x, allowed, size, own, own.unchecked)
            task = Task(
                oracle, self._loss, Goal(labels, None, self.top_k, self.confidence),
                pieces if size < len(x) else allowed.around(x.clone() if hides else x), index, best, early_stop,
                streams, form, is_random, self.on_step, self._pulse,
            )  # fmt: skip
            if self.loss == "kl":
                task = replace(task, goal=replace(task.goal, clean=task.logits()))
                best.count(index, self.eot_samples)
            task = aimed(task, self.targeted, targets, self.eot_samples)
            goal = task.goal.select(index)
            if start is not None and isinstance(task.around, Region):
                start = task.around.shrunk(start.detach().to(x))
            for aim in [task.goal] if several is None else task.towards(several):
                search(replace(task, goal=aim), start)
            if strangers and (not in_evaluation(list(self._models.values())) or is_foreign(search)):
                best.exact[:] = False
            # The model itself judges what is returned, unless it has already.
            for left in torch.split((~best.exact).nonzero().squeeze(1), size):
                if len(left) > 0:
                    best.judge(left, oracle.judge(best.adversarials[left], goal.select(left), self._loss))
            return self._told(task, best.result(x, threat, size), x, threat)

    def _scorer(self, oracle: Oracle, lent: Mapping[str, Model], is_random: bool) -> Scorer:  # noqa: ARG002
        """What the search asks."""
        return oracle

    def _oracle(self, lent: Mapping[str, Model], images: Tensor, is_random: bool, unchecked: int) -> Oracle:
        """The borrowed model, and where its gradients come from."""
        other = lent.get("gradient_model")
        whose = "model" if other is None else "gradient_model"
        fast, why_not = None, ""
        # By the norm, each claim of a copy has to be confirmed, which takes longer than the copy saves.
        if not is_random and (self.optimize == "compile" or self.search.merit != "norm"):
            fast, why_not = fast_copy(self._models[whose], self.optimize, images)
        if why_not and self.optimize == "compile":
            self._observer.say("compile", f'optimize="compile" is not used for this model: {why_not}')
        precision = self.precision
        if precision == "bfloat16" and not has_bfloat16(images.device):
            precision = "float32"
            self._observer.say(
                "bfloat16",
                f'precision="bfloat16" computes in float32 here: this {images.device.type.upper()} has no arithmetic '
                "for bfloat16, and emulating it takes 3 to 15 times as long",
            )
        return Oracle(
            lent["model"], precision, self.eot_samples, other if fast is None else fast, is_random, unchecked,
            is_copy=other is None, transforms=self._transforms,
        )  # fmt: skip

    def _observed(self, lent: Mapping[str, Model], images: Tensor) -> bool:
        """Whether a borrowed model draws; what an attack does not expect is warned of, once."""
        observer, bounds = self._observer, self.threat.bounds
        found = observer.of(self.model, lent["model"], images, bounds)
        observer.say("batch", found.on_batches())
        observer.say("probabilities", PROBABILITIES if found.probabilities else SIGMOIDS if found.sigmoids else None)
        unused = '; optimize="compile" is not used' if self.optimize == "compile" else ""
        if found.is_random and (self.eot_samples == 1 or unused):
            observer.say("random", f"{found.on_randomness(can_average='eot_samples' in self._names())}{unused}")
        return found.is_random

    def _told(
        self, task: Task, result: AttackResult, images: Tensor, threat: ThreatModel
    ) -> tuple[AttackResult, Tensor | None]:
        """What `_run` returns, without the successes of what left the threat model's ball or bounds; warned of, as are
        NaN and images to which nothing may be done."""
        (low, high), size, best = threat.bounds, images[:1].numel(), task.best
        # Foreign attacks round where ours round inwards.
        slack = torch.finfo(images.dtype).eps * max(abs(low), abs(high))
        eps = threat.eps.to(result.norm) if isinstance(threat.eps, Tensor) else threat.eps
        beyond = result.norm > 1.0001 * eps + slack * BALLS[threat.norm].of_ones(size)
        found = result.adversarials.flatten(1)
        beyond |= ((found < low - slack) | (found > high + slack)).any(1)
        unanswered, idle = best.unanswered & ~result.success, ~result.success & (result.norm == 0)
        flat = result.zero_gradients > 0
        odd = torch.stack([rows.any() for rows in (unanswered, idle, beyond, flat)]).tolist()  # one question to a GPU
        stuck = best.stuck if odd[3] else None
        if odd[0]:
            self._observer.say(
                "NaN",
                f"NaN or infinite answers for {int(unanswered.sum())} of {len(images)} images at points that were "
                "tried: no success, and no sign of robustness. Look for a division, a root or an overflow in the model",
            )
        if odd[1]:
            self._warn_of_room(task.select(idle.nonzero().squeeze(1)))
        if not odd[2]:
            return result, stuck
        warn(
            f"{int(beyond.sum())} of {len(images)} adversarials left the threat model, by something that takes part in "
            f"the attack and writes into images: their norm is up to {float(result.norm.max()):.4g}. They count as no "
            "success"
        )
        return replace(result, success=result.success & ~beyond), stuck

    def _warn_of_room(self, idle: Task) -> None:
        """Warn once of those of these samples that nothing may be done to."""
        fixed = 0
        for left in (piece.region for piece, _ in idle.pieces()):
            offset = left.random_start(torch.Generator().manual_seed(0)).double() - left.images.double()
            eps = left.eps.flatten().double().clamp(max=left.threat.diameter(left.images.shape[1:]))
            fixed += int(((perturbation_norm(offset, left.threat.norm) <= 1e-6 * eps) & (eps > 0)).sum())
        if fixed > 0:
            self._observer.say(
                "room",
                f"the threat model leaves nothing but the image itself for {fixed} of {len(idle.best.success)} images "
                "(eps, bounds, mask and what it is orthogonal to): that they were not fooled is no sign of robustness. "
                "Choose a larger eps, another scope or fewer directions",
            )

    def _warn_of_gradients(self, result: AttackResult, stuck: Tensor | None) -> None:
        """Say, once for a call, for how many samples there was no usable gradient at half of the steps or more."""
        if stuck is None:  # there was one everywhere: see `_run`
            return
        links = getattr(getattr(self.search, "rule", None), "links", ())
        around = 1 + sum(link.samples for link in links if isinstance(link, variance))  # which are no steps
        steps = result.gradient_calls // (self.eot_samples * max(1, len(self._transforms)) * around)
        flat, total = result.zero_gradients, len(stuck)
        rows = (
            steps > stuck,
            ~result.success & (stuck > 0) & (2 * stuck >= steps),
            (flat > stuck) & (2 * flat >= steps),
            stuck > 0,
        )
        moved, left, swapped, held = torch.stack([row.sum() for row in rows]).tolist()
        if moved == 0 and held > 0:
            whose = list(self._models)[self.gradient_model is not None]
            warn(
                f"nothing could be climbed: the {whose}'s gradient is zero or not finite at every step, for each of "
                f"{total} image{'s' * (total > 1)}. It is masked, by a rounding or saturated layer, by outputs that "
                "are probabilities, or by a root, norm or division that meets zero. What no gradient fools may still "
                "not be robust: use Square, which needs none"
            )
            return
        if left > 0:
            warn(
                f"{left} of {total} images had no usable gradient, zero or not finite, at half of the steps or more "
                "(AttackResult.zero_gradients) and were not fooled: that is no sign of robustness; Square needs none"
            )
        if swapped > 0:
            is_finite = bool(result.loss.isfinite().all())
            cause = "saturated, as a cross-entropy is at large logits" if is_finite else "its value is NaN or infinite"
            warn(
                f"the loss had no usable gradient for {swapped} of {total} images at half of the steps or more "
                f"(AttackResult.zero_gradients): {cause}. They climbed the "
                'margin instead; loss="margin" does so throughout'
            )

    def sweep(self, images: Tensor, labels: Tensor, eps: Sequence[float] | Tensor) -> list[AttackResult]:
        """Attack a batch at several radii, the smallest first.

        An adversarial of a smaller radius is one of a larger radius too, so a sample that falls at one radius keeps
        its adversarial at the larger ones, and only what still stands is attacked there, from its best point so far.
        Success never falls as eps grows.

        Args:
            images, labels: as for `run`.
            eps: radii in pixel units, a list or a tensor (K,), in any order, without repetition.

        Returns:
            One result per radius, in the order of `eps`. Calls are those made at that radius.

        Raises:
            ValueError: as for `run`, or no radius, or one twice.
        """
        radii = _radii(eps)
        check_tensor("images", images)
        check_tensor("labels", labels)
        found: dict[float, AttackResult] = {}
        last: AttackResult | None = None
        for radius in sorted(radii):
            self._warn_of_radius(images, radius)
            if last is None:
                last, stuck = self._run(images, labels, radius, None, self.search, self.early_stop)
                self._warn_of_gradients(last, stuck)
            else:
                rows = (~last.success).nonzero().squeeze(1)
                start = last.adversarials[rows]
                more, _ = self._run(
                    images[rows], labels[rows], radius, start, self.search, self.early_stop, targets=last.targets[rows]
                )
                last = updated(last, more, rows, torch.ones_like(rows, dtype=torch.bool), adds=False)
            found[radius] = last
        return [found[radius] for radius in radii]

    def _strangers(self, search: Search) -> list[str]:
        """What takes part in an attack and is not code of this package, in words."""
        rule = getattr(search, "rule", None)
        parts = [] if rule is None else [rule, *getattr(rule, "links", ())]
        strangers = {
            "the loss": is_foreign(self.loss),
            "a direction": any(is_foreign(direction) for direction in self.threat.directions),
            "the normal": is_foreign(self.threat.normal),
            "the mask": is_foreign(self.threat.mask),
            "the transform": len(self._transforms) > 0,
            **{f"the {name.replace('_', ' ')}": name != "model" for name in self._models},
            "on_step": self.on_step is not None,
            "the step rule": any(is_foreign(type(part)) for part in parts),
            getattr(search, "stranger", "the search"): hasattr(search, "stranger") or is_foreign(search),
        }
        return [name for name, is_there in strangers.items() if is_there]

    def _checked(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of images and labels, the images clamped to the bounds; ValueError if they are not what is needed."""
        check_batch(images, labels, self.threat.bounds, self._models.items())
        low, high = self.threat.bounds
        self._observer.say("bounds", why_too_dark("images", images, (low, high)))
        # `clamp` may make zeros of denormal numbers.
        x = torch.where(images < low, low, torch.where(images > high, high, images))
        x = x if self.threat.levels is None else snapped(x, self.threat.levels, self.threat.bounds)
        return x.contiguous(), labels.long().clone()


def _stream(generator: object) -> torch.Generator:
    """The generator given, or an attack's own: that leaves the global one alone, but has its seed."""
    if generator is None:
        return torch.Generator().manual_seed(torch.initial_seed())
    if isinstance(generator, torch.Generator):
        return generator
    seed = generator if isinstance(generator, int) else 0
    raise ValueError(
        f"generator must be a torch.Generator; got {generator!r}: seed one, torch.Generator().manual_seed({seed})"
    )


def _check_start(start: Tensor, images: Tensor) -> None:
    check_tensor("start", start)
    if start.shape != images.shape:
        raise ValueError(f"start must have the shape of images, {tuple(images.shape)}; got {tuple(start.shape)}")
    if not start.dtype.is_floating_point:
        raise ValueError(f"start must be floating point, like images; got {start.dtype}: divide 8-bit images by 255")
    if not bool(start.isfinite().all()):
        raise ValueError("start must be finite; found NaN or infinity")


def checked_seeds(seeds: object, count: int) -> list[int]:
    """The seeds as numbers; ValueError if they are not one integer per image."""
    if isinstance(seeds, str) or not isinstance(seeds, Iterable) or getattr(seeds, "shape", None) == ():
        raise ValueError(f"seeds must be one integer per image, such as range({count}); got {seeds!r}")
    numbers = [plain(seed) for seed in seeds]
    if len(numbers) != count:
        raise ValueError(f"seeds must be one per image, {count}; got {len(numbers)}")
    for seed in numbers:
        if not isinstance(seed, int) or isinstance(seed, bool) or abs(seed) >= 2**63:
            raise ValueError(f"seeds must be integers, each below 2**63 in size; found {seed!r}")
    return numbers


def _radii(eps: object) -> list[float]:
    """Several radii as a list; ValueError if they are none, or one comes twice."""
    is_list = isinstance(eps, Iterable) and not isinstance(eps, str) and getattr(eps, "shape", None) != ()
    radii: Any = [plain(radius) for radius in eps] if is_list else eps  # type: ignore[attr-defined]
    if not is_list or len(radii) == 0 or not all(map(is_number, radii)) or len(set(radii)) < len(radii):
        raise ValueError(f"eps must be a list of one or more different radii; got {radii!r}")
    numbers: list[float] = radii
    return numbers


def updated(before: AttackResult, found: AttackResult, rows: Tensor, better: Tensor, adds: bool) -> AttackResult:
    """`before` with what was `found` for the samples at `rows`, where it is better; with the calls of all of these,
    added to those before if asked."""
    values = {}
    for name, new in vars(found).items():
        old = getattr(before, name)
        if name in ("zero_gradients", "forward_calls", "gradient_calls"):
            values[name] = (old if adds else torch.zeros_like(old)).index_add(0, rows, new)
        else:
            values[name] = old.index_copy(0, rows[better], new[better])
    return AttackResult(**values)


def _piece(strangers: Sequence[str], batch_size: int | None, count: int, threat: ThreatModel) -> int:
    """How many samples are searched at a time: all, or several batches of them, so that early stop can pack these.

    Code of others that is asked with the model sees no more than a batch anyway; other code may look at all samples.
    """
    odd = isinstance(threat.eps, Tensor) and threat.eps.shape not in ((), (count,))
    of_batches = all(name in ("the loss", "the transform", "the gradient model", "the detector") for name in strangers)
    return count if batch_size is None or odd or not of_batches else 8 * batch_size


def _shown(value: object) -> str:
    if isinstance(value, Tensor):
        return f"tensor{tuple(value.shape)}" if value.ndim else f"{float(value):.6g}"
    return f"{value:.6g}" if isinstance(value, float) else repr(value)

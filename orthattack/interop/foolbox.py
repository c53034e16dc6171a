"""Foolbox: our attacks as Foolbox's (`FoolboxAttack`, `FoolboxMinimum`), Foolbox's as ours (`FromFoolbox`).

Source: Rauber et al. 2020, doi:10.21105/joss.02607, for Foolbox's interface, which is that of its version 3.3.
"""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, TypeVar, final, get_args

import eagerpy as ep
import foolbox
import numpy as np
import torch
from foolbox.attacks.base import FixedEpsilonAttack, MinimizationAttack, get_criterion, raise_if_kwargs
from foolbox.criteria import Misclassification, TargetedMisclassification
from foolbox.distances import LpDistance
from torch import Tensor, nn

from orthattack.arguments import plain, warn
from orthattack.attacks.base import UNLIMITED, Attack
from orthattack.attacks.bisection import Bisection, cap_reached
from orthattack.attacks.configured import Configured, options_of
from orthattack.attacks.scoring import Scorer
from orthattack.attacks.task import Merit, Task
from orthattack.lending import global_random_numbers
from orthattack.losses import Goal
from orthattack.threat import Norm, ThreatModel, perturbation_norm
from orthattack.threat.norms import BALLS

__all__ = ["FoolboxAttack", "FoolboxMinimum", "FromFoolbox"]

T = TypeVar("T")


class _Ours(Configured):
    """One of our attack classes with its options, to be made anew for each model, criterion and radius."""

    value_and_grad = None  # what Foolbox's gradient estimators ask for before they make a subclass

    def __init_subclass__(cls, **defaults: Any) -> None:
        if "value_and_grad" in vars(cls):
            raise ValueError(
                f"{cls.__mro__[1].__name__} takes no gradient estimator: its attacks draw and count for each image by "
                "itself. For a model that gives scores alone, FoolboxAttack(NES, queries=5000, pairs=samples // 2, "
                "sigma=sigma) is PGD along such estimates"
            )
        super().__init_subclass__(**defaults)

    def __init__(self, attack: Any, options: dict[str, Any]) -> None:
        if not (isinstance(attack, type) and issubclass(attack, Attack)):
            hint = "; for the smallest perturbation use FoolboxMinimum(OrthoPGD, eps=...)"
            raise ValueError(
                f"attack must be an attack class of orthattack, such as OrthoPGD; got {attack!r}"
                + (hint if attack is Bisection or isinstance(attack, Bisection) else "")
            )
        for name, source in (
            ("model", "the model"),
            ("bounds", "the model's bounds"),
            ("targeted", "the criterion, such as TargetedMisclassification"),
        ):
            if name in options:
                raise ValueError(f"{name} cannot be an option: it comes with the call, from {source}")
        self._attack: Any = attack
        self._options = options
        probe = attack(nn.Identity(), **options)  # refuses a wrong option now, not at the first call
        # The textbook form promises no orthogonality, so there is none to keep.
        self._threat = probe.threat if probe.enforce == "perturbation" else probe.threat.free()
        self._is_minimal = probe.card.minimal
        # One stream for all calls, so that each repetition draws new numbers.
        self._generator = probe.generator

    @property
    def distance(self) -> Any:
        """How Foolbox measures and shortens the perturbations: `foolbox.distances.LpDistance` of the norm."""
        return _PullingDistance(self._threat)

    def _shown(self, **more: object) -> str:
        """For a repr: options of this class that are not None, and those of the attack."""
        options = {name: value for name, value in more.items() if value is not None} | self._options
        shown = [f"{name}={_short(value)}" for name, value in options.items() if name != "generator"]
        return f"{type(self).__name__}({', '.join([self._attack.__name__, *shown])})"

    def _made(self, model: Any, inputs: Any, criterion: Any, **more: object) -> tuple[Attack, Tensor, Tensor]:
        """The attack on a Foolbox model, with the images and the labels or targets to call it with."""
        criterion = get_criterion(criterion)
        if not isinstance(inputs, ep.PyTorchTensor):
            raise ValueError(
                f"images must be PyTorch tensors, and the model a PyTorchModel; got {type(inputs).__name__}"
            )
        inner = model
        while isinstance(getattr(inner, "_model", None), foolbox.models.Model):
            inner = inner._model
        others = (foolbox.models.NumPyModel, foolbox.models.TensorFlowModel, foolbox.models.JAXModel)
        if not isinstance(inner, foolbox.models.Model) or isinstance(inner, others):
            raise ValueError(
                f"model must be a Foolbox model of PyTorch, such as PyTorchModel; got {type(inner).__name__}"
            )
        targeted = isinstance(criterion, TargetedMisclassification)
        if not targeted and not isinstance(criterion, Misclassification):
            raise ValueError(
                "criterion must be labels, or foolbox.criteria.Misclassification or TargetedMisclassification; got "
                f"{type(criterion).__name__}"
            )
        labels = criterion.target_classes if targeted else criterion.labels
        options = {**self._options, "targeted": targeted, "bounds": tuple(model.bounds), **more}
        if "generator" in options_of(self._attack):
            options["generator"] = self._generator
        return self._attack(model, **options), inputs.raw, labels.raw

    @staticmethod
    def _start(points: Any, inputs: Any) -> Tensor | None:
        """Starting points for `inputs`, if any were given."""
        found = points if points is None else ep.astensor(points)
        if found is not None and (not isinstance(found, ep.PyTorchTensor) or found.shape != inputs.shape):
            raise ValueError(
                f"starting_points must be a PyTorch tensor of the shape of the images, {tuple(inputs.shape)}; got "
                f"{type(points).__name__} {tuple(found.shape)}"
            )
        return None if found is None else found.raw


def _short(value: object) -> str:
    """A value for a repr: numbers and names as they are, what is longer by its type."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_short, value))}]"
    return repr(value) if value is None or isinstance(value, str | int | float) else type(value).__name__


@final
class FoolboxAttack(_Ours, FixedEpsilonAttack):  # type: ignore[misc]
    """An attack of this package as one of Foolbox's fixed-epsilon attacks::

        raw, clipped, success = FoolboxAttack(OrthoPGD, steps=20)(fmodel, images, criterion, epsilons=[2/255, 8/255])

    It goes wherever Foolbox takes an attack, ``repeat`` included. The raw images already lie in the ball and the
    bounds, so Foolbox's clipping leaves them as they are. Tensors come back as they came in: of PyTorch or of EagerPy.
    ``starting_points`` are where the first restart begins, pulled into the ball and projected onto the region.

    As with any Foolbox attack, the model is used in the mode it is in, so put it in evaluation mode first.

    Args:
        attack: a class such as `orthattack.OrthoPGD`.
        rel_stepsize: step size as a share of epsilon; by default the attack's own, which scales with epsilon too.
        **options: the class's, such as ``norm="l2"`` or ``alpha``, a step size in pixel units that is the same for all
            epsilons. Not ``eps``, ``bounds`` or ``targeted``, which come with the call: from ``epsilons``, from the
            model, and from the criterion, `Misclassification` (or labels) or `TargetedMisclassification`. Without a
            ``generator`` it draws from a stream of its own, seeded from torch's seed.

    Raises:
        ValueError: an option out of its range or one that comes with the call; the call raises it for another
            criterion and for models and images that are not PyTorch's.

    >>> from orthattack import OrthoPGD
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval()
    >>> fmodel = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    >>> images, labels = torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 2, 0])
    >>> attack = FoolboxAttack(OrthoPGD, norm="l2", steps=5)
    >>> attack
    FoolboxAttack(OrthoPGD, norm='l2', steps=5)
    >>> raw, clipped, success = attack(fmodel, images, labels, epsilons=[0.1, 0.5])
    >>> success.shape
    torch.Size([2, 4])
    """

    def __init__(self, attack: type[Attack], *, rel_stepsize: float | None = None, **options: Any) -> None:
        if "eps" in options:
            raise ValueError("eps cannot be an option: it comes with the call, attack(..., epsilons=[4/255, 8/255])")
        super().__init__(attack, options)
        self._rel_stepsize = rel_stepsize
        if rel_stepsize is not None:
            if "alpha" in options or "alpha" not in inspect.signature(attack).parameters:
                raise ValueError("rel_stepsize needs an attack with an option alpha, and that left out")
            self._attack(nn.Identity(), **options, alpha=rel_stepsize)  # a share has the range of a step size

    def __repr__(self) -> str:
        return self._shown(rel_stepsize=self._rel_stepsize)

    def run(
        self, model: Any, inputs: T, criterion: Any, *, epsilon: float, starting_points: Any = None, **kwargs: Any
    ) -> T:
        """Foolbox's entry for one epsilon: adversarial images for `inputs`, of their type."""
        raise_if_kwargs(kwargs)
        x, restore_type = ep.astensor_(inputs)
        epsilon = plain(epsilon)
        step = {} if self._rel_stepsize is None else {"alpha": self._rel_stepsize * epsilon}
        attack, images, labels = self._made(model, x, criterion, eps=epsilon, **step)
        result = attack.run(images, labels, start=self._start(starting_points, x))
        found: T = restore_type(ep.astensor(result.adversarials))
        return found


@final
class FoolboxMinimum(_Ours, MinimizationAttack):  # type: ignore[misc]
    """`orthattack.MinimumNorm`, or `orthattack.Bisection` of an attack that fills a ball, as one of Foolbox's
    minimisation attacks.

    With ``epsilons=None`` the smallest perturbations found are judged as they are. With a number those that are larger
    are pulled into its ball first, which keeps them orthogonal where Foolbox's clipping would not. Foolbox's
    ``early_stop`` makes no difference.

    Args:
        attack: a class such as `orthattack.OrthoPGD`, or one that minimises, such as `orthattack.OrthoMinimumNorm`,
            which alone takes ``starting_points``.
        eps: the first radius to try, in units of the model's bounds; None for one that minimises.
        max_eps: the largest radius to try; as for `Bisection`, like `trials`.
        trials: how many radii to try; makes no difference to one that minimises.
        **options: the class's, as for `FoolboxAttack`.

    Raises:
        ValueError: as for `FoolboxAttack` and `Bisection`.

    >>> from orthattack import OrthoPGD
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval()
    >>> fmodel = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    >>> images = torch.rand(4, 3, 2, 2)
    >>> attack = FoolboxMinimum(OrthoPGD, eps=0.1, trials=8)
    >>> raw, clipped, success = attack(fmodel, images, model(images).argmax(1), epsilons=[None, 0.0])
    >>> bool(success[1].any())
    False
    """

    def __init__(
        self,
        attack: type[Attack],
        *,
        eps: float | None = None,
        max_eps: float | None = None,
        trials: int = 12,
        **options: Any,
    ) -> None:
        super().__init__(attack, options)
        if eps is None and not self._is_minimal:
            raise ValueError(f"{attack.__name__} fills a ball: give eps, the first radius to try")
        if eps is not None and self._is_minimal:
            raise ValueError(f"{attack.__name__} looks for the smallest norm itself: leave eps out")
        self._eps, self._max_eps, self._trials = eps, max_eps, trials
        self._search(attack(nn.Identity(), **options, eps=max_eps if eps is None else eps))

    def __repr__(self) -> str:
        trials = None if self._is_minimal else self._trials
        return self._shown(eps=self._eps, max_eps=self._max_eps, trials=trials)

    def _search(self, attack: Attack) -> Attack | Bisection:
        return attack if self._is_minimal else Bisection(attack, self._max_eps, self._trials)

    def run(
        self,
        model: Any,
        inputs: T,
        criterion: Any,
        *,
        early_stop: float | None = None,  # noqa: ARG002
        starting_points: Any = None,
        **kwargs: Any,
    ) -> T:
        """Foolbox's entry: adversarial images for `inputs`, of their type, as near as were found."""
        raise_if_kwargs(kwargs)
        x, restore_type = ep.astensor_(inputs)
        start = self._start(starting_points, x)
        if start is not None and not self._is_minimal:
            raise TypeError(
                "a bisection begins at the images: starting_points are for FoolboxAttack, and for FoolboxMinimum of an "
                "attack that minimises, such as MinimumNorm"
            )
        first = self._max_eps if self._is_minimal else self._eps
        attack, images, labels = self._made(model, x, criterion, eps=first)
        more: dict[str, Any] = {} if start is None else {"start": start}
        result = self._search(attack).run(images, labels, **more)
        if self._is_minimal and self._max_eps is not None and (missed := int((~result.success).sum())) > 0:
            warn(cap_reached(missed, len(images), self._max_eps))
        found: T = restore_type(ep.astensor(result.adversarials))
        return found


class _PullingDistance(LpDistance):  # type: ignore[misc]
    """Foolbox's distance, except that a perturbation is shortened by pulling it towards the image, inside the threat
    model, and that what already lies in the ball stays bit for bit what it is."""

    def __init__(self, threat: ThreatModel) -> None:
        super().__init__(BALLS[threat.norm].order)
        self._threat = threat

    def __call__(self, references: T, perturbed: T) -> T:
        """As Foolbox measures, but in L0 pixels are counted, not the numbers in them."""
        if self._threat.norm != "l0":
            measured: T = super().__call__(references, perturbed)
            return measured
        (x, y), restore_type = ep.astensors_(references, perturbed)
        counted: T = restore_type(ep.astensor(perturbation_norm(y.raw.double() - x.raw.double(), "l0").to(x.raw)))
        return counted

    def clip_perturbation(self, references: T, perturbed: T, epsilon: float) -> T:
        """`perturbed` within `epsilon` of the references."""
        (x, y), restore_type = ep.astensors_(references, perturbed)
        x, y, epsilon = x.raw, y.raw, plain(epsilon)
        length = perturbation_norm(y.double() - x.double(), self._threat.norm)
        rows = (length > epsilon * (1 + 1e-6)).nonzero().squeeze(1)
        if len(rows) > 0:
            both = torch.stack([x[rows], y[rows]])  # which lie in the model's bounds, unknown here
            threat = replace(self._threat, eps=epsilon, bounds=(float(both.min()), float(both.max())))
            y = y.index_copy(0, rows, threat.around(x[rows]).shrunk(y[rows]))
        clipped: T = restore_type(ep.astensor(y))
        return clipped


@final
class FromFoolbox(Attack):
    """A Foolbox attack with the interface of the attacks here, as a baseline: measured and judged by us.

    Whether an adversarial succeeds is decided in one more pass of the model, on exactly what Foolbox returned as
    clipped (or the image, should that be NaN); its norm and ``|cos|`` with the image are recomputed in float64. The
    model is in evaluation mode for the while and comes back as it was. Foolbox draws from the global random numbers of
    torch and of NumPy: it is lent the attack's own streams, and the global ones stay as they are.

    Args:
        model: an nn.Module that takes images (N, C, H, W) in `bounds` and returns logits (N, K).
        attack: of Foolbox, such as ``foolbox.attacks.LinfPGD(steps=10)``, also repeated.
        norm: "linf", "l2", "l1" or "l0": that of the attack, if it has an `eps`.
        eps: radius in pixel units, one for all images; None for no limit, with attacks that minimise.
        bounds: smallest and largest pixel value.
        generator: source of Foolbox's random numbers, on the CPU; by default one of the attack's own, seeded from
            torch's seed.
        targeted: labels are the classes to reach, passed on as `foolbox.criteria.TargetedMisclassification`.

    An `orthattack.AttackResult`'s ``loss`` is the margin; ``steps`` and ``zero_gradients``, unknown to us, are 0; calls
    are counted around the model, averaged over the batch and rounded up. ``start`` makes no difference.

    Raises:
        ValueError: an argument outside these; the call raises it for bad images or labels. Foolbox's own errors pass
            through.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    >>> images, labels = torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 2, 0])
    >>> result = FromFoolbox(model, foolbox.attacks.LinfPGD(steps=5), "linf", 8 / 255).run(images, labels)
    >>> result.gradient_calls
    tensor([5, 5, 5, 5])
    """

    norms = get_args(Norm)

    def __init__(
        self,
        model: nn.Module,
        attack: Any,
        norm: Norm,
        eps: float | None,
        bounds: tuple[float, float] = (0, 1),
        generator: torch.Generator | None = None,
        *,
        targeted: bool = False,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ValueError(f"model must be an nn.Module, as Foolbox asks; got {type(model).__name__}")
        if not isinstance(attack, foolbox.Attack):
            raise ValueError(f"attack must be an attack of Foolbox, such as foolbox.attacks.LinfPGD(); got {attack!r}")
        if getattr(eps, "ndim", 0) > 0:
            raise ValueError("eps must be one number for all images, or None: Foolbox takes no other")
        once = attack.attack if isinstance(attack, foolbox.attacks.base.Repeated) else attack
        if eps is None and isinstance(once, FixedEpsilonAttack):
            raise ValueError(f"{type(once).__name__} needs an eps: only attacks that minimise go without")
        distance = once.distance if eps is not None and hasattr(type(once), "distance") else None
        if isinstance(distance, LpDistance) and norm in BALLS and distance.p != BALLS[norm].order:
            raise ValueError(f"norm must be that of {type(once).__name__}, L{distance.p:g}; got {norm!r}")
        if generator is not None and isinstance(generator, torch.Generator) and generator.device.type != "cpu":
            raise ValueError(f"generator must be one on the CPU; got one on {generator.device}")
        super().__init__(
            model,
            norm,
            UNLIMITED if eps is None else eps,
            _Delegate(attack),
            loss="margin",
            targeted=targeted,
            bounds=bounds,
            generator=generator,
        )


class _Delegate:
    """The search that leaves everything to a Foolbox attack and scores what comes back."""

    merit: Merit = "margin"
    stranger = "the Foolbox attack"

    def __init__(self, attack: Any) -> None:
        self.attack = attack
        self._others: tuple[Any, Any] | None = None  # where NumPy's and Python's random numbers go on

    def options(self, eps: float | Tensor) -> dict[str, object]:  # noqa: ARG002
        return {"attack": self.attack}

    def __call__(self, task: Task, start: Tensor | None) -> None:  # noqa: ARG002
        threat, goal = task.region.threat, task.goal
        if isinstance(threat.eps, Tensor) and threat.eps.ndim > 0:
            raise ValueError("a Foolbox attack takes one eps for all images, not one per sample")
        images = task.region.images.to(task.region.dtype)
        # All that it is handed it may write into, and into what it returns.
        handed, classes = images.clone(), goal.classes.clone()
        model = _Counted(task.oracle, goal.select(torch.arange(len(images), device=images.device))).eval()
        fmodel = foolbox.PyTorchModel(model, bounds=threat.bounds, device=images.device)
        criterion = TargetedMisclassification(classes) if goal.labels is None else Misclassification(classes)
        epsilon = None if threat.eps >= UNLIMITED else float(threat.eps)
        with torch.enable_grad(), self._lent_streams(task.generator, images.device):
            _, clipped, _ = self.attack(fmodel, handed, criterion, epsilons=epsilon)
        if not isinstance(clipped, Tensor) or clipped.shape != images.shape:
            found = tuple(clipped.shape) if isinstance(clipped, Tensor) else type(clipped).__name__
            raise ValueError(f"a Foolbox attack must return images {tuple(images.shape)}; got {found}")
        clipped = clipped.detach().to(images, copy=True)
        finite = clipped.isfinite().flatten(1).all(1).view(-1, 1, 1, 1)
        points = torch.where(finite, clipped, images)
        evaluation = task.oracle.evaluate(points, goal, task.loss, task.best.success[task.index], with_gradient=False)
        evaluation = replace(
            evaluation,
            forward_calls=evaluation.forward_calls + math.ceil(model.forward_calls / len(images)),
            gradient_calls=evaluation.gradient_calls + math.ceil(model.gradient_calls / len(images)),
        )
        task.best.offer(task.index, points, evaluation, 0)

    @contextmanager
    def _lent_streams(self, generator: torch.Generator, device: torch.device) -> Iterator[None]:
        """The global random numbers continue ours, for one thread at a time; the model's guard puts them back."""
        with global_random_numbers:
            if self._others is None:
                seed = generator.initial_seed() % 2**32
                self._others = np.random.RandomState(seed).get_state(), random.Random(seed).getstate()  # noqa: S311
            torch.set_rng_state(generator.get_state())
            if device.type == "cuda":
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(int(torch.randint(2**31, ())))
            np.random.set_state(self._others[0])
            random.setstate(self._others[1])
            try:
                yield
            finally:
                self._others = np.random.get_state(), random.getstate()
                generator.set_state(torch.get_rng_state())


class _Counted(nn.Module):
    """The borrowed model as Foolbox wants it, counting images evaluated and differentiated."""

    def __init__(self, oracle: Scorer, goal: Goal) -> None:
        super().__init__()
        self._oracle, self._goal = oracle, goal
        self.forward_calls = self.gradient_calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.forward_calls += len(images)
        if images.requires_grad:
            images.register_hook(self._count_gradient)  # type: ignore[no-untyped-call]
        return self._oracle.logits(images, self._goal)

    def _count_gradient(self, gradient: Tensor) -> None:
        self.gradient_calls += len(gradient)

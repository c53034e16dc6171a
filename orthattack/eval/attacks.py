"""The attacks an evaluation can run: ours by name, Foolbox's and torchattacks' as baselines, and a user's own function.

`attack_kind` understands a name and its parameters, and refuses what does not fit before anything runs;
`AttackKind.bind` makes the attack for a model and a radius. All get the same eps, steps and images, and the same
relative step size.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, Literal, Protocol

import foolbox
import numpy as np
import torch
from foolbox.attacks.base import FixedEpsilonAttack, MinimizationAttack
from torch import Tensor, nn

import orthattack.attacks as ours
from orthattack.attacks.attack import Attack, Options, OrthoOptions
from orthattack.eval import plugin
from orthattack.eval.errors import EvaluationError
from orthattack.interop.foolbox import FromFoolbox
from orthattack.threat import Norm

__all__ = [
    "DEFAULT_ATTACKS",
    "OURS",
    "AttackKind",
    "CallCounter",
    "Conditions",
    "Found",
    "Runner",
    "attack_kind",
    "drawing",
    "image_seed",
    "joint_seed",
    "list_attacks",
    "user_attack",
]

Source = Literal["orthattack", "foolbox", "torchattacks", "user"]

OURS = tuple(
    name
    for name in ours.__all__
    if inspect.isclass(getattr(ours, name)) and name not in ("AttackResult", "DetectorEvasion")
)
"""The names of our attacks; DetectorEvasion needs a detector, and is called from Python."""

DEFAULT_ATTACKS = ["FGSM", "OrthoFGSM", "foolbox:FGSM", "PGD", "OrthoPGD", "foolbox:PGD"]

_STEP = 2.5  # steps times step size, in units of eps: enough to cross the ball from a random start
_GIVEN = {"model", "norm", "eps", "bounds", "targeted", "generator", "detector"}  # by the evaluation, not the user


@dataclass(frozen=True)
class Conditions:
    """What all attacks of an evaluation share.

    Attributes:
        norm: "linf", "l2" or "l1".
        eps: radius in units of [0, 1] pixels; None for attacks that minimise the norm.
        steps: gradient steps of the iterative attacks, with a step size of ``2.5 * eps / steps`` where the attack has
            none of its own.
        classes: number of classes of the model.
    """

    norm: Norm = "linf"
    eps: float | None = 4 / 255
    steps: int = 10
    classes: int = 2


@dataclass(frozen=True)
class Found:
    """What an attack returned for a batch.

    Attributes:
        adversarials: whatever it was, to be checked.
        steps: (N,) that each took, if the attack says so.
        forward_calls: (N,) evaluations of the model, if the attack says so.
        gradient_calls: (N,) differentiations, likewise.
    """

    adversarials: Any
    steps: Tensor | None = None
    forward_calls: Tensor | None = None
    gradient_calls: Tensor | None = None


class Runner(Protocol):
    """An attack bound to a model and a radius."""

    def __call__(self, images: Tensor, labels: Tensor, seeds: Sequence[int]) -> Found:
        """Attack images (N, 3, H, W) with labels (N,); the random numbers come from the seeds, one per image."""


@dataclass(frozen=True)
class AttackKind:
    """An attack with its parameters, not yet bound to a model.

    Attributes:
        name: as asked for.
        source: whose it is.
        parameters: the user's.
        orthogonal: it promises a perturbation orthogonal to the image.
        minimal: it looks for the smallest perturbation instead of filling a ball.
        family: what it is an instance of, such as "PGD", whoever wrote it: attacks of a family are each other's
            baselines.
        norms: the norms it can be run in.
        make: binds it.
    """

    name: str
    source: Source
    parameters: Mapping[str, Any]
    orthogonal: bool
    minimal: bool
    family: str
    norms: tuple[Norm, ...]
    make: Callable[[nn.Module, Conditions], Runner] = field(repr=False)

    @property
    def identity(self) -> str:
        """What its random numbers are derived from: the same attack under another label draws the same."""
        return json.dumps([self.name, dict(self.parameters)], sort_keys=True)

    def bind(self, model: nn.Module, conditions: Conditions) -> Runner:
        """The attack on a model."""
        return self.make(model, conditions)

    def check(self, norm: Norm, steps: int) -> None:
        """Raise EvaluationError if the attack cannot be run in a norm or refuses one of its parameters."""
        if norm not in self.norms:
            raise EvaluationError(f"{self.name} works in {' or '.join(self.norms)}, not in {norm}")
        try:
            self.make(_Probe(), Conditions(norm, None if self.minimal else 0.01, steps))
        except EvaluationError:
            raise
        except Exception as error:  # whatever a foreign constructor says of its arguments
            raise EvaluationError(f"attack {self.name} cannot be made: {error}") from error


def image_seed(seed: int, image: str, attack: AttackKind) -> int:
    """The seed of one image's random numbers: it depends on nothing but the run's seed, the image and the attack."""
    digest = hashlib.sha256(json.dumps([seed, image, attack.identity]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def attack_kind(name: str, parameters: Mapping[str, Any] | None = None) -> AttackKind:
    """Understand an attack.

    Args:
        name: one of `OURS`; ``foolbox:NAME`` with a class of `foolbox.attacks`; ``torchattacks:NAME``; or
            ``package.module:function`` with a function that takes the model, and parameters called ``norm``, ``eps``,
            ``steps`` and ``seed`` if it has them, and returns a callable (images, labels) -> adversarial images.
        parameters: options of the attack. For MinimumNorm, ``attack`` names the one whose radius is searched.

    Raises:
        EvaluationError: there is no such attack, or it has no such option; the message names the nearest.
    """
    options = dict(parameters or {})
    prefix, colon, rest = name.partition(":")
    if not colon:
        return _ours(name, options)
    if prefix == "foolbox":
        return _foolbox(name, rest, options)
    if prefix == "torchattacks":
        return _torchattacks(name, rest, options)
    return _users(name, plugin.find(name), options)


def user_attack(name: str, factory: Callable[..., Any], parameters: Mapping[str, Any] | None = None) -> AttackKind:
    """The same for a function that is at hand."""
    return _users(name, factory, dict(parameters or {}))


def list_attacks() -> list[dict[str, Any]]:
    """Every attack that can be named, with its parameters and their defaults."""
    own = {name: _defaults(getattr(ours, name), _GIVEN | {"options"}) for name in OURS}
    theirs = {f"foolbox:{name}": _defaults(kind, _GIVEN) for name, kind in sorted(_of_foolbox().items())}
    return [{"name": name, "parameters": parameters} for name, parameters in (own | theirs).items()]


def _of_foolbox() -> dict[str, Any]:
    """Foolbox's attacks by name."""
    kinds = {
        name: kind
        for name, kind in vars(foolbox.attacks).items()
        if inspect.isclass(kind) and issubclass(kind, FixedEpsilonAttack | MinimizationAttack)
    }
    # What people call it, as Foolbox's own short names are those of L-infinity.
    return kinds | {"BIM": foolbox.attacks.LinfBasicIterativeAttack}


def _defaults(kind: Any, without: set[str]) -> dict[str, Any]:
    return {
        parameter.name: None if parameter.default is parameter.empty else parameter.default
        for parameter in inspect.signature(kind).parameters.values()
        if parameter.name not in without
    }


def _nearest(word: str, known: Sequence[str]) -> str:
    lower = {name.casefold(): name for name in known}
    close = difflib.get_close_matches(word.casefold(), list(lower), n=2, cutoff=0.4)
    return f"did you mean {' or '.join(lower[name] for name in close)}?" if close else f"there are {', '.join(known)}"


def _check_options(name: str, options: Mapping[str, Any], accepted: Sequence[str]) -> None:
    for option in options:
        if option not in accepted:
            raise EvaluationError(f"attack {name} has no option {option!r}; {_nearest(option, sorted(accepted))}")


def _accepted(kind: Any) -> list[str]:
    names = []
    for parameter in inspect.signature(kind).parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:  # Unpack[Options] or Unpack[OrthoOptions]
            options: Any = OrthoOptions if kind.__name__.startswith("Ortho") else Options
            names += list(inspect.get_annotations(Options)) + list(inspect.get_annotations(options))
        else:
            names.append(parameter.name)
    return [name for name in dict.fromkeys(names) if name not in _GIVEN]


def _ours(name: str, options: dict[str, Any]) -> AttackKind:
    lower = {known.casefold(): known for known in OURS}
    if name.casefold() not in lower:
        raise EvaluationError(
            f"unknown attack {name!r}; {_nearest(name, OURS)} Others: foolbox:NAME, torchattacks:NAME"
        )
    kind = getattr(ours, lower[name.casefold()])
    if kind is ours.MinimumNorm:
        return _minimum(options)
    name = kind.__name__
    accepted = _accepted(kind)
    _check_options(name, options, accepted)
    takes_generator = "generator" in inspect.signature(kind).parameters or "early_stop" in accepted

    def make(model: nn.Module, conditions: Conditions) -> Runner:
        return _OwnRunner(_own(kind, takes_generator, options, model, conditions))

    return AttackKind(
        name, "orthattack", options, name.startswith("Ortho") and options.get("enforce") != "gradient", False,
        name.removeprefix("Ortho"), ("linf", "l2", "l1"), make,
    )  # fmt: skip


def _own(
    kind: Any, takes_generator: bool, options: Mapping[str, Any], model: nn.Module, conditions: Conditions
) -> Attack:
    more = dict(options)
    if "steps" in inspect.signature(kind).parameters:
        more.setdefault("steps", conditions.steps)
    if takes_generator:
        more["generator"] = torch.Generator().manual_seed(0)
    attack: Attack = kind(model, conditions.norm, conditions.eps, **more)
    return attack


def _minimum(options: dict[str, Any]) -> AttackKind:
    own = {key: options[key] for key in ("trials", "max_eps") if key in options}
    inner_options = {key: value for key, value in options.items() if key not in ("attack", *own)}
    inner = _ours(str(options.get("attack", "OrthoPGD")), inner_options)
    if inner.minimal:
        raise EvaluationError("MinimumNorm needs attack = the name of an attack with an eps, such as OrthoPGD")
    kind = getattr(ours, inner.name)
    first = {"linf": 4 / 255, "l2": 0.5, "l1": 8.0}  # where to begin; the radius is doubled until something falls

    def make(model: nn.Module, conditions: Conditions) -> Runner:
        start = Conditions(conditions.norm, first[conditions.norm], conditions.steps, conditions.classes)
        return _OwnRunner(ours.MinimumNorm(_own(kind, inner.family != "FGSM", inner_options, model, start), **own))

    return AttackKind("MinimumNorm", "orthattack", options, inner.orthogonal, True, "MinimumNorm", inner.norms, make)


class _OwnRunner:
    def __init__(self, attack: Any) -> None:
        self._attack = attack

    def __call__(self, images: Tensor, labels: Tensor, seeds: Sequence[int]) -> Found:
        result = self._attack.run(images, labels, seeds=seeds)
        return Found(result.adversarials, result.steps, result.forward_calls, result.gradient_calls)


def _foolbox(name: str, rest: str, options: dict[str, Any]) -> AttackKind:
    known = _of_foolbox()
    if rest not in known:
        raise EvaluationError(f"Foolbox has no attack {rest!r} that can be run here; {_nearest(rest, sorted(known))}")
    kind = known[rest]
    parameters = inspect.signature(kind).parameters
    _check_options(name, options, [key for key in parameters if key not in _GIVEN])
    minimal = issubclass(kind, MinimizationAttack)
    order = next((norm for prefix, norm in _FOOLBOX_NORMS if kind.__name__.startswith(prefix)), None)

    def make(model: nn.Module, conditions: Conditions) -> Runner:
        more = dict(options)
        if not minimal and "rel_stepsize" in parameters:
            more.setdefault("steps", conditions.steps)
            if "abs_stepsize" not in more:
                more.setdefault("rel_stepsize", _STEP / more["steps"])
        attack = kind(**more)

        def run(images: Tensor, labels: Tensor, seeds: Sequence[int]) -> Found:
            generator = torch.Generator().manual_seed(joint_seed(seeds))
            return Found(
                FromFoolbox(model, attack, conditions.norm, conditions.eps, generator=generator)(images, labels)
            )

        return run

    norms: tuple[Norm, ...] = (order,) if order is not None else ("linf", "l2", "l1")
    return AttackKind(name, "foolbox", options, False, minimal, _family(kind.__name__), norms, make)


_FOOLBOX_NORMS: tuple[tuple[str, Norm], ...] = (
    ("Linf", "linf"), ("LInf", "linf"), ("L2", "l2"), ("L1", "l1"), ("DDN", "l2"), ("NewtonFool", "l2"),
    ("SparseL1", "l1"), ("VirtualAdv", "l2"), ("EAD", "l1"), ("GenAttack", "linf"),
)  # fmt: skip

_FAMILIES = {"FastGradientAttack": "FGSM", "ProjectedGradientDescentAttack": "PGD", "BasicIterativeAttack": "PGD",
             "MomentumIterativeFastGradientMethod": "MIFGSM", "BIM": "PGD"}  # fmt: skip


def _family(name: str) -> str:
    for norm in ("Linf", "L2", "L1"):
        name = name.removeprefix(norm).removesuffix(norm)
    return _FAMILIES.get(name, name)


def _torchattacks(name: str, rest: str, options: dict[str, Any]) -> AttackKind:
    try:
        package = import_module("torchattacks")
    except ImportError as error:
        raise EvaluationError(f"{name} needs torchattacks: pip install 'orthattack[torchattacks]'") from error
    known = [
        key
        for key, kind in vars(package).items()
        if inspect.isclass(kind) and key not in ("Attack", "MultiAttack", "LGV", "VANILA")
    ]
    if rest not in known:
        raise EvaluationError(
            f"torchattacks has no attack {rest!r} that can be run here; {_nearest(rest, sorted(known))}"
        )
    kind = getattr(package, rest)
    parameters = inspect.signature(kind).parameters
    _check_options(name, options, [key for key in parameters if key not in _GIVEN])
    minimal = "eps" not in parameters

    def make(model: nn.Module, conditions: Conditions) -> Runner:
        more = dict(options)
        if "norm" in parameters:
            more["norm"] = {"linf": "Linf", "l2": "L2", "l1": "L1"}[conditions.norm]
        if "n_classes" in parameters:
            more.setdefault("n_classes", conditions.classes)
        if not minimal:
            more["eps"] = conditions.eps
            if "steps" in parameters:
                more.setdefault("steps", conditions.steps)
                if "alpha" in parameters and conditions.eps is not None:
                    more.setdefault("alpha", _STEP * conditions.eps / more["steps"])
        attack = kind(model, **more)

        def run(images: Tensor, labels: Tensor, seeds: Sequence[int]) -> Found:
            with drawing(joint_seed(seeds)):
                return Found(attack(images, labels))

        return run

    norms: tuple[Norm, ...] = ("linf", "l2") if "norm" in parameters else ("l2",) if _is_l2(rest) else ("linf",)
    return AttackKind(name, "torchattacks", options, False, minimal, _family(rest), norms, make)


def _is_l2(name: str) -> bool:
    return name.endswith("L2") or name in ("CW", "DeepFool")


def _users(name: str, factory: Any, options: dict[str, Any]) -> AttackKind:
    if not callable(factory):
        raise EvaluationError(f"attack {name!r} must be a function of the model; it is a {type(factory).__name__}")
    parameters = inspect.signature(factory).parameters
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    if not takes_any:
        _check_options(name, options, list(parameters)[1:])

    def make(model: nn.Module, conditions: Conditions) -> Runner:
        shared = {"norm": conditions.norm, "eps": conditions.eps, "steps": conditions.steps}
        more = {key: value for key, value in shared.items() if key in parameters}
        attack = factory(model, **{**more, **options})

        def run(images: Tensor, labels: Tensor, seeds: Sequence[int]) -> Found:
            with drawing(joint_seed(seeds)):
                return Found(attack(images, labels))

        return run

    return AttackKind(name, "user", options, False, False, name, ("linf", "l2", "l1"), make)


def joint_seed(seeds: Sequence[int]) -> int:
    """One seed for a batch, for attacks that draw for all its images at once."""
    digest = hashlib.sha256(json.dumps(list(seeds)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@contextmanager
def drawing(seed: int) -> Iterator[None]:
    """Torch's and NumPy's global random numbers start at `seed`, and are then put back."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    before = np.random.get_state()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        try:
            yield
        finally:
            np.random.set_state(before)


class CallCounter(nn.Module):
    """A model that counts, per sample, how often it is evaluated and differentiated, whoever does it."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.forward_calls = 0
        self.gradient_calls = 0

    def forward(self, images: Tensor) -> Tensor:
        self.forward_calls += len(images)
        if images.requires_grad:
            images.register_hook(self._count_gradient)  # type: ignore[no-untyped-call]
        logits: Tensor = self.model(images)
        return logits

    def _count_gradient(self, gradient: Tensor) -> None:
        self.gradient_calls += len(gradient)


class _Probe(nn.Module):
    """Stands for a model while an attack's parameters are tried; torchattacks looks for a parameter's device."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :2] * self.weight

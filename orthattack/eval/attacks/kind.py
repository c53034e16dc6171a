"""What an attack is to an evaluation, whoever wrote it."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from orthattack.attacks.base import Card
from orthattack.attacks.task import OnStep
from orthattack.eval.errors import EvaluationError, nearest
from orthattack.threat import Norm

Origin = Literal["orthattack", "foolbox", "torchattacks", "user"]
Goals = Literal["any", "untargeted", "targeted"]

GIVEN = {"model", "norm", "eps", "bounds", "targeted", "generator", "detector"}  # by the evaluation, not the user


@dataclass(frozen=True)
class Conditions:
    """What all attacks of an evaluation share."""

    norm: Norm = "linf"
    eps: float | None = 4 / 255  # radius in units of [0, 1] pixels; None for attacks that minimise the norm
    # gradient steps of the iterative attacks, with a step size of `2.5 * eps / steps` where the attack has none
    # of its own
    steps: int = 10
    classes: int = 2  # number of classes of the model
    batch_size: int = 32  # how many images the model is given at a time
    levels: int | None = None  # what the images are stored with, if adversarials are to be exact there
    targeted: bool = False  # the labels are the classes to reach
    on_step: OnStep | None = None  # is told of each batch of points that an attack with our interface scores
    early_stop: bool = False  # whether ours leave an image once it is fooled, where they do not say themselves
    queries: int | None = None  # evaluations of the model per image, at most, for attacks that can be told


@dataclass(frozen=True)
class Found:
    """What an attack returned for a batch."""

    adversarials: Any  # whatever it was, to be checked
    steps: Tensor | None = None  # (N,) that each took, if the attack says so
    forward_calls: Tensor | None = None  # (N,) evaluations of the model, if the attack says so
    gradient_calls: Tensor | None = None  # (N,) differentiations, likewise


Runner = Callable[[Tensor, Tensor, Sequence[int]], Found]
"""An attack bound to a model and a radius: of images (N, 3, H, W), labels or targets (N,) and seeds, one each."""


class OwnRunner:
    """An attack with the interface of ours: it says what it took of each image, and draws from each image's seed."""

    def __init__(self, attack: Any, batch_size: int | None = None) -> None:
        self._attack = attack
        self._more = {} if batch_size is None else {"batch_size": batch_size}

    def tell(self, step: Callable[[str], object]) -> None:
        """Have each step told, and of how many."""
        attack = getattr(self._attack, "attack", self._attack)  # of a bisection
        names = ("steps", "gradients") if attack.card.minimal else ("steps", "queries")  # what steps are numbered by
        counts = (getattr(attack, name, None) for name in names)
        last = next((f"/{count}" for count in counts if isinstance(count, int)), "")
        attack._pulse = lambda number: step(f"step {number}{last}")

    def __call__(self, images: Tensor, labels: Tensor, seeds: Sequence[int]) -> Found:
        result = self._attack.run(images, labels, seeds=seeds, **self._more)
        return Found(result.adversarials, result.steps, result.forward_calls, result.gradient_calls)


@dataclass(frozen=True)
class AttackKind:
    """An attack with its parameters, not yet bound to a model."""

    name: str  # as asked for
    source: Origin  # whose it is
    parameters: Mapping[str, Any]  # the user's, as `described`
    card: Card  # what it is; attacks of a family are each other's baselines, whoever wrote them
    norms: tuple[Norm, ...]  # the norms it can be run in
    bind: Callable[[nn.Module, Conditions], Runner] = field(repr=False)  # makes the attack on a model
    early_stop: bool | None = False  # whether it leaves an image once it is fooled; None: as the run has it
    # code that is not ours runs in it: another library's, a user's, or a user's loss or direction
    is_foreign: bool = True
    goals: Goals = "any"  # what it can be run for: targeted, it is given classes to reach
    aimed_card: Card | None = None  # what it then is, if that is something else

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", {key: described(value) for key, value in self.parameters.items()})

    @property
    def orthogonal(self) -> bool:
        """Whether it promises a perturbation that is orthogonal to something."""
        return self.card.is_orthogonal and self.card.exact

    @property
    def climbs(self) -> object:
        """The loss that it climbs, as `described`; None for one of its own."""
        return described(self.card.loss, with_source=True)

    @property
    def identity(self) -> str:
        """What its random numbers are derived from: the same attack under another label draws the same."""
        return json.dumps([self.name, dict(self.parameters)], sort_keys=True)

    def check(
        self, norm: Norm, steps: int, levels: int | None = None, targeted: bool = False, queries: int | None = None
    ) -> None:
        """Raise EvaluationError if the attack cannot be run in a norm, or towards classes, or refuses a parameter."""
        if norm not in self.norms:
            raise EvaluationError(
                f"{self.name} works in {' or '.join(self.norms)}, not in {norm}: choose --norm {self.norms[0]}, or "
                "give it a norm and eps of its own in a suite"
            )
        if self.goals == "targeted" and not targeted:
            raise EvaluationError(f"{self.name} only reaches given classes: give the run targets, or leave it out")
        if self.goals == "untargeted" and targeted:
            own = "let it take targeted, which is then true, as an argument"
            raise EvaluationError(
                f"{self.name} cannot be given classes to reach, as the run's targets ask: "
                + (own if self.source == "user" else "leave it out")
            )
        if self.source == "user":  # whose function may do anything with the model
            return
        try:
            eps = None if self.card.minimal else 0.01
            self.bind(Placeholder(), Conditions(norm, eps, steps, levels=levels, targeted=targeted, queries=queries))
        except EvaluationError:
            raise
        except ModuleNotFoundError as error:
            raise EvaluationError(f"{self.name} needs {error.name}: pip install {error.name}") from error
        except Exception as error:  # whatever a foreign constructor says of its arguments
            raise EvaluationError(f"attack {self.name} cannot be made: {error}") from error


def listed(
    name: str, kind: Any, norms: Sequence[Norm], in_force: Mapping[str, Any], goals: Goals = "any", needs: str = ""
) -> dict[str, Any]:
    """An attack that can be named, for a list: what it can be run for, and its ``parameters``, as a run that says
    nothing of them uses them; ``needs`` is a package that it needs and that is not installed."""
    without = GIVEN | {"options", "distance", "max_epsilon", "pixels"}
    parameters = {
        parameter.name: None if parameter.default is parameter.empty else parameter.default
        for parameter in inspect.signature(kind).parameters.values()
        if parameter.name not in without
    }
    missing = needs if needs and find_spec(needs) is None else ""
    return {"name": name, "norms": [*norms], "goals": goals, "needs": missing, "parameters": {**parameters, **in_force}}


def described(value: object, with_source: bool = False) -> object:
    """An option as a manifest can keep it: numbers, text and lists as they are, a tensor by its content, code by name,
    with a digest of a function's source if asked for.

    >>> described([1, torch.zeros(2), len])
    [1, 'tensor of shape (2,), torch.float32, SHA-256 af5570f5a1810b7a', 'builtins.len']
    """
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, list | tuple):
        return [described(item, with_source) for item in value]
    if isinstance(value, Mapping):
        return {str(key): described(item, with_source) for key, item in value.items()}
    if isinstance(value, Tensor):
        content = value.detach().cpu().contiguous()
        digest = hashlib.sha256(content.view(torch.uint8).numpy().tobytes() if content.numel() else b"").hexdigest()
        return f"tensor of shape {tuple(value.shape)}, {value.dtype}, SHA-256 {digest[:16]}"
    name = getattr(value, "__qualname__", type(value).__qualname__)
    source = ""
    with suppress(OSError, TypeError):  # no function, or written where nothing was kept
        source = inspect.getsource(value) if with_source else ""  # type: ignore[arg-type]
    digest = f", source SHA-256 {hashlib.sha256(source.encode()).hexdigest()[:16]}" if source else ""
    return f"{getattr(value, '__module__', type(value).__module__)}.{name}{digest}"


def suggested(word: str, known: Sequence[str]) -> str:
    lower = {name.casefold(): name for name in known}
    close = nearest(word.casefold(), lower, 2, 0.4)
    return f"did you mean {' or '.join(lower[name] for name in close)}?" if close else f"there are {', '.join(known)}"


def check_options(name: str, options: Mapping[str, Any], accepted: Sequence[str]) -> None:
    """EvaluationError if an option is none of those."""
    for option in options:
        if option not in accepted:
            raise EvaluationError(f"attack {name} has no option {option!r}; {suggested(option, sorted(accepted))}")


def class_named(
    name: str, rest: str, library: str, known: Mapping[str, Any], not_run: Mapping[str, str], options: Mapping[str, Any]
) -> Any:
    """The class that another library calls `rest`, one of those `known`. EvaluationError: there is none, it cannot be
    run here, it has no such options, or the steps are no number of steps."""
    if rest in not_run:
        raise EvaluationError(f"{name} cannot be run here: {not_run[rest]}")
    if rest not in known:
        raise EvaluationError(
            f"{library} has no attack {rest!r} that can be run here; {suggested(rest, sorted(known))}"
        )
    accepted = [key for key in inspect.signature(known[rest]).parameters if key not in {*GIVEN, "distance"}]
    check_options(name, options, accepted)
    steps = options.get("steps", 1)
    if not isinstance(steps, int) or isinstance(steps, bool) or steps < 1:
        raise EvaluationError(f"attack {name}: steps must be a whole number, at least 1; got {steps!r}")
    return known[rest]


class Placeholder(nn.Module):
    """Stands for a model while an attack's parameters are tried; torchattacks looks for a parameter's device."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :2] * self.weight


STEP = 2.5  # steps times step size, in units of eps: enough to cross the ball from a random start

_FAMILIES = {"FastGradientAttack": "FGSM", "ProjectedGradientDescentAttack": "PGD", "BasicIterativeAttack": "PGD",
             "MomentumIterativeFastGradientMethod": "MIFGSM", "BIM": "PGD"}  # fmt: skip


def family(name: str) -> str:
    for norm in ("Linf", "L2", "L1"):
        name = name.removeprefix(norm).removesuffix(norm)
    return _FAMILIES.get(name, name)

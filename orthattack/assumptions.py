"""What an attack takes for granted of a model: that it answers each image for itself, twice the same, with logits.

`observe` asks the model about one image, alone and beside another, in two small passes as a rule. The API warns of what
it finds (`Observer`); the evaluation can do as it likes with the `Behaviour`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from orthattack.arguments import FLOATS, same_values, warn
from orthattack.lending import Model, global_random_numbers, random_stream

DRAWS, NEEDED = 10, 8
"""A model that draws at random is fooled by an image if `NEEDED` of `DRAWS` fresh answers are wrong: were it right as
often as wrong, so many would come by chance once in 18 times (a sign test), where a mere majority would twice in 5."""

PROBABILITIES = (
    "the model returns probabilities, not logits (all in [0, 1], each row sums to 1): the gradients of a loss on them "
    "vanish where the model is sure, so attacks look weaker than they are; remove the final softmax"
)
SIGMOIDS = (
    "the model seems to return sigmoids, not logits (all in [0, 1], and a row does not sum to 1): losses take the "
    "softmax of what they get, and gradients vanish where a sigmoid is saturated, so attacks look weaker than they "
    "are; remove the final sigmoid, which predicts the same"
)

_NOISE = 1e-3
"""Batches of another size are added up in another order, which moves logits by 1e-5 of their spread at most."""
_MOVES = ("Alias", "Cat", "Clone", "ToCopy", "View", "Unsafe", "Reshape", "Slice", "Squeeze", "Unsqueeze", "Permute")
"""Operations of autograd that only hand values on."""


@dataclass(frozen=True)
class Behaviour:
    """How a model answered about one image; shares of the spread of its logits.

    Attributes:
        noise: how far two answers to the same image are apart; 0 but for round-off for one that does not draw.
        dependence: how far the answer moves when another image is put beside it; 0 but for round-off if it is the
            image's own. Unknown, and 0, for a model that draws.
        statistics: names of the batch norms that have no running statistics, and use the batch's.
        probabilities: whether the answers are probabilities.
        sigmoids: whether they are sigmoids, one per class.
    """

    noise: float = 0.0
    dependence: float = 0.0
    statistics: tuple[str, ...] = ()
    probabilities: bool = False
    sigmoids: bool = False

    @property
    def is_random(self) -> bool:
        """Whether two answers to the same image differ."""
        return self.noise > 0

    @property
    def is_of_the_batch(self) -> bool:
        """Whether an answer depends on what else is in the batch."""
        return self.dependence > 0 or (self.is_random and len(self.statistics) > 0)

    def on_randomness(self, who: str = "the model", can_average: bool = True) -> str | None:
        """What to say of a model, or whoever it is, that draws; None of one that does not."""
        if not self.is_random:
            return None
        mean = "; a gradient of one draw says little, so average them with eot_samples, such as 20" * can_average
        return (
            f"{who} draws at random or keeps a state: two answers to the same image differ by "
            f"{self.noise:.2g} of the answers' spread. A success is reported where at least {NEEDED} of {DRAWS} fresh "
            f"answers confirm it{mean}"
        )

    def on_batches(self, who: str = "the model") -> str | None:
        """What to say of a model, or whoever it is, whose answers depend on the batch; None of one whose do not."""
        if not self.is_of_the_batch:
            return None
        found = ""
        if self.dependence > 0:
            found = f", beside another image it moves by {self.dependence:.2g} of the answers' spread"
        cause = "it may use statistics of the batch, or mix its images"
        if self.statistics:
            names = ", ".join(map(repr, self.statistics[:3])) + (", ..." if len(self.statistics) > 3 else "")
            cause = f"batch norm without running statistics ({names}) uses those of the batch"
        return (
            f"{who}'s answer to an image depends on the rest of its batch{found}: {cause}. What fools it in one "
            "batch may not in another, and results change with the batch size; give the norms running statistics "
            f"(track_running_stats=True), or take lambda x: torch.cat([{who.split()[-1]}(one[None]) for one in x])"
        )


def observe(lent: Model, images: Tensor, bounds: tuple[float, float] = (0, 1), module: object = None) -> Behaviour:
    """How a model answers about the first of `images`, a little paler, alone and beside another one made from it.

    It leaves no trace: random states of torch, NumPy and Python are what they were, and a module is asked through a
    twin that shares its weights but not its buffers, counters and lists. A model that fails, or whose answer is not
    logits, shows nothing here: its own first pass says why.

    Args:
        lent: images (N, C, H, W) to logits (N, K), in evaluation mode.
        images: (N, C, H, W), N >= 1.
        bounds: smallest and largest pixel value.
        module: where to look for batch norms, if not in `lent`.
    """
    module = lent if module is None else module
    # What torch.compile made would be compiled anew for each of these batches.
    ask = _twin(getattr(lent, "_orig_mod", lent))
    (low, high), image = bounds, images[:1].detach()
    image = 0.95 * image + 0.025 * (low + high)  # off the bounds, which the other one reaches, as a maximum would show
    beside = [low + 0.8 * (high - image.flip(-1)), low + 0.8 * (image.flip(-2) - low)]
    beside[0][..., 0, 0], beside[0][..., -1, -1] = low, high
    with _untouched(image.device) as random_states, torch.no_grad():
        before = random_states()
        alone = _answer(ask, image)
        draws = not same_values(before, random_states())
        alone, pair = _finite(alone, _answer(ask, torch.cat([image, beside[0]])))
        if pair is None or (alone is not None and alone.shape[1] != pair.shape[1]):
            return Behaviour()
        seen = pair if alone is None else torch.cat([alone, pair])
        epsilon = torch.finfo(pair.dtype).eps
        sums, tolerance = seen.double().sum(1).tolist(), max(1e-4, 1.5 * epsilon)
        ends = float(seen.amin()), float(seen.amax())
        probabilities = are_probabilities(*ends, sums, tolerance)
        sigmoids = ends[0] >= 0 and ends[1] <= 1 and not probabilities and _ends_in_sigmoid(ask, image)
        first = pair[:1] if alone is None else alone
        spread = max(float(first.amax() - first.amin()), 1e-3 * float(first.abs().amax()), 1e-300)

        def share(a: Tensor, b: Tensor) -> float:
            return float((a - b).abs().amax()) / spread

        statistics = tuple(batch_statistics(module))
        if not draws and alone is not None and share(alone, pair[:1]) == 0:
            return Behaviour(0.0, 0.0, statistics, probabilities, sigmoids)
        # Something differs, if only by round-off: twice the same question, in a batch of the same size.
        smallest = max(1e-4 if image.is_cuda else 1e-5, 8 * epsilon)
        for _ in range(DRAWS if draws else 1):
            answers = [_answer(ask, torch.cat([image, another])) for another in beside]
            again, other = _finite(*answers)
            if again is not None and (noise := share(again[:1], pair[:1])) > smallest:
                return Behaviour(noise, 0.0, statistics, probabilities, sigmoids)
        dependence = 0.0 if other is None else share(other[:1], pair[:1])
        tolerance = max(_NOISE, 8 * epsilon)
        if dependence <= tolerance and alone is not None:
            # A rounding inside the model may turn round-off into a whole unit, so more is asked of the size alone.
            dependence, tolerance = share(alone, pair[:1]), max(0.05, 8 * epsilon)
        return Behaviour(0.0, dependence if dependence > tolerance else 0.0, statistics, probabilities, sigmoids)


class Observer:
    """Looks at a model once for each of its states, and warns once of each thing found, but of what is to go unsaid."""

    def __init__(self, unsaid: Iterable[str] = ()) -> None:
        self._state: tuple[object, ...] | None = None
        self._behaviour = Behaviour()
        self._said = set(unsaid)

    def of(self, model: Model, lent: Model, images: Tensor, bounds: tuple[float, float]) -> Behaviour:
        """The behaviour of the borrowed model `lent`, asked for only if `model` has changed since the last time."""
        state = _state(model)
        if state != self._state:
            self._behaviour, self._state = observe(lent, images, bounds, model), state
        return self._behaviour

    def say(self, kind: str, message: str | None) -> None:
        """Warn, unless it has been said, or there is nothing to say."""
        if message is not None and kind not in self._said:
            self._said.add(kind)
            warn(message)


def batch_statistics(model: object) -> list[str]:
    """Names of the batch norms that use the batch's statistics in evaluation mode too, having none of their own."""
    named = model.named_modules() if isinstance(model, nn.Module) else []
    return [
        name or type(module).__name__
        for name, module in named
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None
    ]


def are_probabilities(low: float, high: float, sums: Iterable[float], tolerance: float = 1e-2) -> bool:
    """Whether logits from `low` to `high`, with these sums per image, are probabilities, in half precision too."""
    return low >= 0 and high <= 1 and all(abs(total - 1) <= tolerance for total in sums)


def _ends_in_sigmoid(model: Model, image: Tensor) -> bool:
    """Whether the last thing that a model computes is a sigmoid, so that logits that happen to lie in [0, 1] are not
    taken for its values."""
    with torch.enable_grad():
        answer = _answer(model, image.clone().requires_grad_())
    last = None if answer is None else answer.grad_fn
    while last is not None and last.name().startswith(_MOVES):
        last = last.next_functions[0][0]
    return last is not None and last.name().startswith("Sigmoid")


def _finite(*answers: Tensor | None) -> list[Tensor | None]:
    """Answers on the host, None for those that are not finite: of a GPU all is asked at once."""
    given = [answer.detach() for answer in answers if answer is not None]
    if given and given[0].is_cuda:
        numbers = torch.cat([answer.flatten() for answer in given]).cpu()
        flat = torch.split(numbers, [answer.numel() for answer in given])
        given = [part.view(answer.shape) for part, answer in zip(flat, given, strict=True)]
    left = iter(given)
    found = [None if answer is None else next(left) for answer in answers]
    return [None if answer is None or not bool(answer.isfinite().all()) else answer for answer in found]


def _answer(model: Model, images: Tensor) -> Tensor | None:
    """What a model says, with its graph, or None if that is no logits (N, K)."""
    try:
        logits = model(images.clone())
    except Exception:  # a model's own code may raise anything, and will again where it is not caught
        return None
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images) or logits.shape[1] == 0:
        return None
    is_plain = logits.dtype in FLOATS and logits.layout == torch.strided and not logits.is_meta
    return logits if is_plain else None


def _state(model: Model) -> tuple[object, ...]:
    """What may change how a module answers: its parts and their settings, not the values of its weights."""
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    settings = [
        (name, value)
        for module in modules
        for name, value in vars(module).items()
        if isinstance(value, bool | float | str) and name != "training"  # an int may be a counter
    ]
    missing = [[name for name, buffer in module._buffers.items() if buffer is None] for module in modules]
    return (id(model), [id(module) for module in modules], settings, missing)


def _twin(model: Model) -> Model:
    """A module with the same weights and settings, which remembers for itself what it is asked; or the model itself."""
    if not isinstance(model, nn.Module) or isinstance(model, torch.jit.ScriptModule):
        return model
    made: dict[int, nn.Module] = {}

    def copied(module: nn.Module) -> nn.Module:
        if id(module) not in made:
            made[id(module)] = twin = copy.copy(module)
            state = {k: copy.copy(v) if isinstance(v, list | dict | set) else v for k, v in vars(module).items()}
            state["_buffers"] = {name: None if b is None else b.clone() for name, b in module._buffers.items()}
            state["_modules"] = {name: None if m is None else copied(m) for name, m in module._modules.items()}
            vars(twin).update(state)
        return made[id(module)]

    try:
        return copied(model)
    except Exception:  # a module's own way of being copied may raise anything
        return model


@contextmanager
def _untouched(device: torch.device) -> Iterator[Callable[[], list[Any]]]:
    """The states of all streams that a model may draw from, which come back as they were."""
    streams = list(map(random_stream, ["Python", "NumPy", "cpu", *([str(device)] if device.type == "cuda" else [])]))
    with global_random_numbers:
        before = [read() for read, _ in streams]
        try:
            yield lambda: [read() for read, _ in streams]
        finally:
            for (_, write), state in zip(streams, before, strict=True):
                write(state)

"""Models of models: with a normalisation, several as one, and whether one is fooled."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.fx
from torch import Tensor, nn

from orthattack.arguments import (
    FLOATS,
    check_batch,
    check_bounds,
    check_count,
    check_flag,
    check_labels,
    check_model,
    is_number,
    plain,
    warn,
    why_too_dark,
)
from orthattack.assumptions import DRAWS, NEEDED, Behaviour, observe
from orthattack.lending import Model, borrowed

__all__ = ["Ensemble", "Model", "Normalized", "check_finite", "checked_logits", "explained", "fooled"]


class Normalized(nn.Module):
    """A model that takes images in [0, 1] and normalises them itself: ``model((images - mean) / std)``.

    Args:
        model: takes normalised images.
        mean: one number per channel, in units of [0, 1] pixels, or one for all.
        std: one number > 0 per channel, or one for all.

    Raises:
        ValueError: the lengths differ, or a std is not positive; the call raises it for images with other channels.

    >>> model = Normalized(nn.Flatten(), mean=[0.5], std=[0.25])
    >>> model(torch.ones(1, 1, 1, 2))
    tensor([[2., 2.]])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: float | Sequence[float], std: float | Sequence[float]) -> None:
        super().__init__()
        check_model("model", model)
        means, stds = _channels(mean), _channels(std)
        if not 0 < len(means) == len(stds) or not all(map(math.isfinite, means + stds)) or min(stds) <= 0:
            raise ValueError(f"mean and std must have one number per channel, std > 0; got {mean} and {std}")
        self.model = model
        self.register_buffer("mean", torch.tensor(means).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(stds).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        images = _with_channels(images, self.mean)
        logits: Tensor = self.model((images - self.mean.to(images.dtype)) / self.std.to(images.dtype))
        return logits


def _channels(values: Any) -> list[float]:
    """One number, or one per channel in a sequence, array or tensor of any shape, as a list; empty if it is no such."""
    values = plain(values)
    if isinstance(values, Iterable) and not isinstance(values, str):
        values = [plain(value) for value in (values.flatten() if hasattr(values, "flatten") else values)]
    else:
        values = [values]
    return [float(value) for value in values] if all(map(is_number, values)) else []


def _with_channels(images: Tensor, mean: Tensor) -> Tensor:
    if len(mean) > 1 and images.shape[-3] != len(mean):  # three means would make three channels of one
        raise ValueError(
            f"images must have {len(mean)} channels, as mean and std have; got shape {tuple(images.shape)}"
        )
    return images


torch.fx.wrap("_with_channels")  # a leaf, for tracing cannot follow a condition


class Ensemble(nn.Module):
    """Several models as one, to craft adversarials that transfer to others.

    Args:
        models: each takes images (N, C, H, W) and returns logits (N, K), with the same classes; at least one.
        average: "logits" averages the logits (Dong et al. 2018, arXiv:1710.06081); "loss" returns
            ``mean_m log softmax(z_m)``, from which ``loss=Ensemble.mean_loss`` makes the mean of the models'
            cross-entropies ("ce" would normalise once more; saturated, they give way to the margin, as "ce" does).

    Raises:
        ValueError: no model, or an unknown average.

    >>> ensemble = Ensemble([nn.Flatten(), nn.Flatten()])
    >>> ensemble(torch.ones(1, 1, 1, 2))
    tensor([[1., 1.]])
    """

    def __init__(self, models: Sequence[nn.Module], average: Literal["logits", "loss"] = "logits") -> None:
        super().__init__()
        if len(models) == 0:
            raise ValueError("models must be at least one model")
        for model in models:
            if not isinstance(model, nn.Module):
                raise ValueError(f"models must be modules; got {type(model).__name__}")
        if average not in ("logits", "loss"):
            raise ValueError(f"average must be 'logits' or 'loss'; got {average!r}")
        self.models, self.average = nn.ModuleList(models), average

    def forward(self, images: Tensor) -> Tensor:
        logits = torch.stack([model(images.clone()) for model in self.models])  # one may write into its input
        mean: Tensor = (logits.log_softmax(2) if self.average == "loss" else logits).mean(0)
        return mean

    @staticmethod
    def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
        """The mean cross-entropy of the members, from the output of an ensemble with ``average="loss"``. (N,)."""
        return -logits.gather(1, labels.unsqueeze(1)).squeeze(1)


def fooled(
    model: Model,
    adversarials: Tensor,
    labels: Tensor,
    targeted: bool = False,
    batch_size: int = 64,
    bounds: tuple[float, float] = (0, 1),
) -> Tensor:
    """Whether a model, for example one that the adversarials were not made for, is fooled by each of them.

    One that draws at random is fooled where 8 of 10 fresh answers are wrong. That is warned of, as is one whose answer
    depends on the batch.

    Args:
        model: images (N, C, H, W) to logits (N, K); it is evaluated in evaluation mode and comes back as it was.
        adversarials: (N, C, H, W), floating point, inside the bounds.
        labels: (N,) the true classes or, if targeted, the classes to reach.
        targeted: whether the labels are targets.
        batch_size: images per evaluation.
        bounds: smallest and largest pixel value.

    Returns:
        (N,) bool. An image that was initially misclassified counts as fooled.

    Raises:
        ValueError: adversarials, labels or a model's output of the wrong kind, as for an attack's `run`.
    """
    check_model("model", model)
    check_flag("targeted", plain(targeted))
    check_count("batch_size", batch_size := plain(batch_size))
    bounds = check_bounds(bounds)
    check_batch(adversarials, labels, bounds, [("model", model)], "adversarials")
    labels = labels.long()
    found = torch.zeros(len(adversarials), dtype=torch.bool, device=adversarials.device)
    unanswered = found.clone()
    with (
        explained({"model": model}, adversarials, "adversarials"),
        borrowed(model, adversarials.device) as lent,
        torch.no_grad(),
    ):
        seen = observe(lent, adversarials, bounds, model) if len(adversarials) > 0 else Behaviour()
        for message in (
            seen.on_batches(), seen.on_randomness(can_average=False), why_too_dark("adversarials", adversarials, bounds)
        ):  # fmt: skip
            if message is not None:
                warn(message)
        draws, needed = (DRAWS, NEEDED) if seen.is_random else (1, 1)
        for first in range(0, len(adversarials), batch_size):
            part = slice(first, first + batch_size)
            hits = torch.zeros_like(labels[part])
            for _ in range(draws):
                logits = checked_logits(lent(adversarials[part].clone()), len(hits))  # a copy, to write into
                check_finite(logits.nan_to_num(posinf=torch.inf, neginf=-torch.inf))
                check_labels(labels, logits.shape[1])
                hit, is_nan = logits.argmax(1) == labels[part], logits.isnan().any(1)
                hits += (hit if targeted else ~hit) & ~is_nan
                unanswered[part] |= is_nan
            found[part] = hits >= needed
    if bool(unanswered.any()):
        warn(
            f"the model answers NaN about {int(unanswered.sum())} of {len(found)} adversarials, which counts as not "
            "fooled and is no sign of robustness: look for a division, a root or an overflow in it"
        )
    return found


_OF_DTYPE = re.compile(r"dtype|scalar type|data type|[Ii]nput type")
_OF_SHAPE = re.compile(
    r"shapes cannot be multiplied|expected input|to have \d+ channels|padded input size|[Kk]ernel size"
)


@contextmanager
def explained(models: Mapping[str, Model], images: Tensor, name: str = "images") -> Iterator[None]:
    """Turn torch's complaint about a dtype or a shape inside a model into a ValueError that says what to pass."""
    try:
        yield
    except RuntimeError as error:
        modules = [model for model in models.values() if isinstance(model, nn.Module)]
        shape, mine = tuple(images.shape), str(images.dtype).removeprefix("torch.")
        is_of_dtype = _OF_DTYPE.search(str(error))
        for role, model in models.items() if is_of_dtype else []:
            weights = {p.dtype for p in model.parameters() if p.dtype in FLOATS} if isinstance(model, nn.Module) else ()
            if not weights or images.dtype in weights:
                continue
            other = min(weights, key=str)
            ways = [f"pass {name}.{FLOATS[other]}()", f"attack {role}.{FLOATS[images.dtype]}()"]
            if other.itemsize == 2 or role != "model":  # orthogonality needs more; the model takes what it is given
                ways.reverse()
            theirs = str(other).removeprefix("torch.")
            raise ValueError(f"{name} are {mine}, the {role}'s weights {theirs}: {', or '.join(ways)}") from error
        if is_of_dtype:
            raise ValueError(
                f"the model does not take {name} of {mine} ({error}): pass them in the dtype of its weights, and see "
                "that these are of one dtype"
            ) from error
        if not modules or not _OF_SHAPE.search(str(error)):
            raise
        hint = "are these its channels and its image size?"
        if shape[3] in (1, 3, 4) and shape[1] not in (1, 3, 4):
            hint = f"they look like (N, H, W, C): pass {name}.permute(0, 3, 1, 2)"
        raise ValueError(f"the model does not take {name} of shape {shape} ({error}): {hint}") from error


def checked_logits(answer: object, count: int) -> Tensor:
    """What a model returned for `count` images, if it is logits (count, K), K >= 2, of a floating dtype.

    Raises:
        ValueError: it is something else; with the line that mends it.
    """
    wanted = f"model must return logits of shape ({count}, classes)"
    if not isinstance(answer, Tensor):
        place = _place_of_logits(answer, count)
        mend = (
            f"attack lambda x: model(x){place} instead, after model.eval()"
            if place is not None
            else "return a torch.Tensor, computed by torch if the attack needs a gradient"
        )
        raise ValueError(f"{wanted}; got {type(answer).__name__}: {mend}")
    shape = tuple(answer.shape)
    if shape == (count,) and not answer.is_floating_point():
        raise ValueError(
            f"{wanted}; got {shape} of {answer.dtype}, as of predicted classes: return what they come from"
        )
    if shape in ((count,), (count, 1)):
        column = "model(x).view(-1, 1)" if answer.ndim == 1 else "model(x)"
        raise ValueError(
            f"model must return at least two logits per image, shape ({count}, classes); got {shape}. A sigmoid of one "
            f"logit z is the softmax of (0, z): attack lambda x: torch.nn.functional.pad({column}, (1, 0)), after "
            "model.eval(), with labels 0 and 1; the sigmoid itself is left out"
        )
    if answer.ndim != 2 or len(answer) != count or shape[1] == 0:
        mend = ""
        if answer.ndim > 2 and len(answer) == count and math.prod(shape[2:]) == 1 and shape[1] > 1:
            mend = ": attack lambda x: model(x).flatten(1), after model.eval()"
        raise ValueError(f"{wanted}; got {shape}{mend}")
    if answer.layout != torch.strided or answer.is_meta or answer.is_nested:
        raise ValueError(f"{wanted}, dense and with values; got {answer.layout} on {answer.device}")
    if answer.dtype not in FLOATS:
        mend = "abs()" if answer.is_complex() else "float()"
        is_float = answer.is_complex() or answer.is_floating_point()
        gradient = "" if is_float else "; integers have no gradient, so only Square can attack them"
        raise ValueError(
            f"model must return floating point logits, of at least 16 bits; got {answer.dtype}: attack lambda x: "
            f"model(x).{mend}, after model.eval(){gradient}"
        )
    return answer


def _place_of_logits(answer: object, count: int) -> str | None:
    """Where in a structured answer the logits are, as one would write it behind it; None if they are nowhere."""

    def fits(value: object) -> bool:
        return isinstance(value, Tensor) and value.ndim == 2 and len(value) == count and value.is_floating_point()

    if isinstance(getattr(answer, "logits", None), Tensor):
        return ".logits"
    places: list[tuple[str, object]] = []
    if isinstance(answer, Mapping):
        places = [(f"[{key!r}]", value) for key, value in answer.items()]
        places.sort(key=lambda place: place[0] != "['logits']")
    elif isinstance(answer, list | tuple):
        places = [(f"[{k}]", value) for k, value in enumerate(answer)]
    elif hasattr(answer, "__dict__"):
        places = [(f".{name}", value) for name, value in vars(answer).items()]
    return next((place for place, value in places if fits(value)), None)


def check_finite(logits: Tensor) -> None:
    """ValueError if some of the logits (N, K) are NaN or infinite; with the cause and what mends it."""
    bad = ~logits.isfinite().all(1)
    if not bool(bad.any()):
        return
    sample = int(bad.long().argmax())
    row = logits[sample]
    if bool(row.isnan().any()):
        cause = "NaN: look for a division, a logarithm or a square root of zero, and for NaN in the weights"
    elif bool((row == torch.inf).any()):
        cause = f"{row.dtype} overflows: compute in a wider dtype, model.float(), or scale the logits down"
    else:
        classes = (row == -torch.inf).nonzero().squeeze(1).tolist()
        finite = row[row.isfinite()]
        floor = min(-1e4, 10 * float(finite.amin())) if len(finite) > 0 else -1e4
        cause = (
            f"-inf for class {classes[0]}{' and others' if len(classes) > 1 else ''}, as for masked classes, where "
            f"losses and gradients are NaN: attack lambda x: model(x).clamp(min={floor:.0e}), after model.eval()"
        )
    raise ValueError(f"model returned NaN or infinite logits (sample {sample}): {cause}")

"""What callers may pass: numbers of any library, counts, choices, images and labels, each refused with a remedy."""

from __future__ import annotations

import math
import numbers
import sys
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

FLOATS = {torch.float16: "half", torch.bfloat16: "bfloat16", torch.float32: "float", torch.float64: "double"}
"""The dtypes that images may have, each with the name of the method that casts to it."""


def plain(value: Any) -> Any:
    """A number of NumPy, torch or Python, also in an array without dimensions, as Python's; else as is."""
    if getattr(value, "shape", None) == () and hasattr(value, "item"):
        return value.item()
    if isinstance(value, bool | int | float) or not isinstance(value, numbers.Real):
        return value
    return int(value) if isinstance(value, numbers.Integral) else float(value)


def plain_fields(options: Any) -> None:
    """Make the numbers of a frozen dataclass `plain`."""
    for name, value in vars(options).items():
        object.__setattr__(options, name, plain(value))


def same_values(a: Any, b: Any) -> bool:
    """Whether two options, or states, are equal: tensors and arrays by their values, models by their weights."""
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return bool(a.device == b.device and a.dtype == b.dtype and torch.equal(a, b))
    if isinstance(a, torch.Generator):
        return same_values((a.device, a.get_state()), (b.device, b.get_state()))
    if isinstance(a, torch.nn.Module):
        return same_values(dict(a.state_dict()), dict(b.state_dict()))
    if isinstance(a, Mapping):
        return a.keys() == b.keys() and all(same_values(value, b[name]) for name, value in a.items())
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same_values, a, b))
    if is_dataclass(a):  # which may hold tensors, whose == is none
        return all(same_values(getattr(a, field.name), getattr(b, field.name)) for field in fields(a))
    return bool((a == b).all() if type(a).__module__ == "numpy" else a == b)


def uploaded(values: Tensor, device: torch.device) -> Tensor:
    """Numbers of the host on a device; a GPU is not waited for, as a copy from ordinary memory would."""
    if device.type != "cuda" or values.is_cuda:
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)


def warn(message: str) -> None:
    """Warn, with the line that called this package as the place."""
    frame, level = sys._getframe(), 1
    while frame.f_globals.get("__name__", "").partition(".")[0] == "orthattack" and frame.f_back is not None:
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def is_number(value: object) -> TypeGuard[float]:
    """Whether a `plain` value is a number, NaN and infinity included."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def check_real(name: str, value: Any, what: str, low: float = -math.inf, above: bool = False) -> None:
    """ValueError unless a `plain` value is a finite number of at least (or `above`) `low`; `what` says so in words."""
    # An integer of any size passes isfinite or overflows: beyond 2^1000 it is no quantity here.
    if not is_number(value) or abs(value) > 2**1000 or not (value > low if above else value >= low):
        raise ValueError(f"{name} must be {what}; got {value!r}")


def check_count(name: str, value: object) -> None:
    """ValueError unless a `plain` value is an integer from 1 to 2^31 - 1."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        whole = isinstance(value, float) and value >= 1 and value.is_integer()
        hint = f": write {value:.0f}" if whole else ""
        raise ValueError(f"{name} must be an integer >= 1; got {value!r}{hint}")
    if value >= 2**31:
        raise ValueError(f"{name} must be below 2**31; got {value!r}")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    """ValueError unless the value is one of some names."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def check_flag(name: str, value: object) -> None:
    """ValueError unless a `plain` value is true or false: a text such as "no" would count as true."""
    if not isinstance(value, bool | int) or value not in (0, 1):
        raise ValueError(f"{name} must be True or False; got {value!r}")


def check_model(name: str, model: object) -> None:
    """ValueError unless it is something to call with images."""
    hint = ""
    if isinstance(model, type):
        hint = f": it is a class, so make one first, {model.__name__}(...)"
    elif isinstance(model, dict):
        hint = ": load the weights into a module first, with its load_state_dict"
    elif isinstance(model, Iterable) and not isinstance(model, nn.Module | str):
        hint = ": several models are one as orthattack.Ensemble(models)"
    if hint or not callable(model):
        raise ValueError(f"{name} must be callable on a batch of images; got {type(model).__name__}{hint}")


def check_tensor(name: str, value: object) -> None:
    """ValueError unless the value is a tensor in the ordinary layout."""
    if not isinstance(value, Tensor):
        hint = "convert it with torch.as_tensor"
        if isinstance(value, list | tuple) and any(isinstance(item, Tensor) for item in value):
            hint = "join its tensors with torch.stack"
        elif type(value[0] if isinstance(value, list | tuple) and value else value).__module__.startswith("PIL."):
            hint = "torch.stack what torchvision.transforms.functional.to_tensor makes of each image"
        elif value is None:
            hint = "a tensor is needed"
        raise ValueError(f"{name} must be a tensor; got {type(value).__name__}: {hint}")
    if value.is_nested or value.is_quantized:
        kind, way = ("nested", "torch.stack(list(...))") if value.is_nested else ("quantized", ".dequantize()")
        raise ValueError(f"{name} must be an ordinary tensor; got a {kind} one: use {way}")
    if value.layout != torch.strided:
        raise ValueError(f"{name} must be dense; got layout {value.layout}: use .to_dense()")


def check_bounds(bounds: Any) -> tuple[float, float]:
    """The bounds as two plain numbers; ValueError if they are no such."""
    values = [plain(value) for value in bounds] if isinstance(bounds, Iterable) else [bounds]
    if any(isinstance(value, Iterable) and not isinstance(value, str) for value in values):
        raise ValueError(
            f"bounds must be two numbers (low, high), the same for all channels; got {bounds!r}: put the normalisation "
            "that makes them differ inside the model (orthattack.Normalized), which then takes images in (0, 1)"
        )
    if len(values) != 2:
        raise ValueError(f"bounds must be two numbers (low, high); got {bounds!r}")
    if not all(is_number(value) and math.isfinite(value) for value in values) or values[0] >= values[1]:
        raise ValueError(f"bounds must be two finite numbers (low, high) with low < high; got {bounds!r}")
    return values[0], values[1]


def check_labels(labels: Tensor, classes: int) -> None:
    """ValueError unless all labels are classes of the model."""
    outside = (labels < 0) | (labels >= classes)
    if bool(outside.any()):
        sample = int(outside.long().argmax())
        hint = ": leave out images without a label" if int(labels[sample]) < 0 else ""
        raise ValueError(
            f"labels must lie in [0, {classes - 1}], the model has {classes} classes; "
            f"found {int(labels[sample])} (sample {sample}){hint}"
        )


def why_too_dark(name: str, images: Tensor, bounds: tuple[float, float]) -> str | None:
    """What to say of images in [0, 1] within bounds of 8 bits; None of others, such as black ones."""
    (low, high), x = bounds, images.detach()
    if low != 0 or high < 128 or len(x) == 0 or float(x.amin()) < 0 or float(x.amax()) > 1:
        return None
    if bool((x == x.round()).all()) and float(x.double().mean()) < 0.05:  # black, with noise
        return None
    return (
        f"{name} lie in [{float(x.amin()):.3g}, {float(x.amax()):.3g}], with bounds=({low:g}, {high:g}): they look "
        f"scaled to [0, 1]; pass bounds=(0, 1), and eps in these units, or {name} times {high:g}"
    )


def check_batch(
    images: Tensor,
    labels: Tensor,
    bounds: tuple[float, float],
    models: Iterable[tuple[str, object]],
    name: str = "images",
) -> None:
    """ValueError unless these are images (N, C, H, W), floating point and up to round-off inside the bounds, with
    integer labels (N,), where the models are; the models' names, and `name`, the images', are for messages."""
    check_tensor(name, images)
    check_tensor("labels", labels)
    shape = tuple(images.shape)
    if images.ndim != 4:
        hint = f": a single image becomes a batch by {name}.unsqueeze(0)" if images.ndim == 3 else ""
        raise ValueError(f"{name} must have shape (N, C, H, W); got {shape}{hint}")
    if 0 in shape[1:]:
        raise ValueError(f"{name} must have pixels; got shape {shape}")
    if shape[1] == shape[2] > 4 and shape[3] in (1, 3):
        raise ValueError(
            f"{name} must have shape (N, C, H, W); got {shape}, which looks like (N, H, W, C): pass "
            f"{name}.permute(0, 3, 1, 2)"
        )
    if images.dtype not in FLOATS:
        hint = "convert them to float32"
        if not (images.dtype.is_floating_point or images.dtype.is_complex or images.dtype == torch.bool):
            hint = "divide 8-bit images by 255"
        raise ValueError(f"{name} must be floating point; got {images.dtype}: {hint}")
    if labels.shape != images.shape[:1]:
        hint = ""
        if labels.ndim == 2 and len(labels) == len(images):
            hint = ": pass labels.squeeze(1)" if labels.shape[1] == 1 else ": pass labels.argmax(1) if they are one-hot"
        raise ValueError(f"labels must have shape ({len(images)},), one per image; got {tuple(labels.shape)}{hint}")
    if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
        raise ValueError(f"labels must be integers; got {labels.dtype}: pass labels.long() if they are class indices")
    if labels.device != images.device:
        raise ValueError(f"{name} ({images.device}) and labels ({labels.device}) must be on the same device")
    for role, model in models:
        devices = {parameter.device for parameter in model.parameters()} if isinstance(model, nn.Module) else set()
        if devices and images.device not in devices:
            raise ValueError(f"{name} ({images.device}) and {role} ({devices.pop()}) must be on the same device")
    if images.device.type == "meta":
        raise ValueError(f"{name} must hold numbers; got a tensor on the meta device, which has none")
    if len(images) > 0:
        _check_values(name, images, *bounds)


def _check_values(name: str, images: Tensor, low: float, high: float) -> None:
    # Round-off of a normalisation and its inverse is a few units in the last place; in half precision one of them
    # is as much as a perturbation may be.
    slack = max(torch.finfo(images.dtype).eps, 8e-7) * max(abs(low), abs(high))
    smallest, largest = images.flatten(1).amin(1), images.flatten(1).amax(1)
    inside = (smallest >= low - slack) & (largest <= high + slack)  # which NaN is not
    if not bool(inside.all()):
        finite = images.isfinite().flatten(1).all(1)
        if not bool(finite.all()):
            raise ValueError(f"{name} must be finite; found NaN or infinity (sample {int(finite.long().argmin())})")
        sample = int(inside.long().argmin())
        raise ValueError(
            f"{name} must lie in bounds ({low:g}, {high:g}); found min {float(smallest[sample]):.6g}, "
            f"max {float(largest[sample]):.6g} (sample {sample}): {why_outside(name, images.detach(), low, high)}"
        )


def why_outside(name: str, images: Tensor, low: float = 0, high: float = 1, is_returned: bool = False) -> str:
    """The likeliest cause of finite pixels outside the bounds, and what to do: to a caller, or to a data function."""
    least, most, width = float(images.amin()), float(images.amax()), high - low
    share = float(((images < low) | (images > high)).double().mean())
    beyond = max(low - least, most - high) / width
    if beyond <= 0.35 and (share <= 0.25 or beyond <= 0.03 or most - least > 1.2 * width):
        return (
            "they overshoot a little, as rounding or bicubic resizing makes them; clamp them, "
            f"{name}.clamp({low:g}, {high:g})"
        )
    if low >= -1 and high <= 1:
        is_whole = least >= 0 and 2 < most <= 65535 and bool((images == images.round()).all())
        if is_whole and most > 320:
            return "they look 16-bit; divide them by 65535"
        if is_whole or (least >= -64 and 20 < most <= 320):
            other = "" if is_returned else ", or pass bounds=(0, 255) if the model takes them so"
            return f"they look 8-bit; divide them by 255{other}"
        if is_returned and least >= -1 and most <= 1:
            return f"they look scaled to [-1, 1]; return ({name} + 1) / 2"
        if (least < low - 0.25 * width and max(-least, most) <= 20) or (least >= low and most <= 3):
            how = "return them in [0, 1]: the model normalises"
            other = "pass them unnormalised and put the normalisation inside the model"
            return f"they look normalised; {how if is_returned else other}"
    other = "" if is_returned else ", or pass the bounds that the model takes, such as bounds=(0, 255)"
    return f"scale them to {f'[{low:g}, {high:g}]' if is_returned else 'these bounds'}{other}"

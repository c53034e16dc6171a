"""Weights files: safetensors, or PyTorch files with ``weights_only=True``, so nothing in a file is ever executed.

This is the only module that reads weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle  # for the error that torch.load raises
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from orthattack.eval.errors import EvaluationError, first_line, nearest
from orthattack.eval.models.formats import AGAIN, foreign, is_safetensors, refused_pickle


@dataclass(frozen=True)
class Checkpoint:
    """What a weights file holds."""

    path: Path  # the file
    tensors: dict[str, Tensor]  # by name
    metadata: dict[str, str]  # of a safetensors file
    sha256: str  # of the file
    # every state dict that the file has, by the keys of the dictionaries around it; `tensors` is one of them
    sets: Mapping[tuple[str, ...], dict[str, Tensor]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()  # what a person should know of how it was read

    def listed(self, key: str) -> list[Any] | None:
        """A list from the metadata, if it is there and is one."""
        try:
            value = json.loads(self.metadata[key])
        except (KeyError, ValueError, RecursionError):
            return None
        return value if isinstance(value, list) else None


def few(names: Sequence[str], most: int = 3) -> str:
    """The first of some names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a state dict, or several that lie in one file. EvaluationError: no such file, not a state dict, or one that
    holds more than tensors."""
    if not os.path.isfile(path):  # noqa: PTH113 - pathlib's raises where a name is too long
        raise EvaluationError(f"weights file {path} {_absent(path)}")
    try:
        tensors, metadata, sets = _read(path)
        with path.open("rb") as stream:
            digest = hashlib.sha256()
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    except OSError as error:
        raise EvaluationError(f"weights file {path} could not be read ({error.strerror or error})") from error
    return Checkpoint(path, tensors, metadata, digest.hexdigest(), sets)


def _absent(path: Path) -> str:
    """Why there is no file at a path, and what may be meant."""
    if re.match(r"[a-z][a-z0-9]*:/", str(path)):
        return "is a URL: download it, and pass the file"
    try:
        if path.is_dir():
            endings = {".safetensors", ".pt", ".pth", ".bin", ".ckpt", ".tar"}
            inside = sorted(file.name for file in path.iterdir() if file.suffix in endings)
            return "is a folder" + (f": pass a file in it, such as {path / inside[0]}" if inside else "")
        close = nearest(path.name, (file.name for file in path.parent.iterdir()))
        return "does not exist" + (f"; did you mean {path.with_name(close[0])}?" if close else "")
    except (OSError, ValueError):  # such as a name that is too long
        return "does not exist"


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str], dict[tuple[str, ...], dict[str, Tensor]]]:
    """The tensors of a file, its metadata, and every state dict in it, by the keys that lead there."""
    if is_safetensors(path):
        try:
            with safe_open(path, framework="pt") as file:
                tensors = {key: file.get_tensor(key) for key in list(file.keys())}
                return tensors, file.metadata() or {}, {(): tensors}
        except (SafetensorError, OSError) as error:
            raise EvaluationError(f"{path} is not a whole safetensors file ({error}): {AGAIN}") from error
    what = foreign(path)
    if what is not None:
        raise EvaluationError(f"{path} {what}")
    try:
        with warnings.catch_warnings(), path.open("rb") as stream:  # not by its name, which may lie
            warnings.simplefilter("ignore")  # about old formats, which are read or refused all the same
            content = torch.load(stream, map_location="cpu", weights_only=True)
    except Exception as error:  # of a file that is anything at all
        cut = re.search("unexpected EOF.*", str(error))  # which torch 2.4 calls an UnpicklingError
        if not cut and (isinstance(error, pickle.UnpicklingError) or "magic number" in str(error)):
            raise EvaluationError(f"{path} {refused_pickle(path, error)}") from error
        raise EvaluationError(
            f"{path} is neither a safetensors nor a PyTorch file, or damaged ({cut[0] if cut else first_line(error)}): "
            f"{AGAIN}"
        ) from error
    sets = dict(_state_dicts(content, ()))
    if not sets:
        raise EvaluationError(f"{path} is not a state dict: {_contents(content)}; it must map names to tensors")
    for tensors in sets.values():
        for key, value in tensors.items():
            if not _is_plain(value):
                raise EvaluationError(f"{path} is refused: {key!r} is no plain tensor whose numbers are in the file")
    return max(sets.values(), key=len), {}, sets


def _state_dicts(content: object, at: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], dict[str, Tensor]]]:
    """The dictionaries of tensors in what a file holds, and the keys that lead there.

    Other things, such as an epoch, may lie beside them; an optimiser's memory is none.
    """
    if not isinstance(content, Mapping) or len(at) > 2:
        return
    tensors = {str(key): value for key, value in content.items() if isinstance(value, Tensor)}
    if tensors and all(isinstance(key, str) for key in content):
        yield at, tensors
    for key, value in content.items():
        if isinstance(key, str) and not re.search(r"optim|sched|scaler", key.lower()):
            yield from _state_dicts(value, (*at, key))


def _contents(content: object) -> str:
    if not isinstance(content, Mapping):
        return f"it is {type(content).__name__}"
    return f"it has {few([f'{key} ({type(value).__name__})' for key, value in content.items()], 6) or 'nothing'}"


def _is_plain(value: Tensor) -> bool:
    """Whether all of a tensor's numbers are in the file: a view can claim any size of the few that are."""
    return (
        value.layout == torch.strided
        and not (value.is_meta or value.is_quantized or value.is_complex())
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def load_strictly(name: str, model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Load `tensors`, from `path`, into `model`, called `name`: every one that it has, and no other. EvaluationError:
    missing or unexpected names, other shapes, or weights that are not finite."""
    own = model.state_dict()
    kept = {key: value for key, value in own.items() if key.endswith("num_batches_tracked") and key not in tensors}
    tensors = {**kept, **tensors}  # which old files lack, and nothing needs
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    wrong = [key for key in own if key in tensors and own[key].shape != tensors[key].shape]
    if missing or extra or wrong:
        raise EvaluationError(f"{path} does not fit {name}: {_differences(own, tensors, missing, extra, wrong)}")
    broken = [key for key, value in tensors.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if broken:
        raise EvaluationError(f"{path} has NaN or infinite weights, such as {broken[0]}")
    model.load_state_dict({key: value.to(own[key].dtype) for key, value in tensors.items()})


def _differences(
    own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], missing: list[str], extra: list[str], wrong: list[str]
) -> str:
    """What is missing, unexpected and of another shape, the first of each by name, and what to do."""
    if len(missing) == len(own):
        return (
            f"none of its {len(tensors)} names ({few(extra)}) is one of the model's ({few(list(own))}): are they the "
            "weights of another architecture?"
        )
    shown = [
        f"{key} is {tuple(tensors[key].shape)} in the file, {tuple(own[key].shape)} in the model" for key in wrong[:3]
    ]
    problems = [
        f"{len(names)} {what} ({few(names)})" for names, what in ((missing, "missing"), (extra, "unexpected")) if names
    ]
    if wrong:
        problems.append(f"{len(wrong)} of another shape ({'; '.join(shown)}{'; ...' if len(wrong) > 3 else ''})")
    is_last_layer = set(wrong) <= set(list(own)[-2:])
    if is_last_layer and not missing and not extra and all(tensors[key].ndim > 0 for key in wrong):
        count = len(tensors[wrong[0]])
        return f"of its weights, {', '.join(problems)}: build the model with {count} classes"
    return f"of its weights, {', '.join(problems)}: is the architecture the one that they were trained as?"


def state_sha256(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of a state dict: of the name, dtype, shape and bytes of each tensor, in sorted order of the names.

    >>> a, b = torch.zeros(2), torch.ones(1)
    >>> state_sha256({"a": a, "b": b}) == state_sha256({"b": b, "a": a})
    True
    >>> state_sha256({"a": a}) == state_sha256({"a": a.view(2, 1)})
    False
    """
    digest = hashlib.sha256()
    for key in sorted(tensors):
        value = tensors[key].detach().cpu().contiguous()
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data if value.numel() else b"")
    return digest.hexdigest()

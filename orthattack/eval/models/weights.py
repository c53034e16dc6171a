"""Weights files: safetensors, or PyTorch files with ``weights_only=True``, so nothing in a file is ever executed.

This is the only module that reads weights.
"""

from __future__ import annotations

import hashlib
import json
import os
import pickle  # for the error that torch.load raises
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from orthattack.eval.errors import EvaluationError, first_line

__all__ = ["Checkpoint", "load_strictly", "read_checkpoint", "state_sha256"]


@dataclass(frozen=True)
class Checkpoint:
    """What a weights file holds.

    Attributes:
        path: the file.
        tensors: by name, without the "module." that parallel training puts before every name.
        metadata: of a safetensors file.
        sha256: of the file.
    """

    path: Path
    tensors: dict[str, Tensor]
    metadata: dict[str, str]
    sha256: str

    def listed(self, key: str) -> list[Any] | None:
        """A list from the metadata, if it is there and is one."""
        try:
            value = json.loads(self.metadata[key])
        except (KeyError, ValueError, RecursionError):
            return None
        return value if isinstance(value, list) else None


def read_checkpoint(path: Path) -> Checkpoint:
    """Read a state dict.

    Raises:
        EvaluationError: no such file, not a state dict, or one that holds more than tensors.
    """
    if not os.path.isfile(path):  # noqa: PTH113 - pathlib's raises where a name is too long
        problem = "is a folder" if os.path.isdir(path) else "does not exist"  # noqa: PTH112
        raise EvaluationError(f"weights file {path} {problem}")
    tensors, metadata = _read(path)
    with path.open("rb") as stream:
        digest = hashlib.sha256()
        while chunk := stream.read(1 << 20):
            digest.update(chunk)
    named = {str(key).removeprefix("module."): value for key, value in tensors.items()}
    return Checkpoint(path, named, metadata, digest.hexdigest())


def _read(path: Path) -> tuple[Mapping[str, Tensor], dict[str, str]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in list(file.keys())}, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        if path.suffix == ".safetensors":
            raise EvaluationError(f"{path} is not a whole safetensors file ({error})") from error
    if _is_compressed(path):
        raise EvaluationError(
            f"{path} is refused: it is compressed, which PyTorch's files are not, and may fill the memory"
        )
    try:
        with warnings.catch_warnings():  # about old formats, which are read or refused all the same
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise EvaluationError(
            f"{path} is refused: it holds more than tensors, and loading it could run code; save the state dict alone, "
            "with safetensors.torch.save_file(model.state_dict(), FILE)"
        ) from error
    except Exception as error:  # of a file that is anything at all
        raise EvaluationError(f"{path} is neither a safetensors nor a PyTorch file ({first_line(error)})") from error
    for wrapper in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(wrapper), Mapping):
            content = content[wrapper]
    if not isinstance(content, Mapping) or not all(isinstance(value, Tensor) for value in content.values()):
        raise EvaluationError(f"{path} is not a state dict: it must map names to tensors")
    for key, value in content.items():
        if not _is_plain(value):
            raise EvaluationError(f"{path} is refused: {str(key)!r} is no plain tensor whose numbers are in the file")
    return content, {}


def _is_compressed(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as file:
            return any(entry.compress_type != zipfile.ZIP_STORED for entry in file.infolist())
    except Exception:  # no archive, or a damaged one, of which torch.load says more
        return False


def _is_plain(value: Tensor) -> bool:
    """Whether all of a tensor's numbers are in the file: a view can claim any size of the few that are."""
    return (
        value.layout == torch.strided
        and not (value.is_meta or value.is_quantized or value.is_complex())
        and value.numel() * value.element_size() <= value.untyped_storage().nbytes()
    )


def load_strictly(name: str, model: nn.Module, tensors: Mapping[str, Tensor], path: Path) -> None:
    """Load `tensors`, from `path`, into `model`, called `name`: every one that it has, and no other.

    Raises:
        EvaluationError: missing or unexpected names, other shapes, or weights that are not finite.
    """
    own = model.state_dict()
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    wrong = [key for key in own.keys() & tensors.keys() if own[key].shape != tensors[key].shape]
    problems = [
        f"{len(keys)} {what} (such as {keys[0]})"
        for keys, what in ((missing, "missing"), (extra, "unexpected"), (sorted(wrong), "of another shape"))
        if keys
    ]
    if problems:
        raise EvaluationError(f"{path} does not fit {name}: of its weights, {', '.join(problems)}")
    broken = [key for key, value in tensors.items() if value.is_floating_point() and not bool(value.isfinite().all())]
    if broken:
        raise EvaluationError(f"{path} has NaN or infinite weights, such as {broken[0]}")
    model.load_state_dict({key: value.to(own[key].dtype) for key, value in tensors.items()})


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

"""RobustBench's models (Croce et al. 2021, arXiv:2010.09670), "robustbench:NAME" or "robustbench:DATASET/THREAT/NAME".

Its zoo makes the networks. Their weights, where RobustBench itself keeps them, are read by our own loader: with older
releases of torch the zoo's would unpickle them.
"""

from __future__ import annotations

import re
import sys
import warnings
from collections.abc import Mapping
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from torch import nn

from orthattack.eval.errors import EvaluationError, nearest, told
from orthattack.eval.models.classifier import Classifier
from orthattack.eval.models.fitting import fitted
from orthattack.eval.models.preprocessing import Preprocessing
from orthattack.eval.models.torchvision import imagenet_names
from orthattack.eval.models.weights import Checkpoint, load_strictly, read_checkpoint

PREFIX = "robustbench:"
_FOLDER = Path("models")  # RobustBench's own
_INSTEAD = "load it with robustbench.utils.load_model in a function of your own, --model module:function"


def _imported() -> Any:
    """RobustBench's functions and the zoo. Release 1.1.1 imports the module autoattack, which is not on PyPI, while it
    asks for pyautoattack, the same code."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what it imports
        for module in ("autoattack", "autoattack.state") if find_spec("autoattack") is None else ():
            sys.modules[module] = import_module(f"py{module}")
        return import_module("robustbench.utils")


_ROBUSTBENCH = _imported()


def check(name: str) -> None:
    """Raise EvaluationError if the zoo has no such model, or none that can be loaded here."""
    _entry(name)


def _entry(name: str) -> tuple[str, str, str, Mapping[str, Any]]:
    """Data set, threat model, the model's own name, and what the zoo says of it."""
    zoo = {
        f"{dataset.value}/{threat.value}/{model}": entry
        for dataset, threats in _ROBUSTBENCH.all_models.items()
        for threat, models in threats.items()
        for model, entry in models.items()
    }
    short = name.removeprefix(PREFIX)
    full = short if "/" in short else f"cifar10/Linf/{short}"
    if full not in zoo:
        close = nearest(full, zoo, 3, cutoff=0) or sorted(zoo)
        raise EvaluationError(f"unknown model {name!r}; did you mean {' or '.join(PREFIX + one for one in close)}?")
    entry = zoo[full]
    if not isinstance(entry["gdrive_id"], str) or not entry["gdrive_id"]:
        raise EvaluationError(f"{name} is an ensemble, or brings its weights in a way of its own: {_INSTEAD}")
    dataset, threat, model = full.split("/")
    return dataset, threat, model, entry


def load(name: str, weights: str | Path | None) -> Classifier:
    """A classifier of the zoo, with the weights in a file, or by default RobustBench's own."""
    dataset, threat, short, entry = _entry(name)
    preprocessing = _preprocessing(name, dataset, entry.get("preprocessing"))
    path = Path(weights) if weights is not None else _fetched(name, Path(dataset, threat, f"{short}.pt"), entry)
    try:
        model: nn.Module = entry["model"]()
    except Exception as error:  # of timm's other releases, or of a download
        raise EvaluationError(f"RobustBench could not make {name} ({told(error)}): {_INSTEAD}") from error
    file = read_checkpoint(path)
    if re.search("Kireev2021Effectiveness|^Andriushchenko2020Understanding$", short):  # "last" and "best": as the zoo
        file = replace(file, sets={at: tensors for at, tensors in file.sets.items() if at[:1] == ("last",)})
    _fill(name, model, file)
    classes = imagenet_names() if dataset == "imagenet" else None
    return Classifier(
        name, model, preprocessing, classes, source=f"RobustBench, {path}", architecture=type(model).__name__,
        file_sha256=file.sha256, notes=file.notes,
    )  # fmt: skip


def _fetched(name: str, place: Path, entry: Mapping[str, Any]) -> Path:
    """The file of a model's weights, downloaded unless it is there."""
    path, part = _FOLDER / place, _FOLDER / place.with_suffix(".part")
    if path.exists():
        return path
    reason = "nothing came"
    try:
        part.parent.mkdir(parents=True, exist_ok=True)
        _ROBUSTBENCH.download_gdrive_new(entry["gdrive_id"], part)
        if part.exists():
            return part.rename(path)
    except Exception as error:  # of the network, of Google Drive, of the disk
        reason = told(error)
    raise EvaluationError(
        f"could not download the weights of {name} ({reason}): fetch "
        f"https://drive.google.com/uc?id={entry['gdrive_id']} elsewhere, and save it as {path}, or pass it with "
        "--weights FILE"
    )


def _fill(name: str, model: nn.Module, file: Checkpoint) -> None:
    """Load the weights into a network, or into that within its normalisation, which most files do not have."""
    inner = getattr(model, "model", None)
    candidates = [model] if inner is None else [model, inner]
    for k, module in enumerate(candidates):
        own = module.state_dict()
        lacking = {
            key
            for key in own
            if re.search(r"(^|\.)(mu|sigma|mean|std)$", key)
            and not any(there.endswith(key) for tensors in file.sets.values() for there in tensors)
        }
        try:
            found = fitted(file, name, own.keys() - lacking)
            return load_strictly(name, module, {**{key: own[key] for key in lacking}, **found.tensors}, file.path)
        except EvaluationError:
            if k == len(candidates) - 1:
                raise
    raise AssertionError("there is at least the model itself")


def _preprocessing(name: str, dataset: str, words: str | None) -> Preprocessing:
    """What the zoo says in a word, such as BicubicRes256Crop224."""
    plain: dict[str, Any] = {"mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0)}  # the models normalise themselves
    if dataset != "imagenet":
        return Preprocessing(32, 32, **plain)
    match = re.fullmatch(r"(Bicubic)?Res(\d+)(?:Crop(\d+))?", words or "")
    if match is None:
        raise EvaluationError(f"{name} has images prepared by {words!r}, which is not known here: {_INSTEAD}")
    mode = "bicubic" if match[1] else "bilinear"
    resize = int(match[2])
    return Preprocessing(resize, int(match[3] or resize), mode, aspect="keep" if match[3] else "squash", **plain)

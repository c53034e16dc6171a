"""torchvision's data sets by name: ``torchvision:CIFAR10,root=data,split=test``. Nothing is downloaded."""

from __future__ import annotations

import inspect
import os
from pathlib import Path
from typing import Any

import torchvision

from orthattack.eval.errors import FAILURES, EvaluationError, first_line, nearest

PREFIX = "torchvision:"

_OURS = {"transform", "target_transform", "transforms", "loader", "download", "kwargs", "train"}
"""Parameters of a data set that are not a person's to set here; `train` is what `split` is for."""


def check_torchvision(data: str) -> tuple[type, dict[str, Any]]:
    """The class and the options that `data` names. EvaluationError: no such data set or option, or no such root."""
    name, *parts = data.removeprefix(PREFIX).split(",")
    known = [one for one in torchvision.datasets.__all__ if inspect.isclass(getattr(torchvision.datasets, one))]
    if name not in known:
        close = nearest(name, known, 3) or ["CIFAR10", "ImageNet"]
        raise EvaluationError(f"torchvision has no data set {name!r}; did you mean {' or '.join(close)}?")
    kind: type = getattr(torchvision.datasets, name)
    parameters = set(inspect.signature(kind).parameters)
    allowed = (parameters - _OURS) | ({"split"} if "train" in parameters else set())
    options: dict[str, Any] = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals or key not in allowed:
            raise EvaluationError(f"{data}: {part!r} is not an option of {name}; it has {', '.join(sorted(allowed))}")
        options[key] = value
    if "root" in allowed:
        if "root" not in options:
            raise EvaluationError(f"{data} needs the folder that has the data: {PREFIX}{name},root=FOLDER")
        if not os.path.isdir(os.path.expanduser(options["root"])):  # noqa: PTH111, PTH112 - pathlib's may raise
            raise EvaluationError(f"{data}: there is no folder {options['root']}")
        options["root"] = str(Path(options["root"]).expanduser())
    if "train" in parameters:
        split = options.pop("split", "test")
        if split not in ("train", "test"):
            raise EvaluationError(f"{data}: split must be train or test; got {split!r}")
        options["train"] = split == "train"
    return kind, options


def open_torchvision(data: str) -> Any:
    """The data set that `data` names: of those that have splits, the test split unless it says otherwise, or else the
    validation split.

    torchvision's CIFAR files are pickles; it checks their MD5 sums before it reads them. EvaluationError: as
    `check_torchvision`, or files that are not there or not whole."""
    kind, options = check_torchvision(data)
    takes_split = "split" in inspect.signature(kind).parameters and "split" not in options
    attempts = [{**options, "split": split} for split in ("test", "val")] if takes_split else [options]
    for attempt in attempts:
        try:
            return kind(**attempt)
        except ValueError as error:  # noqa: PERF203 - such as of a split that it does not have
            failure: BaseException = error
        except FAILURES as error:  # of missing, damaged or unreadable files, or of a missing package
            failure = error
            break
    raise EvaluationError(
        f"{data}: torchvision could not open it ({first_line(failure)}). Nothing is downloaded here; "
        f"torchvision.datasets.{kind.__name__}(..., download=True) does, where it can"
    ) from failure

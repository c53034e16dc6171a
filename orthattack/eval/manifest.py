"""What a run says of itself: its attacks, models, data, versions and hardware, and whether it may go on in a folder."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from orthattack.eval.classifier import Classifier
from orthattack.eval.data import Photographs
from orthattack.eval.errors import EvaluationError
from orthattack.eval.store import RunFolder
from orthattack.eval.suite import Entry, differences

__all__ = ["describe_attacks", "describe_model", "new_session", "now", "to_go_on"]


def describe_attacks(entries: Sequence[Entry], baselines: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """The attacks of a run, each with its radii and the labels of its baselines."""
    by_label: dict[str, list[Entry]] = {}
    for entry in entries:
        by_label.setdefault(entry.label, []).append(entry)
    return [
        {
            "label": label,
            "name": first.kind.name,
            "source": first.kind.source,
            "parameters": dict(first.kind.parameters),
            "norm": first.norm,
            "eps": [entry.eps for entry in of_label],
            "seed": first.seed,
            "baselines": [
                other
                for wanted in baselines[first.attack.label]
                for other, (theirs, *_) in by_label.items()
                if theirs.attack.label == wanted and theirs.seed == first.seed
            ],
            "orthogonal": first.kind.orthogonal,
            "minimal": first.kind.minimal,
        }
        for label, of_label in by_label.items()
        for first in of_label[:1]
    ]


def describe_model(label: str, classifier: Classifier, photographs: Photographs) -> dict[str, Any]:
    """A model with its data; EvaluationError if there is no photograph."""
    if len(photographs) == 0:
        raise EvaluationError(f"{photographs.name} has no photographs")
    about, data = classifier.describe(), photographs.describe()
    of_model, of_data = about.pop("classes"), data.pop("classes")
    return {
        "label": label,
        **about,
        "class_names": of_model or of_data,
        "data": {"images": data.pop("photographs"), **data},
    }


def to_go_on(
    folder: RunFolder, new: Mapping[str, Any], session: Mapping[str, Any], say: Callable[[str], None]
) -> dict[str, Any]:
    """The folder's own manifest, if what was begun there is the same as `new`.

    Raises:
        EvaluationError: it is not; the message shows the differences.
    """
    old = folder.manifest()
    try:
        found = differences(old["config"], new["config"])
        for before, after in zip(old["models"], new["models"], strict=False):
            for key in ("sha256", "preprocessing", "data"):
                found += [f"{after['label']}: {line}" for line in differences({key: before[key]}, {key: after[key]})]
        then, warnings = old["sessions"][-1]["versions"], list(old["warnings"])
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise EvaluationError(
            f"{folder.path}/manifest.json lacks what a run needs to go on ({error!r}); choose another folder"
        ) from error
    if found:
        raise EvaluationError(
            f"{folder.path} holds another run; choose another folder, or make these the same:\n  " + "\n  ".join(found)
        )
    today = session["versions"]
    changed = [f"{name} {then[name]} then, {today[name]} now" for name in today if then.get(name) != today[name]]
    if changed:
        warning = f"continued with other versions: {', '.join(changed)}; results may differ in their last digits"
        say(warning)
        old["warnings"] = [*warnings, warning]
    return old


def new_session(entries: Sequence[Entry], device: torch.device, command: Sequence[str]) -> dict[str, Any]:
    """When, how, with what and on what work on a run began."""
    names = ["orthattack", "torch", "torchvision", "foolbox", "numpy", "pillow"]
    if any(entry.kind.source == "torchattacks" for entry in entries):
        names.append("torchattacks")
    hardware: dict[str, Any] = {
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    if device.type == "cuda":
        hardware["gpu"] = torch.cuda.get_device_name(device)
    return {
        "started": now(),
        "finished": None,
        "command": list(command),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in names}},
        "hardware": hardware,
    }


def now() -> str:
    """The time, in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()

"""What a run says of itself: its attacks, models, data, versions and hardware, and whether it may go on in a folder."""

from __future__ import annotations

import os
import platform
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from orthattack.attacks.numbers import KIND
from orthattack.eval.attacks.kind import described
from orthattack.eval.errors import EvaluationError, printable, told
from orthattack.eval.models.classifier import Classifier
from orthattack.eval.storage.lock import Share
from orthattack.eval.storage.run_folder import RunFolder
from orthattack.eval.storage.schema import ManifestRecord, unfit
from orthattack.eval.suite import Entry, differences


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
            "scope": first.kind.card.scope,
            "normal": described(first.kind.card.normal, with_source=True),
            "directions": described(first.kind.card.directions, with_source=True),
            "keeps": (list(first.kind.card.keeps) if first.kind.orthogonal else [])
            + (["exact in 8 bits"] if first.levels else []),
            "levels": first.levels,
            "loss": first.kind.climbs,
            "schedule": first.kind.card.schedule,
            "minimal": first.kind.card.minimal,
            "early_stop": first.early_stop,
        }
        for label, of_label in by_label.items()
        for first in of_label[:1]
    ]


def describe_model(label: str, classifier: Classifier, data: Mapping[str, Any]) -> dict[str, Any]:
    """A model with its data, as `ImageDataset.describe` does; EvaluationError if there is no image."""
    if data["images"] == 0:
        raise EvaluationError(f"{data['name']} has no images")
    about, data = classifier.describe(), dict(data)
    of_model, of_data = about.pop("classes"), data.pop("classes")
    return {
        "label": label,
        **about,
        "class_names": of_model or of_data,
        "data": {"images": data.pop("images"), **data},
    }


def to_go_on(
    folder: RunFolder, new: Mapping[str, Any], session: dict[str, Any], say: Callable[[str], None]
) -> dict[str, Any]:
    """The folder's own manifest, if what was begun there is the same as `new`.

    A difference between the sessions that may change the last digits is said, and noted in `session`. EvaluationError:
    it is not; the message shows the differences."""
    old = folder.manifest()
    try:
        if (why := unfit(ManifestRecord, old)) is not None:
            raise ValueError(why)
        found = differences(
            _with_defaults(old["config"], old["attacks"], new["attacks"]),
            _with_defaults(new["config"], new["attacks"], new["attacks"]),
        )
        for before, after in zip(old["models"], new["models"], strict=False):
            for key in ("label", "sha256", "preprocessing", "data"):
                found += [f"{after['label']}: {line}" for line in differences({key: before[key]}, {key: after[key]})]
        for before, after in zip(old["attacks"], new["attacks"], strict=False):  # a name may have become another attack
            theirs, ours = {"scope": before.get("scope", after["scope"])}, {"scope": after["scope"]}
            found += [f"{after['label']}: {line}" for line in differences(theirs, ours)]
        last = (old.get("sessions") or [session])[-1]
        then = {what: dict(last[what]) for what in ("versions", "hardware")}
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise EvaluationError(
            f"{folder}/manifest.json lacks what a run needs to go on ({told(error)}); choose another folder"
        ) from error
    if found:
        raise EvaluationError(
            f"{folder} holds another run; choose another folder, or make these the same:\n  "
            + "\n  ".join(printable(line, keep="") for line in found)
        )
    drawn = any(one.get("source") not in ("foolbox", "torchattacks") for one in new["attacks"])
    if drawn and last.get("random_numbers") != session.get("random_numbers"):
        warning = (
            "continued with other random numbers than the run was begun with: random starts of what is left are not "
            "those that it would have had then, and running all of it again gives other adversarials"
        )
        say(warning)
        session["warnings"].append(warning)
    for what, verb in (("versions", "continued with other versions"), ("hardware", "continued on other hardware")):
        before, today = then[what], session[what]
        if what == "hardware" and (last.get("engine") or session["engine"]):
            continue
        names = [name for name in today if what == "versions" or name in ("processor", "threads", "gpu")]
        changed = [
            f"{name} {before.get(name)} then, {today[name]} now" for name in names if before.get(name) != today[name]
        ]
        if changed:
            warning = f"{verb}: {', '.join(changed)}; results may differ in their last digits"
            say(warning)
            session["warnings"].append(warning)
    return old


def _with_defaults(
    config: Mapping[str, Any], old: Sequence[Mapping[str, Any]], new: Sequence[Mapping[str, Any]]
) -> dict[str, Any]:
    """A configuration with what its attacks, `old`, did by default: before 0.2.0 they climbed the cross-entropy in
    steps of one size, and took all steps.

    What has a loss or a schedule, the attacks of `new` say."""
    took = {_unseeded(one["label"]): one for one in old}
    filled = {}
    for one in (one for one in new if one.get("source") == "orthattack"):
        label = _unseeded(one["label"])
        before = {"loss": "ce", "schedule": "fixed", **took.get(label, {})}
        filled[label] = {what: before[what] for what in ("loss", "schedule") if one.get(what) is not None}
    attacks = [{**filled.get(attack["label"], {}), **attack} for attack in config.get("attacks", [])]
    return {"early_stop": False, **config, "attacks": attacks}


def _unseeded(label: str) -> str:
    return re.sub(r" \(seed \d+\)$", "", label)


def new_session(
    folder: RunFolder,
    entries: Sequence[Entry],
    device: torch.device,
    command: Sequence[str],
    share: Share | None = None,
) -> dict[str, Any]:
    """When, how, with what and on what a process began to work on a run: its record, not yet written."""
    names = ["orthattack", "torch", "torchvision", "foolbox", "numpy", "pillow"]
    if any(entry.kind.source == "torchattacks" for entry in entries):
        names.append("torchattacks")
    host, process = platform.node(), os.getpid()
    return {
        "id": folder.new_session_id(host, process),
        "host": host,
        "process": process,
        "shard": _shard(share),
        "started": now(),
        "finished": None,
        "outcome": "running",
        "command": list(command),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in names}},
        "hardware": hardware(device),
        "random_numbers": KIND,
        "warnings": [],
        "notes": [],
    }


def hardware(device: torch.device) -> dict[str, Any]:
    """What this process computes with."""
    found: dict[str, Any] = {
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def bury(folder: RunFolder, share: Share | None) -> None:
    """Set down as killed the sessions that never ended, for whoever holds the lock that they held."""
    for session in folder.sessions():
        same = share is None or session.get("shard") == _shard(share)
        if same and session["outcome"] == "running":
            folder.write_session({**session, "outcome": "killed"})


def _shard(share: Share | None) -> str | None:
    return None if share is None else f"{share[0]}/{share[1]}"


def now() -> str:
    """The time, in UTC, to the second."""
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()

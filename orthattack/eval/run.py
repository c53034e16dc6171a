"""The run itself: every attack at every radius on every model over every chunk of the photographs, one shard at a time.

A shard that is finished is on the disk and is never computed again; one that is not leaves nothing. What it holds
depends on the configuration, the photographs and the hardware, not on what was computed before it.
"""

from __future__ import annotations

import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from orthattack.eval.attacks import AttackKind, CallCounter, Conditions, Found, Runner, drawing, image_seed, joint_seed
from orthattack.eval.checks import probes
from orthattack.eval.data import Photographs
from orthattack.eval.decode import ahead
from orthattack.eval.measure import Judge, clean_columns, problem, row_columns
from orthattack.eval.models import Classifier, EvaluationError
from orthattack.eval.store import CLEAN_SCHEMA, ROW_SCHEMA, Kind, RunFolder, Shard, shown_eps
from orthattack.eval.suite import AttackSpec, Entry, Suite, differences
from orthattack.threat import Norm

__all__ = ["GALLERY", "Job", "Source", "evenly", "run_suite"]

GALLERY = 24
"""How many photographs' adversarials are kept for the report."""

TRANSFER = "transfer from "


@dataclass(frozen=True)
class Source:
    """Where models and data come from, for suites that name them or for objects that are at hand.

    Attributes:
        classifier: the model of a label, loaded anew at each call.
        photographs: the data as a model needs them.
        kinds: the attacks by label.
    """

    classifier: Callable[[str], Classifier]
    photographs: Callable[[Classifier], Photographs]
    kinds: Mapping[str, AttackKind]


@dataclass
class Job:
    """One model with its photographs and what is to be done with them."""

    label: str
    classifier: Classifier
    photographs: Photographs
    device: torch.device
    folder: RunFolder
    batch_size: int
    say: Callable[[str], None]
    judge: Judge = field(init=False)
    counter: CallCounter = field(init=False)

    def __post_init__(self) -> None:
        model = self.classifier.model.to(self.device)
        self.judge = Judge(model, self.classifier.preprocessing.crop, self.device)
        self.counter = CallCounter(model).eval()

    def load(self, position: int) -> Tensor:
        """One photograph as the model takes it."""
        return self.photographs.load(position, self.classifier.preprocessing)


def run_suite(
    suite: Suite,
    source: Source,
    folder: RunFolder,
    *,
    device: torch.device | str = "cpu",
    progress: bool = True,
    command: Sequence[str] = (),
    say: Callable[[str], None] = lambda _: None,
) -> bool:
    """Do what of a suite is not done yet.

    Args:
        suite: what to run.
        source: its models, data and attacks.
        folder: where; a new or empty folder, or one in which the same suite was begun.
        device: where to compute.
        progress: show a bar on standard error.
        command: how it was started, for the manifest.
        say: is told what a person should know at once, a line at a time.

    Returns:
        True if everything is done; False if it was interrupted from the keyboard or by SIGTERM.

    Raises:
        EvaluationError: the folder belongs to another run, or a model or the data cannot be had.
    """
    entries = suite.entries(source.kinds)
    device = torch.device(device)
    folder.create()
    manifest = _manifest(suite, source, entries, folder, say)
    session = {"started": _now(), "finished": None, "command": list(command), "versions": _versions(entries),
               "hardware": _hardware(device)}  # fmt: skip
    manifest["sessions"].append(session)
    manifest["status"] = "running"
    folder.write_manifest(manifest)
    try:
        _run_models(suite, source, entries, folder, device, manifest, progress, say)
        if suite.checks:
            _run_transfer(suite, source, folder, device, manifest, say)
        manifest["status"] = "complete"
    except KeyboardInterrupt:
        manifest["status"] = "interrupted"
    except OSError as error:
        manifest["status"] = "interrupted"
        raise EvaluationError(
            f"could not write to {folder.path} ({error.strerror or error}): what is finished is kept; mend it, and "
            "start again with the same command to go on"
        ) from error
    finally:
        session["finished"] = _now()
        with suppress(OSError):  # a full disk has been reported; the manifest of the session's start stands
            folder.write_manifest(manifest)
    return bool(manifest["status"] == "complete")


def evenly(count: int, among: int) -> list[int]:
    """At most `count` positions, evenly spaced, of `among`."""
    return list(range(among)) if count >= among else [k * among // count for k in range(count)]


def _manifest(
    suite: Suite, source: Source, entries: list[Entry], folder: RunFolder, say: Callable[[str], None]
) -> dict[str, Any]:
    """The manifest of this run: new, or the folder's own if it is of the same run."""
    baselines = suite.baselines(source.kinds)
    attacks: list[dict[str, Any]] = [
        {
            "label": entry.label,
            "name": entry.kind.name,
            "source": entry.kind.source,
            "parameters": dict(entry.kind.parameters),
            "norm": entry.norm,
            "eps": [e.eps for e in entries if e.label == entry.label],
            "seed": entry.seed,
            "baselines": [
                other.label
                for label in baselines[entry.attack.label]
                for other in entries
                if other.attack.label == label and other.seed == entry.seed
            ],
            "orthogonal": entry.kind.orthogonal,
            "minimal": entry.kind.minimal,
        }
        for entry in {entry.label: entry for entry in entries}.values()
    ]
    for attack in attacks:
        attack["baselines"] = list(dict.fromkeys(attack["baselines"]))
    models = []
    for spec in suite.models:
        classifier = source.classifier(spec.label)
        photographs = source.photographs(classifier)
        if len(photographs) == 0:
            raise EvaluationError(f"{photographs.name} has no photographs")
        data = {"name": photographs.name, "images": len(photographs), "mapping": photographs.mapping,
                "fingerprint": photographs.fingerprint()}  # fmt: skip
        names = classifier.classes or photographs.classes
        models.append(
            {"label": spec.label, **classifier.describe(), "class_names": names and list(names), "data": data}
        )
    new = {
        "orthattack": version("orthattack"),
        "status": "running",
        "config": suite.config(),
        "attacks": attacks,
        "models": models,
        "probes": _probes(suite, models),
        "warnings": [],
        "sessions": [],
    }
    if not folder.exists:
        return new
    old = folder.manifest()
    found = differences(old["config"], new["config"])
    for before, after in zip(old["models"], models, strict=False):
        for key, what in (("sha256", "weights"), ("preprocessing", "preprocessing")):
            if before.get(key) != after.get(key):
                found.append(f"{what} of {after['label']}: {before.get(key)} there, {after.get(key)} now")
        if before["data"] != after["data"]:
            found += [f"data.{line}" for line in differences(before["data"], after["data"])]
    if found:
        raise EvaluationError(
            f"{folder.path} holds another run; choose another folder, or make these the same:\n  " + "\n  ".join(found)
        )
    then, now = (old["sessions"][-1]["versions"] if old["sessions"] else {}), _versions(entries)
    changed = [f"{name} {then[name]} then, {now[name]} now" for name in now if name in then and then[name] != now[name]]
    if changed:
        warning = f"continued with other versions: {', '.join(changed)}; results may differ in their last digits"
        say(warning)
        old["warnings"].append(warning)
    return old


def _probes(suite: Suite, models: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What the trust checks run beside the suite, for the manifest."""
    if not suite.checks:
        return []
    found = []
    for model in models:
        planned = probes(suite.norm, suite.eps, suite.steps, model["preprocessing"]["crop"])
        found += [{"model": model["label"], "label": probe.label, "eps": probe.eps} for probe in planned]
        base = next((probe for probe in planned if probe.label == "PGD"), None)
        found += [
            {"model": model["label"], "label": f"transfer from {other['label']}", "eps": base.eps}
            for other in models
            if base is not None and other is not model and _comparable(model, other)
        ]
    return found


def _comparable(model: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether an image of one model is one of the other's."""
    return (
        all(model[key] == other[key] for key in ("num_classes", "data"))
        and model["preprocessing"]["crop"] == other["preprocessing"]["crop"]
    )


def _run_models(
    suite: Suite,
    source: Source,
    entries: list[Entry],
    folder: RunFolder,
    device: torch.device,
    manifest: dict[str, Any],
    progress: bool,
    say: Callable[[str], None],
) -> None:
    counts = [model["data"]["images"] for model in manifest["models"]]
    often = 0.1 if sys.stderr.isatty() else 30.0  # a log file is no place for an animation
    with tqdm(total=sum(counts) * len(entries), unit="img", disable=not progress, mininterval=often) as bar:
        for spec, count in zip(suite.models, counts, strict=True):
            chunks = _chunks(count, suite.shard_size)
            todo = {}
            for number, chunk in enumerate(chunks):
                clean = Shard(spec.label, "clean", None, number, "clean")
                wanted = [
                    entry
                    for entry in entries
                    if not folder.is_done(Shard(spec.label, entry.label, entry.eps, number), len(chunk))
                ]
                bar.update((len(entries) - len(wanted)) * len(chunk))
                if wanted or not folder.is_done(clean, len(chunk)):
                    todo[number] = wanted
            bar.initial = bar.n  # so that the time left is estimated from this session's speed
            planned = _probes_left(suite, folder, manifest, spec.label, count)
            if not todo and not planned:
                continue
            bar.set_description(spec.label)
            classifier = source.classifier(spec.label)
            photographs = source.photographs(classifier)
            job = Job(spec.label, classifier, photographs, device, folder, suite.batch_size, say)
            runners = {
                (entry.label, entry.eps): entry.kind.bind(
                    job.counter, Conditions(entry.norm, entry.eps, suite.steps, classifier.num_classes)
                )
                for entry in entries
            }
            kept = range(count) if suite.save_images == "all" else evenly(GALLERY, count)
            keep = frozenset(() if suite.save_images == "none" else kept)
            rates = _Rates()
            decoded = ahead([chunks[number] for number in todo], job.load)
            for (number, wanted), images in zip(todo.items(), decoded, strict=True):
                part = _Part(job, number, images, keep)
                part.look()
                for entry in wanted:
                    fooled = part.attack(entry, runners[entry.label, entry.eps], suite.attack_misclassified)
                    bar.update(len(chunks[number]))
                    bar.set_postfix_str(rates.shown(entry, *fooled), refresh=False)
            if planned:
                bar.set_postfix_str("trust checks")
                _run_probes(suite, job, planned)


def _probes_left(suite: Suite, folder: RunFolder, manifest: Mapping[str, Any], model: str, count: int) -> list[Entry]:
    """The probes of the trust checks that are still to be run on a model."""
    size = next(about["preprocessing"]["crop"] for about in manifest["models"] if about["label"] == model)
    images = len(evenly(suite.check_images, count))
    return [
        Entry(AttackSpec(name=probe.kind.name, label=probe.label), probe.kind, suite.norm, probe.eps, 0, probe.label)
        for probe in (probes(suite.norm, suite.eps, suite.steps, size) if suite.checks else ())
        if not folder.is_done(Shard(model, probe.label, probe.eps, 0, "checks"), images)
    ]


def _run_probes(suite: Suite, job: Job, planned: Sequence[Entry]) -> None:
    positions = evenly(suite.check_images, len(job.photographs))
    images = next(ahead([positions], job.load))
    part = _Part(job, 0, images, frozenset(), "checks")
    part.look()
    for entry in planned:
        part.keep = frozenset(positions if entry.label == "PGD" else ())  # to try them on the other models
        conditions = Conditions(entry.norm, entry.eps, suite.steps, job.classifier.num_classes)
        part.attack(entry, entry.kind.bind(job.counter, conditions), attack_misclassified=False)


def _run_transfer(
    suite: Suite,
    source: Source,
    folder: RunFolder,
    device: torch.device,
    manifest: Mapping[str, Any],
    say: Callable[[str], None],
) -> None:
    """Try each model on the adversarials that the checks made for the others."""
    count = {model["label"]: len(evenly(suite.check_images, model["data"]["images"])) for model in manifest["models"]}
    for spec in suite.models:
        todo = [
            probe
            for probe in manifest["probes"]
            if probe["model"] == spec.label
            and probe["label"].startswith(TRANSFER)
            and not folder.is_done(Shard(spec.label, probe["label"], probe["eps"], 0, "checks"), count[spec.label])
        ]
        if not todo:
            continue
        classifier = source.classifier(spec.label)
        job = Job(spec.label, classifier, source.photographs(classifier), device, folder, suite.batch_size, say)
        images = next(ahead([evenly(suite.check_images, len(job.photographs))], job.load))
        part = _Part(job, 0, images, frozenset(), "checks")
        part.look()
        for probe in todo:
            other = probe["label"].removeprefix(TRANSFER)
            part.transfer(
                probe["label"], probe["eps"], suite.norm, dict(folder.images(other, "PGD", probe["eps"], kind="checks"))
            )


def _chunks(count: int, size: int) -> list[range]:
    return [range(first, min(first + size, count)) for first in range(0, count, size)]


class _Rates:
    """Robust accuracy so far, of what this session has measured, for the progress bar."""

    def __init__(self) -> None:
        self._counts: dict[tuple[str, float | None], tuple[int, int]] = {}

    def shown(self, entry: Entry, robust: int, scored: int) -> str:
        before = self._counts.get((entry.label, entry.eps), (0, 0))
        robust, scored = before[0] + robust, before[1] + scored
        self._counts[entry.label, entry.eps] = robust, scored
        share = f"{100 * robust / scored:.1f} %" if scored else "-"
        return f"{entry.label} at {shown_eps(entry.eps, entry.norm)}: {share} robust"


class _Part:
    """One chunk of the photographs with one model: its images, what the model says of them, and the attacks on them."""

    def __init__(
        self,
        job: Job,
        number: int,
        images: Mapping[int, Tensor | Exception],
        keep: frozenset[int],
        kind: Kind = "shards",
    ) -> None:
        self.job, self.number, self.keep, self.kind = job, number, keep, kind
        self.positions = list(images)
        self.images = {k: image for k, image in images.items() if isinstance(image, Tensor)}
        labels = job.photographs.labels
        self._key = {
            k: {"position": k, "name": job.photographs.names[k], "label": int(labels[k])} for k in self.positions
        }
        self._failed = {
            k: {"status": "unreadable", "message": _reason(error)}
            for k, error in images.items()
            if isinstance(error, Exception)
        }
        self.right: dict[int, bool] = {}
        self.predictions: dict[int, int] = {}

    def look(self) -> None:
        """Evaluate the model on the images as they are, and store that; or recall what is stored."""
        shard = Shard(self.job.label, "clean", None, self.number, "clean")
        if self.kind == "shards" and self.job.folder.is_done(shard, len(self.positions)):
            stored = self.job.folder.read_shard(shard, ["position", "status", "message", "prediction", "wrong_share"])
            for known in stored.to_dict("records"):
                self._recall(int(known["position"]), {str(key): value for key, value in known.items()})
            return
        rows: dict[int, dict[str, Any]] = {}
        for batch in self._batches(list(self.images)):
            images, labels = self._tensors(batch)
            with drawing(joint_seed(batch)):
                columns = clean_columns(self.job.judge, images, labels)
            for row, position in enumerate(batch):
                rows[position] = {name: values[row] for name, values in columns.items()}
                self._recall(position, rows[position])
        if self.kind == "shards":
            self._store(shard, CLEAN_SCHEMA.names, rows, self.images)

    def _recall(self, position: int, row: Mapping[str, Any]) -> None:
        if row["status"] == "ok":
            self.right[position] = row["wrong_share"] <= 0.5
            self.predictions[position] = int(row["prediction"])
        else:
            self._failed[position] = {"status": row["status"], "message": row["message"]}

    def attack(self, entry: Entry, runner: Runner, attack_misclassified: bool) -> tuple[int, int]:
        """Run one attack on the chunk and store what it did; returns how many are robust, of how many scored."""
        rows: dict[int, dict[str, Any]] = {
            k: {"status": "misclassified", "clean_prediction": self.predictions[k]}
            for k, right in self.right.items()
            if not right
        }
        kept: dict[int, Tensor] = {}
        todo = [k for k, right in self.right.items() if right or attack_misclassified]
        for batch in self._batches(todo):
            for positions, columns, adversarials in self._attacked(entry, runner, batch):
                for row, position in enumerate(positions):
                    values = {name: column[row] for name, column in columns.items()}
                    rows[position] = {"clean_prediction": self.predictions[position], **values}
                    if adversarials is not None and position in self.keep:
                        kept[position] = adversarials[row]
        self._store(Shard(self.job.label, entry.label, entry.eps, self.number, self.kind), ROW_SCHEMA.names, rows, kept)
        scored = [row for row in rows.values() if row["status"] in ("ok", "misclassified")]
        return sum(row["status"] == "ok" and not row["success"] for row in scored), len(scored)

    def transfer(self, label: str, eps: float, norm: Norm, adversarials: Mapping[int, Tensor]) -> None:
        """Store what this model makes of another one's adversarials, where both are right on the clean image."""
        rows: dict[int, dict[str, Any]] = {}
        for batch in self._batches([k for k, right in self.right.items() if right and k in adversarials]):
            images, labels = self._tensors(batch)
            found = Found(torch.stack([adversarials[k] for k in batch]).to(images))
            with drawing(joint_seed(batch)):
                columns = row_columns(self.job.judge, images, found, labels, [True] * len(batch), norm, eps)
            for row, position in enumerate(batch):
                rows[position] = {name: column[row] for name, column in columns.items()}
        rest = {k: {"status": "misclassified"} for k in self.right if k not in rows}
        self._store(Shard(self.job.label, label, eps, self.number, self.kind), ROW_SCHEMA.names, rows | rest, {})

    def _attacked(
        self, entry: Entry, runner: Runner, batch: list[int]
    ) -> Iterator[tuple[list[int], dict[str, list[Any]], Tensor | None]]:
        """The measurements of a batch, in pieces if it had to be halved for lack of memory."""
        images, labels = self._tensors(batch)
        seeds = [image_seed(entry.seed, self.job.photographs.names[k], entry.kind) for k in batch]
        right = [self.right[k] for k in batch]
        counter = self.job.counter
        before = counter.forward_calls, counter.gradient_calls
        start = _clock(self.job.device)
        try:
            with drawing(joint_seed(seeds)):
                found = runner(images, labels, seeds)
                seconds = _clock(self.job.device) - start
                reason = problem(found.adversarials, images)
                if reason is None:
                    columns = row_columns(self.job.judge, images, found, labels, right, entry.norm, entry.eps)
        except Exception as error:  # whatever a model or a foreign attack may raise: the other attacks go on
            if _out_of_memory(error) and len(batch) > 1:
                half = len(batch) // 2
                self.job.batch_size = max(1, half)
                self.job.say(f"out of memory with {len(batch)} images at a time; going on with {half}")
                error.__traceback__ = None  # it holds the tensors
                images = labels = found = None  # type: ignore[assignment]
                if self.job.device.type == "cuda":
                    torch.cuda.empty_cache()
                for piece in (batch[:half], batch[half:]):
                    yield from self._attacked(entry, runner, piece)
                return
            reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        if reason is not None:
            columns = {"status": ["error"] * len(batch), "message": [reason] * len(batch)}
            yield batch, columns, None
            return
        n = len(batch)
        for name, given, total in (
            ("forward_calls", found.forward_calls, counter.forward_calls - before[0]),
            ("gradient_calls", found.gradient_calls, counter.gradient_calls - before[1]),
        ):
            columns[name] = [total / n] * n if given is None else given.tolist()
        columns["seconds"] = [seconds / n] * n
        yield batch, columns, found.adversarials

    def _batches(self, positions: list[int]) -> Iterator[list[int]]:
        first = 0
        while first < len(positions):
            size = self.job.batch_size  # which may become smaller on the way
            yield positions[first : first + size]
            first += size

    def _tensors(self, batch: list[int]) -> tuple[Tensor, Tensor]:
        images = torch.stack([self.images[k] for k in batch])
        labels = torch.tensor([self._key[k]["label"] for k in batch])
        if self.job.device.type == "cuda":
            images = images.pin_memory()
        return images.to(self.job.device, non_blocking=True), labels.to(self.job.device)

    def _store(
        self, shard: Shard, names: list[str], rows: Mapping[int, Mapping[str, Any]], images: Mapping[int, Tensor]
    ) -> None:
        complete = [{**self._key[k], **rows.get(k, {}), **self._failed.get(k, {})} for k in self.positions]
        columns = {name: [row.get(name) for row in complete] for name in names}
        self.job.folder.write(shard, columns, {k: images[k] for k in images if k in self.keep})


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _versions(entries: Sequence[Entry]) -> dict[str, str]:
    names = ["orthattack", "torch", "torchvision", "foolbox", "numpy", "pillow"]
    if any(entry.kind.source == "torchattacks" for entry in entries):
        names.append("torchattacks")
    return {"python": platform.python_version(), **{name: version(name) for name in names}}


def _hardware(device: torch.device) -> dict[str, Any]:
    info: dict[str, Any] = {
        "platform": platform.platform(),
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(device),
    }
    if device.type == "cuda":
        info["gpu"] = torch.cuda.get_device_name(device)
    return info


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()

"""The run itself: every attack at every radius on every model over every chunk of the photographs, one shard at a time.

A shard that is finished is on the disk and is never computed again; one that is not leaves nothing. What it holds
depends on the configuration, the photographs and the hardware, not on what was computed before it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from orthattack.eval.checks import CLEAN_COLUMNS, TRANSFER, clean_suspicions, planned_probes, probes
from orthattack.eval.classifier import Classifier
from orthattack.eval.data import Photographs, check_data, load_photographs, read_names
from orthattack.eval.decode import ahead
from orthattack.eval.errors import EvaluationError, printable
from orthattack.eval.job import Job, Part
from orthattack.eval.kinds import AttackKind, Conditions, drawing
from orthattack.eval.manifest import describe_attacks, describe_model, new_session, now, to_go_on
from orthattack.eval.models import check_name, load_classifier
from orthattack.eval.photographs import evenly
from orthattack.eval.store import RunFolder, Shard, shown_eps
from orthattack.eval.suite import AttackSpec, Entry, Suite

__all__ = ["GALLERY", "Source", "run_suite", "suite_source"]

GALLERY = 24
"""How many photographs' adversarials are kept for the report."""


@dataclass(frozen=True)
class Source:
    """Where models and data come from, for suites that name them or for objects that are at hand.

    Attributes:
        classifier: the model of a label.
        photographs: the data as a model needs them.
        kinds: the attacks by label.
    """

    classifier: Callable[[str], Classifier]
    photographs: Callable[[Classifier], Photographs]
    kinds: Mapping[str, AttackKind]


def suite_source(
    suite: Suite,
    kinds: Mapping[str, AttackKind] | None = None,
    classifiers: Mapping[str, Classifier] | None = None,
    photographs: Photographs | None = None,
) -> Source:
    """Where a suite's models, data and attacks come from: by their names, but for those that are at hand."""
    for spec in suite.models:  # before any model is loaded
        if spec.label not in (classifiers or {}):
            check_name(spec.name)
    if photographs is None:
        check_data(suite.data.source)
    specs = {spec.label: spec for spec in suite.models}
    # One model at a time is kept, or many would fill the memory, with its photographs, which may take long to list.
    last: dict[str, Classifier] = {}
    last_opened: list[tuple[Classifier, Photographs]] = []

    def classifier(label: str) -> Classifier:
        if classifiers is not None and label in classifiers:
            return classifiers[label]
        if label not in last:
            last.clear()
            spec = specs[label]
            last[label] = load_classifier(spec.name, spec.weights, spec.image_size)
        return last[label]

    def opened(model: Classifier) -> Photographs:
        if photographs is not None:
            return photographs
        if not last_opened or last_opened[0][0] is not model:
            data = suite.data
            found = load_photographs(data.source, model, _path(data.labels), _path(data.classes))
            if data.subset is not None:
                found = found.subset(read_names(Path(data.subset)))
            last_opened[:] = [(model, found.limited(data.limit))]
        return last_opened[0][1]

    return Source(classifier, opened, suite.kinds() if kinds is None else kinds)


def _path(name: str | None) -> Path | None:
    return None if name is None else Path(name)


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
        True if everything is done; False if it was interrupted from the keyboard.

    Raises:
        EvaluationError: the folder belongs to another run, a model or the data cannot be had, or the disk is full.
    """
    # Making a model draws its initial weights: the caller's random numbers go on as if nothing had been.
    with drawing(0):
        return _run_suite(suite, source, folder, torch.device(device), progress, command, say)


def _run_suite(
    suite: Suite,
    source: Source,
    folder: RunFolder,
    device: torch.device,
    progress: bool,
    command: Sequence[str],
    say: Callable[[str], None],
) -> bool:
    entries = suite.entries(source.kinds)
    session = new_session(entries, device, command)
    folder.create()
    models = []
    for spec in suite.models:  # all are tried before the first is attacked, but only one at a time is kept
        classifier = source.classifier(spec.label)
        models.append(describe_model(spec.label, classifier, source.photographs(classifier)))
    manifest: dict[str, Any] = {
        "orthattack": session["versions"]["orthattack"],
        "status": "running",
        "config": suite.config(),
        "attacks": describe_attacks(entries, suite.baselines(source.kinds)),
        "models": models,
        "probes": planned_probes(suite, models) if suite.checks else [],
        "warnings": [],
        "sessions": [],
    }
    if folder.exists:
        manifest = to_go_on(folder, manifest, session, say)
    manifest["sessions"].append(session)
    manifest["status"] = "running"
    try:
        folder.write_manifest(manifest)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    run = _Run(suite, source, folder, device, manifest, entries, say)
    try:
        run.everything(progress)
        manifest["status"] = "complete"
    except KeyboardInterrupt:
        manifest["status"] = "interrupted"
    except OSError as error:
        manifest["status"] = "interrupted"
        raise _cannot_write(folder, error) from error
    finally:
        session["finished"] = now()
        with suppress(OSError):  # a full disk has been reported; the manifest of the session's start stands
            folder.write_manifest(manifest)
    return bool(manifest["status"] == "complete")


def _cannot_write(folder: RunFolder, error: OSError) -> EvaluationError:
    return EvaluationError(
        f"could not write to {folder.path} ({error.strerror or error}): what is finished is kept; mend it, and "
        "start again with the same command to go on"
    )


@dataclass
class _Run:
    """What the parts of a run share."""

    suite: Suite
    source: Source
    folder: RunFolder
    device: torch.device
    manifest: Mapping[str, Any]
    entries: Sequence[Entry]
    say: Callable[[str], None]
    rates: dict[tuple[str, float | None], tuple[int, int]] = field(default_factory=dict)

    def everything(self, progress: bool) -> None:
        counts = {model["label"]: model["data"]["images"] for model in self.manifest["models"]}
        total = sum(counts.values()) * len(self.entries)
        often = 0.1 if sys.stderr.isatty() else 30.0  # a log file is no place for an animation
        with tqdm(total=total, unit="img", disable=not progress, mininterval=often) as bar:
            for label, count in counts.items():
                self._model(label, count, bar)
            if self.suite.checks:
                bar.set_description("trust checks")
                for label in counts:
                    self._transfer(label)

    def _job(self, label: str) -> Job:
        classifier = self.source.classifier(label)
        photographs = self.source.photographs(classifier)
        return Job(label, classifier, photographs, self.device, self.folder, self.suite.batch_size, self.say)

    def _model(self, label: str, count: int, bar: tqdm[Any]) -> None:
        """All that is left to do on one model."""
        size = self.suite.shard_size
        chunks = [range(first, min(first + size, count)) for first in range(0, count, size)]
        todo: dict[int, list[Entry]] = {}
        for number, chunk in enumerate(chunks):
            wanted = [
                entry
                for entry in self.entries
                if not self.folder.is_done(Shard(label, entry.label, entry.eps, number), len(chunk))
            ]
            bar.update((len(self.entries) - len(wanted)) * len(chunk))
            if wanted or not self.folder.is_done(Shard(label, "clean", None, number, "clean"), len(chunk)):
                todo[number] = wanted
        bar.initial = bar.n  # so that the time left is estimated from this session's speed
        checks = self._probes_left(label, count)
        if not todo and not checks:
            return
        bar.set_description(printable(label))
        self.rates.clear()
        job = self._job(label)
        runners = {
            (entry.label, entry.eps): job.runner(entry.kind, self._conditions(job, entry)) for entry in self.entries
        }
        kept = {"gallery": evenly(GALLERY, count), "all": range(count), "none": ()}[self.suite.save_images]
        decoded = ahead([chunks[number] for number in todo], job.load)
        for (number, wanted), images in zip(todo.items(), decoded, strict=True):
            part = Part(job, number, images, frozenset(kept))
            part.look()
            if number == 0:
                self._doubt(job)
            for entry in wanted:
                robust = part.attack(entry, runners[entry.label, entry.eps], self.suite.attack_misclassified)
                bar.update(len(chunks[number]))
                bar.set_postfix_str(self._so_far(entry, *robust), refresh=False)
        if checks:
            bar.set_postfix_str("trust checks")
            self._probe(job, checks)

    def _doubt(self, job: Job) -> None:
        """Say at once, after the first chunk, what looks like a mistake; the whole is judged by the trust checks."""
        rows = self.folder.read_shard(Shard(job.label, "clean", None, 0, "clean"), CLEAN_COLUMNS)
        for suspicion in clean_suspicions(rows, job.classifier.num_classes):
            self.say(f"{job.label}: {suspicion}")
        if job.judge.is_random:
            self.say(f"{job.label} answers at random: each image is judged by {job.judge.evaluations} evaluations")

    def _conditions(self, job: Job, entry: Entry) -> Conditions:
        return Conditions(entry.norm, entry.eps, self.suite.steps, job.classifier.num_classes, self.suite.batch_size)

    def _so_far(self, entry: Entry, robust: int, scored: int) -> str:
        """Robust accuracy of what this session has measured."""
        before = self.rates.get((entry.label, entry.eps), (0, 0))
        robust, scored = before[0] + robust, before[1] + scored
        self.rates[entry.label, entry.eps] = robust, scored
        share = f"{100 * robust / scored:.1f} %" if scored else "-"
        return f"{printable(entry.label)} at {shown_eps(entry.eps, entry.norm)}: {share} robust"

    def _probes_left(self, label: str, count: int) -> list[Entry]:
        """The probes of the trust checks that are still to be run on a model."""
        suite, images = self.suite, len(evenly(self.suite.check_images, count))
        size = next(about["preprocessing"]["crop"] for about in self.manifest["models"] if about["label"] == label)
        return [
            Entry(
                AttackSpec(name=probe.kind.name, label=probe.label), probe.kind, suite.norm, probe.eps, 0, probe.label
            )
            for probe in (probes(suite.norm, suite.eps, suite.steps, size) if suite.checks else ())
            if not self.folder.is_done(Shard(label, probe.label, probe.eps, 0, "checks"), images)
        ]

    def _probed(self, job: Job) -> Part:
        """The few photographs of the checks."""
        positions = evenly(self.suite.check_images, len(job.photographs))
        part = Part(job, 0, next(ahead([positions], job.load)), frozenset(), "checks")
        part.look()
        return part

    def _probe(self, job: Job, checks: Sequence[Entry]) -> None:
        part = self._probed(job)
        for entry in checks:
            # Kept, to try them on the other models.
            part.keep = frozenset(part.positions if entry.label == "PGD" else ())
            part.attack(entry, job.runner(entry.kind, self._conditions(job, entry)), attack_misclassified=False)

    def _transfer(self, label: str) -> None:
        """Try a model on the adversarials that the checks made for the others."""
        count = next(model["data"]["images"] for model in self.manifest["models"] if model["label"] == label)
        images = len(evenly(self.suite.check_images, count))
        todo = [
            probe
            for probe in self.manifest["probes"]
            if probe["model"] == label
            and probe["label"].startswith(TRANSFER)
            and not self.folder.is_done(Shard(label, probe["label"], probe["eps"], 0, "checks"), images)
        ]
        if not todo:
            return
        part = self._probed(self._job(label))
        for probe in todo:
            other = probe["label"].removeprefix(TRANSFER)
            adversarials = dict(self.folder.images(other, "PGD", probe["eps"], kind="checks"))
            part.transfer(probe["label"], probe["eps"], self.suite.norm, adversarials)

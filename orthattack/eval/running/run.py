"""The run itself: every attack at every radius on every model over every chunk of the images.

A shard that is finished is on the disk and is never computed again; of one that is not, batches are kept (`draft`).
What it holds depends on the configuration, the images and the hardware, not on what was computed before it, nor on how
many processes share the work.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import torch

from orthattack.eval.attacks.kind import AttackKind
from orthattack.eval.attacks.seeds import drawing
from orthattack.eval.checks.probes import planned_probes
from orthattack.eval.data.dataset import ImageDataset, read_names
from orthattack.eval.data.load import check_data, load_dataset
from orthattack.eval.errors import EvaluationError, first_line
from orthattack.eval.models.classifier import Classifier, checked
from orthattack.eval.models.load import check_name, load_classifier
from orthattack.eval.plugin import find
from orthattack.eval.running.detector import Detector, DetectorMaker
from orthattack.eval.running.judge import check_batches
from orthattack.eval.running.manifest import bury, describe_attacks, describe_model, new_session, now, to_go_on
from orthattack.eval.running.plan import Plan, Unit, boundless
from orthattack.eval.running.progress import Progress, Watch
from orthattack.eval.running.targets import Targets
from orthattack.eval.running.worker import Inputs, OnStep, Worker
from orthattack.eval.storage.lock import Share, working_in
from orthattack.eval.storage.run_folder import RunFolder
from orthattack.eval.suite import Suite


def suite_inputs(
    suite: Suite,
    kinds: Mapping[str, AttackKind] | None = None,
    classifiers: Mapping[str, Classifier] | None = None,
    dataset: ImageDataset | None = None,
    detector: DetectorMaker | None = None,
) -> Inputs:
    """Where a suite's models, data and attacks come from: by their names, but for those that are at hand."""
    for spec in suite.models:  # before any model is loaded
        if spec.label not in (classifiers or {}):
            check_name(spec.name)
    if dataset is None:
        check_data(suite.data.source)
    make = find(suite.detector) if detector is None and suite.detector is not None else detector
    specs = {spec.label: spec for spec in suite.models}
    # One model at a time is kept, or many would fill the memory.
    last: dict[str, Classifier] = {}
    asked: dict[str, Classifier] = {}
    # Images may take long to list. What they depend on is the model's list of classes, which most of a run's share.
    listed: dict[tuple[int, tuple[str, ...] | None], ImageDataset] = {}

    def classifier(label: str) -> Classifier:
        if classifiers is not None and label in classifiers:
            if label not in asked:  # once: it takes a pass of the model
                asked[label] = checked(classifiers[label])
            return asked[label]
        if label not in last:
            last.clear()
            spec = specs[label]
            last[label] = load_classifier(spec.name, spec.weights, spec.image_size)
        return last[label]

    def opened(model: Classifier) -> ImageDataset:
        if dataset is not None:
            return dataset
        classes = model.num_classes, None if model.classes is None else tuple(model.classes)
        if classes not in listed:
            data = suite.data
            found = load_dataset(data.source, model, data.labels, data.classes)
            if data.subset is not None:
                found = found.subset(read_names(Path(data.subset)))
            listed[classes] = found.limited(data.limit)
        return listed[classes]

    # One that is tried before the run is the one that its worker uses, and goes when its model does.
    made: WeakKeyDictionary[Classifier, Detector] = WeakKeyDictionary()

    def detecting(make: DetectorMaker, model: Classifier, device: torch.device) -> Detector:
        if model not in made or made[model].device != device:
            made[model] = Detector(make, model, device)
        return made[model]

    kinds = suite.kinds() if kinds is None else kinds
    return Inputs(classifier, opened, kinds, None if make is None else partial(detecting, make))


class Engine(Protocol):
    """Who does the units of work: this process, or others on its behalf."""

    name: str
    workers: list[dict[str, Any]]

    def __call__(self, units: Sequence[Unit], plan: Plan, watch: Watch, say: Callable[[str], None], /) -> None:
        """Do all units. They are independent: in any order, anywhere, some of them twice if need be."""


def run_suite(
    suite: Suite,
    inputs: Inputs,
    folder: RunFolder,
    *,
    device: torch.device | str = "cpu",
    share: Share | None = None,
    engine: Engine | None = None,
    progress: bool = True,
    command: Sequence[str] = (),
    say: Callable[[str], None] = lambda _: None,
    on_step: OnStep | None = None,
) -> bool:
    """Do what of a suite is not done yet. Options that are not named here are those of `evaluate`.

    Args:
        suite: what to run.
        inputs: its models, data and attacks.
        folder: where; a new or empty folder, or that of an unfinished run of the same suite.
        share: what `evaluate` calls shard. The trust checks that need all models are left to the last of the processes.
        engine: who does it; by default this process, and only this one tells `on_step`.
        command: how it was started, for the manifest.
        say: is told what a person should know at once, a line at a time.

    Returns:
        True if everything, or all of the share, is done; False if it was interrupted from the keyboard.

    Raises:
        EvaluationError: the folder belongs to another run, or another process is at work in it; a model or the data
            cannot be had, or the disk is full.
    """
    if share is not None and not 1 <= share[0] <= share[1]:
        raise EvaluationError(
            f"shard {share[0]}/{share[1]}: shards are counted from 1, 1/{share[1]} to {share[1]}/{share[1]}"
        )
    # Making a model draws its initial weights: the caller's random numbers go on as if nothing had been.
    with drawing(0):
        entries, device = suite.entries(inputs.kinds), torch.device(device)
        folder.create()
        # An engine's workers compute elsewhere, and are listed on their own.
        here = torch.device("cpu") if engine else device
        session = new_session(folder, entries, here, command, share)
        session["engine"] = None if engine is None else engine.name
        with _working_in(folder, share, session, say):
            manifest = _manifest(suite, inputs, here, folder, session, say)
            plan = Plan(suite, entries, manifest, folder)
            _say_what_images_take(plan, say)
            if engine is None:
                engine = _Here(inputs, device, on_step)
            session["workers"] = engine.workers
            with _recorded(folder, session):
                session["outcome"] = outcome = _everything(plan, share, engine, progress, say, session)
            return outcome != "interrupted"


@contextmanager
def _working_in(
    folder: RunFolder, share: Share | None, session: Mapping[str, Any], say: Callable[[str], None]
) -> Iterator[None]:
    """Keep others from the same work, as far as the folder allows."""
    if folder.path is None:
        others = [
            one for one in folder.sessions() if one["outcome"] == "running" and one.get("shard") == session["shard"]
        ]
        for other in others:
            say(
                f"process {other.get('process')} on {other.get('host')}, since {other.get('started')}, has not ended "
                f"its work on {folder}, or was killed. If it still runs, stop it, or use --shard: both would do the "
                "same work"
            )
        yield
        return
    about = {key: session[key] for key in ("host", "process", "started", "shard")}
    with working_in(folder.path, share, about, say) as held:
        if held:
            bury(folder, share)
        yield


def _manifest(
    suite: Suite,
    inputs: Inputs,
    device: torch.device,
    folder: RunFolder,
    session: dict[str, Any],
    say: Callable[[str], None],
) -> Mapping[str, Any]:
    """The manifest of the run, new or as it was begun, and beside it the record of this session; its detector is tried
    on that device."""
    models = []
    described: dict[ImageDataset, dict[str, Any]] = {}  # once, for it looks at every file
    for spec in suite.models:  # all are tried before the first is attacked, but only one at a time is kept
        classifier = inputs.classifier(spec.label)
        check_batches(classifier, suite.batch_size)
        if inputs.detector is not None:
            inputs.detector(classifier, device)
        dataset = inputs.dataset(classifier)
        if dataset not in described:
            described[dataset] = dataset.describe()
            if suite.targets is not None:
                targets = Targets(suite.targets, dataset, classifier.num_classes)
                described[dataset]["targets"] = targets.fingerprint()
        models.append(describe_model(spec.label, classifier, described[dataset]))
        for note in (*(f"{spec.label}: {note}" for note in classifier.notes), *dataset.notes):
            if note not in session["warnings"]:
                say(note)
                session["warnings"].append(note)
    entries = suite.entries(inputs.kinds)
    for warning in boundless(entries, models):
        say(warning)
        session["warnings"].append(warning)
    manifest: dict[str, Any] = {
        "orthattack": session["versions"]["orthattack"],
        "status": "running",
        "config": suite.config(),
        "attacks": describe_attacks(entries, suite.baselines(inputs.kinds)),
        "models": models,
        "probes": planned_probes(suite, models, entries) if suite.checks else [],
        "warnings": [],
        "sessions": [],
    }
    # Of several processes that start at once one creates it, and all compare theirs with what is there.
    try:
        if not folder.create_manifest(manifest):
            manifest = to_go_on(folder, manifest, session, say)
        folder.write_session(session)
    except OSError as error:
        raise _cannot_write(folder, error) from error
    return manifest


@contextmanager
def _recorded(folder: RunFolder, session: dict[str, Any]) -> Iterator[None]:
    """Set down how a session ended, whatever happens."""
    try:
        yield
    except BaseException as error:
        session["outcome"] = "interrupted"
        if isinstance(error, OSError):
            raise _cannot_write(folder, error) from error
        raise
    finally:
        session["finished"] = now()
        session["notes"] += folder.notes
        with suppress(OSError):  # a full disk has been reported; the record of the session's start stands
            folder.write_session(session)
            folder.write_manifest(folder.manifest())


def _say_what_images_take(plan: Plan, say: Callable[[str], None]) -> None:
    """Before any is stored, if it is more than a few."""
    size, folder, kept = plan.image_bytes(), plan.folder, plan.suite.save_images
    if size < 10e6:
        return
    text = f'images take up to {size / 1e6:,.0f} MB in {folder}/images (save_images = "{kept}"): '
    text += {"all": '"gallery" keeps a few, "none" none', "gallery": '"none" keeps none'}[kept]
    if folder.path is not None and (free := shutil.disk_usage(folder.path).free) < size:
        text += f"; the disk has {free / 1e6:,.0f} MB left"
    say(text)


def _cannot_write(folder: RunFolder, error: OSError) -> EvaluationError:
    return EvaluationError(
        f"could not write to {folder} ({error.strerror or error}): what is finished is kept; mend it, and start again "
        "with the same command to go on"
    )


def _everything(
    plan: Plan,
    share: Share | None,
    engine: Engine,
    progress: bool,
    say: Callable[[str], None],
    session: dict[str, Any],
) -> str:
    """Do what is left; returns how it ended: complete, part (this share is done, others are not), or interrupted."""
    try:
        with plan.folder.at_once():
            todo = plan.todo(share)
        session["units"] = len(todo.units)
        if found := todo.done + sum(todo.kept.values()):
            say(f"resuming: {found:,} of {todo.total:,} results kept")
        with Progress(plan, todo, progress) as watch:
            engine(todo.units, plan, watch, say)
            if share is not None:
                with plan.folder.at_once():
                    is_ready = plan.is_ready_for_last()
                if not is_ready:
                    return "part"
            _compact(plan, say)
            if plan.suite.checks:
                with plan.folder.at_once():
                    last = plan.last()
                session["units"] += len(last)
                if last:
                    engine(last, plan, watch, say)
            plan.folder.forget()
    except KeyboardInterrupt:
        return "interrupted"
    return "complete"


def _compact(plan: Plan, say: Callable[[str], None]) -> None:
    try:
        plan.compact()
    except (OSError, EvaluationError) as error:  # a full disk, or another process that was faster
        say(f"the shards of {plan.folder} stay as they are ({first_line(error)})")


class _Here:
    """The units one after the other, in this process."""

    name = "none"

    def __init__(self, inputs: Inputs, device: torch.device, on_step: OnStep | None) -> None:
        self.workers: list[dict[str, Any]] = []
        self._inputs, self._device, self._on_step = inputs, device, on_step

    def __call__(self, units: Sequence[Unit], plan: Plan, watch: Watch, say: Callable[[str], None], /) -> None:
        worker = Worker(plan, self._inputs, self._device, say, self._on_step)
        try:
            for unit, following in zip_longest(units, units[1:]):
                worker.do(unit, following, watch)
        finally:
            worker.close()

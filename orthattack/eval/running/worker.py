"""A process at work: it holds one model at a time, and does one unit of work after the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from orthattack.attacks.task import ScoredStep
from orthattack.eval.attacks.kind import AttackKind, Conditions
from orthattack.eval.checks.clean import CLEAN_COLUMNS, clean_suspicions
from orthattack.eval.checks.probes import SAVED, TRANSFER
from orthattack.eval.data.dataset import ImageDataset
from orthattack.eval.data.prefetch import Decoder
from orthattack.eval.errors import EvaluationError
from orthattack.eval.models.classifier import Classifier
from orthattack.eval.running.chunk import Bound, Job, Part
from orthattack.eval.running.detector import Detector
from orthattack.eval.running.plan import Plan, Unit
from orthattack.eval.running.progress import Watch, shown
from orthattack.eval.running.targets import Targets
from orthattack.eval.storage.run_folder import Shard
from orthattack.eval.suite import Entry
from orthattack.lending import ModelChangedError, guarded

OnStep = Callable[[str, str, float | None, ScoredStep], object]
"""Is told of the model's label, the attack's, the radius, and each batch of points that the attack has scored."""


@dataclass(frozen=True)
class Inputs:
    """Where models, data and attacks come from, for suites that name them or for objects that are at hand."""

    classifier: Callable[[str], Classifier]  # the model of a label
    dataset: Callable[[Classifier], ImageDataset]  # the data as a model needs it
    kinds: Mapping[str, AttackKind]  # the attacks by label
    detector: Callable[[Classifier, torch.device], Detector] | None = None  # the run's for a model, if it has one


class Worker:
    """Does units of work; `say` is told what a person should know at once, a line at a time."""

    def __init__(
        self,
        plan: Plan,
        inputs: Inputs,
        device: torch.device,
        say: Callable[[str], None],
        on_step: OnStep | None = None,
    ) -> None:
        self._on_step = on_step
        self._plan, self._inputs, self._device, self._say = plan, inputs, device, say
        self._job: Job | None = None
        self._decoder: Decoder | None = None
        self._bounds: dict[int, Bound] = {}

    def do(self, unit: Unit, following: Unit | None, watch: Watch) -> None:
        """Do a unit, while somebody watches; what is finished of it is stored at once. Images of `following`, what will
        probably be next, are decoded meanwhile."""
        watch.begin(unit.model, "loading")
        job, decoder = self._ready(unit.model)
        job.step = watch.step
        images = self._taken(unit, job, decoder)
        if following is not None and following.model == unit.model:
            decoder.begin(self._plan.positions(following))
        if unit.stage == "attack":
            self._attack(unit, Part(job, unit.chunk, images, self._plan.kept(unit.model)), watch)
            return
        part = Part(job, 0, images, frozenset(), "checks")
        watch.begin(unit.model, "trust checks")
        part.look()
        if unit.stage == "probe":
            self._probe(unit, part)
        else:
            self._transfer(unit, part)

    def _taken(self, unit: Unit, job: Job, decoder: Decoder) -> dict[int, Tensor | Exception]:
        positions = self._plan.positions(unit)
        if not job.dataset.is_foreign:
            return decoder.take(positions)
        try:
            with guarded(job.judge.model, who=job.dataset.name):
                return decoder.take(positions)
        except ModelChangedError as error:
            raise EvaluationError(f"{error}: let it leave the model alone") from error

    def close(self) -> None:
        """End what runs in the background."""
        if self._decoder is not None:
            self._decoder.close()
        self._job = self._decoder = None

    def _ready(self, label: str) -> tuple[Job, Decoder]:
        if self._job is None or self._decoder is None or self._job.label != label:
            self.close()
            self._bounds.clear()
            classifier = self._inputs.classifier(label)
            dataset = self._inputs.dataset(classifier)
            suite, folder = self._plan.suite, self._plan.folder
            self._job = Job(label, classifier, dataset, self._device, folder, suite.batch_size, self._say)
            self._job.is_exact = any(entry.levels for entry in self._plan.entries)
            if self._inputs.detector is not None:
                self._job.detector = self._inputs.detector(classifier, self._device)
            if suite.targets is not None:
                self._job.targets = Targets(suite.targets, dataset, classifier.num_classes)
            self._decoder = Decoder(self._job.load, ahead=not dataset.is_foreign)
        return self._job, self._decoder

    def _attack(self, unit: Unit, part: Part, watch: Watch) -> None:
        watch.begin(unit.model, "clean images")
        part.look()
        if unit.chunk == 0:
            self._doubt(part.job)
        for which in unit.wanted:
            entry = self._plan.entries[which]
            if which not in self._bounds:
                self._bounds[which] = self._bound(part.job, entry, self._on_step)
            watch.begin(unit.model, shown(entry))
            tell = partial(watch.done, unit, which)
            part.attack(self._bounds[which], self._plan.suite.attack_misclassified, tell)

    def _bound(self, job: Job, entry: Entry, on_step: OnStep | None = None) -> Bound:
        suite, classes = self._plan.suite, job.classifier.num_classes
        shared = suite.steps, classes, suite.batch_size
        told = None if on_step is None else partial(on_step, job.label, entry.label, entry.eps)
        # Of a model that draws, the first success is a weaker adversarial than the best: only who asks stops there.
        early = entry.early_stop and not (entry.kind.early_stop is None and job.judge.is_random)
        targeted = entry.targets is not None
        conditions = Conditions(entry.norm, entry.eps, *shared, entry.levels, targeted, told, early, entry.queries)
        return job.bound(entry, conditions)

    def _doubt(self, job: Job) -> None:
        """Say at once, after the first chunk, what looks like a mistake; the whole is judged by the trust checks."""
        rows = self._plan.folder.read_shard(Shard(job.label, "clean", None, 0, "clean"), CLEAN_COLUMNS)
        for suspicion in clean_suspicions(rows, job.classifier.num_classes):
            job.said.add(suspicion)  # an attack may notice it too
            self._say(f"{job.label}: {suspicion}")
        if job.judge.is_random:
            self._say(f"{job.label} answers at random: each image is judged by {job.judge.evaluations} evaluations")

    def _probe(self, unit: Unit, part: Part) -> None:
        probes = self._plan.probes[unit.model]
        for which in unit.wanted:
            # Kept, to try them on the other models.
            part.keep = frozenset(part.positions if probes[which].label == "PGD" else ())
            part.attack(self._bound(part.job, probes[which]), attack_misclassified=False)

    def _transfer(self, unit: Unit, part: Part) -> None:
        """Try a model on the adversarials that the checks made for the others, or on its own as they were saved."""
        suite, folder = self._plan.suite, self._plan.folder
        for which in unit.wanted:
            probe = self._plan.manifest["probes"][which]
            label, eps = probe["label"], probe["eps"]
            if unit.stage == "saved":
                stored = folder.images(unit.model, label.removeprefix(SAVED), eps)
            else:
                stored = folder.images(label.removeprefix(TRANSFER), "PGD", eps, kind="checks")
            shard = Shard(unit.model, label, eps, 0, "checks")
            part.transfer(shard, probe.get("norm", suite.norm), eps, dict(stored))

"""One model at work on one chunk of the images: looking at it, attacking it, measuring, storing."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from orthattack.eval.attacks.counter import BudgetSpentError, CallCounter, Calls
from orthattack.eval.attacks.kind import Conditions, Found, OwnRunner, Runner
from orthattack.eval.attacks.seeds import drawing, image_seed, joint_seed
from orthattack.eval.checks.clean import differentiated
from orthattack.eval.data.dataset import ImageDataset, Unreadable
from orthattack.eval.errors import out_of_memory, told
from orthattack.eval.models.classifier import Classifier
from orthattack.eval.plugin import kept_process
from orthattack.eval.running.detector import Detector
from orthattack.eval.running.draft import Draft, Row
from orthattack.eval.running.judge import (
    Columns,
    Judge,
    as_stored,
    clean_columns,
    plain_copy,
    promised_cosine,
    row_columns,
)
from orthattack.eval.running.targets import Targets
from orthattack.eval.storage.run_folder import RunFolder, Shard
from orthattack.eval.storage.schema import SCORE, Kind, schema_of
from orthattack.eval.suite import Entry
from orthattack.lending import guarded
from orthattack.threat import Norm

ALLOWED = "allows every image"
"""What an attack's warning of its radius says, and a run has said of all radii before it began."""

POOL = 4
"""How many batches an attack is given at once that drops what is fooled: those that still stand are packed together."""


Work = Callable[[list[int]], tuple[Columns, Tensor | None]]
"""Of a batch of positions: what is measured of it, and the adversarial images."""


class Done(NamedTuple):
    """How far an attack is on a chunk."""

    images: int  # those done with, the ones that it leaves out among them
    robust: int  # of those scored
    scored: int


@dataclass(frozen=True)
class Bound:
    """An attack bound to a model at a radius, or what went wrong with that."""

    entry: Entry  # which
    runner: Runner | BaseException  # the attack
    calls: Calls  # how often it has asked the model
    packs: bool = False  # it takes several batches at once, drops what is fooled, and keeps the model's batches full


@dataclass
class Job:
    """One model with its images and what is to be done with them."""

    label: str
    classifier: Classifier
    dataset: ImageDataset
    device: torch.device
    folder: RunFolder
    batch_size: int
    say: Callable[[str], None]
    is_exact: bool = False  # whether images are stored in 8 bits
    targets: Targets | None = None  # the classes to reach, of a targeted run
    detector: Detector | None = None  # scores the clean images and what attacks make of them
    step: Callable[[str], object] = lambda _: None  # is told how far an attack is with a batch
    was_halved: bool = field(init=False, default=False)
    sizes: dict[str, int] = field(init=False, default_factory=dict)  # of attacks that are not ours, by label
    judge: Judge = field(init=False)
    counter: CallCounter = field(init=False)
    calls: Calls = field(init=False, default_factory=Calls)
    said: set[str] = field(init=False, default_factory=set)
    differentiated: frozenset[int] = field(init=False)

    def __post_init__(self) -> None:
        model = self.classifier.model.to(self.device)
        self.counter = CallCounter(model, self.calls).eval()
        self.judge = Judge(self.counter, self.classifier.preprocessing.crop, self.device, self.batch_size)
        self.differentiated = frozenset(differentiated(len(self.dataset)))

    def bound(self, entry: Entry, conditions: Conditions) -> Bound:
        """An attack on the model; one that cannot be made fails on each batch, where that is recorded.

        What is not ours has a counter of its own: what it writes to that, or had evaluated by a model that it changed
        for the while, concerns nobody else.
        """
        calls, counter = self.calls, self.counter
        if entry.kind.is_foreign:
            calls = Calls()
            counter = CallCounter(self.judge.model, calls, lambda count: self.step(f"call {count}")).eval()
        try:
            with drawing(0), self.at_work(entry):
                runner = entry.kind.bind(counter, conditions)
            if isinstance(runner, OwnRunner):
                runner.tell(self.step)
            # On a CPU it saves nothing, and a stop would lose several batches.
            packs = conditions.early_stop and (bool(entry.kind.early_stop) or self.device.type == "cuda")
            return Bound(entry, runner, calls, packs)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            return Bound(entry, error, calls)

    @contextmanager
    def at_work(self, entry: Entry, images: Tensor | None = None, quiet: bool = False) -> Iterator[None]:
        """While an attack is made or runs: what it warns of is said, once, unless it is to be quiet. If it is not ours,
        whatever it changes of the model and the process is put back, and a changed model is a ModelChangedError."""
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for category in (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning):
                warnings.simplefilter("ignore", category)
            try:
                with ExitStack() as stack:
                    if entry.kind.is_foreign:
                        stack.enter_context(kept_process())
                        few = None if images is None else images[:2].clone()
                        stack.enter_context(guarded(self.judge.model, few))
                    yield
            finally:
                for text in {str(warning.message): None for warning in caught} if not quiet else ():
                    if text not in self.said and ALLOWED not in text:
                        self.said.add(text)
                        self.say(f"{self.label}: {entry.label}: {text}")

    def load(self, position: int) -> Tensor:
        """One image as the model takes it."""
        return self.dataset.load(position, self.classifier.preprocessing)


class Part:
    """One chunk of the data with one model: its images, what the model says of them, and the attacks on them."""

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
        labels = job.dataset.labels
        self._key = {k: {"position": k, "name": job.dataset.names[k], "label": int(labels[k])} for k in self.positions}
        self._detector = job.detector if kind == "shards" else None
        for key in self._key.values() if self._detector else ():
            key[SCORE.name] = None
        self._failed = {
            k: {"status": "unreadable", "message": error.reason if isinstance(error, Unreadable) else told(error)}
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
        sample = self.job.differentiated if self.kind == "shards" else frozenset()
        order = sorted(self.images, key=lambda k: k not in sample)
        draft = self._draft(shard if self.kind == "shards" else None, order)
        with draft.kept():
            for with_gradient in (True, False):
                todo = [k for k in draft.todo if (k in sample) == with_gradient]
                looked = partial(self._looked, with_gradient=with_gradient)
                for found in self._batches(todo, looked):
                    draft.add({k: {**self._key[k], **row} for k, (row, _) in found.items()}, {}, self._size(None))
        for position in sorted(draft.rows, key=self.positions.index):  # as they are when they are recalled, so that
            self._recall(position, draft.rows[position])  # the attacks' batches are the same
        if self.kind == "shards":
            self._store(shard, draft.rows, self.images)
            draft.done()

    def _looked(self, batch: list[int], with_gradient: bool) -> tuple[Columns, None]:
        images, labels = self._tensors(batch)
        with drawing(joint_seed(batch)):
            return clean_columns(self.job.judge, images, labels, with_gradient) | self._scored(images), None

    def _scored(self, images: Tensor) -> Columns:
        """What the detector says of images, if there is one."""
        if self._detector is None:
            return {}
        return {SCORE.name: self._detector.scores(images.nan_to_num(0), self.job.batch_size)}

    def _recall(self, position: int, row: Mapping[str, Any]) -> None:
        if row["status"] == "ok":
            self.right[position] = row["wrong_share"] <= 0.5
            self.predictions[position] = int(row["prediction"])
        else:
            self._failed[position] = {"status": row["status"], "message": row["message"]}

    def attack(self, bound: Bound, attack_misclassified: bool, tell: Callable[[Done], object] = lambda _: None) -> Done:
        """Run one attack on the chunk and store what it did; `tell` how far it is, batch by batch."""
        entry = bound.entry
        shard = Shard(self.job.label, entry.label, entry.eps, self.number, self.kind)
        foreign = entry.label if entry.kind.is_foreign else None
        attacked = [k for k, right in self.right.items() if right or attack_misclassified]
        draft = self._draft(shard, attacked, foreign)
        missed = {"status": "misclassified"}
        rest = {k: {"clean_prediction": self.predictions[k], **missed} for k in self.right}
        chosen = set(attacked)
        draft.begin({k: self._complete(k, rest.get(k, {})) for k in self.positions if k not in chosen})
        tell(self._tally(draft.rows))
        pool = POOL if bound.packs and not self.job.was_halved else 1
        with draft.kept():
            for found in self._batches(draft.todo, partial(self._measured, entry, bound), pool, foreign):
                rows = {
                    k: self._complete(k, {"clean_prediction": self.predictions[k], **row})
                    for k, (row, _) in found.items()
                }
                images = {k: image for k, (_, image) in found.items() if image is not None and k in self.keep}
                draft.add(rows, images, self._size(foreign))
                tell(self._tally(draft.rows))
        self._store(shard, draft.rows, draft.images)
        draft.done()
        return self._tally(draft.rows)

    def transfer(self, shard: Shard, norm: Norm, eps: float | None, adversarials: Mapping[int, Tensor]) -> None:
        """Store what this model makes of adversarials at hand, within `eps`, of images that it classifies correctly."""

        def judged(batch: list[int]) -> tuple[Columns, None]:
            images, labels = self._tensors(batch)
            found = Found(torch.stack([adversarials[k] for k in batch]).to(images))
            clean = [self.predictions[k] for k in batch]
            with drawing(joint_seed(batch)):
                return row_columns(self.job.judge, images, found, labels, [True] * len(batch), clean, norm, eps), None

        todo = [k for k, right in self.right.items() if right and k in adversarials]
        rows: dict[int, Row] = {k: {"status": "misclassified"} for k in self.right}
        for found in self._batches(todo, judged):
            rows |= {position: row for position, (row, _) in found.items()}
        self._store(shard, rows, {})

    def _batches(
        self, todo: Sequence[int], work: Work, pool: int = 1, foreign: str | None = None
    ) -> Iterator[dict[int, tuple[Row, Tensor | None]]]:
        """What is measured of each image of a batch, and its adversarial image, by position; batch by batch."""
        first = 0
        while first < len(todo):
            size = self._size(foreign) * pool  # which may become smaller on the way
            found: dict[int, tuple[Row, Tensor | None]] = {}
            for positions, columns, adversarials in self._in_pieces(list(todo[first : first + size]), work, foreign):
                for row, position in enumerate(positions):
                    record = {name: column[row] for name, column in columns.items()}
                    found[position] = record, None if adversarials is None else adversarials[row]
            yield found
            first += size

    def _in_pieces(
        self, batch: list[int], work: Work, foreign: str | None
    ) -> Iterator[tuple[list[int], Columns, Tensor | None]]:
        """What is measured of a batch, in pieces if it had to be halved for lack of memory; of an attack that is not
        ours, which is then named, only its own later batches are smaller."""
        halve = False
        try:
            columns, adversarials = work(batch)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # whatever a model or a foreign attack may raise: the other attacks go on
            halve = out_of_memory(error) and len(batch) > 1
            columns, adversarials = {"status": ["error"] * len(batch), "message": [told(error)] * len(batch)}, None
        if not halve:
            yield batch, columns, adversarials
            return
        half = len(batch) // 2
        if half < self._size(foreign):
            who = "" if foreign is None else f"{foreign}: "
            self.job.say(f"{who}out of memory with {len(batch)} images at a time; going on with {half}")
            self._shrink(half, foreign)
        if self.job.device.type == "cuda":
            torch.cuda.empty_cache()
        for piece in (batch[:half], batch[half:]):
            yield from self._in_pieces(piece, work, foreign)

    def _measured(self, entry: Entry, bound: Bound, batch: list[int]) -> tuple[Columns, Tensor]:
        """Attack a batch, and measure what comes back. The attack has copies, and what it returns is copied at once."""
        runner, counted = bound.runner, bound.calls
        if isinstance(runner, BaseException):
            raise runner
        images, labels = self._tensors(batch)
        seeds = [image_seed(entry.seed, self.job.dataset.names[k], entry.kind) for k in batch]
        n, wanted, targets = len(batch), self.job.targets if entry.targets is not None else None, None
        self.job.counter.forget()
        with drawing(joint_seed(seeds)):
            if wanted is not None:
                targets = wanted.of(batch, images, entry.seed, self.job.judge)
            handed = images.clone(), (labels if targets is None else targets).clone(), list(seeds)
            with self.job.at_work(entry, images, quiet=self.kind == "checks"):
                before, start = replace(counted), _clock(self.job.device)
                found = self._within_budget(entry, bound, n, partial(runner, *handed), images)
                seconds = _clock(self.job.device) - start
                calls = counted.forward - before.forward, counted.gradient - before.gradient
                found = replace(found, adversarials=plain_copy(found.adversarials, images))
                if entry.levels and entry.kind.source != "orthattack":
                    adversarials = as_stored(found.adversarials, images, entry.norm, entry.eps, entry.levels)
                    found = replace(found, adversarials=adversarials)
                promised = promised_cosine(found.adversarials, images, entry.kind.card)
            right, clean = [self.right[k] for k in batch], [self.predictions[k] for k in batch]
            columns = row_columns(self.job.judge, images, found, labels, right, clean, entry.norm, entry.eps, targets)
            columns |= {"promised_cosine": promised, **self._scored(found.adversarials)}
        given = found.forward_calls, found.gradient_calls
        for name, own, total in zip(("forward_calls", "gradient_calls"), given, calls, strict=True):
            columns[name] = [total / n] * n if own is None else own.tolist()
        columns["seconds"] = [seconds / n] * n
        if entry.queries is not None:
            asked = zip(columns["success"], columns["forward_calls"], strict=True)
            columns["success"] = [won and calls <= entry.queries for won, calls in asked]
        return columns, found.adversarials

    def _within_budget(
        self, entry: Entry, bound: Bound, count: int, attack: Callable[[], Found], images: Tensor
    ) -> Found:
        """What an attack finds for so many images; one that is not ours is stopped where the run's queries are spent,
        with nothing found."""
        if entry.queries is None or not entry.kind.is_foreign:
            return attack()
        bound.calls.most = bound.calls.forward + count * entry.queries
        try:
            return attack()
        except BudgetSpentError:
            warnings.warn(
                f"it asked for more than {entry.queries:,} evaluations per image and was stopped there: these images "
                "count as not fooled. Give it fewer steps",
                stacklevel=2,
            )
            return Found(images.clone())
        finally:
            bound.calls.most = None

    def _size(self, foreign: str | None) -> int:
        """How many images at a time."""
        return min(self.job.batch_size, self.job.sizes.get(foreign or "", self.job.batch_size))

    def _draft(self, shard: Shard | None, todo: Sequence[int], foreign: str | None = None) -> Draft:
        """What there is of a shard; its other batches are as small as its last one had to be."""
        draft = Draft(self.job.folder, shard, todo)
        if draft.batch_size is not None and draft.batch_size < self._size(foreign):
            self._shrink(draft.batch_size, foreign)
        return draft

    def _shrink(self, size: int, foreign: str | None) -> None:
        """Attack so many images at a time from now on."""
        if foreign is None:
            self.job.was_halved = True
            self.job.batch_size = self.job.judge.batch_size = size
        else:
            self.job.sizes[foreign] = size

    def _tensors(self, batch: list[int]) -> tuple[Tensor, Tensor]:
        images = torch.stack([self.images[k] for k in batch])
        labels = torch.tensor([self._key[k]["label"] for k in batch])
        if self.job.device.type == "cuda":
            images = images.pin_memory()
        return images.to(self.job.device, non_blocking=True), labels.to(self.job.device)

    def _complete(self, position: int, row: Mapping[str, Any]) -> Row:
        """A row with what is known of its image."""
        return {**self._key[position], **row, **self._failed.get(position, {})}

    def _tally(self, rows: Mapping[int, Row]) -> Done:
        """How far an attack is that has these rows."""
        scored = [row for row in rows.values() if row["status"] in ("ok", "misclassified")]
        if any(self.right.values()) and all(row["status"] == "misclassified" for row in scored):
            return Done(len(rows), 0, 0)  # it failed on all that it could have scored
        return Done(len(rows), sum(row["status"] == "ok" and not row["success"] for row in scored), len(scored))

    def _store(self, shard: Shard, rows: Mapping[int, Mapping[str, Any]], images: Mapping[int, Tensor]) -> None:
        complete = [self._complete(k, rows.get(k, {})) for k in self.positions]
        columns = {name: [row.get(name) for row in complete] for name in schema_of(shard.kind, complete[0]).names}
        kept = {k: images[k] for k in images if k in self.keep}
        self.job.folder.write(shard, columns, kept, self.job.is_exact and self.kind == "shards")


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()

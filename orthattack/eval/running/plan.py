"""A run as independent units of work, which of them are left, and which belong to one process's share."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from orthattack.eval.checks.probes import SAVED, TRANSFER, probes
from orthattack.eval.data.dataset import evenly
from orthattack.eval.storage.lock import Share
from orthattack.eval.storage.run_folder import RunFolder, Shard
from orthattack.eval.suite import Entry, Suite
from orthattack.threat import ThreatModel

GALLERY = 24  # how many images' adversarials are kept for the report


def boundless(entries: Sequence[Entry], models: Sequence[Mapping[str, Any]]) -> list[str]:
    """What to say of radii that allow every image, which makes an evaluation of them meaningless."""
    found: dict[str, None] = {}
    for size in dict.fromkeys(int(model["preprocessing"]["crop"]) for model in models):
        for entry in entries:
            threat, shape = ThreatModel(entry.norm, entry.eps or 0.0, scope=None), (3, size, size)
            if not threat.allows_everything(shape):
                continue
            diameter = threat.diameter(shape)
            hint = f"did you mean {entry.eps:g}/255?" if 1 < threat.eps < 255 * diameter else "choose a smaller radius"
            found[
                f"eps {entry.eps:g} allows every image: in {entry.norm}, images of {size}x{size} pixels are at most "
                f"{diameter:.4g} apart; {hint}"
            ] = None
    return list(found)


@dataclass(frozen=True)
class Unit:
    """What one process does at a time, on its own: one model on one chunk of the images."""

    model: str  # its label
    # "attack", all attacks on a chunk; "probe", the trust checks' own attacks; when every other unit is done,
    # "transfer", the model on the other models' adversarials, and "saved", on its own as they are on the disk
    stage: Literal["attack", "probe", "transfer", "saved"]
    chunk: int  # number of the chunk; 0 for the checks, which have images of their own
    # what of it is left: places in `Plan.entries`, in `Plan.probes`, or in the manifest's probes
    wanted: tuple[int, ...]


@dataclass(frozen=True)
class Todo:
    """What is left to do."""

    units: Sequence[Unit]  # in a sensible order, a model's one after the other
    total: int  # attacked images in all
    done: int  # of these, those that there are already
    kept: Mapping[tuple[str, int, int], int]  # and those of shards at work: by model, chunk and place in `Plan.entries`


@dataclass(frozen=True)
class Plan:
    """All of a run."""

    suite: Suite  # what it is
    entries: Sequence[Entry]  # its attacks at their radii
    manifest: Mapping[str, Any]  # what the models and data turned out to be
    folder: RunFolder  # where it is
    probes: Mapping[str, Sequence[Entry]] = field(init=False, repr=False)  # the trust checks' own attacks on each model
    _counts: dict[str, int] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        models = self.manifest["models"]
        object.__setattr__(self, "_counts", {model["label"]: int(model["data"]["images"]) for model in models})
        planned = {model["label"]: probes(self.suite, model["preprocessing"]["crop"]) for model in models}
        object.__setattr__(self, "probes", planned)

    def positions(self, unit: Unit) -> Sequence[int]:
        """The images of a unit."""
        count, size = self._counts[unit.model], self.suite.shard_size
        if unit.stage == "saved":
            return sorted(self.kept(unit.model))
        if unit.stage != "attack":
            return evenly(self.suite.check_images, count)
        return range(unit.chunk * size, min((unit.chunk + 1) * size, count))

    def kept(self, model: str) -> frozenset[int]:
        """The images whose adversarial images are kept."""
        count = self._counts[model]
        return frozenset({"gallery": evenly(GALLERY, count), "all": range(count), "none": ()}[self.suite.save_images])

    def image_bytes(self) -> int:
        """What the images to keep take on a disk, the clean ones among them, if every image is attacked."""
        sizes = {model["label"]: int(model["preprocessing"]["crop"]) for model in self.manifest["models"]}
        each = 1 + len(self.entries)
        return sum(each * len(self.kept(model)) * 3 * size**2 * 4 for model, size in sizes.items())  # as float32

    def todo(self, share: Share | None = None) -> Todo:
        """The units that are left of a run, or of share i of n: of all units, every n-th from the i-th on.

        Which units there are does not depend on what is done. Those of `last` are not among them.
        """
        first, step = (0, 1) if share is None else (share[0] - 1, share[1])
        units: list[Unit] = []
        total = done = number = 0
        begun: dict[Shard, tuple[str, int, int]] = {}
        for model in self._counts:
            own = {chunk: len(self.positions(Unit(model, "attack", chunk, ()))) for chunk in self._chunks(model)}
            count = len(own)
            own = {chunk: rows for chunk, rows in own.items() if (number + chunk) % step == first}
            found = [self.folder.done(shard, own) for shard in self._shards(model)]
            clean = self.folder.done(Shard(model, "clean", None, 0, "clean"), own)
            for chunk, rows in own.items():
                wanted = tuple(k for k, there in enumerate(found) if chunk not in there)
                total, done = total + rows * len(found), done + rows * (len(found) - len(wanted))
                unit = Unit(model, "attack", chunk, wanted)
                if wanted or chunk not in clean:
                    units.append(unit)
                begun |= {self.shard(unit, k): (model, chunk, k) for k in wanted}
            if self.suite.checks:
                if (number + count) % step == first:
                    units += self._left(Unit(model, "probe", 0, tuple(range(len(self.probes[model])))))
                count += 1
            number += count
        kept = {begun[shard]: rows for shard, rows in self.folder.kept_counts(begun).items()}
        return Todo(units, total, done, kept)

    def last(self) -> list[Unit]:
        """What is left of the trust checks that read the images that were saved: of other models, and the model's."""
        found: list[Unit] = []
        stages: Sequence[tuple[Literal["transfer", "saved"], str]] = [("transfer", TRANSFER), ("saved", SAVED)]
        for model in self._counts if self.suite.checks else ():
            for stage, begin in stages:
                wanted = tuple(
                    k
                    for k, probe in enumerate(self.manifest["probes"])
                    if probe["model"] == model and probe["label"].startswith(begin)
                )
                found += self._left(Unit(model, stage, 0, wanted))
        return found

    def left_of(self, unit: Unit) -> Unit | None:
        """A unit without what has been done of it since; None if that is all."""
        return next(self._left(unit), None)

    def _left(self, unit: Unit) -> Iterator[Unit]:
        rows = len(self.positions(unit))
        wanted = tuple(k for k in unit.wanted if not self.folder.is_done(self.shard(unit, k), rows))
        clean = Shard(unit.model, "clean", None, unit.chunk, "clean")
        if wanted or (unit.stage == "attack" and not self.folder.is_done(clean, rows)):
            yield Unit(unit.model, unit.stage, unit.chunk, wanted)

    def shard(self, unit: Unit, which: int) -> Shard:
        """The file of one of a unit's attacks."""
        if unit.stage in ("transfer", "saved"):
            probe = self.manifest["probes"][which]
            return Shard(unit.model, probe["label"], probe["eps"], 0, "checks")
        entry = self.entries[which] if unit.stage == "attack" else self.probes[unit.model][which]
        return Shard(unit.model, entry.label, entry.eps, unit.chunk, "shards" if unit.stage == "attack" else "checks")

    def is_ready_for_last(self) -> bool:
        """Whether every unit but those of `last` is done, whoever did it; files are counted, not opened."""
        for model in self._counts:
            chunks = set(self._chunks(model))
            examples = [*self._shards(model), Shard(model, "clean", None, 0, "clean")]
            if any(not chunks <= self.folder.there(example) for example in examples):
                return False
            checks = [Shard(model, probe.label, probe.eps, 0, "checks") for probe in self.probes[model]]
            if any(0 not in self.folder.there(example) for example in checks):
                return False
        return True

    def compact(self) -> None:
        """Make one file of each attack at each radius on a model, where all of it is done; on a disk, for in a store
        another driver might be reading what would go."""
        if self.folder.path is None:
            return
        for model in self._counts:
            rows = {chunk: len(self.positions(Unit(model, "attack", chunk, ()))) for chunk in self._chunks(model)}
            for example in self._shards(model):
                if rows.keys() <= self.folder.there(example):
                    self.folder.compact(example, rows)

    def _chunks(self, model: str) -> range:
        return range(-(-self._counts[model] // self.suite.shard_size))

    def _shards(self, model: str) -> list[Shard]:
        return [Shard(model, entry.label, entry.eps, 0) for entry in self.entries]

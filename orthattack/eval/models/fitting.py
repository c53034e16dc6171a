"""Which of a file's weights are which of a model's: what is before their names, and beside them."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from orthattack.eval.errors import EvaluationError
from orthattack.eval.models.classifier import Builder, shapes
from orthattack.eval.models.weights import Checkpoint, few, read_checkpoint


def read_fitted(name: str, path: Path, build: Builder) -> Checkpoint:
    """A weights file, with its names as the architecture has them."""
    return fitted(read_checkpoint(path), name, shapes(build, 2))


def fitted(file: Checkpoint, name: str, wanted: Collection[str]) -> Checkpoint:
    """The same file, with the names of the weights as the architecture has them: those `wanted`.

    Training puts names before them, such as ``module.`` (DataParallel), ``_orig_mod.`` (torch.compile), ``model.``
    (Lightning) or several of these, and the weights into a dictionary beside others. What is before them is removed
    where that makes all of them fit, in one way only. Of averaged weights (EMA) beside plain ones the plain ones are
    taken, and that is noted. A normalisation that was saved with the model becomes metadata. Where nothing fits, the
    nearest is returned, so that what is missing can be said. EvaluationError: several sets of weights fit."""
    found = list(_fits(file, wanted))
    whole = [fit for fit in found if fit.count == len(_needed(wanted))]
    plain = [fit for fit in whole if not fit.is_averaged] or whole
    distinct = [fit for k, fit in enumerate(plain) if not any(_equal(fit, other, wanted) for other in plain[:k])]
    if len(distinct) > 1:
        places = " and ".join(repr(fit.place) for fit in distinct)
        raise EvaluationError(
            f"{file.path} holds several sets of weights that fit {name}, at {places}, and which is meant is not known: "
            f"save one alone, {distinct[0].alone}"
        )
    best = max(found, key=lambda fit: (fit.count, not fit.is_averaged), default=None)
    if not distinct:
        if best is None or best.count * 2 < len(wanted):
            return file
        return replace(file, tensors=best.tensors)
    chosen = distinct[0]
    tensors, beside = dict(chosen.tensors), dict(chosen.beside)
    metadata, notes = dict(file.metadata), []
    averaged = next((fit for fit in whole if fit.is_averaged), None)
    if averaged is not None and not chosen.is_averaged:
        notes.append(
            f"{file.path} has averaged weights too, at {averaged.place!r}; the plain ones, at {chosen.place!r}, are "
            f"attacked. For the others save them alone, {averaged.alone}"
        )
    for place in (tensors, beside):
        found_there = _normalisation(place, wanted)
        for what, key in found_there.items():
            metadata.setdefault(what, json.dumps(_pixel_units(file, key, place.pop(key))))
        if found_there:
            notes.append(
                f"{file.path} brings its own normalisation, mean {metadata['mean']} and std {metadata['std']}, which "
                "is used"
            )
    known = set().union(*(fit.keys for fit in whole))
    rest = sorted(key for key in beside if key not in known and not _is_bookkeeping(key))
    if rest:
        notes.append(f"{file.path} has {len(rest)} tensors that are no part of {name}, left out: {few(rest)}")
    tensors = {key: value for key, value in tensors.items() if key in wanted or not _is_bookkeeping(key)}
    return replace(file, tensors=tensors, metadata=metadata, notes=(*file.notes, *notes))


@dataclass(frozen=True)
class _Fit:
    """Weights in a file that have names of the architecture."""

    at: tuple[str, ...]  # the keys of the dictionaries that they lie in
    prefix: str  # what is before each name
    count: int  # how many of the names wanted there are
    tensors: dict[str, Tensor]  # all that have the prefix, without it
    beside: dict[str, Tensor]  # all that have not
    keys: frozenset[str]  # the names of `tensors` as the file has them

    @property
    def place(self) -> str:
        """Where, in a word."""
        return ".".join((*self.at, self.prefix)).strip(".") or "the top"

    @property
    def alone(self) -> str:
        """How to save them without the others."""
        inner = "torch.load(FILE)" + "".join(f"[{key!r}]" for key in self.at)
        if self.prefix:
            inner = f"{{k: v for k, v in {inner}.items() if k.startswith({self.prefix!r})}}"
        return f"torch.save({inner}, 'weights.pt')"

    @property
    def is_averaged(self) -> bool:
        """Whether they are said to be a moving average of the weights."""
        return re.search(r"(^|[._])(ema|swa|averaged?|shadow)([._]|$)", self.place.lower()) is not None


def _fits(file: Checkpoint, wanted: Collection[str]) -> Iterator[_Fit]:
    """Every way to find some of the wanted names in the file."""
    needed = _needed(wanted)
    for at, tensors in file.sets.items():
        for unwrapped in (False, True):  # as they are, and without what wraps parts of the model
            named = {_unwrapped(key) if unwrapped else key: key for key in tensors}
            if unwrapped and (len(named) < len(tensors) or named.keys() == tensors.keys()):
                continue
            counts = Counter(key[: len(key) - len(rest)] for key in named for rest in _endings(key) if rest in needed)
            for prefix, count in counts.items():
                inside = {key: old for key, old in named.items() if key.startswith(prefix)}
                yield _Fit(
                    at,
                    prefix,
                    count,
                    {key.removeprefix(prefix): tensors[old] for key, old in inside.items()},
                    {old: tensors[old] for key, old in named.items() if key not in inside},
                    frozenset(inside.values()),
                )


def _endings(key: str) -> Iterator[str]:
    """A name, and what of it follows each dot."""
    yield key
    for match in re.finditer(r"\.", key):
        yield key[match.end() :]


def _unwrapped(key: str) -> str:
    """A name without what torch.compile and DataParallel put into it."""
    return ".".join(part for part in key.split(".") if part not in ("_orig_mod", "module"))


def _needed(wanted: Collection[str]) -> set[str]:
    """The names without those that old files lack and nothing needs."""
    return {key for key in wanted if not key.endswith("num_batches_tracked")}


def _equal(first: _Fit, second: _Fit, wanted: Collection[str]) -> bool:
    pairs = [(first.tensors[key], second.tensors[key]) for key in _needed(wanted)]
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


def _is_bookkeeping(key: str) -> bool:
    """How many models were averaged, or what a metric or a loss remembers."""
    kept = r"(^|\.)(n_averaged|num_updates|decay)$|(^|[._])(criterion|loss\w*|metrics?|acc|accuracy)\."
    return re.search(kept, key) is not None


def _normalisation(tensors: Mapping[str, Tensor], wanted: Collection[str]) -> dict[str, str]:
    """The names of a mean and a standard deviation of three channels that lie together, by which is which."""
    for key, value in tensors.items():
        match = re.fullmatch(r"((?:.*\.)?(?:new|pixel|image|norm|input)?_?)(mean|mu)", key)
        if match is None or key in wanted or value.numel() != 3:
            continue
        for word in ("std", "sigma"):
            other = match[1] + word
            if other in tensors and other not in wanted and tensors[other].numel() == 3:
                return {"mean": key, "std": other}
    return {}


def _pixel_units(file: Checkpoint, key: str, tensor: Tensor) -> list[float]:
    values: list[float] = [round(value, 7) for value in tensor.double().reshape(-1).tolist()]
    if not all(abs(value) <= 1.5 for value in values):
        raise EvaluationError(
            f"{file.path} has a normalisation {key} of {values}, which is not in units of [0, 1] pixels: if the model "
            "takes 8-bit values, divide it by 255, and save it so; or leave it out"
        )
    return values

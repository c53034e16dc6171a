"""Which of a data set's classes is which of the model's: matched by name, number or order, or as a file says."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from itertools import count
from pathlib import Path
from typing import Any, Literal, TextIO

from orthattack.eval.errors import EvaluationError, nearest
from orthattack.eval.models.classifier import Classifier

_KEYS, _VALUES = ("folder", "wnid", "class"), ("label", "index")


@dataclass(frozen=True)
class ClassMap:
    """The data's classes among the model's."""

    # of each of the data's classes, the model's class index; None where it is not known and not needed
    labels: tuple[int | None, ...]
    mapping: str  # how they were matched, in a sentence for the manifest
    # names of the model's classes as the data has them, where they are the whole class list
    names: tuple[str, ...] | None = None


def match_folders(
    folders: Sequence[str], classifier: Classifier, where: Path, order: Order | None = None, empty: Sequence[str] = ()
) -> ClassMap:
    """Folder names, sorted: by the model's class names; or, where none is named so, by number if they are called 0 to
    K - 1; in sorted order, if there are as many, those `empty` of images among them; or, some of ImageNet's WordNet ids
    and a model of 1,000 classes, by these. `order` is what sorts them where the two differ. EvaluationError: some have
    the name of exactly one class and others do not, or nothing says which is which."""
    count = classifier.num_classes
    known = [_plain(name) for name in classifier.classes or ()]
    strange = [name for name in folders if known.count(_plain(name)) != 1]
    if folders and not strange and order is None:
        labels = tuple(known.index(_plain(name)) for name in folders)
        return ClassMap(labels, "folders matched with the model's classes by name")
    if len(strange) < len(folders) and order is None:
        raise EvaluationError(
            f"{where} has a folder {strange[0]!r} that is not, or not the only, class of that name in "
            f"{classifier.name}, though others are: rename it, or pass --classes FILE.csv with columns folder and label"
        )
    every = sorted([*folders, *empty])
    if order is None and set(every) == {str(k) for k in range(count)}:
        return ClassMap(tuple(map(int, folders)), "folders called by the model's class indices")
    if len(every) in (0, count):
        by_number = sorted(every, key=_by_number)
        if order is None and by_number != every:
            raise EvaluationError(
                f"{where} has class folders in another order as text ({_start(every)}) than by their numbers "
                f"({_start(by_number)}), and which one {classifier.name} was trained with is not known: pass --classes "
                "text (torchvision's ImageFolder sorts so) or --classes numbers"
            )
        chosen = by_number if order == "numbers" else every
        how = {None: "sorted order", "text": "the order of text", "numbers": "the order of their numbers"}[order]
        return ClassMap(
            tuple(chosen.index(name) for name in folders),
            f"folders in {how} taken as the model's classes, since there are as many",
            _readable(chosen),
        )
    if order is None and folders and count == 1000 and set(folders) <= (wnids := imagenet_wnids()).keys():
        how = "folders matched with ImageNet's classes by WordNet id"
        return ClassMap(tuple(wnids[name] for name in folders), how, imagenet_names())
    if len(folders) == count:
        raise EvaluationError(
            f"{where} has {count} class folders with images, as many as {classifier.name} has classes, but also "
            f"{len(empty)} without any ({_start(empty)}): remove them, or pass --classes FILE.csv with columns folder "
            "and label"
        )
    raise EvaluationError(
        f"{where} has {len(folders)} class folders and {classifier.name} {count} classes, so which "
        "is which is not known: pass --classes FILE.csv with columns folder and label, or --labels FILE.csv with "
        "columns file and label"
    )


@cache
def imagenet_wnids() -> dict[str, int]:
    """The WordNet ids of ImageNet-1k's classes, and their numbers: their order as text (Russakovsky et al. 2015,
    arXiv:1409.0575)."""
    lines = files("orthattack.eval.data").joinpath("imagenet_wnids.txt").read_text("ascii").split()
    return {wnid: k for k, wnid in enumerate(lines)}


def imagenet_names() -> tuple[str, ...]:
    """What they are called, as torchvision has it."""
    from orthattack.eval.models import torchvision  # takes seconds

    return torchvision.imagenet_names()


def _readable(folders: Sequence[str]) -> tuple[str, ...]:
    """Folder names, WordNet ids of ImageNet's classes as what these are called."""
    wnids = imagenet_wnids()
    if not set(folders) <= wnids.keys():
        return tuple(folders)
    names = imagenet_names()
    return tuple(names[wnids[folder]] for folder in folders)


Order = Literal["text", "numbers"]  # what sorts class folders, where the two differ: 1, 10, 2 or 1, 2, 10


def _by_number(name: str) -> list[str | int]:
    """A key that sorts 2 before 10."""
    return [int(part) if k % 2 else part for k, part in enumerate(re.split(r"([0-9]+)", name))]


def _start(names: Sequence[str]) -> str:
    return ", ".join(names[:4]) + (" ..." if len(names) > 4 else "")


def match_names(names: Sequence[Sequence[str]], classifier: Classifier, where: str) -> ClassMap:
    """Classes that the data numbers and names, each with one or more synonyms: by name if each is exactly one of the
    model's; or by number if there are as many, and no name says otherwise. EvaluationError: neither."""
    own = [{_plain(synonym) for synonym in _synonyms(name)} for name in classifier.classes or ()]
    theirs = [{_plain(part) for name in synonyms for part in _synonyms(name)} for synonyms in names]
    candidates = [[k for k, mine in enumerate(own) if mine & synonyms] for synonyms in theirs]
    found = [ks[0] for ks in candidates if len(ks) == 1]
    if len(found) == len(names) == len(set(found)):
        return ClassMap(tuple(found), "the data's classes matched with the model's by name")
    as_many = len(names) == classifier.num_classes
    if as_many:
        astray = [k for k, ks in enumerate(candidates) if ks and k not in ks]
        if not astray:
            agree = sum(k in ks for k, ks in enumerate(candidates))
            how = "the model's have no names" if not own else f"{agree} of {len(names)} names agree"
            listed = tuple(synonyms[0] for synonyms in names)
            return ClassMap(
                tuple(range(len(names))),
                f"the data's class numbers taken as the model's class indices, since there are as many ({how})",
                listed if not own else None,
            )
        k = astray[0]
        reason = f"its class {k}, {names[k][0]!r}, is the model's class {candidates[k][0]}"
    else:
        strange = next((k for k, ks in enumerate(candidates) if len(ks) != 1), 0)
        reason = f"{names[strange][0]!r} is not, or not the only, class of that name"
    raise EvaluationError(
        f"{where} has {len(names)} classes and {classifier.name} {classifier.num_classes}, and which is which is not "
        f"known ({reason}): pass --classes FILE.csv with columns class and label, or choose another model"
    )


def map_from_file(keys: Sequence[Sequence[str]], needed: Iterable[int], path: Path, where: str | Path) -> ClassMap:
    """As a CSV file says, with a column folder, wnid or class, and a column label or index. Rows may repeat.

    `keys` are what each of the data's classes may be called in the file, `needed` those of them that have images.
    EvaluationError: a file that cannot be read or contradicts itself, or that lacks a class."""
    columns, rows = read_table(path, "classes")
    key_column = next((name for name in _KEYS if name in columns), None)
    value_column = next((name for name in _VALUES if name in columns), None)
    if key_column is None or value_column is None:
        raise EvaluationError(
            f"{path} must have a column {', '.join(_KEYS[:-1])} or {_KEYS[-1]}, and a column {' or '.join(_VALUES)}; "
            f"it has {', '.join(columns) or 'none'}"
        )
    listed: dict[str, int] = {}
    for line, row in rows:
        key, value = row[key_column], row[value_column]
        if not key or not re.fullmatch(r"\s*\d{1,9}\s*", value or ""):
            raise EvaluationError(
                f"{path}, line {line}: {value_column} must be a class index >= 0, {key_column} a name; got {key!r}, "
                f"{value!r}"
            )
        index = int(value.strip())  # which strips more than int does
        if listed.setdefault(key, index) != index:
            raise EvaluationError(f"{path}, line {line}: {key!r} has index {index}, but {listed[key]} before")
    labels = tuple(next((listed[key] for key in synonyms if key in listed), None) for synonyms in keys)
    for k in needed:
        if labels[k] is None:
            close = nearest(keys[k][0], listed)
            hint = f"; the nearest that it lists is {close[0]!r}" if close else ""
            raise EvaluationError(f"{path} does not list {keys[k][0]!r}, a class of {where}{hint}")
    return ClassMap(labels, f"classes matched by {path.name}, columns {key_column} and {value_column}")


def read_table(path: Path, what: str) -> tuple[list[str], Iterator[tuple[int, dict[str, str]]]]:
    """Columns, and rows one at a time, each with its line number, of a CSV file. EvaluationError, also on the way: it
    cannot be read as one, or is larger than any that is meant."""
    table = _table(path, what)
    return next(table), table


def _table(path: Path, what: str) -> Iterator[Any]:
    """The columns, and then the rows."""
    before = 0

    def lines(stream: TextIO) -> Iterator[str]:
        for number, line in enumerate(bounded_lines(stream), 1):
            if number > before + _MAX_ROW:  # in quotes, a row may go on over many
                raise ValueError(f"the row of line {before + 1} has more than {_MAX_ROW} lines")
            yield line

    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(lines(stream))
            yield list(reader.fieldnames or [])
            for row in reader:
                before = reader.line_num
                yield before, row
    except (OSError, ValueError, csv.Error) as error:
        raise EvaluationError(f"could not read {what} file {path} ({error})") from error


_MAX_ROW = 100
MAX_LINES, _MAX_LINE, _MAX_TEXT = 1_500_000, 2**17, 2**26  # of a list of images or classes: ImageNet has 1.3 million


def bounded_lines(stream: TextIO) -> Iterator[str]:
    """The lines of a list. ValueError: too many, or too long ones, for what it is."""
    size = 0
    for number in count(1):
        line = stream.readline(_MAX_LINE)
        if not line:
            return
        size += len(line)
        if number > MAX_LINES or size > _MAX_TEXT:
            raise ValueError(f"more than {MAX_LINES:,} lines, or {_MAX_TEXT / 1e6:.0f} million characters")
        if len(line) == _MAX_LINE and not line.endswith("\n"):
            raise ValueError(f"line {number} is longer than {_MAX_LINE:,} characters")
        yield line


def _synonyms(name: str) -> list[str]:
    """ "tench, Tinca tinca" is how ImageNet's lists write two names of one class."""
    return [name, *name.split(", ")]


def _plain(name: str) -> str:
    return name.replace("_", " ").replace("-", " ").casefold()

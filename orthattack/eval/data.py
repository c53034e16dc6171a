"""Photographs with labels to evaluate on: a folder, or the ones in Foolbox's package; one batch in memory at a time."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from PIL import Image
from torch import Tensor

from orthattack.eval.models import Classifier, EvaluationError, Preprocessing

if TYPE_CHECKING:
    from importlib.resources.abc import Traversable  # Python 3.11

__all__ = ["SAMPLES", "Batch", "Photograph", "Photographs", "Unreadable", "check_data", "load_photographs"]

SAMPLES = {"imagenet-samples": "imagenet", "cifar10-samples": "cifar10"}
"""The photographs in Foolbox's package, 20 of each, and their names there."""

_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}


@dataclass(frozen=True)
class Photograph:
    """A file with its name in the data set and its class among the model's."""

    name: str
    file: Traversable
    label: int


@dataclass(frozen=True)
class Unreadable:
    """A photograph that could not be decoded, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class Batch:
    """Preprocessed photographs: names, images (N, 3, H, W) in [0, 1], labels (N,)."""

    names: list[str]
    images: Tensor
    labels: Tensor


@dataclass(frozen=True)
class Photographs:
    """A data set.

    Attributes:
        name: as asked for.
        items: the photographs, in a fixed order.
        classes: names of the model's classes as the folders have them, where they are the whole class list.
    """

    name: str
    items: tuple[Photograph, ...]
    classes: tuple[str, ...] | None = None

    def limited(self, count: int | None) -> Photographs:
        """At most `count` of them, evenly spaced, so that a sorted folder still shows all its classes."""
        if count is None or count >= len(self.items):
            return self
        if count < 1:
            raise EvaluationError(f"--limit must be at least 1; got {count}")
        return replace(self, items=tuple(self.items[k * len(self.items) // count] for k in range(count)))

    def batches(self, size: int, preprocessing: Preprocessing) -> Iterator[Batch | Unreadable]:
        """Batches of up to `size`, and, as they are met, the photographs that cannot be read."""
        ready: list[tuple[Photograph, Tensor]] = []
        for item in self.items:
            try:
                if not item.file.is_file():
                    raise FileNotFoundError("No such file")
                with item.file.open("rb") as stream, Image.open(stream) as image:
                    ready.append((item, preprocessing(image)))
            except Exception as error:  # decoders raise whatever they like
                yield Unreadable(item.name, f"{type(error).__name__}: {error}")
            if len(ready) == size:
                yield _batch(ready)
                ready = []
        if ready:
            yield _batch(ready)


def check_data(data: str) -> None:
    """Raise EvaluationError if `data` is neither of `SAMPLES` nor a folder."""
    if data not in SAMPLES and not Path(data).is_dir():
        raise EvaluationError(f"data folder {data} does not exist; it must be a folder or {' or '.join(SAMPLES)}")


def load_photographs(data: str, classifier: Classifier, labels: Path | None = None) -> Photographs:
    """Find the photographs and their classes among the classifier's.

    Args:
        data: one of `SAMPLES`, or a folder with one sub-folder per class. Sub-folders are matched with the model's
            classes by name; or, where none is named so, by number if they are called 0 to K - 1, or else by sorted
            order, if there are as many.
        labels: a CSV file with columns ``file``, relative to the folder, and ``label``, an index among the model's
            classes; other columns are ignored. The folder's own structure then does not matter.

    Raises:
        EvaluationError: nothing there, or labels that do not fit the model.
    """
    classes = None
    if data in SAMPLES:
        if labels is not None:
            raise EvaluationError(f"--labels goes with a folder; {data} has labels of its own")
        items = _foolbox_samples(data)
    else:
        check_data(data)
        folder = Path(data)
        if labels is None:
            items, classes = _class_folders(folder, classifier)
        else:
            items = _labelled(folder, labels)
    if not items:
        raise EvaluationError(f"{labels or data} names no photographs ({' '.join(sorted(_SUFFIXES))})")
    worst = max(items, key=lambda item: item.label)
    if worst.label >= classifier.num_classes:
        raise EvaluationError(
            f"{worst.name} has label {worst.label}, but {classifier.name} has {classifier.num_classes} classes, 0 to "
            f"{classifier.num_classes - 1}: is this the right model for {data}?"
        )
    return Photographs(data, tuple(items), classes)


def _batch(ready: list[tuple[Photograph, Tensor]]) -> Batch:
    items, images = zip(*ready, strict=True)
    return Batch([item.name for item in items], torch.stack(images), torch.tensor([item.label for item in items]))


def _foolbox_samples(data: str) -> list[Photograph]:
    pattern = re.compile(rf"{SAMPLES[data]}_\d+_(\d+)\.(png|jpg)")
    files = sorted((resources.files("foolbox") / "data").iterdir(), key=lambda file: file.name)
    matches = [(file, pattern.fullmatch(file.name)) for file in files]
    return [Photograph(file.name, file, int(match[1])) for file, match in matches if match]


def _class_folders(folder: Path, classifier: Classifier) -> tuple[list[Photograph], tuple[str, ...] | None]:
    """The photographs and, if the folders in sorted order are the class list, their names."""
    try:
        found = _files_by_folder(folder)
    except OSError as error:
        raise EvaluationError(f"could not read data folder {folder} ({error})") from error
    found = {name: files for name, files in found.items() if files}
    known = [_plain(name) for name in classifier.classes or ()]
    classes = None
    strange = [name for name in found if known.count(_plain(name)) != 1]
    if found and not strange:
        label_of = {name: known.index(_plain(name)) for name in found}
    elif len(strange) < len(found):
        raise EvaluationError(
            f"{folder} has a folder {strange[0]!r} that is not, or not the only, class of that name in "
            f"{classifier.name}, though others are: rename it, or pass --labels FILE.csv with columns file and label"
        )
    elif found.keys() == {str(k) for k in range(classifier.num_classes)}:
        label_of = {name: int(name) for name in found}
    elif len(found) in (0, classifier.num_classes):
        label_of = {name: label for label, name in enumerate(found)}
        classes = tuple(found)
    else:
        raise EvaluationError(
            f"{folder} has {len(found)} class folders and {classifier.name} {classifier.num_classes} classes, so which "
            "is which is not known: pass --labels FILE.csv with columns file and label"
        )
    photographs = [
        Photograph(str(file.relative_to(folder)), file, label_of[name])
        for name, files in found.items()
        for file in files
    ]
    return photographs, classes


def _files_by_folder(folder: Path) -> dict[str, list[Path]]:
    return {
        path.name: sorted(file for file in path.rglob("*") if file.suffix.lower() in _SUFFIXES and not file.is_dir())
        for path in sorted(folder.iterdir())
        if path.is_dir() and not path.name.startswith(".")
    }


def _plain(name: str) -> str:
    return name.replace("_", " ").replace("-", " ").casefold()


def _labelled(folder: Path, path: Path) -> list[Photograph]:
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            reader = csv.DictReader(stream)
            columns = reader.fieldnames or []
            if not {"file", "label"} <= set(columns):
                raise EvaluationError(f"{path} must have columns file and label; it has {', '.join(columns) or 'none'}")
            rows = [(reader.line_num, row["file"], row["label"]) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise EvaluationError(f"could not read labels file {path} ({error})") from error
    root, items = folder.resolve(), {}
    for line, name, label in rows:
        if not name or not re.fullmatch(r"\s*\d{1,9}\s*", label or ""):
            raise EvaluationError(
                f"{path}, line {line}: label must be a class index >= 0, file a name; got {name!r}, {label!r}"
            )
        if not (root / name).resolve().is_relative_to(root):
            raise EvaluationError(f"{path}, line {line}: {name!r} lies outside {folder}")
        if name in items:
            raise EvaluationError(f"{path}, line {line}: {name!r} is listed twice")
        items[name] = Photograph(name, root / name, int(label))
    return list(items.values())

"""Images to evaluate on by name: folders, samples, Parquet, torchvision's data sets, or a user's."""

from __future__ import annotations

import os
import re
from array import array
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from orthattack.eval import plugin
from orthattack.eval.data.arrow import Arrows
from orthattack.eval.data.classes import (
    ClassMap,
    Order,
    imagenet_names,
    map_from_file,
    match_folders,
    match_names,
    read_table,
)
from orthattack.eval.data.dataset import ImageDataset
from orthattack.eval.data.readers import SUFFIXES, Dataset, Files, Packed, Shards, Source, find_shards
from orthattack.eval.data.tars import Tars
from orthattack.eval.errors import EvaluationError
from orthattack.eval.models.classifier import Classifier, checked

SAMPLES = {"imagenet-samples": "imagenet", "cifar10-samples": "cifar10"}
"""The images in Foolbox's package, 20 of each, and their names there."""

TORCHVISION = "torchvision:"
_UNSAID = {"thumbs.db", "desktop.ini"}  # which file managers leave behind
_AS_THEY_ARE = "labels taken as the model's class indices"


def check_data(data: str) -> None:
    """Raise EvaluationError if `data` is nothing that `load_dataset` knows; nothing large is read yet."""
    if data in SAMPLES or (plugin.is_plugin(data) and not data.startswith(TORCHVISION)):
        return
    if data.startswith(TORCHVISION):
        from orthattack.eval.data.torchvision import check_torchvision  # takes seconds

        check_torchvision(data)
    elif not find_shards(data) and not os.path.isdir(data):  # noqa: PTH112 - pathlib's raises where a name is too long
        problem = "is a file, not a folder" if os.path.isfile(data) else "does not exist"  # noqa: PTH113
        raise EvaluationError(
            f"data folder {data} {problem}; it must be a folder or {' or '.join(SAMPLES)}, Parquet, tar or "
            f"Arrow files, {TORCHVISION}NAME,root=FOLDER, or your own package.module:function"
        )


def load_dataset(
    data: str, classifier: Classifier, labels: Path | str | None = None, classes: Path | str | None = None
) -> ImageDataset:
    """Find the images and their classes among the classifier's.

    Args:
        data: one of

            - `SAMPLES`;
            - a folder with one sub-folder per class, matched with the model's classes by name; or, where none is named
              so, by number if they are called 0 to K - 1, or else by sorted order, if there are as many;
            - Parquet files of Hugging Face's form (`Shards`), tar files of WebDataset's (`Tars`), or Arrow files, as
              ``Dataset.save_to_disk`` writes them into a folder (`Arrows`): one, a pattern, or a folder of them;
            - "torchvision:NAME,root=FOLDER", one of torchvision's data sets, with further options of its after commas
              (`open_torchvision`);
            - "package.module:function", called without arguments, which returns a sequence of (image, label) or a
              map-style data set (`Dataset`). It is read by one thread at a time. Unless it has an attribute ``targets``
              or ``labels``, all of it is gone through once for its labels.

            Of all but the first two, the classes are matched by name if their names are known, or else by number.
        labels: a CSV file with columns ``file``, relative to the folder, and ``label``, an index among the model's
            classes; other columns are ignored. The folder's own structure then does not matter.
        classes: a CSV file that says which class is which, see `map_from_file`; or "text" or "numbers", the order of
            class folders of which the numbers are in another order than the text.

    Raises:
        EvaluationError: nothing there, or labels that do not fit the model.
    """
    if classifier.num_classes == 0:
        classifier = checked(classifier)
    labels = None if labels is None else Path(labels)
    table, order = _class_order(data, labels, classes)
    source: Source
    notes: tuple[str, ...] = ()
    if data in SAMPLES:
        names, indices, source = _foolbox_samples(data)
        of_imagenet = data == "imagenet-samples" and classifier.num_classes == 1000
        found = ClassMap((), _AS_THEY_ARE, imagenet_names() if of_imagenet else None)
    elif labels is not None:
        names, indices, source = _labelled(Path(data), labels)
        found = ClassMap((), f"labels from {labels.name}, {_AS_THEY_ARE}")
    elif _is_folder(data):
        names, indices, source, found, notes = _class_folders(Path(data), classifier, table, order)
    else:
        names, indices, source, found = _data_set(data, classifier, table)
    if not names:
        skipped = f"; {notes[0]}" if notes else ""
        raise EvaluationError(f"{labels or data} names no images ({' '.join(sorted(SUFFIXES))}){skipped}")
    worst = max(range(len(names)), key=indices.__getitem__)
    if indices[worst] >= classifier.num_classes:
        raise EvaluationError(
            f"{names[worst]} has label {indices[worst]}, but {classifier.name} has {classifier.num_classes} classes, 0 "
            f"to {classifier.num_classes - 1}: is this the right model for {data}?"
        )
    about = (data, tuple(names), tuple(indices), found.names, found.mapping)
    return ImageDataset(*about, source, range(len(names)), notes)


def _is_folder(data: str) -> bool:
    """Whether images lie in folders there."""
    return data not in SAMPLES and Path(data).is_dir() and not find_shards(data)


def _class_order(data: str, labels: Path | None, classes: Path | str | None) -> tuple[Path | None, Order | None]:
    """What `load_dataset` is told of the classes: a file, or an order of folders; EvaluationError if it is not meant
    for such data."""
    check_data(data)
    is_folder = _is_folder(data)
    if labels is not None and not is_folder:
        raise EvaluationError(f"--labels goes with a folder; {data} has labels of its own")
    if str(classes) in ("text", "numbers") and not os.path.exists(str(classes)):  # noqa: PTH110
        order: Order = "text" if str(classes) == "text" else "numbers"
        if not is_folder or labels is not None:
            raise EvaluationError(f"--classes {order} is the order of class folders; {labels or data} has none")
        return None, order
    if classes is not None and (labels is not None or data in SAMPLES):
        raise EvaluationError(f"--classes matches classes by name; {labels or data} has the model's class indices")
    table = None if classes is None else Path(classes)
    if table is not None and not os.path.exists(table) and "." not in table.name:  # noqa: PTH110
        raise EvaluationError(f"--classes {table} is neither text nor numbers, an order of class folders, nor a file")
    return table, None


def _foolbox_samples(data: str) -> tuple[list[str], list[int], Files]:
    pattern = re.compile(rf"{SAMPLES[data]}_\d+_(\d+)\.(png|jpg)")
    package = find_spec("foolbox")  # which is not imported for its images
    folder = Path(str(package and package.origin)).parent / "data"
    matches = [(path, match) for path in sorted(folder.iterdir()) if (match := pattern.fullmatch(path.name))]
    paths = [path for path, _ in matches]
    return [path.name for path in paths], [int(match[1]) for _, match in matches], Files(paths)


def _class_folders(
    folder: Path, classifier: Classifier, classes: Path | None, order: Order | None
) -> tuple[list[str], list[int], Files, ClassMap, tuple[str, ...]]:
    skipped: Counter[str] = Counter()
    try:
        everything = _files_by_folder(folder, skipped)
    except OSError as error:
        raise EvaluationError(f"could not read data folder {folder} ({error})") from error
    found = {name: files for name, files in everything.items() if files}
    empty = [name for name in everything if name not in found]
    if not found and skipped[_LOOSE]:
        raise EvaluationError(
            f"{folder} has {skipped[_LOOSE]} images, but no class folders: put those of a class into a folder, or pass "
            "--labels FILE.csv with columns file and label"
        )
    if not found:
        matched = ClassMap((), _AS_THEY_ARE)
    elif classes is None:
        matched = match_folders(tuple(found), classifier, folder, order, empty)
    else:
        matched = map_from_file([(name,) for name in found], range(len(found)), classes, folder)
    paths = [(path, k) for k, files in enumerate(found.values()) for path in files]
    names = [path.relative_to(folder).as_posix() for path, _ in paths]
    root, linked = str(folder.resolve()), {name for name in found if (folder / name).is_symlink()}
    _refuse_twice(Path(root), names, array("q", (_resolved(root, name, linked) for name in names)), str(folder))
    labels = _relabelled([k for _, k in paths], matched)
    return names, labels, Files(names, folder), matched, _not_read(folder, skipped)


def _resolved(root: str, name: str, linked: Collection[str]) -> int:
    """A number for what an image's path resolves to, where only its class folder and itself can be links."""
    path = f"{root}/{name}"
    is_link = name.partition("/")[0] in linked or os.path.islink(path)  # noqa: PTH114 - there may be millions
    return hash(os.path.realpath(path) if is_link else path)


_LOOSE = "images beside the class folders"


def _files_by_folder(folder: Path, skipped: Counter[str]) -> dict[str, list[Path]]:
    """The images of each class folder; what else lies there is counted by its kind."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.name.startswith("."):
            continue
        if path.is_dir():
            found[path.name] = sorted(_images(path, skipped))
        elif path.suffix.lower() in SUFFIXES:
            skipped[_LOOSE] += 1
    return found


def _images(folder: Path, skipped: Counter[str]) -> Iterator[Path]:
    def unreadable(_: OSError) -> None:
        skipped["folders that may not be read"] += 1

    for place, folders, files in os.walk(folder, onerror=unreadable):
        skipped["linked folders inside"] += sum((Path(place) / name).is_symlink() for name in folders)
        skipped["hidden folders inside"] += sum(name.startswith(".") for name in folders)
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            suffix = os.path.splitext(name)[1].lower()  # noqa: PTH122 - fast, for there may be millions
            if suffix in SUFFIXES:
                yield Path(place) / name
            elif not name.startswith(".") and name.lower() not in _UNSAID:
                skipped[suffix or "without an ending"] += 1


def _not_read(folder: Path, skipped: Counter[str]) -> tuple[str, ...]:
    """What of a folder was not read, in a sentence, if there is anything."""
    kinds = [f"{count} {kind}" for kind, count in skipped.most_common() if count]
    if not kinds:
        return ()
    endings = ", ".join(sorted(suffix.removeprefix(".") for suffix in SUFFIXES))
    return (
        f"not read in {folder}: {', '.join(kinds)}. Images are told by their ending ({endings}): convert or rename "
        "what is one",
    )


def _data_set(data: str, classifier: Classifier, classes: Path | None) -> tuple[list[str], list[int], Source, ClassMap]:
    """Images that come with labels, and perhaps with the classes' names, of their own."""
    source: Packed | Dataset
    if data.startswith(TORCHVISION):
        from orthattack.eval.data.torchvision import open_torchvision

        source = Dataset(open_torchvision(data), data, thread_safe=True)
    elif shards := find_shards(data):
        readers: dict[str, type[Packed]] = {".parquet": Shards, ".tar": Tars}
        source = readers.get(shards[0].suffix, Arrows)(shards)
    else:
        source = Dataset(plugin.call(data), data, thread_safe=False)
    labels = source.labels
    width = len(str(max(len(labels) - 1, 0)))
    names = [f"{k:0{width}d}" for k in range(len(labels))] if isinstance(source, Dataset) else source.names
    given, highest = source.classes, max(labels, default=-1)
    for name, label in zip(names, labels, strict=True):
        if label < 0:
            raise EvaluationError(f"{data}: {name} has label {label}: this split is not labelled")
    if given is not None and highest >= len(given):
        raise EvaluationError(f"{data} has label {highest} but names {len(given)} classes")
    if classes is not None:
        known = given or ((),) * (highest + 1)
        keys = [(*synonyms, ", ".join(synonyms), str(k)) for k, synonyms in enumerate(known)]
        matched = map_from_file([tuple(filter(None, key)) for key in keys], sorted(set(labels)), classes, data)
    elif given is not None:
        matched = match_names(given, classifier, data)
    else:
        return names, labels, source, ClassMap((), _AS_THEY_ARE)
    return names, _relabelled(labels, matched), source, matched


def _relabelled(labels: Sequence[int], matched: ClassMap) -> list[int]:
    found = [matched.labels[k] for k in labels]
    return [label for label in found if label is not None]


def _labelled(folder: Path, path: Path) -> tuple[list[str], list[int], Files]:
    columns, rows = read_table(path, "labels")
    if not {"file", "label"} <= set(columns):
        raise EvaluationError(f"{path} must have columns file and label; it has {', '.join(columns) or 'none'}")
    root, found, files = folder.resolve(), dict[str, int](), array("q")
    for line, row in rows:
        name, label = row["file"], row["label"]
        if not name or not re.fullmatch(r"\s*\d{1,9}\s*", label or ""):
            raise EvaluationError(
                f"{path}, line {line}: label must be a class index >= 0, file a name; got {name!r}, {label!r}"
            )
        try:
            resolved = (root / name).resolve()
        except (OSError, ValueError, RuntimeError) as error:  # a null character, or links in a circle
            raise EvaluationError(f"{path}, line {line}: {name!r} is no file name ({error})") from error
        if not resolved.is_relative_to(root):
            raise EvaluationError(f"{path}, line {line}: {name!r} lies outside {folder}")
        if name in found:
            raise EvaluationError(f"{path}, line {line}: {name!r} is listed twice")
        found[name] = int(label.strip())
        files.append(hash(str(resolved)))
    names = list(found)
    _refuse_twice(root, names, files, str(path))
    return names, list(found.values()), Files(names, root)


def _refuse_twice(root: Path, names: Sequence[str], files: array[int], where: str) -> None:
    """EvaluationError that names two which are the same file; `files` has a number for what each resolves to."""
    order = np.argsort(np.frombuffer(files, np.int64) if files else [], kind="stable")
    numbers = np.frombuffer(files, np.int64)[order] if files else order
    for k in np.flatnonzero(numbers[1:] == numbers[:-1]):
        first, second = names[order[k]], names[order[k + 1]]
        if (root / first).resolve() == (root / second).resolve():
            raise EvaluationError(
                f"{where} has one image twice: {first!r} and {second!r} are the same file, which would count it twice"
            )

"""Where images come from: files, Parquet shards with the bytes of image files, and map-style data sets.

A source knows its images by position and loads one at a time; threads may call it at once.
"""

from __future__ import annotations

import glob
import json
import operator
import os
import random
import re
import stat
import threading
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections import Counter, OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import pyarrow as pa
import torch
from PIL import Image
from torch import Tensor, nn

from orthattack.eval.data import parquet
from orthattack.eval.errors import EvaluationError, first_line, told
from orthattack.eval.models.preprocessing import DecodeError, decode
from orthattack.eval.plugin import kept_process
from orthattack.lending import global_random_numbers, guarded

CACHED_BYTES = 16 * 2**20  # how much of the rows read last is kept; the last one is kept whatever its size


MAX_BYTES = 2**27  # of an image file; larger ones are not read into memory


SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".gif", ".bmp", ".webp", ".ppm", ".pgm", ".pbm", ".pnm", ".tif",
            ".tiff"}  # fmt: skip
"""How names of image files end."""


class Source(Protocol):
    """Images by position: `image` decodes one, `content` are bytes that tell it from others, `size` those of its
    file."""

    def image(self, position: int, /) -> Image.Image | Tensor: ...
    def content(self, position: int, /) -> bytes: ...
    def size(self, position: int, /) -> int: ...


class Files:
    """Image files, at paths, or by names in a folder."""

    def __init__(self, paths: Sequence[Path | str], root: Path = Path()) -> None:
        self._paths, self._root = paths, root

    def image(self, position: int) -> Image.Image:
        return decode(self.content(position))

    def content(self, position: int) -> bytes:
        size = self.size(position)
        if size < 0:
            raise DecodeError("no such file")
        check_size(size)
        return (self._root / self._paths[position]).read_bytes()

    def size(self, position: int) -> int:
        """Bytes of the file; -1 if there is none, or none to be read through: a pipe or device is not opened."""
        try:
            found = (self._root / self._paths[position]).stat()
        except OSError:
            return -1
        return found.st_size if stat.S_ISREG(found.st_mode) else -1


def check_size(size: int) -> None:
    """DecodeError: an image of so many bytes is not to be read into memory."""
    if size > MAX_BYTES:
        raise DecodeError(f"a file of {size / 1e9:.3g} GB: too large to read safely")


class Dataset:
    """A map-style data set, torchvision's or a user's: ``data[k]`` is (image, label). EvaluationError: it is none.

    An image is a Pillow image, an array (H, W, 3) or (H, W) of uint8, or a tensor that already has the model's input
    size, (3, H, W) in [0, 1] or of uint8. What a user's draws at random is the same each time; what it changes of the
    process is put back, and what it returned is copied."""

    def __init__(self, data: Any, name: str, thread_safe: bool) -> None:
        self._data, self._name = data, name
        self._lock, self.is_foreign = threading.RLock(), not thread_safe
        if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
            raise EvaluationError(
                f"{name} must be a sequence of (image, label), or a map-style Dataset; it is {type(data).__name__}"
            )
        self.classes = _class_names(data)
        self.labels = self._labels()

    def __len__(self) -> int:
        return len(self._data)

    def image(self, position: int) -> Image.Image | Tensor:
        found = self._item(position)[0]
        if isinstance(found, np.ndarray):
            if found.dtype != np.uint8 or found.ndim not in (2, 3):
                raise DecodeError(
                    f"an array must be (H, W, 3) of uint8; got {found.shape} of {found.dtype}: return one of floats as "
                    "a tensor (3, H, W) in [0, 1], torch.from_numpy(array)"
                )
            return Image.fromarray(found)
        if not isinstance(found, Image.Image | Tensor):
            raise DecodeError(f"must be a Pillow image, an array or a tensor; got {type(found).__name__}")
        return found

    def content(self, position: int) -> bytes:
        found = self.image(position)
        pixels = found.cpu().numpy() if isinstance(found, Tensor) else np.asarray(found)
        return f"{pixels.shape} {pixels.dtype} ".encode() + pixels.tobytes()

    def size(self, position: int) -> int:  # noqa: ARG002 - a data set need not have files
        return -1

    def _item(self, position: int) -> Any:
        if not self.is_foreign:
            return self._data[position]
        with self._lock, global_random_numbers, kept_process(), guarded(nn.Identity()):  # no model is within its reach
            torch.manual_seed(position)
            np.random.seed(position % 2**32)
            random.seed(position)
            item = self._data[position]
            # Copied before anyone else is let in: a data set may use its images again.
            if isinstance(item, tuple | list) and len(item) > 0:
                pixels = item[0]
                if isinstance(pixels, Tensor):
                    pixels = pixels.detach().clone()
                elif isinstance(pixels, np.ndarray) or type(pixels) is Image.Image:  # a file's is read once
                    pixels = pixels.copy()
                item = (pixels, *item[1:])
            return item

    def _label(self, position: int) -> int:
        try:
            item = self._item(position)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # of whatever a data set does
            raise EvaluationError(
                f"{self._name}: item {position} failed ({told(error)}), so its label is not known; an attribute "
                "targets would say it"
            ) from error
        try:
            _, label = item
            return operator.index(label)
        except (TypeError, ValueError) as error:
            shown = tuple(type(part).__name__ for part in item) if isinstance(item, tuple) else type(item).__name__
            raise EvaluationError(
                f"{self._name}: item {position} must be (image, class index), but is {shown}"
            ) from error

    def _labels(self) -> list[int]:
        """All of them without decoding an image, if an attribute has them; it is believed if it is right at the
        start, in the middle and at the end."""
        count = len(self._data)
        if count == 0:
            return []
        for attribute in ("targets", "labels", "_labels", "_samples", "samples", "imgs"):
            try:
                values = [operator.index(v[1] if isinstance(v, tuple) else v) for v in getattr(self._data, attribute)]
            except (AttributeError, TypeError, IndexError):
                continue
            if len(values) == count and all(self._label(k) == values[k] for k in (0, count // 2, count - 1)):
                return values
        return [self._label(k) for k in range(count)]


def _class_names(data: Any) -> tuple[tuple[str, ...], ...] | None:
    found = getattr(data, "classes", None)
    if not isinstance(found, Sequence) or isinstance(found, str) or not found:
        return None
    return tuple((name,) if isinstance(name, str) else tuple(map(str, name)) for name in found)


def find_shards(data: str) -> list[Path]:
    """Parquet, tar or Arrow files that `data` names: a file, a pattern such as ``DIR/test-*.parquet``, a folder of
    shards, or one that Hugging Face's ``save_to_disk`` wrote. EvaluationError: a folder with several splits, or a
    pattern that fits nothing."""
    folder = Path(data)
    if not os.path.isdir(folder):  # noqa: PTH112 - pathlib's raises where a name is too long
        if folder.suffix not in ENDINGS:
            return []
        shards = [folder] if os.path.isfile(folder) else sorted(map(Path, glob.glob(data, recursive=True)))  # noqa: PTH113, PTH207
        if not shards:
            raise EvaluationError(f"no {ENDINGS[folder.suffix]} file fits {data}")
        return shards
    saved = (
        sorted(path.parent for path in folder.glob("*/state.json")) if (folder / "dataset_dict.json").exists() else []
    )
    if saved:
        raise EvaluationError(f"{data} has several splits: choose one, such as --data {saved[0]}")
    if (folder / "state.json").is_file():
        return _saved(folder)
    shards = sorted(folder.glob("*.parquet")) or sorted((folder / "data").glob("*.parquet"))
    archives = sorted(folder.glob("*.tar")) or sorted(folder.glob("*.arrow"))
    if not shards and archives and not any(path.is_dir() for path in folder.iterdir()):  # or they lie beside classes
        shards = archives
    splits = sorted({re.sub(r"-\d+(-of-\d+)?$", "", shard.stem) for shard in shards} & _SPLITS)
    if len(splits) > 1:
        raise EvaluationError(
            f"{data} has shards of several splits, {' and '.join(splits)}: choose one, such as "
            f"--data '{shards[0].parent / splits[0]}-*{shards[0].suffix}'"
        )
    return shards


def _saved(folder: Path) -> list[Path]:
    """The Arrow files of a data set that ``save_to_disk`` wrote, in their order."""
    try:
        state = json.loads((folder / "state.json").read_text("utf-8"))
        names = [str(one["filename"]) for one in state["_data_files"]]
        if state.get("_indices_data_files"):
            raise ValueError("its rows are chosen by an index: save it again after flatten_indices()")
        if any("/" in name or name.startswith(".") for name in names):
            raise ValueError("it names files elsewhere")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise EvaluationError(f"{folder}/state.json does not say where its images are ({told(error)})") from error
    return [folder / name for name in names]


ENDINGS = {".parquet": "Parquet", ".tar": "tar", ".arrow": "Arrow"}
"""Of what `find_shards` finds, and what it is called."""
_SPLITS = {"train", "test", "validation", "val"}


class Packed(Source, ABC):
    """Images whose files lie in a few large files, with labels, which are read at once. EvaluationError: a file that is
    no such, or holds something else."""

    KIND: ClassVar[str]  # what the large files are
    ERRORS: ClassVar[tuple[type[Exception], ...]]  # of one that is none

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = paths
        self.names: list[str] = []
        self.labels: list[int] = []
        self.classes: tuple[tuple[str, ...], ...] | None = None
        counts = Counter(path.stem for path in paths)
        for shard, path in enumerate(paths):
            # In the names of its images without folder and ending, if no two are called so.
            stem = path.stem if counts[path.stem] == 1 else path.with_suffix("").as_posix()
            try:
                self._open(shard, stem)
            except self.ERRORS as error:
                raise EvaluationError(f"{path} cannot be read as {self.KIND} ({first_line(error)})") from error

    @abstractmethod
    def _open(self, shard: int, stem: str) -> None:
        """Add the images of a file, called after `stem`, and their labels."""

    def image(self, position: int) -> Image.Image:
        return decode(self.content(position))

    def _columns(self, shard: int, schema: pa.Schema) -> tuple[str, str]:
        """The names of a table's columns of images and labels; of the first file, its classes are everybody's."""
        path = self._paths[shard]
        image = _column(schema, ("image", "img"), path, _holds_bytes, "a struct with bytes, or binary")
        label = _column(schema, ("label", "labels", "fine_label"), path, pa.types.is_integer, "an integer")
        if shard == 0:
            self.classes = _huggingface_classes(schema, label)
        return image, label

    def _add_labels(self, shard: int, name: str, column: Any) -> None:
        if column.null_count:
            raise EvaluationError(f"{self._paths[shard]}: {column.null_count} of its rows have no {name}")
        self.labels += column.to_pylist()


class Shards(Packed):
    """Parquet files as Hugging Face's datasets are stored: the bytes of image files beside labels.

    Columns: ``image`` (or ``img``), a struct with ``bytes``, or binary; ``label`` (or ``labels``, ``fine_label``), an
    integer. Images are read a few rows at a time."""

    KIND, ERRORS = "a Parquet file", (pa.ArrowException, OSError, ValueError)

    def __init__(self, paths: Sequence[Path]) -> None:
        self._starts: list[int] = []  # of each row group, its first position
        self._groups: list[tuple[int, int]] = []  # of each, its shard and its number there
        self._column: list[str] = []
        self._lock = threading.Lock()
        self._cache: OrderedDict[int, bytes | None] = OrderedDict()
        self._reader: tuple[int, Iterator[bytes | None]] | None = None  # of a row group, at `_next`
        self._next = self._kept = 0  # the latter in bytes
        super().__init__(paths)

    def _open(self, shard: int, stem: str) -> None:
        path = self._paths[shard]
        with parquet.opened(path) as file:
            schema, first = file.schema_arrow, len(self.labels)
            image, label = self._columns(shard, schema)
            self._column.append(f"{image}.bytes" if pa.types.is_struct(schema.field(image).type) else image)
            position = first
            for group in range(file.num_row_groups):
                self._starts.append(position)
                self._groups.append((shard, group))
                position += file.metadata.row_group(group).num_rows
                for _ in parquet.page_sizes(file, path, group, [self._column[shard]]):
                    pass  # refused now rather than image by image
            for batch in parquet.batches(file, path, [label]):
                self._add_labels(shard, label, batch.column(0))
                if len(self.labels) > position:
                    break
        if len(self.labels) != position:
            raise ValueError(f"{len(self.labels) - first} labels of {position - first} rows")
        self.names += [f"{stem}/{row}" for row in range(position - first)]

    def content(self, position: int) -> bytes:
        with self._lock:
            if position not in self._cache:
                self._read_on(position)
            data = self._cache[position]
        if data is None:
            raise DecodeError("the shard has no bytes for it")
        return data

    def _read_on(self, position: int) -> None:
        """Read rows up to that one, from where the last was read or from the start of its row group, and keep the
        last of them: threads do not ask quite in order."""
        group = self._group_of(position)
        if self._reader is None or self._reader[0] != group or self._next > position:
            self._reader, self._next = None, self._starts[group]  # the old one is let go of first
            self._reader = group, self._rows(group)
        while self._next <= position:
            try:
                data = next(self._reader[1])
            except StopIteration:
                self._reader = None
                raise DecodeError("the shard ends before it") from None
            except (pa.ArrowException, OSError, ValueError) as error:
                self._reader = None
                raise DecodeError(f"its shard is damaged ({first_line(error)})") from error
            if self._next not in self._cache:
                self._cache[self._next] = data
                self._kept += len(data or b"")
            self._next += 1
            while len(self._cache) > 1 and self._kept > CACHED_BYTES:
                self._kept -= len(self._cache.popitem(last=False)[1] or b"")

    def _rows(self, group: int) -> Iterator[bytes | None]:
        shard, index = self._groups[group]
        path = self._paths[shard]
        with parquet.opened(path) as file:
            for batch in parquet.batches(file, path, [self._column[shard]], [index]):
                column = batch.column(0)
                column = column.field(0) if pa.types.is_struct(column.type) else column
                for value in column:
                    yield value.as_py()

    def size(self, position: int) -> int:
        return self._paths[self._groups[self._group_of(position)][0]].stat().st_size

    def _group_of(self, position: int) -> int:
        return bisect_right(self._starts, position) - 1


def _column(schema: pa.Schema, names: Sequence[str], path: Path, fits: Any, what: str) -> str:
    """The first of those names that a table has. EvaluationError: none, or of another type than what `fits`."""
    name = next((name for name in names if name in schema.names), None)
    if name is None:
        raise EvaluationError(f"{path} has no column {' or '.join(names)}; it has {', '.join(schema.names)}")
    if not fits(schema.field(name).type):
        raise EvaluationError(f"{path}: column {name} must be {what}; it is {schema.field(name).type}")
    return name


def _holds_bytes(kind: pa.DataType) -> bool:
    """Whether a column has the bytes of files, or a struct with them."""
    if pa.types.is_struct(kind):
        return kind.get_field_index("bytes") >= 0 and _holds_bytes(kind.field("bytes").type)
    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _huggingface_classes(schema: pa.Schema, label: str) -> tuple[tuple[str, ...], ...] | None:
    """The names of the classes, where a table of Hugging Face's has them."""
    try:
        names = json.loads(schema.metadata[b"huggingface"])["info"]["features"][label]["names"]
        return tuple((str(name),) for name in names) or None
    except (KeyError, TypeError, ValueError, RecursionError):  # metadata may be missing, or anything
        return None

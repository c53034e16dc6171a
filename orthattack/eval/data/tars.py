"""Tar files as WebDataset has them: KEY.jpg beside KEY.cls, a number, or KEY.json, which has it."""

from __future__ import annotations

import io
import json
import re
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from orthattack.eval.data.readers import SUFFIXES, Packed, check_size
from orthattack.eval.errors import EvaluationError
from orthattack.eval.models.preprocessing import DecodeError

_MAX_MEMBERS = 3_000_000
_MAX_READ = 2**20  # bytes at once, of headers and labels
_LABELS = ("label", "cls", "class", "target")  # keys of a JSON file


class _Headers(io.FileIO):
    """A file of which only little is read at once, whatever a header claims that it has."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is None or not 0 <= size <= _MAX_READ:
            raise ValueError(f"a header, or a label, of {size} bytes")
        return super().read(size) or b""


class Tars(Packed):
    """Images of tar files: where each lies is found at once, its bytes are read when asked for. EvaluationError: an
    image without a label or with two, or two images of one key."""

    KIND, ERRORS = "a tar file", (tarfile.TarError, OSError, ValueError, RecursionError)

    def __init__(self, paths: Sequence[Path]) -> None:
        self._places: list[tuple[int, int, int]] = []  # of each image, its file, and where there it begins and its size
        super().__init__(paths)

    def _open(self, shard: int, stem: str) -> None:
        images: dict[str, tuple[int, int]] = {}
        labels: dict[str, int] = {}
        path = self._paths[shard]
        for member, stream in _members(path):
            folder, _, last = member.name.rpartition("/")
            first, _, ending = last.partition(".")
            key = f"{folder}/{first}".removeprefix("./").lstrip("/")
            if f".{ending.rpartition('.')[2].lower()}" in SUFFIXES:
                if key in images:
                    raise EvaluationError(f"{path} has two images of {key!r}: one belongs to each label")
                images[key] = (member.offset_data, member.size)
            elif ending.lower() in ("cls", "json"):
                label = _label(stream.extractfile(member), ending.lower())
                if label is not None and labels.setdefault(key, label) != label:
                    raise EvaluationError(f"{path} has two labels of {key!r}, {labels[key]} and {label}")
        for key, place in images.items():
            if key not in labels:
                raise EvaluationError(
                    f"{path}: {key!r} has no label: beside an image there must be {key}.cls with its class index, or "
                    f"{key}.json with a key {', '.join(_LABELS[:-1])} or {_LABELS[-1]}"
                )
            self._places.append((shard, *place))
            self.names.append(f"{stem}/{key}")
            self.labels.append(labels[key])

    def content(self, position: int) -> bytes:
        shard, start, size = self._places[position]
        check_size(size)
        with self._paths[shard].open("rb") as stream:
            stream.seek(start)
            data = stream.read(size)
        if len(data) < size:
            raise DecodeError("its tar file ends before it")
        return data

    def size(self, position: int) -> int:
        return self._places[position][2]


def _members(path: Path) -> Iterator[tuple[tarfile.TarInfo, tarfile.TarFile]]:
    """The files in a tar file, one after the other; links and hidden files are left out."""
    with _Headers(path) as source, tarfile.open(fileobj=source, mode="r:") as stream:
        for _ in range(_MAX_MEMBERS):
            member = stream.next()
            if member is None:
                return
            stream.members.clear()  # type: ignore[attr-defined]  # or all of them stay in memory
            if member.isreg() and not member.issparse() and not member.name.rpartition("/")[2].startswith("."):
                yield member, stream
    raise ValueError(f"more than {_MAX_MEMBERS:,} files: write several tar files")


def _label(stream: Any, ending: str) -> int | None:
    """The class index that a label's file has; None if a JSON file has none. ValueError: it has something else."""
    content = stream.read(_MAX_READ + 1)
    if len(content) > _MAX_READ:
        raise ValueError(f"a label of more than {_MAX_READ} bytes")
    if ending == "cls":
        if not re.fullmatch(rb"\s*\d{1,9}\s*", content):
            raise ValueError(f"a label must be a class index; got {content[:40]!r}")
        return int(content)
    about = json.loads(content)
    found = next((about[key] for key in _LABELS if key in about), None) if isinstance(about, dict) else None
    if found is not None and (isinstance(found, bool) or not isinstance(found, int) or not 0 <= found < 10**9):
        raise ValueError(f"a label must be a class index; got {str(found)[:40]!r}")
    return found

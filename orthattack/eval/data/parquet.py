"""Parquet files read in bounded memory, whatever their footers and pages claim.

Arrow allocates what a page says that it unpacks to, and repeats a value of a dictionary as often as asked for. So
pages' headers are read first, and values a few at a time.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

MAX_PAGE = 32 * 2**20  # bytes that a page unpacks to, and so the largest value; a few are in memory at a time
MAX_ROWS = 1_000_000  # of a file
_MAX_FOOTER, _MAX_HEADER = 2 * 2**20, 2**20
_BATCH = 32 * 2**20


@contextmanager
def as_text(path: Path) -> Iterator[str]:
    """A name of a file for libraries that take none but text: its own or, if that is no text, that of a descriptor."""
    name = str(path)
    try:
        name.encode()
    except UnicodeEncodeError:
        with path.open("rb") as stream:
            yield f"/dev/fd/{stream.fileno()}"
    else:
        yield name


def _file(name: str, **options: Any) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(name, buffer_size=2**20, **options)
    except KeyError as error:  # pyarrow's, of what `read_dictionary` names
        raise ValueError(f"no column {error.args[0].decode()}") from error


@contextmanager
def opened(path: Path, **options: Any) -> Iterator[pq.ParquetFile]:
    """A file whose pages have not been looked at yet. ValueError: a footer of absurd size, or too many rows;
    OSError, pa.ArrowException: no Parquet."""
    with path.open("rb") as stream:
        size = os.fstat(stream.fileno()).st_size
        stream.seek(max(0, size - 8))
        footer = int.from_bytes(stream.read(4), "little")
    if size >= 12 and _MAX_FOOTER < footer < size:
        raise ValueError(f"a footer of {footer / 1e6:.3g} MB, of which {_MAX_FOOTER / 1e6:.1f} are read")
    with as_text(path) as name, _file(name, **options) as file:
        if file.metadata.num_rows > MAX_ROWS:
            rows = f"{file.metadata.num_rows:,} rows"
            raise ValueError(f"{rows}, of which a file may have {MAX_ROWS:,}: write several files")
        yield file


def batches(
    file: pq.ParquetFile, path: Path, columns: Sequence[str], groups: Sequence[int] | None = None
) -> Iterator[pa.RecordBatch]:
    """The columns of row groups, so many rows at a time that they fit whatever is in them; columns are names of
    leaves, such as image.bytes."""
    for group in range(file.num_row_groups) if groups is None else groups:
        largest = max((max(pages) for pages in page_sizes(file, path, group, columns)), default=0)
        size = max(1, min(65_536, _BATCH // max(1, largest)))
        yield from file.iter_batches(size, [group], list(columns), use_threads=False)


def page_sizes(
    file: pq.ParquetFile, path: Path, group: int, columns: Sequence[str] | None = None
) -> Iterator[tuple[int, int]]:
    """Of each leaf, or of those of the columns: to how many bytes its largest dictionary and its largest other page
    unpack. ValueError: to more than `MAX_PAGE`, or damaged."""
    about = file.metadata.row_group(group)
    with path.open("rb") as stream:
        for k in range(about.num_columns):
            leaf = about.column(k)
            if columns is not None and leaf.path_in_schema not in columns:
                continue
            start = leaf.data_page_offset
            if leaf.has_dictionary_page and 0 < leaf.dictionary_page_offset < start:
                start = leaf.dictionary_page_offset
            sizes = [0, 0]
            for is_dictionary, size in _pages(stream, start, start + leaf.total_compressed_size):
                if size > MAX_PAGE:
                    raise ValueError(
                        f"column {leaf.path_in_schema} has a page that unpacks to {size / 1e6:.3g} MB, of which "
                        f"{MAX_PAGE / 1e6:.3g} are read: write it in smaller row groups, of 100 images, say"
                    )
                sizes[not is_dictionary] = max(sizes[not is_dictionary], size)
            yield sizes[0], sizes[1]


def _pages(stream: BinaryIO, at: int, end: int) -> Iterator[tuple[bool, int]]:
    """Whether each page between two places is a dictionary, and to how many bytes it unpacks."""
    while at < end:
        stream.seek(at)
        header = _Header(stream)
        fields = header.struct()
        kind, unpacked, packed = (fields.get(k, 0) for k in (1, 2, 3))
        if unpacked < 0 or packed < 0:
            raise ValueError("a page of negative size")
        yield kind == 2, unpacked
        at += header.length + packed


class _Header:
    """A page's header, which is in Thrift's compact protocol, read on from where a file is. ValueError: it is cut off,
    too long, or none."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream, self.length = stream, 0

    def struct(self, depth: int = 0) -> dict[int, int]:
        """The whole numbers among the fields of a struct."""
        fields: dict[int, int] = {}
        field = 0
        while head := self._bytes(1)[0]:
            kind, delta = head & 15, head >> 4
            field = field + delta if delta else self._zigzag()
            if kind in (4, 5, 6):
                fields[field] = self._zigzag()
            else:
                self._skip(kind, depth)
        return fields

    def _skip(self, kind: int, depth: int) -> None:
        """Read over a value of that kind."""
        if depth > 8:
            raise ValueError("a page's header is nested too deeply")
        if kind in (3, 7):
            self._bytes(1 if kind == 3 else 8)
        elif kind in (4, 5, 6):
            self._zigzag()
        elif kind == 8:
            self._bytes(self._varint())
        elif kind in (9, 10):
            head = self._bytes(1)[0]
            count = self._varint() if head >> 4 == 15 else head >> 4
            for _ in range(count):
                self._skip(3 if head & 15 in (1, 2) else head & 15, depth + 1)
        elif kind == 12:
            self.struct(depth + 1)
        elif kind not in (1, 2):  # true and false are kinds, and of a byte in lists
            raise ValueError("a page's header that is none")

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._bytes(1)[0]
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7
            if shift > 63:
                raise ValueError("a number of a page's header is too long")

    def _zigzag(self) -> int:
        value = self._varint()
        return (value >> 1) ^ -(value & 1)

    def _bytes(self, count: int) -> bytes:
        self.length += count
        data = self._stream.read(count) if self.length <= _MAX_HEADER else b""
        if len(data) < count:
            raise ValueError("a page's header is cut off, or too long")
        return data

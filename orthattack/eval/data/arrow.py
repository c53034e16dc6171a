"""Arrow files as Hugging Face's ``Dataset.save_to_disk`` and its cache have them, mapped into memory and not loaded."""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from orthattack.eval.data import parquet
from orthattack.eval.data.readers import Packed, check_size
from orthattack.eval.models.preprocessing import DecodeError


class Arrows(Packed):
    """Images of Arrow files of the stream format, columns as of `readers.Shards`. An image is read when it is asked
    for."""

    KIND = "an Arrow file of Hugging Face's"
    ERRORS = (pa.ArrowException, OSError, ValueError, struct.error)

    def __init__(self, paths: Sequence[Path]) -> None:
        self._starts: list[int] = []  # of each batch of rows, its first position
        self._batches: list[tuple[int, int]] = []  # of each, its file and where there it begins
        self._schemas: list[pa.Schema] = []
        self._images: list[str] = []  # the column of images, of each file
        super().__init__(paths)

    def _open(self, shard: int, stem: str) -> None:
        first = len(self.labels)
        with _mapped(self._paths[shard]) as source:
            schema = pa.ipc.read_schema(pa.ipc.MessageReader.open_stream(source).read_next_message())
            image, label = self._columns(shard, schema)
            self._schemas.append(schema)
            self._images.append(image)
            while True:
                place = source.tell()
                batch = _read(source, schema)
                if batch is None:
                    break
                for name in (image, label):  # before anything in them is followed
                    batch.column(name).validate(full=True)
                if len(self.labels) + batch.num_rows - first > parquet.MAX_ROWS:
                    raise ValueError(f"more than {parquet.MAX_ROWS:,} rows: write several files")
                self._starts.append(len(self.labels))
                self._batches.append((shard, place))
                self._add_labels(shard, label, batch.column(label))
        self.names += [f"{stem}/{row}" for row in range(len(self.labels) - first)]

    def content(self, position: int) -> bytes:
        number = bisect_right(self._starts, position) - 1
        shard, place = self._batches[number]
        with _mapped(self._paths[shard]) as source:
            source.seek(place)
            column = _read(source, self._schemas[shard]).column(self._images[shard])
            column = column.field("bytes") if pa.types.is_struct(column.type) else column
            value = column[position - self._starts[number]]
            if not value.is_valid:
                raise DecodeError("the file has no bytes for it")
            data = value.as_buffer()
            check_size(data.size)
            return bytes(data)

    def size(self, position: int) -> int:
        return self._paths[self._batches[bisect_right(self._starts, position) - 1][0]].stat().st_size


@contextmanager
def _mapped(path: Path) -> Iterator[Any]:
    with parquet.as_text(path) as name, pa.memory_map(name) as source:
        yield source


def _read(source: Any, schema: pa.Schema) -> Any:
    """The next batch of rows, nothing of it copied; None at the end. ValueError: it is compressed or has dictionaries,
    and might unpack to any size."""
    try:
        message = pa.ipc.MessageReader.open_stream(source).read_next_message()
    except (EOFError, StopIteration):
        return None
    if message.type != "record batch":
        raise ValueError(f"a {message.type}, where rows are expected")
    if _is_compressed(message.metadata):
        raise ValueError("it is compressed, which Hugging Face's files are not")
    return pa.ipc.read_record_batch(message, schema)


def _is_compressed(metadata: Any) -> bool:
    """Whether a record batch says so: field 3 of the header, which is field 2 of the message (FlatBuffers)."""
    data = memoryview(metadata)

    def field(table: int, number: int) -> int:
        """Where in a table a field lies; 0 if it is left out."""
        vtable = table - struct.unpack_from("<i", data, table)[0]
        if 4 + 2 * number + 2 > struct.unpack_from("<H", data, vtable)[0]:
            return 0
        offset: int = struct.unpack_from("<H", data, vtable + 4 + 2 * number)[0]
        return offset and table + offset

    root = struct.unpack_from("<I", data, 0)[0]
    header = field(root, 2)
    return bool(header and field(header + struct.unpack_from("<I", data, header)[0], 3))

"""A shard that is being made: what is finished of it is kept every few seconds, so that a stop loses little."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

from torch import Tensor

from orthattack.eval.storage.run_folder import RunFolder, Shard
from orthattack.eval.storage.schema import schema_of

Row = dict[str, Any]

EVERY, COST = 5.0, 25
"""Seconds between two times that what is finished is kept, and how many times as long as that takes at least."""


class Draft:
    """The rows of a shard that are finished, and the images to keep of them, by position.

    Args:
        folder: the run's.
        shard: which; None for what is not stored at all.
        todo: positions of the images that are to be worked on, in that order. What an earlier process has kept is taken
            over where it is of the first of these, and so ends where a batch did.
    """

    def __init__(self, folder: RunFolder, shard: Shard | None, todo: Sequence[int]) -> None:
        self._folder, self._shard, self.todo = folder, shard, list(todo)
        self.rows: dict[int, Row] = {}
        self.images: dict[int, Tensor] = {}
        self.batch_size: int | None = None  # how many images were attacked at a time, where that is known
        self._stored = 0
        self._due = time.monotonic() + EVERY
        if shard is None:
            return
        rows, images, size = folder.kept(shard)
        found = {int(row["position"]): row for row in rows}
        if done := [position for position in todo if position in found]:
            if done == self.todo[: len(done)] and len(found) == len(rows):
                self.rows, self.images, self.batch_size = found, images, size
                self._stored, self.todo = len(rows), self.todo[len(done) :]
            else:  # of other images
                folder.forget(shard)

    def begin(self, rows: Mapping[int, Row]) -> None:
        """Add rows that took no work, unless they are there."""
        self.rows |= {position: row for position, row in rows.items() if position not in self.rows}

    def add(self, rows: Mapping[int, Row], images: Mapping[int, Tensor], batch_size: int) -> None:
        """Add what a batch gave."""
        self.rows |= rows
        self.images |= images
        self.batch_size = batch_size
        if time.monotonic() >= self._due:
            self.keep()

    def keep(self) -> None:
        """Store what has been added."""
        new = list(self.rows)[self._stored :]
        if self._shard is None or not new or self.batch_size is None:
            return
        start = time.monotonic()
        rows = [self.rows[position] for position in new]
        columns = {name: [row.get(name) for row in rows] for name in schema_of(self._shard.kind, rows[0]).names}
        images = {position: self.images[position] for position in new if position in self.images}
        self._folder.keep(self._shard, self._stored, columns, images, self.batch_size)
        self._stored += len(new)
        end = time.monotonic()
        self._due = end + max(EVERY, COST * (end - start))

    @contextmanager
    def kept(self) -> Iterator[None]:
        """While it is worked on: what stops that loses no batch that is finished."""
        try:
            yield
        except BaseException:
            with suppress(OSError):  # of a full disk, say, which may be what stops it
                self.keep()
            raise

    def done(self) -> None:
        """The shard is stored as a whole."""
        if self._shard is not None and self._stored:
            self._folder.forget(self._shard)

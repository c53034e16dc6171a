"""A data set of labelled images, whatever its source; one at a time in memory."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from orthattack.arguments import why_outside
from orthattack.eval.data.classes import bounded_lines
from orthattack.eval.data.readers import Dataset, Source
from orthattack.eval.errors import EvaluationError, nearest, told
from orthattack.eval.models.preprocessing import DecodeError, Preprocessing

_HASHED_WHOLE = 64


class Unreadable(Exception):  # noqa: N818 - a value as often as an exception
    """An image file, by name, that cannot become an input, and why."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason

    def __str__(self) -> str:
        return f"{self.name}: {self.reason}"


@dataclass(frozen=True)
class Batch:
    """Preprocessed images: names, images (N, 3, H, W) in [0, 1], labels (N,)."""

    names: list[str]
    images: Tensor
    labels: Tensor


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """A data set.

    Attributes:
        name: as asked for.
        names: of the images, unique, the same whenever the data is opened.
        labels: of each, its class index among the model's.
        classes: names of the model's classes as the data has them, where they are the whole class list and the model
            has none of its own.
        mapping: how the data's classes were matched with the model's.
        notes: what a person should know of how they were found; printed, and kept with the run's warnings.
    """

    name: str
    names: tuple[str, ...]
    labels: tuple[int, ...]
    classes: tuple[str, ...] | None
    mapping: str
    _source: Source = field(repr=False)
    _positions: Sequence[int] = field(repr=False)  # of each image, in the source
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    @property
    def is_foreign(self) -> bool:
        """Whether a user's code returns them."""
        return isinstance(self._source, Dataset) and self._source.is_foreign

    def load(self, position: int, preprocessing: Preprocessing) -> Tensor:
        """One image as the model's input, (3, crop, crop), float32, in [0, 1]. Threads may call this at once.
        Unreadable: it cannot be read or decoded, or, where the data gives tensors, has another size or range."""
        try:
            found = self._source.image(self._positions[position])
            return preprocessing(found) if isinstance(found, Image.Image) else _as_input(found, preprocessing.crop)
        except DecodeError as error:
            raise Unreadable(self.names[position], str(error)) from error
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # of disks, and of a user's data
            raise Unreadable(self.names[position], told(error)) from error

    def batches(self, size: int, preprocessing: Preprocessing) -> Iterator[Batch | Unreadable]:
        """Batches of up to `size`, and, as they are met, the images that cannot be read."""
        ready: list[tuple[int, Tensor]] = []
        for position in range(len(self)):
            try:
                ready.append((position, self.load(position, preprocessing)))
            except Unreadable as unreadable:
                yield unreadable
            if len(ready) == size:
                yield self._batch(ready)
                ready = []
        if ready:
            yield self._batch(ready)

    def _batch(self, ready: list[tuple[int, Tensor]]) -> Batch:
        positions, images = zip(*ready, strict=True)
        labels = torch.tensor([self.labels[k] for k in positions])
        return Batch([self.names[k] for k in positions], torch.stack(images), labels)

    def limited(self, count: int | None) -> ImageDataset:
        """At most `count` of them, evenly spaced, so that a sorted folder still shows all its classes."""
        if count is None or count >= len(self):
            return self
        if count < 1:
            raise EvaluationError(f"--limit must be at least 1; got {count}")
        return self._at(evenly(count, len(self)))

    def subset(self, names: Sequence[str]) -> ImageDataset:
        """Those of these names, in this order. EvaluationError: a name that there is not, or twice, or no names."""
        if not names:
            raise EvaluationError("--subset names no images")
        position_of = {name: k for k, name in enumerate(self.names)}
        seen: set[str] = set()
        for name in names:
            if name not in position_of:
                close = nearest(name, self.names, cutoff=0)
                raise EvaluationError(
                    f"--subset names {name!r}, which {self.name} does not have; the nearest is {close[0]!r}"
                )
            if name in seen:
                raise EvaluationError(f"--subset names {name!r} twice")
            seen.add(name)
        return self._at([position_of[name] for name in names])

    def _at(self, chosen: Sequence[int]) -> ImageDataset:
        return replace(
            self,
            names=tuple(self.names[k] for k in chosen),
            labels=tuple(self.labels[k] for k in chosen),
            _positions=[self._positions[k] for k in chosen],
        )

    def fingerprint(self) -> str:
        """SHA-256 of what they are, the same wherever the data lies.

        Covers the name, label and file size of every image, in order (of a Parquet image, its shard's size;
        of one from a data set in memory, none), and the whole content of up to 64 evenly spaced ones. So a changed
        list, order or label always shows, and so does a file of another size; an edit that keeps a file's size shows if
        the file is among the 64.
        """
        digest = hashlib.sha256()
        for name, label, position in zip(self.names, self.labels, self._positions, strict=True):
            digest.update(f"{name!r} {label} {self._source.size(position)}\n".encode())
        for k in evenly(_HASHED_WHOLE, len(self)):
            try:
                content = self._source.content(self._positions[k])
            except KeyboardInterrupt:
                raise
            except BaseException:  # it will be reported as unreadable, and is that every time
                content = b"unreadable"
            digest.update(hashlib.sha256(content).digest())
        return digest.hexdigest()

    def describe(self) -> dict[str, Any]:
        """What a reader needs to tell which data it was, as JSON."""
        return {
            "name": self.name,
            "images": len(self),
            "classes": None if self.classes is None else list(self.classes),
            "mapping": self.mapping,
            "fingerprint": self.fingerprint(),
        }


def _as_input(pixels: Tensor, size: int) -> Tensor:
    """A tensor that is said to be the model's input already."""
    if pixels.shape != (3, size, size):
        shape = tuple(pixels.shape)
        hint = {
            (1, 3, size, size): "return image.squeeze(0)",
            (size, size, 3): "return image.permute(2, 0, 1)",
            (1, size, size): "return image.expand(3, -1, -1)",
            (size, size): "return image.expand(3, -1, -1)",
            (4, size, size): "return image[:3], without transparency",
        }.get(shape, "return a Pillow image to have it resized")
        raise DecodeError(f"a tensor must have the model's input size (3, {size}, {size}); got {shape}: {hint}")
    image = pixels.float() / 255 if pixels.dtype == torch.uint8 else pixels.float()
    if not bool(image.isfinite().all()):
        raise DecodeError("some pixels are NaN or infinite: look at what made them")
    low, high = float(image.min()), float(image.max())
    if low < 0 or high > 1:
        if low < -_ROUND_OFF or high > 1 + _ROUND_OFF:
            raise DecodeError(
                f"pixels lie in [{low:.5g}, {high:.5g}], not in [0, 1]: {why_outside('image', image, is_returned=True)}"
            )
        image = image.clamp(0, 1)
    return image


_ROUND_OFF = 8e-7  # of a normalisation and its inverse, as the attacks take it


def evenly(count: int, among: int) -> list[int]:
    """At most `count` positions, evenly spaced, of `among`."""
    return [k * among // count for k in range(count)] if count < among else list(range(among))


def read_names(path: Path) -> list[str]:
    """Names of images, one a line, for `ImageDataset.subset`; blank lines and lines that begin with # are skipped.
    EvaluationError: a file that cannot be read as text."""
    try:
        with path.open(encoding="utf-8-sig") as stream:
            lines = (line.strip() for line in bounded_lines(stream))
            return [line for line in lines if line and not line.startswith("#")]
    except (OSError, ValueError) as error:
        raise EvaluationError(f"could not read subset file {path} ({error})") from error

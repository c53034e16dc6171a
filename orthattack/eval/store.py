"""A run as a folder: which files there are, what is in them, and how they are written so that none is ever half there.

    manifest.json                                  what was run, by what, on what
    clean/MODEL/CHUNK.parquet                      a row per photograph: the model on it as it is
    shards/MODEL/ATTACK/EPS/CHUNK.parquet          a row per photograph: the model after the attack
    checks/MODEL/CHECK/EPS/CHUNK.parquet           the same for the attacks of the trust checks
    images/MODEL/ATTACK/EPS/CHUNK.safetensors      adversarial images, bit for bit; the clean ones under ATTACK "clean"

Every file is written beside its place and moved there when it is whole, so what exists is finished.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import safetensors.torch
import torch
from torch import Tensor

from orthattack.eval.errors import EvaluationError

__all__ = ["CLEAN_SCHEMA", "ROW_SCHEMA", "Kind", "RunFolder", "Shard", "shown_eps"]

Kind = Literal["clean", "shards", "checks"]
FORMAT = 1

_KEY = [("position", pa.int32()), ("name", pa.string()), ("label", pa.int32()), ("status", pa.string())]

CLEAN_SCHEMA = pa.schema(
    [
        *_KEY,  # status: ok, unreadable, error
        ("message", pa.string()),
        ("prediction", pa.int32()),
        ("margin", pa.float32()),  # largest other logit minus the label's: negative where right
        ("confidence", pa.float32()),  # largest softmax probability
        ("gradient_cosine", pa.float64()),  # of the cross-entropy's gradient with the image, on a sample
        ("gradient_norm", pa.float64()),  # L2; 0 or NaN where the gradient is masked
        ("logit_min", pa.float32()),
        ("logit_max", pa.float32()),
        ("logit_sum", pa.float32()),
        ("image_min", pa.float32()),
        ("image_max", pa.float32()),
        ("wrong_share", pa.float32()),  # of the evaluations; 0 or 1 for a model that always answers alike
        ("evaluations", pa.int32()),
    ]
)
"""The columns of clean/."""

ROW_SCHEMA = pa.schema(
    [
        *_KEY,  # status: ok, misclassified (not attacked: wrong to begin with), unreadable, error, invalid
        ("message", pa.string()),  # why it is unreadable, an error or invalid
        ("clean_prediction", pa.int32()),
        ("adversarial_prediction", pa.int32()),
        ("success", pa.bool_()),  # newly fooled: right on the clean image, wrong on the adversarial one
        ("margin", pa.float32()),  # at the adversarial image: largest other logit minus the label's
        ("l0", pa.int32()),  # numbers changed, of the 3 H W
        ("l1", pa.float64()),
        ("l2", pa.float64()),
        ("linf", pa.float64()),
        ("cosine", pa.float64()),  # of perturbation and image, signed, in float64
        ("cosine_red", pa.float64()),
        ("cosine_green", pa.float64()),
        ("cosine_blue", pa.float64()),
        ("steps", pa.int32()),  # that the adversarial took, where the attack says so
        ("forward_calls", pa.float32()),  # of the model on this image; a batch's mean where the attack does not say
        ("gradient_calls", pa.float32()),
        ("rounded_success", pa.bool_()),  # still fooled after rounding to 8 bits; of successes only
        ("rounded_cosine", pa.float64()),
        ("rounded_norm", pa.float64()),  # in the norm of the attack
        ("wrong_share", pa.float32()),
        ("evaluations", pa.int32()),
        ("seconds", pa.float64()),  # the batch's time over its images; the one column that differs between two runs
    ]
)
"""The columns of shards/ and checks/."""


def shown_eps(eps: float | None, norm: str) -> str:
    """A radius as people write it: 4/255, 0.5, or "minimal" for None, an attack that minimises the norm."""
    if eps is None:
        return "minimal"
    return f"{255 * eps:.4g}/255" if norm == "linf" and eps < 0.2 else f"{eps:.4g}"


def _slug(text: str) -> str:
    """A file name for any text: the text itself where it is one, else a readable part and a hash."""
    plain = re.sub(r"[^A-Za-z0-9._-]", "_", text)[:60].lstrip(".") or "_"
    return plain if plain == text else f"{plain}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


@dataclass(frozen=True)
class Shard:
    """The unit of work: one attack at one radius on one chunk of the photographs with one model.

    Attributes:
        model: label of the model.
        attack: label of the attack, "clean" for the model on its own.
        eps: radius in pixel units, or None for an attack that minimises the norm.
        chunk: number of the chunk.
        kind: which part of the folder it belongs to.
    """

    model: str
    attack: str
    eps: float | None
    chunk: int
    kind: Kind = "shards"

    @property
    def path(self) -> Path:
        """Where its rows are, relative to the run's folder."""
        return self._in(self.kind, ".parquet")

    @property
    def image_path(self) -> Path:
        """Where its images are, relative to the run's folder; those of the checks are apart from the run's."""
        return self._in("checks" if self.kind == "checks" else "images", ".safetensors")

    def _in(self, folder: str, suffix: str) -> Path:
        parts = [folder, _slug(self.model)]
        if self.kind != "clean" or folder == "images":
            parts += [_slug(self.attack), "minimal" if self.eps is None else f"{self.eps:.9g}"]
        return Path(*parts, f"{self.chunk:06d}{suffix}")


class RunFolder:
    """The files of one run.

    Args:
        path: the folder; it need not exist before `create`.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    def exists(self) -> bool:
        """Whether there is a run."""
        return (self.path / "manifest.json").is_file()

    def create(self) -> None:
        """Make the folder; EvaluationError if that cannot be done, or if it holds something else."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if not self.exists and any(self.path.iterdir()):
                raise EvaluationError(f"{self.path} is not empty and not the folder of a run; choose another")
            with _whole(self.path / ".writable") as probe:
                probe.touch()
            (self.path / ".writable").unlink()
        except OSError as error:
            raise EvaluationError(f"could not make the run folder {self.path} ({error})") from error

    def manifest(self) -> dict[str, Any]:
        """What manifest.json says; EvaluationError if it cannot be read."""
        try:
            manifest: dict[str, Any] = json.loads((self.path / "manifest.json").read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise EvaluationError(f"{self.path} is not the folder of a run: no readable manifest.json") from error
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            found = manifest.get("format") if isinstance(manifest, dict) else None
            raise EvaluationError(f"{self.path} has format {found!r}; this version reads format {FORMAT}")
        return manifest

    def write_manifest(self, manifest: Mapping[str, Any]) -> None:
        self.write_text("manifest.json", json.dumps({"format": FORMAT, **manifest}, indent=2) + "\n")

    def write_text(self, name: str, text: str) -> Path:
        """Write a file of the run, whole or not at all."""
        with _whole(self.path / name) as partial:
            partial.write_text(text, encoding="utf-8")
        return self.path / name

    def is_done(self, shard: Shard, rows: int) -> bool:
        """Whether the shard's file is there and whole. One that is damaged, by a failing disk, say, is put aside."""
        path = self.path / shard.path
        if not path.exists():
            return False
        try:
            if pq.read_metadata(path).num_rows == rows:
                return True
            reason = "another number of rows"
        except (OSError, pa.ArrowException) as error:
            reason = str(error).partition("\n")[0]
        path.replace(path.with_suffix(".damaged"))
        self.note(f"{shard.path} was damaged ({reason}) and is made again; what there was is kept as *.damaged")
        return False

    def note(self, message: str) -> None:
        """Add a line to notes.txt, what a person should know of how the run went."""
        with (self.path / "notes.txt").open("a", encoding="utf-8") as stream:
            stream.write(message + "\n")

    def write(self, shard: Shard, columns: Mapping[str, Sequence[object]], images: Mapping[int, Tensor]) -> None:
        """Store a finished shard: its rows and, by position, the images to keep of it."""
        schema = CLEAN_SCHEMA if shard.kind == "clean" else ROW_SCHEMA
        table = pa.table({name: pa.array(columns[name], schema.field(name).type) for name in schema.names}, schema)
        if images:  # before the rows, since it is the rows that say that the shard is finished
            positions = sorted(images)
            tensors = {
                "position": torch.tensor(positions),
                "images": torch.stack([images[position].cpu() for position in positions]).contiguous(),
            }
            with _whole(self.path / shard.image_path) as partial:
                safetensors.torch.save_file(tensors, partial)
        with _whole(self.path / shard.path) as partial:
            pq.write_table(table, partial, compression="zstd")

    def read(
        self,
        kind: Kind,
        model: str,
        attack: str = "clean",
        eps: float | None = None,
        columns: Sequence[str] | None = None,
    ) -> pd.DataFrame:
        """The rows of one model and, but for clean, one attack at one radius, in the order of the photographs."""
        parts = [_table(path, columns) for path in self._files(Shard(model, attack, eps, 0, kind).path)]
        schema = CLEAN_SCHEMA if kind == "clean" else ROW_SCHEMA
        if not parts:
            parts = [schema.empty_table() if columns is None else schema.empty_table().select(list(columns))]
        return _frame(parts)

    def read_shard(self, shard: Shard, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """The rows of one shard."""
        return _frame([_table(self.path / shard.path, columns)])

    def images(
        self,
        model: str,
        attack: str,
        eps: float | None,
        positions: Iterable[int] | None = None,
        kind: Kind = "shards",
    ) -> Iterator[tuple[int, Tensor]]:
        """Stored images (3, H, W), float32, with their positions; only those at `positions` if given."""
        wanted = None if positions is None else set(positions)
        for path in self._files(Shard(model, attack, eps, 0, kind).image_path):
            with safetensors.safe_open(path, framework="pt") as file:
                for row, position in enumerate(file.get_tensor("position").tolist()):
                    if wanted is None or position in wanted:
                        yield position, file.get_slice("images")[row]

    def image_positions(self, model: str, attack: str, eps: float | None) -> list[int]:
        """Positions of the stored images, without reading the images."""
        found: list[int] = []
        for path in self._files(Shard(model, attack, eps, 0).image_path):
            with safetensors.safe_open(path, framework="pt") as file:
                found += file.get_tensor("position").tolist()
        return found

    def _files(self, example: Path) -> list[Path]:
        folder = self.path / example.parent
        return sorted(folder.glob("*" + example.suffix)) if folder.is_dir() else []


def _table(path: Path, columns: Sequence[str] | None) -> pa.Table:
    # Half the time of pq.read_table, which looks for a data set of many files around each.
    return pq.ParquetFile(path).read(columns=None if columns is None else list(columns), use_threads=False)


def _frame(tables: Sequence[pa.Table]) -> pd.DataFrame:
    """A frame of nullable types, so that a whole number stays one where some are missing."""
    frame: pd.DataFrame = pa.concat_tables(tables).to_pandas(types_mapper=_NULLABLE.get)
    return frame


_NULLABLE = {
    pa.int32(): pd.Int32Dtype(),
    pa.bool_(): pd.BooleanDtype(),
    pa.float32(): pd.Float32Dtype(),
    pa.float64(): pd.Float64Dtype(),
    pa.string(): pd.StringDtype(),
}


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """A name beside `path` to write to; what is there becomes `path` at the end, all of it or, on an error, nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        with partial.open("rb+") as stream:
            os.fsync(stream.fileno())
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)

"""Damage to the files of a run: whole files, single values of JSON, columns of Parquet, tensors of safetensors."""

from __future__ import annotations

import copy
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import load_file, save_file

Damage = Callable[[Path], None]
VALUES = [None, 3, -1, 2**70, 1e300, float("nan"), True, "x", "\ud800\x1b[31m", [], {}, [None], [[]], {"x": {}}]


def of_whole_files(rng: random.Random) -> dict[str, Damage]:
    """What can become of any file."""

    def bits(path: Path) -> None:
        data = bytearray(path.read_bytes())
        for _ in range(8):
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        path.write_bytes(data)

    def replaced(make: Damage) -> Damage:
        def damage(path: Path) -> None:
            path.unlink()
            make(path)

        return damage

    def beside(path: Path) -> Path:
        """A file outside of the run, which is where the run's folder is."""
        outside = path.parents[len(path.parts) - path.parts.index("run")] / "outside"
        outside.write_text("precious")
        return outside

    return {
        "truncated": lambda path: os.truncate(path, path.stat().st_size // 2),
        "emptied": lambda path: os.truncate(path, 0),
        "random": lambda path: path.write_bytes(rng.randbytes(500)),
        "bits": bits,
        "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
        "text": lambda path: path.write_text("<html>502</html>"),
        "folder": replaced(lambda path: path.mkdir()),
        "full folder": replaced(lambda path: (path / "a").mkdir(parents=True)),
        "pipe": replaced(os.mkfifo),
        "link": replaced(lambda path: path.symlink_to(beside(path))),
        "dangling link": replaced(lambda path: path.symlink_to("nowhere")),
        "circle": replaced(lambda path: path.symlink_to(path.name)),
        "gone": lambda path: path.unlink(),
    }


def places(content: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the values of JSON are; of long lists the first ones."""
    yield at
    items = (
        content.items() if isinstance(content, dict) else enumerate(content[:2]) if isinstance(content, list) else ()
    )
    for key, value in items:
        yield from places(value, (*at, key))


def of_json(path: Path) -> dict[str, Damage]:
    """Every value replaced by every other kind, or without its key."""
    content = json.loads(path.read_text())

    def put(at: tuple[Any, ...], value: Any, drop: bool = False) -> Damage:
        def damage(path: Path) -> None:
            changed = copy.deepcopy({"": content})
            parent: Any = changed
            for key in ("", *at)[:-1]:
                parent = parent[key]
            last = at[-1] if at else ""
            if drop:
                del parent[last]
            else:
                parent[last] = value
            path.write_text(json.dumps(changed.get("")))

        return damage

    found = {f"{at} = {value!r}": put(at, value) for at in places(content) for value in VALUES}
    found |= {f"{at} gone": put(at, None, drop=True) for at in places(content) if at}
    return found | {
        "deep": lambda path: path.write_text("[" * 100_000),
        "nul": lambda path: path.write_text('{"\\u0000": "\\ud800"}'),
    }


def of_parquet(path: Path) -> dict[str, Damage]:
    """Every column lost, null, of another type, or with values that no run writes; rows lost, repeated or turned."""
    table = pq.read_table(path)

    def rewritten(change: Callable[[pa.Table], pa.Table]) -> Damage:
        return lambda path: pq.write_table(change(table), path)

    def column(name: str, value: object) -> Damage:
        k, kind = table.schema.get_field_index(name), table.schema.field(name).type
        return rewritten(lambda table: table.set_column(k, name, pa.array([value] * len(table), kind)))

    found: dict[str, Damage] = {
        "no rows": rewritten(lambda table: table.slice(0, 0)),
        "fewer rows": rewritten(lambda table: table.slice(1)),
        "twice": rewritten(lambda table: pa.concat_tables([table, table])),
        "turned": rewritten(lambda table: table.take(list(range(len(table)))[::-1])),
        "more columns": rewritten(lambda table: table.append_column("extra", [[None] * len(table)])),
        "no columns": rewritten(lambda table: table.select([])),
    }
    for field in table.schema:
        odd: list[Any] = [None]
        if pa.types.is_integer(field.type):
            odd += [-1, 2**31 - 1, 7]
        elif pa.types.is_floating(field.type):
            odd += [float("nan"), float("inf"), -1.0, 1e308 if field.type == pa.float64() else 3e38]
        elif pa.types.is_string(field.type):
            odd += ["", "ok", "=1+1", "\x00\x1b[31m<script>\u202e\n", "error"]
        else:
            odd += [True, False]
        found |= {f"{field.name} = {value!r}": column(field.name, value) for value in odd}
        found[f"{field.name} gone"] = rewritten(lambda table, name=field.name: table.drop_columns([name]))
        k = table.schema.get_field_index(field.name)
        for kind in (pa.list_(pa.int8()), pa.string() if field.type != pa.string() else pa.int64()):
            found[f"{field.name} as {kind}"] = rewritten(
                lambda table, k=k, name=field.name, kind=kind: table.set_column(k, name, pa.nulls(len(table), kind))
            )
    return found


def of_safetensors(path: Path) -> dict[str, Damage]:
    """Tensors lost, of other shapes and types, and pixels that are no pixels."""
    kept = load_file(path)
    images, positions = kept["images"], kept["position"]

    def saved(**tensors: torch.Tensor) -> Damage:
        return lambda path: save_file({key: value.contiguous() for key, value in tensors.items()}, path)

    return {
        "no tensors": saved(x=torch.zeros(1)),
        "no positions": saved(images=images),
        "no images": saved(position=positions),
        "fewer": saved(images=images[:1], position=positions),
        "grey": saved(images=images[:, :1], position=positions),
        "smaller": saved(images=images[..., :4, :4], position=positions),
        "no pixels": saved(images=images[..., :0], position=positions),
        "not square": saved(images=images[..., :8], position=positions),
        "NaN": saved(images=images * np.nan, position=positions),
        "inf": saved(images=images + np.inf, position=positions),
        "8 bits": saved(images=(255 * images).byte(), position=positions),
        "64 bits": saved(images=images.double(), position=positions),
        "bool": saved(images=images > 0.5, position=positions),
        "other positions": saved(images=images, position=positions + 1000),
        "one position": saved(images=images, position=positions * 0),
        "negative": saved(images=images, position=-1 - positions),
        "float positions": saved(images=images, position=positions.float()),
        "two columns": saved(images=images, position=torch.stack([positions, positions], 1)),
        "complex": saved(images=images.to(torch.complex64), position=positions),
    }


def damages(path: Path, rng: random.Random) -> dict[str, Damage]:
    """All that is known for a file of its kind."""
    of_kind = {".json": of_json, ".parquet": of_parquet, ".safetensors": of_safetensors}.get(path.suffix)
    return of_whole_files(rng) | ({} if of_kind is None else of_kind(path))


def samples(run: Path) -> dict[str, Path]:
    """A file of every kind."""
    kinds = {
        "manifest": "manifest.json", "session": "sessions/*.json", "lock": "sessions/*.lock",
        "clean": "clean/*/*.parquet", "shard": "shards/*/*/*/*.parquet",
        "minimal": "shards/*/*/minimal/*.parquet", "check": "checks/*/*/*/*.parquet",
        "images": "images/*/FGSM/*/*.safetensors", "clean images": "images/*/clean/*/*.safetensors",
        "check images": "checks/*/*/*/*.safetensors", "checks": "checks.json", "page": "report.html",
        "csv": "results.csv",
    }  # fmt: skip
    return {kind: sorted(run.glob(pattern))[0] for kind, pattern in kinds.items()}


def copied(run: Path, place: Path) -> Path:
    """A copy of a run to damage, `place`/run."""
    shutil.rmtree(place, ignore_errors=True)
    shutil.copytree(run, place / "run")
    return place / "run"

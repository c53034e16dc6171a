"""How long a large finished run takes to resume, report and compare.

    python -m scripts.measure_scale [--images 50000] [--attacks 10] [--radii 20]

It makes a finished run of random rows, in which all attacks share one file, and uses it as a person would.
docs/reliability.md has the result.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from orthattack.eval.report.text import compare, reported
from orthattack.eval.results.stored_run import Run
from orthattack.eval.storage.run_folder import RunFolder, Shard
from orthattack.eval.storage.schema import CLEAN_SCHEMA, ROW_SCHEMA

CLASSES, CHUNK = 1000, 128


def made(path: Path, images: int, attacks: int, radii: int) -> tuple[RunFolder, list[Shard]]:
    """A finished run on one model, and the first shard of each of its attacks and radii."""
    labels, eps = [f"A{k}" for k in range(attacks)], [(k + 1) / 255 for k in range(radii)]
    folder = RunFolder(path)
    folder.create()
    folder.write_manifest(
        {
            "orthattack": "0.2.0", "status": "complete", "warnings": [], "sessions": [],
            "config": {"norm": "linf", "eps": eps, "steps": 10, "batch_size": 32, "shard_size": CHUNK, "seed": 0},
            "attacks": [
                {"label": label, "name": label, "source": "orthattack", "parameters": {}, "seed": 0, "baselines": [],
                 "orthogonal": False, "minimal": False}
                for label in labels
            ],
            "models": [
                {"label": "m", "name": "m", "source": "f", "sha256": "0" * 64, "num_classes": CLASSES, "parameters": 1,
                 "class_names": [f"class {k}" for k in range(CLASSES)],
                 "data": {"name": "d", "images": images, "mapping": "x", "fingerprint": "f"}}
            ],
        }
    )  # fmt: skip
    rng = np.random.default_rng(0)
    clean, rows = _rows(CLEAN_SCHEMA, images, rng), _rows(ROW_SCHEMA, images, rng)
    for first in range(0, images, CHUNK):
        _write(path / Shard("m", "clean", None, first // CHUNK, "clean").path, clean.slice(first, CHUNK))
    shards = [Shard("m", label, radius, 0) for label in labels for radius in eps]
    whole = f"000000-{-(-images // CHUNK) - 1:06d}.parquet"
    source = path / "rows.parquet"
    _write(source, rows)
    for shard in shards:
        at = (path / shard.path).with_name(whole)
        at.parent.mkdir(parents=True, exist_ok=True)
        os.link(source, at)
    source.unlink()
    return folder, shards


def _rows(schema: pa.Schema, count: int, rng: np.random.Generator) -> pa.Table:
    labels = np.arange(count) * CLASSES // count
    known = {
        "position": np.arange(count),
        "name": [f"n{label:08d}/ILSVRC2012_val_{k:08d}.JPEG" for k, label in enumerate(labels)],
        "label": labels,
        "status": ["ok"] * count,
        "message": [None] * count,
    }

    def column(field: pa.Field) -> pa.Array:
        if field.name in known:
            return pa.array(known[field.name], field.type)
        if pa.types.is_boolean(field.type):
            return pa.array(rng.random(count) < 0.5, field.type)
        drawn = rng.random(count) if pa.types.is_floating(field.type) else rng.integers(0, CLASSES, count)
        return pa.array(drawn, field.type)

    return pa.table([column(field) for field in schema], schema=schema)


def _write(path: Path, rows: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(rows, path, compression="zstd", write_page_checksum=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=50_000)
    parser.add_argument("--attacks", type=int, default=10)
    parser.add_argument("--radii", type=int, default=20)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / "run"
        folder, shards = made(path, args.images, args.attacks, args.radii)
        print(f"{sum(file.is_file() for file in path.rglob('*'))} files")
        chunks = {k // CHUNK: min(CHUNK, args.images - k) for k in range(0, args.images, CHUNK)}

        def resume() -> None:
            for shard in [Shard("m", "clean", None, 0, "clean"), *shards]:
                assert len(folder.done(shard, chunks)) == len(chunks)

        tried: dict[str, Callable[[], object]] = {
            "see that it is finished": resume,
            "report": lambda: reported(folder),
            "compare": lambda: compare(Run.open(path), Run.open(path)),
        }
        for name, run in tried.items():
            start, cpu = time.perf_counter(), time.process_time()
            run()
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
            print(
                f"{name}: {time.perf_counter() - start:.1f} s, {time.process_time() - cpu:.1f} s of CPU, "
                f"{peak:.1f} GiB at most so far"
            )
        for file in sorted(path.glob("*.json")):
            print(f"{file.name}: {file.stat().st_size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())

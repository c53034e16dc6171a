"""All chunks of an attack as one file: the same rows and images, whoever is killed on the way."""

from __future__ import annotations

import io
import os
import signal

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from orthattack.eval.storage import inside
from orthattack.eval.storage.run_folder import RunFolder, Shard
from orthattack.eval.storage.schema import ROW_SCHEMA

CHUNKS, ROWS = 5, dict.fromkeys(range(5), 3) | {4: 2}
EXAMPLE = Shard("m", "PGD", 0.1, 0)


@pytest.fixture
def folder(tmp_path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    for chunk, rows in ROWS.items():
        columns = {name: [None] * rows for name in ROW_SCHEMA.names}
        position = [3 * chunk + k for k in range(rows)]
        columns |= {"position": position, "label": [1] * rows, "status": ["misclassified"] * rows}
        columns |= {"cosine": [float("nan"), 0.5, 1.0][:rows], "name": [f"image {k}" for k in position]}
        images = {position[0]: torch.full((3, 2, 2), chunk / 8)} if chunk != 1 else {}
        folder.write(Shard("m", "PGD", 0.1, chunk), columns, images)
    return folder


def content(folder: RunFolder) -> tuple[pd.DataFrame, dict[int, torch.Tensor]]:
    fresh = RunFolder(folder.path)
    assert fresh.done(EXAMPLE, ROWS) == set(ROWS)
    assert all(fresh.is_done(Shard("m", "PGD", 0.1, chunk), rows) for chunk, rows in ROWS.items())
    images = list(fresh.images("m", "PGD", 0.1))
    assert fresh.image_positions("m", "PGD", 0.1) == [position for position, _ in images]
    return fresh.read("shards", "m", "PGD", 0.1), dict(images)


def assert_same(one, two) -> None:
    pd.testing.assert_frame_equal(one[0], two[0], check_exact=True)
    assert one[1].keys() == two[1].keys()
    assert all(torch.equal(one[1][k], two[1][k]) for k in one[1])


def files(folder: RunFolder) -> list[str]:
    return sorted(path.name for path in folder.path.rglob("*") if path.is_file())


def test_chunks_become_one_file_with_the_same_rows_and_images(folder):
    before = content(folder)
    assert len(files(folder)) == 9
    folder.compact(EXAMPLE, ROWS)
    assert files(folder) == ["000000-000004.parquet", "000000-000004.safetensors"]
    assert_same(content(folder), before)
    times = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")}
    folder.compact(EXAMPLE, ROWS)
    assert times == {path: path.stat().st_mtime_ns for path in folder.path.rglob("*")}
    assert folder.there(Shard("m", "PGD", 0.2, 0)) == set()


def test_whoever_is_killed_on_the_way_loses_nothing(folder):
    """SIGKILL before each change of a name in the folder: files written, given their names, removed."""
    before, killed = content(folder), 0
    for step in range(1, 40):
        child = os.fork()
        if child == 0:
            count = 0
            for name in ("rename", "remove", "open"):
                original = getattr(inside.Folder, name)

                def counted(self, *arguments, original=original, step=step):
                    nonlocal count
                    count += 1
                    if count == step:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return original(self, *arguments)

                setattr(inside.Folder, name, counted)
            RunFolder(folder.path).compact(EXAMPLE, ROWS)
            os._exit(0)
        status = os.waitpid(child, 0)[1]
        assert_same(content(folder), before)
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
        killed += 1
    assert killed >= 5
    assert [name for name in files(folder) if not name.endswith(".partial")] == [
        "000000-000004.parquet", "000000-000004.safetensors",
    ]  # fmt: skip


def test_what_was_made_of_the_chunks_is_looked_at_before_they_go(folder, monkeypatch):
    before, write = content(folder), type(folder._files).write

    def turned(self, name: str, data: bytes) -> None:
        if name.endswith("-000004.parquet"):
            frame = pd.read_parquet(io.BytesIO(data))
            data = pa.Table.from_pandas(frame.assign(label=frame["label"] + (frame["position"] == 7)), ROW_SCHEMA)
            pq.write_table(data, stream := io.BytesIO())
            data = stream.getvalue()
        write(self, name, data[:-1] + b"x" if name.endswith("-000004.safetensors") else data)

    monkeypatch.setattr(type(folder._files), "write", turned)
    folder.compact(EXAMPLE, ROWS)
    monkeypatch.undo()
    assert [name for name in files(folder) if "-" in name] == ["000000-000004.damaged"] * 2
    assert sum(name.endswith(".parquet") for name in files(folder)) == CHUNKS
    assert_same(content(folder), before)


def test_a_file_of_all_chunks_that_is_damaged_is_made_again_from_what_is_left(folder):
    folder.compact(EXAMPLE, ROWS)
    path = folder.path / EXAMPLE.path.with_name("000000-000004.parquet")
    path.write_bytes(path.read_bytes()[:-9])
    fresh = RunFolder(folder.path)
    assert fresh.done(EXAMPLE, ROWS) == set()
    assert path.with_suffix(".damaged").exists()
    assert "000000-000004.parquet was damaged" in fresh.notes[0]


def test_what_is_not_whole_stays_in_chunks(folder):
    (folder.path / Shard("m", "PGD", 0.1, 2).path).unlink()
    before = files(folder)
    store = RunFolder("memory://bucket/compact")
    store.compact(EXAMPLE, ROWS)
    folder.compact(EXAMPLE, {0: 3})
    assert files(folder) == before


@pytest.mark.parametrize("compacted", [False, True])
def test_other_libraries_read_the_rows_as_documented(folder, compacted):
    """docs/evaluation.md, "Rows in other programs"."""
    duckdb, polars = pytest.importorskip("duckdb"), pytest.importorskip("polars")
    if compacted:
        folder.compact(EXAMPLE, ROWS)
    pattern = f"{folder.path}/shards/*/*/*/*.parquet"
    found = duckdb.sql(f"SELECT status, count(*) FROM '{pattern}' GROUP BY status").fetchall()
    assert found == [("misclassified", sum(ROWS.values()))]
    frame = polars.scan_parquet(pattern, include_file_paths="file").collect()
    assert frame["position"].to_list() == list(range(sum(ROWS.values())))
    assert frame["label"].dtype.is_integer()
    assert set(frame["file"].str.split("/").list.get(-3).to_list()) == {"PGD"}

"""Small files that unpack to much: read in bounded memory, whatever they claim, and said where a limit is met."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orthattack.eval.data import classes, parquet
from orthattack.eval.data.dataset import read_names
from orthattack.eval.data.parquet import MAX_PAGE, MAX_ROWS
from orthattack.eval.data.readers import Shards
from orthattack.eval.errors import EvaluationError
from orthattack.eval.models.preprocessing import DecodeError
from orthattack.eval.storage.schema import ROW_SCHEMA
from tests.eval.synthetic import make_run

MIB = 2**20
LIMIT = 300  # MB above what the process had before


def images(path: Path, values: list[bytes], **how: object) -> Path:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array([{"bytes": value} for value in values], kind), "label": [0] * len(values)})
    pq.write_table(table, path, **how)
    return path


def above(code: str, *arguments: object) -> int:
    """MB that a process needs more than before, at most, while it runs a line of code."""
    text = (
        "import sys; from contextlib import suppress; from pathlib import Path\n"
        "from orthattack.eval.data.readers import Shards; from orthattack.eval.data.classes import read_table\n"
        "from orthattack.eval.storage.run_folder import RunFolder; from orthattack.eval.errors import EvaluationError\n"
        "def peak(): return int(next(l for l in open('/proc/self/status') if l.startswith('VmHWM')).split()[1])\n"
        f"before = peak()\n{code}\nprint((peak() - before) // 1000)"
    )
    command = [sys.executable, "-c", text, *map(str, arguments)]
    done = subprocess.run(
        command, capture_output=True, text=True, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    return int(done.stdout)


def table_of(schema: pa.Schema, rows: int, **columns: object) -> pa.Table:
    """Rows of a run, without values where none are given."""
    own = {"position": range(rows), "label": [0] * rows, "status": ["ok"] * rows, **columns}
    return pa.table(
        [pa.array(own[f.name], f.type) if f.name in own else pa.nulls(rows, f.type) for f in schema], schema
    )


@pytest.mark.parametrize(
    ("rows", "texts", "why"),
    [pytest.param(1000, ["x" * MIB] * 1000, "message unpacks to 1.05e+03 MB", marks=pytest.mark.slow),
     (800_000, None, "larger than rows of a run are"),
     (34, [f"{k}" + "x" * MIB for k in range(34)], "column message has a page that unpacks to 35.7 MB")],
)  # fmt: skip
def test_rows_of_a_strangers_run_are_no_bombs(tmp_path, rows, texts, why):
    folder = make_run(tmp_path / "run")
    path = sorted(folder.path.glob("shards/*/FGSM/*/*.parquet"))[0]
    table = table_of(ROW_SCHEMA, rows, **({} if texts is None else {"message": texts}))
    pq.write_table(table, path, compression="zstd", dictionary_pagesize_limit=4 * MIB)
    model, attack, eps = path.parts[-4:-1]
    with pytest.raises(EvaluationError, match=f"000000.parquet is damaged .*{re.escape(why)}"):
        folder.read("shards", model, attack, float(eps))
    if texts is not None and texts[0] == texts[-1]:
        code = f"with suppress(EvaluationError): RunFolder(sys.argv[1]).read('shards', {model!r}, {attack!r}, {eps})"
        assert above(code, folder.path) < LIMIT


def test_a_record_of_absurd_size_is_not_read(tmp_path):
    folder = make_run(tmp_path / "run")
    os.truncate(folder.path / "manifest.json", 2**40)
    with pytest.raises(EvaluationError, match=r"manifest\.json is larger than any record of a run"):
        folder.manifest()


READ = "s = Shards([Path(sys.argv[1])])\nfor k in range(len(s.labels)): s.content(k)"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("kind", ["equal", "largest", "largest of one"])
def test_images_of_a_shard_are_read_in_bounded_memory(tmp_path, kind):
    """1,500 equal rows of 1 MiB were 3.9 GiB, and 1 MB on the disk; then the largest values that are read."""
    noise = os.urandom(MAX_PAGE - MIB)
    values, how = {
        "equal": ([noise[:MIB]] * 1500, {"row_group_size": 1500, "dictionary_pagesize_limit": 4 * MIB}),
        "largest": ([noise[k * MIB : (k + 1) * MIB] for k in range(30)] * 2, {"dictionary_pagesize_limit": 2**30}),
        "largest of one": ([noise] * 20, {}),
    }[kind]
    path = images(tmp_path / "a.parquet", values, **how)
    assert Shards([path]).content(len(values) - 1) == values[-1]
    assert above(READ, path) < LIMIT


@pytest.mark.parametrize("use_dictionary", [False, True])
def test_a_page_that_unpacks_to_much_is_refused_before_it_is_unpacked(tmp_path, use_dictionary):
    path = images(tmp_path / "a.parquet", [bytes(MAX_PAGE + 1)], use_dictionary=use_dictionary, compression="zstd")
    assert path.stat().st_size < MIB // 100
    with pytest.raises(EvaluationError) as error:
        Shards([path])
    assert f"{path} cannot be read as a Parquet file (column image.bytes has a page that unpacks to 33.6 MB" in str(
        error.value
    )


def test_rows_are_counted_before_they_are_read(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table(
        {"image": pa.nulls(MAX_ROWS + 1, pa.binary()), "label": pa.nulls(MAX_ROWS + 1, pa.int64()).fill_null(0)}
    )
    pq.write_table(table, path)
    assert path.stat().st_size < MIB // 10
    with pytest.raises(
        EvaluationError, match=r"1,000,001 rows, of which a file may have 1,000,000: write several files"
    ):
        Shards([path])


def test_a_footer_of_absurd_size_is_not_read(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1" + bytes(3 * MIB) + (3 * MIB).to_bytes(4, "little") + b"PAR1")
    with pytest.raises(EvaluationError, match=r"a footer of 3\.15 MB, of which 2\.1 are read"):
        Shards([path])


def test_pages_are_found_whatever_their_headers_hold(tmp_path):
    """Sizes as Arrow's own metadata has them, of files with statistics, several pages, encodings and row groups."""
    table = pa.table({"a": [str(k % 7) * 50 for k in range(5000)], "b": range(5000), "c": [[k] for k in range(5000)]})
    for version, codec in (("1.0", "none"), ("2.6", "zstd"), ("2.6", "snappy")):
        path = tmp_path / "a.parquet"
        page = {"data_page_version": "2.0" if codec == "snappy" else "1.0", "data_page_size": 1000}
        pq.write_table(
            table, path, version=version, compression=codec, row_group_size=2000, write_statistics=True, **page
        )
        with parquet.opened(path) as file:
            for group in range(file.num_row_groups):
                about = file.metadata.row_group(group)
                with path.open("rb") as stream:
                    for k in range(about.num_columns):
                        leaf = about.column(k)
                        start = leaf.dictionary_page_offset or leaf.data_page_offset
                        pages = list(parquet._pages(stream, start, start + leaf.total_compressed_size))
                        assert [kind for kind, _ in pages] == [True] + [False] * (len(pages) - 1)
                        unpacked = sum(size for _, size in pages)
                        assert unpacked <= leaf.total_uncompressed_size < unpacked + 100 * len(pages)  # and headers
            rows = pa.Table.from_batches(list(parquet.batches(file, path, ["a", "b"])))
        assert rows.column("b").to_pylist() == list(range(5000))


@pytest.mark.parametrize(
    "header", [b"", b"\xff" * 300, b"\x15" * 300, bytes(300), b"\x1c" * 300, b"\x19\xfc" + b"\xff" * 300]
)
def test_a_page_header_that_is_none_is_damage(tmp_path, header):
    path = images(tmp_path / "a.parquet", [os.urandom(4000)] * 3, use_dictionary=False, compression="none")
    with pq.ParquetFile(path) as file:
        start = file.metadata.row_group(0).column(0).data_page_offset
    data = bytearray(path.read_bytes())
    data[start : start + len(header)] = header
    path.write_bytes(data)
    if header:
        with pytest.raises((EvaluationError, DecodeError)):
            Shards([path]).content(0)
    else:
        assert len(Shards([path]).content(0)) == 4000


@pytest.mark.parametrize(
    ("text", "why"),
    [("a,b\n" + "x" * 2**17, "line 2 is longer than 131,072 characters"),
     ("file,label\n" + '"' + "a\n" * 200, "the row of line 1 has more than 100 lines"),
     ("file,label\n" + "\n" * 20, "more than 15 lines")],
)  # fmt: skip
def test_lists_are_read_a_line_at_a_time(tmp_path, monkeypatch, text, why):
    if "15" in why:
        monkeypatch.setattr(classes, "MAX_LINES", 15)
    path = tmp_path / "a.csv"
    path.write_text(text)
    with pytest.raises(EvaluationError, match=f"could not read labels file .*{why}"):
        list(classes.read_table(path, "labels")[1])
    if "row" not in why:
        with pytest.raises(EvaluationError, match=f"could not read subset file .*{why}"):
            read_names(path)

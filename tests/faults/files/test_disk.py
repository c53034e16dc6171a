"""A full disk, too little memory, and files of a run that somebody or something has damaged."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pyarrow.parquet as pq
import pytest

from orthattack.eval import cli
from orthattack.eval.storage.run_folder import RunFolder
from tests.faults.files.conftest import MODEL, rows
from tests.stored import assert_same, contents, seconds

RUN = ["eval", "--model", MODEL, "--limit", 8, "--attacks", "FGSM", "PGD", "--steps", 2, "--shard-size", 4]
RUN += ["--save-images", "all", "--no-checks"]
IMAGES = 4 * 3 * 32 * 32 * 4  # bytes of a shard's images, the largest files of the run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "run"
    assert cli.main([*map(str, RUN), "--out", str(path)]) == 0
    return path


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 160 kB."""
    path = tmp_path / "disk"
    path.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=160k", "none", path], capture_output=True).returncode:
        pytest.skip("needs the right to mount a file system")
    yield path
    subprocess.run(["umount", path], check=True)


def test_a_full_disk_keeps_what_is_finished_and_the_same_command_goes_on(small_disk, whole, orthattack):
    path = small_disk / "run"
    stopped = orthattack(*RUN, "--out", path)
    assert stopped.code == 2
    line = stopped.err.strip().splitlines()[-1]
    assert line.startswith(f"orthattack: could not write to {path} (No space left on device): what is finished is kept")
    assert [p for p in path.rglob("*") if "partial" in p.name] == []
    before, expected = contents(path), contents(whole)
    assert len(before) > 0
    times = seconds(path)
    assert 0 < len(times) < len(seconds(whole))
    again = orthattack(*RUN, "--out", path)  # there is still no room
    assert again.code == 2
    assert "No space left on device" in again.err
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    done = orthattack(*RUN, "--out", path)
    assert done.code == 0, done.err
    assert_same(contents(path), expected)
    after = seconds(path)
    assert times == {key: after[key] for key in times}  # not computed again


@pytest.mark.parametrize("limit", [6000, pytest.param(IMAGES // 2, marks=pytest.mark.slow)])
def test_a_file_that_may_not_grow_is_like_a_full_disk(tmp_path, whole, orthattack, limit):
    """The kernel's limit for a file's size, which needs no rights: below a shard of rows, and of images."""
    path = tmp_path / "run"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        stopped = orthattack(*RUN, "--out", path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert stopped.code == 2
    assert f"could not write to {path} (File too large): what is finished is kept" in stopped.err
    assert [p for p in path.rglob("*") if "partial" in p.name] == []
    assert json.loads((path / "manifest.json").read_text())["status"] == "interrupted"
    done = orthattack(*RUN, "--out", path)
    assert done.code == 0, done.err
    assert_same(contents(path), contents(whole))


def test_a_report_that_cannot_be_written_loses_no_result(small_disk, orthattack):
    """Room for the rows and the manifest, but not for the report's page."""
    path = small_disk / "run"
    subprocess.run(["mount", "-o", "remount,size=88k", small_disk], check=True)
    without = [*RUN[: RUN.index("all")], "none", "--no-checks"]
    stopped = orthattack(*without, "--out", path)
    assert stopped.code == 2, stopped.err
    assert f"could not write the report to {path} (No space left on device): the results are kept" in stopped.err
    assert f"orthattack report {path}" in stopped.err
    assert json.loads((path / "manifest.json").read_text())["status"] == "complete"
    subprocess.run(["mount", "-o", "remount,size=4m", small_disk], check=True)
    assert orthattack("report", path).code == 0
    assert (path / "report.html").is_file()


HUNGRY = """
import resource, torch

def attack(model):
    def run(images, labels):
        if len(images) > 2:  # far more than the limit leaves, whatever the machine has
            with open("/proc/self/statm") as stream:
                now = int(stream.read().split()[0]) * resource.getpagesize()
            before = resource.getrlimit(resource.RLIMIT_AS)
            resource.setrlimit(resource.RLIMIT_AS, (now + 2**28, before[1]))
            try:
                torch.zeros(len(images), 2**28)
            finally:
                resource.setrlimit(resource.RLIMIT_AS, before)
        return images
    return run
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_that_runs_out_halves_the_batch_and_the_run_is_finished(tmp_path, orthattack, monkeypatch):
    """A refusal of the kernel's, through PyTorch's allocator."""
    (tmp_path / "hungry.py").write_text(HUNGRY)
    monkeypatch.chdir(tmp_path)
    done = orthattack(
        "eval", "--model", MODEL, "--limit", 8, "--batch-size", 8, "--attacks", "hungry:attack", "FGSM", "--no-checks",
        "--out", "run",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "orthattack: hungry:attack: out of memory with" in done.err
    assert set(rows(tmp_path / "run")["status"]) <= {"ok", "misclassified"}


def drop_column(path: Path) -> None:
    pd.read_parquet(path).drop(columns="margin").to_parquet(path)


def other_type(path: Path) -> None:
    frame = pd.read_parquet(path)
    frame.assign(position=frame["position"].astype(str)).to_parquet(path)


def fewer_rows(path: Path) -> None:
    pd.read_parquet(path).iloc[1:].to_parquet(path)


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def emptied(path: Path) -> None:
    os.truncate(path, 0)


def a_bit_turned(path: Path) -> None:
    """The last of a column's numbers: header and footer stay whole, and the file is as long as before."""
    column = pq.read_metadata(path).row_group(0).column(0)
    data = bytearray(path.read_bytes())
    data[(column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size - 1] ^= 1
    path.write_bytes(data)


DAMAGES = [truncated, emptied, drop_column, other_type, fewer_rows, a_bit_turned]


@pytest.fixture
def copied(whole, tmp_path) -> Path:
    subprocess.run(["cp", "-a", whole, tmp_path / "run"], check=True)
    return tmp_path / "run"


@pytest.mark.parametrize(
    "damage",
    [pytest.param(damage, marks=[pytest.mark.slow] * (damage in (drop_column, emptied))) for damage in DAMAGES],
)
def test_a_damaged_shard_is_made_again_and_the_others_are_not(copied, whole, orthattack, damage):
    shards = [path for path in sorted(copied.rglob("*.parquet")) if "shards" in path.parts]
    broken = shards[1]
    damage(broken)
    times = {path: path.stat().st_mtime_ns for path in shards if path != broken}
    done = orthattack(*RUN, "--out", copied)
    assert done.code == 0, done.err
    assert_same(contents(copied), contents(whole))
    assert times == {path: path.stat().st_mtime_ns for path in times}
    assert broken.with_suffix(".damaged").exists()
    (note,) = [note for session in RunFolder(copied).sessions() for note in session["notes"]]
    assert note.startswith(str(broken.relative_to(copied)))
    assert "was damaged" in note
    assert "is made again" in note


def test_a_report_names_the_damaged_file_and_what_to_do(copied, orthattack):
    shard = sorted(path for path in copied.rglob("*.parquet") if "shards" in path.parts)[0]
    kept = shard.read_bytes()
    for damage in (truncated, a_bit_turned):
        damage(shard)
        told = orthattack("report", copied)
        assert told.code == 2
        assert told.err.startswith(f"orthattack: {shard} is damaged (")
        assert "start the run again with the same command" in told.err
        shard.write_bytes(kept)
    images = next(path for path in copied.rglob("*.safetensors") if "FGSM" in path.parts)
    truncated(images)
    told = orthattack("report", copied)
    assert told.code == 2
    assert told.err.startswith(f"orthattack: {images} is damaged (")
    rows_file = copied / "shards" / images.relative_to(copied / "images").with_suffix(".parquet")
    images.unlink()
    rows_file.unlink()  # as the message says
    assert orthattack(*RUN, "--out", copied).code == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is not the folder of a run: no readable manifest.json"),
        ("[" * 100_000, "is not the folder of a run: no readable manifest.json"),
        ("\x00\x01", "is not the folder of a run: no readable manifest.json"),
        ('{"format": 1}', "lacks what a"),
        ('{"format": 1, "config": [], "models": 3, "attacks": null, "sessions": {}}', "lacks what a"),
        ('{"format": 1, "config": {}, "models": [], "attacks": [], "sessions": []}', "lacks what a"),
        ("[]", "has format None"),
    ],
)
def test_a_damaged_manifest_is_named_and_nothing_is_overwritten(copied, orthattack, text, message):
    (copied / "manifest.json").write_text(text)
    before = contents(copied)
    for arguments in (["report", copied], [*RUN, "--out", copied]):
        told = orthattack(*arguments)
        assert told.code == 2
        assert message in told.err or "holds another run" in told.err
    assert (copied / "manifest.json").read_text() == text
    assert_same(contents(copied), before)

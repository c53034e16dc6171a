"""Images in tar files, as WebDataset has them, and in Arrow files, as Hugging Face's data sets are saved."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from orthattack.eval.data.load import check_data, load_dataset
from orthattack.eval.errors import EvaluationError
from tests.eval.data.test_readers import classifier, png, reds


def tar(path: Path, members: dict[str, bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as stream:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            stream.addfile(info, io.BytesIO(content))
    return path


def saved(folder: Path, shards: list[list[int]], *, classes: list[str] | None = None, **options: Any) -> Path:
    """As ``Dataset.save_to_disk`` does it: images whose red is their value, labelled value % 3, in batches of two."""
    folder.mkdir(parents=True)
    image = pa.struct({"bytes": pa.binary(), "path": pa.string()})
    schema = pa.schema({"image": image, "label": pa.int64()})
    if classes is not None:
        features = {"label": {"names": classes, "_type": "ClassLabel"}}
        schema = schema.with_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    names = [f"data-{k:05d}-of-{len(shards):05d}.arrow" for k in range(len(shards))]
    for name, values in zip(names, shards, strict=True):
        rows = [{"image": {"bytes": png(v), "path": None}, "label": v % 3} for v in values]
        with pa.ipc.new_stream(folder / name, schema, **options) as stream:
            stream.write_table(pa.Table.from_pylist(rows, schema), max_chunksize=2)
    (folder / "dataset_info.json").write_text("{}")
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    return folder


def refused(data: Path | str) -> str:
    with pytest.raises(EvaluationError) as error:
        load_dataset(str(data), classifier())
    return str(error.value)


def test_tar_files_are_read_with_their_labels(tmp_path):
    tar(tmp_path / "a-0.tar", {"0.cls": b"2\n", "0.png": png(7), "x/1.left.PNG": png(9), "x/1.json": b'{"label": 1}'})
    tar(tmp_path / "a-1.tar", {"./0.png": png(200), "./0.json": b'{"a": 3, "cls": 0}', "./0.txt": b"a", ".0.png": b""})
    dataset = load_dataset(str(tmp_path), classifier())
    assert dataset.names == ("a-0/0", "a-0/x/1", "a-1/0")
    assert dataset.labels == (2, 1, 0)
    assert reds(dataset) == [7, 9, 200]
    assert dataset.mapping == "labels taken as the model's class indices"
    one = load_dataset(str(tmp_path / "a-1.tar"), classifier())
    assert (one.names, reds(one)) == (("a-1/0",), [200])
    before = dataset.fingerprint()
    assert load_dataset(f"{tmp_path}/a-*.tar", classifier()).fingerprint() == before
    tar(tmp_path / "a-1.tar", {"./0.png": png(201), "./0.cls": b"0"})
    assert load_dataset(str(tmp_path), classifier()).fingerprint() != before


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"0.png": b"a"}, r"'0' has no label: beside an image there must be 0.cls with its class index, or 0.json"),
        (
            {"0.png": b"a", "0.cls": b"cat"},
            r"cannot be read as a tar file \(a label must be a class index; got b'cat'\)",
        ),
        ({"0.png": b"a", "0.json": b'{"label": -1}'}, "a label must be a class index; got '-1'"),
        ({"0.png": b"a", "0.json": b"[" * 100_000}, "cannot be read as a tar file"),
        ({"0.png": b"a", "0.json": b" " * 2_000_000}, "a label of more than 1048576 bytes"),
        ({"0.a.png": b"a", "0.b.jpg": b"b", "0.cls": b"1"}, "has two images of '0'"),
        ({"0.png": b"a", "0.cls": b"1", "0.json": b'{"label": 2}'}, "has two labels of '0', 1 and 2"),
        ({"0.png": b"a", "0.cls": b"7"}, "a/0 has label 7, but model has 3 classes"),
        ({}, "names no images"),
    ],
)
def test_tar_files_that_cannot_be_used_are_explained(tmp_path, members, message):
    with pytest.raises(EvaluationError, match=message):
        load_dataset(str(tar(tmp_path / "a.tar", members)), classifier())


def test_a_tar_file_that_is_none_or_was_cut_is_explained(tmp_path):
    (tmp_path / "a.tar").write_bytes(b"no tar file" * 100)
    assert "a.tar cannot be read as a tar file" in refused(tmp_path / "a.tar")
    path = tar(tmp_path / "b.tar", {"0.cls": b"0", "0.png": png(1) + bytes(4096)})
    dataset = load_dataset(str(path), classifier())
    os.truncate(path, 2000)
    assert "its tar file ends before it" in str(next(dataset.batches(1, classifier().preprocessing)))
    assert "no tar file fits" in refused(tmp_path / "none.tar")


def test_a_tar_file_beside_class_folders_is_not_meant(tmp_path):
    tar(tmp_path / "all.tar", {"0.cls": b"0", "0.png": png(1)})
    for k in range(3):
        (tmp_path / f"c{k}").mkdir()
        (tmp_path / f"c{k}" / "0.png").write_bytes(png(k))
    assert load_dataset(str(tmp_path), classifier()).names == ("c0/0.png", "c1/0.png", "c2/0.png")


def test_a_saved_data_set_is_read_in_its_order_with_its_classes(tmp_path):
    folder = saved(tmp_path / "set", [[3, 4, 5, 6, 7], [8, 9]], classes=["a", "b", "c"])
    dataset = load_dataset(str(folder), classifier(3, ("c", "a", "b")))
    assert dataset.names[::5] == ("data-00000-of-00002/0", "data-00001-of-00002/0")
    assert dataset.labels == tuple((value + 1) % 3 for value in range(3, 10))  # c is the data's 2, the model's 0
    assert reds(dataset) == [*range(3, 10)]
    one = load_dataset(str(folder / "data-00001-of-00002.arrow"), classifier())
    assert (one.labels, reds(one)) == ((2, 0), [8, 9])
    (folder / "state.json").unlink()
    assert reds(load_dataset(str(folder), classifier())) == [*range(3, 10)]


def test_of_several_splits_one_must_be_chosen(tmp_path):
    for split in ("train", "test"):
        saved(tmp_path / "set" / split, [[1, 2]])
    (tmp_path / "set" / "dataset_dict.json").write_text('{"splits": ["train", "test"]}')
    assert refused(tmp_path / "set").endswith(f"has several splits: choose one, such as --data {tmp_path / 'set/test'}")
    check_data(str(tmp_path / "set" / "test"))


def test_arrow_files_that_cannot_be_used_are_explained(tmp_path):
    folder = saved(tmp_path / "packed", [[1, 2, 3]], options=pa.ipc.IpcWriteOptions(compression="zstd"))
    assert "it is compressed, which Hugging Face's files are not" in refused(folder)
    (tmp_path / "a.arrow").write_bytes(b"none")
    assert "a.arrow cannot be read as an Arrow file of Hugging Face's" in refused(tmp_path / "a.arrow")
    with pa.ipc.new_stream(tmp_path / "b.arrow", pa.schema({"x": pa.int64()})) as stream:
        stream.write_table(pa.table({"x": [1]}))
    assert "b.arrow has no column image or img; it has x" in refused(tmp_path / "b.arrow")
    whole = saved(tmp_path / "cut", [[1, 2, 3]])
    path = whole / "data-00000-of-00001.arrow"
    os.truncate(path, path.stat().st_size * 2 // 3)
    assert "cannot be read as an Arrow file" in refused(whole)
    elsewhere = saved(tmp_path / "elsewhere", [[1]])
    (elsewhere / "state.json").write_text('{"_data_files": [{"filename": "../cut/data-00000-of-00001.arrow"}]}')
    assert "it names files elsewhere" in refused(elsewhere)
    (elsewhere / "state.json").write_text('{"_data_files": [], "_indices_data_files": [{"filename": "i.arrow"}]}')
    assert "save it again after flatten_indices()" in refused(elsewhere)


def test_an_arrow_file_whose_offsets_lie_is_refused(tmp_path):
    schema = pa.schema({"image": pa.binary(), "label": pa.int64()})
    with pa.ipc.new_stream(tmp_path / "a.arrow", schema) as stream:
        stream.write_batch(pa.record_batch([pa.array([b"x" * 1234]), pa.array([0])], schema=schema))
    before, offset, after = (tmp_path / "a.arrow").read_bytes().rpartition(bytes(4) + (1234).to_bytes(4, "little"))
    assert offset
    (tmp_path / "a.arrow").write_bytes(before + bytes(4) + (2**30).to_bytes(4, "little") + after)
    assert "cannot be read as an Arrow file" in refused(tmp_path / "a.arrow")


@pytest.mark.slow
def test_many_images_in_a_tar_file_take_little_memory(tmp_path):
    with tarfile.open(tmp_path / "a.tar", "w") as stream:
        for k in range(10_000):
            for name, content in ((f"{k}.cls", b"0"), (f"{k}.png", b"")):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                stream.addfile(info, io.BytesIO(content))
    code = (
        "import resource, sys; from orthattack.eval.data.tars import Tars; from pathlib import Path; "
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; print(len(Tars([Path(sys.argv[1])]).labels), "
        "resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "a.tar")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    count, kilobytes = map(int, done.stdout.split())
    assert count == 10_000
    assert kilobytes < 0.6 * count

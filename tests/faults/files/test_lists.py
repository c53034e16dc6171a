"""Label files, class files and subsets that cannot be meant, through the command line: one line that says why, exit
code 2, and no run begun.

What else each message says of columns, numbers and duplicates is in tests/eval/test_data.py and test_classes.py.
"""

from __future__ import annotations

import os
import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orthattack.eval.data.dataset import read_names
from orthattack.eval.data.load import load_dataset
from orthattack.eval.errors import EvaluationError
from orthattack.eval.models.classifier import Classifier
from orthattack.eval.models.preprocessing import Preprocessing
from tests.faults.files.conftest import rows

LABELS = [
    (b"", "must have columns file and label; it has none"),
    (b"\x00" * 50, "must have columns file and label"),
    (b"file;label\n3/a.png;3\n", "must have columns file and label; it has file;label"),
    (b"file,label\n", "names no images"),
    (b"file,label\n3/a.png,10\n", "3/a.png has label 10, but cifar10-robust has 10 classes, 0 to 9"),
    (b"file,label\n3/a.png,99999999999999999999\n", "line 2: label must be a class index >= 0"),
    (b"file,label\n3/a.png,-1\n", "line 2: label must be a class index >= 0"),
    (b"file,label\n3/a.png,1e0\n", "line 2: label must be a class index >= 0"),
    (b"file,label\n3/a.png,3\n4/a.png,4\n3/a.png,3\n", "line 4: '3/a.png' is listed twice"),
    (b"file,label\n../data/3/../../secret.png,3\n", "lies outside"),
    (b"file,label\n/etc/passwd,3\n", "line 2: '/etc/passwd' lies outside"),
    (b"file,label\nout/secret.png,3\n", "line 2: 'out/secret.png' lies outside"),  # a link that leads there
    (b"file,label\n3/\x00.png,3\n", "line 2: '3/\\x00.png' is no file name (embedded null byte)"),
    (b"file,label\ncircle/a.png,3\n", "line 2: 'circle/a.png' is no file name (Symlink loop"),
    (b"file,label\n3/\xff\xfe.png,3\n", "could not read labels file"),
    ("file,label\n3/a.png,3\n".encode("utf-16"), "could not read labels file"),
    (b'file,label\n"' + b"x" * 140_000 + b'",3\n', "could not read labels file"),
    ("file,label\n3/a.png,\x1d\x1d٣٣\n".encode(), "3/a.png has label 33, but cifar10-robust has 10 classes"),
]


@pytest.mark.parametrize(("content", "message"), LABELS)
def test_a_label_file_that_cannot_be_meant_is_refused(dataset, evaluated, content, message):
    (dataset.parent / "secret.png").touch()
    (dataset / "out").symlink_to(dataset.parent)
    (dataset / "circle").symlink_to(dataset / "circle")
    path = dataset.parent / "labels.csv"
    path.write_bytes(content)
    told = evaluated("--data", dataset, "--labels", path)
    assert told.code == 2
    assert told.out == ""
    assert message in told.err
    assert told.err.count("\n") == 1
    assert len(list((dataset.parent / "run").rglob("*.parquet"))) == 0


CLASSES = [
    (b"", "must have a column folder, wnid or class, and a column label or index; it has none"),
    (b"folder,label\n3,\x1c3\n", "does not list '0', a class of"),
    (b"folder,label\n3,3\n3,4\n", "line 3: '3' has index 4, but 3 before"),
    (b"folder,label\n\x00,\x00\n", "line 2: label must be a class index >= 0"),
    (b"\xff\xfe\x00", "could not read classes file"),
    (
        b"folder,label\n" + b"".join(b"%d,%d\n" % (k, k + 1) for k in range(10)),
        "has label 10, but cifar10-robust has 10",
    ),
]

SUBSETS = [
    (b"", "--subset names no images"),
    (b"# nothing\n\n", "--subset names no images"),
    (b"3/a.png\n3/a.png\n", "--subset names '3/a.png' twice"),
    (b"3/b.png\n", "--subset names '3/b.png', which"),
    (b"../data/3/a.png\n", "--subset names '../data/3/a.png', which"),
    (b"3/a.png\x00\n", "--subset names '3/a.png\\x00', which"),
    (b"\xff\xfe", "could not read subset file"),
    (b"3/\x1b[31m.png\n", "--subset names '3/\\x1b[31m.png', which"),
]


@pytest.mark.parametrize(
    ("option", "content", "message"),
    [("--classes", *case) for case in CLASSES] + [("--subset", *case) for case in SUBSETS],
)
def test_a_class_file_or_a_subset_that_cannot_be_meant_is_refused(dataset, evaluated, option, content, message):
    path = dataset.parent / "list"
    path.write_bytes(content)
    told = evaluated("--data", dataset, option, path)
    assert (told.code, told.out) == (2, "")
    assert message in told.err
    assert "\x1b" not in told.err


@pytest.mark.parametrize("option", ["--labels", "--classes", "--subset", "--data"])
@pytest.mark.parametrize("kind", ["folder", "long", "missing"])
def test_paths_that_are_no_files_are_refused(dataset, evaluated, option, kind):
    path = {"folder": dataset.parent, "long": "x" * 300 + ".csv", "missing": "no/such"}[kind]
    data = [] if option == "--data" else ["--data", dataset]
    told = evaluated(*data, option, path)
    assert (told.code, told.out) == (2, "")
    assert told.err.startswith("orthattack: ")
    assert told.err.count("\n") == 1


def test_names_that_are_not_there_are_rows_and_the_rest_is_attacked(dataset, evaluated):
    path = dataset.parent / "labels.csv"
    long = "x" * 300 + ".png"  # longer than a file's name can be
    path.write_text(f"file,label\n3/a.png,3\nnowhere/a.png,4\n{long},5\n")
    assert evaluated("--data", dataset, "--labels", path).code == 0
    found = rows(dataset.parent / "run")
    assert found.loc["nowhere/a.png", "message"] == found.loc[long, "message"] == "no such file"
    assert (found["status"] == "unreadable").sum() == 2


MODEL = Classifier("model", None, Preprocessing(8, 8), ("apple", "cat", "zebra"), 3, "test")  # type: ignore[arg-type]
CELLS = st.one_of(
    st.sampled_from(
        ["cat/0.png", "cat/1.png", "zebra/a.png", "../x", "/etc/passwd", "", ".", "0", "2", "3", "-1", "file"]
    ),
    st.text(st.characters(codec="utf-8"), max_size=8),
)


@given(
    st.lists(st.lists(CELLS, max_size=3), max_size=5),
    st.sampled_from(["file,label\n", "folder,label\n", "wnid,index\n", ""]),
    st.sampled_from([",", ";", "\t"]),
)
def test_any_table_gives_images_inside_the_folder_or_a_message(tmp_path, table, head, comma):
    folder, path = tmp_path / "data", tmp_path / "list.csv"
    for name in ("cat/0.png", "cat/1.png", "zebra/a.png"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    path.write_text(head + "\n".join(comma.join(line) for line in table), encoding="utf-8", newline="")
    root = os.path.realpath(folder)
    for options in ({"labels": path}, {"classes": path}):
        try:
            found = load_dataset(str(folder), MODEL, **options)
        except EvaluationError as error:
            assert str(error)
            continue
        assert all(0 <= label < 3 for label in found.labels)
        assert all(os.path.realpath(folder / name).startswith(root) for name in found.names)
        assert found.fingerprint()
    try:
        assert load_dataset(str(folder), MODEL).subset(read_names(path))
    except EvaluationError as error:
        assert set(str(error)) & set(string.ascii_letters)

"""Names that are no names: shown as text by terminal, CSV, Markdown, page and JSON, whatever is in them."""

from __future__ import annotations

import csv
import io
import json
import time
import unicodedata
from pathlib import Path

import pytest
import torch
from PIL import Image

from orthattack.eval.data.dataset import ImageDataset
from orthattack.eval.data.load import load_dataset
from orthattack.eval.data.readers import Files
from orthattack.eval.errors import EvaluationError, nearest, say
from orthattack.eval.models.classifier import Classifier
from orthattack.eval.models.preprocessing import Preprocessing
from orthattack.eval.report.text import leaderboard_table, write_report
from orthattack.eval.results.stored_run import Run
from orthattack.eval.suite import make_suite
from tests.eval.synthetic import make_run

FORMULAS = ["=1+1", " =1+1", "\n=1+1", "＝1", "＋1", "－1", "＠x", "﹦1", "\u200b=1", "\xa0=1", "\ufeff@1", "\u3000-1",
            "\t+x", "−1"]  # fmt: skip
UNSEEN = ["\x1b[31mred", "\u202egpj.exe", "\u2066x\u2069", "\x00", "a\u2028b", "a\nb", "a\r\nb", "\x9bx"]
MARKUP = ["<script>alert(1)</script>", "a|b", "**a**", "[a](javascript:1)", "{{ 7 * 7 }}", "</pre>", "a, b"]


FEW = [*FORMULAS[:4], *UNSEEN[:4]]
MORE = [pytest.param(name, marks=pytest.mark.slow) for name in [*FORMULAS[4:], *UNSEEN[4:], *MARKUP]]


@pytest.mark.parametrize("name", [*FEW, *MORE])
def test_names_are_shown_as_text(tmp_path, name):
    """The same name for model, attack, class and images."""
    folder = make_run(
        tmp_path / "run", n=12, models=(name,), attacks={name: ("orthattack", False, False, [], 1.1)}, eps=(0.01,),
        classes=(name, "b", "c", "d"), chunk=12, stored=2, prefix=name, flaws=False, warnings=[name],
    )  # fmt: skip
    run = Run.open(folder.path)
    write_report(run)
    read = {path.name: path.read_bytes().decode() for path in folder.path.iterdir() if path.is_file()}
    shown = {"terminal": leaderboard_table(run), **{k: read[k] for k in ("results.csv", "results.md", "report.html")}}
    for place, text in shown.items():
        unseen = {c for c in text if unicodedata.category(c) in ("Cc", "Cf", "Cs", "Zl", "Zp")} - {"\n", "\t"}
        assert not unseen, (place, unseen)
    table = json.loads(read["results.json"])["table"]
    assert {row["model"] for row in table} == {name}  # for programs, as it is
    row = list(csv.reader(io.StringIO(read["results.csv"])))[1]
    assert row[0] == row[1]
    assert row[0].startswith("'") == (name in FORMULAS)
    assert "<script>alert" not in read["report.html"] + read["results.md"]
    assert "49" not in shown["terminal"] or "49" not in name


def test_labels_that_are_no_text_are_refused(tmp_path):
    """Bytes of an argument that are no UTF-8 become surrogates, which no file of a run could hold."""
    for content in ({"models": ["a\ud800"]}, {"attacks": [{"name": "FGSM", "label": "\udc80"}]}):
        with pytest.raises(EvaluationError, match=r"is called '.*\\ud[c8][80]0', which is no text: give it a label"):
            make_suite({"models": ["cifar10-robust"], "data": "cifar10-samples", **content}, "suite")
    folder = make_run(tmp_path / "run", limit=0)
    folder.write_manifest({**folder.manifest(), "models": [{"label": "a\ud800", "data": {"images": 1}}]})
    with pytest.raises(EvaluationError, match=r"manifest\.json lacks what a report needs \(models\.0\.label"):
        Run.open(folder.path)


def test_what_is_said_stays_on_its_line(capsys):
    say("a label\northattack: all is well\x1b[2J\u202e")
    assert capsys.readouterr().err == "orthattack: a label\\northattack: all is well\\x1b[2J\\u202e\n"


@pytest.mark.parametrize("count", [10, 50_000, 500_000])
def test_a_suggestion_costs_little_whatever_the_list(count):
    names = [f"n{k % 1000:08d}/ILSVRC2012_val_{k:08d}.JPEG" for k in range(count)]
    data = ImageDataset("data", tuple(names), (0,) * count, None, "", Files(names), range(count))
    start = time.process_time()
    data._at([0])
    list(names)
    before = time.process_time() - start
    start = time.process_time()
    with pytest.raises(EvaluationError, match=r"the nearest is 'n00000007/ILSVRC2012_val_00000007\.JPEG'"):
        data.subset(["n00000007/ILSVRC2012_val_00000007.jpeg"])
    assert time.process_time() - start < 0.2 + 5 * before + count * 2e-7  # the names are looked up in a table too
    start = time.process_time()
    assert nearest("x" * 10**6, ["y" * 10**6] * 100 + names) == []
    assert time.process_time() - start < 0.25


def folder_of(path: Path, *names: str) -> Path:
    for name in names:
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8)).save(path / name)
    return path


MODEL = Classifier("model", torch.nn.Identity(), Preprocessing(8, 8), None, 3)


@pytest.mark.parametrize("second", ["./0/0.png", "0//0.png", "1/../0/0.png", "link.png", "linked/0.png"])
def test_images_that_are_one_file_are_refused_in_a_list(tmp_path, second):
    folder = folder_of(tmp_path / "data", "0/0.png", "1/1.png")
    (folder / "link.png").symlink_to("0/0.png")
    (folder / "linked").symlink_to("0")
    listed = tmp_path / "labels.csv"
    listed.write_text(f"file,label\n1/1.png,1\n0/0.png,0\n{second},1\n")
    with pytest.raises(EvaluationError) as error:
        load_dataset(str(folder), MODEL, listed)
    assert str(error.value) == (
        f"{listed} has one image twice: '0/0.png' and {second!r} are the same file, which would count it twice"
    )


@pytest.mark.parametrize("linked", ["2/x.png", "2"])
def test_images_that_are_one_file_are_refused_in_folders(tmp_path, linked):
    folder = folder_of(tmp_path / "data", "0/0.png", "1/1.png", *(["2/2.png"] if linked != "2" else []))
    elsewhere = folder_of(tmp_path / "elsewhere", "a.png")
    (folder / "1" / "a.png").symlink_to(elsewhere / "a.png")  # a link by itself is none too many
    if linked == "2":
        (folder / "2").symlink_to("0")
    else:
        load_dataset(str(folder), MODEL)
        (folder / linked).symlink_to("../0/0.png")
    with pytest.raises(EvaluationError, match=r"has one image twice: '0/0\.png' and '2/[0x]\.png' are the same file"):
        load_dataset(str(folder), MODEL)

"""Suites that cannot be meant, or mean harm: refused in one line, or run inside the run's folder and shown as text.

Misspelt keys and values out of range are in tests/eval/test_suite.py, the page in a browser in tests/eval/test_page.py.
"""

from __future__ import annotations

import csv
import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from orthattack.eval import evaluate
from orthattack.eval.errors import EvaluationError
from orthattack.eval.results.stored_run import Run
from orthattack.eval.storage.run_folder import Shard
from orthattack.eval.suite import make_suite, read_suite
from tests.conftest import examples
from tests.faults.files.conftest import rows

BASE = 'models = ["cifar10-robust"]\ndata = "cifar10-samples"\n'
HUGE = "9" * 400

BAD = {
    "empty": ("", "models: is missing: it must be a list of one model or more"),
    "nothing": ("\n# only this\n", "models: is missing: it must be a list of one model or more"),
    "deep": ("models = " + "[" * 50_000, "is nested too deeply to be read"),
    "deep tables": (BASE + "[" + ".".join("a" * 2000) + "]", "unknown key"),
    "many digits": (BASE + "steps = " + "9" * 5000, "is not TOML (Exceeds the limit"),
    "huge steps": (BASE + f"steps = {HUGE}", "attack PGD cannot be made: steps must be below 2**31"),
    "huge batch": (BASE + "batch_size = 0", "batch_size: must be a whole number of images, at least 1; got 0"),
    "huge eps": (BASE + "eps = [1e308]", "eps is in units of [0, 1] pixels"),
    "infinite eps": (BASE + "eps = [inf]", "must be a finite radius"),
    "eps not a number": (BASE + "eps = [nan]", "must be a finite radius"),
    "eps of an attack": (
        BASE + 'attacks = [{name = "PGD", eps = [4]}]',
        "eps of PGD is in units of [0, 1] pixels; got 4",
    ),
    "eps twice": (BASE + 'attacks = [{name = "PGD", eps = [0.1, 0.1]}]', "eps of PGD has a value twice"),
    "eps alike": (BASE + "eps = [0.1, 0.1000000000001]", "eps has a value twice"),  # they would share their files
    "no eps": (
        BASE + 'attacks = [{name = "PGD", norm = "l2", eps = []}]',
        "attacks[1].eps: must be one radius or more",
    ),
    "huge seed": (BASE + f"seeds = [{2**63}]", "seeds[1]"),
    "no models": ('models = []\ndata = "cifar10-samples"', "models: must be a list of one model or more"),
    "types": ("models = {a = 1}\ndata = [1]\neps = true", ""),
    "a date for models": (
        'models = 1979-05-27\ndata = "cifar10-samples"',
        "models: must be a list of one model or more",
    ),
    "a list for a name": (
        'models = [{name = []}]\ndata = "cifar10-samples"',
        "models[1].name: must be text",
    ),
    "dates": (BASE + 'attacks = [{name = "PGD", alpha = 1979-05-27}]', "alpha must be text, a finite number"),
    "nan option": (BASE + 'attacks = [{name = "PGD", alpha = nan}]', "alpha must be text, a finite number"),
    "infinite option": (BASE + 'attacks = [{name = "MinimumNorm", max_eps = inf}]', "max_eps must be text, a finite"),
    "twice": (BASE + "steps = 1\nsteps = 2", "is not TOML"),
    "not UTF-8": (BASE.encode() + b'norm = "\xff"', "is not TOML"),
    "UTF-16": (BASE.encode("utf-16"), "is not TOML"),
    "null": (BASE + "\x00", "is not TOML"),
    "surrogate": (BASE + 'norm = "\\ud800"', "is not TOML"),
    "null label": ('models = [{name = "resnet18", weights = "\\u0000"}]\ndata = "cifar10-samples"', "weights file"),
    "null data": ('models = ["cifar10-robust"]\ndata = "a\\u0000b"', "data folder a\\x00b does not exist"),
    "long data": ('models = ["cifar10-robust"]\ndata = "' + "x" * 5000 + '"', "does not exist"),
    "null subset": (
        BASE.replace('"cifar10-samples"', '{source = "cifar10-samples", subset = "\\u0000"}'),
        "subset file",
    ),
    "escape codes": (BASE + '"\\u001b[31mkey" = 1', "\\x1b[31mkey: unknown key"),
    "two of a name": (
        BASE + 'attacks = [{name = "PGD", label = "\\u001b]0;"}, {name = "FGSM", label = "\\u001b]0;"}]',
        "\\x1b",
    ),
    "clean": (BASE + 'attacks = [{name = "PGD", label = "clean"}]', 'an attack cannot be called "clean"'),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_suite_that_cannot_be_meant_is_refused_in_one_line(orthattack, tmp_path, kind):
    text, message = BAD[kind]
    path = tmp_path / "suite.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    told = orthattack("eval", path, "--out", tmp_path / "run")
    assert (told.code, told.out) == (2, ""), told
    assert message in told.err
    assert told.err.startswith("orthattack: ")
    assert told.err.count("\n") == 1
    assert "\x1b" not in told.err
    assert list((tmp_path / "run").rglob("*.parquet")) == []


def test_a_suite_that_is_no_file_is_refused(orthattack, tmp_path):
    for path in (tmp_path, "x" * 5000 + ".toml", tmp_path / "none.toml"):
        assert orthattack("eval", path, "--out", tmp_path / "run").code == 2


# Names that are no words

HOSTILE = [
    "../../escaped",
    "/etc/passwd",
    "..",
    ".",
    "a/b\\c",
    "x" * 300,
    "<script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "=cmd|'/c calc'!A1",
    "+1",
    "@SUM(A1)",
    "line\nbreak | cell",
    "nul\x00l",
    "\x1b[31mred",
    "Ünïcödé \u202egnp.exe",
    "CON",
    "-rf",
    "{{ 7 * 7 }}",
    "$\\frac{1}{2}$",
]


class Tags(HTMLParser):
    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> Path:
    """A run whose models, attacks, classes and images are called as nobody would; in a folder of its own."""
    top = tmp_path_factory.mktemp("top")
    data, rng = top / "data", np.random.default_rng(0)
    names = [name for name in HOSTILE if "/" not in name and "\x00" not in name and name not in (".", "..", "x" * 300)]
    for name in names[:10]:
        folder = data / name.replace("/", "_")
        folder.mkdir(parents=True)
        for file in (name, "=cmd()", "<b>bold"):
            Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{file}.png", "PNG")
    attacks = [{"name": "FGSM", "label": label} for label in HOSTILE]
    models = [{"name": "cifar10-robust", "label": label} for label in (HOSTILE[6], HOSTILE[8])]
    before = Path.cwd()
    os.chdir(top)
    try:
        evaluate(
            models, {"source": str(data), "limit": 6}, attacks, out="run", eps=0.1, steps=1, save_images="all",
            checks=False, attack_misclassified=True, progress=False,
        )  # fmt: skip
    finally:
        os.chdir(before)
    return top / "run"


def test_whatever_things_are_called_nothing_leaves_the_runs_folder(hostile):
    assert sorted(path.name for path in hostile.parent.iterdir()) == ["data", "run"]
    inside = [path for path in hostile.rglob("*") if path.is_file()]
    assert not any(path.is_symlink() for path in inside)
    assert {path.parts[len(hostile.parts)] for path in inside if path.parent != hostile} == {
        "clean",
        "shards",
        "images",
        "sessions",
    }
    assert len([path for path in inside if "shards" in path.parts]) == 2 * len(HOSTILE)
    assert all(
        re.fullmatch(r"[A-Za-z0-9._-]{1,80}", part) for path in inside for part in path.relative_to(hostile).parts
    )
    run = Run.open(hostile)
    assert list(run.attacks) == HOSTILE
    assert (run.table()["scored"] > 0).all()


def test_a_page_shows_hostile_names_as_text(hostile):
    text = (hostile / "report.html").read_text(encoding="utf-8")
    tags = Tags(text).found
    assert "alert(1)" in text  # as text
    assert not [tag for tag, values in tags if any(key.startswith("on") for key in values)]
    assert all((values.get("src") or "data:").startswith("data:") for tag, values in tags if tag == "img")
    assert all(values.get("class") for tag, values in tags if tag == "b")  # no name's <b>
    scripts = [values.get("type") for tag, values in tags if tag == "script"]
    assert scripts.count("application/json") == 1
    assert len(scripts) == 2  # the page's own
    assert "{{ 7 * 7 }}" in text  # was not computed


def test_tables_show_hostile_names_as_text(hostile):
    markdown = (hostile / "results.md").read_text(encoding="utf-8")
    assert "<script" not in markdown
    assert "<img" not in markdown
    for line in markdown.splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) in (7, 10, 11)
    with (hostile / "results.csv").open(encoding="utf-8", newline="") as stream:
        lines = list(csv.DictReader(stream))
    cells = [cell for line in lines for cell in (line["model"], line["attack"])]
    assert not [cell for cell in cells if cell.startswith(("=", "+", "-", "@", "\t", "\r"))]
    assert {"'=cmd|'/c calc'!A1", "'+1", "'@SUM(A1)", "'-rf", "CON"} <= set(cells)
    exact = json.loads((hostile / "results.json").read_text(encoding="utf-8"))
    assert {row["attack"] for row in exact["table"]} >= set(HOSTILE)  # for programs, as they are


def test_a_terminal_is_given_no_commands(hostile, orthattack):
    told = orthattack("report", hostile)
    assert told.code == 0
    assert "\x1b" not in told.out + told.err
    assert "\x00" not in told.out
    assert "\u202e" not in told.out


def test_progress_and_warnings_give_a_terminal_no_commands(orthattack, tmp_path):
    path = tmp_path / "suite.toml"
    path.write_text(
        'data = {source = "cifar10-samples", limit = 8}\nchecks = false'
        '\nattacks = [{name = "FGSM", label = "\\u001b[31mred"}]'
        '\nmodels = [{name = "cifar10-robust", label = "\\u001b]0;title\\u0007"}]'
    )
    told = orthattack("eval", path, "--out", tmp_path / "run")
    assert told.code == 0
    assert "\x1b[31m" not in told.out + told.err
    assert "\x1b]0" not in told.out + told.err
    assert "\x07" not in told.out + told.err


names = st.one_of(
    st.sampled_from(HOSTILE),
    st.text(st.characters(codec="utf-8"), min_size=1, max_size=90),
    st.lists(st.sampled_from(["..", ".", "/", "\\", "a", "\x00", "~", "-", ":", " "]), min_size=1, max_size=9).map(
        "".join
    ),
)


@given(names, names)
def test_no_label_leads_out_of_its_folder(model, attack):
    for kind in ("clean", "shards", "checks"):
        shard = Shard(model, attack, 0.1, 0, kind)
        for path in (shard.path, shard.image_path):
            assert os.path.normpath(path) == str(path)
            assert not path.is_absolute()
            assert path.parts[0] in ("clean", "shards", "checks", "images")
            assert all(re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,79}", part) for part in path.parts)
    # A label that is another's name of a file does not get that file.
    stolen = Path(Shard(model, attack, 0.1, 0).path).parts[2]
    assert stolen == attack or Shard(model, stolen, 0.1, 0).path != Shard(model, attack, 0.1, 0).path


values = st.recursive(
    st.one_of(
        st.none(),
        st.booleans(),
        st.integers(),
        st.floats(),
        st.text(max_size=8),
        st.sampled_from(["cifar10-robust", "cifar10-samples", "FGSM", "PGD", "linf", "4/255", "all", "clean"]),
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.sampled_from(["name", "label", "eps", "norm", "source", "limit", "steps", "x"]), inner, max_size=4
        ),
    ),
    max_leaves=8,
)


@examples(150)
@given(
    st.dictionaries(
        st.sampled_from(
            ["models", "data", "attacks", "eps", "norm", "steps", "seed", "seeds", "batch_size", "checks", "y"]
        ),
        values,
        max_size=6,
    ),
    st.booleans(),
)
def test_any_content_is_a_suite_or_a_message_of_one_line(content, whole):
    if whole:
        content = {"models": ["cifar10-robust"], "data": "cifar10-samples", "attacks": ["FGSM"]} | content
    try:
        suite = make_suite(content, "suite")
        entries = suite.entries()
    except EvaluationError as error:
        assert "\n" not in str(error)
        return
    assert entries
    assert json.loads(json.dumps(suite.config(), allow_nan=False)) == suite.config()
    assert make_suite(suite.config(), "again") == suite


def test_paths_of_a_suite_are_its_own_and_are_only_read(tmp_path, orthattack):
    """A weights path that leads out of the suite's folder is a path: it is read as weights, and never written."""
    (tmp_path / "suite").mkdir()
    secret = tmp_path / "secret.txt"
    secret.write_text("precious")
    path = tmp_path / "suite" / "s.toml"
    path.write_text('models = [{name = "resnet18", weights = "../secret.txt"}]\ndata = "cifar10-samples"')
    assert read_suite(path).models[0].weights == str(tmp_path / "suite" / "../secret.txt")
    told = orthattack("eval", path, "--out", tmp_path / "run")
    assert told.code == 2
    assert "precious" not in told.err
    assert secret.read_text() == "precious"


def test_a_run_of_another_norm_is_written_inside_too(orthattack, tmp_path):
    path = tmp_path / "suite.toml"
    path.write_text(
        'data = {source = "cifar10-samples", limit = 4}\nchecks = false\nmodels = "cifar10-robust"\n'
        'attacks = ["FGSM", {name = "FGSM", label = "../../x", norm = "l2", eps = 0.5}]'
    )
    assert orthattack("eval", path, "--out", tmp_path / "run").code == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "suite.toml"]
    assert len(rows(tmp_path / "run")) == 8

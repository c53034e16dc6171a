"""The examples run as they are, and show what they say."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from tests.eval.tiny import evaluated

EXAMPLES = Path(__file__).parents[1] / "examples"


def printed(name: str, capsys, monkeypatch, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    return capsys.readouterr().out


def test_every_example_is_tested():
    text = Path(__file__).read_text(encoding="utf-8")
    assert [path.name for path in EXAMPLES.iterdir() if path.is_file() and f'"{path.name}"' not in text] == []


def test_quickstart(capsys, monkeypatch):
    out = printed("quickstart.py", capsys, monkeypatch)
    clean, attacked = (int(number) for number in re.findall(r"(\d+) of 20", out))
    assert attacked < clean
    assert float(re.search(r"pixel: +([\d.]+)/255", out)[1]) <= 8.0001
    assert float(re.search(r"image: +(\S+)", out)[1]) <= 1e-6


@pytest.mark.slow
def test_a_detector_is_evaded_by_the_attack_that_knows_it(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")  # a row in a line
    out = printed("detector.py", capsys, monkeypatch, "--steps", "4")
    found = re.findall(r"^(\S+) +cifar10-robust +8/255 +5\.0 % +17 +(\d+) +(\S+) %.*? {2}([\d.]+) %", out, re.M)
    assert [row[0] for row in found] == ["PGD", "OrthoPGD", "evasion"]
    assert all(int(fooled) > 0 and float(evaded) > 0 for _, fooled, _, evaded in found)
    seen = [float(row[2]) for row in found]
    assert seen[2] < min(seen[:2])  # of what it fools, nothing but what lies at the threshold to round-off
    assert "as are 1 of 20 clean images" in out


@pytest.mark.slow
def test_foolbox_users(capsys, monkeypatch):
    rows = re.findall(
        r"(\S+) +eps (\d)/255 .*? (\d+)% .*? (\S+)$", printed("foolbox_users.py", capsys, monkeypatch), re.M
    )
    assert [row[:2] for row in rows] == [("LinfPGD", "2"), ("LinfPGD", "8"), ("OrthoPGD", "2"), ("OrthoPGD", "8")]
    cosines = [float(row[3]) for row in rows]
    assert min(cosines[:2]) > 1e-2
    assert max(cosines[2:]) <= 1e-6
    # The two are as strong as each other, to within three images of 20.
    assert all(abs(int(a[2]) - int(b[2])) <= 15 for a, b in zip(rows[:2], rows[2:], strict=True))


def test_foolbox_users_says_how_many_lines_are_new():
    text = (EXAMPLES / "foolbox_users.py").read_text(encoding="utf-8")
    assert text.count("# new\n") == 5


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [1, 3])
def test_adversarial_training_makes_a_model_robust(capsys, monkeypatch, epochs):
    pytest.importorskip("sklearn", reason="needs scikit-learn, for its digits")
    out = printed("adversarial_training.py", capsys, monkeypatch, "--epochs", str(epochs))
    rows = [tuple(map(float, row)) for row in re.findall(r"^ +\d +([\d.]+)% +([\d.]+)% +([\d.]+)%$", out, re.M)]
    assert len(rows) == 2 * epochs
    standard, adversarial = rows[:epochs], rows[epochs:]
    assert min(standard[-1][0], adversarial[-1][0]) > (80 if epochs == 3 else 65)  # clean
    for attack in (1, 2):
        assert epochs == 1 or adversarial[-1][attack] > adversarial[0][attack] + 5
        assert adversarial[-1][attack] > standard[-1][attack] + (15 if epochs == 3 else 7)


EXECUTE = """
import sys
import nbformat
from nbclient import NotebookClient

source, folder, out = sys.argv[1:]
notebook = nbformat.read(source, as_version=4)
for cell in notebook.cells:
    if cell.cell_type == "code":
        cell.outputs = []
NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder}}).execute()
nbformat.write(notebook, out)
"""


def kinds(notebook: Path) -> list[list[list[str]]]:
    """What each cell has put out."""
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    return [[sorted(output.get("data", {"text": None})) for output in cell.get("outputs", [])] for cell in cells]


def test_the_notebooks_stored_pictures_are_small():
    path = EXAMPLES / "pictures.ipynb"
    assert path.stat().st_size < 200_000
    assert sum("image/png" in kind for cell in kinds(path) for kind in cell) == 4


@pytest.mark.slow
def test_the_notebook_runs_and_shows_what_is_stored(tmp_path):
    for package in ("nbformat", "nbclient", "ipykernel"):
        pytest.importorskip(package, reason="needs the packages nbclient and ipykernel")
    path, out = EXAMPLES / "pictures.ipynb", tmp_path / "executed.ipynb"
    # In a process of its own: the tests' warnings, which are errors, are not Jupyter's.
    command = [sys.executable, "-c", EXECUTE, str(path), str(EXAMPLES), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert kinds(path) == kinds(out), "jupyter execute --inplace examples/pictures.ipynb"


@pytest.mark.slow
def test_own_attacks(capsys, monkeypatch):
    rows = re.findall(
        r"(\w+) +scope=(\w+) +(\d) of 4 fooled, median norm ([\d.]+)/255, .* most (\S+)$",
        printed("own_attacks.py", capsys, monkeypatch),
        re.M,
    )
    assert [row[:2] for row in rows] == [
        (name, scope) for name in ("DIFGSM", "TIFGSM", "VMIFGSM", "FMN") for scope in ("None", "image")
    ]
    assert all(float(row[4]) <= 1e-6 for row in rows[1::2])
    assert all(int(row[2]) == 4 and float(row[3]) < 8 for row in rows[-2:])  # FMN, whose norm nothing limits
    assert all(int(row[2]) >= 1 and float(row[3]) <= 8.01 for row in rows[:-2])


def test_attack_template(capsys, monkeypatch):
    rows = re.findall(r"^(\w+) AttackResult: (\d+) of 16 .* at most (\S+);$",
                      printed("attack_template.py", capsys, monkeypatch), re.M)  # fmt: skip
    assert [row[0] for row in rows] == ["MyAttack", "OrthoMyAttack"]
    assert all(int(row[1]) > 8 for row in rows)
    assert float(rows[0][2]) > 1e-3
    assert float(rows[1][2]) <= 1e-6


def test_the_pictures_of_a_run_are_verified_without_the_package(capsys, monkeypatch, tmp_path):
    """tests/eval/running/test_levels.py changes a pixel, which it then finds."""
    evaluated(tmp_path, ["OrthoPGD"], levels=256)
    out = printed("verify_pngs.py", capsys, monkeypatch, str(tmp_path))
    assert len(re.findall(r"^OrthoPGD \d+-\d+: max \|delta\| [0-8], product 0$", out, re.M)) == 9

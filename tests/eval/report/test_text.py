from __future__ import annotations

import csv
import io
import json
import re
from importlib.metadata import version

import pytest

from orthattack.eval.report import table as tables
from orthattack.eval.report.text import compare, leaderboard_table, markdown, write_report
from orthattack.eval.results.stored_run import WORST, Run
from tests.eval.synthetic import ATTACKS, EPS, make_run
from tests.eval.tiny import evaluated

CHECKS = [
    {"model": "standard", "check": "more steps", "status": "passed", "figures": "1", "why": "no fall"},
    {
        "model": "robust",
        "check": "black box",
        "status": "warned",
        "figures": "2",
        "why": "Square is stronger; " + ("and so on " * 20).strip(),
    },
]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Run:
    path = tmp_path_factory.mktemp("report") / "run"
    make_run(path, checks=CHECKS, warnings=["2 images were left out"])
    return Run.open(path)


def block(text: str, model: str) -> list[str]:
    """The lines of a model's table."""
    lines = text[text.index(f"\n{model}: ") :].splitlines()
    lines = lines[next(k for k, line in enumerate(lines) if line.startswith("---")) + 1 :]
    return lines[: lines.index("")]


def test_the_terminal_table_says_what_the_leaderboard_says(run):
    text = leaderboard_table(run)
    assert max(map(len, text.splitlines())) <= 100
    assert text.startswith("6 attacks, norm linf, eps 2/255, 4/255, 8/255\n")
    table = run.table()
    for model in run.models:
        rows = table[table["model"] == model].to_dict("records")
        lines = block(text, model)
        assert len(lines) == len(rows) == 3 * 7
        for line, row in zip(lines, rows, strict=True):
            low, high = 100 * row["robust_accuracy_low"], 100 * row["robust_accuracy_high"]
            assert row["attack"] in line
            assert f" {row['scored']} " in line
            assert f"{100 * row['robust_accuracy']:.1f} % [{low:.1f}, {high:.1f}]" in line
            assert f"{100 * row['success_rate']:.1f} %" in line
        assert lines[0].startswith("2/255 ")
        assert lines[1].startswith(" ")  # a radius is named once
        assert WORST in lines[6]
    assert re.search(r"standard: clean accuracy \d+\.\d % \[\d+\.\d, \d+\.\d\] of 58 images", text)


def test_the_terminal_tells_what_was_left_out_and_what_to_beware_of(run):
    text = leaderboard_table(run)
    assert "left out of standard by FGSM: 4 x error: RuntimeError: out of memory" in text
    assert "left out of standard by every attack: 2 x unreadable: cannot identify image file" in text
    assert block(text, "standard")[0].endswith(" 7")
    assert "warning: 2 images were left out" in text
    whole = " ".join(text.split())
    assert "trust check warned, robust: black box: Square is stronger; " + ("and so on " * 20).strip() + ": 2" in whole
    assert "more steps" not in text
    for meaning in ("robust accuracy: ", "success: ", "worst case of all: ", "norm: ", "cos: "):
        assert f"\n{meaning}" in text


LONG = "torchattacks:PGD,steps=50,alpha=0.01,random_start=false,and_more_without_a_comma_for_eighty_columns_and_more"


@pytest.mark.parametrize("columns", [60, 80, 100, 140, 400])
def test_the_table_is_as_wide_as_the_terminal_and_breaks_labels_but_no_number(tmp_path, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    attacks = {"PGD": ATTACKS["PGD"], LONG: ("torchattacks", False, False, [], 1.5)}
    run = Run.open(
        make_run(tmp_path / "run", models=("m", "a" * 150), attacks=attacks, eps=(0.5,), n=12, stored=0).path
    )
    text = leaderboard_table(run)
    assert max(map(len, text[: text.index("\nrobust accuracy: ")].splitlines())) <= min(columns, 132)
    assert "a" * 150 in text.replace("\n", "")  # the model
    lines = block(text, "m")
    assert LONG in "".join(line[5:].split("  ")[0] for line in lines)
    row = run.table().to_dict("records")[0]
    known = tables.leaderboard(run.norm, [])
    more = ["mean_norm"] * (columns > 80) + ["seconds"] * (columns > 100)
    for key in ("robust_accuracy", "success_rate", "scored", *more):
        assert re.search(rf" {re.escape(known[key].cell(row))}( |$)", lines[0]), (key, lines[0])
    assert ("too narrow here for " in text) == (columns < 140)


def test_one_attack_has_no_worst_case(tmp_path):
    run = Run.open(make_run(tmp_path / "run", models=("m",), attacks={"PGD": ATTACKS["PGD"]}, stored=0).path)
    assert run.table()["attack"].tolist() == ["PGD", WORST] * len(EPS)
    for text in (leaderboard_table(run), markdown(run)):
        assert "worst case" not in text
        assert "PGD" in text


def test_a_run_in_two_norms_has_one_legend(tmp_path):
    folder = make_run(tmp_path / "run", models=("m",), attacks={"PGD": ATTACKS["PGD"], "L2": ATTACKS["FGSM"]}, stored=0)
    manifest = folder.manifest()
    manifest["attacks"][1]["norm"] = "l2"
    folder.write_manifest(manifest)
    run = Run.open(folder.path)
    text = leaderboard_table(run, run.in_norm("l2"))
    assert text.count("\nm: clean accuracy") == 2
    for meaning in ("robust accuracy: ", "success: ", "norm: ", "cos: "):
        assert text.count(f"\n{meaning}") == 1
    assert text.index("1 attack, norm l2") < text.index("\nrobust accuracy: ")


@pytest.mark.parametrize(("status", "limit", "share"), [("interrupted", 25, 42), ("running", 0, 0)])
def test_an_unfinished_run_says_how_much_is_done(tmp_path, monkeypatch, status, limit, share):
    monkeypatch.setenv("COLUMNS", "132")
    make_run(tmp_path / "run", status=status, limit=limit, models=("m",))
    run = Run.open(tmp_path / "run")
    expected = 60 * (5 * len(EPS) + 1)
    done = limit * (5 * len(EPS) + 1)
    assert leaderboard_table(run).startswith(
        f"{status.upper()}: {done:,} of {expected:,} results ({share} %); 6 attacks"
    )
    assert f"{status.upper()}: {done:,} of {expected:,}" in markdown(run)
    found = [path.name for path in write_report(run)]
    assert found == ["results.json", "classes.json", "confusion.json", "results.csv", "results.md", "report.html"]
    text = (tmp_path / "run" / "report.html").read_text("utf-8")
    assert f"{done:,} of {expected:,} results are there" in text
    if limit == 0:
        row = json.loads((tmp_path / "run" / "results.json").read_text())["table"][0]
        assert (row["scored"], row["robust_accuracy"], row["robust_accuracy_low"]) == (0, None, None)
        assert re.search(r"FGSM +0 +- +- +- +- +- +- +0", leaderboard_table(run))


def test_a_run_without_models_or_attacks_still_has_a_report(tmp_path):
    make_run(tmp_path / "run", models=(), attacks={}, status="running")
    run = Run.open(tmp_path / "run")
    assert leaderboard_table(run).startswith("RUNNING: 0 of 0 results; 0 attacks")
    assert len(write_report(run)) == 6


def test_the_files_hold_the_same_numbers(run):
    write_report(run)
    found = json.loads((run.folder.path / "results.json").read_text("utf-8"))
    table = run.table()
    assert found["status"] == "complete"
    assert found["results"] == found["expected"] == 2 * 60 * 16
    assert len(found["paired"]) == len(run.paired())
    assert found["optimality"][-1]["model"] is None
    assert found["checks"] == CHECKS
    assert found["manifest"]["config"]["norm"] == "linf"
    classes = json.loads((run.folder.path / "classes.json").read_text("utf-8"))
    assert len(classes) == 2 * 3 * 4 * 7
    assert {row["class"] for row in classes} == {"cat", "dog", "ship", "frog"}
    rows = list(csv.DictReader(io.StringIO((run.folder.path / "results.csv").read_text("utf-8"))))
    assert len(rows) == len(found["table"]) == len(table)
    for line, record, row in zip(rows, found["table"], table.to_dict("records"), strict=True):
        for key in ("model", "attack"):
            assert line[key] == record[key] == row[key]
        for key in ("eps", "robust_accuracy", "robust_accuracy_high", "success_rate", "scored"):
            assert float(line[key]) == record[key] == row[key]
    assert found["table"][6]["mean_norm"] is None  # the worst case of all has none


def test_the_markdown_is_tables_with_as_many_cells_as_heads(run):
    text = markdown(run)
    for table in re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE):
        lines = table.splitlines()
        assert len({line.replace("\\|", "").count("|") for line in lines}) == 1
        assert len(lines) > 2
    row = run.table().iloc[2]
    assert row["attack"] == "PGD"
    assert f"| 2/255 | PGD | {row['scored']} | {100 * row['robust_accuracy']:.1f} % [" in text
    assert "| 2/255 | standard | OrthoPGD | foolbox:LinfPGD | 58 |" in text
    assert "| MinimumNorm | global |" in text


def test_names_cannot_break_out_of_the_markdown_or_the_terminal(tmp_path):
    bad = "a|b`<img src=x onerror=alert(1)>`\n# [x](y) \x1b[31m"
    attacks = {bad: ATTACKS["FGSM"], "Ortho" + bad: ("orthattack", True, False, [bad], 1.5)}
    folder = make_run(tmp_path / "run", models=(bad,), attacks=attacks, n=10, classes=(bad, "other"), stored=0)
    run = Run.open(folder.path)
    text = markdown(run)
    assert "<img" not in text
    assert "\\|b\\`&lt;img" in text
    assert "[x](y)" not in text
    assert "\n# " not in text
    for line in text.splitlines():
        if line.startswith("|"):
            assert len(re.findall(r"(?<!\\)\|", line)) in (10, 11)
    shown = leaderboard_table(run)
    assert "\x1b" not in shown
    assert shown.isascii()
    assert max(map(len, shown.splitlines())) <= 100
    assert "\x1b" not in compare(run, run)


def test_a_comparison_reads_as_a_table_and_a_list(run, tmp_path):
    other = Run.open(make_run(tmp_path / "other", steps=20).path)
    text = compare(run, other)
    assert max(map(len, text.splitlines())) <= 100
    assert re.search(r"standard +\(clean\) +58 ", text)
    assert re.search(r"robust +OrthoPGD +8/255 +58 ", text)
    assert "  config.steps: 10 -> 20" in text
    assert "\n  nothing" in compare(run, run)


@pytest.mark.parametrize(
    "spoil",
    [
        None,
        lambda run: (run / "report.html").unlink(),
        lambda run: (run / "results.json").write_text("{"),
        lambda run: (run / "results.json").write_text(
            (run / "results.json").read_text().replace(version("orthattack"), "0")
        ),
        lambda run: next(run.glob("shards/**/*.parquet")).unlink(),
    ],
    ids=["nothing", "no report", "damaged", "another version", "a shard is gone"],
)
def test_a_finished_run_is_reported_again_only_where_something_changed(tmp_path, spoil):
    evaluated(tmp_path / "run", ["FGSM"], report=True)
    if spoil is not None:
        spoil(tmp_path / "run")
    mark, report = "<!-- as it was -->", tmp_path / "run" / "report.html"
    if report.exists():
        report.write_text(report.read_text() + mark)
    run = evaluated(tmp_path / "run", ["FGSM"], report=True)
    assert (mark in report.read_text()) == (spoil is None)
    assert run.status == "complete"
    assert json.loads((tmp_path / "run" / "results.json").read_text())["status"] == "complete"

"""The pages say what was measured, and nothing else; what is stored has one schema, and names that any system takes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from benchmarks import report, steps, timing
from benchmarks.__main__ import main
from benchmarks.stored import RESULTS, Stored, Table, keep, stored

ROOT = Path(__file__).parents[2]


def test_the_pages_have_the_stored_tables():
    content = report.tables()
    pages = {name: (ROOT / "docs" / name).read_text(encoding="utf-8") for name in report.PAGES}
    assert len(content) >= 4
    for page in pages.values():
        assert report.filled(page, content) == page
    for name in content:
        if name.startswith("steps/"):
            continue  # the summary has a line of each
        assert any(f"<!-- {name} -->" in page for page in pages.values()), f"no page has a place for {name}"


def test_every_result_lies_where_its_content_says():
    files = [path for path in RESULTS.rglob("*") if path.is_file() and path.parent.name != "study"]
    assert len(files) == len(stored()) >= 5
    for path in files:
        content = Stored.model_validate_json(path.read_text(encoding="utf-8"))
        assert path.relative_to(RESULTS).as_posix() == f"{content.what}/{content.machine}.json"
        assert len({table.name for table in content.tables}) == len(content.tables)
    for path in RESULTS.rglob("*"):
        assert re.fullmatch(r"[a-z0-9.-]+", path.name), path


@pytest.mark.parametrize(
    "wrong",
    [
        '{"what": "steps", "machine": "avx2"}',
        '{"what": "steps", "machine": "avx2", "tables": [], "more": 1}',
        '{"what": "s", "machine": "m", "tables": [{"name": "t", "hardware": "h", "versions": {}, "rows": [{"a": {}}]}'
        "]}",
        '{"what": "s", "machine": "m", "tables": [], "schema_version": 2}',
    ],
)
def test_a_file_of_another_schema_is_refused(tmp_path, wrong):
    path = tmp_path / "steps" / "avx2.json"
    path.parent.mkdir()
    path.write_text(wrong, encoding="utf-8")
    with pytest.raises(ValidationError):
        stored(tmp_path)


def test_a_new_measurement_replaces_its_own_table_only(tmp_path):
    keep("steps", "b", [{"ms": [1.0, 2.0]}], 1, tmp_path)
    keep("steps", "a", [{"ms": [3.0]}], 1, tmp_path)
    keep("steps", "b", [{"ms": [5.0]}], 1, tmp_path)
    (content,) = stored(tmp_path)
    assert [(table.name, table.rows) for table in content.tables] == [("a", [{"ms": [3.0]}]), ("b", [{"ms": [5.0]}])]
    assert set(content.tables[0].versions) == {"orthattack", "torch", "foolbox"}


def test_candidates_are_timed_in_turn():
    seen = []
    found = timing.side_by_side({name: lambda name=name: seen.append(name) for name in "AB"}, rounds=2, warm_up=1)
    assert seen == list("ABABAB")
    assert [len(times) for times in found.values()] == [2, 2]


@pytest.mark.usefixtures("bfloat16")
def test_the_candidates_run_and_leave_the_model_trainable():
    pytest.importorskip("torchattacks", reason="needs the extra torchattacks")
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.AvgPool2d(8), torch.nn.Flatten(), torch.nn.Linear(48, 5)).eval()
    images = steps.pictures(2, 32)
    labels = model(images).argmax(1)
    runs = steps.candidates(model, 2)
    assert len(runs) >= 14
    for run in runs.values():
        assert timing.seconds(lambda run=run: run(images, labels)) > 0
    assert all(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.slow
def test_a_table_from_the_command_line_reaches_the_page(tmp_path, capsys):
    assert main(["start", "--rounds", "1", "--units", "0", "--out", str(tmp_path)]) == 0
    assert "orthattack --help" in capsys.readouterr().out
    (name,) = report.tables(tmp_path)
    page = report.filled(f"<!-- {name} -->\n\nold\n\n<!-- /{name} -->\n", report.tables(tmp_path))
    assert "import torch" in page
    assert "old" not in page


def test_a_default_is_judged_by_how_far_it_is_behind_the_best_choice():
    def table(name: str, ce: float, margin: float) -> Table:
        row = {"form": "fixed", "steps": 10, "eps * 255": 4.0, "images": 50}
        rows = [row | {"loss": loss, "robust accuracy": value} for loss, value in (("ce", ce), ("margin", margin))]
        return Table(name=name, hardware="some", versions={}, rows=rows)

    text = report._defaults_summary([table("a", 40.0, 34.0), table("b", 20.0, 21.0)])
    assert "a (50 images, 4/255), b (50 images, 4/255)" in text
    assert re.search(r"ce +\| fixed +\| 6\.0 \(3\.0\)", text)
    assert re.search(r"margin +\| fixed +\| 1\.0 \(0\.5\)", text)

"""A run's files: whole or not there."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orthattack.eval.errors import EvaluationError
from orthattack.eval.storage import run_folder as store
from orthattack.eval.storage.run_folder import CLEAN_SCHEMA, ROW_SCHEMA, RunFolder, Shard

SHARD = Shard("model", "PGD", 4 / 255, 3)


def columns(schema, n=2, **values):
    return {name: [None] * n for name in schema.names} | {"position": list(range(n))} | values


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.create()
    folder.write_manifest({"config": {}})
    return folder


def test_rows_and_images_come_back_as_they_went(folder):
    images = {1: torch.rand(3, 4, 5), 0: torch.rand(3, 4, 5)}
    folder.write(SHARD, columns(ROW_SCHEMA, success=[True, None], l2=[0.5, float("nan")], name=["a", "ä"]), images)
    rows = folder.read("shards", "model", "PGD", 4 / 255)
    assert list(rows.columns) == ROW_SCHEMA.names
    assert rows["success"].tolist()[0] is True
    assert rows["success"].isna().tolist() == [False, True]
    assert rows["name"].tolist() == ["a", "ä"]
    assert folder.read("shards", "model", "PGD", 4 / 255, ["l2"]).columns.tolist() == ["l2"]
    back = dict(folder.images("model", "PGD", 4 / 255))
    assert back.keys() == images.keys()
    assert all(torch.equal(back[k], images[k]) for k in images)
    assert list(dict(folder.images("model", "PGD", 4 / 255, positions=[1]))) == [1]
    assert folder.is_done(SHARD, 2)


def test_chunks_are_read_in_order(folder):
    for chunk in (11, 2):
        folder.write(Shard("m", "clean", None, chunk, "clean"), columns(CLEAN_SCHEMA, position=[chunk, chunk]), {})
    assert folder.read("clean", "m")["position"].tolist() == [2, 2, 11, 11]


def test_what_is_not_there_is_empty_with_the_same_types(folder):
    rows = folder.read("shards", "nobody", "PGD", 0.1)
    assert rows.empty
    folder.write(SHARD, columns(ROW_SCHEMA), {})
    assert (rows.dtypes == folder.read("shards", "model", "PGD", 4 / 255).dtypes).all()
    assert list(folder.images("nobody", "PGD", 0.1)) == []


def test_a_write_that_fails_leaves_nothing(folder, monkeypatch):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(store.pq, "write_table", full)
    with pytest.raises(OSError, match="No space"):
        folder.write(SHARD, columns(ROW_SCHEMA), {})
    assert not folder.is_done(SHARD, 2)
    assert [path.name for path in folder.path.rglob("*") if path.is_file()] == ["manifest.json"]


@pytest.mark.parametrize("damage", [lambda data: data[:-9], lambda data: b"", lambda data: b"x" * len(data)])
def test_a_damaged_shard_is_put_aside_and_made_again(folder, damage):
    folder.write(SHARD, columns(ROW_SCHEMA), {})
    path = folder.path / SHARD.path
    path.write_bytes(damage(path.read_bytes()))
    assert not folder.is_done(SHARD, 2)
    assert not path.exists()
    assert path.with_suffix(".damaged").exists()
    assert "was damaged" in folder.notes[0]


def test_a_shard_of_another_length_is_not_done(folder):
    folder.write(SHARD, columns(ROW_SCHEMA), {})
    assert not folder.is_done(SHARD, 3)


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(EvaluationError, match="is not empty and not the folder of a run; choose another"):
        RunFolder(tmp_path).create()
    with pytest.raises(EvaluationError, match=r"is not the folder of a run: no readable manifest\.json"):
        RunFolder(tmp_path).manifest()
    (tmp_path / "file").touch()
    with pytest.raises(EvaluationError, match="could not make the run folder"):
        RunFolder(tmp_path / "file" / "run").create()


def test_another_format_is_refused(folder):
    (folder.path / "manifest.json").write_text(json.dumps({"format": 99}))
    with pytest.raises(EvaluationError, match="has format 99; this version reads format 1"):
        folder.manifest()


def test_checks_do_not_overwrite_the_run(folder):
    folder.write(SHARD, columns(ROW_SCHEMA), {0: torch.zeros(3, 2, 2)})
    folder.write(Shard("model", "PGD", 4 / 255, 3, "checks"), columns(ROW_SCHEMA), {0: torch.ones(3, 2, 2)})
    assert float(dict(folder.images("model", "PGD", 4 / 255))[0].sum()) == 0
    assert float(dict(folder.images("model", "PGD", 4 / 255, kind="checks"))[0].sum()) == 12


labels = st.text(min_size=1, max_size=80)


@given(labels, labels, labels, labels)
def test_any_label_has_a_file_of_its_own_inside_the_folder(model, attack, other_model, other_attack):
    one, two = (Shard(*pair, 0.1, 0) for pair in ((model, attack), (other_model, other_attack)))
    assert (one.path == two.path) == ((model, attack) == (other_model, other_attack))
    for path in (one.path, one.image_path, Shard(model, attack, None, 0, "clean").path):
        assert not path.is_absolute()
        assert ".." not in path.parts
        assert all(part and len(part) <= 80 and not part.startswith(".") for part in path.parts)
        assert (Path("/run") / path).resolve().is_relative_to("/run")


@pytest.mark.parametrize(
    ("eps", "norm", "shown"),
    [(4 / 255, "linf", "4/255"), (0.5 / 255, "linf", "0.5/255"), (0.5, "linf", "0.5"), (0.5, "l2", "0.5"),
     (None, "l2", "minimal")],
)  # fmt: skip
def test_radii_are_shown_as_people_write_them(eps, norm, shown):
    assert store.shown_eps(eps, norm) == shown

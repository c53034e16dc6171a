"""A run's files: whole or not there."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from orthattack.eval.errors import EvaluationError
from orthattack.eval.storage import run_folder as store
from orthattack.eval.storage.run_folder import RunFolder, Shard
from orthattack.eval.storage.schema import CLEAN_SCHEMA, ROW_SCHEMA

SHARD = Shard("model", "PGD", 4 / 255, 3)


def columns(schema, n=2, **values):
    own = {"position": list(range(n)), "label": [0] * n, "status": ["misclassified"] * n}
    return {name: [None] * n for name in schema.names} | own | values


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
        folder.write(
            Shard("m", "clean", None, chunk, "clean"), columns(CLEAN_SCHEMA, position=[2 * chunk, 2 * chunk + 1]), {}
        )
    assert folder.read("clean", "m")["position"].tolist() == [4, 5, 22, 23]


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
    [(4 / 255, "linf", "4/255"), (0.2, "linf", "0.2"), (0.5 / 255, "linf", "0.5/255"), (0.5, "linf", "0.5"),
     (0.5, "l2", "0.5"), (None, "l2", "minimal")],
)  # fmt: skip
def test_radii_are_shown_as_people_write_them(eps, norm, shown):
    assert store.shown_eps(eps, norm) == shown


def test_sessions_are_numbered_in_the_order_in_which_they_began(folder):
    for number in range(1, 4):
        name = folder.new_session_id("a host", 17)
        assert re.fullmatch(rf"0000{number}-a_host-[0-9a-f]{{8}}-17-[0-9a-f]{{6}}", name)
        folder.write_session({"id": name, "outcome": "killed", "warnings": ["twice", f"of {number}"]})
    (folder.path / "sessions" / "00009-x.json").write_text(json.dumps({"id": "9", "outcome": "x", "warnings": []}))
    (folder.path / "sessions" / "whole.lock").touch()
    (folder.path / "sessions" / ".00011-x.json.partial").touch()
    (folder.path / "sessions" / ".00012-x.json").touch()
    assert folder.new_session_id("host", 1).startswith("00010-host-1-")
    assert [session["id"][:5] for session in folder.sessions()] == ["00001", "00002", "00003", "9"]
    manifest = folder.manifest()
    assert manifest["warnings"] == ["twice", "of 1", "of 2", "of 3"]
    assert manifest["status"] == "interrupted"
    (folder.path / "sessions" / "00013-x.json").write_text("{")
    with pytest.raises(EvaluationError, match=r"sessions/00013-x\.json cannot be read"):
        folder.sessions()


@pytest.mark.parametrize(
    ("outcomes", "status"),
    [(["killed", "complete"], "complete"), (["complete", "running"], "complete"), (["killed", "running"], "running"),
     (["interrupted", "failed"], "interrupted")],
)  # fmt: skip
def test_the_status_of_a_run_is_that_of_its_sessions(folder, outcomes, status):
    folder.write_manifest({"status": "old", "sessions": [{"of": "an older version"}, {"id": "a copy"}]})
    assert folder.manifest()["status"] == "old"
    for k, outcome in enumerate(outcomes):
        folder.write_session({"id": f"0000{k}", "outcome": outcome, "warnings": []})
    assert folder.manifest()["status"] == status
    assert folder.manifest()["sessions"][0] == {"of": "an older version"}
    assert [session.get("id") for session in folder.manifest()["sessions"]] == [None, "00000", "00001"]


def test_a_manifest_is_created_once(folder):
    assert not folder.create_manifest({"another": 1})
    assert folder.manifest() == {"format": 1, "config": {}}
    (folder.path / "manifest.json").unlink()
    assert not folder.exists
    assert folder.create_manifest({"another": 1})
    assert folder.manifest() == {"format": 1, "another": 1}
    (folder.path / "manifest.json").write_text("[1]")
    with pytest.raises(EvaluationError, match="has format None; this version reads format 1"):
        folder.manifest()


def test_a_folder_in_which_another_process_just_begins_is_no_obstacle(tmp_path):
    (tmp_path / "sessions").mkdir()
    (tmp_path / ".manifest.json.0.partial").touch()
    RunFolder(tmp_path).create()
    (tmp_path / "other").touch()
    with pytest.raises(EvaluationError, match="is not empty"):
        RunFolder(tmp_path).create()
    (tmp_path / "manifest.json").write_text("{}")
    (tmp_path / "sessions" / "mine.txt").touch()
    with pytest.raises(EvaluationError, match=r"holds what no run writes \(other, sessions/mine.txt\): move it, or"):
        RunFolder(tmp_path).create()
    (tmp_path / "other").unlink()
    (tmp_path / "sessions" / "mine.txt").unlink()
    RunFolder(tmp_path).create()
    with pytest.raises(EvaluationError, match="could not make the run folder"):
        RunFolder("a\0b").create()


def test_texts_of_a_run(folder):
    assert folder.read_text("a.txt") is None
    assert folder.write_text("a.txt", "ä\udc80") == folder.path / "a.txt"
    assert folder.read_text("a.txt") == "ä\\udc80"
    assert str(folder) == str(folder.path)
    store_folder = RunFolder("memory://bucket/texts")
    assert store_folder.path is None
    assert store_folder.write_text("a.txt", "b") == "memory://bucket/texts/a.txt"


def test_finished_chunks_are_those_whose_files_are_whole(folder):
    shards = [Shard("m", "PGD", 0.1, chunk) for chunk in range(4)]
    for shard in shards[:3]:
        folder.write(shard, columns(ROW_SCHEMA), {0: torch.zeros(3, 1, 1)})
    (folder.path / shards[0].path).with_name("notes.parquet").touch()
    (folder.path / shards[0].path).with_name(".000007.parquet.x.partial").touch()
    assert folder.there(shards[3]) == {0, 1, 2}
    assert folder.done(shards[3], {0: 2, 1: 3, 3: 2}) == {0}
    assert folder.there(shards[3]) == {0, 2}
    assert folder.notes[0].startswith(f"{shards[1].path} was damaged (another number of rows, or other columns)")
    assert (folder.path / shards[1].path).with_suffix(".damaged").exists()
    assert not folder.is_done(shards[3], 2)
    assert folder.image_positions("m", "PGD", 0.1) == [0, 0, 0]


def test_in_a_store_what_is_there_is_finished():
    place = RunFolder("memory://bucket/finished")
    shard = Shard("m", "PGD", 0.1, 1)
    place.write(shard, columns(ROW_SCHEMA), {1: torch.ones(3, 1, 1)})
    assert place.is_done(shard, 99)
    assert not place.is_done(Shard("m", "PGD", 0.1, 2), 2)
    assert place.done(shard, {1: 99, 2: 2}) == {1}
    assert place.read_shard(shard)["position"].tolist() == [0, 1]
    assert [position for position, _ in place.images("m", "PGD", 0.1)] == [1]


def test_damage_that_a_report_meets_names_the_file_and_the_remedy(folder):
    folder.write(SHARD, columns(ROW_SCHEMA), {0: torch.zeros(3, 2, 2)})
    (folder.path / SHARD.path).write_bytes(b"x")
    with pytest.raises(EvaluationError, match=rf"{SHARD.path} is damaged .*: start the run again with the same"):
        folder.read("shards", "model", "PGD", 4 / 255)
    (folder.path / SHARD.image_path).write_bytes(b"x")
    with pytest.raises(EvaluationError, match=rf"{SHARD.image_path} is damaged .*: delete it, and the Parquet file"):
        list(folder.images("model", "PGD", 4 / 255))


def test_where_files_lie():
    assert SHARD.path == Path("shards/model/PGD/0.0156862745/000003.parquet")
    assert SHARD.image_path == Path("images/model/PGD/0.0156862745/000003.safetensors")
    assert Shard("m", "clean", None, 12, "clean").path == Path("clean/m/000012.parquet")
    assert Shard("m", "clean", None, 12, "clean").image_path == Path("images/m/clean/minimal/000012.safetensors")
    checks = Shard("m", "a b", None, 0, "checks")
    assert checks.path.parts[:2] == ("checks", "m")
    assert re.fullmatch(r"a_b-[0-9a-f]{8}", checks.path.parts[2])
    assert checks.path.parts[3:] == ("minimal", "000000.parquet")
    assert checks.image_path == checks.path.with_suffix(".safetensors")
    long = Shard("x" * 61, ".hidden", 1.0, 0).path.parts
    assert re.fullmatch(r"x{60}-[0-9a-f]{8}", long[1])
    assert re.fullmatch(r"hidden-[0-9a-f]{8}", long[2])
    assert Shard("x" * 60, "PGD-0123abcd", 1.0, 0).path.parts[1] == "x" * 60
    assert re.fullmatch(r"PGD-0123abcd-[0-9a-f]{8}", Shard("x", "PGD-0123abcd", 1.0, 0).path.parts[2])


def test_names_that_are_no_text_are_stored_as_text(folder):
    folder.write(SHARD, columns(ROW_SCHEMA, name=["a\udcff", "b"]), {})
    assert folder.read("shards", "model", "PGD", 4 / 255, ["name"])["name"].tolist() == ["a\\udcff", "b"]

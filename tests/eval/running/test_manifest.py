"""What a run says of itself, and when it may go on."""

from __future__ import annotations

import copy
import os
import platform
import re
from types import SimpleNamespace

import pytest
import torch

from orthattack.eval.errors import EvaluationError
from orthattack.eval.running import manifest as manifests
from orthattack.eval.running.manifest import (
    bury,
    describe_attacks,
    describe_model,
    hardware,
    new_session,
    now,
    to_go_on,
)
from orthattack.eval.storage.run_folder import RunFolder
from orthattack.eval.suite import make_suite

CPU = torch.device("cpu")
CONTENT = {
    "models": ["cifar10-robust"],
    "data": {"source": "cifar10-samples"},
    "eps": [0.02, 0.03],
    "attacks": [
        "PGD",
        "OrthoPGD",
        {"name": "MinimumNorm", "trials": 3},
        {"name": "OrthoFGSM", "norm": "l2", "eps": 1.5},
    ],
    "seeds": [0, 4],
}


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.create()
    return folder


def entries_of(**more):
    return make_suite({**CONTENT, **more}, "test").entries()


def test_attacks_are_listed_once_with_their_radii_and_baselines():
    suite = make_suite({key: value for key, value in CONTENT.items() if key != "seeds"}, "test")
    found = describe_attacks(suite.entries(), suite.baselines())
    assert [attack["label"] for attack in found] == ["PGD", "OrthoPGD", "MinimumNorm", "OrthoFGSM"]
    plain, ortho, minimal, other = found
    assert plain["name"] == "PGD"
    assert plain["source"] == "orthattack"
    assert (plain["norm"], plain["eps"], plain["seed"]) == ("linf", [0.02, 0.03], 0)
    assert (plain["orthogonal"], plain["scope"], plain["directions"], plain["minimal"]) == (False, None, [], False)
    assert plain["baselines"] == []
    assert (ortho["orthogonal"], ortho["scope"]) == (True, "image")
    assert ortho["baselines"] == ["PGD"]
    assert (minimal["eps"], minimal["minimal"]) == ([None], True)
    assert minimal["parameters"]["trials"] == 3
    assert (other["norm"], other["eps"], other["scope"]) == ("l2", [1.5], "image")


def test_baselines_are_of_the_same_seed():
    suite = make_suite(CONTENT, "test")
    found = {attack["label"]: attack for attack in describe_attacks(suite.entries(), suite.baselines())}
    seeded = [attack for attack in found.values() if attack["name"] == "OrthoPGD"]
    assert len(seeded) == 2
    for attack in seeded:
        assert [found[label]["seed"] for label in attack["baselines"]] == [attack["seed"]]


def test_a_model_is_described_with_its_data():
    model = SimpleNamespace(describe=lambda: {"sha256": "x", "classes": None})
    classes = SimpleNamespace(describe=lambda: {"sha256": "x", "classes": ["own"]})

    def data(count):
        return {"name": "some data", "images": count, "classes": ["a", "b"], "source": "here"}

    assert describe_model("m", model, data(3)) == {
        "label": "m", "sha256": "x", "class_names": ["a", "b"],
        "data": {"images": 3, "name": "some data", "source": "here"},
    }  # fmt: skip
    assert describe_model("m", classes, data(1))["class_names"] == ["own"]
    with pytest.raises(EvaluationError, match="some data has no images"):
        describe_model("m", model, data(0))


def test_a_session_says_when_where_and_with_what(folder):
    session = new_session(folder, entries_of(), CPU, ["eval", "x"], (2, 3))
    assert session["id"].startswith("00001-")
    assert (session["host"], session["process"]) == (platform.node(), os.getpid())
    assert (session["shard"], session["command"]) == ("2/3", ["eval", "x"])
    assert (session["outcome"], session["finished"]) == ("running", None)
    assert session["warnings"] == session["notes"] == []
    assert {"python", "orthattack", "torch", "torchvision", "foolbox", "numpy", "pillow"} == session["versions"].keys()
    assert session["versions"]["python"] == platform.python_version()
    assert session["versions"]["torch"] == torch.__version__.split("+")[0] or torch.__version__
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00", session["started"])
    assert now() >= session["started"]
    assert new_session(folder, entries_of(), CPU, [])["shard"] is None


def test_hardware_is_that_of_this_process():
    found = hardware(CPU)
    assert found["device"] == "cpu"
    assert found["threads"] == torch.get_num_threads()
    assert found["cores"] == os.cpu_count()
    assert found["processor"]
    assert "gpu" not in found


def test_a_processor_has_a_name_also_without_linux(monkeypatch):
    def missing(*_, **__):
        raise FileNotFoundError

    monkeypatch.setattr(manifests.Path, "read_text", missing)
    assert manifests._processor() == (platform.processor() or platform.machine())
    monkeypatch.setattr(
        manifests.Path, "read_text", lambda *_, **__: "a: b\nmodel name\t: Some: CPU \nmodel name: No\n"
    )
    assert manifests._processor() == "Some: CPU"


def test_only_sessions_that_the_lock_was_held_by_are_buried(folder):
    for k, (shard, outcome) in enumerate(
        [(None, "running"), ("1/2", "running"), ("2/2", "running"), (None, "complete")]
    ):
        folder.write_session({"id": f"0000{k}", "shard": shard, "outcome": outcome, "warnings": []})

    def outcomes():
        return [session["outcome"] for session in folder.sessions()]

    bury(folder, (2, 2))
    assert outcomes() == ["running", "running", "killed", "complete"]
    bury(folder, None)
    assert outcomes() == ["killed", "killed", "killed", "complete"]


def session_of(**more):
    versions = {"torch": "2.0", "numpy": "1"}
    computer = {"processor": "A", "threads": 2, "gpu": "G", "platform": "P"}
    return {
        "versions": versions,
        "hardware": computer,
        "warnings": [],
        "engine": None,
        "outcome": "x",
        "id": "1",
        **more,
    }


@pytest.fixture
def begun(folder):
    model = {"label": "m", "sha256": "x", "preprocessing": {"crop": 8}, "data": {"images": 3}}
    manifest = {"config": {"norm": "l2", "eps": [0.1]}, "models": [model], "attacks": []}
    folder.write_manifest(manifest)
    folder.write_session({**session_of(), "outcome": "killed"})
    return manifest


def going_on(folder, new, session):
    said = []
    found = to_go_on(folder, new, session, said.append)
    assert said == session["warnings"]
    return found, said


def test_the_same_run_goes_on_with_its_own_manifest(folder, begun):
    found, said = going_on(folder, {**begun, "more": 1}, session_of())
    assert found == folder.manifest()
    assert said == []


@pytest.mark.parametrize(
    ("change", "line"),
    [(lambda new: new["config"].update(eps=[0.2]), "eps"),
     (lambda new: new["models"][0].update(sha256="y"), "m: sha256"),
     (lambda new: new["models"][0].update(preprocessing={"crop": 9}), "m: preprocessing"),
     (lambda new: new["models"][0].update(data={"images": 4}), "m: data")],
)  # fmt: skip
def test_another_run_is_refused_with_what_differs(folder, begun, change, line):
    new = copy.deepcopy(begun)
    change(new)
    with pytest.raises(EvaluationError) as error:
        going_on(folder, new, session_of())
    head, *lines = str(error.value).split("\n  ")
    assert head == f"{folder} holds another run; choose another folder, or make these the same:"
    assert len(lines) == 1
    assert lines[0].startswith(line)


def test_a_run_that_was_begun_with_another_loss_and_other_steps_by_default_goes_on_with_those_alone(folder):
    def made(*attacks):
        suite = make_suite({**CONTENT, "attacks": attacks}, "test")
        return {
            "config": suite.config(), "models": [], "attacks": describe_attacks(suite.entries(), suite.baselines())
        }  # fmt: skip

    old = made("PGD", {"name": "MinimumNorm", "trials": 3}, "Square", "foolbox:LinfPGD")
    for attack in old["attacks"]:
        del attack["loss"], attack["schedule"]
    folder.write_manifest(old)
    folder.write_session({**session_of(), "outcome": "killed"})
    with pytest.raises(EvaluationError) as error:
        going_on(folder, made("PGD", {"name": "MinimumNorm", "trials": 3}, "Square", "foolbox:LinfPGD"), session_of())
    assert [line.split(": ", 1)[1] for line in str(error.value).split("\n  ")[1:]] == [
        "ce there, scaled-ce now", "fixed there, linear now",
    ] * 2  # fmt: skip
    then = {"loss": "ce", "schedule": "fixed"}
    minimum = {"name": "MinimumNorm", "trials": 3, **then}
    going_on(folder, made({"name": "PGD", **then}, minimum, "Square", "foolbox:LinfPGD"), session_of())


def test_a_run_that_was_begun_before_there_was_an_early_stop_goes_on_without_it(folder):
    def made(**more):
        suite = make_suite({**CONTENT, **more}, "test")
        attacks = describe_attacks(suite.entries(), suite.baselines())
        return {"config": suite.config(), "models": [], "attacks": attacks}

    old = made()
    del old["config"]["early_stop"]
    for attack in old["attacks"]:
        del attack["early_stop"]
    folder.write_manifest(old)
    folder.write_session({**session_of(), "outcome": "killed"})
    with pytest.raises(EvaluationError, match=r"make these the same:\n  early_stop: False there, True now$"):
        going_on(folder, made(), session_of())
    going_on(folder, made(early_stop=False), session_of())


def test_other_versions_and_hardware_are_said_and_noted(folder, begun):
    session = session_of(versions={"torch": "2.1", "numpy": "1", "new": "3"})
    assert going_on(folder, begun, session)[1] == [
        "continued with other versions: torch 2.0 then, 2.1 now, new None then, 3 now; results may differ in their "
        "last digits"
    ]
    session = session_of(hardware={"processor": "B", "threads": 1, "gpu": "G", "platform": "Q"})
    assert going_on(folder, begun, session)[1] == [
        "continued on other hardware: processor A then, B now, threads 2 then, 1 now; results may differ in their last "
        "digits"
    ]
    session = session_of(hardware={"processor": "B", "threads": 1}, engine="ray")
    assert going_on(folder, begun, session)[1] == []
    folder.write_session({**session_of(), "outcome": "killed", "engine": "ray"})
    session = session_of(hardware={"processor": "B", "threads": 1, "gpu": "H"})
    assert going_on(folder, begun, session)[1] == []


def test_other_random_numbers_are_said_and_noted_where_an_attack_of_ours_may_draw_them(folder, begun):
    def with_attack(source):
        return {**begun, "attacks": [{"label": "a", "source": source, "scope": None}]}

    ours, foreign, session = with_attack("orthattack"), with_attack("foolbox"), session_of(random_numbers="others")
    folder.write_manifest(ours)
    (warning,) = going_on(folder, ours, session)[1]
    assert warning.startswith("continued with other random numbers than the run was begun with: random starts of what")
    folder.write_manifest(foreign)
    assert going_on(folder, foreign, session_of(random_numbers="others"))[1] == []
    folder.write_manifest(ours)
    folder.write_session({**session_of(random_numbers="others"), "outcome": "killed"})
    assert going_on(folder, ours, session_of(random_numbers="others"))[1] == []


def test_the_last_session_is_what_is_compared(folder, begun):
    folder.write_session({**session_of(versions={"torch": "2.1", "numpy": "1"}), "id": "2"})
    session = session_of(versions={"torch": "2.1", "numpy": "1"})
    assert going_on(folder, begun, session)[1] == []


@pytest.mark.parametrize("lacks", [{"models": None}, {"models": 3}, {"models": [{}]}])
def test_a_manifest_that_lacks_something_is_no_run_to_go_on_with(folder, begun, lacks):
    folder.write_manifest({**begun, **lacks})
    with pytest.raises(EvaluationError, match=r"lacks what a run needs to go on .*; choose another folder"):
        going_on(folder, begun, session_of())


def test_a_run_of_an_attack_whose_name_is_another_s_now_is_not_continued(folder, begun):
    """MinimumNorm without options was a bisection of OrthoPGD once."""
    begun = {**begun, "attacks": [{"label": "MinimumNorm", "scope": "image"}]}
    folder.write_manifest(begun)
    assert going_on(folder, begun, session_of())[0]["attacks"] == begun["attacks"]
    with pytest.raises(EvaluationError, match=r"holds another run(.|\n)*MinimumNorm: .*scope"):
        going_on(folder, {**begun, "attacks": [{"label": "MinimumNorm", "scope": None}]}, session_of())

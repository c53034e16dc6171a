"""The evaluation as a function: names or objects, the same run either way."""

from __future__ import annotations

import subprocess
import sys

import pandas as pd
import pytest
import torch

from orthattack import OrthoPGD
from orthattack.eval import Run, evaluate, load
from orthattack.eval.data.load import load_dataset
from orthattack.eval.errors import EvaluationError
from orthattack.eval.models.load import load_classifier
from orthattack.eval.results.stored_run import WORST

FEW = {"source": "cifar10-samples", "limit": 4}
OPTIONS = {"eps": 8 / 255, "steps": 2, "progress": False, "checks": False}


@pytest.fixture(scope="module")
def by_name(tmp_path_factory) -> Run:
    path = tmp_path_factory.mktemp("api") / "run"
    return evaluate("cifar10-robust", FEW, ["OrthoPGD", "foolbox:LinfPGD"], out=path, **OPTIONS)


def test_names_give_a_run_with_a_table_and_a_report(by_name):
    assert by_name.status == "complete"
    table = by_name.table()
    assert isinstance(table, pd.DataFrame)
    assert table["attack"].tolist() == ["OrthoPGD", "foolbox:LinfPGD", WORST]
    assert (table["scored"] == 4).all()
    assert (by_name.folder.path / "report.html").exists()


def test_load_gives_the_tensors_that_the_evaluation_uses():
    classifier = load_classifier("cifar10-robust")
    dataset = load_dataset("cifar10-samples", classifier)
    (batch,) = dataset.limited(3).batches(3, classifier.preprocessing)
    for model, data in (("cifar10-robust", "cifar10-samples"), (classifier, dataset)):
        module, images, labels = load(model, data, limit=3)
        assert not module.training
        assert torch.equal(images, batch.images)
        assert torch.equal(labels, batch.labels)
    assert load(classifier, dataset)[1].shape == (20, 3, 32, 32)


def test_load_names_an_image_that_cannot_be_read(tmp_path):
    (tmp_path / "0").mkdir()
    (tmp_path / "0" / "bad.png").write_bytes(b"no image")
    csv = tmp_path / "labels.csv"
    csv.write_text("file,label\n0/bad.png,3\n", encoding="utf-8")
    classifier = load_classifier("cifar10-robust")
    with pytest.raises(EvaluationError, match=r"0/bad\.png: .*; take it out"):
        load(classifier, load_dataset(str(tmp_path), classifier, labels=csv))


def test_objects_give_the_same_rows(by_name, tmp_path):
    classifier = load_classifier("cifar10-robust")
    dataset = load_dataset("cifar10-samples", classifier).limited(4)
    run = evaluate(
        {"cifar10-robust": classifier},
        dataset,
        {"OrthoPGD": "OrthoPGD", "mine": lambda model, eps, steps: OrthoPGD(model, eps=eps, steps=steps)},
        out=tmp_path / "run",
        report=False,
        **OPTIONS,
    )
    ours, theirs = (r.rows("cifar10-robust", "OrthoPGD", 8 / 255).drop(columns="seconds") for r in (run, by_name))
    pd.testing.assert_frame_equal(ours, theirs, check_exact=True)
    mine = run.rows("cifar10-robust", "mine", 8 / 255)
    assert mine["status"].tolist() == ours["status"].tolist()
    assert (mine["cosine"].dropna().abs() <= 1e-6).all()
    assert not (tmp_path / "run" / "report.html").exists()
    assert run.attacks["mine"]["source"] == "user"


def test_the_same_call_goes_on_and_another_is_refused(by_name):
    again = evaluate("cifar10-robust", FEW, ["OrthoPGD", "foolbox:LinfPGD"], out=by_name.folder.path, **OPTIONS)
    assert len(again.manifest["sessions"]) == len(by_name.manifest["sessions"]) + 1
    with pytest.raises(EvaluationError, match="steps: 2 there, 3 now"):
        evaluate(
            "cifar10-robust", FEW, ["OrthoPGD", "foolbox:LinfPGD"], out=by_name.folder.path, **{**OPTIONS, "steps": 3}
        )


def test_what_does_not_fit_is_refused(tmp_path):
    with pytest.raises(EvaluationError, match=r"a model at hand must be an orthattack\.eval\.models\.Classifier"):
        evaluate([torch.nn.Flatten()], FEW, ["FGSM"], out=tmp_path / "r", **OPTIONS)
    with pytest.raises(EvaluationError, match=r"evaluate: stepz: unknown key; did you mean steps\?"):
        evaluate("cifar10-robust", FEW, ["FGSM"], out=tmp_path / "r", stepz=3, **OPTIONS)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        __import__("orthattack.eval", fromlist=["nothing"]).nothing  # noqa: B018


def test_importing_the_package_is_cheap():
    code = "import sys, orthattack.eval; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "False\n"

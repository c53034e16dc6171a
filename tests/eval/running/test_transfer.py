"""The matrix of sources and targets, against what the models themselves say of the images that are kept."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from scipy.stats import binomtest
from torch import nn

from orthattack.eval import evaluate, transfer
from orthattack.eval.errors import EvaluationError
from orthattack.eval.models.classifier import Classifier
from orthattack.eval.models.preprocessing import Preprocessing
from orthattack.eval.report.text import transfer_table
from orthattack.eval.results.stored_run import Run
from orthattack.eval.running.transfer import _resized
from orthattack.eval.storage.run_folder import RunFolder
from tests.eval.tiny import CLASSES, COUNT, EPS, SIZE, Net, classifier, dataset, evaluated

LARGE = 12  # pixels of the input of another target


def near(seed: int) -> Net:
    """A net that agrees with `Net(0)` on most images, and not on all adversarial ones."""
    net, generator = Net(0), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return net


PAIR = {"a": classifier(Net(0), "a"), "b": classifier(near(1), "b")}


class Larger(nn.Module):
    """A net of the same classes for larger images."""

    def __init__(self) -> None:
        super().__init__()
        self.net = near(2)

    def forward(self, images):
        return self.net(nn.functional.adaptive_avg_pool2d(images, SIZE))


def made(path, models=None, **more):
    """A run of two attacks at two radii."""
    options = {"eps": [EPS, 2 * EPS], "steps": 2, "batch_size": 4, "shard_size": 6, "save_images": "all"}
    options |= {"checks": False, "progress": False, "report": False, **more}
    return evaluate(PAIR if models is None else models, dataset(), ["PGD", "OrthoPGD"], out=path, **options).folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = made(tmp_path_factory.mktemp("transfer") / "run")
    larger = Classifier("larger", Larger().eval(), Preprocessing(LARGE, LARGE), None, CLASSES, "here")
    transfer(folder.path, PAIR | {"larger": larger}, progress=False)
    return folder


@pytest.mark.parametrize(("target", "size"), [("a", SIZE), ("b", SIZE), ("larger", LARGE)])
def test_a_rate_is_of_the_images_that_both_models_classify_correctly(folder, target, size):
    run = transfer(folder.path, {}, progress=False, report=False)
    model = Larger().eval() if target == "larger" else PAIR[target].model
    labels = torch.tensor(dataset().labels)

    def predicted(net, images, pixels):
        with torch.no_grad():
            return {k: int(net(_resized(image, pixels)[None]).argmax()) for k, image in images.items()}

    table = run.transfer()
    assert len(table) == 2 * 2 * 2 * 3  # attacks, radii, sources, targets
    for row in table[table["target"] == target].to_dict("records"):
        source, attack, eps = row["source"], row["attack"], row["eps"]
        clean = dict(run.folder.images(source, "clean", None))
        adversarial = dict(run.folder.images(source, attack, eps))
        there, here = predicted(PAIR[source].model, clean, SIZE), predicted(model, clean, size)
        both = [k for k in clean if there[k] == here[k] == labels[k]]
        fooled = sum(found != labels[k] for k, found in predicted(model, adversarial, size).items() if k in both)
        assert (row["n"], row["fooled"]) == (len(both), fooled)
        if both:
            low, high = binomtest(int(fooled), len(both)).proportion_ci(0.95, "wilson")
            assert (row["success_rate_low"], row["success_rate_high"]) == pytest.approx((low, high), abs=1e-9)
    assert table["n"].max() == COUNT - 1
    across = table[table["source"] != table["target"]]
    assert across["n"].max() > across["fooled"].max() > 0


@pytest.mark.slow
def test_the_report_the_files_and_the_terminal_have_the_matrix(folder):
    run = transfer(folder.path, {}, progress=False)
    found = json.loads(folder.read_text("results.json"))["transfer"]
    assert [row["n"] for row in found] == run.transfer()["n"].tolist()
    assert "## Transfer" in folder.read_text("results.md")
    page = folder.read_text("report.html")
    assert page.count('<table class="matrix">') == 4
    assert transfer_table(run).count("larger") == 8


@pytest.mark.slow
def test_what_is_judged_is_not_judged_again_and_what_is_lost_is(tmp_path):
    folder = made(tmp_path / "run")
    whole = transfer(folder.path, PAIR, progress=False, report=False).transfer()
    files = sorted((folder.path / "transfer").rglob("*.parquet"))
    assert len(files) == 2 * 2 * 2 * 2  # pairs, attacks, radii, chunks
    before = {path: path.stat().st_mtime_ns for path in files}
    files[3].unlink()
    again = transfer(folder.path, PAIR, progress=False, report=False).transfer()
    assert whole.equals(again)
    assert [path for path in files if path.stat().st_mtime_ns != before[path]] == [files[3]]
    made(folder.path)  # the run takes it for its own
    assert Run.open(folder.path).transfer().equals(whole)


@pytest.mark.slow
def test_to_fool_is_to_be_taken_for_any_class_in_a_targeted_run_too(tmp_path):
    folder = made(tmp_path / "run", targets="random")
    table = transfer(folder.path, PAIR, progress=False, report=False).transfer()
    for row in table[table["source"] == table["target"]].to_dict("records"):
        rows = folder.read("shards", row["source"], row["attack"], row["eps"])
        rows = rows[rows["status"] == "ok"]
        assert (row["n"], row["fooled"]) == (len(rows), (rows["adversarial_prediction"] != rows["label"]).sum())


def test_without_targets_there_is_no_matrix(tmp_path):
    run = evaluated(tmp_path / "run", ["FGSM"])
    assert run.transfer().empty
    assert list(run.transfer().columns)[:6] == ["attack", "eps", "source", "target", "n", "fooled"]


def test_what_cannot_be_judged_is_refused_with_a_remedy(tmp_path, folder):
    with pytest.raises(EvaluationError, match=r"b is not the model that has this name in .* give it another label"):
        transfer(folder.path, {"b": classifier(Net(4), "b")}, progress=False)
    with pytest.raises(EvaluationError, match="larger is not the model that has this name"):
        transfer(folder.path, {"larger": classifier(Net(4), "larger")}, progress=False)
    fewer = replace(classifier(nn.Sequential(Net(0), nn.Linear(CLASSES, 3)), "few"), num_classes=0)
    with pytest.raises(EvaluationError, match="few has 3 classes and a 5: it cannot judge its images"):
        transfer(folder.path, {"few": fewer}, progress=False)
    none = made(tmp_path / "none", save_images="none")
    with pytest.raises(EvaluationError, match=r"has kept no images: run it again with .*--save-images all"):
        transfer(none.path, PAIR, progress=False)
    none.write_session({**none.sessions()[-1], "outcome": "interrupted"})
    with pytest.raises(EvaluationError, match="is interrupted: complete it first"):
        transfer(none.path, PAIR, progress=False)


def test_classes_of_another_name_are_refused(tmp_path):
    names = tuple("vwxyz")
    first = replace(classifier(Net(0), "a"), classes=names)
    folder = made(tmp_path / "run", {"a": first})
    other = replace(classifier(Net(1), "b"), classes=("v", "x", "w", "y", "z"))
    with pytest.raises(EvaluationError, match="b has other classes than a: class 1 is 'x' and 'w'"):
        transfer(folder.path, {"b": other}, progress=False)


def test_damaged_records_are_named(tmp_path):
    folder = RunFolder(evaluated(tmp_path / "run", ["FGSM"]).folder.path)
    folder.write_text("transfer.json", '[{"label": 3}]')
    with pytest.raises(EvaluationError, match=r"transfer\.json cannot be read"):
        transfer(folder.path, {}, progress=False)

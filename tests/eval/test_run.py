from __future__ import annotations

import json
from importlib.metadata import version

import numpy as np
import pytest
import torch
from PIL import Image

from orthattack.eval import attacks as registry
from orthattack.eval.attacks import ATTACKS, CallCounter, Settings
from orthattack.eval.data import Photographs, load_photographs
from orthattack.eval.models import Classifier, load_classifier
from orthattack.eval.report import save_picture, table
from orthattack.eval.run import Evaluation, evaluate

EPS = 8 / 255


# AutoAttack and Square, with their thousands of calls, are tried on their own.
NAMES = [name for name in ATTACKS if not name.endswith(("AutoAttack", "Square"))]


@pytest.fixture(scope="module")
def pair() -> tuple[Classifier, Photographs]:
    classifier = load_classifier("cifar10-robust")
    return classifier, load_photographs("cifar10-samples", classifier)


@pytest.fixture(scope="module")
def evaluation(pair, tmp_path_factory) -> tuple[Evaluation, dict, list[dict]]:
    """All attacks on 20 photographs, in batches that do not divide them."""
    out = tmp_path_factory.mktemp("run")
    evaluation = evaluate([pair], NAMES, Settings(eps=EPS, steps=5), out=out, batch_size=8, progress=False)
    lines = [json.loads(line) for line in (out / "images.jsonl").read_text().splitlines()]
    return evaluation, json.loads((out / "results.json").read_text()), lines


def test_rows_agree_with_the_records_of_their_images(evaluation):
    _, results, lines = evaluation
    assert results["complete"] is True
    assert [row["attack"] for row in results["results"]] == NAMES
    for row in results["results"]:
        images = [line for line in lines if line["attack"] == row["attack"]]
        assert len(images) == row["images"] == 20
        right = np.array([i["clean_prediction"] == i["label"] for i in images])
        still = np.array([i["adversarial_prediction"] == i["label"] for i in images])
        assert row["clean_accuracy"] == pytest.approx(right.mean())
        assert row["robust_accuracy"] == pytest.approx((right & still).mean())
        assert row["attack_success_rate"] == pytest.approx((right & ~still).sum() / right.sum())
        assert row["mean_norm"] == pytest.approx(np.mean([i["norm"] for i in images]))
        assert row["max_norm"] <= EPS * (1 + 1e-6)
        assert row["max_abs_cosine"] == pytest.approx(max(i["abs_cosine"] for i in images))
        assert row["unscored"] == 0


def test_orthogonal_rows_are_orthogonal_and_the_others_are_not(evaluation):
    for row in evaluation[1]["results"]:
        exact = row["attack"].startswith("Ortho") and row["attack"] != "OrthoPGD-gradient"
        assert (row["max_abs_cosine"] <= 1e-6) == exact, row["attack"]


def test_calls_are_counted_alike_for_everyone(evaluation):
    calls = {row["attack"]: row["gradient_calls_per_image"] for row in evaluation[1]["results"]}
    assert calls == {name: 1 if name.removeprefix("Ortho") in ("FGSM", "Foolbox-FGSM") else 5 for name in NAMES}


def test_the_long_attacks_run_too(pair, tmp_path):
    classifier, photographs = pair
    names = ["OrthoAutoAttack", "OrthoSquare"]
    few = photographs.limited(2)
    evaluation = evaluate([(classifier, few)], names, Settings(eps=32 / 255, steps=3), out=tmp_path, progress=False)
    assert [result.errors for result in evaluation.results] == [[], []]
    assert all(max(result.cosine) <= 1e-6 for result in evaluation.results)


def test_our_fgsm_is_foolboxs(evaluation):
    _, _, lines = evaluation
    ours = [line["adversarial_prediction"] for line in lines if line["attack"] == "FGSM"]
    theirs = [line["adversarial_prediction"] for line in lines if line["attack"] == "Foolbox-FGSM"]
    assert np.mean(np.array(ours) == np.array(theirs)) >= 0.95  # ours keeps the better of the two iterates


def test_settings_and_versions_are_recorded(evaluation):
    _, results, _ = evaluation
    assert results["settings"] == {"norm": "linf", "eps": EPS, "steps": 5, "seed": 0}
    assert results["environment"]["torch"] == version("torch")
    assert results["models"][0]["weights"] == "bundled"
    assert results["models"][0]["preprocessing"]["crop"] == 32
    assert "right on the clean and on the adversarial image" in results["definitions"]


def test_the_table_says_it_all(evaluation):
    text = table(evaluation[0])
    lines = text.splitlines()
    assert lines[0].split()[:3] == ["model", "attack", "clean"]
    for result, line in zip(evaluation[0].results, lines[2:], strict=False):
        row = result.summary()
        low, high = row["robust_accuracy_interval"]
        assert line.split() == [
            *("cifar10-robust", row["attack"]),
            *(f"{100 * row['clean_accuracy']:.1f}", "%"),
            *(f"{100 * row['robust_accuracy']:.1f}", "%", f"[{100 * low:.1f},", f"{100 * high:.1f}]"),
            *(f"{100 * row['attack_success_rate']:.1f}", "%"),
            f"{255 * row['mean_norm']:.3f}/255",
            f"{row['mean_abs_cosine']:.1e}",
            f"{row['max_abs_cosine']:.1e}",
            f"{row['gradient_calls_per_image']:.3g}",
            f"{row['seconds']:.1f}",
        ]
        assert row["seconds"] > 0
    assert [result.attack for result in evaluation[0].results] == NAMES
    assert "20 images of cifar10-samples, L-infinity, eps 8/255, 5 steps, seed 0" in text
    assert "robust accuracy: right on the clean and on the adversarial image, over all images" in text
    assert "success: newly fooled, over the images that were right to begin with" in text
    assert max(map(len, lines)) <= 132


def test_the_picture_shows_the_examples(evaluation, tmp_path):
    examples = evaluation[0].examples
    assert len(examples) == 8
    assert all(example.attack == "OrthoPGD" for example in examples)
    assert examples[0].clean_prediction == examples[0].label != examples[0].adversarial_prediction
    fooled = [e.label for e in examples if e.clean_prediction == e.label != e.adversarial_prediction]
    several = len(set(fooled))
    assert several >= 2
    assert len(set(fooled[:several])) == several  # one of each class before a second of any
    save_picture(examples, tmp_path / "picture.png")
    picture = np.asarray(Image.open(tmp_path / "picture.png").convert("RGB"))
    assert picture.std() > 20


def test_names_in_pictures_are_text_not_formulas(evaluation, tmp_path):
    from dataclasses import replace

    examples = [replace(evaluation[0].examples[0], clean_prediction="$\\frac{", adversarial_prediction="<script>" * 9)]
    save_picture(examples, tmp_path / "picture.png")


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_run_repeats(pair, tmp_path, norm):
    settings = Settings(norm=norm, eps=EPS if norm == "linf" else 0.5, steps=3, seed=4)
    runs = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        state = torch.get_rng_state()
        evaluate([pair], ["PGD", "OrthoPGD", "Foolbox-PGD"], settings, out=tmp_path / name, progress=False)
        assert torch.equal(state, torch.get_rng_state())
        runs.append((tmp_path / name / "images.jsonl").read_text())
    assert runs[0] == runs[1]


def test_a_failing_attack_is_reported_and_left_out(pair, tmp_path, monkeypatch):
    def fails(model, settings):
        def run(images, labels):
            raise RuntimeError("out of ideas")

        return run

    def leaves(model, settings):
        return lambda images, labels: images + 1

    monkeypatch.setitem(registry.ATTACKS, "PGD", fails)
    monkeypatch.setitem(registry.ATTACKS, "FGSM", leaves)
    evaluation = evaluate([pair], ["PGD", "FGSM", "OrthoFGSM"], Settings(eps=EPS), out=tmp_path, progress=False)
    failed, outside, good = (result.summary() for result in evaluation.results)
    assert failed["unscored"] == outside["unscored"] == 20
    assert failed["robust_accuracy"] is failed["attack_success_rate"] is None
    assert good["images"] == 20
    text = table(evaluation)
    assert "PGD on cifar10-robust: 20 images not scored, left out (RuntimeError: out of ideas)" in text
    assert "FGSM on cifar10-robust: 20 images not scored, left out (returned images outside [0, 1])" in text


def test_an_attack_that_leaves_the_ball_is_exposed(pair, tmp_path, monkeypatch):
    monkeypatch.setitem(registry.ATTACKS, "PGD", lambda model, settings: lambda images, labels: 1 - images)
    evaluation = evaluate([pair], ["PGD"], Settings(eps=EPS), out=tmp_path, progress=False)
    assert "PGD on cifar10-robust leaves the eps-ball: largest norm 1" in table(evaluation)


def test_an_interrupted_run_keeps_what_it_measured(pair, tmp_path, monkeypatch):
    def impatient(model, settings):
        calls = []

        def run(images, labels):
            calls.append(1)
            if len(calls) == 2:
                raise KeyboardInterrupt
            return images

        return run

    monkeypatch.setitem(registry.ATTACKS, "PGD", impatient)
    evaluation = evaluate([pair], ["FGSM", "PGD"], Settings(eps=EPS), out=tmp_path, batch_size=5, progress=False)
    assert not evaluation.complete
    assert "INTERRUPTED: 10 images" in table(evaluation)
    assert "images" in table(evaluation).splitlines()[0].split()
    assert evaluation.examples
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["complete"] is False
    assert [row["images"] for row in results["results"]] == [10, 5]
    assert len((tmp_path / "images.jsonl").read_text().splitlines()) == 15


def test_the_counter_counts_samples():
    model = CallCounter(torch.nn.Flatten())
    x = torch.rand(3, 1, 2, 2)
    model(x)
    leaf = x.clone().requires_grad_()
    torch.autograd.grad(model(leaf).sum(), leaf)
    assert (model.forward_calls, model.gradient_calls) == (6, 3)

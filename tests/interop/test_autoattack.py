"""The official AutoAttack's names and arguments: the same calls, and attacks no weaker than its own."""

from __future__ import annotations

import logging

import pytest
import torch

from orthattack import alignment
from orthattack.interop.autoattack import AutoAttack
from tests.attacks.test_attacks import Recorder
from tests.attacks.test_fab import standing
from tests.attacks.test_family import RADII, sizes

pytestmark = pytest.mark.heavy

NORMS = {"Linf": "linf", "L2": "l2", "L1": "l1"}


def quick(adversary: AutoAttack) -> AutoAttack:
    for settings in (adversary.apgd, adversary.apgd_targeted, adversary.fab, adversary.square):
        settings.n_iter, settings.n_target_classes, settings.n_queries = 4, 2, 10
    return adversary


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("scope", [None, "image"])
def test_a_standard_evaluation_reports_what_the_model_says(norm, scope, capsys, tmp_path):
    model, images, labels = standing(12)
    eps, log = RADII[NORMS[norm]] / 2, tmp_path / "log.txt"
    adversary = quick(AutoAttack(model.train(), norm=norm, eps=eps, seed=0, log_path=log, scope=scope))
    assert adversary.attacks_to_run == ["apgd-ce", "apgd-t", "fab-t", "square"]
    assert adversary.apgd.n_restarts == (5 if norm == "L1" else 1)
    found, predicted = adversary.run_standard_evaluation(images, labels, bs=5, return_labels=True)
    assert model.training
    with torch.no_grad():
        assert torch.equal(predicted, model.eval()(found).argmax(1))
    assert torch.equal(found[0], images[0])
    assert (sizes(found - images, NORMS[norm]) <= eps * (1 + 1e-6)).all()
    if scope is not None:
        assert alignment(found.double() - images.double(), images.double()).abs().max() <= 1e-6
    robust = int((predicted == labels).sum())
    said = capsys.readouterr().out
    assert log.read_text(encoding="utf-8") == said
    lines = said.splitlines()
    assert lines[:2] == [
        "AutoAttack, version standard: apgd-ce, apgd-t, fab-t, square",
        "clean accuracy: 91.67% (11 of 12)",
    ]
    assert lines[-1] == f"robust accuracy: {robust / 12:.2%} ({robust} of 12)"
    after = [line for line in lines if line.startswith("robust accuracy after")]
    assert after[0].startswith("robust accuracy after APGD-CE: ")
    assert f"{robust / 12:.2%} ({robust} of 12, " in after[-1]
    assert any(line.startswith("apgd-ce, batch 1 of 3: ") for line in lines)
    again = quick(AutoAttack(model, norm=norm, eps=eps, seed=0, verbose=False, scope=scope))
    assert torch.equal(again.run_standard_evaluation(images, labels, bs=5), found)
    assert capsys.readouterr().out == ""


def test_each_part_alone_and_the_clean_accuracy(capsys):
    model, images, labels = standing(12)
    adversary = quick(AutoAttack(model, eps=0.02, seed=1, version="custom", attacks_to_run=["apgd-dlr", "fab"]))
    found = adversary.run_standard_evaluation_individual(images, labels, bs=50)
    assert list(found) == adversary.attacks_to_run == ["apgd-dlr", "fab"]
    lines = capsys.readouterr().out.splitlines()
    for (part, adversarials), line in zip(found.items(), lines, strict=True):
        with torch.no_grad():
            robust = int((model(adversarials).argmax(1) == labels).sum())
        assert line.startswith(f"robust accuracy by {part.upper()}: {robust / 12:.2%} ({robust} of 12, ")
    assert adversary.clean_accuracy(images, labels) == pytest.approx(11 / 12)
    assert capsys.readouterr().out == "clean accuracy: 91.67% (11 of 12)\n"


def test_settings_are_those_of_the_next_call():
    model, images, labels = standing(12)
    counted = Recorder(model)
    adversary = quick(AutoAttack(counted, eps=1e-7, seed=0, verbose=False))
    adversary.attacks_to_run = ["apgd-ce"]
    calls = []
    for restarts in (1, 3):
        adversary.apgd.n_restarts = restarts
        counted.seen.clear()
        adversary.run_standard_evaluation(images, labels)
        calls.append(len(counted.seen))
    assert calls[1] - calls[0] == 2 * 5  # four steps and the last point, for each start more
    adversary.set_version("rand")
    assert (adversary.attacks_to_run, adversary.apgd.eot_iter) == (["apgd-ce", "apgd-dlr"], 20)
    adversary.set_version("plus")
    assert (adversary.apgd.n_restarts, adversary.fab.n_restarts) == (5, 5)


def test_wrong_arguments_are_explained():
    model, images, labels = standing(12)
    for options, message in [
        ({"norm": "linf"}, "norm must be one of 'Linf', 'L2', 'L1'; got 'linf'"),
        ({"version": "best"}, r"version must be one of .*'custom'; got 'best'"),
        ({"version": "custom"}, "parts must be a list of one or more"),
        ({"attacks_to_run": ["fab"]}, "attacks_to_run needs version='custom'"),
        ({"is_tf_model": True}, "is_tf_model must be False"),
        ({"eps": -1}, "eps must be a finite number >= 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            AutoAttack(model, **options)
    with pytest.raises(ValueError, match="adversarials must lie in bounds"):
        AutoAttack(model, verbose=False).run_standard_evaluation(255 * images, labels)
    assert AutoAttack(model, seed=3).get_seed() == 3
    torch.manual_seed(0)
    first = AutoAttack(model).get_seed()
    assert first != AutoAttack(model).get_seed()


@pytest.mark.slow
@pytest.mark.parametrize("norm", NORMS)
def test_no_weaker_than_the_official_code(norm):
    theirs = pytest.importorskip("pyautoattack", reason="needs the official code: pip install pyautoattack --no-deps")
    logging.getLogger("auto-attack").setLevel(logging.ERROR)
    model, images, labels = standing(60)
    eps, kept = RADII[NORMS[norm]] / 4, []
    for kind, batch in ((theirs.AutoAttack, "batch_size"), (AutoAttack, "bs")):
        adversary = kind(model, norm=norm, eps=eps, seed=0)
        adversary.verbose = False
        for settings in (adversary.apgd, adversary.apgd_targeted, adversary.fab, adversary.square):
            settings.n_iter = settings.n_iter_orig = 20
        for settings in (adversary.apgd_targeted, adversary.fab):
            settings.n_target_classes = 4
        adversary.square.n_queries = 200
        found = adversary.run_standard_evaluation(images, labels, **{batch: 30})
        found = found[0] if isinstance(found, tuple) else found
        assert (sizes(found - images, NORMS[norm]) <= eps * (1 + 1e-4)).all()
        with torch.no_grad():
            kept.append(int((model(found).argmax(1) == labels).sum()))
    assert 0 < kept[0] < 59
    assert kept[1] <= kept[0]

"""Attacks that leave an image once it is fooled: the verdicts are those of all steps, and it is said."""

from __future__ import annotations

import pytest
from torch import nn

from orthattack.eval.attacks.load import attack_kind
from orthattack.eval.attacks.ours import OURS
from orthattack.eval.report.text import leaderboard_table, markdown, transfer_table
from orthattack.eval.results.stored_run import Run
from orthattack.eval.suite import make_suite
from tests.eval.tiny import EPS, Net, evaluated

FEW = {"Square": {"queries": 40}, "NES": {"queries": 200, "pairs": 5}, "SparseRS": {"queries": 40}}
FEW |= {f"Ortho{name}": options for name, options in FEW.items()}
STOPS = [name for name in OURS if attack_kind(name, dict(FEW.get(name, {}))).early_stop is None]
VERDICT = ["position", "status", "success", "clean_prediction"]


def both(path, attacks, **more):
    """The same run with and without an early stop."""
    runs = [evaluated(path / f"{early}", attacks, early_stop=early, **more) for early in (True, False)]
    return [(run, {a: run.rows(next(iter(run.models)), a, EPS) for a in run.attacks}) for run in runs]


def test_verdicts_are_those_of_all_steps_and_the_calls_are_fewer(tmp_path):
    attacks = [
        "FGSM", "PGD", {"name": "OrthoPGD", "label": "restarts", "restarts": 3}, {"name": "Square", "queries": 30},
        {"name": "PGD", "label": "all", "early_stop": False}, {"name": "MIFGSM", "keep": "last"}, "foolbox:LinfPGD",
    ]  # fmt: skip
    (run, early), (_, late) = both(tmp_path, attacks, eps=EPS, steps=4)
    stopped = {label for label, about in run.attacks.items() if about["early_stop"]}
    assert stopped == {"PGD", "restarts", "Square"}
    for label in early:
        if label in stopped:
            assert early[label][VERDICT].equals(late[label][VERDICT])
            few, many = (found[label]["forward_calls"].sum() for found in (early, late))
            assert few < many if early[label]["success"].any() else few == many
        else:
            assert early[label].drop(columns="seconds").equals(late[label].drop(columns="seconds"))
    fooled = early["restarts"]["success"].sum()
    assert 0 < fooled < early["restarts"]["success"].count()
    said = "early stop: norm, cos, grads and s of PGD, restarts, Square are those of each image's first success"
    assert said in " ".join(leaderboard_table(run).split())
    assert said in markdown(run)
    assert "early stop" not in leaderboard_table(Run.open(tmp_path / "False"))
    assert "transfers worse than after all steps" in " ".join(transfer_table(run).split())
    assert "worse" not in transfer_table(Run.open(tmp_path / "False"))


def test_which_attacks_can_stop_and_when_they_do():
    assert not {"FGSM", "OrthoFGSM", "AutoAttack", "FAB", "MinimumNorm", "Bisection"} & {*STOPS}
    assert {"PGD", "OrthoPGD", "APGD", "MIFGSM", "NIFGSM", "VMIFGSM", "Square", "NES", "SparseRS"} <= {*STOPS}
    evasion = attack_kind("DetectorEvasion", {"detector": len})
    assert evasion.early_stop is False
    assert attack_kind("DetectorEvasion", {"detector": len, "early_stop": True}).early_stop is True
    content = {"models": ["cifar10-robust"], "data": "cifar10-samples", "attacks": ["PGD"]}
    for more, stops in (
        ({}, True), ({"early_stop": False}, False), ({"save_images": "all"}, False),
        ({"attack_misclassified": True}, False), ({"save_images": "all", "early_stop": True}, True),
    ):  # fmt: skip
        (entry,) = make_suite({**content, **more}, "test").entries()
        assert entry.early_stop is stops


class Drawing(nn.Module):
    """A net that answers at random."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, images):
        logits = self.net(images)
        return logits + 0.3 * logits.std() * nn.functional.dropout(logits.new_ones(logits.shape), 0.5)


def test_of_a_model_that_draws_the_best_adversarial_is_kept(tmp_path):
    (_, early), (_, late) = both(tmp_path, ["PGD"], model=Drawing(), eps=EPS)
    assert early["PGD"].drop(columns="seconds").equals(late["PGD"].drop(columns="seconds"))


@pytest.mark.slow
@pytest.mark.parametrize(("model", "eps"), [("cifar10-robust", 8 / 255), ("cifar10-standard", 1 / 255)])
def test_on_a_trained_model_no_attack_of_ours_has_another_verdict(tmp_path, model, eps):
    from orthattack.eval import evaluate

    attacks = [{"name": name, "label": name, **FEW.get(name, {})} for name in STOPS]
    for attack in attacks:
        attack |= {"norm": "l0", "eps": [24]} if "SparseRS" in attack["name"] else {}
    attacks += [{"name": "OrthoPGD", "label": "restarts", "restarts": 3}, {"name": "PGD", "label": "ce", "loss": "ce"}]
    options = {"eps": eps, "steps": 4, "checks": False, "progress": False, "report": False}
    runs = [
        evaluate(
            model,
            {"source": "cifar10-samples", "limit": 10},
            attacks,
            early_stop=early,
            out=tmp_path / f"{early}",
            **options,
        )
        for early in (True, False)
    ]
    assert 0 < runs[0].rows(model, "OrthoPGD", eps)["success"].mean() < 1
    spent: list[list[float]] = []
    for about in runs[0].manifest["attacks"]:
        label, (radius,) = about["label"], about["eps"]
        early, late = (run.folder.read("shards", model, label, radius) for run in runs)
        assert early[VERDICT].equals(late[VERDICT]), label
        # Forward calls may be more: under a transform each claim is confirmed where it is found.
        calls = "gradient_calls" if late["gradient_calls"].any() else "forward_calls"
        spent.append([early[calls].sum(), late[calls].sum()])
        assert spent[-1][0] <= spent[-1][1], label
    assert sum(few < many for few, many in spent) > len(spent) / 2

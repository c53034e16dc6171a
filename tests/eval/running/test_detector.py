"""A detector in an evaluation: what is told of it, against its own answers to the images that are kept."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from scipy.stats import binomtest
from torch import nn

from orthattack.eval.errors import EvaluationError
from orthattack.eval.report.text import leaderboard_table, reported
from orthattack.eval.results.detection import threshold
from orthattack.eval.results.stored_run import Run
from orthattack.eval.storage.schema import SCORE
from tests.eval.tiny import EPS, Net, evaluated
from tests.stored import assert_same, contents

NAME = "tests.eval.running.test_detector:roughness"
RATES = [0.1, 0.5]
ATTACKS = ["PGD", "OrthoPGD", {"name": "MinimumNorm", "gradients": 10}]


def roughness(model):
    return lambda images: (images[..., 1:] - images[..., :-1]).abs().mean((1, 2, 3)).unsqueeze(1)


def detected(path, attacks=ATTACKS, detector=NAME, **more):
    more = {"eps": [EPS, 2 * EPS], "false_positive_rates": RATES, "detector": detector, **more}
    return evaluated(path, attacks, **more)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return detected(tmp_path_factory.mktemp("detector") / "run")


def test_shares_are_those_of_the_detectors_answers_to_the_kept_images(run):
    model, score = Net().eval(), roughness(None)

    def asked(attack, eps):
        positions, images = zip(*sorted(run.folder.images("net", attack, eps)), strict=True)
        return positions, torch.stack(images)

    _, images = asked("clean", None)
    clean = score(images).flatten().double().numpy()
    np.testing.assert_array_equal(run.clean("net")[SCORE.name].to_numpy(float), clean)
    table = run.detection()
    assert len(table) == 2 * 2 * 4  # rates, radii, attacks and the worst case
    labels = run.clean("net").set_index("position")["label"]
    for rate in RATES:
        limit = threshold(clean, rate)
        flagged = int((clean > limit).sum())
        assert flagged <= rate * len(clean) < flagged + 1
        for eps in (EPS, 2 * EPS):
            best = np.zeros(10, int)
            rows = table[(table["false_positive_rate"] == rate) & (table["eps"] == eps)].set_index("attack")
            for attack in run.attacks:
                positions, images = asked(attack, run.stored_eps(attack, eps))
                norm = (images - asked("clean", None)[1][list(positions)]).abs().flatten(1).amax(1)
                with torch.no_grad():
                    wrong = (model(images).argmax(1).numpy() != labels[list(positions)]) & (
                        norm <= eps * 1.0001
                    ).numpy()
                seen = score(images).flatten().double().numpy() > limit
                state = np.where(wrong, np.where(seen, 1, 2), 0)
                best[list(positions)] = np.maximum(best[list(positions)], state)
                row = rows.loc[attack]
                assert (row["n"], row["fooled"]) == (9, wrong.sum())
                assert (row["detected"], row["evaded"]) == ((state == 1).sum(), (state == 2).sum())
                assert row["threshold"] == limit
                assert (row["flagged"], row["clean"]) == (flagged, 10)
                low, high = binomtest(int(row["evaded"]), 9).proportion_ci(0.95, "wilson")
                assert (row["evaded_share_low"], row["evaded_share_high"]) == pytest.approx((low, high), abs=1e-9)
                assert row["detected_share"] == pytest.approx(row["detected"] / row["fooled"])
            worst = rows.loc["worst case of all"]
            assert (worst["detected"], worst["evaded"]) == ((best == 1).sum(), (best == 2).sum())
    assert table["detected"].max() > 0
    assert table["evaded"].max() > 0


def test_a_threshold_lets_no_larger_share_of_the_clean_images_exceed_it():
    scores = np.array([3.0, 1.0, 2.0, 2.0, 5.0])
    assert [threshold(scores, rate) for rate in (0.01, 0.2, 0.4, 0.99)] == [5.0, 3.0, 2.0, 1.0]
    assert threshold(np.arange(100.0), 0.07) == 92.0  # 7 of 100, though 0.07 * 100 is rounded
    assert math.isnan(threshold(np.array([]), 0.1))


@pytest.mark.slow
def test_the_terminal_and_the_files_have_it(run):
    told = leaderboard_table(run)
    assert max(map(len, told.splitlines())) <= 100
    assert "detected [95 %]" in told
    reported(run.folder)
    found = json.loads(run.folder.read_text("results.json"))["detection"]
    assert [row["evaded"] for row in found] == run.detection()["evaded"].tolist()
    assert "## Detection" in run.folder.read_text("results.md")
    assert '<h2 id="detection">' in run.folder.read_text("report.html")


def test_a_stop_loses_no_score(tmp_path, run):
    whole = detected(tmp_path / "whole", ["PGD"])
    calls = []

    def stopping(model):
        def score(images):
            calls.append(len(images))
            if len(calls) == 5:  # the grey images, the clean ones in three batches or more
                raise KeyboardInterrupt
            return roughness(model)(images)

        return score

    def made(model):
        return stopping(model) if len(calls) < 5 else roughness(model)

    begun = detected(tmp_path / "stopped", ["PGD"], made)
    assert begun.status == "interrupted"
    assert sum(begun.detection()["n"]) < sum(whole.detection()["n"])
    again = detected(tmp_path / "stopped", ["PGD"], made)
    one, two = contents(tmp_path / "whole"), contents(tmp_path / "stopped")
    assert_same(one, two)
    assert again.detection().equals(whole.detection())
    with pytest.raises(EvaluationError, match=rf"detector: {NAME} there, not set now"):
        evaluated(run.folder.path, ATTACKS, eps=[EPS, 2 * EPS])


def test_it_is_made_once_for_a_model_and_goes_with_it(tmp_path):
    made = []

    def making(model):
        made.append(model)
        return roughness(model)

    model = Net()
    found = detected(tmp_path / "run", ["PGD"], making, model=model)
    assert len(made) == 1
    assert made[0] is model
    assert len(found.detection())


def test_without_a_detector_nothing_has_a_score(tmp_path):
    plain = evaluated(tmp_path / "run", ["PGD"])
    assert plain.detection().empty
    assert SCORE.name not in plain.rows("net", "PGD", EPS)
    assert "detected" not in leaderboard_table(plain)
    assert plain.manifest["config"]["early_stop"] is False  # as all images are kept
    assert detected(tmp_path / "other", ["PGD"], save_images="none").manifest["config"]["early_stop"] is False


def test_an_image_without_a_score_is_left_out(tmp_path):
    def blind(model):
        score = roughness(model)
        return lambda images: score(images).masked_fill(images.mean((1, 2, 3)).unsqueeze(1) > 0.5, torch.nan)

    found = detected(tmp_path / "run", ["PGD"], blind)
    known = found.clean("net")[SCORE.name].notna().sum()
    assert 0 < known < 10
    table = found.detection()
    assert (table["clean"] == known).all()
    assert table["n"].max() < 9
    assert found.table()["ok"].dropna().max() == 9  # whether the classifier is fooled is another matter


class Writing(nn.Module):
    """A detector that writes into the classifier."""

    def __init__(self, model):
        super().__init__()
        self.model = [model]

    def forward(self, images):
        with torch.no_grad():
            self.model[0].head.weight.add_(1.0)
        return images.mean((1, 2, 3))


@pytest.mark.parametrize(
    ("detector", "message"),
    [(lambda _: lambda images: images.mean(), r"must return one score per image, a tensor of shape \(2,\); got shape"),
     (lambda _: 3, "TypeError: 'int' object is not callable"),
     (Writing, "the detector changed the model's weights"),
     ("roughness", "detector must be text: module:function; got 'roughness'|must be text: module:function"),
     ("tests.eval.running.test_detector:none", "has no function none")],
)  # fmt: skip
def test_what_cannot_be_one_is_refused_before_anything_runs(tmp_path, detector, message):
    with pytest.raises(EvaluationError, match=message):
        detected(tmp_path / "run", ["PGD"], detector)
    assert not (tmp_path / "run" / "clean").exists()


def test_a_run_is_opened_again(run):
    assert Run.open(run.folder.path).detection().equals(run.detection())

"""Steps told to a function of the caller's, and to TensorBoard."""

from __future__ import annotations

import sys

import pytest
import torch

from orthattack import PGD
from orthattack.eval.errors import EvaluationError
from orthattack.eval.tensorboard import TensorBoard
from tests.eval.tiny import EPS, evaluated
from tests.stored import assert_same, contents


def test_every_step_of_every_image_is_told_and_no_result_changes(tmp_path):
    told = []

    def mine(model, eps, on_step=None):
        return PGD(model, eps=eps, steps=2, on_step=on_step)

    attacks = {"OrthoPGD": "OrthoPGD", "mine": mine, "foolbox": "foolbox:PGD"}
    evaluated(tmp_path / "quiet", attacks, report=False)
    evaluated(tmp_path / "told", attacks, report=False, on_step=lambda *step: told.append(step))
    assert {step[:3] for step in told} == {("net", "OrthoPGD", EPS), ("net", "mine", EPS)}
    for label, steps in (("OrthoPGD", 3), ("mine", 2)):
        counts = torch.bincount(torch.tensor([s.step for _, a, _, s in told if a == label for _ in s.index]))
        assert counts.tolist() == [9] * (steps + 1)  # the images that are right, and the start is scored too
        assert all(s.loss.shape == s.norm.shape == s.index.shape for _, a, _, s in told if a == label)
    assert_same(contents(tmp_path / "quiet"), contents(tmp_path / "told"))


def test_tensorboard_has_the_means_over_all_batches_and_the_rates(tmp_path):
    pytest.importorskip("tensorboard", reason="needs the extra tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    told = []
    with TensorBoard(tmp_path / "board") as board:

        def both(*step):
            told.append(step)
            board(*step)

        run = evaluated(tmp_path / "run", ["PGD", "OrthoPGD"], on_step=both)
        board.results(run)
    stored = EventAccumulator(str(tmp_path / "board")).Reload()
    for attack in ("PGD", "OrthoPGD"):
        steps = [step for _, name, _, step in told if name == attack]
        for name, field in (("fooled", "success"), ("loss", "loss"), ("margin", "margin"), ("norm", "norm")):
            found = stored.Scalars(f"net/{attack}/8_255/{name}")
            assert [event.step for event in found] == [0, 1, 2, 3]
            for event in found:
                values = torch.cat([getattr(step, field).double() for step in steps if step.step == event.step])
                assert event.value == pytest.approx(float(values.mean()), rel=1e-5, abs=1e-7)
        (rate,) = stored.Scalars(f"net/{attack}/8_255/robust_accuracy")
        assert rate.value == pytest.approx(run.table().set_index("attack").loc[attack, "robust_accuracy"])


def test_without_tensorboard_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(EvaluationError, match=r"pip install 'orthattack\[tensorboard\]'"):
        TensorBoard(tmp_path)

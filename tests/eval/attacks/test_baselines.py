"""Foolbox's and torchattacks' attacks as baselines: under the conditions of ours."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from orthattack.eval.attacks.kind import Conditions
from orthattack.eval.attacks.load import attack_kind
from tests.attacks.test_attacks import Recorder, linear_model

EPS = {"linf": 0.01, "l2": 0.1, "l1": 1.0}


def first_steps(name: str, norm: str, steps: int, model: nn.Module, **options) -> list[float]:
    """How far each step of an attack goes that starts at images in the middle of the box, in its norm and over eps."""
    recorder = Recorder(model)
    images = torch.full((2, 3, 6, 6), 0.5)
    labels = model(images).argmax(1)
    runner = attack_kind(name, options).bind(recorder, Conditions(norm, EPS[norm], steps, 5, 10))
    recorder.seen.clear()
    runner(images, labels, [0, 1])
    order = {"linf": torch.inf, "l2": 2, "l1": 1}[norm]
    moved = [(b - a).flatten(1).norm(order, dim=1) / EPS[norm] for a, b in pairwise(recorder.seen)]
    return [float(m.max()) for m in moved[: steps // 3]]


@pytest.mark.parametrize(
    ("name", "norm"),
    [
        ("foolbox:LinfPGD", "linf"),
        ("foolbox:BIM", "linf"),
        ("foolbox:L2PGD", "l2"),
        ("foolbox:L1PGD", "l1"),
        ("foolbox:L2BasicIterativeAttack", "l2"),
        ("foolbox:L1BasicIterativeAttack", "l1"),
    ],
)
def test_foolboxs_iterated_attacks_take_the_steps_of_ours(name, norm):
    """2.5 eps over the number of steps, as `PGD` does with fixed steps, and not what each of them has of its own."""
    fixed = {"random_start": False}
    for steps in (10, 40):
        for size in first_steps(name, norm, steps, linear_model(classes=5), **fixed):
            assert size == pytest.approx(2.5 / steps, rel=1e-3)
    ours = first_steps("PGD", norm, 10, linear_model(classes=5), schedule="fixed", **fixed)
    assert ours == pytest.approx([0.25] * 3, rel=1e-3)


def test_a_step_size_that_was_asked_for_is_kept():
    options = {"random_start": False, "rel_stepsize": 0.05}
    assert first_steps("foolbox:LinfPGD", "linf", 10, linear_model(classes=5), **options) == pytest.approx(
        [0.05] * 3, rel=1e-3
    )
    absolute = {"random_start": False, "abs_stepsize": 0.001}
    assert first_steps("foolbox:LinfPGD", "linf", 10, linear_model(classes=5), **absolute) == pytest.approx(
        [0.1] * 3, rel=1e-3
    )


def test_torchattacks_iterated_attacks_take_the_steps_of_ours():
    pytest.importorskip("torchattacks", reason="needs the extra torchattacks")
    for size in first_steps("torchattacks:BIM", "linf", 10, linear_model(classes=5)):
        assert size == pytest.approx(0.25, rel=1e-3)

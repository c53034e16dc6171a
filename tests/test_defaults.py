"""What holds where nothing is said: the defaults of all that is public, and the first steps that follow from them."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch

import orthattack
from orthattack.attacks.attack import Attack, Card
from orthattack.attacks.climb import Climb
from orthattack.attacks.steps import AutoStep, ScheduledStep

BALL = {"norm": "linf", "eps": 4 / 255}
SINGLE = {
    **BALL, "loss": "ce", "targeted": False, "bounds": (0, 1), "precision": "float32", "eot_samples": 1,
    "optimize": "none",
}  # fmt: skip
STEPS = {
    **SINGLE, "alpha": None, "steps": 10, "random_start": True, "restarts": 1, "early_stop": False, "generator": None,
    "schedule": "fixed", "momentum": 0.0, "nesterov": False,
}  # fmt: skip
PLANE = {"scope": "image", "enforce": "perturbation", "directions": ()}
MOMENTUM = {**BALL, "alpha": None, "steps": 10, "decay": 1.0}
AUTO = {**BALL, "steps": 100, "restarts": 1, "rho": 0.75}
SEQUENCE = {**BALL, "steps": 100, "targets": 9, "queries": 5000}
DEFAULTS: dict[str, dict[str, Any]] = {
    "FGSM": SINGLE,
    "OrthoFGSM": SINGLE | PLANE,
    "PGD": STEPS,
    "OrthoPGD": STEPS | PLANE | {"reference": "clean"},
    "MIFGSM": MOMENTUM,
    "NIFGSM": MOMENTUM,
    "OrthoMIFGSM": {**MOMENTUM, "scope": "image"},
    "OrthoNIFGSM": {**MOMENTUM, "scope": "image"},
    "APGD": AUTO,
    "OrthoAPGD": {**AUTO, "scope": "image"},
    "Square": {**BALL, "queries": 5000},
    "OrthoSquare": {**BALL, "queries": 5000, "scope": "image", "directions": ()},
    "AutoAttack": SEQUENCE,
    "OrthoAutoAttack": {**SEQUENCE, "scope": "image"},
    "MinimumNorm": {"max_eps": None, "trials": 12},
    "DetectorEvasion": {
        **BALL, "threshold": 0.0, "alpha": None, "steps": 50, "mode": "orthogonal", "every": None, "scope": None,
        "directions": (), "enforce": "perturbation", "random_start": False, "restarts": 1, "loss": "margin",
        "targeted": False, "early_stop": False, "bounds": (0, 1), "generator": None,
    },
    "ThreatModel": {"bounds": (0.0, 1.0), "scope": "image", "directions": ()},
    "Ensemble": {"average": "logits"},
    "alignment": {"scope": "image"},
    "orthogonalize": {"scope": "image"},
    "fooled": {"targeted": False, "batch_size": 64, "bounds": (0, 1)},
}  # fmt: skip


def defaults(what: Any) -> dict[str, Any]:
    parameters = inspect.signature(what).parameters.items()
    return {name: parameter.default for name, parameter in parameters if parameter.default is not parameter.empty}


@pytest.mark.parametrize("name", DEFAULTS)
def test_defaults_are_those_that_are_documented(name):
    found = defaults(getattr(orthattack, name))
    assert found == DEFAULTS[name]
    assert {key: type(value) for key, value in found.items()} == {k: type(v) for k, v in DEFAULTS[name].items()}


def test_everything_public_that_has_defaults_is_here():
    public = [getattr(orthattack, name) for name in orthattack.__all__]
    ours = [one for one in public if callable(one) and not (isinstance(one, type) and issubclass(one, Exception))]
    assert {one.__name__ for one in ours if defaults(one)} == DEFAULTS.keys()


def test_options_of_all_attacks():
    """What an attack without such an argument of its own takes by keyword."""
    expected = {
        "loss": "ce", "targeted": False, "early_stop": False, "bounds": (0, 1), "generator": None,
        "precision": "float32", "optimize": "none", "eot_samples": 1, "directions": (), "enforce": "perturbation",
        "reference": "clean",
    }  # fmt: skip
    found = defaults(Attack.__init__)
    assert {name: found[name] for name in expected} == expected
    assert defaults(Card) == {"scope": None, "directions": (), "exact": True, "minimal": False}
    assert defaults(ScheduledStep) == {"schedule": "fixed", "momentum": 0.0, "nesterov": False}
    assert defaults(AutoStep) == {"rho": 0.75}


@pytest.mark.parametrize(
    ("name", "options", "rate"),
    [("FGSM", {}, 1), ("OrthoFGSM", {}, 1), ("PGD", {}, 0.25), ("OrthoPGD", {}, 0.25), ("MIFGSM", {"steps": 5}, 0.2),
     ("NIFGSM", {"steps": 5}, 0.2), ("OrthoMIFGSM", {"steps": 5}, 0.2), ("OrthoNIFGSM", {"steps": 5}, 0.2),
     ("APGD", {}, 2), ("OrthoAPGD", {}, 2)],
)  # fmt: skip
def test_first_steps_are_a_share_of_eps(name, options, rate):
    search = getattr(orthattack, name)(torch.nn.Flatten(), eps=0.1, **options).search
    assert isinstance(search, Climb)
    assert search.options(0.1)["alpha"] == pytest.approx(0.1 * rate)
    assert search.steps == options.get("steps", defaults(getattr(orthattack, name)).get("steps", 1))

"""What each of Foolbox's and torchattacks' attacks can be run in, and that it can."""

from __future__ import annotations

import inspect
import warnings
from dataclasses import replace

import pytest
import torch

from orthattack import attacks
from orthattack.eval.attacks.kind import Conditions, Placeholder
from orthattack.eval.attacks.load import attack_kind, list_attacks
from orthattack.eval.errors import EvaluationError
from orthattack.eval.suite import make_suite

torchattacks = pytest.importorskip("torchattacks")

RADII = {"linf": 0.05, "l2": 1.0, "l1": 20.0, "l0": 3}
# So that an attack ends soon.
SHORT = {
    "steps": 3, "max_iterations": 10, "n_queries": 20, "binary_search_steps": 2, "initial_gradient_eval_steps": 4,
    "max_gradient_eval_steps": 6, "repeats": 3, "directions": 3,
}  # fmt: skip
LISTED = {
    (attack["name"], norm): {key: value for key, value in SHORT.items() if key in attack["parameters"]}
    | (
        {"initial_const": 10.0, "max_iterations": 50, "abort_early": False}
        if "torchattacks:EAD" in attack["name"]
        else {}
    )
    for attack in list_attacks()
    for norm in attack["norms"]
    if attack["name"].startswith(("foolbox:", "torchattacks:"))
}
ONLY_TARGETED = {attack["name"] for attack in list_attacks() if attack["goals"] == "targeted"}
SAMPLE = [
    ("foolbox:SpatialAttack", "l2"), ("foolbox:GenAttack", "linf"), ("foolbox:L2ContrastReductionAttack", "l2"),
    ("foolbox:BinarySearchContrastReductionAttack", "linf"), ("foolbox:LinearSearchContrastReductionAttack", "l1"),
    ("foolbox:FGM", "l2"), ("foolbox:InversionAttack", "l1"), ("foolbox:VirtualAdversarialAttack", "l2"),
    ("foolbox:HopSkipJumpAttack", "l2"), ("foolbox:LInfFMNAttack", "linf"), ("torchattacks:EADL1", "l1"),
    ("foolbox:L0FMNAttack", "l0"), ("foolbox:PointwiseAttack", "l0"), ("torchattacks:OnePixel", "l0"),
    ("torchattacks:SparseFool", "l0"), ("torchattacks:FAB", "l1"), ("torchattacks:PIFGSM", "linf"),
    ("torchattacks:AutoAttack", "l2"),
]  # fmt: skip


def run(name, norm):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 16 * 16, 5)).eval()
    images = torch.rand(3, 3, 16, 16)
    kind, targeted = attack_kind(name, LISTED[name, norm]), name in ONLY_TARGETED
    with warnings.catch_warnings():  # others' own
        warnings.simplefilter("ignore")
        try:
            kind.check(norm, 3, targeted=targeted)
        except EvaluationError as error:
            if "needs numba: pip install numba" in str(error):
                pytest.skip(str(error))
            raise
        runner = kind.bind(model, Conditions(norm, None if kind.card.minimal else RADII[norm], 3, 5, targeted=targeted))
        adversarials = runner(images, model(images).argmax(1), [0, 1, 2]).adversarials
    delta = (adversarials - images).flatten(1)
    pixels = (adversarials != images).any(1).flatten(1).sum(1)
    length = {"l0": pixels, "linf": delta.abs().amax(1), "l2": delta.norm(dim=1), "l1": delta.abs().sum(1)}[norm]
    assert adversarials.shape == images.shape
    if "torchattacks:EAD" not in name:  # which lets pixels leave [0, 1]; an evaluation calls such images invalid
        assert adversarials.min() >= 0
        assert adversarials.max() <= 1
    assert length.max() > 0
    if not kind.card.minimal:
        assert length.max() <= RADII[norm] * 1.001


@pytest.mark.parametrize(("name", "norm"), SAMPLE)
def test_some_listed_attacks_run(name, norm):
    run(name, norm)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "norm"), sorted(LISTED))
def test_every_listed_attack_runs_in_every_norm_that_it_names(name, norm):
    run(name, norm)


@pytest.mark.parametrize(
    ("name", "norms"),
    [
        ("torchattacks:EADL1", ("l1",)),
        ("torchattacks:EADEN", ("l1", "l2")),
        ("torchattacks:FAB", ("linf", "l2", "l1")),
        ("torchattacks:CW", ("l2",)),
        ("torchattacks:PGD", ("linf",)),
        ("torchattacks:Square", ("linf", "l2")),
        ("foolbox:HopSkipJumpAttack", ("l2",)),
        ("foolbox:SaltAndPepperNoiseAttack", ("l2",)),
        ("foolbox:FGM", ("l2",)),
        ("foolbox:EADAttack", ("l1",)),
        *((f"torchattacks:{name}", ("l0",)) for name in ("SparseFool", "OnePixel", "Pixle", "JSMA")),
        *((f"foolbox:{name}", ("l0",)) for name in ("L0FMNAttack", "L0BrendelBethgeAttack", "PointwiseAttack")),
        ("foolbox:LinfinityBrendelBethgeAttack", ("linf",)),
        ("foolbox:InversionAttack", ("linf", "l2", "l1")),
    ],
)
def test_an_attack_is_accepted_in_its_norms_and_refused_in_others(name, norms):
    kind = attack_kind(name)
    assert kind.norms == norms
    for norm in {"linf", "l2", "l1", "l0"} - set(norms):
        with pytest.raises(
            EvaluationError, match=f"{name} works in {' or '.join(norms)}, not in {norm}: choose --norm"
        ):
            kind.check(norm, 3)


def test_the_constraint_of_hopskipjump_is_its_norm():
    assert attack_kind("foolbox:HopSkipJumpAttack", {"constraint": "linf"}).norms == ("linf",)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("torchattacks:LGV", "trains models first"),
        ("torchattacks:VANILA", "returns the images as they are"),
        ("torchattacks:GN", "adds noise of one size"),
        ("torchattacks:MultiAttack", "made of other attacks"),
        ("foolbox:DatasetAttack", "have to be fed to it first"),
        ("foolbox:BinarizationRefinementAttack", "only improves what another attack has found"),
    ],
)  # fmt: skip
def test_what_cannot_be_run_is_not_listed_and_refused_with_its_reason(name, reason):
    assert name not in {attack["name"] for attack in list_attacks()}
    suite = make_suite({"models": ["cifar10-robust"], "data": "cifar10-samples", "attacks": [name]}, "x")
    with pytest.raises(EvaluationError, match=f"{name} cannot be run here: .*{reason}"):
        suite.entries()


def test_what_is_given_classes_to_reach_is_in_the_table():
    """torchattacks' instances say it themselves; what Foolbox's raise is tested where it is run towards classes."""
    goals = {attack["name"]: attack["goals"] for attack in list_attacks()}
    for name, said in goals.items():
        if name.startswith("torchattacks:"):
            made = getattr(torchattacks, name.partition(":")[2])(Placeholder())
            assert ("targeted" in made.supported_mode) == (said == "any"), name
    assert {"foolbox:GenAttack"} == ONLY_TARGETED
    with pytest.raises(EvaluationError, match="GenAttack only reaches given classes: give the run targets"):
        attack_kind("foolbox:GenAttack").check("linf", 3)
    for name in ("foolbox:FGSM", "torchattacks:APGD"):
        assert goals[name] == "untargeted"
        with pytest.raises(EvaluationError, match=f"{name} cannot be given classes to reach.*: leave it out"):
            attack_kind(name).check("linf", 3, targeted=True)


def test_the_options_that_are_listed_of_ours_are_those_of_a_run():
    ours = {attack["name"]: attack["parameters"] for attack in list_attacks() if ":" not in attack["name"]}
    assert (ours["PGD"]["alpha"], ours["PGD"]["schedule"]) == ("2*eps", "linear")
    assert ours["NES"]["alpha"] == "2.5*eps/steps"
    assert ours["MIFGSM"]["alpha"] == "eps/steps"
    for name, parameters in ours.items():
        made = (
            attack_kind(name)
            .bind(Placeholder(), Conditions(getattr(getattr(attacks, name), "norms", ["linf"])[0], 0.1))
            ._attack
        )
        for key in {"steps", "restarts", "queries"} & parameters.keys():
            assert getattr(made, key) == parameters[key] or parameters[key] is None, (name, key)
        if "alpha" in parameters:
            scale, _, rest = parameters["alpha"].partition("eps")
            first = float(scale.removesuffix("*") or 1) * 0.1
            assert made.alpha == pytest.approx(first / made.steps if rest else first), name


@pytest.mark.parametrize("prefix", ["foolbox:", "torchattacks:"])
def test_the_options_that_are_listed_are_those_of_a_run(prefix):
    """Of every attack, as it is made for a run that says nothing of its options."""
    conditions, compared = Conditions(classes=5), set()
    for attack in list_attacks():
        if not attack["name"].startswith(prefix) or attack["needs"]:
            continue
        kind = attack_kind(attack["name"])
        norm, targeted = attack["norms"][0], attack["goals"] == "targeted"
        runner = kind.bind(Placeholder(), replace(conditions, norm=norm, targeted=targeted))
        made = vars(inspect.getclosurevars(runner).nonlocals["attack"])
        for key, value in attack["parameters"].items():
            value = {"2.5*eps/steps": 2.5 * conditions.eps / 10, "the model's": 5}.get(value, value)
            if value is not None and key in made:  # None: of the library's choice; some are kept under other names
                assert made[key] == (pytest.approx(value) if isinstance(value, float) else value), (kind.name, key)
                compared.add(key)
    assert {"steps", "random_start", "rel_stepsize" if prefix == "foolbox:" else "alpha"} <= compared

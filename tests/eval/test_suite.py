"""What a suite may say, and what it is told when it says something else."""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from orthattack.eval.cli import _parser
from orthattack.eval.data.dataset import evenly
from orthattack.eval.errors import EvaluationError
from orthattack.eval.suite import KEYS, differences, make_suite, parse_fraction, read_suite
from orthattack.threat import Norm

TEXT = """
eps = ["0.5/255", "4/255"]
seed = 3
steps = 20

[data]
source = "photos"
labels = "photos/labels.csv"
limit = 10

[[models]]
name = "resnet18"
weights = "weights/mine.safetensors"
image_size = 64

[[models]]
name = "resnet50"
weights = "IMAGENET1K_V2"
label = "big"

[[attacks]]
name = "PGD"
alpha = "1/255"

[[attacks]]
name = "OrthoPGD"
loss = "ce"

[[attacks]]
name = "OrthoPGD"
label = "projected gradient"
enforce = "gradient"

[[attacks]]
name = "foolbox:L2PGD"
norm = "l2"
eps = 0.5

[[attacks]]
name = "foolbox:LinfPGD"

[[attacks]]
name = "MinimumNorm"
attack = "OrthoPGD"
"""
BASE = {"models": ["cifar10-robust"], "data": "cifar10-samples", "attacks": ["PGD", "OrthoPGD"]}


@pytest.fixture
def path(tmp_path):
    file = tmp_path / "bench.toml"
    file.write_text(TEXT)
    return file


def test_a_suite_says_what_is_run(path):
    suite = read_suite(path)
    entries = [(entry.label, entry.norm, entry.eps, entry.seed) for entry in suite.entries()]
    assert entries == [
        ("PGD", "linf", 0.5 / 255, 3), ("PGD", "linf", 4 / 255, 3),
        ("OrthoPGD", "linf", 0.5 / 255, 3), ("OrthoPGD", "linf", 4 / 255, 3),
        ("projected gradient", "linf", 0.5 / 255, 3), ("projected gradient", "linf", 4 / 255, 3),
        ("foolbox:L2PGD", "l2", 0.5, 3),
        ("foolbox:LinfPGD", "linf", 0.5 / 255, 3), ("foolbox:LinfPGD", "linf", 4 / 255, 3),
        ("MinimumNorm", "linf", None, 3),
    ]  # fmt: skip
    assert suite.attacks[0].parameters == {"alpha": 1 / 255}
    assert suite.steps == 20
    assert [model.label for model in suite.models] == ["resnet18", "big"]
    assert suite.baselines() == {
        "PGD": [],
        "OrthoPGD": ["foolbox:LinfPGD"],  # of the same loss
        "projected gradient": ["PGD"],
        "foolbox:L2PGD": [],
        "foolbox:LinfPGD": [],
        "MinimumNorm": [],
    }


def test_paths_are_relative_to_the_file_and_names_are_not_paths(path, tmp_path):
    suite = read_suite(path)
    assert suite.models[0].weights == str(tmp_path / "weights/mine.safetensors")
    assert suite.models[1].weights == "IMAGENET1K_V2"
    assert suite.data.labels == str(tmp_path / "photos/labels.csv")
    assert suite.data.source == "photos"  # not there, so it may be a name, and is refused when it is opened
    (tmp_path / "photos").mkdir()
    assert read_suite(path).data.source == str(tmp_path / "photos")


def test_a_folder_of_a_model_is_relative_to_the_file_and_keeps_its_name(tmp_path, monkeypatch):
    path = tmp_path / "suite.toml"
    path.write_text('data = "photos"\nmodels = ["hf:./vit", {name = "hf:../vit", label = "other"}, "hf:google/vit"]\n')
    models = [(model.name, model.label) for model in read_suite(path).models]
    assert models == [(f"hf:{tmp_path}/vit", "hf:./vit"), (f"hf:{tmp_path}/../vit", "other"), ("hf:google/vit",) * 2]
    monkeypatch.chdir(tmp_path)
    assert read_suite(Path("suite.toml")).models[0].name == "hf:./vit"


def test_its_configuration_makes_the_same_suite_again(path):
    suite = read_suite(path)
    assert make_suite(suite.config(), "again") == suite
    assert differences(suite.config(), make_suite(suite.config(), "again").config()) == []


def test_several_seeds_are_runs_of_their_own():
    suite = make_suite({**BASE, "seeds": [0, 1]}, "x")
    assert [entry.label for entry in suite.entries()] == [
        "PGD (seed 0)", "PGD (seed 1)", "OrthoPGD (seed 0)", "OrthoPGD (seed 1)",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("limit = 10", "limti = 10", "data.limti: unknown key; did you mean limit?"),
        ("image_size", "img_size", "models[1].img_size: unknown key; did you mean image_size?"),
        ("seed = 3", "sede = 3", "sede: unknown key; did you mean seeds?"),
        ("[data]", "[dta]", "dta: unknown key; did you mean data?"),
        (
            '"4/255"',
            '"four"',
            "eps[2]: must be one radius or more, each a number >= 0 or a fraction such as 4/255: leave it out for "
            "the default one; got 'four'",
        ),
        ('"4/255"', "4", "suite: eps is in units of [0, 1] pixels; got 4: did you mean 4/255?"),
        ('"4/255"', '"-4/255"', "eps[2]: must be a finite radius >= 0, such as 4/255"),
        ('"4/255"', '"0.5/255"', "suite: eps has a value twice"),
        ("steps = 20", "steps = 0", "steps: must be a whole number, at least 1; got 0"),
        ("steps = 20", 'steps = "20"', "steps: must be a whole number, at least 1; got '20'"),
        ('label = "big"', 'label = "resnet18"', "suite: two models are called 'resnet18': give one of them another"),
        (
            'name = "OrthoPGD"\nlabel',
            'label = "OrthoPGD"\nlabl',
            "attacks[3].name: is missing: it must be text: see orthattack models and",
        ),
        ('norm = "l2"\neps = 0.5', 'norm = "l2"', "attacks[4]: an attack with its own norm needs its own eps"),
        ('attack = "OrthoPGD"', 'baselines = ["nobody"]', "MinimumNorm has a baseline 'nobody', which is not another"),
        ('name = "PGD"', 'name = "PGD"\nlabel = "clean"', 'an attack cannot be called "clean"'),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(path, old, new, message):
    assert TEXT.count(old) >= 1
    path.write_text(TEXT.replace(old, new, 1))
    with pytest.raises(EvaluationError) as caught:
        read_suite(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


WRONG = {
    "models": [[], [3], {"name": "resnet18"}, None, [[]]],
    "data": [3, [], None, {"source": 3}, {}],
    "attacks": [[], [3], {"name": "PGD"}, None, True],
    "norm": ["l3", 2, None, []],
    "eps": [[], "x", None, [None], [[0.1]], True, [True], {"a": 1}],
    "levels": [16, "a", True, []],
    "steps": [0, -1, 1.5, "10", True, None, []],
    "seeds": [[], ["a"], [1.5], None, True],
    "batch_size": [0, "a", 2.5, None],
    "shard_size": [0, "a", None],
    "save_images": ["some", True, 1, None],
    "attack_misclassified": ["maybe", 3, None, []],
    "checks": ["maybe", 2, None],
    "check_images": [0, "a", None],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key, values in WRONG.items() for value in values])
def test_every_wrong_value_is_refused_in_our_words(key, value):
    """Which name the key, what it may be, and what it is; nobody else's are passed on."""
    with pytest.raises(EvaluationError) as caught:
        make_suite({**BASE, key: value}, "suite.toml").entries()
    message = str(caught.value)
    assert key in message or message.startswith("unknown"), message
    assert "Input should" not in message
    assert "pydantic" not in message
    assert "Field required" not in message
    assert "Tuple" not in message
    assert "\n" not in message


def test_a_table_in_one_bracket_is_explained():
    with pytest.raises(EvaluationError) as caught:
        make_suite({**BASE, "models": {"name": "resnet18"}}, "x")
    assert "got {'name': 'resnet18'}: each is a table of its own, [[models]] in two brackets" in str(caught.value)


@pytest.mark.parametrize(
    ("attack", "message"),
    [
        ("PDG", "unknown attack 'PDG'; did you mean PGD or APGD?"),
        ({"name": "PGD", "stepz": 3}, "attack PGD has no option 'stepz'; did you mean steps"),
        ({"name": "PGD", "alpha": -1}, "attack PGD cannot be made: alpha must be a finite step size >= 0"),
        ({"name": "FGSM", "steps": 3}, "attack FGSM has no option 'steps'"),
        ({"name": "PGD", "eps": 0.1, "model": 3}, "attack PGD has no option 'model'"),
        ("foolbox:LinfPDG", "Foolbox has no attack 'LinfPDG' that can be run here; did you mean LinfPGD"),
        ({"name": "foolbox:LinfPGD", "foo": 1}, "attack foolbox:LinfPGD has no option 'foo'; there are abs_stepsize"),
        ("foolbox:L2PGD", "foolbox:L2PGD works in l2, not in linf"),
        ("no.such:attack", "no.such:attack: there is no module no"),
        ("math:pi", "has a float, not a function, called pi"),
        ({"name": "MinimumNorm", "attack": "MinimumNorm"}, "MinimumNorm needs attack = the name of an attack with an"),
    ],
)
def test_an_attack_that_cannot_be_made_is_refused(attack, message):
    with pytest.raises(EvaluationError) as caught:
        make_suite({**BASE, "attacks": [attack]}, "x").entries()
    assert message in str(caught.value)


def test_files_that_are_no_suites_are_refused(tmp_path):
    with pytest.raises(EvaluationError, match=r"could not read the suite .*No such file"):
        read_suite(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("eps = [")
    with pytest.raises(EvaluationError, match=r"bad\.toml is not TOML"):
        read_suite(tmp_path / "bad.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(EvaluationError, match=r"bytes\.toml is not TOML"):
        read_suite(tmp_path / "bytes.toml")


def test_flags_are_the_keys_of_a_suite_with_their_help_and_their_defaults():
    """Whatever a suite gains is a flag; only its tables, labels and `check_images` have none."""
    (commands,) = (action for action in _parser()._actions if isinstance(action, argparse._SubParsersAction))
    flags = {action.dest: action for action in commands.choices["eval"]._actions}
    without = {"label", "models", "data", "check_images"}
    for name, field in KEYS.items():
        assert (name in flags) == (name not in without), name
        if name in flags and name not in ("checks", "early_stop"):  # the flags are --no-checks, --no-early-stop
            assert flags[name].help.startswith(field.description)
    assert flags["steps"].help.endswith("(default: 10)")
    assert flags["norm"].choices == get_args(Norm)


def test_default_radii_follow_the_norm_and_the_models():
    assert make_suite(BASE, "x").eps == (8 / 255,)
    assert make_suite({**BASE, "models": ["resnet18"]}, "x").eps == (4 / 255,)
    assert make_suite({**BASE, "norm": "l2"}, "x").eps == (0.5,)


def test_differences_name_the_place():
    before, after = {"a": 1, "b": [{"c": 2}], "d": [1, 2]}, {"a": 1, "b": [{"c": 3}], "e": True, "d": [1]}
    assert differences(before, after) == [
        "b[1].c: 2 there, 3 now", "d: [1, 2] there, [1] now", "e: not set there, True now",
    ]  # fmt: skip


@given(st.text(max_size=12))
def test_a_fraction_is_a_number_and_all_else_stays(text):
    value = parse_fraction(text)
    assert value == text or isinstance(value, float)
    assert parse_fraction(f"{7}/{255}") == 7 / 255


@given(st.integers(1, 500), st.integers(0, 500))
def test_even_positions_are_spread_over_all(count, among):
    chosen = evenly(count, among)
    assert len(chosen) == min(count, among)
    assert chosen == sorted(set(chosen))
    assert all(0 <= k < among for k in chosen)
    gaps = {b - a for a, b in pairwise(chosen)}
    assert not gaps or max(gaps) - min(gaps) <= 1

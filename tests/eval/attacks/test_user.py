"""A user's own attack in an evaluation: a function of the model, or an `Attack` of the user's, which is one of ours."""

from __future__ import annotations

import runpy
from pathlib import Path

import numpy as np
import pytest
import torch

from orthattack import Bisection, OrthoPGD
from orthattack.attacks import PGD, Card
from orthattack.eval.attacks.kind import Conditions
from orthattack.eval.attacks.user import user_attack
from tests.eval.tiny import COUNT, EPS, Net, evaluated, images_of

PROOFS = runpy.run_path(str(Path(__file__).parents[3] / "examples" / "own_attacks.py"))
FMN, TIFGSM = PROOFS["FMN"], PROOFS["TIFGSM"]


class Mine(PGD, early_stop=False, scope="channel"):
    """Of the user's."""


def darker(model, norm, eps):
    return OrthoPGD(model, norm, eps, steps=4, directions=["constant"])


def smallest(model, norm, steps):
    return Bisection(OrthoPGD(model, norm, 4 / 255, steps=steps), trials=3)


def needs_the_model(model, eps):
    return OrthoPGD(model, eps=eps, steps=model.head.out_features)


def plain(model):
    return lambda images, labels: images


@pytest.mark.parametrize(
    ("factory", "card"),
    [
        (Mine, Card("PGD", "channel")),
        (TIFGSM, Card("TIFGSM")),
        (FMN, Card("FMN", minimal=True)),
        (darker, Card("PGD", "image", ("constant",))),
        (smallest, Card("Bisection", "image", minimal=True)),
        (plain, Card("mine")),
    ],
)
def test_the_card_is_the_attacks(factory, card):
    kind = user_attack("mine", factory)
    found = kind.card
    assert (found.family, found.scope, tuple(found.directions), found.exact, found.minimal) == (
        card.family, card.scope, tuple(card.directions), card.exact, card.minimal,
    )  # fmt: skip
    assert (kind.source, kind.is_foreign) == ("user", True)


def test_options_reach_the_constructor():
    kind = user_attack("mine", TIFGSM, {"scope": "image", "loss": "margin"})
    assert kind.orthogonal
    found = kind.bind(Net().eval(), Conditions("linf", 0.1, 3))(images_of(), torch.zeros(COUNT).long(), range(COUNT))
    assert found.forward_calls.tolist() == [4] * COUNT


def test_an_attack_that_promises_something_else_for_the_real_model_is_refused():
    kind = user_attack("mine", needs_the_model)  # cannot be tried without it
    with pytest.raises(TypeError, match="mine must return an attack that promises the same for every model"):
        kind.bind(Net().eval(), Conditions("linf", 0.1, 3))


def test_towards_a_class_it_may_promise_something_else():
    def mine(model, eps, steps, targeted=False):
        return PGD(model, eps=eps, steps=steps, targeted=targeted)

    kind = user_attack("mine", mine)
    assert (kind.card.loss, kind.aimed_card.loss) == ("scaled-ce", "ce")
    for targeted in (False, True):
        attack = kind.bind(Net().eval(), Conditions("linf", 0.1, 3, targeted=targeted))
        assert attack(images_of(), torch.zeros(COUNT).long(), range(COUNT)).forward_calls.tolist() == [4] * COUNT


def test_an_evaluation_treats_them_as_ours(tmp_path):
    functions = {"ti": TIFGSM, "own": Mine, "darker": darker, "fmn": FMN, "smallest": smallest, "plain": plain}
    run = evaluated(tmp_path / "run", functions, steps=4)
    about = run.attacks
    assert {label: bool(about[label].get("minimal")) for label in functions} == {
        "ti": False, "own": False, "darker": False, "fmn": True, "smallest": True, "plain": False,
    }  # fmt: skip
    (model,) = run.models
    rows = {
        label: run.folder.read("shards", model, label, None if about[label].get("minimal") else EPS)
        for label in functions
    }
    for label in functions:
        assert set(rows[label]["status"]) <= {"ok", "misclassified", "skipped"}, (
            rows[label]["message"].dropna().tolist()
        )
    tried = rows["ti"]["status"] == "ok"
    assert tried.sum() == COUNT - 1
    assert set(rows["ti"]["forward_calls"][tried]) == {5}
    assert set(rows["fmn"]["forward_calls"][tried]) == {5}
    assert set(rows["fmn"]["gradient_calls"][tried]) == {4}
    for label in ("own", "darker", "smallest"):
        promised = rows[label]["promised_cosine"][tried].astype(float)
        assert promised.notna().all()
        assert promised.max() <= 1e-6
    assert rows["ti"]["promised_cosine"].isna().all()
    assert np.isfinite(rows["fmn"]["linf"][tried].astype(float)).all()


def lost(self):
    raise KeyError("no card")


@pytest.mark.parametrize(
    ("card", "message"),
    [
        (lost, "KeyError: 'no card'"),
        (lambda self: "PGD", "the card of Odd must be an orthattack.attacks.Card; got 'PGD'"),
        (lambda self: None, "the card of Odd must be an orthattack.attacks.Card; got None"),
        (lambda self: Card("PGD", "rows"), "or blocks of a size such as 'block8'; got 'rows'"),
        (lambda self: Card("PGD", "image", normal="rows"), "normal must be 'image', 'constant', 'luma', a tensor or"),
        (lambda self: Card("PGD", None, [3]), "each of directions must be"),
    ],
)
def test_a_card_that_is_none_is_an_error_of_its_own_rows(tmp_path, card, message):
    odd = type("Odd", (PGD,), {"card": property(card)})
    run = evaluated(tmp_path / "both", {"odd": odd, "PGD": "PGD"})
    rows = run.rows("net", "odd", EPS)
    assert set(rows["status"]) == {"error", "misclassified"}
    assert rows["message"].dropna().str.contains(message, regex=False).all()
    alone = evaluated(tmp_path / "alone", ["PGD"]).rows("net", "PGD", EPS)
    beside = run.rows("net", "PGD", EPS)
    assert beside.drop(columns="seconds").equals(alone.drop(columns="seconds"))

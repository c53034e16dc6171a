"""Goals: top k, confidence, and classes to reach that the attack chooses, on models whose answers are recomputed."""

from __future__ import annotations

import re

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from orthattack import FAB, PGD, AutoAttack, Bisection, MinimumNorm, OrthoMinimumNorm, OrthoPGD, Square
from orthattack.losses import Goal, attack_loss
from tests.attacks.test_attacks import Recorder, drawn, linear_model, small_model
from tests.attacks.test_family import FAMILY, Alone, make
from tests.conftest import examples, seeds

pytestmark = pytest.mark.heavy


@given(seeds, st.integers(1, 4), st.sampled_from([0.0, 0.7]), st.booleans())
@examples(40)
def test_a_goal_is_reached_where_ranks_and_differences_of_logits_say_so(seed, top_k, confidence, targeted):
    torch.manual_seed(seed)
    logits, classes = torch.randn(16, 6, dtype=torch.float64), torch.randint(6, (16,))
    goal = Goal(*((None, classes) if targeted else (classes, None)), top_k, confidence)
    for row, reached, margin in zip(logits.numpy(), goal.reached(logits), goal.margin(logits), strict=True):
        own = int(classes[0])
        classes = classes.roll(-1)
        others = np.sort(np.delete(row, own))[::-1]
        expected = (others[top_k - 1] - row[own]) * (-1 if targeted else 1) - confidence
        assert bool(reached) == (expected > 0)
        assert float(margin) == pytest.approx(expected)
        if confidence == 0:
            is_in_top_k = own in np.argsort(-row)[:top_k]
            assert bool(reached) == (is_in_top_k if targeted else not is_in_top_k)
    assert torch.equal(attack_loss("margin")(logits, goal), goal.margin(logits))


def test_a_aimed_more_classes_than_there_are_says_so():
    model, (images, labels) = small_model(), drawn()
    with pytest.raises(ValueError, match="top_k must be below the number of classes; got 5, and the model has 5"):
        PGD(model, top_k=5).run(images, labels)


PIXELS = ("SigmaZero", "OrthoSigmaZero", "SparseRS", "OrthoSparseRS")
GOALS = [{"top_k": 2}, {"confidence": 0.2}, {"targeted": "random", "top_k": 2}, {"targeted": "least-likely"}]
GOALS += [{"targeted": True, "confidence": 0.1}]


# All goals of all attacks in the slow lane, one of each attack in the fast one.
PAIRS = [
    pytest.param(name, goal, marks=[] if (n + k) % len(GOALS) == 0 else pytest.mark.slow)
    for n, name in enumerate([*FAMILY, "Bisection"])
    for k, goal in enumerate(GOALS)
]


@pytest.mark.filterwarnings("ignore:no random point fools the model")  # in which HopSkipJump begins
@pytest.mark.parametrize(("name", "goal"), PAIRS)
def test_every_attack_reaches_its_goal_where_it_says_so(name, goal):
    model, (images, labels) = small_model(), drawn(n=8)
    more = {"queries": 400} if name.endswith("HopSkipJump") else {}
    eps = 12 if name in PIXELS else 0.4
    aimed = make("OrthoPGD" if name == "Bisection" else name, model, eps=eps, **goal, **more)
    attack = Bisection(aimed, trials=4) if name == "Bisection" else aimed
    result = attack.run(images, labels, seeds=range(8))
    with torch.no_grad():
        clean, found = model(images), model(result.adversarials)
    top_k, confidence = goal.get("top_k", 1), goal.get("confidence", 0.0)
    if goal.get("targeted"):
        own = result.targets
        if goal["targeted"] is True:
            assert torch.equal(own, labels)
        elif goal["targeted"] == "random":
            assert (own != labels).all()
        else:
            assert torch.equal(own, clean.scatter(1, labels[:, None], torch.inf).argmin(1))
        expected = Goal(None, own, top_k, confidence)
    else:
        assert (result.targets == -1).all()
        expected = Goal(labels, None, top_k, confidence)
    assert torch.equal(result.success, expected.reached(found))
    assert result.success.sum() > 0
    if name.startswith("Ortho"):
        assert result.cosine.max() <= 1e-6


@pytest.mark.parametrize("kind", [MinimumNorm, FAB, OrthoMinimumNorm])
def test_on_a_linear_model_the_smallest_norm_grows_with_the_confidence_as_it_must(kind):
    """Two classes: the nearest point has ⟨w, δ⟩ = κ - z, so ‖δ‖₂ = (κ - z) / ‖w‖, w freed of x where that is so."""
    model, images = linear_model(), torch.rand(4, 3, 6, 6) * 0.2 + 0.4
    labels = model(images).argmax(1)
    w = (model[1].weight[1 - labels] - model[1].weight[labels]).detach()
    if kind is OrthoMinimumNorm:
        x = images.flatten(1)
        w = w - (w * x).sum(1, keepdim=True) / (x * x).sum(1, keepdim=True) * x
    for confidence in (0.0, 0.3):
        logits = model(images).detach()
        z = logits.gather(1, 1 - labels[:, None]) - logits.gather(1, labels[:, None])
        least = (confidence - z.squeeze(1)) / w.norm(dim=1)
        budget = {"steps": 30} if kind is FAB else {"gradients": 40}
        result = kind(model, "l2", confidence=confidence, **budget).run(images, labels)
        assert result.success.all()
        assert (result.norm >= least * (1 - 1e-5)).all()
        assert (result.norm <= least * 1.02).all()


def test_a_loss_that_is_flat_gives_way_to_the_margin_of_the_goal():
    """The cross-entropy is saturated, so the margin's slope is climbed: that of the second of the other classes."""
    torch.manual_seed(0)
    weight = 1e4 * torch.randn(4, 12)
    model, images = nn.Sequential(nn.Flatten(), nn.Linear(12, 4, bias=False)), torch.full((1, 3, 2, 2), 0.5)
    model[1].weight.data = weight
    order = model(images)[0].argsort(descending=True)
    taken = []
    for top_k in (1, 2):
        attack = PGD(model, eps=1e-3, steps=1, alpha=1e-3, random_start=False, loss="ce", top_k=top_k)
        with pytest.warns(UserWarning, match="the loss had no usable gradient"):
            delta = attack(images, order[:1]) - images
        taken.append(delta.flatten().sign())
        assert torch.equal(taken[-1], (weight[order[top_k]] - weight[order[0]]).sign())
    assert not torch.equal(*taken)


@pytest.mark.parametrize("name", ["OrthoPGD", "Square", "APGD"])
def test_a_random_target_is_the_samples_own_and_every_other_class_may_be_it(name):
    model, (images, _) = Alone(small_model()), drawn(n=5)
    labels = model(images).argmax(1)
    attack, own = make(name, model, targeted="random"), [7, 2**62, 0, 7, 4]
    together = attack.run(images, labels, seeds=own)
    assert torch.equal(together.targets, attack.run(images, labels, seeds=own).targets)
    for i in (3, 1):
        alone = attack.run(images[i : i + 1], labels[i : i + 1], seeds=own[i : i + 1])
        for field, value in vars(alone).items():
            assert torch.equal(value[0], getattr(together, field)[i]), field
    many = make(name, model, targeted="random", **({"queries": 1} if name == "Square" else {"steps": 1}))
    found = many.run(images[:1].expand(200, -1, -1, -1), labels[:1].expand(200), seeds=range(200)).targets
    counts = torch.bincount(found, minlength=5)
    assert counts[labels[0]] == 0
    assert (counts[torch.arange(5) != labels[0]] >= 30).all()  # of 200 draws among 4, 50 each on average


def test_a_chosen_target_stays_from_radius_to_radius():
    model, (images, labels) = small_model(), drawn(n=12)
    swept = OrthoPGD(model, targeted="random", steps=3).sweep(images, labels, [1e-4, 1e-2, 0.1, 0.3])
    for result in swept[1:]:
        assert torch.equal(result.targets, swept[0].targets)
    assert swept[-1].success.sum() > swept[0].success.sum()
    with torch.no_grad():
        reached = model(swept[-1].adversarials).argmax(1) == swept[0].targets
    assert torch.equal(swept[-1].success, reached)
    found = Bisection(PGD(model, targeted="random", steps=5), trials=6).run(images, labels)
    with torch.no_grad():
        assert torch.equal(found.success, model(found.adversarials).argmax(1) == found.targets)


@pytest.mark.parametrize("kind", [PGD, OrthoPGD])
@pytest.mark.parametrize("turns", [None, 2])
def test_each_class_in_turn_is_an_ascent_towards_each_and_the_best_of_them(kind, turns):
    model, (images, _) = small_model(), drawn(n=6)
    logits = model(images).detach()
    labels = logits.argmax(1)
    ranked = logits.scatter(1, labels[:, None], -torch.inf).argsort(1, descending=True)
    options = {"eps": 0.02, "steps": 4, "random_start": False}
    result = kind(model, **options, targeted="each" if turns is None else f"each{turns}").run(images, labels)
    best = torch.full((6,), -torch.inf)
    for target in ranked[:, : turns or 4].unbind(1):
        seen = Recorder(model)
        kind(seen, **options, targeted=True, optimize="none").run(images, target)
        points = [points for points in seen.seen if points.shape == images.shape]
        margins = [Goal(labels).margin(model(points).detach()) for points in points]
        best = torch.stack([best, *margins]).amax(0)
    torch.testing.assert_close(result.loss, best, atol=1e-5, rtol=1e-4)
    assert torch.equal(result.success, best > 0)
    assert result.gradient_calls.tolist() == [4 * (turns or 4)] * 6
    assert (result.targets == -1).all()


def test_square_moves_towards_the_class_whose_turn_it_is():
    model, (images, _) = small_model(), drawn(n=4)
    labels = model(images).argmax(1)
    square = {"queries": 40, "eps": 0.05, "generator": torch.Generator().manual_seed(0)}
    result = Square(model, **square, targeted="each").run(images, labels)
    assert result.forward_calls.tolist() == [40 * 4] * 4
    plain = Square(model, **square).run(images, labels)
    assert not torch.equal(result.adversarials, plain.adversarials)


def test_early_stop_leaves_a_sample_that_one_class_has_fooled():
    model, (images, labels) = small_model(), drawn(n=8)
    few = PGD(model, eps=0.1, steps=5, targeted="each", early_stop=True, random_start=False).run(images, labels)
    all_ = PGD(model, eps=0.1, steps=5, targeted="each", random_start=False).run(images, labels)
    assert torch.equal(few.success, all_.success)
    assert few.gradient_calls.sum() < all_.gradient_calls.sum()


@pytest.mark.parametrize(
    ("attack", "options", "said"),
    [
        (PGD, {"targeted": "each0"}, "one of 'random', 'least-likely' and 'each'"),
        (PGD, {"top_k": 0}, "top_k must be an integer >= 1; got 0"),
        (PGD, {"confidence": -1}, "confidence must be a finite difference of logits >= 0; got -1"),
        (FAB, {"targeted": "each"}, "FAB looks for classes to reach itself; got targeted='each': targets=9 takes nine"),
        (AutoAttack, {"targeted": "each9"}, "AutoAttack looks for classes to reach itself"),
        (MinimumNorm, {"targeted": "each"}, "MinimumNorm looks for classes to reach itself; .*: leave it out"),
    ],
)
def test_a_goal_that_makes_no_sense_is_refused(attack, options, said):
    with pytest.raises(ValueError, match=said if ".*" in said else re.escape(said)):
        attack(small_model(), **options)


def test_the_repr_says_what_the_goal_is():
    assert "targeted='random', top_k=5, confidence=1)" in repr(
        PGD(small_model(), targeted="random", top_k=5, confidence=1)
    )
    assert "top_k" not in repr(PGD(small_model()))

"""HopSkipJump: the smallest norm from decisions alone, within a budget of queries."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from orthattack import HopSkipJump, OrthoHopSkipJump, alignment
from tests.attacks.test_attacks import Recorder, drawn, small_model
from tests.attacks.test_fab import lean, smallest
from tests.attacks.test_family import linear_boundary, seeded

both = pytest.mark.parametrize("kind", [HopSkipJump, OrthoHopSkipJump])


def problem(n=6):
    """A small network, 8-bit images and the classes that it gives them."""
    model, (images, _) = small_model(), drawn(n=n)
    images = (images * 255).round() / 255
    with torch.no_grad():
        return model, images, model(images).argmax(1)


class Decisions(nn.Module):
    """A model that says which class it sees: the largest of scores that say no more, of this size."""

    def __init__(self, model, size):
        super().__init__()
        self.model, self.size = model, size

    def forward(self, images):
        own = nn.functional.one_hot(self.model(images).argmax(1), 5)
        return self.size * (own + (1e3 * self.size * images.flatten(1)[:, :5]).frac() * (1 - own))


@lean
@both
def test_scores_make_no_difference_to_a_bit(kind, norm):
    model, images, labels = problem()
    found = [
        kind(asked, norm, queries=100, probes=10, generator=seeded()).run(images, labels)
        for asked in (model, Decisions(model, 0.1), Decisions(model, 30.0))
    ]
    for field, value in vars(found[0]).items():
        assert torch.equal(value, getattr(found[1], field)), field
        assert torch.equal(value, getattr(found[2], field)), field
    assert found[0].success.sum() >= 5
    assert torch.equal(found[0].loss, torch.where(found[0].success, 1.0, -1.0))


def test_one_hot_answers_are_no_warning_of_probabilities():
    model, images, labels = problem()

    def decide(x):
        return nn.functional.one_hot(model(x).argmax(1), 5).float()

    result = HopSkipJump(decide, "l2", queries=400, probes=10, generator=seeded()).run(images, labels)
    assert result.success.all()


@both
@pytest.mark.parametrize("queries", [1, 40, 173])
@pytest.mark.filterwarnings("ignore:no random point")
def test_the_budget_of_queries_is_kept_and_counted(kind, queries):
    model, images, labels = problem(4)
    seen = Recorder(model)
    attack = kind(seen, "l2", queries=queries, probes=10, generator=seeded())
    for _ in range(2):  # the first time an attack looks at what the model is like
        seen.seen.clear()
        result = attack.run(images, labels)
    assert sum(map(len, seen.seen)) == int(result.forward_calls.sum())
    assert (result.forward_calls <= queries).all()
    assert result.forward_calls.min() >= queries - 2 * 9  # what is left is no bisection and a probe
    assert (result.gradient_calls == 0).all()


@lean
@both
def test_it_comes_near_the_smallest_norm_of_a_linear_boundary(kind, norm):
    model, images, labels, w, lead = linear_boundary()
    rows = zip(images, w, lead.tolist(), strict=True)
    distance = torch.tensor([smallest(norm, x, x, g, m, x if kind is OrthoHopSkipJump else None) for x, g, m in rows])
    beyond = images + 4 * lead.view(-1, 1, 1, 1) * w / w.square().sum((1, 2, 3), keepdim=True)
    attack = kind(model, norm, queries=600, probes=20, generator=seeded())
    result = attack.run(images, labels, start=beyond.clamp(0, 1))
    assert result.success.all()
    assert (result.norm >= distance * (1 - 1e-4)).all()
    assert (result.norm / distance).median() <= (1.6 if norm == "l1" else 1.25)
    assert kind is HopSkipJump or result.cosine.max() <= 1e-6


def test_all_points_that_the_model_is_asked_about_are_allowed_images():
    model, images, labels = problem()
    seen = Recorder(model)
    OrthoHopSkipJump(seen, "linf", queries=120, probes=10, generator=seeded()).run(images, labels)
    whole = [points for points in seen.seen if len(points) == len(images)]
    assert len(whole) > 20
    for points in whole:
        assert 0 <= points.min() <= points.max() <= 1
        assert alignment(points.double() - images.double(), images.double()).abs().max() <= 1e-6


def test_what_no_random_point_fools_comes_back_as_it_is_and_a_start_of_ones_own_helps():
    model, images, labels = problem(4)
    other = images.roll(1, 0)

    def decide(x):  # class 1 where an image is one of these four, or close to it
        near = (x[:, None] - images).flatten(2).norm(dim=2).amin(1) < 0.5
        return nn.functional.one_hot(torch.where(near, model(x).argmax(1), labels[0]), 5).float()

    kinds = labels != labels[0]
    assert 0 < kinds.sum() < 4
    with pytest.warns(UserWarning, match=r"no random point fools the model, .* run\(images, labels, start=others\)"):
        result = HopSkipJump(decide, "l2", queries=60, generator=seeded()).run(images, labels)
    assert torch.equal(result.success, kinds)
    assert torch.equal(result.adversarials[~kinds], images[~kinds])
    helped = HopSkipJump(decide, "l2", queries=60, generator=seeded()).run(
        images, labels, start=torch.where(kinds.view(-1, 1, 1, 1), other, images[kinds][0])
    )
    assert helped.success.all()

"""What every attack promises, whatever its search: tested on small models whose answers can be recomputed."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import orthattack
from orthattack import (
    APGD,
    PGD,
    AutoAttack,
    Bisection,
    DetectorEvasion,
    Ensemble,
    OrthoAPGD,
    OrthoAutoAttack,
    OrthoFGSM,
    OrthoPGD,
    OrthoSquare,
    Square,
    ThreatModel,
    alignment,
    fooled,
)
from orthattack.attacks.rules import gaussian, smooth, variance
from orthattack.attacks.scoring import Oracle
from orthattack.attacks.transforms import scales
from orthattack.losses import Goal, attack_loss
from tests.attacks.test_attacks import SIZE, Recorder, drawn, linear_model, small_model
from tests.conftest import examples, image_kinds, seeds

# HopSkipJump says so where its few queries find nothing to begin with.
pytestmark = [pytest.mark.heavy, pytest.mark.filterwarnings("ignore:no random point fools the model")]

# Small settings for each attack; random_start=False where an attack has the choice.
PLAIN = {
    "FGSM": {},
    "PGD": {"steps": 4, "random_start": False},
    "MIFGSM": {"steps": 4},
    "NIFGSM": {"steps": 4},
    "DIFGSM": {"steps": 4},
    "TIFGSM": {"steps": 4, "links": [smooth(gaussian(3))]},
    "SINIFGSM": {"steps": 4, "transform": scales(2)},
    "VMIFGSM": {"steps": 4, "links": [variance(2, reach=9)]},
    "VNIFGSM": {"steps": 4, "links": [variance(2, reach=9)]},
    "APGD": {"steps": 8},
    "FAB": {"steps": 6},
    "Square": {"queries": 25},
    "NES": {"queries": 40, "pairs": 4},
    "HopSkipJump": {"queries": 45, "probes": 4},
    "AutoAttack": {"steps": 4, "targets": 2, "queries": 8},
    "MinimumNorm": {"gradients": 24},
    "SigmaZero": {"steps": 25},
    "SparseRS": {"queries": 25},
}
DRAWING = [
    "APGD",
    "AutoAttack",
    "NES",
    "HopSkipJump",
    "DIFGSM",
    "VMIFGSM",
    "VNIFGSM",
]  # those that draw random numbers for each sample, whatever the options
FAMILY = {**PLAIN, **{f"Ortho{name}": options for name, options in PLAIN.items()}}
ORTHO = [name for name in FAMILY if name.startswith("Ortho")]
RADII = {"linf": 12 / 255, "l2": 0.5, "l1": 4.0}
EPS = {**RADII, "l0": 6.0}
norms = pytest.mark.parametrize("norm", list(RADII))
IN_EACH_NORM = [(name, norm) for name in FAMILY for norm in getattr(orthattack, name).norms]


def in_each_norm(names=tuple(FAMILY)):
    return pytest.mark.parametrize(("name", "norm"), [pair for pair in IN_EACH_NORM if pair[0] in names])


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def make(name, model, norm=None, **options):
    drawing = {} if name in ("FGSM", "OrthoFGSM") else {"generator": seeded()}
    kind = getattr(orthattack, name)
    norm = norm or kind.norms[0]
    return kind(model, **{"norm": norm, "eps": EPS.get(norm, 1.0), **FAMILY[name], **drawing, **options})


def sizes(delta, norm):
    if norm == "l0":
        return (delta != 0).any(1).flatten(1).sum(1).double()
    return torch.linalg.vector_norm(delta.double().flatten(1), {"linf": math.inf, "l2": 2, "l1": 1}[norm], dim=1)


@in_each_norm()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_results_are_feasible_true_to_the_model_and_of_the_images_kind(name, norm, dtype):
    model, (images, labels) = small_model().to(dtype), drawn(n=8)
    images = images.to(dtype)
    before = images.clone()
    result = make(name, model, norm).run(images, labels)
    found = result.adversarials
    assert torch.equal(images, before)
    assert (found.shape, found.dtype, found.device) == (images.shape, dtype, images.device)
    assert found.min() >= 0
    assert found.max() <= 1
    size = sizes(found.double() - images.double(), norm)
    assert (size <= EPS[norm] * (1 + 1e-6)).all()
    torch.testing.assert_close(result.norm, size)
    with torch.no_grad():
        logits = model(found)
    assert torch.equal(result.success, logits.argmax(1) != labels)
    if name in ORTHO:
        assert alignment(found.double() - images.double(), images.double()).abs().max() <= 1e-6
    # AutoAttack returns what is misclassified as it is.
    assert ((found != images).flatten(1).any(1) | result.success).sum() >= 4
    assert (result.forward_calls >= 1).all()


@in_each_norm()
def test_the_same_seed_gives_the_same_bits(name, norm):
    model, (images, labels) = small_model(), drawn()
    assert torch.equal(make(name, model, norm)(images, labels), make(name, model, norm)(images, labels))


class Alone(nn.Module):
    """A model whose answer for a sample has the same bits whatever is beside it: one pass for each."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return torch.cat([self.model(one[None]) for one in x])


@in_each_norm([n for n in FAMILY if n.removeprefix("Ortho") not in DRAWING])
@pytest.mark.parametrize("early_stop", [False, True])
def test_a_sample_does_not_depend_on_its_batch(name, norm, early_stop):
    """Square too, whose random squares are the same for all samples. APGD starts at random: see below."""
    if early_stop and name in ("FGSM", "OrthoFGSM"):
        return
    model, (images, labels) = Alone(small_model()), drawn(n=5)
    options = {"early_stop": True} if early_stop else {}
    together = make(name, model, norm, **options).run(images, labels)
    for i in range(5):
        alone = make(name, model, norm, **options).run(images[i : i + 1], labels[i : i + 1])
        for field, value in vars(alone).items():
            assert torch.equal(value[0], getattr(together, field)[i]), field


@norms
@pytest.mark.parametrize("name", ["OrthoPGD", "Square", *(form + n for n in DRAWING for form in ("", "Ortho"))])
def test_with_a_seed_per_sample_a_random_start_does_not_depend_on_the_batch_or_on_earlier_calls(name, norm):
    model, (images, _) = Alone(small_model()), drawn(n=5)
    labels = model(images).argmax(1)  # so that there is something left to search for
    options = {"random_start": True, "restarts": 2} if name == "OrthoPGD" else {}
    attack, own = make(name, model, norm, **options), [7, 2**62, 0, 7, 4]
    together = attack.run(images, labels, seeds=own)
    for i in (3, 1):
        alone = attack.run(images[i : i + 1], labels[i : i + 1], seeds=own[i : i + 1])
        for field, value in vars(alone).items():
            assert torch.equal(value[0], getattr(together, field)[i]), field
    if name != "Square":  # whose squares all samples share
        other = attack.run(images, labels, seeds=[seed + 1 for seed in own])
        assert not torch.equal(other.adversarials, together.adversarials)
    with pytest.raises(ValueError, match="seeds must be one per image, 5; got 4"):
        attack.run(images, labels, seeds=own[1:])


def test_minimum_norm_with_seeds_does_not_depend_on_the_batch():
    model, (images, labels) = Alone(small_model()), drawn(n=4)
    attack = Bisection(OrthoPGD(model, eps=8 / 255, steps=4), trials=5)
    together = attack.run(images, labels, seeds=range(4))
    alone = attack.run(images[2:3], labels[2:3], seeds=[2])
    for field, value in vars(alone).items():
        assert torch.equal(value[0], getattr(together, field)[2]), field


def test_minimum_norm_draws_from_the_seeds_it_is_given():
    """Whatever has been drawn before: each ascent of AutoAttack starts at random."""
    model, (images, _) = small_model(), drawn(n=8)
    with torch.no_grad():
        labels = model(images).argmax(1)
    attack = Bisection(AutoAttack(model, eps=0.2, steps=2, targets=1, queries=1), trials=4)
    first, again, other = (attack.run(images, labels, seeds=range(k, k + 8)) for k in (0, 0, 8))
    assert torch.equal(first.adversarials, again.adversarials)
    assert (first.adversarials != other.adversarials).flatten(1).any(1).sum() >= 4


@norms
@pytest.mark.parametrize("name", ["APGD", "OrthoAPGD"])
def test_apgd_from_a_given_start_does_not_depend_on_its_batch(name, norm):
    model, (images, labels) = Alone(small_model()), drawn(n=5)
    start = (
        ThreatModel(norm, RADII[norm], scope="image" if name in ORTHO else None).around(images).random_start(seeded())
    )
    together = make(name, model, norm).run(images, labels, start=start)
    for i in range(5):
        part = slice(i, i + 1)
        alone = make(name, model, norm).run(images[part], labels[part], start=start[part])
        for field, value in vars(alone).items():
            assert torch.equal(value[0], getattr(together, field)[i]), field


@pytest.mark.parametrize("name", FAMILY)
def test_the_model_and_the_random_state_come_back_as_they_were(name):
    model, (images, labels) = small_model().train(), drawn()
    for k, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(k % 2 == 0)
    flags, state = [p.requires_grad for p in model.parameters()], torch.get_rng_state()
    make(name, model)(images, labels)
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", FAMILY)
def test_bad_input_is_explained_by_every_attack(name):
    model, (images, labels) = small_model(), drawn()
    cases = [
        (images * 3 - 1, labels, "images must lie in bounds"),
        (images, labels + 4, "labels must lie in"),
        (images[0], labels, "images must have shape"),
        (images, labels[:2], "labels must have shape"),
        (images[..., :0], labels, r"images must have pixels; got shape \(6, 3, 6, 0\)"),
        (images.byte(), labels, "images must be floating point"),
    ]
    for x, y, message in cases:
        with pytest.raises(ValueError, match=message):
            make(name, model)(x, y)
    for options, message in [
        ({"eps": -1}, "eps must be a finite number >= 0"),
        ({"eps": "8/255"}, "eps must be a finite number >= 0, in pixel units such as 8/255; got '8/255'"),
        ({"norm": "l3"}, "norm must be one of"),
        ({"bounds": (0, 1, 2)}, r"bounds must be two numbers \(low, high\); got \(0, 1, 2\)"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(name, model, **options)
    with pytest.raises(ValueError, match="eps has 2 values for 6 images"):
        make(name, model, eps=torch.tensor([0.1, 0.2]))(images, labels)


@pytest.mark.parametrize("name", FAMILY)
def test_an_empty_batch_is_an_empty_result(name):
    result = make(name, small_model()).run(torch.rand(0, *SIZE), torch.zeros(0, dtype=torch.long))
    assert result.adversarials.shape == (0, *SIZE)


@in_each_norm()
def test_targets_are_reached_or_reported_as_not(name, norm):
    model, (images, _) = linear_model(classes=5), drawn(n=12)
    with torch.no_grad():
        targets = model(images).topk(2).indices[:, 1]
    result = make(name, model, norm, eps=8 * RADII.get(norm, 2.0), targeted=True).run(images, targets)
    with torch.no_grad():
        assert torch.equal(result.success, model(result.adversarials).argmax(1) == targets)
    # A few steps of one pixel each (L1), or a few random squares or pixels, reach some.
    few = norm == "l1" or any(part in name for part in ("Square", "NES", "SparseRS", "Jump"))
    assert result.success.float().mean() >= (0.05 if few else 0.8)


@norms
@pytest.mark.parametrize("name", ["PGD", "OrthoPGD", "OrthoAPGD", "OrthoSquare"])
def test_each_sample_has_the_eps_it_was_given(name, norm):
    model, (images, labels) = Alone(small_model()), drawn(n=4)
    eps = RADII[norm] * torch.tensor([0.0, 0.3, 1.0, 2.0])
    start = images.clone()
    together = make(name, model, norm, eps=eps).run(images, labels, start=start)
    assert (together.norm <= eps.double() * (1 + 1e-6)).all()
    assert torch.equal(together.adversarials[0], images[0])
    for i in range(4):
        part = slice(i, i + 1)
        alone = make(name, model, norm).run(images[part], labels[part], eps=float(eps[i]), start=start[part])
        torch.testing.assert_close(alone.adversarials[0], together.adversarials[i], rtol=0, atol=1e-6)


@norms
@pytest.mark.parametrize("name", ["OrthoFGSM", "PGD", "OrthoPGD", "OrthoAutoAttack"])
def test_a_sweep_over_eps_is_monotone_and_feasible(name, norm):
    model, (images, labels) = small_model(), drawn(n=30)
    radii = [RADII[norm] * f for f in (1.0, 0.1, 0.4)]
    results = make(name, model, norm).sweep(images, labels, radii)
    assert len(results) == 3
    for eps, result in zip(radii, results, strict=True):
        assert (result.norm <= eps * (1 + 1e-6)).all()
        with torch.no_grad():
            assert torch.equal(result.success, model(result.adversarials).argmax(1) != labels)
        single = make(name, model, norm).run(images, labels, eps=eps)
        assert abs(int(result.success.sum()) - int(single.success.sum())) <= 2
    assert (results[0].success | ~results[2].success).all()
    assert (results[2].success | ~results[1].success).all()
    assert (results[0].forward_calls[results[2].success] == 0).all()  # nothing that has fallen is attacked again
    with pytest.raises(ValueError, match=r"eps must be a list of one or more different radii; got \[\]"):
        make(name, model, norm).sweep(images, labels, [])


def test_a_sweep_takes_its_radii_as_a_tensor_too():
    model, (images, labels) = small_model(), drawn()
    swept = make("PGD", model).sweep(images, labels, torch.tensor([0.1, 0.05]))
    listed = make("PGD", model).sweep(images, labels, torch.tensor([0.1, 0.05]).tolist())
    for one, other in zip(swept, listed, strict=True):
        assert torch.equal(one.adversarials, other.adversarials)
    with pytest.raises(ValueError, match=r"eps must be a list of one or more different radii; got 0\.1"):
        make("PGD", model).sweep(images, labels, 0.1)


def test_a_model_that_writes_into_its_input_is_refused():
    """Without a gradient nothing else would notice, and the adversarials would be what the model has made of them."""
    model, (images, labels) = small_model(), drawn()

    def centred(x):
        return model(x.sub_(0.5))

    for name in ("Square", "OrthoSquare", "AutoAttack"):
        with pytest.raises(ValueError, match="the model changes its input in place"):
            make(name, centred)(images, labels)


@examples(15)
@given(image_kinds, seeds, st.sampled_from(list(RADII)), st.sampled_from(["OrthoAPGD", "OrthoSquare", "OrthoMIFGSM"]))
def test_odd_images_are_attacked_without_nan(kind, seed, norm, name):
    model, (images, labels) = small_model(seed), drawn(seed, 3, kind)
    for scope in ("image", "channel", "pixel"):
        result = make(name, model, norm, scope=scope).run(images, labels)
        assert result.adversarials.isfinite().all()
        assert result.cosine.max() <= 1e-6
        assert result.norm.max() <= RADII[norm] * (1 + 1e-6)
        if kind == "white":
            assert torch.equal(result.adversarials, images)


@norms
@pytest.mark.parametrize("name", ["OrthoPGD", "OrthoAPGD", "OrthoSquare", "OrthoMIFGSM"])
def test_several_directions_are_kept_exactly(name, norm):
    model, (images, labels) = small_model(), drawn(n=5)
    other = torch.randn(2, *SIZE, generator=seeded())
    directions = ["constant", "channel-constant", other, lambda x: x.square()]
    result = make(name, model, norm, directions=directions).run(images, labels)
    delta = result.adversarials.double() - images.double()
    assert (result.norm > 0.3 * RADII[norm]).sum() >= 4  # the clean image may be the best there is
    vectors = [images, torch.ones_like(images), images.square(), *(v.expand_as(images) for v in other)]
    vectors += [torch.ones_like(images) * torch.eye(3)[c].view(1, 3, 1, 1) for c in range(3)]
    for vector in vectors:
        assert alignment(delta, vector.double()).abs().max() <= 1e-6
    assert result.cosine.max() <= 1e-6
    only = make(name, model, norm, scope=None, directions=["constant"]).run(images, labels)
    assert only.cosine.max() <= 1e-6
    assert alignment(only.adversarials - images, images).abs().max() > 1e-4
    textbook = OrthoPGD(model, norm=norm, eps=RADII[norm], directions=["constant"], enforce="gradient")
    assert textbook.run(images, labels).norm.min() > 0


# --- Square and AutoAttack -------------------------------------------------------------------------------------------


def masked(model: nn.Module):
    """The model behind a staircase: its gradient is that of something else, its logits are nearly the same."""

    def call(x: torch.Tensor) -> torch.Tensor:
        stairs = (32 * x).round() / 32
        return model(stairs).detach() - 0.01 * (x - 0.5).square().flatten(1).sum(1, keepdim=True) * torch.arange(5.0)

    return call


@pytest.mark.parametrize(("square", "gradient"), [(Square, PGD), (OrthoSquare, OrthoPGD)])
def test_square_needs_no_gradient_and_shows_masked_ones(square, gradient):
    images, _ = drawn(n=20)
    model = masked(small_model())
    with torch.no_grad():
        labels = model(images).argmax(1)
    fooling = gradient(model, eps=0.1, steps=10, generator=seeded()).run(images, labels).success
    asking = square(model, eps=0.1, queries=200, generator=seeded()).run(images, labels).success
    assert asking.sum() >= fooling.sum() + 5
    auto = OrthoAutoAttack if square is OrthoSquare else AutoAttack
    both = auto(model, eps=0.1, steps=10, targets=2, queries=200, generator=seeded()).run(images, labels)
    assert both.success.sum() >= fooling.sum() + 3


@norms
@pytest.mark.parametrize("attack", [Square, OrthoSquare])
def test_square_accepts_only_what_raises_the_margin(attack, norm):
    model, (images, labels) = Recorder(small_model()), drawn(n=4)
    result = attack(model, norm=norm, eps=0.2 * RADII[norm], queries=60, generator=seeded()).run(images, labels)
    assert len(model.seen) == 60
    assert (result.forward_calls == 60).all()
    assert (result.gradient_calls == 0).all()
    with torch.no_grad():
        logits = torch.stack([model.model(x) for x in model.seen])
    margins = logits.masked_fill(nn.functional.one_hot(labels, 5).bool(), -math.inf).amax(2) - logits.gather(
        2, labels.expand(60, 4)[..., None]
    ).squeeze(2)
    torch.testing.assert_close(result.loss, margins.amax(0), rtol=1e-5, atol=1e-6)
    assert (margins.amax(0) > margins[0]).any()


def test_autoattack_stops_at_what_has_fallen_and_goes_through_the_likeliest_targets():
    model, (images, _) = Recorder(small_model()), drawn(n=6)
    with torch.no_grad():
        labels = model.model(images).argmax(1)
    labels[0] = (labels[0] + 1) % 5  # wrong from the start
    result = AutoAttack(model, eps=1e-6, steps=3, targets=9, queries=5, generator=seeded()).run(images, labels)
    assert result.success.tolist() == [True] + [False] * 5
    assert torch.equal(result.adversarials[0], images[0])
    assert int(result.forward_calls[0]) == 1
    # The clean image, APGD on the cross-entropy, then twice the ranking of the classes (and their number) and four
    # targets, the squares.
    assert [len(x) for x in model.seen] == [6] + [5] * (4 + 2 + 4 * 4 + 1 + 4 * 4 + 5)
    assert (result.gradient_calls[1:] == 3 * 9).all()


def test_autoattack_tries_the_likeliest_of_many_classes_in_their_order(monkeypatch):
    """12 classes and 9 targets: the two least likely are left out."""
    tried = []

    def recorded(name):
        loss = attack_loss(name)

        def noted(logits, goal):
            if name == "dlr":
                tried.append(goal.targets)
            return loss(logits, goal)

        return noted

    monkeypatch.setattr("orthattack.attacks.auto.attack_loss", recorded)
    model, (images, _) = linear_model(classes=12), drawn(n=4)
    with torch.no_grad():
        ranked = model(images).argsort(1, descending=True)
    AutoAttack(model, eps=1e-7, steps=1, targets=9, queries=1, generator=seeded()).run(images, ranked[:, 0])
    assert torch.equal(torch.stack(tried[::2], 1), ranked[:, 1:10])  # each is scored before and after its one step


def test_autoattack_works_with_two_classes():
    model, (images, _) = linear_model(classes=2), drawn(n=6)
    with torch.no_grad():
        labels = model(images).argmax(1)
    result = OrthoAutoAttack(model, eps=0.3, steps=5, queries=5, generator=seeded()).run(images, labels)
    assert result.success.all()


# --- smallest norms --------------------------------------------------------------------------------------------------


def linear_boundary():
    """A linear model of two classes, images far from the bounds and their labels; <w, d> = lead is each boundary."""
    model, (images, _) = linear_model(seed=2, dtype=torch.float64), drawn(n=6)
    images = 0.4 + 0.2 * images.double()
    with torch.no_grad():
        logits = model(images)
    labels = logits.argmax(1)
    w = (model[1].weight[1] - model[1].weight[0]).detach()
    w = torch.where(labels[:, None] == 0, w, -w).view(-1, *SIZE)
    lead = logits.gather(1, labels[:, None])[:, 0] - logits.gather(1, 1 - labels[:, None])[:, 0]
    return model, images, labels, w, lead


@pytest.mark.filterwarnings("ignore:max_eps=.* allows every image")  # nothing is to be in its way
@norms
@pytest.mark.parametrize("ortho", [False, True])
def test_the_smallest_norm_of_a_linear_model_is_its_distance_from_the_boundary(norm, ortho):
    """Without bounds in the way, the boundary <w, d> = m is m / ‖w‖* away: the dual norm of w, projected if orthogonal.

    For L-infinity and the plane that is the linear program, whose optimum scales with eps.
    """
    model, images, labels, w, needed = linear_boundary()
    attack = (OrthoPGD if ortho else PGD)(
        model, norm=norm, eps=RADII[norm], steps=20, random_start=False, loss="margin"
    )
    result = Bisection(attack, max_eps=100 * RADII[norm], trials=16).run(images, labels)
    if norm == "linf":
        step = ThreatModel("linf", 1e-3, scope="image" if ortho else None).around(images).step(images, w, 1e-3)
        gain = ((step - images) * w).sum((1, 2, 3)) / 1e-3
    else:
        unit = orthattack.orthogonalize(w, images) if ortho else w
        gain = unit.flatten(1).norm(dim=1) if norm == "l2" else None
    assert result.success.all()
    with torch.no_grad():
        assert (model(result.adversarials).argmax(1) != labels).all()
    if gain is not None:
        expected = needed / gain
        inside = (result.adversarials > 0).flatten(1).all(1) & (result.adversarials < 1).flatten(1).all(1)
        assert inside.sum() >= 3
        ratio = (result.norm / expected)[inside]
        assert (ratio >= 1 - 1e-6).all()
        assert (ratio <= 1.02).all()
    if ortho:
        assert result.cosine.max() <= 1e-6


@pytest.mark.parametrize("attack", [OrthoPGD, OrthoAPGD])
def test_the_smallest_norm_is_below_every_eps_that_works(attack):
    model, (images, labels) = small_model(), drawn(n=12)
    base = attack(model, steps=10, generator=seeded())
    result = Bisection(base, trials=8).run(images, labels)
    with torch.no_grad():
        clean_wrong = model(images).argmax(1) != labels
    assert (result.norm[clean_wrong] == 0).all()
    assert torch.equal(result.adversarials[clean_wrong], images[clean_wrong])
    assert result.success.all()  # max_eps is the whole range
    for eps in (4 / 255, 16 / 255):
        works = attack(model, eps=eps, steps=10, generator=seeded()).run(images, labels).success
        assert (result.norm[works] <= 1.05 * eps).all()


def test_a_search_for_the_smallest_norm_ends_when_the_interval_is_narrow_or_the_largest_radius_has_failed():
    """A thousandth of the radius takes about ten halvings; what the largest radius does not fool is left alone."""
    model, (images, labels) = small_model(), drawn(n=12)
    labels = model(images).argmax(1)
    attack = OrthoPGD(model, steps=3, random_start=False, early_stop=True)
    some, many = (Bisection(attack, trials=trials).run(images, labels) for trials in (20, 60))
    assert torch.equal(some.adversarials, many.adversarials)
    assert torch.equal(some.forward_calls, many.forward_calls)
    assert some.success.any()
    with pytest.warns(UserWarning, match="12 of 12 images were not fooled up to max_eps=0.0001"):
        few, none = (Bisection(attack, max_eps=1e-4, trials=trials).run(images, labels) for trials in (1, 9))
    assert not none.success.any()
    assert torch.equal(few.forward_calls, none.forward_calls)


def test_a_norm_that_is_out_of_reach_is_a_failure():
    model, (images, _) = linear_model(scale=1e-3), drawn()
    model[1].bias.data = torch.tensor([1e3, 0.0])
    with (
        pytest.warns(UserWarning, match="climbed the margin instead"),
        pytest.warns(UserWarning, match="6 of 6 images were not fooled up to max_eps=0.1"),
    ):
        result = Bisection(OrthoFGSM(model, eps=1 / 255, loss="ce"), max_eps=0.1, trials=6).run(
            images, torch.zeros(6, dtype=int)
        )
    assert not result.success.any()
    assert result.norm.max() <= 0.1 * (1 + 1e-6)


@pytest.mark.parametrize(
    ("make_search", "message"),
    [
        (lambda: Bisection("pgd"), "attack must be an attack of orthattack; got str"),
        (lambda: Bisection(PGD(small_model(), eps=0)), "must be larger than 0"),
        (lambda: Bisection(PGD(small_model()), max_eps=-1), "max_eps must be a finite radius > 0"),
        (lambda: Bisection(PGD(small_model()), trials=0), "trials must be an integer >= 1; got 0"),
        (lambda: Square(small_model(), queries=0), "queries must be an integer >= 1; got 0"),
        (lambda: AutoAttack(small_model(), targets=0), "targets must be an integer >= 1; got 0"),
        (lambda: PGD(small_model(), eot_samples=0), "eot_samples must be an integer >= 1; got 0"),
        (lambda: OrthoPGD(small_model(), directions="constant"), "directions must be a list"),
        (lambda: OrthoPGD(small_model(), directions=["mean"]), "each of directions must be 'constant'"),
        (lambda: OrthoPGD(small_model(), directions=["constant"], scope="pixel"), "cannot be combined with scope"),
    ],
)
def test_bad_options_are_explained(make_search, message):
    with pytest.raises(ValueError, match=message):
        make_search()


# --- randomised models, ensembles, transfer --------------------------------------------------------------------------


class Noisy(nn.Module):
    """A model that adds noise to its input: one draw's gradient says little."""

    def __init__(self, model: nn.Module, size: float) -> None:
        super().__init__()
        self.model, self.size = model, size

    def forward(self, x):
        return self.model(x + self.size * torch.randn_like(x))


def test_averaging_over_a_models_draws_gives_a_better_gradient():
    model, (images, _) = small_model(), drawn(n=120)
    with torch.no_grad():
        labels = model(images).argmax(1)
    inner = Noisy(model, 1.0)
    options = {"eps": 0.1, "alpha": 0.1, "steps": 1, "loss": "margin", "random_start": False}
    torch.manual_seed(3)
    with pytest.warns(UserWarning, match="draws at random .* eot_samples"):
        one = PGD(inner, **options).run(images, labels)
    many = PGD(inner, **options, eot_samples=30).run(images, labels)
    for result, samples in ((one, 1), (many, 30)):
        assert (result.gradient_calls == samples).all()
        # Both iterates, and what confirms them: ten answers at each, and in the end.
        assert ((result.forward_calls >= 2 * samples) & (result.forward_calls <= 2 * samples + 30)).all()

    def loss(x):
        return nn.functional.cross_entropy(model(x), labels)

    with torch.no_grad():  # what the model thinks of it without its noise
        assert loss(many.adversarials) - loss(one.adversarials) > 0.05  # 0.07 to 0.08 with three seeds
    assert many.success.sum() > one.success.sum() + 10


def test_the_eot_gradient_is_the_mean_over_the_draws():
    images, labels = drawn(n=3)
    model = Noisy(small_model(), 0.2)
    recorder = Recorder(model)
    torch.manual_seed(5)
    options = {"norm": "l2", "eps": 1.0, "alpha": 0.1, "steps": 1, "random_start": False, "loss": "ce"}
    PGD(recorder, **options, eot_samples=4)(images, labels)
    torch.manual_seed(5)
    total = torch.zeros_like(images)
    for _ in range(4):
        leaf = images.clone().requires_grad_()
        nn.functional.cross_entropy(model(leaf), labels, reduction="sum").backward()
        total += leaf.grad
    # What follows the four draws, but for those that confirm what is misclassified as it is.
    after = next(x for x in recorder.seen[4:] if len(x) == 3 and not torch.equal(x, images))
    cosine = alignment(after - images, total)
    inside = ((after > 0) & (after < 1)).flatten(1).all(1)
    assert (cosine[inside] > 1 - 1e-6).all()
    assert (cosine > 0.9).all()


def test_what_eot_averages_has_the_size_of_one_draw():
    """The mean and not the sum, of loss, margin and gradient: here all draws are the same."""
    images, labels = drawn(n=3)
    model, loss = small_model(), attack_loss("ce")
    one, many = (Oracle(model, eot_samples=k).evaluate(images, Goal(labels), loss, None, True) for k in (1, 4))
    for name in ("loss", "margin", "gradient"):
        torch.testing.assert_close(getattr(many, name), getattr(one, name), rtol=1e-5, atol=1e-7)
    assert one.gradient.abs().max() > 1e-3
    assert many.forward_calls.tolist() == [4, 4, 4]
    averaged = PGD(model, eps=0.1, steps=2, random_start=False, loss="ce", eot_samples=4).run(images, labels)
    with torch.no_grad():
        expected = nn.functional.cross_entropy(model(averaged.adversarials), labels, reduction="none")
    torch.testing.assert_close(averaged.loss, expected)


@pytest.mark.parametrize("average", ["logits", "loss"])
def test_an_ensemble_is_fooled_as_one_and_transfers(average):
    members = [small_model(seed) for seed in range(4)]
    images, _ = drawn(n=30)
    ensemble = Ensemble(members[:3], average)
    with torch.no_grad():
        labels = ensemble(images).argmax(1)
    loss = Ensemble.mean_loss if average == "loss" else "ce"
    result = OrthoPGD(ensemble, eps=0.1, loss=loss, generator=seeded()).run(images, labels)
    assert torch.equal(fooled(ensemble, result.adversarials, labels, batch_size=7), result.success)
    assert result.success.float().mean() > 0.8
    with torch.no_grad():
        expected = members[3](result.adversarials).argmax(1) != labels
    assert torch.equal(fooled(members[3].train(), result.adversarials, labels), expected)
    assert members[3].training
    assert torch.equal(fooled(members[3], result.adversarials, labels, targeted=True), ~expected)


def test_the_two_averages_are_what_they_say():
    members, (images, labels) = [small_model(seed) for seed in range(3)], drawn()
    with torch.no_grad():
        logits = torch.stack([model(images) for model in members])
        torch.testing.assert_close(Ensemble(members)(images), logits.mean(0))
        expected = torch.stack([nn.functional.cross_entropy(z, labels, reduction="none") for z in logits]).mean(0)
        torch.testing.assert_close(Ensemble.mean_loss(Ensemble(members, "loss")(images), labels), expected)
    for models, average, message in [([], "logits", "at least one model"), (members, "votes", "average must be")]:
        with pytest.raises(ValueError, match=message):
            Ensemble(models, average)


@pytest.mark.usefixtures("bfloat16")
@pytest.mark.parametrize("name", ["APGD", "OrthoAPGD", "OrthoMIFGSM", "AutoAttack"])
def test_reduced_precision_is_judged_in_full_by_every_attack(name):
    model, (images, labels) = small_model(), drawn(n=20)
    result = make(name, model, precision="bfloat16").run(images, labels)
    with torch.no_grad():
        assert torch.equal(result.success, model(result.adversarials).argmax(1) != labels)
    if name in ORTHO:
        assert result.cosine.max() <= 1e-6


@pytest.mark.parametrize("name", FAMILY)
def test_reprs_can_be_read(name):
    attack = make(name, small_model())
    text, size = repr(attack), "norm='l0', eps=6" if attack.norm == "l0" else "norm='linf', eps=0.0470588"
    assert text.startswith(f"{name}({size}, ")
    assert ("scope='image', enforce='perturbation'" in text) == (name in ORTHO)
    assert APGD.__name__ in repr(Bisection(APGD(small_model())))


@pytest.mark.parametrize("name", FAMILY)
def test_the_model_is_given_no_more_than_a_batch_at_a_time_with_the_same_result(name):
    model, (images, labels) = small_model(), drawn(n=8)
    seen = Recorder(model)
    parts = make(name, seen).run(images, labels, batch_size=3)
    whole = make(name, model).run(images, labels)
    assert max(len(batch) for batch in seen.seen) == 3
    assert torch.equal(parts.success, whole.success)
    assert torch.equal(parts.forward_calls, whole.forward_calls)
    torch.testing.assert_close(parts.adversarials, whole.adversarials, rtol=0, atol=1e-5)


def test_what_still_stands_is_packed_into_full_batches():
    model, (images, labels) = small_model(), drawn(n=12)
    seen = Recorder(model)
    result = make("OrthoPGD", seen, eps=2 / 255, loss="ce", early_stop=True).run(images, labels, batch_size=4)
    standing = int((~result.success).sum())
    assert 0 < standing < 9  # so that packing makes a difference
    sizes = [len(batch) for batch in seen.seen]
    assert sizes[-math.ceil(standing / 4) :] == [4] * (standing // 4) + ([standing % 4] if standing % 4 else [])
    assert sum(sizes) == int(result.forward_calls.sum())
    with pytest.raises(ValueError, match="batch_size must be an integer >= 1; got 0"):
        make("PGD", model).run(images, labels, batch_size=0)


# --- exact in 8 bits --------------------------------------------------------------------------------------------------


def stored(images):
    """Images as a file of 8 bits holds them."""
    return (images * 255).round() / 255


def integers(images):
    return (images.double() * 255).round().long()


@pytest.mark.heavy
@in_each_norm()
@pytest.mark.parametrize(
    "more",
    [{}, {"scope": "channel", "directions": ["constant"]}, pytest.param({"normal": "luma"}, marks=pytest.mark.slow)],
)
def test_exact_in_8_bits_holds_for_integers_and_for_what_the_model_sees_of_a_file(name, norm, more):
    model, (images, _) = small_model(), drawn(n=8)
    images = stored(images)
    labels = model(images).argmax(1)
    result = make(name, model, norm, eps=2 * EPS[norm], levels=256, **(more if name in ORTHO else {})).run(
        images, labels
    )
    k, d = integers(images), integers(result.adversarials) - integers(images)
    assert torch.equal(result.adversarials, integers(result.adversarials).float() / 255)
    size = sizes(d, norm) / (1 if norm == "l0" else 255)
    assert (size <= 2 * EPS[norm] * (1 + 1e-6)).all()
    torch.testing.assert_close(result.norm, size, rtol=1e-12, atol=0)
    with torch.no_grad():
        assert torch.equal(result.success, model(result.adversarials).argmax(1) != labels)
    assert (d != 0).flatten(1).any(1).sum() >= 4
    if name in ORTHO:
        luma = torch.tensor([299, 587, 114]).view(3, 1, 1)
        assert ((d * (luma if "normal" in more else k)).sum((1, 2, 3)) == 0).all()
        assert (result.cosine == 0).all()
        if "directions" in more:
            assert ((d * k).sum((2, 3)) == 0).all()
            assert (d.sum((1, 2, 3)) == 0).all()


@norms
@pytest.mark.parametrize("early_stop", [False, True])
def test_exact_in_8_bits_with_restarts_radii_of_their_own_and_a_sweep(norm, early_stop):
    model, (images, labels) = small_model(), drawn(n=8)
    images, eps = stored(images), RADII[norm]
    labels = model(images).argmax(1)
    options = {"levels": 256, "random_start": True, "restarts": 2, "early_stop": early_stop}
    each = eps * torch.linspace(0, 3, 8)
    own = make("OrthoPGD", model, norm, **options).run(images, labels, eps=each)
    swept = make("OrthoPGD", model, norm, **options).sweep(images, labels, [eps / 2, 2 * eps])
    for result, radius in ((own, each), (swept[0], eps / 2), (swept[1], 2 * eps)):
        d = integers(result.adversarials) - integers(images)
        assert ((d * integers(images)).sum((1, 2, 3)) == 0).all()
        assert (sizes(d, norm) / 255 <= radius * (1 + 1e-6)).all()
        with torch.no_grad():
            assert torch.equal(result.success, model(result.adversarials).argmax(1) != labels)
    assert (swept[1].success | ~swept[0].success).all()


@norms
def test_evading_a_detector_in_8_bits_holds_for_integers(norm):
    model, (images, _) = small_model(), drawn(n=8)
    images = stored(images)
    labels = model(images).argmax(1)
    options = {"norm": norm, "eps": 2 * RADII[norm], "steps": 5, "scope": "image", "levels": 256}
    attack = DetectorEvasion(model, lambda x: x.square().mean((1, 2, 3)), 0.5, **options)
    result = attack.run(images, labels)
    k, d = integers(images), integers(result.adversarials) - integers(images)
    assert torch.equal(result.adversarials, integers(result.adversarials).float() / 255)
    assert ((d * k).sum((1, 2, 3)) == 0).all()
    assert (sizes(d, norm) / 255 <= 2 * RADII[norm] * (1 + 1e-6)).all()
    assert (d != 0).flatten(1).any(1).sum() >= 4


def test_the_smallest_norm_in_8_bits_is_a_whole_number_of_levels():
    """The bisection asks for no radius between two of them: 255 radii are told apart by 8 trials."""
    model, (images, _) = small_model(), drawn(n=8)
    images = stored(images)
    labels = model(images).argmax(1)
    result = Bisection(make("OrthoPGD", model, eps=16 / 255, levels=256), trials=20).run(images, labels)
    assert result.success.any()
    size = result.norm[result.success] * 255
    torch.testing.assert_close(size, size.round(), rtol=0, atol=1e-9)
    assert ((integers(result.adversarials) - integers(images)) * integers(images)).sum((1, 2, 3)).eq(0).all()
    assert (result.gradient_calls <= 8 * 4).all()


def test_images_that_no_8_bits_hold_are_refused_by_every_attack():
    model, (images, labels) = small_model(), drawn()
    for name in FAMILY:
        with pytest.raises(ValueError, match=r"images must be as stored with levels=256 .* round them first"):
            make(name, model, levels=256).run(0.999 * images, labels)

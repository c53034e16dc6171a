"""Our attacks as Foolbox's, held to what Foolbox asks of its own, and Foolbox's as ours."""

from __future__ import annotations

import copy
import pickle

import eagerpy as ep
import foolbox
import numpy as np
import pytest
import torch
from foolbox.criteria import Misclassification, TargetedMisclassification
from foolbox.gradient_estimators import es_gradient_estimator
from torch import nn

from orthattack import (
    APGD,
    FGSM,
    PGD,
    AutoAttack,
    Bisection,
    DetectorEvasion,
    OrthoAPGD,
    OrthoAutoAttack,
    OrthoFAB,
    OrthoFGSM,
    OrthoMIFGSM,
    OrthoMinimumNorm,
    OrthoNES,
    OrthoNIFGSM,
    OrthoPGD,
    OrthoSigmaZero,
    OrthoSparseRS,
    OrthoSquare,
    ThreatModel,
    alignment,
)
from orthattack.attacks.task import AttackResult
from orthattack.interop.foolbox import FoolboxAttack, FoolboxMinimum, FromFoolbox
from tests.interop.conftest import loaded

pytestmark = pytest.mark.heavy

EPS = 8 / 255
EPSILONS = [0.0, 2 / 255, EPS]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def foolboxed(model: nn.Module) -> foolbox.PyTorchModel:
    return foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")


def lengths(adversarials: torch.Tensor, images: torch.Tensor, norm: str = "linf") -> torch.Tensor:
    delta = (adversarials.double() - images.double()).flatten(1)
    return delta.norm(dim=1, p={"linf": float("inf"), "l2": 2, "l1": 1}[norm])


def cosines(adversarials: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    return alignment(adversarials.double() - images.double(), images.double()).abs()


def tiny() -> tuple[foolbox.PyTorchModel, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).eval()
    images = torch.rand(6, 3, 2, 2)
    return foolboxed(model), images, model(images).argmax(1)


# --- our attacks as Foolbox's ---


@pytest.mark.parametrize(
    "attack",
    [
        FoolboxAttack(FGSM),
        FoolboxAttack(OrthoPGD, steps=5),
        FoolboxAttack(OrthoAutoAttack, steps=2, targets=1, queries=5),
        *(
            pytest.param(attack, marks=pytest.mark.slow)
            for attack in (
                FoolboxAttack(OrthoFGSM),
                FoolboxAttack(PGD, steps=5),
                FoolboxAttack(OrthoMIFGSM, steps=5),
                FoolboxAttack(OrthoNIFGSM, steps=5),
                FoolboxAttack(APGD, steps=5),
                FoolboxAttack(OrthoAPGD, steps=5),
                FoolboxAttack(OrthoSquare, queries=80),
            )
        ),
    ],
    ids=repr,
)
def test_every_attack_is_one_of_foolboxs(standard, attack):
    model, images, labels = (value if isinstance(value, nn.Module) else value[:10] for value in standard)
    fmodel = foolboxed(model)
    raw, clipped, success = attack(fmodel, images, labels, epsilons=EPSILONS)
    assert isinstance(attack, foolbox.Attack)
    assert type(attack.distance).__mro__[1] is foolbox.distances.LpDistance
    assert success.shape == (3, 10)
    for epsilon, ours, theirs, flags in zip(EPSILONS, raw, clipped, success, strict=True):
        assert torch.equal(ours, theirs)  # nothing was left to clip
        assert lengths(ours, images).max() <= epsilon * (1 + 1e-6)
        assert ours.min() >= 0
        assert ours.max() <= 1
        with torch.no_grad():
            assert torch.equal(flags, model(theirs).argmax(1) != labels)
        if "Ortho" in repr(attack):
            assert cosines(theirs, images).max() <= 1e-6
    before, after = foolbox.accuracy(fmodel, images, labels), foolbox.accuracy(fmodel, raw[-1], labels)
    assert after < before or ("Square" in repr(attack) and after == before)  # few queries fool nobody
    assert success[-1].sum() > success[0].sum()


@pytest.mark.slow
@pytest.mark.parametrize(("norm", "epsilons"), [("l2", [0.1, 0.5]), ("l1", [2.0, 10.0])])
def test_the_other_norms_stay_in_their_balls(trained, norm, epsilons):
    model, images, labels = trained
    attack = FoolboxAttack(OrthoPGD, norm=norm, steps=5, generator=seeded())
    _, clipped, success = attack(foolboxed(model), images, Misclassification(labels), epsilons=epsilons)
    for epsilon, adversarials in zip(epsilons, clipped, strict=True):
        assert lengths(adversarials, images, norm).max() <= epsilon * (1 + 1e-6)
        assert cosines(adversarials, images).max() <= 1e-6
    assert success[1].sum() > success[0].sum() > 0
    assert torch.allclose(
        attack.distance(images, clipped[1]).double(), lengths(clipped[1], images, norm), rtol=1e-4, atol=1e-6
    )


def test_l0_counts_pixels():
    fmodel, images, labels = tiny()
    smallest = FoolboxMinimum(OrthoSigmaZero, steps=20)
    raw, clipped, success = smallest(fmodel, images, labels, epsilons=[None, 1])
    pixels = [(found != images).any(1).flatten(1).sum(1) for found in (raw[0], clipped[1])]
    assert success[0].all()
    assert torch.equal(smallest.distance(images, raw[0]), pixels[0].float())
    assert pixels[0].max() > 1 == pixels[1].max()
    assert max(cosines(found, images).max() for found in (raw[0], clipped[1])) <= 1e-6
    _, clipped, success = FoolboxAttack(OrthoSparseRS, queries=50)(fmodel, images, labels, epsilons=[1, 2])
    assert [int((found != images).any(1).flatten(1).sum(1).max()) for found in clipped] == [1, 2]
    assert success[1].sum() >= success[0].sum() > 0


def test_it_is_the_attack_itself(standard):
    model, images, labels = standard
    _, clipped, _ = FoolboxAttack(OrthoPGD, steps=5, generator=seeded())(foolboxed(model), images, labels, epsilons=EPS)
    # Foolbox hands on a function, of which there is no faster copy.
    alone = OrthoPGD(model, eps=EPS, steps=5, generator=seeded(), optimize="none")
    assert torch.equal(clipped, alone(images, labels))


def test_targets_come_from_the_criterion(standard):
    model, images, labels = standard
    targets = (labels + 3) % 10
    attack = FoolboxAttack(OrthoPGD, steps=15)
    _, clipped, success = attack(foolboxed(model), images, TargetedMisclassification(targets), epsilons=EPS)
    assert success.float().mean() >= 0.6
    with torch.no_grad():
        assert torch.equal(success, model(clipped).argmax(1) == targets)


@pytest.mark.slow
def test_repeating_is_no_worse_and_draws_anew(trained):
    model, images, labels = trained
    fmodel = foolboxed(model)

    def attack():
        return FoolboxAttack(OrthoPGD, steps=2, generator=seeded(1))

    raw_one, _, one = attack()(fmodel, images, labels, epsilons=[2 / 255, 6 / 255])
    raw_three, _, three = attack().repeat(3)(fmodel, images, labels, epsilons=[2 / 255, 6 / 255])
    assert (three | ~one).all()
    assert all(
        torch.equal(a[s], b[s]) for a, b, s in zip(raw_one, raw_three, one, strict=True)
    )  # the first success is kept
    repeated = attack()
    first, second = (repeated(fmodel, images[:2], labels[:2], epsilons=EPS)[0] for _ in range(2))
    assert not torch.equal(first, second)
    twice = attack()
    assert torch.equal(twice(fmodel, images[:2], labels[:2], epsilons=EPS)[0], first)


def test_without_a_generator_torch_seed_decides_and_the_global_state_stays():
    fmodel, images, labels = tiny()
    found = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        attack = FoolboxAttack(PGD, steps=1, alpha=0.0)
        before = torch.get_rng_state()
        found.append(attack(fmodel, images, labels, epsilons=0.01)[0])
        assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_tensors_come_back_as_they_came():
    fmodel, images, labels = tiny()
    attack = FoolboxAttack(OrthoPGD, steps=2)
    raw, clipped, success = attack(fmodel, images, labels, epsilons=0.1)
    assert all(type(value) is torch.Tensor for value in (raw, clipped, success))
    assert success.shape == (6,)
    assert success.dtype == torch.bool
    raw, clipped, success = attack(fmodel, *ep.astensors(images, labels), epsilons=0.1)
    assert all(isinstance(value, ep.PyTorchTensor) for value in (raw, clipped, success))
    raw, clipped, success = attack(fmodel, images, labels, epsilons=[0.1])
    assert isinstance(raw, list)
    assert success.shape == (1, 6)
    double = foolboxed(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)).double().eval())
    assert attack(double, images.double(), labels, epsilons=0.1)[0].dtype == torch.float64


def test_bounds_and_preprocessing_are_the_models(standard):
    """The same attack on 8-bit pixels finds the same."""
    model, images, labels = (value if isinstance(value, nn.Module) else value[:10] for value in standard)
    inner, mean, std = model.model, model.mean, model.std
    scaled = foolbox.PyTorchModel(
        inner,
        bounds=(0, 255),
        device="cpu",
        preprocessing={"mean": 255 * mean.flatten(), "std": 255 * std.flatten(), "axis": -3},
    )
    attack = FoolboxAttack(OrthoPGD, random_start=False, steps=4)
    _, clipped, success = attack(scaled, 255 * images, labels, epsilons=[2.0, 8.0])
    assert clipped[1].max() > 1
    assert clipped[1].max() <= 255
    assert lengths(clipped[1], 255 * images).max() <= 8 * (1 + 1e-6)
    _, _, expected = attack(foolboxed(model), images, labels, epsilons=[2 / 255, EPS])
    assert (success != expected).sum() <= 1
    _, _, transformed = attack(scaled.transform_bounds((0, 1)), images, labels, epsilons=[2 / 255, EPS])
    _, _, wrapped = attack(scaled.transform_bounds((0, 1), wrapper=True), images, labels, epsilons=[2 / 255, EPS])
    assert (transformed != expected).sum() <= 1
    assert (wrapped != expected).sum() <= 1


def test_the_step_size_scales_with_epsilon():
    fmodel, images, labels = tiny()
    scaled, fixed = (FoolboxAttack(PGD, steps=1, random_start=False, **option) for option in ({}, {"alpha": 0.001}))
    half = FoolboxAttack(PGD, steps=1, random_start=False, rel_stepsize=0.5)
    raw, _, _ = scaled(fmodel, images, labels, epsilons=[0.002, 0.01])
    assert [round(float(lengths(x, images).max()), 5) for x in raw] == [0.002, 0.01]
    raw, _, _ = fixed(fmodel, images, labels, epsilons=[0.002, 0.01])
    assert [round(float(lengths(x, images).max()), 5) for x in raw] == [0.001, 0.001]
    raw, _, _ = half(fmodel, images, labels, epsilons=[0.002, 0.01])
    assert [round(float(lengths(x, images).max()), 5) for x in raw] == [0.001, 0.005]


def test_a_detector_is_an_option():
    fmodel, images, labels = tiny()
    torch.manual_seed(1)
    detector = nn.Sequential(nn.Flatten(), nn.Linear(12, 1))
    attack = FoolboxAttack(DetectorEvasion, detector=detector, threshold=10.0, steps=3)
    assert repr(attack) == "FoolboxAttack(DetectorEvasion, detector=Sequential, threshold=10.0, steps=3)"
    raw, _, _ = attack(fmodel, images, labels, epsilons=0.3)
    assert raw.shape == images.shape


def test_repr_shows_the_attack_and_its_options():
    assert repr(FoolboxAttack(OrthoPGD, norm="l2", steps=20, generator=seeded())) == (
        "FoolboxAttack(OrthoPGD, norm='l2', steps=20)"
    )
    assert repr(FoolboxAttack(PGD, rel_stepsize=0.1)) == "FoolboxAttack(PGD, rel_stepsize=0.1)"
    directed = FoolboxAttack(OrthoPGD, directions=["constant", torch.ones(3, 2, 2)])
    assert repr(directed) == "FoolboxAttack(OrthoPGD, directions=['constant', Tensor])"
    assert repr(FoolboxMinimum(OrthoPGD, eps=0.1, steps=5)) == "FoolboxMinimum(OrthoPGD, eps=0.1, trials=12, steps=5)"


@pytest.mark.parametrize(
    ("attack", "options", "message"),
    [
        (OrthoPGD, {"eps": 0.1}, r"eps cannot be an option: it comes with the call, attack\(\.\.\., epsilons="),
        (OrthoPGD, {"bounds": (0, 1)}, "bounds cannot be an option: it comes with the call, from the model's bounds"),
        (OrthoPGD, {"targeted": True}, "targeted cannot be an option: it comes with the call, from the criterion"),
        (OrthoPGD, {"steps": 0}, "steps must be an integer >= 1; got 0"),
        (OrthoPGD, {"norm": "l3"}, "norm must be one of"),
        (OrthoPGD, {"rel_stepsize": -1.0}, "alpha must be a finite step size >= 0"),
        (OrthoPGD, {"rel_stepsize": 0.1, "alpha": 0.1}, "rel_stepsize needs an attack with an option alpha"),
        (APGD, {"rel_stepsize": 0.1}, "rel_stepsize needs an attack with an option alpha"),
        (Bisection, {}, "attack must be an attack class of orthattack, .* use FoolboxMinimum"),
        (foolbox.attacks.LinfPGD, {}, "attack must be an attack class of orthattack, such as OrthoPGD"),
        (PGD(nn.Identity()), {}, "attack must be an attack class of orthattack, such as OrthoPGD"),
    ],
)
def test_wrong_options_are_refused_at_once(attack, options, message):
    with pytest.raises(ValueError, match=message):
        FoolboxAttack(attack, **options)


def test_what_the_call_cannot_do_is_explained():
    fmodel, images, labels = tiny()
    attack = FoolboxAttack(OrthoPGD, steps=2)
    both = Misclassification(labels) & TargetedMisclassification(labels)
    with pytest.raises(ValueError, match=r"criterion must be labels, or .* got _And"):
        attack(fmodel, images, both, epsilons=0.1)
    numpy = foolbox.NumPyModel(lambda x: x.reshape(len(x), -1)[:, :3], bounds=(0, 1))
    with pytest.raises(ValueError, match=r"images must be PyTorch tensors, .* got NumPyTensor"):
        attack(numpy, images.numpy(), labels.numpy(), epsilons=0.1)
    with pytest.raises(ValueError, match=r"model must be a Foolbox model of PyTorch, .* got NumPyModel"):
        attack(foolbox.models.TransformBoundsWrapper(numpy, (0, 1)), images, labels, epsilons=0.1)
    with pytest.raises(ValueError, match=r"labels must have shape \(6,\)"):
        attack(fmodel, images, labels[:3], epsilons=0.1)
    with pytest.raises(TypeError, match="unexpected keyword argument 'starting_point'"):
        attack(fmodel, images, labels, epsilons=0.1, starting_point=images)
    for points, found in ((images[:3], r"Tensor \(3, 3, 2, 2\)"), (images.numpy(), r"ndarray \(6, 3, 2, 2\)")):
        with pytest.raises(ValueError, match=f"starting_points must be a PyTorch tensor .* got {found}"):
            attack(fmodel, images, labels, epsilons=0.1, starting_points=points)
    with pytest.raises(ValueError, match=r"labels must be a tensor; got ndarray: convert it with torch\.as_tensor"):
        attack(fmodel, images, labels.numpy(), epsilons=0.1)
    with pytest.raises(NotImplementedError, match="None in epsilons"):  # Foolbox's own
        attack(fmodel, images, labels, epsilons=None)


def test_attacks_begin_at_starting_points_made_to_fit():
    """Without steps to speak of, what comes back is the start: pulled into the ball, then the nearest point in it that
    keeps the cosine."""
    fmodel, images, labels = tiny()
    points = images.flip(0)
    attack = FoolboxAttack(OrthoPGD, norm="l2", steps=1, alpha=0.0, keep="last")
    region = ThreatModel("l2", 0.2, scope="image").around(images)
    for given in (points, ep.astensor(points)):
        raw, clipped, _ = attack(fmodel, images, labels, epsilons=0.2, starting_points=given)
        torch.testing.assert_close(raw, region.shrunk(points), rtol=0, atol=1e-7)
        assert torch.equal(raw, clipped)
        assert lengths(raw, images, "l2").min() > 0.01
        assert lengths(raw, images, "l2").max() <= 0.2 * (1 + 1e-6)
        assert cosines(raw, images).max() <= 1e-6
    twice, _, _ = attack.repeat(2)(fmodel, images, labels, epsilons=0.2, starting_points=points)
    assert torch.equal(twice, raw)


def test_a_good_starting_point_is_kept():
    fmodel, images, labels = tiny()
    found, _, success = FoolboxAttack(OrthoPGD, norm="l2", steps=20)(fmodel, images, labels, epsilons=0.8)
    assert success.sum() >= 4
    weak = FoolboxAttack(OrthoSquare, norm="l2", queries=2)
    assert not weak(fmodel, images, labels, epsilons=0.8)[2].all()
    assert torch.equal(weak(fmodel, images, labels, epsilons=0.8, starting_points=found)[2], success)


def test_gradient_estimators_are_refused_with_what_there_is_instead():
    for kind in (FoolboxAttack, FoolboxMinimum):
        with pytest.raises(ValueError, match=rf"{kind.__name__} takes no gradient estimator.*FoolboxAttack\(NES, "):
            es_gradient_estimator(kind, samples=10, sigma=0.03, bounds=(0, 1), clip=True)
    _, images, labels = tiny()
    theirs = es_gradient_estimator(foolbox.attacks.LinfPGD, samples=10, sigma=0.03, bounds=(0, 1), clip=True)(steps=3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    result = FromFoolbox(model, theirs, "linf", 0.1).run(images, labels)
    assert (result.gradient_calls == 0).all()
    assert (result.forward_calls == 3 * (1 + 10) + 1 + 1).all()  # each step's, its judgement, ours


def test_the_model_keeps_its_gradients_and_buffers(standard):
    model, images, labels = standard
    model.requires_grad_(True)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    FoolboxAttack(OrthoPGD, steps=2)(foolboxed(model), images[:4], labels[:4], epsilons=EPS)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    model.requires_grad_(False)


# --- what Foolbox's own tests ask of its attacks ---


class Mean(nn.Module):
    """Foolbox's simple model: the mean of each channel is its logit."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images.mean((2, 3))


def sampled(kind: str) -> tuple[foolbox.Model, ep.Tensor, ep.Tensor]:
    """A model in bounds (0, 1), images that Foolbox ships, and the classes that the model sees there."""
    if kind == "cifar10":
        fmodel = foolboxed(loaded("cifar10-standard")[0])
    else:
        more = {"preprocessing": {"flip_axis": -3}} if kind == "flipped" else {}
        fmodel = foolbox.PyTorchModel(Mean().eval(), bounds=(0, 1), device="cpu", **more)
    images, _ = foolbox.samples(fmodel, dataset="cifar10", batchsize=8)
    images = ep.astensor(images)
    return fmodel, images, fmodel(images).argmax(axis=-1)


RADII = {"linf": 1.0, "l2": 50.0, "l1": 5000.0}  # Foolbox's own, which allow every image
DEMANDED = [
    FoolboxAttack(OrthoFGSM),
    FoolboxAttack(OrthoPGD, steps=5),
    FoolboxMinimum(OrthoMinimumNorm, norm="l2", gradients=20),
    FoolboxAttack(OrthoNES, queries=202, pairs=50, sigma=0.03),
    *(FoolboxAttack(kind, norm=norm, steps=10) for kind in (PGD, OrthoPGD, OrthoAPGD) for norm in RADII),
    *(FoolboxAttack(kind, norm=norm) for kind in (FGSM, OrthoFGSM) for norm in ("l2", "l1")),
    *(FoolboxAttack(kind, steps=10) for kind in (OrthoMIFGSM, OrthoNIFGSM, OrthoFAB)),
    *(FoolboxAttack(OrthoPGD, scope=scope, steps=10) for scope in ("channel", "pixel")),
    FoolboxAttack(OrthoPGD, directions=["constant"], steps=2),
    FoolboxAttack(OrthoSquare, queries=200),
    FoolboxAttack(OrthoAutoAttack, steps=5, targets=1, queries=20),
    FoolboxAttack(OrthoPGD, steps=5).repeat(3).repeat(2),
    FoolboxMinimum(OrthoPGD, eps=0.01, steps=5),
]


def once(attack: foolbox.Attack) -> foolbox.Attack:
    return attack.attack if isinstance(attack, foolbox.attacks.base.Repeated) else attack


def titled(value: object) -> str:
    return value if isinstance(value, str) else ("" if once(value) is value else "repeated ") + repr(once(value))


@pytest.mark.parametrize(
    ("kind", "attack"),
    [
        pytest.param(kind, attack, marks=() if kind == "mean" and number < 4 else pytest.mark.slow)
        for kind in ("mean", "flipped", "cifar10")
        for number, attack in enumerate(DEMANDED)
    ],
    ids=titled,
)
@pytest.mark.filterwarnings("ignore:.*allows every image", "ignore:the threat model leaves nothing")
def test_ours_do_what_foolbox_asks_of_its_own(kind, attack):
    """Its demands: fewer images are classified right afterwards and, towards the next class, more as that."""
    fmodel, images, labels = sampled(kind)
    is_minimum = isinstance(attack, FoolboxMinimum)
    epsilon = None if is_minimum else RADII[dict(vars(once(attack))["_options"]).get("norm", "linf")]
    found, _, success = attack(fmodel, images, labels, epsilons=epsilon)
    assert foolbox.accuracy(fmodel, found, labels) < 1
    assert (success == (fmodel(found).argmax(-1) != labels)).all()
    goal = TargetedMisclassification((labels + 1) % fmodel(images).shape[-1])
    reached, _, _ = attack(fmodel, images, goal, epsilons=epsilon)
    assert goal(reached, fmodel(reached)).sum().item() > 0


@pytest.mark.parametrize("attack", [FoolboxAttack(OrthoFGSM), FoolboxMinimum(OrthoPGD, eps=0.1)], ids=titled)
def test_ours_refuse_what_foolbox_asks_its_own_to_refuse(attack):
    fmodel, images, labels = sampled("mean")

    class Other(foolbox.Criterion):
        def __repr__(self) -> str:
            return "Other()"

        def __call__(self, perturbed, outputs):
            return perturbed

    twice = ep.concatenate((labels, labels), 0)
    for criterion in (twice, TargetedMisclassification(twice), Other()):
        with pytest.raises(ValueError, match=r"labels must have shape|criterion must be labels"):
            attack(fmodel, images, criterion, epsilons=0.5)
    for pixels in (-0.1, 1.1):
        with pytest.raises(AssertionError):  # Foolbox's own
            attack(fmodel, 0 * images + pixels, labels, epsilons=0.5)


def test_a_black_and_white_digit_leaves_no_room_beside_the_constant():
    """White pixels can only fall, and keep their sum; then black ones, which can only rise, have to keep theirs."""
    torch.manual_seed(0)
    fmodel = foolboxed(nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 10)).eval())
    digits, _ = foolbox.samples(fmodel, dataset="mnist", batchsize=8)
    grey, images = (digits > 0.1) & (digits < 0.9), digits.round()
    labels = fmodel(images).argmax(1)
    attack = FoolboxAttack(OrthoPGD, directions=["constant"], steps=5)
    with pytest.warns(UserWarning, match="leaves nothing but the image itself for 8 of 8 images"):
        raw, _, success = attack(fmodel, images, labels, epsilons=0.9)
    assert lengths(raw, images).max() <= 1e-6
    assert not success.any()
    assert grey.any()
    _, _, success = FoolboxAttack(OrthoPGD, steps=5)(fmodel, images, labels, epsilons=0.9)  # beside the image there is
    assert success.all()


# --- the smallest perturbation ---


@pytest.mark.slow
def test_the_smallest_perturbations(standard):
    model, images, labels = standard
    fmodel, images, labels = foolboxed(model), images[:10], labels[:10]
    attack = FoolboxMinimum(OrthoPGD, eps=2 / 255, steps=5, trials=6, generator=seeded())
    epsilons = [None, 0.0, 1 / 255, 3 / 255]
    raw, clipped, success = attack(fmodel, images, labels, epsilons=epsilons)
    assert isinstance(attack, foolbox.attacks.base.MinimizationAttack)
    assert torch.equal(raw[0], clipped[0])
    assert success[0].all()
    assert cosines(raw[0], images).max() <= 1e-6
    smallest = lengths(raw[0], images)
    expected = Bisection(OrthoPGD(model, eps=2 / 255, steps=5, generator=seeded()), trials=6).run(images, labels)
    torch.testing.assert_close(smallest.double(), expected.norm, rtol=1e-4, atol=0)  # a sign may turn with rounding
    with torch.no_grad():
        assert torch.equal(success[1], model(images).argmax(1) != labels)
    for epsilon, adversarials, flags in zip(epsilons[1:], clipped[1:], success[1:], strict=True):
        assert lengths(adversarials, images).max() <= epsilon * (1 + 1e-6)
        assert cosines(adversarials, images).max() <= 1e-6
        assert flags[smallest <= epsilon].all()
        assert adversarials.min() >= 0
        assert adversarials.max() <= 1
        with torch.no_grad():
            assert torch.equal(flags, model(adversarials).argmax(1) != labels)


def test_smallest_perturbations_towards_targets_repeat_and_come_back_as_they_came():
    fmodel, images, labels = tiny()
    attack = FoolboxMinimum(OrthoPGD, eps=0.1, norm="l2", max_eps=2.0, steps=5, trials=6)
    raw, _, success = attack.repeat(2)(
        fmodel, *ep.astensors(images), TargetedMisclassification((labels + 1) % 3), epsilons=None
    )
    assert isinstance(raw, ep.PyTorchTensor)
    assert success.raw.float().mean() >= 0.5


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": 0.0}, "eps is the first radius to try, so it must be larger than 0"),
        ({"eps": 0.1, "trials": 0}, "trials must be an integer >= 1"),
        ({"eps": 0.1, "max_eps": -1.0}, "max_eps must be a finite radius > 0"),
        ({"eps": 0.1, "targeted": True}, "targeted cannot be an option"),
        ({}, "OrthoPGD fills a ball: give eps, the first radius to try"),
    ],
)
def test_wrong_options_of_the_search_are_refused_at_once(options, message):
    with pytest.raises(ValueError, match=message):
        FoolboxMinimum(OrthoPGD, **options)


def test_a_search_that_ends_at_its_limit_says_so():
    fmodel, images, labels = tiny()
    for options in ({"attack": OrthoPGD, "eps": 0.005}, {"attack": OrthoMinimumNorm, "gradients": 10}):
        with pytest.warns(
            UserWarning, match="6 of 6 images were not fooled up to max_eps=0.01: that is no smallest norm"
        ):
            _, _, success = FoolboxMinimum(**options, max_eps=0.01)(fmodel, images, labels, epsilons=None)
        assert not success.any()
    few = FoolboxMinimum(OrthoPGD, eps=0.005, trials=1, steps=2)
    assert not few(fmodel, images, labels, epsilons=None)[2].any()  # no cap ended it: not said
    certain = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).eval()
    nn.init.constant_(certain[1].bias[:1], 100.0)
    search = FoolboxMinimum(OrthoPGD, eps=0.5, steps=2)
    assert not search(foolboxed(certain), images, 0 * labels, epsilons=None)[2].any()  # no radius is larger: not said


def test_what_minimises_is_one_of_foolboxs_too():
    fmodel, images, labels = tiny()
    attack = FoolboxMinimum(OrthoMinimumNorm, norm="l2", gradients=30)
    assert repr(attack) == "FoolboxMinimum(OrthoMinimumNorm, norm='l2', gradients=30)"
    raw, clipped, success = attack(fmodel, images, labels, epsilons=[None, 0.1])
    expected = OrthoMinimumNorm(fmodel, norm="l2", gradients=30).run(images, labels)
    assert success[0].all()
    torch.testing.assert_close(lengths(raw[0], images, "l2"), expected.norm, rtol=1e-4, atol=0)
    assert lengths(clipped[1], images, "l2").max() <= 0.1 * (1 + 1e-6)
    assert max(cosines(x, images).max() for x in (raw[0], clipped[1])) <= 1e-6
    again, _, _ = attack(fmodel, images, labels, epsilons=None, starting_points=raw[0])
    assert (lengths(again, images, "l2") <= lengths(raw[0], images, "l2") * (1 + 1e-5)).all()
    with pytest.raises(ValueError, match="OrthoMinimumNorm looks for the smallest norm itself: leave eps out"):
        FoolboxMinimum(OrthoMinimumNorm, eps=0.1)
    with pytest.raises(TypeError, match="a bisection begins at the images: starting_points are for FoolboxAttack"):
        FoolboxMinimum(OrthoPGD, eps=0.1)(fmodel, images, labels, epsilons=None, starting_points=images)


# --- Foolbox's attacks as ours ---


def test_a_baseline_is_foolboxs_attack_measured_by_us(trained, robust_accuracy):
    model, images, labels = trained
    attack = foolbox.attacks.LinfPGD(rel_stepsize=0.25, steps=5)
    with torch.random.fork_rng():
        torch.set_rng_state(seeded(7).get_state())
        _, theirs, success = attack(foolboxed(model), images, labels, epsilons=EPS)
    baseline = FromFoolbox(model, attack, "linf", EPS, generator=seeded(7))
    result = baseline.run(images, labels)
    assert isinstance(result, AttackResult)
    assert torch.equal(result.adversarials, theirs)
    assert torch.equal(result.success, success)
    assert float(1 - result.success.float().mean()) == pytest.approx(robust_accuracy(model, theirs, labels))
    assert torch.equal(result.loss > 0, result.success)  # the margin
    assert torch.equal(result.norm, lengths(theirs, images))
    assert torch.equal(result.cosine, cosines(theirs, images))
    assert result.cosine.max() > 1e-3  # not ours
    assert (result.gradient_calls == 5).all()
    assert (result.forward_calls == 5 + 1 + 1).all()  # its steps, its own judgement, ours
    assert (result.steps == 0).all()
    assert (result.zero_gradients == 0).all()


@pytest.mark.parametrize(
    ("attack", "norm", "eps"),
    [
        (foolbox.attacks.L2PGD(steps=3), "l2", 0.5),
        (foolbox.attacks.L1PGD(steps=3), "l1", 10.0),
        (foolbox.attacks.LinfFastGradientAttack(), "linf", EPS),
        (foolbox.attacks.LinfAdditiveUniformNoiseAttack().repeat(2), "linf", EPS),
        (foolbox.attacks.LinfDeepFoolAttack(steps=5), "linf", EPS),
        (foolbox.attacks.LinfDeepFoolAttack(steps=10), "linf", None),
        (foolbox.attacks.L2CarliniWagnerAttack(binary_search_steps=2, steps=10), "l2", None),
        (foolbox.attacks.GenAttack(steps=2, population=4), "linf", EPS),
        (
            foolbox.attacks.SpatialAttack(num_rotations=1, num_translations=1, random_steps=2, grid_search=False),
            "l2",
            None,
        ),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, foolbox.Attack) else str(value),
)
@pytest.mark.filterwarnings("ignore:torch.meshgrid")  # Foolbox's
def test_any_foolbox_attack_repeats_and_leaves_the_random_numbers_alone(standard, attack, norm, eps):
    model, images, labels = (value if isinstance(value, nn.Module) else value[:4] for value in standard)
    targeted = isinstance(attack, foolbox.attacks.GenAttack)
    labels = (labels + 1) % 10 if targeted else labels

    def run():
        baseline = FromFoolbox(model, attack, norm, eps, generator=seeded(), targeted=targeted)
        return baseline.run(images, labels), baseline

    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, baseline = run()
    second, _ = run()
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert torch.equal(first.adversarials, second.adversarials)
    assert torch.equal(baseline(images[:0], labels[:0]), images[:0])
    with torch.no_grad():
        hit = model(first.adversarials).argmax(1) == labels
    assert torch.equal(first.success, hit if targeted else ~hit)
    assert first.forward_calls.min() > 0
    if eps is not None:
        assert first.norm.max() <= eps * (1 + 1e-5)
    assert f"eps={'None' if eps is None else f'{eps:.6g}'}" in repr(baseline)


def test_minimisation_succeeds_everywhere_and_targets_are_passed_on(standard):
    model, images, labels = standard
    images, labels = images[:10], labels[:10]
    deepfool = foolbox.attacks.L2DeepFoolAttack(candidates=3)
    result = FromFoolbox(model, deepfool, "l2", None).run(images, labels)
    assert result.success.all()
    assert 0 < result.norm.median() < 1
    targets = (labels + 3) % 10
    attack = foolbox.attacks.LinfPGD(rel_stepsize=0.2, steps=15)
    result = FromFoolbox(model, attack, "linf", EPS, targeted=True, generator=seeded()).run(images, targets)
    with torch.no_grad():
        assert torch.equal(result.success, model(result.adversarials).argmax(1) == targets)
    assert result.success.float().mean() >= 0.5


def test_the_streams_go_on():
    _fmodel, images, labels = tiny()
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    for attack in (foolbox.attacks.LinfAdditiveUniformNoiseAttack(), foolbox.attacks.LinfPGD(steps=1)):
        baseline = FromFoolbox(model, attack, "linf", 0.1, generator=seeded())
        assert not torch.equal(baseline(images, labels), baseline(images, labels))


def test_the_model_comes_back_as_it_was(standard):
    model, images, labels = standard
    model.requires_grad_(True)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    attack = foolbox.attacks.LinfPGD(steps=2, random_start=False)
    expected = FromFoolbox(model, attack, "linf", EPS)(images[:4], labels[:4])
    try:
        model.train()
        with torch.inference_mode():
            assert torch.equal(FromFoolbox(model, attack, "linf", EPS)(images[:4], labels[:4]), expected)
        assert all(module.training for module in model.modules())
    finally:
        model.eval()
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


class Corrupted(foolbox.attacks.LinfPGD):
    def run(self, model, inputs, criterion, *, epsilon, **kwargs):
        found = super().run(model, inputs, criterion, epsilon=epsilon, **kwargs)
        found.raw[0] = float("nan")
        return found


def test_nan_is_not_a_success():
    _, images, labels = tiny()
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    labels = model(images).argmax(1)
    with pytest.raises(ValueError, match="NaN"):  # Foolbox itself asks the model about it
        FromFoolbox(model, Corrupted(steps=1), "linf", 0.1).run(images, labels)


def test_other_bounds_are_foolboxs_too():
    _, images, labels = tiny()
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    baseline = FromFoolbox(model, foolbox.attacks.LinfPGD(steps=2), "linf", 8.0, bounds=(0, 255))
    result = baseline.run(255 * images, labels)
    assert result.adversarials.max() > 1
    assert 1 < result.norm.max() <= 8 * (1 + 1e-6)


def test_radii_can_be_swept():
    _, images, labels = tiny()
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    small, large = FromFoolbox(model, foolbox.attacks.LinfPGD(steps=3), "linf", 0.1).sweep(images, labels, [0.01, 0.3])
    assert (large.success | ~small.success).all()
    assert small.norm.max() <= 0.01 * (1 + 1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((lambda x: x, foolbox.attacks.LinfPGD(), "linf", 0.1), "model must be an nn.Module, as Foolbox asks"),
        ((nn.Flatten(), foolbox.attacks.LinfPGD, "linf", 0.1), "attack must be an attack of Foolbox"),
        ((nn.Flatten(), PGD(nn.Flatten()), "linf", 0.1), "attack must be an attack of Foolbox"),
        ((nn.Flatten(), foolbox.attacks.LinfPGD(), "l2", 0.1), "norm must be that of LinfProjected.*, Linf; got 'l2'"),
        ((nn.Flatten(), foolbox.attacks.LinfPGD().repeat(2), "l2", 0.1), "norm must be that of .*, Linf; got 'l2'"),
        ((nn.Flatten(), foolbox.attacks.LinfPGD(), "l3", 0.1), "norm must be one of"),
        ((nn.Flatten(), foolbox.attacks.LinfPGD(), "linf", None), "needs an eps: only attacks that minimise"),
        ((nn.Flatten(), foolbox.attacks.LinfPGD(), "linf", -0.1), "eps must be a finite number >= 0"),
        ((nn.Flatten(), foolbox.attacks.LinfPGD(), "linf", torch.ones(2)), "eps must be one number for all images"),
        ((nn.Flatten(), foolbox.attacks.LinfPGD(), "linf", 0.1, (1, 0)), "bounds must be two finite numbers"),
        ((nn.Flatten(), foolbox.attacks.LinfPGD(), "linf", 0.1, (0, 1), 3), "generator must be a torch.Generator"),
    ],
)
def test_wrong_arguments_of_a_baseline_are_refused_at_once(arguments, message):
    with pytest.raises(ValueError, match=message):
        FromFoolbox(*arguments)


def test_bad_images_are_explained():
    _, images, labels = tiny()
    baseline = FromFoolbox(nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), foolbox.attacks.LinfPGD(), "linf", 0.1)
    with pytest.raises(ValueError, match=r"images must lie in bounds \(0, 1\)"):
        baseline(3 * images, labels)
    with pytest.raises(ValueError, match=r"labels must lie in \[0, 2\]"):
        baseline(images, labels + 5)
    with pytest.raises(ValueError, match="one eps for all images"):
        baseline.run(images, labels, eps=torch.full((6,), 0.1))


@pytest.mark.slow
def test_autoattack_takes_what_foolbox_gives(standard):
    """At the same radius our strongest leaves nothing that Foolbox's PGD finds."""
    model, images, labels = standard
    _, _, ours = FoolboxAttack(AutoAttack, steps=5, targets=1, queries=10)(
        foolboxed(model), images, labels, epsilons=2 / 255
    )
    theirs = FromFoolbox(model, foolbox.attacks.LinfPGD(steps=5), "linf", 2 / 255, generator=seeded())
    assert ours.sum() >= theirs.run(images, labels).success.sum()


# --- as objects ---


def test_radii_and_labels_may_be_arrays_and_tensors():
    fmodel, images, labels = tiny()

    def attack() -> FoolboxAttack:
        return FoolboxAttack(OrthoPGD, steps=np.int64(3), rel_stepsize=np.float32(0.5), generator=seeded())

    raw, _, _ = attack()(fmodel, images, labels, epsilons=[float(np.float32(0.1)), 0.25])
    numbers = np.array([0.1, 0.25], "float32")
    for epsilons in (numbers, [*numbers], torch.tensor(numbers), ep.astensor(torch.tensor(numbers))):
        found, _, _ = attack()(fmodel, images, labels.int(), epsilons=epsilons)
        assert all(torch.equal(a, b) for a, b in zip(raw, found, strict=True))
    alone, _, _ = attack()(fmodel, images, Misclassification(labels.byte()), epsilons=numbers[0])
    assert torch.equal(alone, raw[0])


@pytest.mark.parametrize(
    "make", [lambda: FoolboxAttack(OrthoPGD, steps=2), lambda: FoolboxMinimum(PGD, eps=0.1, steps=2)]
)
def test_ours_in_foolbox_pickle_and_stay_as_they_are(make):
    fmodel, images, labels = tiny()
    attack = make()
    attack(fmodel, images, labels, epsilons=[0.1])
    for copied in (lambda a: pickle.loads(pickle.dumps(a)), copy.deepcopy, copy.copy):
        twin = copied(attack)
        assert repr(twin) == repr(attack)
        expected = attack(fmodel, images, labels, epsilons=[0.1])
        assert torch.equal(twin(fmodel, images, labels, epsilons=[0.1])[0][0], expected[0][0])
    assert attack.steps == 2
    with pytest.raises(AttributeError, match=r"cannot be changed: .*\.replace\(steps=\.\.\.\)"):
        attack.steps = 3
    with pytest.raises(AttributeError, match="has no option 'epsilon'"):
        attack.epsilon = 3
    with pytest.raises(TypeError, match="PGD got an unexpected keyword argument 'epsilon'; did you mean eps"):
        attack.replace(epsilon=3)


def test_foolboxs_attacks_as_ours_pickle_with_their_streams():
    _, images, labels = tiny()
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    attack = FromFoolbox(model, foolbox.attacks.LinfAdditiveUniformNoiseAttack(), "linf", np.float32(0.1))
    attack.run(images, labels)
    for copied in (lambda a: pickle.loads(pickle.dumps(a)), copy.deepcopy, copy.copy):
        twin = copied(attack)
        assert torch.equal(attack(images, labels), twin(images, labels))
    assert attack.eps == float(np.float32(0.1))
    assert FromFoolbox(model, foolbox.attacks.L2DeepFoolAttack(), "l2", None).eps is None
    with pytest.raises(AttributeError, match="FromFoolbox cannot be changed"):
        attack.eps = 0.2
    with pytest.warns(UserWarning, match="eps=2 allows every image"):
        attack.replace(eps=2)(images, labels)
    FromFoolbox(model, foolbox.attacks.L2DeepFoolAttack(steps=2), "l2", None).run(images, labels)

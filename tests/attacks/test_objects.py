"""Attacks as objects: what is read from them, what is refused, and that copies of any sort do the same."""

from __future__ import annotations

import copy
import io
import pickle
import re
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import orthattack
from orthattack import PGD, Bisection, DetectorEvasion, OrthoPGD, ThreatModel
from orthattack.attacks.configured import options_of
from orthattack.eval.attacks.ours import OURS

# HopSkipJump says so where its few queries find nothing to begin with.
pytestmark = [pytest.mark.heavy, pytest.mark.filterwarnings("ignore:no random point fools the model")]

NAMES = [name for name in OURS if name != "Bisection"]
IMAGES = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


def classifier(outputs: int = 3) -> nn.Module:
    torch.manual_seed(outputs)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, outputs))


def make(name: str, **options: object) -> object:
    """An attack of every sort, quick, and one that draws if it can."""
    if name == "Bisection":
        return Bisection(OrthoPGD(classifier(), eps=8 / 255, steps=2), **{"trials": 4, **options})
    if name == "DetectorEvasion":
        return DetectorEvasion(classifier(), classifier(1), **{"steps": 3, "random_start": True, **options})
    quick = {"FGSM": {}, "Square": {"queries": 5}, "AutoAttack": {"steps": 2, "queries": 5}}
    quick["SparseRS"] = {"eps": 5.0, "queries": 5}
    quick["NES"] = {"queries": 12, "pairs": 1}
    quick["HopSkipJump"] = {"queries": 40, "probes": 5}
    quick["MinimumNorm"] = {"gradients": 6}
    return getattr(orthattack, name)(classifier(), **{**quick.get(name.removeprefix("Ortho"), {"steps": 2}), **options})


ALL = [*NAMES, "DetectorEvasion", "Bisection"]
LONG = ["OrthoAutoAttack", "OrthoFAB", "DetectorEvasion"]  # so long that the fast lane does without, where others do


def same(a: orthattack.AttackResult, b: orthattack.AttackResult) -> bool:
    return all(torch.equal(getattr(b, name), value) for name, value in vars(a).items())


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def saved_by_torch(attack: object) -> object:
    stream = io.BytesIO()
    torch.save(attack, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=False)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("copied", [lambda a: pickle.loads(pickle.dumps(a)), copy.deepcopy, saved_by_torch])
def test_a_copy_goes_on_as_the_attack_itself_would(name, copied):
    attack = make(name)
    attack.run(IMAGES, LABELS)  # the stream of random numbers is somewhere by now
    twin = copied(attack)
    assert repr(twin) == repr(attack)
    assert twin == attack
    assert hash(twin) == hash(attack)
    for _ in range(2):
        result = attack.run(IMAGES, LABELS)
        assert same(result, twin.run(IMAGES, LABELS))
    assert same(result, copied(result))


def own_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return -logits.gather(1, labels.unsqueeze(1)).squeeze(1)


@pytest.mark.parametrize("optimize", ["none", "auto"])
def test_a_loss_of_ones_own_and_a_faster_copy_are_no_obstacle(optimize):
    attack = OrthoPGD(classifier(), steps=2, loss=own_loss, optimize=optimize)
    attack(IMAGES, LABELS)
    assert same(pickle.loads(pickle.dumps(attack)).run(IMAGES, LABELS), attack.run(IMAGES, LABELS))
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        pickle.dumps(OrthoPGD(classifier(), loss=lambda logits, labels: own_loss(logits, labels)))


def signature_of(name: str) -> list[str]:
    return options_of(getattr(orthattack, name))


@pytest.mark.parametrize("name", ALL)
def test_every_option_is_read_and_none_can_be_set(name):
    attack = make(name)
    before = repr(attack)
    for option in signature_of(name):
        value = getattr(attack, option)
        assert option in dir(attack)
        with pytest.raises(AttributeError, match=rf"^{name} cannot be changed: .*, \.replace\({option}=\.\.\.\)$"):
            setattr(attack, option, value)
        with pytest.raises(AttributeError, match=f"{name} cannot be changed"):
            delattr(attack, option)
    for typo in ("epsilon", "step", "threat_model"):
        with pytest.raises(AttributeError, match=f"{name} has no option '{typo}'.* has "):
            setattr(attack, typo, 3)
        assert not hasattr(attack, typo)
    assert repr(attack) == before


@pytest.mark.parametrize("name", ALL)
def test_a_wrong_option_is_blamed_on_the_class_that_was_called(name):
    kind, given = getattr(orthattack, name), signature_of(name)
    arguments = {"attack": make("PGD")} if name == "Bisection" else {"model": classifier()}
    if name == "DetectorEvasion":
        arguments["detector"] = classifier(1)
    for wrong in ("oracle", "search", *({"detector"} - set(given))):
        with pytest.raises(
            TypeError, match=rf"^{name} got an unexpected keyword argument '{wrong}'; .* has .*{given[-1]}"
        ):
            kind(**arguments, **{wrong: None})
    with pytest.raises(TypeError, match=rf"^{name}: missing a required argument: '{given[0]}'"):
        kind()
    if "eps" in given:
        with pytest.raises(
            TypeError, match=rf"^{name} got an unexpected keyword argument 'epsilon'; did you mean eps\? "
        ):
            kind(**arguments, epsilon=0.1)


@pytest.mark.parametrize(
    ("name", "wrong", "meant"),
    [
        ("PGD", "num_steps", "steps"),
        ("PGD", "n_iter", "steps"),
        ("PGD", "random", "random_start"),
        ("Square", "steps", "queries"),
        ("Square", "norm_", "norm"),
        ("Bisection", "trial", "trials"),
    ],
)
def test_the_option_that_was_meant_is_named(name, wrong, meant):
    arguments = {"attack": make("PGD")} if name == "Bisection" else {"model": classifier()}
    with pytest.raises(TypeError, match=rf"{name} got an unexpected .* '{wrong}'; did you mean {meant}\? It has "):
        getattr(orthattack, name)(**arguments, **{wrong: 3})


def test_a_batch_that_fits_is_not_split(monkeypatch):
    monkeypatch.setattr("orthattack.attacks.base.InBatches", None)
    plain, fitting = (make("PGD").run(IMAGES, LABELS, batch_size=size).norm for size in (None, len(IMAGES)))
    assert torch.equal(plain, fitting)
    with pytest.raises(TypeError):
        make("PGD").run(IMAGES, LABELS, batch_size=len(IMAGES) - 1)


def test_options_read_as_they_are_in_force():
    attack = OrthoPGD(classifier(), "l2", 2, steps=5, bounds=(0, 1))
    assert (attack.norm, attack.eps, attack.alpha, attack.steps, attack.bounds) == ("l2", 2, 4.0, 5, (0, 1))
    assert (attack.loss, attack.targeted, attack.scope, attack.restarts) == ("scaled-ce", False, "image", 1)
    assert (attack.schedule, attack.replace(alpha=0.1).schedule) == ("linear", "fixed")
    assert attack.replace(schedule="fixed").alpha == 1.0
    assert orthattack.FGSM(classifier(), eps=0.1).alpha == pytest.approx(0.1)
    assert orthattack.MIFGSM(classifier(), early_stop=True).early_stop is True
    assert make("DetectorEvasion").threshold == 0.0
    assert make("Bisection").trials == 4


@pytest.mark.parametrize("name", ALL)
def test_replace_makes_an_attack_that_differs_in_that_alone(name):
    attack = make(name)
    option, value = ("trials", 2) if name == "Bisection" else ("eps", 0.5)
    other = attack.replace(**{option: value})
    assert type(other) is type(attack)
    assert getattr(other, option) == value != getattr(attack, option)
    for same_as_before in set(signature_of(name)) - {option, "alpha", "generator"}:
        assert getattr(other, same_as_before) == getattr(attack, same_as_before), same_as_before
    with pytest.raises(TypeError, match=f"{name} got an unexpected keyword argument 'nothing'"):
        attack.replace(nothing=1)


@pytest.mark.parametrize("name", [name for name in ALL if "FGSM" not in name])
def test_a_shallow_copy_attacks_the_same_model_and_draws_its_own_numbers(name):
    attack = make(name)
    twin = copy.copy(attack)
    inner, twins = (attack.attack, twin.attack) if name == "Bisection" else (attack, twin)
    assert twins.model is inner.model
    assert twins.generator is not inner.generator
    assert same(attack.run(IMAGES, LABELS), twin.run(IMAGES, LABELS))


def numbers(value: int | float) -> list[object]:
    """The same number by other hands."""
    if isinstance(value, int):
        return [np.int64(value), np.uint8(value), np.array(value), torch.tensor(value)]
    return [np.float64(value), np.array(value), torch.tensor(value, dtype=torch.float64)]


NUMBERS = {
    "eps": 0.05, "alpha": 0.01, "steps": 2, "restarts": 2, "eot_samples": 2, "queries": 4, "targets": 1, "decay": 0.5,
    "momentum": 0.5, "rho": 0.5, "threshold": 0.25, "every": 2, "trials": 3, "max_eps": 0.5,
}  # fmt: skip


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in ALL])
def test_numbers_of_numpy_and_torch_are_numbers(name):
    for option in set(NUMBERS) & set(signature_of(name)):
        more = {"random_start": True} if option == "restarts" and name in ("PGD", "OrthoPGD") else {}
        number = 4.0 if option == "eps" and make(name).norm == "l0" else NUMBERS[option]  # of pixels
        expected = make(name, **{option: number}, **more)
        found = expected.run(IMAGES, LABELS)
        for kind in numbers(number):
            attack = make(name, **{option: kind}, **more)
            assert repr(attack) == repr(expected)
            assert type(getattr(attack, option)) is type(number)
        assert same(attack.run(IMAGES, LABELS), found)  # of a tensor; the others are the same number by now


def test_numbers_of_a_call_may_come_from_numpy_and_torch():
    attack = OrthoPGD(classifier(), steps=2, bounds=np.array([0, 1]))
    found = attack.run(IMAGES, LABELS, eps=0.25, seeds=list(range(6)), batch_size=4)
    for seeds in (np.arange(6), torch.arange(6), range(6), tuple(np.arange(6, dtype="uint8"))):
        assert same(attack.run(IMAGES, LABELS, eps=np.float32(0.25), seeds=seeds, batch_size=np.int64(4)), found)
    each = np.linspace(0.1, 0.3, 6)
    assert same(
        attack.replace(eps=each).run(IMAGES, LABELS, seeds=range(6)),
        attack.run(IMAGES, LABELS, eps=torch.as_tensor(each), seeds=range(6)),
    )
    radii = np.array([0.25, 0.125], "float32")
    for ours, theirs in zip(
        attack.sweep(IMAGES, LABELS, radii), attack.sweep(IMAGES, LABELS, [0.25, 0.125]), strict=True
    ):
        assert torch.equal(ours.norm, theirs.norm)
    threat = ThreatModel("linf", np.float32(0.5), np.array([0.0, 1.0]))
    assert repr(threat) == (
        "ThreatModel(norm='linf', eps=0.5, bounds=(0.0, 1.0), scope='image', directions=(), normal='image', "
        "levels=None, mask=None)"
    )


def test_a_radius_may_be_an_integer_too_large_for_torch():
    attack = orthattack.PGD(classifier(), eps=10**25, steps=1)
    with pytest.warns(UserWarning, match=r"^eps=1e\+25 allows every image"):
        result = attack.run(IMAGES, LABELS)
    assert result.adversarials.isfinite().all()
    assert result.norm.max() <= 1


def test_a_radius_of_the_callers_array_is_a_copy():
    eps = torch.tensor([0.1] * 6)
    attack = orthattack.PGD(classifier(), eps=eps, steps=1)
    eps.fill_(0.9)
    assert attack.run(IMAGES, LABELS).norm.max() <= 0.1 * (1 + 1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"steps": 5.0}, r"steps must be an integer >= 1; got 5\.0: write 5"),
        ({"steps": np.float64(5)}, r"steps must be an integer >= 1; got 5\.0: write 5"),
        ({"steps": np.True_}, "steps must be an integer >= 1; got True"),
        ({"steps": np.array([5])}, r"steps must be an integer >= 1; got array\(\[5\]\)"),
        ({"eps": np.True_}, "eps must be a finite number >= 0, in pixel units such as 8/255; got True"),
        ({"eps": np.ones((2, 2))}, r"eps must be a number or one per sample, \(N,\); got shape \(2, 2\)"),
        ({"eps": torch.tensor([True])}, r"eps must be a finite number >= 0.*tensor\(\[True\]\)"),
        ({"alpha": "0.1"}, "alpha must be a finite step size >= 0, in pixel units such as 2/255; got '0.1'"),
        ({"momentum": None}, "momentum must be a finite number >= 0; got None"),
        ({"targeted": "no"}, "targeted must be True or False, or one of 'random'"),
        ({"random_start": "False"}, "random_start must be True or False; got 'False'"),
        ({"bounds": ([0, 0, 0], [1, 1, 1])}, r"the same for all channels; got .*orthattack\.Normalized"),
        ({"bounds": 1}, r"bounds must be two numbers \(low, high\); got 1"),
        ({"bounds": ("0", "1")}, r"two finite numbers \(low, high\) with low < high; got"),
        ({"generator": 3}, r"must be a torch\.Generator; got 3: seed one, torch\.Generator\(\)\.manual_seed\(3\)"),
        ({"norm": 8 / 255}, r"norm must be a name; got 0\.0313\d+: pass a radius as eps=0\.0313"),
        ({"model": [nn.Flatten()]}, r"got list: several models are one as orthattack\.Ensemble\(models\)"),
        ({"model": nn.Linear}, r"it is a class, so make one first, Linear\(\.\.\.\)"),
        ({"model": nn.Linear(1, 1).state_dict()}, "load the weights into a module first"),
        ({"directions": torch.ones(3, 4, 4)}, r"directions must be a list, such as directions=\['constant'\]"),
        ({"scope": ["image"]}, r"scope must be one of 'image', 'channel', 'pixel', or .*; got \['image'\]"),
    ],
)  # fmt: skip
def test_a_wrong_value_is_named_with_a_remedy(options, message):
    with pytest.raises(ValueError, match=message):
        OrthoPGD(**{"model": classifier(), **options})


def test_a_radius_that_allows_every_image_is_warned_of_once():
    box = {"linf": 1.0, "l2": 48**0.5, "l1": 48.0}
    for norm, diameter in box.items():
        attack = orthattack.PGD(classifier(), norm, diameter, steps=1)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            attack(IMAGES, LABELS)
            attack.run(IMAGES, LABELS)
        assert len(seen) == 1
        assert seen[0].filename == __file__
        assert re.match(rf"eps=.* allows every image: in {norm}, images of shape \(3, 4, 4\)", str(seen[0].message))
        orthattack.PGD(classifier(), norm, 0.99 * diameter, steps=1)(IMAGES, LABELS)
    with pytest.warns(
        UserWarning, match=r"eps=8 allows .* bounds \(0, 1\) are at most 1 apart; did you mean eps=8/255\?"
    ):
        OrthoPGD(classifier(), eps=8, steps=1)(IMAGES, LABELS)
    with pytest.warns(UserWarning, match="eps=255 allows every image: .* choose a smaller radius"):
        OrthoPGD(classifier(), eps=255, steps=1, bounds=(0, 255), loss="margin")(255 * IMAGES, LABELS)
    OrthoPGD(classifier(), eps=8, steps=1, bounds=(0, 255), loss="margin")(255 * IMAGES, LABELS)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        orthattack.PGD(classifier(), steps=1).sweep(IMAGES, LABELS, [0.1, 2.0, 3.0, 0.2])
        orthattack.PGD(classifier(), eps=torch.tensor([0.1] * 5 + [3.0]), steps=1)(IMAGES, LABELS)
    assert [str(warning.message)[:5] for warning in seen] == ["eps=2", "eps=3"]


def test_a_search_of_the_smallest_norm_warns_of_its_radii_too():
    def said(eps: float, max_eps: float | None) -> list[str]:
        attack = Bisection(orthattack.PGD(classifier(), eps=eps, steps=1), max_eps, trials=2)
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            for _ in range(2):
                attack.run(IMAGES, LABELS)
        assert all(warning.filename == __file__ for warning in seen)
        return [str(warning.message) for warning in seen]

    (message,) = said(8, None)
    assert message.startswith("eps=8 allows every image: in linf")
    (message,) = said(8 / 255, 20)
    assert message.startswith("max_eps=20 allows every image: in linf")
    assert message.endswith("did you mean max_eps=20/255?")
    assert said(8 / 255, None) == said(8 / 255, 1.0) == []  # as far as there are images


@pytest.mark.parametrize("call", [
    lambda x, y: OrthoPGD(classifier(), eps=8, steps=1, bounds=(0, 255)).run(x, y),
    lambda x, y: Bisection(orthattack.Square(classifier(), eps=8, queries=2, bounds=(0, 255)), trials=2).run(x, y),
    lambda x, y: orthattack.fooled(classifier(), x, y, bounds=(0, 255)),
])  # fmt: skip
def test_images_between_0_and_1_in_bounds_of_8_bits_are_warned_of_once(call):
    def said(images: Tensor) -> list[str]:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            call(images, LABELS)
        assert all(warning.filename == __file__ for warning in seen)
        return [str(warning.message) for warning in seen if "bounds" in str(warning.message)]

    for images in (IMAGES, IMAGES.half().float(), (IMAGES > 0.5).float()):
        (message,) = said(images)
        assert re.search(r"lie in \[.*\], with bounds=\(0, 255\): they look scaled .* pass bounds=\(0, 1\)", message)
    black, noisy = torch.zeros_like(IMAGES), torch.zeros_like(IMAGES)
    noisy[:, 0, 0, 0] = 1
    for images in (black, noisy, 255 * IMAGES, 3 * IMAGES):
        assert said(images) == []


def test_what_an_attack_was_given_is_its_own():
    """Numbers that the caller changes later are not the attack's, nor those of what is made from it."""
    direction, eps = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(1)), torch.full((6,), 0.1)
    kept, radii, given = direction.clone(), eps.clone(), ["constant", direction]
    options = {"steps": 3, "random_start": False}
    made = OrthoPGD(classifier(), eps=eps, directions=given, **options)
    threat = ThreatModel("linf", eps, directions=given)
    expected = OrthoPGD(classifier(), eps=radii, directions=["constant", kept], **options).run(IMAGES, LABELS)
    direction.fill_(1.0)
    eps.fill_(0.5)
    given.append("channel-constant")
    for attack in (made, made.replace(early_stop=False), pickle.loads(pickle.dumps(made)), copy.copy(made)):
        assert same(attack.run(IMAGES, LABELS), expected)
        assert len(attack.directions) == 2
    assert torch.equal(threat.directions[1], kept)
    assert torch.equal(threat.eps, radii)
    array = np.full(6, 0.1, np.float32)
    made = OrthoPGD(classifier(), eps=array, directions=["constant", kept], **options)
    array[:] = 0.5
    assert same(made.replace(early_stop=False).run(IMAGES, LABELS), expected)


def test_threat_models_and_cards_with_the_same_directions_are_equal():
    one = torch.rand(3, 4, 4)

    def same_function(images: Tensor) -> Tensor:
        return images

    first, second = (ThreatModel("l2", 1.0, directions=[d, "constant", same_function]) for d in (one, one.clone()))
    assert first == second
    assert hash(first) == hash(second)
    assert first != ThreatModel("l2", 1.0, directions=[one + 1, "constant", same_function])
    assert first != ThreatModel("l2", 1.0, directions=["constant", one, same_function])
    assert first != ThreatModel("l2", 1.0, directions=[one])
    made = OrthoPGD(classifier(), directions=[one])
    assert made.card == made.replace(steps=2).card == pickle.loads(pickle.dumps(made)).card


def test_the_radius_of_everything_depends_on_norm_bounds_and_shape():
    assert ThreatModel("l2", 1.0, (-1, 1)).diameter((3, 5, 7)) == pytest.approx(2 * 105**0.5)
    assert ThreatModel("l1", 30.0).allows_everything((3, 2, 5))
    assert not ThreatModel("l1", 30.0).allows_everything((3, 2, 6))
    assert ThreatModel("linf", torch.tensor([0.5, 2.0])).allows_everything((3, 2, 6))


def test_a_result_prints_in_two_lines():
    result = OrthoPGD(classifier(), eps=0.1, steps=3, random_start=False).run(IMAGES, LABELS)
    fooled = int(result.success.sum())
    text = str(result)
    assert text == repr(result)
    assert text.startswith(f"AttackResult: {fooled} of 6 fooled; norm ")
    assert f"{result.norm.max():.4g} (max)" in text
    assert "24 forward and 18 gradient calls" in text
    assert text.count("\n") == 1
    assert repr(OrthoPGD(classifier()).run(IMAGES[:0], LABELS[:0])) == "AttackResult: no images"


def test_attacks_are_equal_by_class_options_and_weights():
    model = classifier()
    attack = OrthoPGD(model, eps=torch.full((6,), 0.03), steps=2, directions=[IMAGES[0]], generator=seeded(1))
    assert attack == attack.replace(steps=2, generator=seeded(1))
    assert attack != PGD(model, eps=torch.full((6,), 0.03), steps=2, directions=[IMAGES[0]], generator=seeded(1))
    for other in (
        attack.replace(steps=3),
        attack.replace(eps=torch.full((6,), 0.02)),
        attack.replace(eps=torch.full((5,), 0.03)),
        attack.replace(eps=0.03),
        attack.replace(directions=[IMAGES[1]]),
        attack.replace(directions=[]),
        attack.replace(generator=seeded(2)),
        attack.replace(generator=None),
    ):
        assert attack != other
    changed = copy.deepcopy(attack)
    with torch.no_grad():
        next(changed.model.parameters()).add_(1)
    assert attack != changed
    assert Bisection(attack) == Bisection(copy.deepcopy(attack))
    assert Bisection(attack) != Bisection(changed)
    assert attack != 3


def test_results_and_threat_models_are_equal_by_their_values():
    attack = OrthoPGD(classifier(), eps=torch.full((6,), 0.03), steps=2)
    result = attack.run(IMAGES, LABELS, seeds=range(6))
    assert result == copy.deepcopy(result)
    assert result == pickle.loads(pickle.dumps(result))
    assert result in [attack.run(IMAGES, LABELS, seeds=range(6))]
    assert result != OrthoPGD(classifier(), eps=0.01, steps=2).run(IMAGES, LABELS)
    assert result != OrthoPGD(classifier(), eps=0.01, steps=2).run(IMAGES[:2], LABELS[:2])
    assert result != 3
    assert attack.threat == copy.deepcopy(attack.threat)
    assert hash(attack.threat) == hash(copy.deepcopy(attack.threat))
    for other in (torch.full((6,), 0.04), torch.full((3,), 0.03), 0.03):
        assert attack.threat != OrthoPGD(classifier(), eps=other, steps=2).threat


@pytest.mark.parametrize("eps", [1e29, 1e31])
def test_a_radius_of_any_size_is_warned_of(eps):
    with pytest.warns(UserWarning, match="allows every image"):
        OrthoPGD(classifier(), eps=eps, steps=1).run(IMAGES, LABELS)


def test_a_loss_that_was_not_made_is_refused():
    with pytest.raises(
        ValueError, match=r"got <class .*CrossEntropyLoss'>: make one first, CrossEntropyLoss\(\.\.\.\)"
    ):
        OrthoPGD(classifier(), loss=nn.CrossEntropyLoss)

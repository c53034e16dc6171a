"""torchattacks' names and arguments: the same signatures, and attacks no weaker than theirs."""

from __future__ import annotations

import copy
import inspect
import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from orthattack import Normalized, OrthoAutoAttack, alignment
from orthattack.attacks import Draws
from orthattack.eval.data.load import load_dataset
from orthattack.eval.models.load import load_classifier
from orthattack.interop import torchattacks as ours
from tests.attacks.test_attacks import drawn, small_model

pytestmark = pytest.mark.heavy

NAMES = ["FGSM", "PGD", "PGDL2", "MIFGSM", "NIFGSM", "APGD"]
MADE_ALIKE = ["BIM", "DIFGSM", "EOTPGD", "RFGSM", "SINIFGSM", "TIFGSM", "TPGD", "VMIFGSM", "VNIFGSM"]
SEEDED = {"APGDT": {"n_restarts": 1}, "FAB": {"steps": 5}, "Square": {"n_queries": 500}, "AutoAttack": {}}
names = pytest.mark.parametrize("name", [*NAMES, *MADE_ALIKE, *SEEDED])
on_a_trained_model = pytest.mark.parametrize(
    "name", [*NAMES, *(pytest.param(name, marks=pytest.mark.slow) for name in [*MADE_ALIKE, "APGDT", "FAB", "Square"])]
)


@pytest.fixture(scope="module")
def trained():
    classifier = load_classifier("cifar10-robust")
    (batch,) = load_dataset("cifar10-samples", classifier).batches(20, classifier.preprocessing)
    return classifier.model, batch.images, batch.labels


def kept(model, images, labels) -> int:
    with torch.no_grad():
        return int((model(images).argmax(1) == labels).sum())


@names
def test_arguments_are_torchattacks_own(name):
    theirs = pytest.importorskip("torchattacks", reason="needs the extra torchattacks")
    expected = inspect.signature(getattr(theirs, name)).parameters
    found = inspect.signature(getattr(ours, name)).parameters
    assert list(found)[: len(expected)] == list(expected)
    for key, parameter in expected.items():
        assert found[key].default == parameter.default, key
    assert [p.kind for p in found.values()][len(expected) :] == [inspect.Parameter.KEYWORD_ONLY]


@on_a_trained_model
def test_attacks_are_no_weaker_than_torchattacks(trained, name):
    theirs = pytest.importorskip("torchattacks", reason="needs the extra torchattacks")
    model, images, labels = trained
    torch.manual_seed(0)
    options = {"n_queries": 500} if name == "Square" else {}
    expected = kept(model, getattr(theirs, name)(model, **options)(images, labels), labels)
    torch.manual_seed(0)
    assert kept(model, getattr(ours, name)(model, **options)(images, labels), labels) <= expected + 1


@on_a_trained_model
@pytest.mark.parametrize("scope", [None, "image"])
def test_attacks_fool_and_scope_makes_them_orthogonal(trained, name, scope):
    model, images, labels = trained
    options = SEEDED.get(name, {"steps": 5} if name != "FGSM" else {})
    found = getattr(ours, name)(model, **options, scope=scope)(images, labels)
    assert kept(model, found, labels) < kept(model, images, labels)
    cosine = alignment(found.double() - images.double(), images.double()).abs().max()
    assert (cosine <= 1e-6) == (scope is not None)


def test_modes_and_normalisation_mean_what_they_do_there():
    model, (images, labels) = small_model(), drawn(n=12)
    attack = ours.PGD(model, eps=0.2, alpha=0.05, steps=10, random_start=False)
    assert attack.get_mode() == "default"
    away = attack(images, labels)
    attack.set_mode_targeted_by_label()
    targets = (labels + 1) % 5
    towards = attack(images, targets)
    assert kept(model, towards, targets) > kept(model, images, targets)
    attack.set_mode_targeted_by_function(lambda x, y: (y + 1) % 5)
    assert torch.equal(attack(images, labels), towards)
    attack.set_mode_default()
    assert torch.equal(attack(images, labels), away)

    mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    inner = small_model()
    normalised = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    attack = ours.PGD(inner, eps=0.05, alpha=0.02, steps=5, random_start=False)
    attack.set_normalization_used(mean, std)
    found = attack(normalised, labels) * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1)
    expected = ours.PGD(Normalized(inner, mean, std), eps=0.05, alpha=0.02, steps=5, random_start=False)(images, labels)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_a_seed_makes_calls_repeatable():
    model, (images, labels) = small_model(), drawn()
    apgd = ours.APGD(model, steps=4, seed=3)
    assert torch.equal(apgd(images, labels), apgd(images, labels))
    pgd = ours.PGD(model, steps=2)
    torch.manual_seed(1)
    first, second = pgd(images, labels), pgd(images, labels)
    torch.manual_seed(1)
    assert torch.equal(pgd(images, labels), first)
    assert not torch.equal(second, first)


def test_what_is_not_there_is_said():
    with pytest.raises(ValueError, match="norm must be one of 'Linf', 'L2'; got 'L1'"):
        ours.APGD(small_model(), norm="L1")
    with pytest.raises(ValueError, match="loss must be one of 'ce', 'dlr'; got 'margin'"):
        ours.APGD(small_model(), loss="margin")
    with pytest.raises(ValueError, match=r"p_init is 0\.8 here, as published; got 0\.3"):
        ours.Square(small_model(), p_init=0.3)
    missing = (
        r"FGSM of orthattack.interop.torchattacks has no 'forward'; of the methods there are the call, get_mode, load"
    )
    with pytest.raises(AttributeError, match=missing):
        _ = ours.FGSM(nn.Identity()).forward
    multi = ours.MultiAttack([ours.FGSM(model := small_model()), ours.PGD(model)])
    with pytest.raises(ValueError, match="MultiAttack has no targeted mode; MultiAttack's are those of its attacks"):
        multi.set_mode_targeted_random()
    with pytest.raises(ValueError, match="attacks must be two or more; got 1"):
        ours.MultiAttack([ours.FGSM(model)])
    with pytest.raises(ValueError, match="attacks must be of one model"):
        ours.MultiAttack([ours.FGSM(model), ours.FGSM(small_model())])


def test_attributes_are_set_and_used_or_refused():
    model, (images, labels) = small_model(), drawn(n=4)
    attack = ours.PGD(model, eps=0.2, alpha=0.05, steps=3, random_start=False)
    for name, value in {"eps": np.float32(0.05), "alpha": 0.02, "steps": np.int64(5), "scope": "image"}.items():
        setattr(attack, name, value)
    expected = ours.PGD(model, float(np.float32(0.05)), 0.02, 5, random_start=False, scope="image")(images, labels)
    assert torch.equal(attack(images, labels), expected)
    other = copy.deepcopy(model)
    for parameter in other.parameters():
        parameter.data.neg_()
    attack.model = other
    assert attack.model_name == "Sequential"
    assert torch.equal(
        attack(images, labels), ours.PGD(other, float(np.float32(0.05)), 0.02, 5, False, scope="image")(images, labels)
    )
    with pytest.raises(ValueError, match="steps must be an integer >= 1; got 0"):
        attack.steps = 0
    assert attack.steps == 5
    with pytest.raises(AttributeError, match=r"PGD has no attribute 'epsilon' to set; it has .*eps, alpha"):
        attack.epsilon = 0.1
    with pytest.raises(AttributeError, match="targeted cannot be set as an attribute: call one of set_mode_targeted"):
        attack.targeted = True
    with pytest.raises(AttributeError, match="normalization_used cannot be set as an attribute: call set_norm"):
        attack.normalization_used = None
    with pytest.raises(ValueError, match=r"target_map_function must be a function of \(images, labels\); got 3"):
        attack.set_mode_targeted_by_function(3)


@on_a_trained_model
def test_attacks_pickle_in_the_mode_they_are_in(name):
    model, (images, labels) = small_model(), drawn(n=4)
    attack = getattr(ours, name)(model, **({"n_queries": 20} if name == "Square" else {}))
    if "targeted" in attack.supported_mode:
        attack.set_mode_targeted_by_label()
    for twin in (pickle.loads(pickle.dumps(attack)), copy.deepcopy(attack), copy.copy(attack)):
        assert repr(twin) == repr(attack)
        torch.manual_seed(1)
        expected = attack(images, labels)
        torch.manual_seed(1)
        assert torch.equal(twin(images, labels), expected)


def test_autoattack_is_ours_as_published():
    """Minutes on a trained model; tests/attacks/test_auto.py and the benchmark against the official code have those."""
    attack = ours.AutoAttack(small_model(), norm="L2", eps=0.5, version="rand", seed=3, scope="channel")
    made = attack._made(attack.model, attack._generator())
    assert isinstance(made, OrthoAutoAttack)
    assert (made.norm, made.eps, made.version, made.steps, made.scope) == ("l2", 0.5, "rand", 100, "channel")
    assert made.generator.initial_seed() == 3


def test_targets_are_drawn_or_found_among_the_other_classes():
    model, (images, labels) = small_model(), drawn(n=12)
    seen: list[torch.Tensor] = []
    attack = ours.PGD(model, eps=0.05, steps=1, random_start=False)

    class Looking:
        """In the place of an attack of ours, it notes the goal that it is given."""

        def run(self, images, goal, start):
            assert start is None
            seen.append(goal)
            return SimpleNamespace(adversarials=images)

    attack._made = lambda *_: Looking()
    attack.set_mode_targeted_random()
    assert attack.get_mode() == "targeted(random)"
    torch.manual_seed(0)
    for _ in range(20):
        attack(images, labels)
    drawn_targets = torch.stack(seen)
    assert (drawn_targets != labels).all()
    assert all(
        set(column.tolist()) == set(range(5)) - {int(y)} for column, y in zip(drawn_targets.T, labels, strict=True)
    )
    torch.manual_seed(0)
    attack(images, labels)
    assert torch.equal(seen[-1], drawn_targets[0])

    order = model(images).argsort(1).tolist()
    for kth in (1, 2, 4):
        attack.set_mode_targeted_least_likely(kth)
        attack(images, labels)
        expected = [[c for c in line if c != y][kth - 1] for line, y in zip(order, labels.tolist(), strict=True)]
        assert seen[-1].tolist() == expected
    attack.set_mode_targeted_least_likely(5)
    with pytest.raises(ValueError, match="kth_min must be at most 4, the number of other classes; got 5"):
        attack(images, labels)
    attack.set_mode_default()
    attack(images)  # without labels, those that the model predicts
    assert torch.equal(seen[-1], model(images).argmax(1))


@pytest.mark.parametrize("save_type", ["float", "int"])
@pytest.mark.parametrize("normalised", [False, True])
def test_what_is_saved_is_loaded(tmp_path, save_type, normalised):
    model, (images, labels) = small_model(), drawn(n=6)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    attack = ours.PGD(model, eps=0.2, alpha=0.05, steps=5, random_start=False)
    expected = (ours.PGD(Normalized(model, mean, std), 0.2, 0.05, 5, False) if normalised else attack)(images, labels)
    given = images
    if normalised:
        attack.set_normalization_used(mean, std)
        given = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    path = tmp_path / "data.pt"
    figures = attack.save(
        zip(given.split(4), labels.split(4), strict=True), path, False, True, True, True, save_type=save_type
    )
    found, again, predicted, clean = next(iter(attack.load(path, load_predictions=True, load_clean_inputs=True)))
    grid = 1e-5 if save_type == "float" else 0.5 / 255 + 1e-5
    torch.testing.assert_close(found, expected, rtol=0, atol=grid)
    torch.testing.assert_close(clean, images, rtol=0, atol=grid)
    assert torch.equal(again, labels)
    judge = Normalized(model, mean, std) if normalised else model
    assert torch.equal(predicted, judge(expected).argmax(1))
    right = predicted == labels
    assert figures[0] == 100 * float(right.float().mean())
    distance = (expected - images)[~right].flatten(1).norm(dim=1).mean()
    assert figures[1] == pytest.approx(float(distance), abs=1e-4)
    assert figures[2] > 0
    (normal, _) = next(iter(attack.load(path, normalize={"mean": mean, "std": std})))
    torch.testing.assert_close(normal * torch.tensor(std).view(3, 1, 1) + torch.tensor(mean).view(3, 1, 1), found)
    assert [len(batch) for batch, _ in attack.load(path, batch_size=5)] == [5, 1]
    assert attack.save([(given, labels)], verbose=False) is None
    assert sorted(tmp_path.iterdir()) == [path]


def test_what_was_finished_is_kept_where_a_loader_fails(tmp_path):
    model, (images, labels) = small_model(), drawn(n=6)

    def failing():
        yield images[:4], labels[:4]
        raise OSError("gone")

    attack = ours.FGSM(model)
    with pytest.raises(OSError, match="gone"):
        attack.save(failing(), tmp_path / "data.pt", verbose=False)
    found, _ = next(iter(attack.load(tmp_path / "data.pt")))
    assert torch.equal(found, attack(images[:4], labels[:4]))
    with pytest.raises(ValueError, match=r"data.pt holds no preds: see save"):
        attack.load(tmp_path / "data.pt", load_predictions=True)


def test_a_file_of_torchattacks_is_loaded(tmp_path):
    theirs = pytest.importorskip("torchattacks", reason="needs the extra torchattacks")
    model, (images, labels) = small_model(), drawn(n=4)
    theirs.FGSM(model).save([(images, labels)], tmp_path / "data.pt", verbose=False)
    found, again = next(iter(ours.FGSM.load(tmp_path / "data.pt")))
    assert torch.equal(found, theirs.FGSM(model)(images, labels))
    assert torch.equal(again, labels)


@pytest.mark.parametrize("normalised", [False, True])
def test_of_several_attacks_each_has_what_the_ones_before_left(normalised):
    model, (images, labels) = small_model(), drawn(n=12)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.25, 0.3]
    judge = Normalized(model, mean, std) if normalised else model
    labels = judge(images).argmax(1)
    weak, strong = ours.FGSM(model, eps=0.02), ours.PGD(model, 0.2, 0.05, 10, False)
    for attack in (weak, strong):
        if normalised:
            attack.set_normalization_used(mean, std)
    given = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1) if normalised else images
    multi = ours.MultiAttack([weak, strong])
    found = multi(given, labels)
    first, second = weak(given, labels), strong(given, labels)
    felled = model(first).argmax(1) != labels
    both = model(second).argmax(1) != labels
    assert 0 < felled.sum() < len(labels)
    assert (both & ~felled).any()
    torch.testing.assert_close(found[felled], first[felled], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[both & ~felled], second[both & ~felled], rtol=0, atol=1e-5)
    torch.testing.assert_close(found[~both & ~felled], given[~both & ~felled], rtol=0, atol=1e-5)
    assert repr(multi).startswith("MultiAttack(")


@pytest.mark.filterwarnings("ignore:the model")  # in training mode an answer depends on the batch, and is drawn
@pytest.mark.parametrize(
    "modes", [(False, False, False), (True, False, False), (True, True, False), (True, False, True)]
)
def test_a_model_is_attacked_in_the_mode_asked_for(modes):
    modules = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.1), nn.Flatten(), nn.Linear(4 * 36, 5)]
    model = nn.Sequential(*modules).eval()
    images, labels = torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 2, 3])
    seen = set()
    model.register_forward_hook(lambda *_: seen.add((model.training, modules[1].training, modules[2].training)))
    attack = ours.PGD(model, steps=1, random_start=False)
    attack.set_model_training_mode(*modes)
    counted = modules[1].num_batches_tracked.clone()
    attack(images, labels)
    assert seen == {modes}
    assert not any(module.training for module in model.modules())
    assert torch.equal(modules[1].num_batches_tracked, counted)


def test_every_attack_is_named_and_does_what_torchattacks_test_asks():
    """What torchattacks' own test does with each of its attacks: a call, and one towards random classes."""
    model, (images, labels) = small_model(), drawn(n=12)
    clean = kept(model, images, labels)
    for name in ours.__all__:
        if name in ours.__wrapper__:
            continue
        attack = getattr(ours, name)(model, **({"n_queries": 20} if name == "Square" else {}))
        if name != "AutoAttack":  # seconds, and done on a trained model
            assert kept(model, attack(images, labels), labels) <= clean
        is_untargeted = name in ("TPGD", "APGDT", "FAB", "AutoAttack")
        assert attack.supported_mode == ("default", "targeted")[: 1 if is_untargeted else 2]
        if is_untargeted:
            continue
        attack.set_mode_targeted_random(quiet=True)
        attack(images, labels)


# --- equal iterates ---------------------------------------------------------------------------------------------------


class Repeated:
    """What an attack of torchattacks has drawn, in its order: to be drawn again, as numbers in [0, 1), by ours."""

    def __init__(self, monkeypatch, attack, side):
        self.attack, self.side, self.drawn, self.patch = attack, side, [], monkeypatch
        for owner, name in ((torch, "randint"), (torch, "rand"), (torch.Tensor, "uniform_")):
            self._watch(owner, name)

    def _watch(self, owner, name):
        original = getattr(owner, name)

        def watched(*args, **options):
            found = original(*args, **options)
            self.drawn.append(found.clone())
            return found

        self.patch.setattr(owner, name, watched)

    def replay(self):
        """From now on ours draws the same."""
        self.patch.undo()
        drawn = iter(self.drawn)

        def uniform(draws, *shape):
            if len(shape) == 3:  # a neighbour
                return (next(drawn) / (self.attack.eps * self.attack.beta) + 1) / 2
            size, top, left, chance = (float(next(drawn)) for _ in range(4))
            smallest = int(self.side * self.attack.resize_rate)
            room = self.side - size + 1
            own = [(size - smallest + 0.5) / (self.side - smallest), (top + 0.5) / room, (left + 0.5) / room, chance]
            return torch.tensor([own] * len(draws._index), dtype=torch.float64)

        self.patch.setattr(Draws, "uniform", uniform)


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("FGSM", {}),
        ("PGD", {"random_start": False}),
        ("PGDL2", {"random_start": False, "alpha": 0.02}),
        ("MIFGSM", {"decay": 0.7}),
        ("NIFGSM", {}),
        ("BIM", {}),
        ("BIM", {"eps": 4 / 255, "steps": 0}),
        ("RFGSM", {}),
        ("EOTPGD", {"random_start": False}),
        ("TPGD", {}),
        ("SINIFGSM", {"m": 3}),
        ("VMIFGSM", {"N": 3, "beta": 1.2}),
        ("VNIFGSM", {"N": 3}),
        ("DIFGSM", {"resize_rate": 0.6, "diversity_prob": 0.7, "decay": 0.9}),
        ("DIFGSM", {"random_start": True, "diversity_prob": 0.0}),
        ("TIFGSM", {"len_kernel": 5, "resize_rate": 0.6, "decay": 1.0}),
        ("TIFGSM", {"len_kernel": 3, "kernel_name": "linear", "diversity_prob": 0.0}),
        ("TIFGSM", {"len_kernel": 3, "kernel_name": "uniform", "diversity_prob": 0.0}),
    ],
)
def test_iterates_are_torchattacks_own(monkeypatch, name, options, targeted):
    """The last ones, in float64, with the same random numbers, where Nesterov's look-ahead does not leave the ball."""
    theirs = pytest.importorskip("torchattacks", reason="needs the extra torchattacks")
    if targeted and name == "TPGD":
        return
    model, (images, labels) = small_model().double(), drawn(n=4)
    images = 0.35 + 0.3 * images.double()
    options = {"eps": 0.3, **({} if name == "FGSM" else {"alpha": 0.004, "steps": 4}), **options}
    reference, attack = getattr(theirs, name)(model, **options), getattr(ours, name)(model, **options)
    if name == "TIFGSM":
        reference.stacked_kernel = reference.stacked_kernel.double()
    if targeted:
        reference.set_mode_targeted_by_label(quiet=True)
        attack.set_mode_targeted_by_label()
    repeated = Repeated(monkeypatch, reference, images.shape[-1])
    torch.manual_seed(5)
    expected = reference(images, labels)
    if options.get("random_start"):
        del repeated.drawn[0]  # which is drawn as there
    repeated.replay()
    torch.manual_seed(5)
    start = attack._start(images)
    found = attack._made(model, attack._generator()).replace(keep="last").run(images, labels, start=start)
    torch.testing.assert_close(found.adversarials, expected, rtol=0, atol=2e-7)
    assert ((expected - images).abs().amax((1, 2, 3)) > 0.003).all()


TYPED = """
import torch
from torch import nn
from orthattack.interop import torchattacks

model, images, labels = nn.Flatten(), torch.rand(2, 3, 4, 4), torch.tensor([0, 1])
atk = torchattacks.PGD(model, eps=8 / 255, alpha=2 / 255, steps=4)
atk.set_normalization_used(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
atk.set_mode_targeted_by_function(lambda images, labels: (labels + 1) % 10)
adv_images: torch.Tensor = atk(images, labels)
other = torchattacks.TIFGSM(model, 8 / 255, 2 / 255, 4, 1.0, "linear", scope="image")
multi = torchattacks.MultiAttack([torchattacks.FGSM(model, 8 / 255), other])
"""
MISTAKES = {
    "PGD(model, epsilon=8 / 255)": 'Unexpected keyword argument "epsilon" for "PGD"',
    'APGD(model, "L3")': 'Argument 2 to "APGD" has incompatible type',
    'FGSM(model, 8 / 255, "image")': 'Too many positional arguments for "FGSM"',
    "CW(model)": 'Module has no attribute "CW"',
}


@pytest.mark.slow
def test_type_checkers_know_the_arguments(tmp_path):
    """torchattacks' first lines are right, and each mistake after them is seen, on its line."""
    api = pytest.importorskip("mypy.api", reason="needs mypy")
    (tmp_path / "script.py").write_text(TYPED + "".join(f"torchattacks.{call}\n" for call in MISTAKES))
    options = ["--strict", "--follow-imports=silent", f"--cache-dir={tmp_path / 'cache'}", "--config-file="]
    said, _, _ = api.run([*options, str(tmp_path / "script.py")])
    errors, first = [line for line in said.splitlines() if " error: " in line], TYPED.count("\n") + 1
    assert len(errors) == len(MISTAKES), said
    for number, (error, message) in enumerate(zip(errors, MISTAKES.values(), strict=True)):
        assert f":{first + number}: error: {message}" in error

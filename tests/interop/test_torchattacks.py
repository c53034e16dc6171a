"""torchattacks' names and arguments: the same signatures, and attacks no weaker than theirs."""

from __future__ import annotations

import copy
import inspect
import pickle

import numpy as np
import pytest
import torch
from torch import nn

from orthattack import Normalized, alignment
from orthattack.eval.data.load import load_dataset
from orthattack.eval.models.load import load_classifier
from orthattack.interop import torchattacks as ours
from tests.attacks.test_attacks import drawn, small_model

pytestmark = pytest.mark.heavy

NAMES = ["FGSM", "PGD", "PGDL2", "MIFGSM", "NIFGSM", "APGD"]


@pytest.fixture(scope="module")
def trained():
    classifier = load_classifier("cifar10-robust")
    (batch,) = load_dataset("cifar10-samples", classifier).batches(20, classifier.preprocessing)
    return classifier.model, batch.images, batch.labels


def kept(model, images, labels) -> int:
    with torch.no_grad():
        return int((model(images).argmax(1) == labels).sum())


@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_torchattacks_own(name):
    theirs = pytest.importorskip("torchattacks", reason="needs the extra torchattacks")
    expected = inspect.signature(getattr(theirs, name)).parameters
    found = inspect.signature(getattr(ours, name)).parameters
    assert list(found)[: len(expected)] == list(expected)
    for key, parameter in expected.items():
        assert found[key].default == parameter.default, key
    assert [p.kind for p in found.values()][len(expected) :] == [inspect.Parameter.KEYWORD_ONLY]


@pytest.mark.parametrize("name", NAMES)
def test_attacks_are_no_weaker_than_torchattacks(trained, name):
    theirs = pytest.importorskip("torchattacks", reason="needs the extra torchattacks")
    model, images, labels = trained
    torch.manual_seed(0)
    expected = kept(model, getattr(theirs, name)(model)(images, labels), labels)
    torch.manual_seed(0)
    assert kept(model, getattr(ours, name)(model)(images, labels), labels) <= expected + 1


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("scope", [None, "image"])
def test_attacks_fool_and_scope_makes_them_orthogonal(trained, name, scope):
    model, images, labels = trained
    options = {"steps": 5} if name != "FGSM" else {}
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
    with pytest.raises(AttributeError, match=r"FGSM of orthattack.interop.torchattacks has no 'save'"):
        ours.FGSM(nn.Identity()).save()


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
    assert torch.equal(
        attack(images, labels), ours.PGD(other, float(np.float32(0.05)), 0.02, 5, False, scope="image")(images, labels)
    )
    with pytest.raises(ValueError, match="steps must be an integer >= 1; got 0"):
        attack.steps = 0
    assert attack.steps == 5
    with pytest.raises(AttributeError, match=r"PGD has no attribute 'epsilon' to set; it has .*eps, alpha"):
        attack.epsilon = 0.1
    with pytest.raises(AttributeError, match="targeted cannot be set as an attribute: call set_mode_targeted_by_label"):
        attack.targeted = True
    with pytest.raises(AttributeError, match="normalization_used cannot be set as an attribute: call set_norm"):
        attack.normalization_used = None
    with pytest.raises(ValueError, match=r"target_map_function must be a function of \(images, labels\); got 3"):
        attack.set_mode_targeted_by_function(3)


@pytest.mark.parametrize("name", NAMES)
def test_attacks_pickle_in_the_mode_they_are_in(name):
    model, (images, labels) = small_model(), drawn(n=4)
    attack = getattr(ours, name)(model)
    attack.set_mode_targeted_by_label()
    for twin in (pickle.loads(pickle.dumps(attack)), copy.deepcopy(attack), copy.copy(attack)):
        assert repr(twin) == repr(attack)
        torch.manual_seed(1)
        expected = attack(images, labels)
        torch.manual_seed(1)
        assert torch.equal(twin(images, labels), expected)

"""Attacks as objects: what is read from them, what is refused, and that copies of any sort do the same."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch import Tensor, nn

import orthattack
from orthattack import DetectorEvasion, MinimumNorm, OrthoPGD

NAMES = [name for name in orthattack.attacks.__all__ if name not in ("AttackResult", "DetectorEvasion", "MinimumNorm")]
IMAGES = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 1, 2, 0, 1, 2])


def classifier(outputs: int = 3) -> nn.Module:
    torch.manual_seed(outputs)
    return nn.Sequential(nn.Flatten(), nn.Linear(48, outputs))


def make(name: str, **options: object) -> object:
    """An attack of every sort, quick, and one that draws if it can."""
    if name == "MinimumNorm":
        return MinimumNorm(OrthoPGD(classifier(), eps=8 / 255, steps=2), trials=4, **options)
    if name == "DetectorEvasion":
        return DetectorEvasion(classifier(), classifier(1), steps=3, random_start=True, **options)
    quick = {"FGSM": {}, "Square": {"queries": 5}, "AutoAttack": {"steps": 2, "queries": 5}}
    return getattr(orthattack, name)(classifier(), **{**quick.get(name.removeprefix("Ortho"), {"steps": 2}), **options})


ALL = [*NAMES, "DetectorEvasion", "MinimumNorm"]


def same(a: orthattack.AttackResult, b: orthattack.AttackResult) -> bool:
    return all(torch.equal(getattr(b, name), value) for name, value in vars(a).items())


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

"""What every attack promises, kept on a trained model: each attack against each promise."""

from __future__ import annotations

import copy
import functools
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import orthattack
from orthattack import AttackResult, Bisection, DetectorEvasion, OrthoAPGD, alignment
from orthattack.eval.data.load import load_dataset
from orthattack.eval.models.load import load_classifier
from tests.attacks.test_family import FAMILY, Alone, sizes

pytestmark = pytest.mark.heavy

RADII = {"linf": 8 / 255, "l2": 1.5, "l1": 40.0, "l0": 24.0}
SETTINGS: dict[str, dict[str, Any]] = {
    **FAMILY,
    **{name: {"queries": 60} for name in ("Square", "OrthoSquare", "SparseRS", "OrthoSparseRS")},
    **{name: {"queries": 90, "pairs": 14} for name in ("NES", "OrthoNES")},
    **{name: {"queries": 300, "probes": 20} for name in ("HopSkipJump", "OrthoHopSkipJump")},
    **{name: {"steps": 60} for name in ("SigmaZero", "OrthoSigmaZero")},
    "DetectorEvasion": {"steps": 6, "scope": "image"},
    "Bisection": {},
}
COUNT = 4
DEVICES = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
NORMS = {name: getattr(getattr(orthattack, name), "norms", ("linf", "l2", "l1")) for name in SETTINGS}
names = pytest.mark.parametrize("name", SETTINGS)
in_each_norm = pytest.mark.parametrize(("name", "norm"), [(name, norm) for name in SETTINGS for norm in NORMS[name]])


@functools.cache
def trained() -> tuple[nn.Module, Tensor, Tensor]:
    """A standard model and images that it classifies correctly."""
    classifier = load_classifier("cifar10-standard")
    batch = next(iter(load_dataset("cifar10-samples", classifier).batches(COUNT, classifier.preprocessing)))
    return classifier.model, batch.images, batch.labels


def roughness(images: Tensor) -> Tensor:
    """A detector's score: how unlike the neighbours' mean the pixels are."""
    smooth = functional.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    return (images - smooth).square().mean((1, 2, 3))


THRESHOLD = 1.0  # no image is that rough: that evasion evades is tested on a trained detector, in test_detector.py


def make(name: str, model: nn.Module, norm: str | None = None) -> Any:
    norm = norm or NORMS[name][0]
    options = {"norm": norm, "eps": RADII[norm], **SETTINGS[name]}
    if name == "Bisection":
        inner = OrthoAPGD(model, norm=norm, eps=RADII[norm] / 4, steps=5, generator=torch.Generator().manual_seed(0))
        return Bisection(inner, max_eps=RADII[norm], trials=4)
    if name == "DetectorEvasion":
        return DetectorEvasion(model, roughness, THRESHOLD, **options)
    if name not in ("FGSM", "OrthoFGSM"):  # which draw nothing
        # Of so few queries half of the seeds let these fool an image.
        seed = 26 if name.endswith(("NES", "HopSkipJump")) else 0
        options["generator"] = torch.Generator().manual_seed(seed)
    return getattr(orthattack, name)(model, **options)


@functools.cache
def outcome(name: str, norm: str) -> AttackResult:
    model, images, labels = trained()
    return make(name, model, norm).run(images, labels)


def assert_feasible(name: str, norm: str, images: Tensor, found: Tensor, cosine: float = 1e-6) -> None:
    """In float64, from the tensors themselves."""
    assert found.isfinite().all()
    assert found.min() >= 0
    assert found.max() <= 1
    delta = found.double() - images.double()
    assert (sizes(delta, norm) <= RADII[norm] * (1 + 1e-6)).all()
    if name.startswith("Ortho") or name in ("DetectorEvasion", "Bisection"):
        assert alignment(delta, images.double()).abs().max() <= cosine


@pytest.mark.heavy
@in_each_norm
def test_it_fools_the_model_and_says_so(name, norm):
    model, images, labels = trained()
    result = outcome(name, norm)
    with torch.no_grad():
        assert (model(images).argmax(1) == labels).all()
        assert torch.equal(result.success, model(result.adversarials).argmax(1) != labels)
    # Sixty squares, three estimates, a few jumps, or one step or few of a hundredth of the pixels each, fool some.
    few = norm == "l1" or name.endswith(("Square", "NES", "SparseRS", "Jump", "FGSM"))
    assert int(result.success.sum()) >= (1 if few else COUNT - 1)


@pytest.mark.heavy
@in_each_norm
def test_it_stays_inside_the_threat_model(name, norm):
    _, images, _ = trained()
    result = outcome(name, norm)
    assert_feasible(name, norm, images, result.adversarials)
    torch.testing.assert_close(result.norm, sizes(result.adversarials.double() - images.double(), norm))


@names
def test_the_same_seed_gives_the_same_bits(name):
    model, images, labels = trained()
    again = make(name, model).run(images, labels)
    for field, value in vars(outcome(name, NORMS[name][0])).items():
        assert torch.equal(value, getattr(again, field)), field


@names
def test_a_sample_with_a_seed_does_not_depend_on_its_batch(name):
    model, images, labels = trained()
    attack = make(name, Alone(model))
    together = attack.run(images[:2], labels[:2], seeds=[5, 6])
    alone = attack.run(images[1:2], labels[1:2], seeds=[6])
    for field, value in vars(alone).items():
        assert torch.equal(value[0], getattr(together, field)[1]), field


@pytest.mark.heavy
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("dtype", "cosine"), [(torch.float64, 1e-12), (torch.bfloat16, 5e-2)])
@names
def test_other_dtypes_and_devices(name, dtype, cosine, device):
    model, images, labels = trained()
    model = copy.deepcopy(model).to(device, dtype)
    images, labels = images[:3].to(device, dtype), labels[:3].to(device)
    result = make(name, model).run(images, labels)
    found = result.adversarials
    assert (found.dtype, found.device) == (dtype, images.device)
    assert_feasible(name, NORMS[name][0], images, found, cosine)
    assert {value.device for value in vars(result).values()} == {images.device}
    with torch.no_grad():
        assert torch.equal(result.success, model(found).argmax(1) != labels)
    assert int(result.success.sum()) >= 1 or name.endswith("HopSkipJump")  # which minimises, and may end beyond eps


@names
def test_bad_input_is_explained_and_leaves_the_model_alone(name):
    model, images, labels = trained()
    model = copy.deepcopy(model).train()
    for k, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(k % 2 == 0)
    flags = [p.requires_grad for p in model.parameters()]
    state = {key: value.clone() for key, value in model.state_dict().items()}
    attack = make(name, model)
    nowhere = images.clone()
    nowhere[2, 0, 0, 0] = math.nan
    for x, y, message in [
        (images * 4 - 2, labels, r"images must lie in bounds \(0, 1\); found min .* they look normalised"),
        (images * 255, labels, "they look 8-bit"),
        (nowhere, labels, r"images must be finite; found NaN or infinity \(sample 2\)"),
        ((images * 255).byte(), labels, "images must be floating point; got torch.uint8"),
        (images[0], labels[:1], r"images must have shape \(N, C, H, W\); got \(3, 32, 32\)"),
        (images, labels[:2], r"labels must have shape \(4,\), one per image; got \(2,\)"),
        (images, labels.float(), "labels must be integers; got torch.float32"),
        (images, labels + 10, r"labels must lie in \[0, 9\], the model has 10 classes; found 1\d \(sample 0\)"),
        (images.numpy(), labels, "images must be a tensor; got ndarray: convert it"),
    ]:
        with pytest.raises(ValueError, match=message):
            attack(x, y)
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())

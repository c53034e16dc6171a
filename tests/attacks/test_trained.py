"""The attacks on trained models and real photographs."""

from __future__ import annotations

import foolbox
import pytest
import torch
from torch import Tensor, nn

from orthattack import FGSM, PGD, OrthoFGSM, OrthoPGD, alignment
from orthattack.eval.data import load_photographs
from orthattack.eval.models import load_classifier

EPS = 8 / 255


@pytest.fixture(scope="module", params=["cifar10-standard", "cifar10-robust"])
def trained(request) -> tuple[nn.Module, Tensor, Tensor]:
    classifier = load_classifier(request.param)
    (batch,) = load_photographs("cifar10-samples", classifier).batches(20, classifier.preprocessing)
    return classifier.model, batch.images, batch.labels


def robust(model: nn.Module, adversarials: Tensor, labels: Tensor) -> float:
    with torch.inference_mode():
        return float((model(adversarials).argmax(1) == labels).float().mean())


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_stronger_attacks_leave_less_robust_accuracy(trained, norm):
    model, images, labels = trained
    eps = EPS if norm == "linf" else 0.5
    clean = robust(model, images, labels)
    one = robust(model, FGSM(model, norm=norm, eps=eps)(images, labels), labels)
    ten = robust(model, PGD(model, norm=norm, eps=eps, generator=seeded())(images, labels), labels)
    ortho = robust(model, OrthoPGD(model, norm=norm, eps=eps, generator=seeded())(images, labels), labels)
    assert ten <= one < clean
    assert ten <= ortho <= ten + 0.05 + 1e-6  # one image of twenty


def test_a_standard_model_falls_to_an_orthogonal_perturbation():
    classifier = load_classifier("cifar10-standard")
    (batch,) = load_photographs("cifar10-samples", classifier).batches(20, classifier.preprocessing)
    result = OrthoPGD(classifier.model, eps=EPS, steps=20, generator=seeded()).run(batch.images, batch.labels)
    assert result.success.all()
    assert result.cosine.max() <= 1e-6


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("scope", ["image", "channel", "pixel"])
def test_constraints_hold_on_photographs(trained, norm, scope):
    model, images, labels = trained
    eps = EPS if norm == "linf" else 0.5
    for attack in (
        OrthoFGSM(model, norm=norm, eps=eps, scope=scope),
        OrthoPGD(model, norm=norm, eps=eps, scope=scope, steps=5, generator=seeded()),
        OrthoPGD(model, norm=norm, eps=eps, scope=scope, steps=5, early_stop=True, generator=seeded()),
    ):
        adversarials = attack(images, labels)
        delta = adversarials.double() - images.double()
        size = delta.abs().amax((1, 2, 3)) if norm == "linf" else delta.flatten(1).norm(dim=1)
        assert adversarials.min() >= 0
        assert adversarials.max() <= 1
        assert size.max() <= eps * (1 + 1e-6)
        assert alignment(delta, images.double(), scope).abs().max() <= 1e-6


def test_projecting_only_the_gradient_does_not_make_the_perturbation_orthogonal(trained):
    """Why enforce="perturbation" exists."""
    model, images, labels = trained
    textbook = OrthoPGD(model, eps=EPS, enforce="gradient", generator=seeded()).run(images, labels)
    plain = PGD(model, eps=EPS, generator=seeded()).run(images, labels)
    assert textbook.cosine.max() > 1e-2
    assert textbook.cosine.mean() > 0.2 * plain.cosine.mean()


def test_pgd_is_as_strong_as_foolboxs_from_the_same_start(trained):
    """Without a random start the two take the same steps; ours returns the best of them, Foolbox the last."""
    model, images, labels = trained
    attack = foolbox.attacks.LinfPGD(rel_stepsize=0.25, steps=10, random_start=False)
    _, theirs, _ = attack(foolbox.PyTorchModel(model, bounds=(0, 1)), images, labels, epsilons=EPS)
    ours = PGD(model, eps=EPS, alpha=0.25 * EPS, steps=10, random_start=False).run(images, labels)
    assert robust(model, ours.adversarials, labels) <= robust(model, theirs, labels)
    last = ours.steps == 10
    assert last.sum() >= 5
    differing = ((ours.adversarials - theirs)[last].abs() > 1e-5).float().mean()
    assert differing < 0.01  # signs of gradients that are nearly zero


def test_restarts_and_steps_never_help_the_model(trained):
    model, images, labels = trained
    one = OrthoPGD(model, eps=4 / 255, steps=5, generator=seeded()).run(images, labels)
    five = OrthoPGD(model, eps=4 / 255, steps=5, restarts=3, generator=seeded()).run(images, labels)
    assert (five.success | ~one.success).all()
    assert (five.loss >= one.loss - 1e-6)[five.success == one.success].all()


def test_targeted_attacks_reach_targets_on_the_standard_model():
    classifier = load_classifier("cifar10-standard")
    (batch,) = load_photographs("cifar10-samples", classifier).batches(20, classifier.preprocessing)
    targets = (batch.labels + 3) % 10
    result = OrthoPGD(classifier.model, eps=EPS, steps=40, targeted=True, generator=seeded()).run(batch.images, targets)
    assert result.success.float().mean() >= 0.8
    assert result.cosine.max() <= 1e-6


@pytest.mark.parametrize("attack", [FGSM, OrthoFGSM, PGD, OrthoPGD])
@pytest.mark.parametrize("loss", ["ce", "margin", "dlr"])
def test_every_loss_fools(trained, attack, loss):
    model, images, labels = trained
    assert robust(model, attack(model, eps=EPS, loss=loss)(images, labels), labels) < robust(model, images, labels)


def test_a_trained_model_in_training_mode_is_attacked_in_evaluation_mode(trained):
    model, images, labels = trained
    expected = OrthoPGD(model, generator=seeded())(images, labels)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    try:
        model.train()
        assert torch.equal(OrthoPGD(model, generator=seeded())(images, labels), expected)
        assert model.training
    finally:
        model.eval()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_on_tiny_imagenet_orthogonality_costs_less_than_a_point(shared):
    """200 of the photographs of docs/evaluation.md, where one image is half a point."""
    weights = shared / "weights" / "resnet18-tiny20-robust-linf-4.safetensors"
    classifier = load_classifier("resnet18", weights, image_size=64)
    photographs = load_photographs(str(shared / "data" / "tiny-imagenet-20" / "val"), classifier).limited(200)
    kept = {"plain": 0, "ortho": 0}
    for batch in photographs.batches(50, classifier.preprocessing):
        for name, attack in (("plain", PGD), ("ortho", OrthoPGD)):
            result = attack(classifier.model, eps=4 / 255, generator=seeded()).run(batch.images, batch.labels)
            kept[name] += int((~result.success).sum())
            if name == "ortho":
                assert result.cosine.max() <= 1e-6
    assert abs(kept["ortho"] - kept["plain"]) <= 4
    assert 0.3 <= kept["plain"] / 200 <= 0.6

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from orthattack import PGD, DetectorEvasion, Normalized, OrthoPGD, fooled
from orthattack.attacks.fast_copy import _folded
from orthattack.lending import borrowed


class Counting(nn.Module):
    """Batch normalisation, dropout, and a buffer and a random number used up at every call."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(4, 5)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("nothing", None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        torch.rand(1)
        return self.head(self.drop(self.norm(self.conv(x))).mean((2, 3)))


def state(model: nn.Module) -> dict[str, object]:
    return {
        "training": [m.training for m in model.modules()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "values": {k: v.clone() for k, v in model.state_dict().items()},
        "objects": [id(t) for t in (*model.parameters(), *model.buffers())],
        "hooks": [(len(m._forward_hooks), len(m._backward_hooks)) for m in model.modules()],
        "random": torch.get_rng_state(),
    }


def assert_same(before: dict[str, object], after: dict[str, object]) -> None:
    for key in ("training", "requires_grad", "objects", "hooks"):
        assert before[key] == after[key], key
    for a, b in zip(before["grad"], after["grad"], strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert before["values"].keys() == after["values"].keys()
    for key, value in before["values"].items():
        assert torch.equal(value, after["values"][key]), key
    assert torch.equal(before["random"], after["random"])


@pytest.fixture
def model() -> Counting:
    """In training mode with a frozen normalisation, a frozen bias, and gradients waiting."""
    torch.manual_seed(0)
    model = Counting().train()
    model.norm.eval()
    model.conv.bias.requires_grad_(False)
    model(torch.rand(4, 3, 6, 6)).sum().backward()
    return model


@pytest.mark.parametrize("attack", [PGD, OrthoPGD])
@pytest.mark.parametrize("early_stop", [False, True])
def test_the_model_comes_back_as_it_was(model, attack, early_stop):
    images, labels = torch.rand(4, 3, 6, 6), torch.tensor([0, 1, 2, 3])
    before = state(model)
    attack(model, steps=2, restarts=2, early_stop=early_stop)(images, labels)
    assert_same(before, state(model))


def test_it_comes_back_after_an_exception(model):
    images, labels = torch.rand(2, 3, 6, 6), torch.tensor([0, 1])

    def fail(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        raise RuntimeError("from the loss")

    before = state(model)
    with pytest.raises(RuntimeError, match="from the loss"):
        PGD(model, loss=fail)(images, labels)
    assert_same(before, state(model))


def test_a_replaced_buffer_comes_back(model):
    original = model.calls
    with borrowed(model, torch.device("cpu")):
        model.calls = torch.tensor(7.0)
    assert model.calls is original


def test_the_model_is_evaluated_in_evaluation_mode_without_weight_gradients(model):
    seen = []
    model.register_forward_pre_hook(
        lambda module, _: seen.append(
            (any(m.training for m in module.modules()), any(p.requires_grad for p in module.parameters()))
        )
    )
    PGD(model, steps=2)(torch.rand(2, 3, 6, 6), torch.tensor([0, 1]))
    assert len(seen) >= 3
    assert set(seen) == {(False, False)}


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_attacks_work_without_grad_mode(model, context):
    torch.manual_seed(1)
    images, labels = torch.rand(2, 3, 6, 6), torch.tensor([0, 1])
    expected = OrthoPGD(model, steps=3, generator=torch.Generator().manual_seed(0))(images, labels)
    before = state(model)
    with context():
        made_inside = images.clone()
        result = OrthoPGD(model, steps=3, generator=torch.Generator().manual_seed(0))(made_inside, labels.clone())
    assert_same(before, state(model))
    assert torch.equal(result, expected)
    assert not result.requires_grad


def test_a_model_made_in_inference_mode_can_be_attacked():
    with torch.inference_mode():
        torch.manual_seed(0)
        inner = Counting().eval()
        images, labels = torch.rand(2, 3, 6, 6), torch.tensor([0, 1])
        calls = inner.calls.clone()
        result = PGD(inner, steps=2, random_start=False).run(images, labels)
        assert torch.equal(inner.calls, calls)
    torch.manual_seed(0)
    outside = Counting().eval()
    assert torch.equal(result.adversarials, PGD(outside, steps=2, random_start=False)(images.clone(), labels.clone()))


def test_the_caller_keeps_images_and_labels():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    images, labels = torch.rand(2, 3, 2, 2, requires_grad=True), torch.tensor([0, 1])
    before = images.detach().clone()
    result = OrthoPGD(model).run(images, labels)
    assert torch.equal(images, before)
    assert images.grad is None
    assert labels.tolist() == [0, 1]
    assert result.adversarials.data_ptr() != images.data_ptr()


def test_normalisation_inside_the_model():
    inner = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    model = Normalized(inner, mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
    images = torch.rand(2, 3, 2, 2)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    torch.testing.assert_close(model(images), inner((images - mean.view(3, 1, 1)) / std.view(3, 1, 1)))
    assert set(model.state_dict()) == {"model.1.weight", "model.1.bias"}
    assert model.double()(images.double()).dtype == torch.float64
    with pytest.raises(ValueError, match=r"one number per channel, std > 0; got \[0.5\] and \[0\]"):
        Normalized(inner, mean=[0.5], std=[0])


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is:FutureWarning", "ignore::DeprecationWarning")
def test_scripted_models_come_back():
    model = torch.jit.script(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 3)))
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    result = PGD(model, steps=2).run(torch.rand(2, 3, 6, 6), torch.tensor([0, 1]))
    assert len(result.success) == 2
    assert all(module.training for module in model.modules())
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


class Overridden(nn.Module):
    """Does more in train() than setting the mode, and registers a buffer when it is first run."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm, self.calls = nn.Linear(12, 3), nn.BatchNorm1d(12), 0

    def train(self, mode: bool = True) -> Overridden:
        self.calls += 1
        return super().train(True)

    def forward(self, images):
        assert not self.norm.training
        if not hasattr(self, "cache"):
            self.register_buffer("cache", torch.ones(1))
        return self.linear(self.norm(images.flatten(1)))


def test_an_overridden_train_is_not_called_and_new_buffers_are_removed():
    model = Overridden()
    PGD(model, steps=2)(torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 2, 0]))
    assert model.calls == 0
    assert model.norm.training
    assert not hasattr(model, "cache")


def test_judging_adversarials_leaves_them_as_they_are():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    images, labels = torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 2, 0])
    expected, before = fooled(lambda x: model(x - 0.5), images, labels), images.clone()
    assert torch.equal(fooled(lambda x: model(x.sub_(0.5)), images, labels, batch_size=3), expected)
    assert torch.equal(images, before)


def test_judging_checks_what_an_attack_checks():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    images, labels = torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 2, 0])
    expected = model(images).argmax(1) != labels
    assert torch.equal(fooled(model, images, labels.int(), batch_size=np.int64(3)), expected)
    assert torch.equal(fooled(lambda x: model(x / 255), 255 * images, labels, bounds=(0, 255)), expected)
    for wrong, message in [
        ({"labels": labels[:1]}, r"labels must have shape \(4,\), one per image; got \(1,\)"),
        ({"labels": labels + 9}, r"labels must lie in \[0, 2\], the model has 3 classes; found 9 \(sample 0\)"),
        ({"adversarials": 255 * images}, r"adversarials must lie in bounds \(0, 1\); found .* they look 8-bit"),
        ({"adversarials": images.double()}, r"adversarials are float64, the model's weights float32: pass adv"),
        ({"adversarials": images / 0}, "adversarials must be finite"),
        ({"batch_size": 0}, "batch_size must be an integer >= 1; got 0"),
        ({"bounds": (1, 0)}, "bounds must be two finite numbers"),
        ({"targeted": "no"}, "targeted must be True or False"),
        ({"model": nn.Flatten}, "it is a class, so make one first"),
    ]:
        with pytest.raises(ValueError, match=message):
            fooled(**{"model": model, "adversarials": images, "labels": labels, **wrong})


@pytest.mark.parametrize(
    ("model", "detector", "message"),
    [
        (lambda x: torch.nn.functional.linear(x.flatten(1), torch.ones(3, 12, dtype=torch.float64)), None,
         r"the model does not take images of float32 \(.*\): pass them in the dtype of its weights"),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 4), nn.Linear(4, 3).double()), None,
         "does not take images of float32 .* see that these are of one dtype"),
        (nn.Sequential(nn.Flatten(), nn.Linear(12, 3)), nn.Sequential(nn.Flatten(), nn.Linear(12, 1).double()),
         r"images are float32, the detector's weights float64: attack detector\.float\(\), or pass images\.double\(\)"),
    ],
)  # fmt: skip
def test_a_dtype_that_does_not_fit_is_explained_whoever_it_does_not_fit(model, detector, message):
    images, labels = torch.rand(4, 3, 2, 2), torch.zeros(4, dtype=torch.long)
    attack = PGD(model) if detector is None else DetectorEvasion(model, detector)
    with pytest.raises(ValueError, match=message):
        attack(images, labels)
    if detector is None:
        with pytest.raises(ValueError, match=message.replace("images", "adversarials")):
            fooled(model, images, labels)


def test_a_normalisation_takes_one_number_or_one_per_channel():
    images = torch.rand(2, 3, 2, 2)
    each = Normalized(nn.Flatten(), [0.5] * 3, [0.25] * 3)(images)
    for mean, std in [(0.5, 0.25), (np.float32(0.5), [0.25]), (np.full(3, 0.5), torch.full((3, 1, 1), 0.25))]:
        assert torch.equal(Normalized(nn.Flatten(), mean, std)(images), each)
    with pytest.raises(
        ValueError, match=r"images must have 3 channels, as mean and std have; got shape \(2, 1, 2, 2\)"
    ):
        Normalized(nn.Flatten(), [0.5] * 3, [0.25] * 3)(images[:, :1])
    for mean, std in [
        (None, 1),
        ([], []),
        ([0.5], [0.1, 0.1]),
        (float("nan"), 1),
        ("0.5", 1),
        (0.5, 0),
        ([0.5, "x"], 1),
    ]:
        with pytest.raises(ValueError, match="mean and std must have one number per channel, std > 0; got"):
            Normalized(nn.Flatten(), mean, std)


def test_a_normalisation_is_still_folded_for_speed():
    inner = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3))
    model = Normalized(inner, [0.5] * 3, [0.25] * 3).eval()
    folded, images = _folded(model), torch.rand(2, 3, 4, 4)
    assert not any(node.target == "model.1" for node in folded.graph.nodes)
    torch.testing.assert_close(folded(images), model(images))

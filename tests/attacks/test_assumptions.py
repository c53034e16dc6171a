"""Models that are not what an attack assumes: refused with what mends it, warned of, or attacked all the same."""

from __future__ import annotations

import random
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from orthattack import PGD, Square, fooled
from orthattack.attacks.assumptions import PROBABILITIES, Behaviour, batch_statistics, observe
from tests.attacks.test_attacks import Recorder, drawn, linear_model, small_model

# --- what a model answers --------------------------------------------------------------------------------------------

Output = namedtuple("Output", ["loss", "logits"])
MASK = torch.tensor([0.0, -torch.inf, 0.0])


def linear(classes: int = 3) -> nn.Module:
    return linear_model(classes=classes)


REFUSED = [
    (lambda z: z[:, :1], r"at least two logits .* got \(6, 1\).*softmax of \(0, z\).*pad\(model\(x\), \(1, 0\)\)"),
    (lambda z: z[:, 0], r"at least two logits .* got \(6,\).*pad\(model\(x\).view\(-1, 1\), \(1, 0\)\)"),
    (lambda z: z.argmax(1), r"got \(6,\) of torch.int64, as of predicted classes"),
    (lambda z: z[:, :0], r"logits of shape \(6, classes\); got \(6, 0\)"),
    (lambda z: SimpleNamespace(logits=z), r"got SimpleNamespace: attack lambda x: model\(x\).logits instead, after"),
    (lambda z: SimpleNamespace(scores=z), r"got SimpleNamespace: attack lambda x: model\(x\).scores instead"),
    (lambda z: Output(z.sum(), z), r"got Output: attack lambda x: model\(x\).logits instead"),
    (lambda z: (z.sum(), z), r"got tuple: attack lambda x: model\(x\)\[1\] instead"),
    (lambda z: [z, z], r"got list: attack lambda x: model\(x\)\[0\] instead"),
    (lambda z: {"aux": z, "logits": z}, r"got dict: attack lambda x: model\(x\)\['logits'\] instead"),
    (lambda z: {"features": z[:, :, None], "out": z}, r"got dict: attack lambda x: model\(x\)\['out'\] instead"),
    (lambda z: z.detach().numpy(), "got ndarray: return a torch.Tensor"),
    (lambda z: None, "got NoneType: return a torch.Tensor"),
    (lambda z: (100 * z).int(), r"got torch.int32: attack lambda x: model\(x\).float\(\), after .* only Square"),
    (lambda z: z > 0, r"got torch.bool: attack lambda x: model\(x\).float\(\)"),
    (lambda z: torch.complex(z, z), r"got torch.complex64: attack lambda x: model\(x\).abs\(\)"),
    (lambda z: z + MASK, r"\(sample 0\): -inf for class 1, .*clamp\(min=-1e\+04\)"),
    (lambda z: z + torch.tensor([0.0, torch.inf, 0.0]), r"torch.float32 overflows: compute in a wider dtype"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "message"), REFUSED)
@pytest.mark.parametrize("ask", ["PGD", "Square", "fooled"])
def test_what_is_not_logits_is_refused_with_the_line_that_mends_it(answer, message, ask):
    inner, (images, _) = linear(), drawn()
    labels = torch.zeros(6, dtype=torch.long)

    def model(x: Tensor) -> object:
        return answer(inner(x))

    attacks = {"PGD": PGD(model, steps=2), "Square": Square(model, queries=3)}
    with pytest.raises(ValueError, match=message):
        fooled(model, images, labels) if ask == "fooled" else attacks[ask](images, labels)


def test_nan_is_refused_by_attacks_and_is_no_answer_to_fooled():
    inner, (images, _) = linear(), drawn()

    def model(x: Tensor) -> Tensor:
        return inner(x) * torch.tensor([1.0, torch.nan, 1.0])

    with pytest.raises(ValueError, match=r"\(sample 0\): NaN: look for a division"):
        Square(model, queries=2)(images, torch.zeros(6, dtype=torch.long))
    assert not fooled(model, images, torch.zeros(6, dtype=torch.long)).any()


def test_a_sigmoid_written_as_two_logits_is_the_same_classifier():
    """The line of the message, word for word: softmax of (0, z) is the sigmoid of z, and it falls."""
    model, (images, _) = linear(1), drawn()

    def mended(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(model(x), (1, 0))

    with torch.no_grad():
        torch.testing.assert_close(mended(images).softmax(1)[:, 1], model(images).sigmoid()[:, 0])
        labels = (model(images)[:, 0] > 0).long()
    assert not fooled(mended, images, labels).any()
    assert PGD(mended, eps=0.3).run(images, labels).success.all()


def test_the_floor_for_masked_classes_lies_below_all_other_logits():
    inner, (images, _) = linear(), drawn()

    def model(x: Tensor) -> Tensor:
        return 1e6 * inner(x) + MASK

    with pytest.raises(ValueError, match=r"clamp\(min=-\de\+0[5-8]\)") as caught:
        PGD(model)(images, torch.zeros(6, dtype=torch.long))
    floor = float(str(caught.value).split("clamp(min=")[1].split(")")[0])
    logits = model(images[:1])
    assert floor < logits[logits.isfinite()].min()


# --- the observation -------------------------------------------------------------------------------------------------

SMALL = small_model()


class Net(nn.Module):
    """A small convolutional network with whatever norm is given, and dropout."""

    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.Identity() if norm is None else norm
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(self.conv(x)).relu().mean((2, 3))))


class Later(Net):
    def forward(self, x: Tensor) -> Tensor:
        return functional.batch_norm(super().forward(x), None, None, training=True)


INDEPENDENT = {
    "plain": Net(),
    "running statistics": Net(nn.BatchNorm2d(8)),
    "instance norm": Net(nn.InstanceNorm2d(8)),
    "group norm": Net(nn.GroupNorm(2, 8)),
    "quantised": lambda x: SMALL((x * 32).round() / 32),
    "quantised inside": lambda x: (Net().eval()(x) * 1e4).round() / 1e4,
    "half": Net().half(),
    "bfloat16": Net().bfloat16(),
}
OF_THE_BATCH = {
    "batch norm": Net(nn.BatchNorm2d(8, track_running_stats=False)),
    "refuses one image": Later(),
    "centred by the batch": lambda x: SMALL(x - x.mean()),
    "softmax over the batch": lambda x: 10 * SMALL(x).softmax(0),
    "scaled by the batch": lambda x: SMALL(x) / SMALL(x).std(),
    "size of the batch": lambda x: SMALL(x) / len(x),
    "ranks": lambda x: SMALL(x) + 0.1 * SMALL(x).argsort(0),
}


def shown(model: object, images: Tensor) -> Behaviour:
    if isinstance(model, nn.Module):
        model.eval()
        images = images.to(next(model.parameters()).dtype)
    return observe(model, images)


@pytest.mark.parametrize("name", INDEPENDENT)
def test_an_answer_of_its_own_is_seen_as_such(name):
    for seed in range(4):
        assert shown(INDEPENDENT[name], drawn(seed)[0]) == Behaviour()


@pytest.mark.parametrize("name", OF_THE_BATCH)
def test_an_answer_that_depends_on_the_batch_is_seen(name):
    found = shown(OF_THE_BATCH[name], drawn(n=1)[0])
    assert found.is_of_the_batch
    assert not found.is_random
    assert "depends on the rest of its batch" in found.on_batches()
    assert ("batch norm without running statistics ('norm')" in found.on_batches()) == (name == "batch norm")


def test_batch_norms_without_statistics_are_named():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False))
    )
    assert batch_statistics(model) == ["2.0"]
    assert batch_statistics(lambda x: x) == []


def noisy(size: float):
    return lambda x: SMALL(x + size * torch.randn_like(x))


def rarely(x: Tensor) -> Tensor:
    return SMALL(x + (0.1 if float(torch.rand(())) < 0.3 else 0.0))


RANDOM = {
    "dropout": lambda x: SMALL(functional.dropout(x, 0.5)),
    "noise": noisy(0.1),
    "little noise": noisy(1e-4),
    "noise of NumPy": lambda x: SMALL(x + float(np.random.rand())),
    "noise of Python": lambda x: SMALL(x + random.random()),
    "now and then": rarely,
    "one draw for the whole batch": lambda x: SMALL(x * (0.5 + torch.rand(()))),
}


@pytest.mark.parametrize("name", RANDOM)
def test_a_model_that_draws_is_seen_and_the_streams_are_left_alone(name):
    images, _ = drawn()
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    found = observe(RANDOM[name], images)
    assert found.is_random
    assert "eot_samples" in found.on_randomness()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]


def test_it_costs_three_images_and_no_more_where_nothing_differs():
    model = Recorder(SMALL)
    observe(model, drawn()[0])
    assert sum(len(x) for x in model.seen) <= 3 + 1 + 2 + 2
    plain = Recorder(lambda x: x.flatten(1)[:, :5])
    observe(plain, drawn()[0])
    assert [len(x) for x in plain.seen] == [1, 2]


def test_probabilities_are_seen():
    images, _ = drawn()
    assert observe(lambda x: SMALL(x).softmax(1), images).probabilities
    assert not observe(lambda x: SMALL(x).log_softmax(1), images).probabilities
    assert not observe(lambda x: SMALL(x).sigmoid(), images).probabilities
    assert "remove the final softmax" in PROBABILITIES


def test_a_model_that_fails_shows_nothing():
    def model(x: Tensor) -> Tensor:
        raise RuntimeError("only batches of 8")

    assert observe(model, drawn()[0]) == Behaviour()

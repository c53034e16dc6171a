"""The judge: what the model itself answered on exactly these pixels, asked again only where it has not been."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from orthattack import PGD
from orthattack.eval.attacks.counter import CallCounter
from orthattack.eval.attacks.kind import Found
from orthattack.eval.checks.clean import differentiated
from orthattack.eval.running.judge import Judge, clean_columns, row_columns

CPU = torch.device("cpu")


class Seen(nn.Module):
    """A small network that notes how many images it was given at each call, and in which layout."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(32, 5))
        self.calls: list[int] = []
        self.layouts: set[bool] = set()

    def forward(self, images):
        self.calls.append(len(images))
        self.layouts.add(images.is_contiguous(memory_format=torch.channels_last))
        return self.net(images)


class Viewing(Seen):
    """As many users write it: `view` refuses another layout."""

    def forward(self, images):
        return super().forward(images.view(len(images), -1).view(images.shape))


def judged(model):
    counter = CallCounter(model).eval()
    judge = Judge(counter, 8, CPU, 6)
    model.calls.clear()
    model.layouts.clear()
    return counter, judge


@pytest.fixture
def images():
    return torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_what_an_attack_scored_last_is_not_evaluated_again(images):
    model = Seen()
    counter, judge = judged(model)
    adversarials = PGD(counter, steps=3)(images, torch.arange(6) % 5)
    assert model.calls == [6] * 4  # three steps and the score of the last iterate
    (logits,) = judge.logits(adversarials)
    assert model.calls == [6] * 4
    torch.testing.assert_close(logits, model.net(adversarials))
    judge.logits(adversarials)  # remembered once only
    assert model.calls == [6] * 5


def test_other_pixels_than_those_evaluated_are_evaluated(images):
    model = Seen()
    counter, judge = judged(model)
    with torch.no_grad():
        counter(images)
    returned = images.clone()
    returned[[1, 4]] = 1 - returned[[1, 4]]
    (logits,) = judge.logits(returned)
    assert model.calls == [6, 2]
    torch.testing.assert_close(logits, model.net(returned))


def test_an_attack_that_writes_into_what_it_had_evaluated_deceives_nobody(images):
    model = Seen()
    counter, judge = judged(model)
    with torch.no_grad():
        scored = 1 - images
        answer = counter(scored)
        scored.data.copy_(images)  # a write that torch does not count
        answer.fill_(7)
    (logits,) = judge.logits(scored)
    torch.testing.assert_close(logits, model.net(images))


def test_what_another_attack_had_evaluated_is_forgotten(images):
    model = Seen()
    counter, judge = judged(model)
    with torch.no_grad():
        counter(images)
    counter.forget()
    judge.logits(images)
    assert model.calls == [6, 6]


@pytest.mark.parametrize("how", ["training", "autocast", "gradient"])
def test_an_answer_that_is_not_the_judges_own_is_not_remembered(images, how):
    model = Seen()
    counter, judge = judged(model)
    if how == "training":
        model.net.train()
    with torch.set_grad_enabled(how == "gradient"), torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
        counter(images.clone().requires_grad_(how == "gradient"))
    model.net.eval()
    (logits,) = judge.logits(images)
    assert model.calls == [6, 6]
    assert torch.equal(logits, model.net(images.contiguous(memory_format=torch.channels_last)))


def test_the_judge_uses_the_layout_that_is_fast_unless_the_model_refuses_it(images):
    for kind, fast in ((Seen, True), (Viewing, False)):
        model = kind()
        _, judge = judged(model)
        (logits,) = judge.logits(images)
        columns = clean_columns(judge, images, torch.zeros(6, dtype=torch.long), with_gradient=True)
        assert model.layouts == {fast}
        torch.testing.assert_close(logits, model.net(images))
        assert all(norm > 0 for norm in columns["gradient_norm"])


def test_the_gradient_is_taken_on_a_sample_that_spans_the_data():
    assert differentiated(16) == list(range(16))
    assert len(differentiated(195)) == 16
    assert len(differentiated(1_000)) == 62
    assert len(differentiated(50_000)) == 256
    assert max(differentiated(50_000)) > 49_700


@pytest.mark.parametrize(("norm", "eps"), [("linf", 8 / 255), ("l2", 0.5), ("l1", 5.0)])
@pytest.mark.parametrize(("beyond", "status"), [(0.0, "ok"), (5e-6, "ok"), (5e-5, "invalid"), (1e-3, "invalid")])
def test_the_ball_is_as_wide_as_eps_and_its_rounding(images, norm, eps, beyond, status):
    """An attack gains nothing by leaving the ball a little: beyond 1e-5 of eps it is not scored."""
    order = {"linf": torch.inf, "l2": 2, "l1": 1}[norm]
    x = (images * 0.5 + 0.25).double()
    delta = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    size = torch.linalg.vector_norm(delta.flatten(1), order, dim=1).view(-1, 1, 1, 1)
    _, judge = judged(Seen().double())
    found = Found(x + delta / size * eps * (1 + beyond))
    columns = row_columns(judge, x, found, torch.zeros(6, dtype=torch.long), [True] * 6, [0] * 6, norm, eps)
    assert columns["status"] == [status] * 6

"""The judge: what the model itself answered on exactly these pixels, asked again only where it has not been."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from orthattack import PGD
from orthattack.attacks.base import Card
from orthattack.eval.attacks.counter import CallCounter
from orthattack.eval.attacks.kind import Found
from orthattack.eval.checks.clean import differentiated
from orthattack.eval.running.judge import Judge, _alike, clean_columns, promised_cosine, row_columns

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
    adversarials = PGD(counter, steps=3, schedule="fixed")(images, torch.arange(6) % 5)
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


class Readable(nn.Module):
    """The first pixels, times 10, are the logits: an image says for itself what it is taken for."""

    def forward(self, images):
        return images.flatten(1)[:, :4] * 10


def image_of(*pixels, rest=0.5):
    """(3, 2, 2) with these first pixels."""
    return torch.tensor([*pixels, *[rest] * (12 - len(pixels))]).view(3, 2, 2)


def readable():
    return Judge(CallCounter(Readable()).eval(), 2, CPU, 4)


SURE = image_of(0.9, 0.1, 0.2, 0.3)  # of class 0


def test_every_number_of_a_row_is_that_of_its_image():
    fooled = image_of(0.5, 0.6, 0.2, 0.3)
    adversarials = torch.stack([fooled, image_of(0.8, 0.1, 0.2, 0.3), fooled, SURE, image_of(0.9, 0.1, 0.2, 0.31)])
    found = Found(adversarials, steps=torch.tensor([1, 2, 3, 4, 5]))
    right = [True, True, False, True, True]
    columns = row_columns(
        readable(), SURE.expand(5, -1, -1, -1), found, torch.zeros(5).long(), right, [0, 0, 1, 0, 0], "linf", 0.6
    )
    assert columns["status"] == ["ok", "ok", "misclassified", "ok", "ok"]
    assert columns["message"] == [None] * 5
    assert columns["adversarial_prediction"] == [1, 0, 1, 0, 0]
    assert columns["success"] == [True, False, None, False, False]
    assert columns["margin"] == pytest.approx([1, -5, 1, -6, -5.9], abs=1e-5)
    assert columns["wrong_share"] == [1, 0, 1, 0, 0]
    assert columns["evaluations"] == [1] * 5
    assert columns["steps"] == [1, 2, 3, 4, 5]
    assert columns["l0"] == [2, 1, 2, 0, 1]
    assert columns["l1"] == pytest.approx([0.9, 0.1, 0.9, 0, 0.01], abs=1e-6)
    assert columns["l2"] == pytest.approx([0.41**0.5, 0.1, 0.41**0.5, 0, 0.01], abs=1e-6)
    assert columns["linf"] == pytest.approx([0.5, 0.1, 0.5, 0, 0.01], abs=1e-6)
    length, red = (0.81 + 0.01 + 0.04 + 0.09 + 8 * 0.25) ** 0.5, (0.81 + 0.01 + 0.04 + 0.09) ** 0.5
    along = -0.4 * 0.9 + 0.5 * 0.1
    for name, size in (("cosine", length), ("cosine_red", red)):
        expected = [along / 0.41**0.5 / size, -0.9 / size, along / 0.41**0.5 / size, 0, 0.3 / size]
        assert columns[name] == pytest.approx(expected, abs=1e-5)
    assert columns["cosine_green"] == columns["cosine_blue"] == [0] * 5
    rounded = (fooled * 255).round() / 255 - SURE
    assert columns["rounded_success"] == [True, None, None, None, None]
    assert columns["rounded_norm"] == [pytest.approx(float(rounded.abs().max()), abs=1e-7), *[None] * 4]
    cosine = float((rounded * SURE).sum() / rounded.norm() / SURE.norm())
    assert columns["rounded_cosine"] == [pytest.approx(cosine, abs=1e-6), *[None] * 4]
    bare = row_columns(
        readable(), SURE[None], Found(SURE[None]), torch.zeros(1).long(), [True], [0], "l2", None
    )  # fmt: skip
    assert bare["steps"] == [None]
    assert bare["status"] == ["ok"]


def test_channels_have_cosines_of_their_own():
    x = torch.full((1, 3, 2, 2), 0.5)
    moved = x.clone()
    moved[0, 0, 0, 0] += 0.1
    moved[0, 1] += 0.1
    moved[0, 2] -= 0.1
    columns = row_columns(readable(), x, Found(moved), torch.zeros(1).long(), [True], [0], "linf", 1.0)
    assert columns["cosine_red"] == pytest.approx([0.5], abs=1e-6)
    assert columns["cosine_green"] == pytest.approx([1], abs=1e-6)
    assert columns["cosine_blue"] == pytest.approx([-1], abs=1e-6)


def test_a_success_that_8_bits_undo_is_said_to_be_undone():
    close = image_of(0.5, 0.5 + 1e-4, 0.2, 0.3)
    columns = row_columns(readable(), SURE[None], Found(close[None]), torch.zeros(1).long(), [True], [0], "l1", 5.0)
    assert columns["success"] == [True]
    assert columns["rounded_success"] == [False]
    assert columns["rounded_norm"] == pytest.approx([2 * (0.9 - 128 / 255) / 2 + (128 / 255 - 0.1)
        + abs(0.2 - 51 / 255) + abs(0.3 - 76 / 255) + 8 * (128 / 255 - 0.5)], abs=3e-3)  # fmt: skip


@pytest.mark.parametrize(
    ("pixels", "reason"),
    [
        ((float("nan"), 0.1), "returned NaN or infinite pixels"),
        ((float("inf"), 0.1), "returned NaN or infinite pixels"),
        ((float("-inf"), 0.1), "returned NaN or infinite pixels"),
        ((-0.01, 0.1), "left the bounds: pixels from -0.01 to 0.5"),
        ((1.01, 0.1), "left the bounds: pixels from 0.1 to 1.01"),
        ((1 + 2**-23, 0.1), "left the bounds: pixels from 0.1 to 1.00000012"),
        ((0.0, 1.0), "left the ball: l2 norm 1.27279, eps 1"),
    ],
)
@pytest.mark.parametrize("right", [True, False])
def test_what_is_not_allowed_counts_for_nothing(pixels, reason, right):
    bad = image_of(*pixels, 0.2, 0.3)
    pair = torch.stack([bad, image_of(0.2, 0.9, 0.2, 0.3, rest=0.5)])
    columns = row_columns(
        readable(), SURE.expand(2, -1, -1, -1), Found(pair), torch.zeros(2).long(), [right, True], [0, 0], "l2", 1.0
    )
    if reason.startswith("left the ball"):
        reason = f"left the ball: l2 norm {float((bad - SURE).double().norm()):.6g}, eps 1"
    assert columns["status"][0] == "invalid"
    assert columns["message"][0] == reason
    assert columns["success"][0] is None
    assert columns["rounded_success"][0] is None
    assert columns["status"][1] == "invalid"  # 1.06 from the image


def test_bounds_and_ball_are_closed():
    edge = torch.tensor([0.0, 1.0, 0.2, 0.3] + [0.5] * 8).view(1, 3, 2, 2)
    eps = float((edge - SURE).double().norm())
    columns = row_columns(readable(), SURE[None], Found(edge), torch.zeros(1).long(), [True], [0], "l2", eps)
    assert (columns["status"], columns["success"]) == (["ok"], [True])


@pytest.mark.parametrize("limit", [8 / 255, 0.5])
def test_the_edge_of_the_linf_ball_has_float32s_grain(limit):
    """1.2e-7, a unit of a pixel near 1, beside the part in 1e5 of eps."""
    for beyond, status in ((limit * 1e-5 + 1.1e-7, "ok"), (limit * 1e-5 + 1.3e-7, "invalid")):
        x = torch.full((1, 3, 2, 2), 0.25, dtype=torch.float64)
        found = Found(x + limit + beyond)
        columns = row_columns(readable(), x, found, torch.zeros(1).long(), [True], [0], "linf", limit)
        assert columns["status"] == [status]


def test_an_answer_that_is_not_finite_is_an_error():
    class Broken(Readable):
        def forward(self, images):
            logits = super().forward(images)
            return torch.where(logits.amax(1, keepdim=True) > 8.5, logits, logits / 0)

    judge = Judge(CallCounter(Broken()).eval(), 2, CPU, 4)
    pair = torch.stack([SURE, image_of(0.1, 0.8, 0.2, 0.3)])
    columns = row_columns(
        judge, SURE.expand(2, -1, -1, -1), Found(pair), torch.zeros(2).long(), [True] * 2, [0] * 2, "linf", 1.0
    )
    assert columns["status"] == ["ok", "error"]
    assert columns["message"] == [None, "the model's answer is NaN or infinite"]
    assert columns["adversarial_prediction"] == [0, -1]
    assert columns["success"] == [False, None]
    looked = clean_columns(judge, pair, torch.zeros(2).long(), with_gradient=False)
    assert looked["status"] == ["ok", "error"]
    assert looked["message"] == [None, "the model's answer is NaN or infinite"]
    assert looked["prediction"] == [0, -1]
    assert looked["margin"][0] == pytest.approx(-6)


@pytest.mark.parametrize(
    ("first", "second", "are_alike"),
    [
        ([0.0, 1024.0], [0.0, 1025.0], True),
        ([0.0, 1024.0], [0.0, 1025.1], False),
        ([0.0, 1024.0], [1.0, 1024.0], True),
        ([0.0, 1024.0], [1.1, 1024.0], False),
        ([0.0, -1024.0], [1.0, -1024.0], True),
        ([0.0, 0.0], [0.0, 9e-10], True),
        ([0.0, 0.0], [0.0, 1.1e-9], False),
    ],
)
def test_answers_are_alike_if_no_logit_differs_by_more_than_a_share_of_the_largest(first, second, are_alike):
    assert _alike(torch.tensor([first]), torch.tensor([second]), 1 / 1024) is are_alike


@pytest.mark.parametrize("with_gradient", [True, False])
def test_every_number_of_a_clean_row_is_that_of_its_image(with_gradient):
    images = torch.stack([SURE, image_of(0.3, 0.8, 0.2, 0.1, rest=0.7), image_of(0.4, 0.4, 0.4, 0.4, rest=0)])
    columns = clean_columns(readable(), images, torch.tensor([0, 0, 3]), with_gradient)
    assert columns["status"] == ["ok"] * 3
    assert columns["message"] == [None] * 3
    assert columns["prediction"] == [0, 1, 0]
    assert columns["margin"] == pytest.approx([-6, 5, 0], abs=1e-5)
    share = torch.stack([10 * image.flatten()[:4] for image in images]).softmax(1)
    assert columns["confidence"] == pytest.approx(share.amax(1).tolist())
    assert columns["logit_min"] == pytest.approx([1, 1, 4])
    assert columns["logit_max"] == pytest.approx([9, 8, 4])
    assert columns["logit_sum"] == pytest.approx([15, 14, 16])
    assert columns["image_min"] == pytest.approx([0.1, 0.1, 0])
    assert columns["image_max"] == pytest.approx([0.9, 0.8, 0.4])
    assert columns["wrong_share"] == [0, 1, 1]
    assert columns["evaluations"] == [1] * 3
    if not with_gradient:
        assert columns["gradient_cosine"] == columns["gradient_norm"] == [None] * 3
        return
    gradient = torch.zeros(3, 12, dtype=torch.float64)
    gradient[:, :4] = 10 * share.double()
    gradient[[0, 1, 2], [0, 0, 3]] -= 10
    x = images.flatten(1).double()
    cosine = (gradient * x).sum(1) / gradient.norm(dim=1) / x.norm(dim=1)
    assert columns["gradient_cosine"] == pytest.approx(cosine.tolist(), abs=1e-6)
    assert columns["gradient_norm"] == pytest.approx(gradient.norm(dim=1).tolist(), rel=1e-5)


class Wavering(nn.Module):
    """Answers the classes of a list in turn, whatever the image; what is asked of two images is the judge's probe."""

    def __init__(self, answers):
        super().__init__()
        self.answers, self.asked = answers, 0

    def forward(self, images):
        if len(images) == 2:
            return torch.randn(2, 4)
        self.asked += 1
        best = self.answers[(self.asked - 1) % len(self.answers)]
        return torch.nn.functional.one_hot(torch.tensor([best] * len(images)), 4) * 2.0


@pytest.mark.parametrize(
    ("answers", "share", "prediction", "success"),
    [([0] * 9 + [1], 0.1, 0, False), ([0] * 5 + [1] * 5, 0.5, 0, False), ([0] * 4 + [1] * 3 + [2] * 3, 0.6, 0, True),
     ([1] * 10, 1.0, 1, True)],
)  # fmt: skip
def test_a_model_that_wavers_is_fooled_if_more_than_half_of_ten_answers_are_wrong(answers, share, prediction, success):
    judge = Judge(CallCounter(Wavering(answers)).eval(), 2, CPU, 4)
    assert judge.is_random
    moved = image_of(0.8, 0.1, 0.2, 0.3)
    columns = row_columns(judge, SURE[None], Found(moved[None]), torch.zeros(1).long(), [True], [0], "linf", 0.2)
    assert columns["evaluations"] == [10]
    assert columns["wrong_share"] == pytest.approx([share])
    assert columns["adversarial_prediction"] == [prediction]
    assert columns["success"] == [success]
    assert columns["margin"] == pytest.approx([2 * share - 2 * (1 - share)], abs=1e-6)
    # The same pixels may be taken for something else by such a model: that is no contradiction.
    same = row_columns(judge, SURE[None], Found(SURE[None]), torch.zeros(1).long(), [True], [3], "linf", 0.2)
    assert same["status"] == ["ok"]
    looked = clean_columns(judge, SURE[None], torch.zeros(1).long(), with_gradient=True)
    assert looked["gradient_cosine"] == [None]
    assert looked["evaluations"] == [10]


def test_the_same_pixels_cannot_be_fooled_by_a_model_that_does_not_waver():
    pair = torch.stack([SURE, image_of(0.1, 0.8, 0.2, 0.3)])
    columns = row_columns(
        readable(), torch.stack([SURE, SURE]), Found(pair), torch.ones(2).long(), [True] * 2, [1] * 2, "linf", 1.0
    )
    assert columns["status"] == ["error", "ok"]
    assert columns["message"][0].startswith("the model answers otherwise for the same pixels")
    assert columns["success"] == [None, False]


def test_a_model_that_draws_for_nothing_is_not_random():
    class Idle(Seen):
        def forward(self, images):
            torch.rand(3)
            return super().forward(images)

    _, judge = judged(Idle())
    assert not judge.is_random
    assert judge.evaluations == 1


def test_the_judge_asks_as_many_at_a_time_as_it_may():
    class Counting(Readable):
        calls = ()

        def forward(self, images):
            self.calls = (*self.calls, len(images))
            return super().forward(images)

    model = Counting()
    judge = Judge(CallCounter(model).eval(), 2, CPU, 4)
    model.calls = ()
    (logits,) = judge.logits(torch.rand(9, 3, 2, 2))
    assert model.calls == (4, 4, 1)
    assert logits.shape == (9, 4)


def test_a_perturbations_promise_is_what_its_card_says():
    x = torch.full((1, 3, 2, 2), 0.5)
    moved = x.clone()
    moved[0, 0] += 0.1
    moved[0, 1] -= 0.1
    moved[0, 2, 0, 0] += 0.05
    whole = (0.05 * 0.5) / ((8 * 0.01 + 0.0025) ** 0.5 * 3**0.5)
    assert promised_cosine(moved, x, Card("A", "image")) == pytest.approx([whole], abs=1e-6)
    assert promised_cosine(moved, x, Card("A", "channel")) == pytest.approx([1], abs=1e-6)
    red = torch.zeros(3, 2, 2)
    red[0, 0, 0] = 1
    expected = 0.1 / (8 * 0.01 + 0.0025) ** 0.5
    assert promised_cosine(moved, x, Card("A", None, (red,))) == pytest.approx([expected], abs=1e-6)
    for card in (Card("A"), Card("A", "image", exact=False)):
        assert promised_cosine(moved, x, card) == [None]

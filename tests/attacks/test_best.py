"""The bookkeeping of an attack: which point is kept, what is counted, who is still to be attacked."""

from __future__ import annotations

import pytest
import torch

from orthattack import ThreatModel
from orthattack.attacks.base import check_count, updated
from orthattack.attacks.numbers import Streams
from orthattack.attacks.scoring import Evaluation, InBatches
from orthattack.attacks.task import Best, Task
from orthattack.losses import Goal, attack_loss

IMAGES = torch.full((3, 1, 1, 2), 0.5)
EVERYONE = torch.arange(3)


def scored(success, merit, n=None, unusable=None, stuck=None, exact=True, margin=None):
    n = len(success) if n is None else n
    no = torch.zeros(n, dtype=torch.bool)
    return Evaluation(
        torch.tensor(success),
        torch.tensor(merit),
        torch.tensor(merit if margin is None else margin),
        None,
        no if unusable is None else torch.tensor(unusable),
        no if stuck is None else torch.tensor(stuck),
        torch.full((n,), 2),
        torch.full((n,), 3),
        torch.full((n,), exact),
    )


def points(value, n=3):
    return torch.full((n, 1, 1, 2), value)


@pytest.fixture(params=["all at once", "some at a time"])
def offer(request):
    """Offers of the whole batch take another way than those of a part of it."""

    def offered(best, value, evaluation, step):
        if request.param == "all at once":
            best.offer(EVERYONE, points(value), evaluation, step)
            return
        for rows in (torch.tensor([2, 0]), torch.tensor([1])):
            best.offer(rows, points(value)[rows], evaluation.select(rows), step)

    return offered


def kept(best):
    return best.adversarials[:, 0, 0, 0].tolist()


def test_success_comes_before_merit_and_the_later_of_two_equals_is_kept(offer):
    best = Best(IMAGES)
    offer(best, 0.1, scored([False, False, True], [1.0, 1.0, 1.0]), 0)
    assert kept(best) == pytest.approx([0.1] * 3)
    offer(best, 0.2, scored([False, True, False], [0.5, -9.0, 99.0]), 1)
    assert kept(best) == pytest.approx([0.1, 0.2, 0.1])
    offer(best, 0.3, scored([False, True, True], [1.0, -9.5, 1.0]), 2)
    assert kept(best) == pytest.approx([0.3, 0.2, 0.3])
    found = best.result(IMAGES, ThreatModel("linf", 1.0, scope=None))
    assert found.success.tolist() == [False, True, True]
    assert found.loss.tolist() == [1, -9, 1]
    assert found.steps.tolist() == [2, 1, 2]
    assert found.forward_calls.tolist() == [6] * 3
    assert found.gradient_calls.tolist() == [9] * 3
    assert found.norm.tolist() == pytest.approx([0.2, 0.3, 0.2])
    assert found.norm.dtype == torch.float64
    assert found.zero_gradients.tolist() == [0] * 3
    assert found.samples_with_zero_gradient == 0


def test_steps_without_a_gradient_are_counted(offer):
    best = Best(IMAGES)
    offer(best, 0.1, scored([False] * 3, [0.0] * 3, unusable=[True, False, True], stuck=[True, False, False]), 0)
    offer(best, 0.1, scored([False] * 3, [0.0] * 3, unusable=[True, False, False], stuck=[True, False, False]), 1)
    best.skip(torch.tensor([1]))
    found = best.result(IMAGES, ThreatModel("linf", 1.0))
    assert found.zero_gradients.tolist() == [2, 1, 1]
    assert best.stuck.tolist() == [2, 1, 0]
    assert found.samples_with_zero_gradient == 3


def test_what_is_exact_is_that_of_the_point_that_is_kept(offer):
    best = Best(IMAGES)
    assert best.exact.tolist() == [False] * 3
    offer(best, 0.1, scored([False] * 3, [1.0, 1.0, 1.0], exact=True), 0)
    offer(best, 0.2, scored([False] * 3, [2.0, 0.0, 2.0], exact=False), 1)
    assert best.exact.tolist() == [False, True, False]
    rows = torch.tensor([0, 2])
    best.judge(rows, scored([True, False], [7.0, 8.0]))
    found = best.result(IMAGES, ThreatModel("linf", 1.0))
    assert found.success.tolist() == [True, False, False]
    assert found.loss.tolist() == [7, 1, 8]
    assert found.forward_calls.tolist() == [6, 4, 6]
    assert found.gradient_calls.tolist() == [6, 6, 6]


def test_the_merit_is_the_loss_or_the_margin(offer):
    for by, expected in (("loss", 0.2), ("margin", 0.1)):
        best = Best(IMAGES, by)
        offer(best, 0.1, scored([False] * 3, [1.0] * 3, margin=[5.0] * 3), 0)
        offer(best, 0.2, scored([False] * 3, [2.0] * 3, margin=[4.0] * 3), 1)
        assert kept(best) == pytest.approx([expected] * 3)
    best.judge(EVERYONE, scored([False] * 3, [2.0] * 3, margin=[3.0] * 3))
    assert best.result(IMAGES, ThreatModel("linf", 1.0)).loss.tolist() == [3.0] * 3


def test_before_anything_is_offered_the_image_is_what_there_is():
    best = Best(IMAGES.half())
    found = best.result(IMAGES.half(), ThreatModel("l2", 1.0))
    assert torch.equal(found.adversarials, IMAGES.half())
    assert found.loss.tolist() == [-torch.inf] * 3
    assert found.loss.dtype == torch.float32
    assert (found.success.any(), found.norm.sum()) == (False, 0)
    offered = torch.tensor([0])
    best.offer(offered, points(0.25, 1).half(), scored([False], [1.0]), 3)
    assert torch.equal(IMAGES, torch.full_like(IMAGES, 0.5))  # a copy is kept
    assert best.result(IMAGES.half(), ThreatModel("l2", 1.0)).steps.tolist() == [3, 0, 0]


class Asked:
    """A scorer that notes what it is asked, and answers with the points' first pixel."""

    def __init__(self):
        self.asked = []

    def evaluate(self, points, goal, loss, solved, with_gradient, step=0, draws=None, by_copy=False):
        self.asked.append((points[:, 0, 0, 0].tolist(), goal.classes.tolist(), solved, with_gradient, step))
        first = points[:, 0, 0, 0]
        return scored((first > 0.5).tolist(), first.tolist())

    def judge(self, points, goal, loss):
        return self.evaluate(points, goal, loss, None, False)

    def logits(self, points, goal):
        self.asked.append(len(points))
        return points[:, 0, 0]


def task(early_stop=False, is_random=False, seeds=None):
    goal, region = Goal(torch.tensor([4, 5, 6])), ThreatModel("linf", 0.1).around(IMAGES)
    return Task(
        Asked(), attack_loss("ce"), goal, region, EVERYONE, Best(IMAGES), early_stop,
        Streams(torch.Generator().manual_seed(1), seeds, 3, IMAGES.device), is_random=is_random,
    )  # fmt: skip


@pytest.mark.parametrize(("early_stop", "is_random"), [(False, False), (True, False), (False, True)])
def test_what_is_scored_is_offered_and_successes_must_hold_where_they_decide(early_stop, is_random):
    made = task(early_stop, is_random)
    made.score(points(0.6), 3, with_gradient=True)
    assert made.best.success.tolist() == [True] * 3
    rows = torch.tensor([2, 0])
    made.select(rows).score(points(0.7, 2), 4, with_gradient=False)
    first, second = made.oracle.asked
    assert first[0] == pytest.approx([0.6] * 3)
    assert (first[1], first[3], first[4]) == ([4, 5, 6], True, 3)
    assert (second[1], second[3], second[4]) == ([6, 4], False, 4)
    if early_stop or is_random:
        assert first[2].tolist() == [False] * 3
        assert second[2].tolist() == [not is_random] * 2  # of a model that draws every claim is confirmed
    else:
        assert first[2] is second[2] is None
    assert kept(made.best) == pytest.approx([0.7, 0.6, 0.7])


def test_who_is_left_is_who_nothing_fools():
    made = task()
    assert made.unsolved() is made
    made.best.success[1] = True
    left = made.unsolved()
    assert left.index.tolist() == [0, 2]
    assert left.goal.classes.tolist() == [4, 6]
    assert len(left.region.images) == 2
    assert left.unsolved() is left
    left.best.success[:] = True
    assert made.unsolved() is left.unsolved() is None


def test_random_starts_come_from_each_samples_own_stream():
    whole = task(seeds=(7, 8, 9)).random_start()
    part = task(seeds=(7, 8, 9)).select(torch.tensor([2, 1])).random_start()
    torch.testing.assert_close(part, whole[[2, 1]])
    assert not torch.equal(task().random_start(), whole)
    assert torch.equal(task().random_start(), task().random_start())


def test_a_scorer_in_batches_asks_for_few_at_a_time_and_answers_for_all():
    inner = Asked()
    scorer = InBatches(inner, 2)
    x = torch.tensor([0.1, 0.6, 0.9]).view(3, 1, 1, 1).expand(3, 1, 1, 2)
    goal, solved = Goal(torch.tensor([4, 5, 6])), torch.tensor([True, False, True])
    found = scorer.evaluate(x, goal, attack_loss("ce"), solved, True, 9)
    assert found.success.tolist() == [False, True, True]
    assert found.loss.tolist() == pytest.approx([0.1, 0.6, 0.9])
    assert found.gradient is None
    (one, two) = inner.asked
    assert (one[1], one[2].tolist(), one[3:]) == ([4, 5], [True, False], (True, 9))
    assert (two[1], two[2].tolist(), two[3:]) == ([6], [True], (True, 9))
    inner.asked.clear()
    assert scorer.judge(x, goal, attack_loss("ce")).success.tolist() == [False, True, True]
    assert [asked[1] for asked in inner.asked] == [[4, 5], [6]]
    scorer.evaluate(x, goal, attack_loss("ce"), None, False)
    assert [asked[2] for asked in inner.asked] == [None] * 4
    inner.asked.clear()
    assert torch.equal(scorer.logits(x, goal), x[:, 0, 0])
    assert inner.asked == [2, 1]


def test_results_of_a_part_take_their_place_in_the_whole():
    threat, best = ThreatModel("linf", 1.0, scope=None), Best(IMAGES)
    best.offer(EVERYONE, points(0.6), scored([True, False, False], [1.0, 2.0, 3.0], unusable=[True] * 3), 1)
    before = best.result(IMAGES, threat)
    part = Best(IMAGES[1:])
    part.offer(torch.arange(2), points(0.9, 2), scored([True, True], [7.0, 8.0], unusable=[True, False]), 5)
    found, rows = part.result(IMAGES[1:], threat), torch.tensor([1, 2])
    merged = updated(before, found, rows, torch.tensor([True, True]), adds=False)
    assert merged.adversarials[:, 0, 0, 0].tolist() == pytest.approx([0.6, 0.9, 0.9])
    assert merged.success.tolist() == [True] * 3
    assert merged.loss.tolist() == [1, 7, 8]
    assert merged.steps.tolist() == [1, 5, 5]
    assert merged.norm.tolist() == pytest.approx([0.1, 0.4, 0.4])
    assert merged.forward_calls.tolist() == [0, 2, 2]
    assert merged.gradient_calls.tolist() == [0, 3, 3]
    assert merged.zero_gradients.tolist() == [0, 1, 0]
    assert before.loss.tolist() == [1, 2, 3]
    better = updated(before, found, rows, torch.tensor([True, False]), adds=True)
    assert better.loss.tolist() == [1, 7, 3]
    assert better.steps.tolist() == [1, 5, 1]
    assert better.forward_calls.tolist() == [2, 4, 4]
    assert better.gradient_calls.tolist() == [3, 6, 6]
    assert better.zero_gradients.tolist() == [1, 2, 1]


@pytest.mark.parametrize(
    ("value", "message"),
    [(0, "steps must be an integer >= 1; got 0"), (-3, "got -3"), (1.5, "got 1.5"), (True, "got True"),
     ("3", "got '3'"), (2**31, r"steps must be below 2\*\*31; got 2147483648")],
)  # fmt: skip
def test_counts_are_whole_numbers(value, message):
    with pytest.raises(ValueError, match=message):
        check_count("steps", value)
    check_count("steps", 1)
    check_count("steps", 2**31 - 1)


def test_an_evaluation_of_some():
    made = scored([True, False, True], [1.0, 2.0, 3.0])
    part = made.select(torch.tensor([2, 1]))
    assert (part.success.tolist(), part.loss.tolist(), part.gradient) == ([True, False], [3, 2], None)
    joined = Evaluation.joined([part, made])
    assert joined.loss.tolist() == [3, 2, 1, 2, 3]
    assert joined.gradient is None


def test_a_result_without_trouble_has_no_sample_with_a_zero_gradient():
    best = Best(IMAGES)
    best._zero[:] = torch.tensor([0, 3, 1])
    assert best.result(IMAGES, ThreatModel("linf", 1.0)).samples_with_zero_gradient == 2

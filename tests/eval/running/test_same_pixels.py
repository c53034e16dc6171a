"""The same pixels have the same answer: models for which that is not so are refused, or found out row by row."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from orthattack.eval.attacks.counter import CallCounter
from orthattack.eval.attacks.kind import Found
from orthattack.eval.errors import EvaluationError
from orthattack.eval.models.classifier import Classifier
from orthattack.eval.models.preprocessing import Preprocessing
from orthattack.eval.running.judge import CONTRADICTION, Judge, check_batches, row_columns
from tests.eval.tiny import EPS, SIZE, Net, dataset, evaluated


class Changed(nn.Module):
    """The net with something done to its images or its logits."""

    def __init__(self, before=lambda x: x, after=lambda z: z):
        super().__init__()
        self.net, self.before, self.after = Net().eval(), before, after

    def forward(self, images):
        return self.after(self.net(self.before(images)))


def of_the_batch():
    net = Net()
    net.features[1] = nn.BatchNorm2d(6, track_running_stats=False)
    return net.eval()


def normed(norm):
    net = Net()
    net.features[1] = norm
    return net.eval()


DEPENDENT = {
    "batch norm without running statistics": of_the_batch,
    "centred on the batch": lambda: Changed(lambda x: x - x.mean(0)),
    "scaled by the batch": lambda: Changed(lambda x: x / x.max()),
    "softmax over the wrong axis": lambda: Changed(after=lambda z: z.softmax(0)),
    "attention between images": lambda: Changed(after=lambda z: z + 0.1 * z.roll(1, 0)),
    "another answer for one alone": lambda: Changed(after=lambda z: -z if len(z) == 1 else z),
}
SOUND = {
    "batch norm": Net,
    "instance norm": lambda: normed(nn.InstanceNorm2d(6)),
    "group norm": lambda: normed(nn.GroupNorm(2, 6)),
    "rounding inside": lambda: Changed(lambda x: (x * 16).round() / 16),
    "double": lambda: Changed(lambda x: x, lambda z: z.double()),
    "fails on more than one": lambda: Changed(lambda x: x[:1]),
    "constant": lambda: Changed(after=lambda z: 0 * z),
    "one at a time": lambda: Changed(lambda x: torch.cat([one[None] for one in x])),
}


def described(model):
    return Classifier("net", model, Preprocessing(SIZE, SIZE), None, 5, "here")


@pytest.mark.parametrize("name", DEPENDENT)
def test_a_model_whose_answer_depends_on_the_batch_is_refused_by_its_cause(name):
    model = DEPENDENT[name]()
    with pytest.raises(
        EvaluationError, match="net: the model's answer to an image depends on the rest of its batch"
    ) as told:
        check_batches(described(model), 4)
    assert "every rate would depend on the batch size; with batch_size = 1 (--batch-size 1)" in str(told.value).lower()
    assert ("batch norm without running statistics ('features.1')" in str(told.value)) == (
        name.startswith("batch norm")
    )
    check_batches(described(model), 1)


@pytest.mark.parametrize("name", SOUND)
def test_one_whose_does_not_is_not(name):
    model = SOUND[name]()
    check_batches(described(model), 32)


def test_it_is_refused_before_anything_is_attacked_and_can_be_evaluated_one_by_one(tmp_path):
    with pytest.raises(EvaluationError, match="batch norm without running statistics"):
        evaluated(tmp_path / "r", ["PGD"], model=of_the_batch())
    assert not list((tmp_path / "r").rglob("*.parquet"))
    model = of_the_batch()
    data = dataset()
    run = evaluated(tmp_path / "one", ["PGD"], model=model, data=data, batch_size=1)
    rows = run.folder.read("shards", "net", "PGD", EPS)
    assert rows["status"].isin(["ok", "misclassified"]).all()
    adversarials = dict(run.folder.images("net", "PGD", EPS))
    for row in rows[rows["status"] == "ok"].to_dict("records"):
        with torch.no_grad():
            assert row["success"] == (int(model(adversarials[row["position"]][None]).argmax()) != row["label"])


class Moody(nn.Module):
    """Answers from the second half of the batch on are others, but not among two or three images."""

    def forward(self, images):
        z = torch.stack([images.mean((1, 2, 3)), torch.full((len(images),), 0.1), torch.zeros(len(images))], 1)
        if len(images) < 4:
            return z
        return torch.cat([z[: len(z) // 2], z[len(z) // 2 :].roll(1, 1)])


def judged(model):
    return Judge(CallCounter(model).eval(), SIZE, torch.device("cpu"), 8)


def test_a_success_on_the_same_pixels_is_an_error():
    images = torch.rand(6, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    zeros = torch.zeros(6, dtype=torch.long)
    judge = judged(Moody())
    columns = row_columns(judge, images, Found(images.clone()), zeros, [True] * 6, [0] * 6, "linf", EPS)
    assert columns["status"] == ["ok"] * 3 + ["error"] * 3
    assert columns["message"] == [None] * 3 + [CONTRADICTION] * 3
    assert columns["success"] == [False] * 3 + [None] * 3
    moved = (images + EPS / 2).clamp(0, 1)
    columns = row_columns(judge, images, Found(moved), zeros, [True] * 6, [0] * 6, "linf", EPS)
    assert columns["success"] == [False] * 3 + [True] * 3  # nothing says that these are not the same


def test_what_was_wrong_is_wrong_in_the_same_way_on_the_same_pixels():
    images = torch.rand(6, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    ones = torch.full((6,), 2)
    columns = row_columns(judged(Moody()), images, Found(images), ones, [False] * 6, [0] * 6, "linf", EPS)
    assert columns["status"] == ["misclassified"] * 3 + ["error"] * 3


class Brightness(nn.Module):
    """Right where the mean is what it was, until it is told to be wrong about everything."""

    is_wrong = False

    def forward(self, images):
        z = torch.zeros(len(images), 2) + 0 * images.sum((1, 2, 3))[:, None]
        z[:, int(self.is_wrong)] = 1
        return z


def test_a_success_that_rounds_to_the_clean_pixels_is_an_error():
    """The adversarials differ from the images, but as files of 8 bits three of them do not."""
    grid = (torch.rand(6, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)) * 250).round() / 255
    model = Brightness()
    judge = judged(model)
    model.is_wrong = True
    found = Found(torch.cat([grid[:3] + 0.2 / 255, grid[3:] + 3 / 255]))
    zeros = torch.zeros(6, dtype=torch.long)
    columns = row_columns(judge, grid, found, zeros, [True] * 6, [0] * 6, "linf", EPS)
    assert columns["status"] == ["error"] * 3 + ["ok"] * 3
    assert columns["message"] == [CONTRADICTION] * 3 + [None] * 3
    assert columns["success"] == [None] * 3 + [True] * 3


def test_a_state_that_changes_from_call_to_call_fools_nobody(tmp_path):
    """It is taken for a model that draws, and each image is judged by several evaluations."""

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.calls = Net().eval(), 0

        def forward(self, images):
            self.calls += 1
            return self.net(images) * (1 + self.calls % 2)

    run = evaluated(tmp_path / "r", {"same": lambda model: lambda images, labels: images}, model=Counting().eval())
    rows = run.folder.read("shards", "net", "same", EPS)
    assert set(rows.loc[rows["status"] == "ok", "evaluations"]) == {10}
    assert not rows["success"].any()


def test_a_model_that_draws_rarely_is_found_to_draw():
    rare = Changed(after=lambda z: z.roll(1, 1) if float(torch.rand(())) < 0.3 else z)
    assert judged(rare).is_random
    assert judged(rare).evaluations == 10
    assert not judged(Net().eval()).is_random


def test_every_attack_on_a_model_that_draws_is_confirmed_by_fresh_answers(tmp_path):
    noisy = Changed(after=lambda z: z + 0.5 * torch.randn_like(z))
    attacks = {
        "PGD": "PGD",
        "AutoAttack": {"name": "AutoAttack", "steps": 2, "queries": 3, "targets": 1},
        "MinimumNorm": {"name": "MinimumNorm", "trials": 2, "steps": 2},
        "foolbox": "foolbox:LinfPGD",
    }
    run = evaluated(tmp_path / "r", attacks, model=noisy.eval(), checks=True, check_images=4)
    for label in attacks:
        rows = run.folder.read("shards", "net", label, *run.attacks[label]["eps"])
        rows = rows[rows["status"] == "ok"]
        assert len(rows) > 0, label
        assert set(rows["evaluations"]) == {10}, label
        assert ((rows["wrong_share"] > 0.5) == rows["success"]).all(), label
    for probe in run.manifest["probes"]:
        rows = run.folder.read("checks", "net", probe["label"], probe["eps"])
        assert set(rows["evaluations"].dropna()) == {10}, probe


def test_probabilities_are_said_once(tmp_path, capsys):
    """Of the model, not again of each attack that meets them."""
    data = dataset()
    evaluated(tmp_path / "r", ["PGD", "FGSM"], model=Changed(after=lambda z: z.softmax(1)).eval(), data=data)
    assert capsys.readouterr().err.count("the model returns probabilities") == 1

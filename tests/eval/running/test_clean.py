from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import nn

from orthattack.eval.errors import EvaluationError
from orthattack.eval.report.text import clean_text
from orthattack.eval.results.rates import Rate
from orthattack.eval.running.clean import Clean, clean
from orthattack.eval.running.run import suite_inputs
from orthattack.eval.suite import make_suite
from tests.eval.tiny import CLASSES, Net, classifier, dataset, evaluated, images_of


def cleaned(
    model: nn.Module | None = None, labels: list[int] | None = None, batch_size: int = 4, broken: int = 0
) -> Clean:
    images = images_of()
    images[:broken] = torch.nan
    suite = make_suite({"models": ["net"], "data": "made", "batch_size": batch_size}, "test")
    (found,) = clean(suite, suite_inputs(suite, {}, {"net": classifier(model)}, dataset(labels, images)), "cpu")
    return found


def predictions() -> list[int]:
    with torch.no_grad():
        return Net().eval()(images_of()).argmax(1).tolist()


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_it_is_the_accuracy_that_a_run_finds(tmp_path, batch_size):
    found, run = cleaned(batch_size=batch_size), evaluated(tmp_path / "run", ["FGSM"])
    assert found.accuracy() == run.clean_accuracy("net") == Rate(9, 10)
    assert found.rows["prediction"].tolist() == predictions()


def test_each_class_has_its_accuracy_and_what_it_is_taken_for():
    right = predictions()
    labels = [right[0]] * 10  # all of one class, so that the others are mistakes
    found = cleaned(labels=labels)
    assert found.labels == [right[0]]
    assert found.accuracy(right[0]) == found.accuracy() == Rate(right.count(right[0]), 10)
    others = [k for k in right if k != right[0]]
    assert others.count(found.taken_for(right[0])) == max(map(others.count, others))
    assert cleaned(labels=right).accuracy() == Rate(10, 10)
    assert {cleaned(labels=right).taken_for(k) for k in right} == {None}


def test_what_cannot_be_read_is_left_out_and_said():
    found = cleaned(labels=predictions(), broken=3)
    assert found.accuracy() == Rate(7, 7)
    assert found.left_out == {"some pixels are NaN or infinite: look at what made them": 3}
    assert "left out: 3 x some pixels are NaN" in clean_text(found)
    alike = Clean(
        "net", found.rows, Counter({f"pixels lie in [-1.{k}, 2], not in [0, 1]": 1 for k in range(9)}), None, ()
    )
    assert "left out: 9 x for example, pixels lie in [-1.0, 2], not in [0, 1]" in clean_text(alike)
    nothing = cleaned(labels=[0] * 10, broken=10)
    assert nothing.accuracy() == Rate(0, 0)
    assert "clean accuracy - of 0 images" in clean_text(nothing)


def test_a_suspicion_is_said_and_a_model_that_fails_is_an_error():
    class Probabilities(Net):
        def forward(self, images):
            return super().forward(images).softmax(1)

    assert any("probabilities" in warning for warning in cleaned(Probabilities()).warnings)

    class Failing(Net):
        def forward(self, images):
            if len(images) > 3:
                raise RuntimeError("no more than three")
            return super().forward(images)

    with pytest.raises(EvaluationError, match=r"^net fails on 00 \(RuntimeError: no more than three\)$"):
        cleaned(Failing())


def test_the_table_begins_with_the_lowest_class():
    right = predictions()
    wrong = [(k + 1) % CLASSES if k == right[0] else k for k in right]
    lines = clean_text(cleaned(labels=wrong)).splitlines()
    assert lines[0].startswith("net: clean accuracy ")
    assert lines[1].split() == ["class", "taken", "n", "acc.", "[95", "%]"]
    (rule,) = (k for k, line in enumerate(lines) if line.startswith("-"))
    lowest, taken_for, *_ = lines[rule + 1].split()
    assert (lowest, taken_for) == (str((right[0] + 1) % CLASSES), str(right[0]))

"""Models and attacks of a user's that misbehave: rows or one line that say so, and everything else is finished.

That a model that answers at random, or sometimes NaN, is judged as it should be is in tests/eval/test_run.py, as is
what an attack may return; what a model must be to be attacked at all is in tests/attacks/test_attacks.py.
"""

from __future__ import annotations

import sys

import pytest

from tests.faults.files.conftest import rows

CODE = """
import sys, torch
from torch import nn

class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(10, 3072, generator=torch.Generator().manual_seed(0)))

    def forward(self, images):
        return self.say(images, images.flatten(1) @ self.weight.T)

    def say(self, images, logits):
        return logits

def model(say):
    return lambda: type("Bad", (Linear,), {"say": say})()

def is_grey(images):  # what a model is tried on before anything is run
    return bool((images == 0.5).all())

def raises(self, images, logits):
    if is_grey(images):
        return logits
    raise RuntimeError("tired\\nand more")

def raises_sometimes(self, images, logits):
    if not is_grey(images) and images[0, 0, 0, 0] > 0.5:
        raise ValueError("a bright corner")
    return logits

def exits(self, images, logits):
    if not is_grey(images):
        sys.exit(0)
    return logits

def prints(self, images, logits):
    print("thinking", end=" ")
    return logits

def writes(self, images, logits):
    images.clamp_(0.4, 0.6)
    return logits

good = Linear
raising, sometimes, exiting = model(raises), model(raises_sometimes), model(exits)
printing, writing = model(prints), model(writes)
constant = model(lambda self, images, logits: logits.detach())
stepped = model(lambda self, images, logits: logits.round())
whole = model(lambda self, images, logits: (1000 * logits).long())
double = model(lambda self, images, logits: logits.double())
half = model(lambda self, images, logits: logits.half())
nan = model(lambda self, images, logits: logits * torch.nan)
nan_later = model(lambda self, images, logits: logits if is_grey(images) else logits * torch.nan)
one = model(lambda self, images, logits: logits[:, :1])
flat = model(lambda self, images, logits: logits.flatten())
pair = model(lambda self, images, logits: (logits, logits))
first = model(lambda self, images, logits: logits[:1])  # of a batch, the first answer alone

def exits_when_built():
    sys.exit("enough")

def exit_attack(model):
    def run(images, labels):
        sys.exit(0)
    return run

def exit_factory(model):
    sys.exit(0)

def fails_factory(model):
    raise RuntimeError("no attack today")

class Data:
    classes = [str(k) for k in range(10)]
    targets = list(range(10))

    def __len__(self):
        return 10

    def __getitem__(self, k):
        if k == 7:
            sys.exit(0)
        if k == 8:
            raise KeyError("lost")
        return torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(k)), k

def data():
    return Data()

class Unlabelled(Data):
    targets = None

def unlabelled():
    return Unlabelled()
"""


@pytest.fixture(autouse=True)
def code(tmp_path, monkeypatch):
    (tmp_path / "bad.py").write_text(CODE)
    (tmp_path / "leaves.py").write_text("import sys; sys.exit(0)")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    sys.modules.pop("bad", None)


@pytest.fixture
def attacked(dataset, evaluated):
    """An evaluation of the model bad.NAME with a gradient attack, one without gradients, and one that does nothing."""

    def run(name, *more):
        return evaluated(
            "--model", f"bad:{name}", "--data", dataset, "--image-size", 32, "--batch-size", 2,
            "--attack-misclassified", "--attacks", "PGD", "Square,queries=3", "foolbox:LinfPGD", *more,
        )  # fmt: skip

    return run


def of(run, attack):
    (path,) = [path for path in (run / "shards").glob("*/*") if path.name.startswith(attack)]
    return rows(path, ".")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nan", "bad:nan on a grey image: model returned NaN or infinite logits (sample 0): NaN: look for"),
        (
            "one",
            "bad:one on a grey image: model must return at least two logits per image, shape (1, classes); got (1, 1)",
        ),
        ("flat", "must return logits of shape (1, classes); got (10,)"),
        (
            "pair",
            "got tuple: attack lambda x: model(x)[0] instead, after model.eval(); for an evaluation write that as the "
            "forward of an nn.Module",
        ),
        (
            "whole",
            "floating point logits, of at least 16 bits; got torch.int64: attack lambda x: model(x).float()",
        ),
        ("exits_when_built", "bad:exits_when_built() failed (SystemExit: enough)"),
    ],
)
def test_a_model_that_cannot_be_used_at_all_is_refused(attacked, tmp_path, name, message):
    told = attacked(name)
    assert (told.code, told.out) == (2, "")
    assert message in told.err
    assert list((tmp_path / "run").rglob("*.parquet")) == []


def test_a_module_that_leaves_when_it_is_imported_is_refused(evaluated, dataset):
    told = evaluated("--model", "leaves:model", "--data", dataset, "--image-size", 32)
    assert told.code == 2
    assert "leaves:model: importing leaves failed (SystemExit: 0)" in told.err


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raising", "RuntimeError: tired"),
        ("exiting", "SystemExit: 0"),  # although it asks for exit code 0
        ("nan_later", "the model's answer is NaN or infinite"),
        ("first", "Error: "),
    ],
)
def test_a_model_that_fails_on_every_image_is_an_error_in_every_row(attacked, tmp_path, name, message):
    done = attacked(name)
    assert done.code == 1, done.err
    assert "orthattack: no attack returned anything that could be scored" in done.err
    found = rows(tmp_path / "run")
    assert set(found["status"]) == {"error"}
    assert all(message in text for text in found["message"]), set(found["message"])
    assert len(rows(tmp_path / "run", "clean")) == 10


def test_a_model_that_fails_on_some_images_is_scored_on_the_others(attacked, tmp_path):
    done = attacked("sometimes", "--shard-size", 5)
    assert done.code == 0, done.err
    looked = rows(tmp_path / "run", "clean")
    broken = set(looked.index[looked["status"] == "error"])
    assert 0 < len(broken) < 10
    assert set(looked.loc[sorted(broken), "message"]) == {"ValueError: a bright corner"}
    for attack in ("PGD", "Square", "foolbox"):
        found = of(tmp_path / "run", attack)
        assert broken <= set(found.index[found["status"] == "error"])
        assert found["status"].isin(["ok", "misclassified"]).any()


def test_a_model_without_gradients_is_attacked_by_what_needs_none(attacked, tmp_path):
    done = attacked("constant")
    assert done.code == 0, done.err
    for attack in ("PGD", "foolbox"):
        found = of(tmp_path / "run", attack)
        assert set(found["status"]) == {"error"}
        assert found["message"].str.len().min() > 10
    assert set(of(tmp_path / "run", "Square")["status"]) <= {"ok", "misclassified"}
    assert rows(tmp_path / "run", "clean")["gradient_norm"].isna().all()


def test_a_model_whose_gradients_are_zero_is_told_and_scored(attacked, tmp_path):
    done = attacked("stepped")
    assert done.code == 0, done.err
    assert (rows(tmp_path / "run", "clean")["gradient_norm"] == 0).all()
    assert set(of(tmp_path / "run", "Square")["status"]) <= {"ok", "misclassified"}


@pytest.mark.parametrize("name", ["double", "half", "printing"])
def test_other_logits_and_chatter_change_nothing(attacked, tmp_path, name):
    done = attacked(name)
    assert done.code == 0, done.err
    assert set(rows(tmp_path / "run")["status"]) <= {"ok", "misclassified"}
    assert f"bad:{name}: clean accuracy" in done.out
    assert ("thinking" in done.out) == (name == "printing")


def test_a_model_that_writes_into_its_input_changes_no_image(attacked, tmp_path):
    done = attacked("writing", "--save-images", "all")
    assert done.code in (0, 1), done.err
    found = rows(tmp_path / "run")
    assert set(found["status"]) == {"error"}
    assert found["message"].str.contains("in-place|its input").all(), set(found["message"])


@pytest.mark.parametrize("attack", ["exit_attack", "exit_factory", "fails_factory"])
def test_an_attack_that_fails_or_leaves_is_an_error_and_the_others_go_on(attacked, tmp_path, attack):
    done = attacked("good", f"bad:{attack}")
    assert done.code == 0, done.err
    found = of(tmp_path / "run", "bad")
    assert set(found["status"]) == {"error"}
    assert set(found["message"]) == {"RuntimeError: no attack today" if attack == "fails_factory" else "SystemExit: 0"}
    assert set(of(tmp_path / "run", "foolbox")["status"]) <= {"ok", "misclassified"}


def test_a_broken_model_does_not_stop_the_others(dataset, evaluated, tmp_path):
    done = evaluated(
        "--model", "bad:raising", "--model", "bad:exiting", "--model", "bad:good", "--data", dataset,
        "--image-size", 32, "--attack-misclassified", "--attacks", "PGD",
    )  # fmt: skip
    assert done.code == 0, done.err
    found = rows(tmp_path / "run")
    assert len(found) == 30
    assert (found["status"] == "error").sum() == 20


def test_a_data_set_that_fails_or_leaves_is_a_row(evaluated, tmp_path):
    done = evaluated("--model", "bad:good", "--image-size", 32, "--data", "bad:data", "--attack-misclassified")
    assert done.code == 0, done.err
    found = rows(tmp_path / "run").sort_index()
    assert found["status"].tolist()[7:9] == ["unreadable", "unreadable"]
    assert found["message"].tolist()[7:9] == ["SystemExit: 0", "KeyError: 'lost'"]
    assert (found["status"] == "unreadable").sum() == 2


def test_a_data_set_that_fails_before_its_labels_are_known_is_refused(evaluated):
    told = evaluated("--model", "bad:good", "--image-size", 32, "--data", "bad:unlabelled")
    assert told.code == 2
    assert "bad:unlabelled: item 7 failed (SystemExit: 0), so its label is not known" in told.err

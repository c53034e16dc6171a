"""Names of weights as training leaves them, made the architecture's where that is possible in one way only."""

from __future__ import annotations

import pytest
import torch
import torchvision

from orthattack.eval.errors import EvaluationError
from orthattack.eval.models.load import load_classifier

NAME = "squeezenet1_1"
MEAN, STD = [0.25, 0.5, 0.75], [0.125, 0.25, 0.5]


@pytest.fixture(scope="module")
def state():
    torch.manual_seed(0)
    return torchvision.models.get_model(NAME, num_classes=5).state_dict()


def put(prefix, state):
    return {prefix + key: value for key, value in state.items()}


def shifted(state):
    return {key: value + 1 for key, value in state.items()}


def loaded(content, tmp_path, name=NAME):
    torch.save(content, tmp_path / "w.pt")
    return load_classifier(name, tmp_path / "w.pt", 64)


FITS = {
    "plain": lambda s: s,
    "DataParallel": lambda s: put("module.", s),
    "torch.compile": lambda s: put("_orig_mod.", s),
    "Lightning": lambda s: {
        "state_dict": put("model.", s), "epoch": 3, "hyper_parameters": {"lr": 0.1}, "loops": {"a": {"b": 1}},
        "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}, "param_groups": []}],
    },
    "Lightning, with a loss": lambda s: {"state_dict": {**put("net.", s), "criterion.weight": torch.ones(5)}},
    "model_state_dict": lambda s: {"model_state_dict": s, "loss": torch.tensor(1.0), "optimizer_state_dict": {}},
    "model": lambda s: {"model": s, "best_acc1": torch.tensor(93.0)},
    "net, in parallel": lambda s: {"net": put("module.", s), "acc": 93.1},
    "all of them": lambda s: {"model": put("module._orig_mod.model.", s)},
    "a part in parallel": lambda s: {key.replace("features.", "features.module."): v for key, v in s.items()},
    "a part compiled": lambda s: {key.replace("features.3.", "features.3._orig_mod."): v for key, v in s.items()},
    "averaged alone": lambda s: {"model_ema": put("module.", s)},
    "averaged by torch": lambda s: {**put("module.", s), "n_averaged": torch.tensor(4)},
    "twice the same": lambda s: {"model": s, "state_dict": dict(s)},
    "with an epoch": lambda s: {**s, "epoch": 3},
    "half precision": lambda s: {key: value.half() for key, value in put("module.", s).items()},
}  # fmt: skip


@pytest.mark.parametrize("kind", FITS)
def test_weights_fit_whatever_training_put_around_them(kind, state, tmp_path):
    classifier = loaded(FITS[kind](state), tmp_path)
    own = classifier.model.model.state_dict()
    assert own.keys() == state.keys()
    for key, value in state.items():
        assert torch.equal(own[key], value.half().float() if "half" in kind else value)
    assert (classifier.num_classes, classifier.notes) == (5, ())


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (lambda s: {"state_dict": s, "state_dict_ema": shifted(s)}, "state_dict_ema"),
        (lambda s: {"ema": {"module": shifted(s)}, "model": put("module.", s)}, "ema.module"),
        (lambda s: {"state_dict": {**put("model.", s), **put("ema_model.module.", shifted(s))}}, "ema_model.module"),
    ],
)
def test_of_averaged_and_plain_weights_the_plain_ones_are_taken_and_it_is_said(content, place, state, tmp_path):
    classifier = loaded(content(state), tmp_path)
    assert torch.equal(classifier.model.model.state_dict()["classifier.1.bias"], state["classifier.1.bias"])
    (note,) = classifier.notes
    assert "has averaged weights too, at" in note
    assert place in note
    assert "For the others save them alone, torch.save(" in note


def test_several_sets_of_weights_that_fit_are_asked_about(state, tmp_path):
    with pytest.raises(EvaluationError, match=r"several sets of weights that fit .*, at 'student' and 'teacher'"):
        loaded({"student": state, "teacher": shifted(state)}, tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        lambda s, mean, std: {"state_dict": {**put("model.", s), "normalize.mean": mean, "normalize.std": std}},
        lambda s, mean, std: {**put("1.", s), "0.mean": mean, "0.std": std},
        lambda s, mean, std: {**s, "mu": mean, "sigma": std},
        lambda s, mean, std: {  # as the package robustness saves them
            "model": {
                **put("module.model.", s), **put("module.attacker.model.", s),
                "module.normalizer.new_mean": mean, "module.normalizer.new_std": std,
                "module.attacker.normalize.new_mean": mean, "module.attacker.normalize.new_std": std,
            }
        },
    ],
)  # fmt: skip
def test_a_normalisation_that_was_saved_with_the_model_is_used(content, state, tmp_path):
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    classifier = loaded(content(state, mean, std), tmp_path)
    assert (classifier.preprocessing.mean, classifier.preprocessing.std) == (tuple(MEAN), tuple(STD))
    assert classifier.model.mean.flatten().tolist() == MEAN
    assert any("brings its own normalisation" in note for note in classifier.notes)


def test_a_normalisation_of_8_bit_values_is_refused(state, tmp_path):
    content = {**put("1.", state), "0.mean": torch.tensor([123.0, 117, 104]), "0.std": torch.tensor([58.0, 57, 57])}
    with pytest.raises(
        EvaluationError, match=r"normalisation 0.mean of \[123.0, 117.0, 104.0\], which is not in units"
    ):
        loaded(content, tmp_path)


def test_what_is_left_out_is_said(state, tmp_path):
    classifier = loaded({**put("backbone.", state), "projector.weight": torch.ones(3)}, tmp_path)
    (note,) = classifier.notes
    assert "has 1 tensors that are no part of squeezenet1_1, left out: projector.weight" in note


def test_old_files_without_a_count_of_batches_fit(tmp_path):
    state = torchvision.models.get_model("mobilenet_v3_small", num_classes=3).state_dict()
    old = {key: value for key, value in state.items() if "num_batches_tracked" not in key}
    assert len(old) < len(state)
    assert loaded(put("module.", old), tmp_path, "mobilenet_v3_small").num_classes == 3


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda s: {**put("module.", s), "module.more": torch.ones(1)}, "1 unexpected (more)"),
        (lambda s: {k: v for k, v in put("a.", s).items() if "features.0" not in k}, "2 missing (features.0.bias, "),
        (lambda s: {k: v for k, v in s.items() if "classifier" not in k}, "are they a network without its last layer?"),
        (
            lambda s: put("x.", {"weight": s["classifier.1.weight"]}),
            "its names are such as x.weight, the model's",
        ),
        (lambda s: {"state": {0: {"exp_avg": torch.ones(1)}}, "param_groups": []}, "it has state (dict), param_groups"),
    ],
)
def test_what_does_not_fit_is_named(content, message, state, tmp_path):
    with pytest.raises(EvaluationError) as caught:
        loaded(content(state), tmp_path)
    assert message in str(caught.value)


def test_a_users_model_for_another_number_of_classes_is_explained(state, tmp_path, monkeypatch):
    (tmp_path / "six.py").write_text(
        "import torchvision\ndef build(): return torchvision.models.squeezenet1_1(num_classes=6)"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(EvaluationError) as caught:
        loaded(put("module.", state), tmp_path, "six:build")
    assert "classifier.1.weight is (5, 512, 1, 1) in the file, (6, 512, 1, 1) in the model" in str(caught.value)
    assert str(caught.value).endswith("build the model with 5 classes")

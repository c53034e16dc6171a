"""Attacks that change whatever they can reach, beside honest ones, whose rows are bit for bit what they are alone.

Each hostile attack is a function of the model, as a user's is. What it does is undone; if the model was another one for
the while, its own rows are errors that say so, and otherwise they are those of an attack that returns the images.
"""

from __future__ import annotations

import copy
import os
import random
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from orthattack.eval.data.readers import Dataset
from orthattack.eval.errors import EvaluationError
from tests.eval.tiny import CLASSES, COUNT, EPS, Net, classifier, dataset, evaluated, images_of

HONEST = {
    "PGD": {"name": "PGD"},
    "OrthoPGD": {"name": "OrthoPGD", "early_stop": True},
    "foolbox": {"name": "foolbox:LinfPGD"},
    "Square": {"name": "Square", "queries": 4},
    "mine": lambda model: lambda images, labels: (images + EPS * torch.randn_like(images).sign()).clamp(0, 1),
}


def hostile(change):
    """An attack that does something to what it is given, and returns the images as they were."""

    def attack(model):
        def run(images, labels):
            before = images.clone()
            found = change(model.model, images, labels)
            return before if found is None else found

        return run

    return attack


# What is no business of the model: the rows are those of an attack that did nothing.
HARMLESS = {}
# What makes another model of it.
CHANGES = {}


def harmless(function):
    HARMLESS[function.__name__] = hostile(function)
    return function


def changing(function):
    CHANGES[function.__name__] = hostile(function)
    return function


@harmless
def labels_written(model, images, labels):
    labels.fill_(0)


@harmless
def labels_written_past_autograd(model, images, labels):
    labels.data.copy_((labels + 1) % CLASSES)
    labels.numpy()[:] = 3


@harmless
def images_written(model, images, labels):
    before = images.clone()
    images.copy_(1 - images)
    images.requires_grad_()
    return before


KEPT = []


@harmless
def kept_and_written_later(model, images, labels):
    for tensor in KEPT:
        tensor.data.fill_(0)
    returned = images.clone()
    KEPT[:] = [images, labels, returned]
    return returned


@harmless
def mode(model, images, labels):
    model.train()
    model.features[1].eval()


@harmless
def requires_grad(model, images, labels):
    for parameter in model.parameters():
        parameter.requires_grad_(True)
        parameter.grad = torch.ones_like(parameter)


@harmless
def random_numbers(model, images, labels):
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)


@harmless
def grad_mode(model, images, labels):
    torch.set_grad_enabled(False)


@harmless
def default_dtype(model, images, labels):
    torch.set_default_dtype(torch.float64)


@harmless
def flags(model, images, labels):
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(2)
    torch.set_float32_matmul_precision("medium")
    torch.autograd.set_detect_anomaly(True)


class Rolled(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        return found.roll(1, 1) if func is nn.functional.linear else found


@harmless
def modes_entered(model, images, labels):
    Rolled().__enter__()
    torch.device("meta").__enter__()


@harmless
def hooks_of_all_modules(model, images, labels):
    nn.modules.module.register_module_forward_hook(lambda module, given, found: found * 2)
    nn.modules.module.register_module_full_backward_hook(lambda module, given, found: tuple(-g for g in given))


@harmless
def process(model, images, labels):
    os.environ["ORTHATTACK_HOSTILE"] = "1"
    os.chdir("/")
    warnings.simplefilter("ignore")


@harmless
def a_copy_of_the_model(model, images, labels):
    own = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.zero_()
    own.double().train()


@harmless
def changed_and_put_back(model, images, labels):
    """The answer of the spoiled model is the last one that was seen for these very pixels."""
    before = model.head.bias.data.clone()
    model.head.bias.data[0] += 100
    model(images)
    model.head.bias.data.copy_(before)


@changing
def weights(model, images, labels):
    model.head.weight.data.mul_(-1)


@changing
def weights_in_place(model, images, labels):
    with torch.no_grad():
        model.features[0].weight[0, 0, 0, 0] += 1e-6


@changing
def weights_replaced(model, images, labels):
    model.head.weight = nn.Parameter(-model.head.weight)


@changing
def buffers(model, images, labels):
    model.features[1].running_mean.add_(1)


@changing
def buffers_by_a_pass_in_training_mode(model, images, labels):
    model.train()
    model(images)


@changing
def hooks(model, images, labels):
    model.head.register_forward_hook(lambda module, given, found: found.roll(1, 1))


@changing
def forward(model, images, labels):
    answer = model.forward
    model.forward = lambda x: answer(x).roll(1, 1)


@changing
def forward_of_its_class(model, images, labels):
    Net.forward = lambda self, x: torch.zeros(len(x), CLASSES)


@changing
def another_method_of_its_class(model, images, labels):
    Net.eval = Net.train


@changing
def order_of_layers(model, images, labels):
    model._modules = dict(reversed(model._modules.items()))


@changing
def layer_replaced(model, images, labels):
    model.head = nn.Linear(6 * 16, CLASSES)


@changing
def layer_added(model, images, labels):
    model.features.append(nn.Tanh())


@changing
def half(model, images, labels):
    model.half()


@changing
def double(model, images, labels):
    model.double()


@changing
def meta(model, images, labels):
    model.to("meta")


@changing
def class_replaced(model, images, labels):
    model.__class__ = type("Other", (Net,), {"forward": lambda self, x: Net.forward(self, x).roll(1, 1)})


@changing
def attribute(model, images, labels):
    model.features[1].eps = 10.0


FAILS = {}


def failing(function):
    FAILS[function.__name__] = hostile(function)
    return function


@failing
def raises_midway(model, images, labels):
    model.head.weight.data.zero_()
    model.train()
    torch.set_default_dtype(torch.float64)
    labels.fill_(0)
    raise RuntimeError("midway")


class Odd(BaseException):
    """Of another kind than most, and of no text."""

    def __str__(self):
        raise ValueError


@failing
def raises_oddly(model, images, labels):
    raise Odd


@failing
def closes(model, images, labels):
    raise GeneratorExit


@failing
def says_that_memory_runs_out(model, images, labels):
    raise MemoryError("no more")


@failing
def exits(model, images, labels):
    model.features[1].running_var.fill_(9)
    sys.exit(3)


def same(one, other, label):
    """The rows of an attack, but for the time they took, and its images."""
    rows, others = (r.folder.read("shards", "net", label, EPS).drop(columns="seconds") for r in (one, other))
    pd.testing.assert_frame_equal(rows, others, check_exact=True)
    images, theirs = (dict(r.folder.images("net", label, EPS)) for r in (one, other))
    assert images.keys() == theirs.keys()
    return all(torch.equal(images[k], theirs[k]) for k in images)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What honest attacks do when nobody is beside them; how many of the net's answers each turns is not trivial."""
    run = evaluated(tmp_path_factory.mktemp("alone") / "r", HONEST)
    table = run.table().set_index("attack")
    assert 0 < table.loc["PGD", "success_rate"] < 1
    assert table.loc["mine", "robust_accuracy"] > 0
    return run


def beside(path, hostile, **more):
    """The honest attacks with hostile ones before and between them."""
    between = [list(hostile.items())[k :: len(HONEST)] for k in range(len(HONEST))]
    mixed = {}
    for them, (label, honest) in zip(between, HONEST.items(), strict=True):
        mixed |= {**dict(them), label: honest}
    return evaluated(path, mixed, **more)


def rows_of(run, label):
    rows = run.folder.read("shards", "net", label, EPS)
    assert len(rows) == COUNT
    assert (rows["status"] == "misclassified").sum() == 1
    return rows[rows["status"] != "misclassified"]


@pytest.fixture(autouse=True)
def untouched():
    """Nothing of the process is another than it was, whatever the attack was."""
    place, before = Path.cwd(), (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled())
    state, other, numbers = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()
    filters = list(warnings.filters)
    yield
    assert place == Path.cwd()
    assert "ORTHATTACK_HOSTILE" not in os.environ
    assert before == (torch.get_default_dtype(), torch.get_num_threads(), torch.is_grad_enabled())
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.is_anomaly_enabled()
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.equal(state, torch.get_rng_state())
    assert other == random.getstate()
    assert np.array_equal(numbers, np.random.get_state()[1])
    assert filters == list(warnings.filters)


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """Runs of hostile attacks of a kind beside the honest ones, and the model after each."""
    runs = {}

    def run_of(kind):
        if kind not in runs:
            model = Net()
            hostile = {"harmless": HARMLESS, "changes": CHANGES, "fails": FAILS}[kind]
            runs[kind] = beside(tmp_path_factory.mktemp(kind) / "r", hostile, model=model), model
        return runs[kind]

    return run_of


@pytest.mark.parametrize("kind", ["harmless", "changes", "fails"])
def test_hostile_attacks_change_no_rows_but_their_own(together, alone, kind):
    run, model = together(kind)
    for label in HONEST:
        assert same(run, alone, label), label
    fresh = Net()
    assert all(torch.equal(value, fresh.state_dict()[key]) for key, value in model.state_dict().items())
    assert type(model) is Net
    assert list(model._modules) == list(fresh._modules)
    assert len(model.features) == len(fresh.features)
    assert "forward" not in vars(model)
    assert len(model.head._forward_hooks) == 0
    assert all(p.requires_grad and p.grad is None for p in model.parameters())


@pytest.mark.parametrize("name", HARMLESS)
def test_what_an_attack_does_besides_leaves_it_what_it_returns(together, name):
    rows = rows_of(together("harmless")[0], name)
    assert set(rows["status"]) == {"ok"}, rows["message"].tolist()
    assert not rows["success"].any()
    assert (rows["linf"] == 0).all()


@pytest.mark.parametrize("name", CHANGES)
def test_an_attack_that_changes_the_model_is_an_error_that_says_so(together, name):
    rows = rows_of(together("changes")[0], name)
    assert set(rows["status"]) == {"error"}
    assert rows["success"].isna().all()
    assert rows["message"].str.match(r"ModelChangedError: .*changed the model's \w+").all(), rows["message"].iloc[0]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises_midway", "RuntimeError: midway"),
        ("exits", "SystemExit: 3"),
        ("raises_oddly", "Odd"),
        ("closes", "GeneratorExit"),
        ("says_that_memory_runs_out", "MemoryError: no more"),
    ],
)
def test_an_attack_that_fails_midway_is_the_error_that_it_was(together, name, message):
    assert set(rows_of(together("fails")[0], name)["message"]) == {message}


def test_nor_in_shards_of_the_work(tmp_path, alone):
    names = ("weights", "labels_written", "raises_midway", "changed_and_put_back")
    hostile = {name: (HARMLESS | CHANGES | FAILS)[name] for name in names}
    for i in (2, 1):
        run = beside(tmp_path / "r", hostile, shard=(i, 2))
    for label in HONEST:
        assert same(run, alone, label), label


def test_nor_where_batches_are_halved(tmp_path):
    """Memory runs out after the attack has changed the model: the halves are attacked with the model as it was."""

    def hungry(model):
        def run(images, labels):
            before = model.model.head.weight.data.clone()
            model.model.head.weight.data.mul_(-1)
            model.model.train()
            labels.fill_(0)
            if len(images) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            model.model.head.weight.data.copy_(before)
            return images

        return run

    def modest(model):
        def run(images, labels):
            if len(images) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return images

        return run

    one, two = (beside(tmp_path / name, {"it": attack}) for name, attack in (("a", hungry), ("b", modest)))
    for label in (*HONEST, "it"):
        assert same(one, two, label), label
    assert set(rows_of(one, "it")["status"]) == {"ok"}


def test_nor_when_they_are_made(tmp_path, alone):
    """A factory that changes what it is given: an error in each of its rows if that was the model."""
    names = ("weights", "hooks", "grad_mode", "random_numbers", "default_dtype")

    def factory_of(name):
        def factory(model):
            (HARMLESS | CHANGES)[name](model)(images_of(2), torch.zeros(2, dtype=torch.long))
            return lambda images, labels: images

        return factory

    run = beside(tmp_path / "r", {name: factory_of(name) for name in names})
    for label in HONEST:
        assert same(run, alone, label), label
    for name in names:
        rows = rows_of(run, name)
        assert set(rows["status"]) == {"error" if name in CHANGES else "ok"}
        if name in CHANGES:
            assert rows["message"].str.contains("changed the model's").all()


def test_the_counters_cannot_be_written_to(tmp_path, alone):
    def attack(model):
        def run(images, labels):
            model.forward_calls = model.gradient_calls = -(10**6)
            x = images.clone().requires_grad_()
            model(x).sum().backward()
            return images

        return run

    run = beside(tmp_path / "r", {"counters": attack})
    rows = rows_of(run, "counters")
    assert (rows["forward_calls"] == 1).all()
    assert (rows["gradient_calls"] == 1).all()
    assert all(same(run, alone, label) for label in HONEST)


class Loud(torch.Tensor):
    """A tensor that says of itself what it likes."""

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is torch.Tensor.detach:
            return torch.full(args[0].shape, 0.5)
        return super().__torch_function__(func, types, args, kwargs or {})


RETURNED = {
    "view": (lambda x: torch.stack([x, x])[1], None),
    "not contiguous": (lambda x: x.transpose(2, 3).contiguous().transpose(2, 3), None),
    "channels last": (lambda x: x.contiguous(memory_format=torch.channels_last), None),
    "requires grad": (lambda x: x.clone().requires_grad_() * 1, None),
    "parameter": (lambda x: nn.Parameter(x), None),
    "subclass": (lambda x: x.as_subclass(Loud), None),
    "negated view": (lambda x: torch._neg_view(-x), None),
    "inference": (lambda x: torch.inference_mode()(x.clone)(), None),
    "sparse": (lambda x: x.to_sparse(), r"ValueError: returned a tensor that is torch\.sparse_coo, not a dense one"),
    "meta": (lambda x: x.to("meta"), r"ValueError: returned a tensor that is one without values \(meta\)"),
    "double": (
        lambda x: x.double(),
        r"ValueError: returned torch\.float64, .* let it return adversarials\.to\(",
    ),
    "array": (
        lambda x: x.numpy(),
        "ValueError: returned ndarray instead of a tensor: let it return the adv",
    ),
    "nothing": (
        lambda x: None,
        "ValueError: returned NoneType instead of a tensor: let it return the adv",
    ),
    "two": (
        lambda x: (x, x),
        "ValueError: returned tuple instead of a tensor: let it return the adv",
    ),
}


def test_what_an_attack_returns_is_judged_as_a_plain_copy(tmp_path):
    """A copy of the images in every form that a tensor has: nothing is fooled, or it is an error that says why."""
    run = evaluated(
        tmp_path / "r",
        {
            label: (lambda f: lambda model: lambda images, labels: f(images))(form)
            for label, (form, _) in RETURNED.items()
        },
    )
    for label, (_, message) in RETURNED.items():
        rows = rows_of(run, label)
        if message is None:
            assert set(rows["status"]) == {"ok"}, (label, rows["message"].tolist())
            assert (rows["linf"] == 0).all(), label
            assert not rows["success"].any(), label
        else:
            assert set(rows["status"]) == {"error"}, label
            assert rows["message"].str.match(message).all(), (label, rows["message"].iloc[0])


def test_an_expanded_image_is_judged_as_what_it_shows(tmp_path):
    run = evaluated(tmp_path / "r", {"one": lambda model: lambda images, labels: images[:1].expand_as(images)}, eps=1.0)
    clean = dict(run.folder.images("net", "clean", None))
    for k, image in run.folder.images("net", "one", 1.0):
        first = next(j for j in clean if torch.equal(clean[j], image))
        assert first <= k


@pytest.mark.parametrize("name", ["labels", "weights"])
def test_a_users_loss_is_watched_like_an_attack(tmp_path, alone, name):
    model = Net()

    def loss(logits, labels):
        if name == "labels":
            labels.fill_(0)
        else:
            model.head.bias.data.add_(1)
        return -logits.gather(1, labels[:, None])[:, 0]

    run = evaluated(tmp_path / "r", {"mine": {"name": "PGD", "loss": loss}, "PGD": "PGD"}, model=model)
    assert same(run, alone, "PGD")
    found = run.folder.read("shards", "net", "mine", EPS)
    adversarials = dict(run.folder.images("net", "mine", EPS))
    for row in found[found["status"] == "ok"].to_dict("records"):
        with torch.no_grad():
            assert row["success"] == (int(Net().eval()(adversarials[row["position"]][None]).argmax()) != row["label"])
    attacked = found[found["status"] != "misclassified"]
    assert set(attacked["status"]) == {"error" if name == "weights" else "ok"}


def test_a_data_set_that_uses_its_tensors_again_spoils_no_image(tmp_path, alone):
    """One buffer for all images, as some loaders have, and labels that are overwritten afterwards."""
    from orthattack.eval.data.dataset import ImageDataset
    from orthattack.eval.data.readers import Dataset

    images, buffer = images_of(), torch.empty(3, 8, 8)
    with torch.no_grad():
        labels = Net().eval()(images).argmax(1).tolist()
    labels[-1] = (labels[-1] + 1) % CLASSES

    class Reusing:
        def __init__(self):
            self.targets = list(labels)

        def __len__(self):
            return COUNT

        def __getitem__(self, k):
            return buffer.copy_(images[k]).requires_grad_(False), self.targets[k]

    source = Dataset(Reusing(), "made", False)
    data = ImageDataset("made", tuple(f"{k:02d}" for k in range(COUNT)), tuple(labels), None, "", source, range(COUNT))
    run = evaluated(tmp_path / "r", HONEST, data=data)
    assert all(same(run, alone, label) for label in HONEST)


def test_a_model_at_hand_comes_back_in_its_modes(tmp_path):
    from orthattack.eval import evaluate
    from tests.eval.tiny import classifier, dataset

    given = classifier()
    given.model.train()
    given.model.features[1].eval()
    run = evaluate(given, dataset(), ["FGSM"], out=tmp_path / "r", eps=EPS, checks=False, progress=False)
    assert (run.table()["scored"] > 0).all()
    assert given.model.training
    assert given.model.head.training
    assert not given.model.features[1].training
    assert all(p.requires_grad for p in given.model.parameters())


def test_hostile_functions_are_refused_where_they_are_no_functions(tmp_path):
    with pytest.raises(EvaluationError, match="a function needs a label"):
        evaluated(tmp_path / "r", [HARMLESS["mode"]])


class Data:
    """The images of `dataset`, and what a user's data set may do on the way."""

    def __init__(self, change=None):
        self.change, self.kept = change, []
        self.targets = dataset().labels

    def __len__(self):
        return COUNT

    def __getitem__(self, position):
        for image in self.kept:
            image.fill(0) if isinstance(image, np.ndarray) else image.zero_()
        image = images_of()[position]
        if self.change is not None:
            self.change()
        self.kept = [image]
        return [image, self.targets[position]]


def seeded():
    torch.manual_seed(1)
    np.random.seed(1)
    random.seed(1)


DATA = {
    "keeps what it returned and writes later": None,
    "seeds": seeded,
    "draws": lambda: torch.rand(3),
    "precision": lambda: torch.set_default_dtype(torch.float64),
    "grad mode": lambda: torch.set_grad_enabled(False),
    "process": lambda: (os.chdir("/"), os.environ.update(ORTHATTACK_HOSTILE="1"), Rolled().__enter__()),
}


def of(data):
    source = Dataset(data, "mine", thread_safe=False)
    return replace(dataset(), _source=source, _positions=range(COUNT))


@pytest.mark.parametrize("name", DATA)
def test_a_data_set_changes_no_rows(tmp_path, alone, name):
    """Its images are read while nothing is attacked, chunk by chunk: no thread reads ahead."""
    run = evaluated(tmp_path / "r", HONEST, data=of(Data(DATA[name])))
    for label in HONEST:
        assert same(run, alone, label), label


def test_what_a_data_set_draws_is_the_same_each_time():
    class Noisy(Data):
        def __getitem__(self, position):
            noise = torch.rand(3, 8, 8) + float(np.random.rand()) + random.random()
            return noise / 3, self.targets[position]

    data = of(Noisy())
    one, two = (data.load(3, classifier().preprocessing) for _ in range(2))
    assert torch.equal(one, two)
    assert not torch.equal(one, data.load(4, classifier().preprocessing))


def test_a_data_set_that_changes_the_model_is_told(tmp_path):
    model = Net()
    data = Data(lambda: model.head.weight.data.mul_(0.5))
    photos = of(data)
    with pytest.raises(EvaluationError, match=r"made changed the model's weights .*let it leave the model alone"):
        evaluated(tmp_path / "r", HONEST, model=model, data=photos)
    assert not list((tmp_path / "r").rglob("*.parquet"))


def test_a_data_set_that_raises_oddly_leaves_out_an_image(tmp_path):
    class Failing(Data):
        def __getitem__(self, position):
            if position == 3:
                raise Odd
            return super().__getitem__(position)

    run = evaluated(tmp_path / "r", ["PGD"], data=of(Failing()))
    rows = run.folder.read("shards", "net", "PGD", EPS)
    assert rows["status"].tolist()[3] == "unreadable"
    assert rows["message"].tolist()[3] == "Odd"
    assert (rows["status"] == "unreadable").sum() == 1

"""`optimize`: a faster copy for the gradients, the model itself for the judgement."""

from __future__ import annotations

import copy
import gc
import threading
import warnings
import weakref
from typing import ClassVar

import pytest
import torch
from torch import Tensor, nn

from orthattack import PGD, AutoAttack, OrthoAPGD, OrthoPGD, Square
from orthattack.attacks import fast_copy
from orthattack.attacks.fast_copy import _folded


class Residual(nn.Module):
    """Convolutions with batch norms whose statistics matter, a skip connection, a norm without a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv2, self.norm2 = nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.last, self.head = nn.BatchNorm2d(8), nn.Linear(8, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = self.norm1(self.conv1(images)).relu()
        x = x + self.norm2(self.conv2(x))
        return self.head(self.last(x).relu().mean((2, 3)))


class Counting(nn.Module):
    """The images as they are; `seen` are the ids of the modules that were called."""

    seen: ClassVar[list[int]] = []

    def forward(self, images: Tensor) -> Tensor:
        self.seen.append(id(self))
        return images


def trained(module: type[nn.Module] = Residual) -> nn.Module:
    torch.manual_seed(0)
    model = module()
    for _ in range(5):
        model(torch.rand(16, 3, 8, 8))  # moves the running statistics away from 0 and 1
    with torch.no_grad():  # so that the images are not all of one class, far from the others
        model.head.bias -= model.eval()(torch.rand(64, 3, 8, 8)).mean(0)
    return model


@pytest.fixture
def images() -> Tensor:
    return torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def test_folding_keeps_the_function_and_leaves_fewer_norms(images):
    model = trained()
    folded = _folded(copy.deepcopy(model))
    torch.testing.assert_close(folded(images), model(images), rtol=1e-4, atol=1e-5)
    graph = [node.target for node in folded.graph.nodes if node.op == "call_module"]
    assert [name for name in graph if "norm" in name or name == "last"] == ["last"]


def test_what_other_threads_run_meanwhile_is_left_alone(images):
    other, answers = trained(), []

    class Beside(Residual):
        def forward(self, x: Tensor) -> Tensor:
            if not isinstance(x, Tensor):  # while it is traced
                thread = threading.Thread(target=lambda: answers.append(other(images)))
                thread.start()
                thread.join()
            return super().forward(x)

    folded = _folded(trained(Beside))
    graph = [node.target for node in folded.graph.nodes if node.op == "call_module"]
    assert [name for name in graph if "norm" in name or name == "last"] == ["last"]
    (answer,) = answers
    assert isinstance(answer, Tensor)
    assert torch.equal(answer, other(images))


def test_a_convolution_whose_answer_goes_elsewhere_too_is_not_folded(images):
    class Forked(Residual):
        def forward(self, images: Tensor) -> Tensor:
            x = self.conv1(images)
            return self.head((self.norm1(x) + x).mean((2, 3)))

    model = trained(Forked)
    torch.testing.assert_close(_folded(copy.deepcopy(model))(images), model(images), rtol=1e-4, atol=1e-5)


def test_a_shared_convolution_is_not_folded(images):
    class Shared(Residual):
        def forward(self, images: Tensor) -> Tensor:
            x = self.norm1(self.conv1(images)).relu()
            x = self.norm2(self.conv2(x)) + self.conv2(x.relu())
            return self.head(x.mean((2, 3)))

    model = trained(Shared)
    torch.testing.assert_close(_folded(copy.deepcopy(model))(images), model(images), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("early_stop", [False, True])
def test_success_is_the_models_own(images, early_stop):
    model = trained()
    labels = model(images).argmax(1)
    result = OrthoPGD(model, eps=0.3, steps=5, optimize="auto", early_stop=early_stop).run(images, labels)
    assert result.success.any()
    assert torch.equal(result.success, model(result.adversarials).argmax(1) != labels)
    assert result.cosine.max() <= 1e-6
    plain = OrthoPGD(model, eps=0.3, steps=5, early_stop=early_stop, optimize="none").run(images, labels)
    torch.testing.assert_close(result.loss, plain.loss, rtol=1e-2, atol=1e-3)


def test_the_users_model_is_untouched_and_not_what_is_differentiated(images):
    model = nn.Sequential(Counting(), trained())
    before = {name: (id(v), v.clone(), v.stride()) for name, v in model.state_dict(keep_vars=True).items()}
    modules = {name: id(module) for name, module in model.named_modules()}
    labels = model(images).argmax(1)
    Counting.seen.clear()
    PGD(model, steps=3, optimize="auto")(images, labels)
    # Once to score the last iterate, once to judge what is returned and was not the last.
    assert Counting.seen.count(id(model[0])) in (1, 2)
    assert {name: id(module) for name, module in model.named_modules()} == modules
    for name, value in model.state_dict(keep_vars=True).items():
        assert id(value) == before[name][0]
        assert torch.equal(value, before[name][1])
        assert value.stride() == before[name][2]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("eps", [0.02, 0.1])
def test_squares_of_autoattack_ask_the_copy_in_float32_and_the_model_confirms_what_it_claims(images, eps, precision):
    model = nn.Sequential(Counting(), trained())
    labels = model(images).argmax(1)

    def run(optimize):
        Counting.seen.clear()
        attack = AutoAttack(
            model, eps=eps, queries=60, parts=["square"], optimize=optimize, precision=precision,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        result = attack.run(images, labels)
        return result, Counting.seen.count(id(model[0]))

    with warnings.catch_warnings(action="ignore"):  # that a processor has no bfloat16
        (result, calls), (plain, all_calls) = run("auto"), run("none")
    # The images, what is claimed, and in the end what has not been judged; and twice to see what kind of model it is.
    assert calls <= 4 + int(result.success.sum()) < all_calls
    assert torch.equal(result.success, model(result.adversarials).argmax(1) != labels)
    assert torch.equal(result.success, plain.success)
    torch.testing.assert_close(result.loss, plain.loss, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimize", ["none", "auto"])
def test_square_asks_the_model_alone_so_that_its_budget_holds_unless_it_may_ask_the_copy(images, optimize):
    model = nn.Sequential(Counting(), trained())
    labels = model(images).argmax(1)
    Counting.seen.clear()
    options = {} if optimize == "none" else {"optimize": optimize}  # "none" is the default
    result = Square(model, eps=0.02, queries=20, **options).run(images, labels)
    calls = Counting.seen.count(id(model[0]))
    assert int(result.forward_calls.max()) == {"none": 20, "auto": 21}[optimize]
    assert (calls >= 20) == (optimize == "none")


def test_a_model_that_has_changed_is_copied_again(images):
    model, made = trained(), []

    def of() -> nn.Module | None:
        return fast_copy.fast_copy(model, "auto", images)[0]

    with torch.no_grad():
        made.append(of())
        assert of() is made[0]
        for change in (
            lambda: model.head.weight.mul_(2),
            lambda: model.head.bias.data.add_(1),  # which torch does not count
            lambda: setattr(model, "scale", 3.0),
        ):
            change()
            assert of() is None  # a state that may never come again, as in training
            made.append(of())
            assert of() is made[-1]
            torch.testing.assert_close(made[-1](images), model(images), rtol=1e-4, atol=1e-5)
    assert len({id(copied) for copied in made}) == 4


def test_all_attacks_on_a_model_share_its_copy_which_goes_with_it(images, monkeypatch):
    model, made, fold = trained(), [], fast_copy._folded
    monkeypatch.setattr(fast_copy, "_folded", lambda copied: made.append(weakref.ref(fold(copied))) or made[-1]())
    labels = model(images).argmax(1)
    for attack in (PGD(model, steps=2), OrthoPGD(model, steps=2), OrthoAPGD(model, steps=2)):
        attack(images, labels)
    assert len(made) == 1
    del attack, model
    gc.collect()
    assert made[0]() is None


def test_training_makes_no_copy_at_each_step(images, monkeypatch):
    model, made, fold = trained(), [], fast_copy._folded
    monkeypatch.setattr(fast_copy, "_folded", lambda copied: made.append(copied) or fold(copied))
    labels = model(images).argmax(1)
    attack = PGD(model, steps=2)
    for _ in range(5):
        attack(images, labels)
        with torch.no_grad():
            model.head.weight += 0.01
    assert len(made) == 1


def test_a_copy_that_answers_otherwise_is_not_used(images, monkeypatch):
    model = trained()

    def spoiled(copied):
        copied.head.weight.data.mul_(-3)
        return copied

    monkeypatch.setattr(fast_copy, "_folded", spoiled)
    for _ in range(2):
        assert fast_copy.fast_copy(model, "auto", images) == (
            None, "the faster copy's logits differ from the model's",
        )  # fmt: skip


def test_what_is_returned_is_judged_once_and_not_at_all_if_it_was_the_last_iterate(images):
    """With an exact score of the last iterate there is nothing left to judge, unless an earlier one was better."""
    model = nn.Sequential(Counting(), trained())
    labels = model(images).argmax(1)
    attack = PGD(model, steps=3, optimize="auto")
    attack(images, labels)
    Counting.seen.clear()
    result = attack.run(images, labels)
    judged = int((result.steps < 3).sum())
    assert result.forward_calls.tolist() == [4 + int(step < 3) for step in result.steps]
    assert Counting.seen.count(id(model[0])) == 1 + (judged > 0)


class Random(Residual):
    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images + 0.1 * torch.randn_like(images))


class Refuses(Residual):
    def __deepcopy__(self, memo):
        raise RuntimeError("this model cannot be copied\nand more")


def hooked() -> nn.Module:
    model = trained()
    model.conv1.register_forward_hook(lambda module, args, out: out)
    return model


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: trained(Random), "draws at random"),
        (lambda: trained(Refuses), "this model cannot be copied$"),
        (hooked, "has hooks"),
        (lambda: trained().forward, "not a torch.nn.Module"),
    ],
)
def test_a_model_without_a_copy_does_the_work_itself_and_says_why_once(make, reason, images):
    model = make()
    labels = torch.zeros(6, dtype=torch.long)
    attack = PGD(model, steps=2, optimize="compile", random_start=False)
    with pytest.warns(UserWarning, match=reason) as caught:
        found = attack.run(images, labels).adversarials
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attack.run(images, labels)
        if reason != "draws at random":  # by default it is not asked for, and nothing is said
            for optimize in ("auto", "none"):
                plain = PGD(model, steps=2, random_start=False, optimize=optimize)
                assert torch.equal(found, plain(images, labels))


@pytest.mark.parametrize("odd", [torch.eye(3).to_sparse(), torch.ones(2, dtype=torch.complex64)])
def test_a_model_with_tensors_that_have_no_sum_is_attacked_without_a_copy(images, odd):
    model = trained()
    labels = model(images).argmax(1)
    expected = PGD(model, steps=2, random_start=False, optimize="none")(images, labels)
    model.register_buffer("odd", odd)
    for _ in range(2):
        assert torch.allclose(PGD(model, steps=2, random_start=False)(images, labels), expected, atol=1e-6)


@pytest.mark.parametrize("odd", [torch.tensor(0.5).expand(3), torch.arange(10.0)[::2]], ids=["expanded", "strided"])
def test_a_buffer_may_have_gaps_or_repeat_itself(images, odd):
    model = trained()
    model.register_buffer("odd", odd)
    with torch.no_grad():
        copied, why_not = fast_copy.fast_copy(model, "auto", images)
    assert copied is not None, why_not


def test_control_flow_that_cannot_be_traced_costs_only_the_folding(images):
    class Branches(Residual):
        def forward(self, images: Tensor) -> Tensor:
            return super().forward(images if images.mean() > 0 else -images)

    model = trained(Branches)
    labels = model(images).argmax(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = OrthoAPGD(model, steps=4, optimize="auto").run(images, labels)
    assert torch.equal(result.success, model(result.adversarials).argmax(1) != labels)


def test_an_unknown_choice_is_refused():
    with pytest.raises(ValueError, match="optimize must be one of 'auto', 'none', 'compile'; got 'fast'"):
        PGD(trained(), optimize="fast")

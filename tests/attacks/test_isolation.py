"""What is not ours cannot change what judges it: hostile losses, directions, detectors, attacks and target functions.

Beside each an honest attack on the same model, which finds bit for bit what it finds without the hostile one.
"""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable, Iterator
from dataclasses import fields

import foolbox
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from orthattack import (
    PGD,
    AttackResult,
    AutoAttack,
    Bisection,
    DetectorEvasion,
    Ensemble,
    ModelChangedError,
    OrthoAPGD,
    OrthoFGSM,
    OrthoPGD,
    OrthoSquare,
    Square,
    fooled,
)
from orthattack.attacks.task import Task
from orthattack.interop import torchattacks
from orthattack.interop.foolbox import FoolboxAttack, FromFoolbox
from orthattack.threat import perturbation_norm

pytestmark = pytest.mark.heavy

EPS = 0.1


class Net(nn.Module):
    """Small, and with all that can be changed: weights, buffers, a mode that matters."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Dropout(0.5))
        self.head = nn.Linear(36, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images - 0.5))


@pytest.fixture
def model() -> Net:
    torch.manual_seed(3)
    net = Net()
    with torch.no_grad():
        net(torch.rand(64, 3, 5, 5))  # statistics for the BatchNorm
        net.head.weight.mul_(4)
    return net.eval()


@pytest.fixture
def images() -> Tensor:
    return torch.rand(8, 3, 5, 5, generator=torch.Generator().manual_seed(0)) * 0.8 + 0.1


@pytest.fixture
def labels(model: Net, images: Tensor) -> Tensor:
    with torch.no_grad():
        return model(images).argmax(1)


@pytest.fixture(autouse=True)
def honest(model: Net, images: Tensor, labels: Tensor) -> Iterator[None]:
    """Before and after each test: the honest attack's result, the model, and what the caller passed."""
    tensors = [*model.state_dict().values(), images, labels]
    before = [tensor.clone() for tensor in tensors]
    expected = neighbour(model, images, labels)
    yield
    assert_same(neighbour(model, images, labels), expected)
    assert all(torch.equal(a, b) for a, b in zip(before, tensors, strict=True))
    assert not any(module.training or module._forward_hooks for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def neighbour(model: nn.Module, images: Tensor, labels: Tensor) -> AttackResult:
    return OrthoPGD(model, eps=EPS, steps=3, random_start=True).run(images, labels, seeds=range(8))


def assert_same(a: AttackResult, b: AttackResult) -> None:
    for field in fields(AttackResult):
        assert torch.equal(getattr(a, field.name), getattr(b, field.name)), field.name


def assert_true(result: AttackResult, model: nn.Module, images: Tensor, labels: Tensor, eps: float = EPS) -> None:
    """What a result says holds, as computed here from its images alone."""
    with torch.no_grad():
        assert torch.equal(result.success, model(result.adversarials).argmax(1) != labels)
    delta = result.adversarials.double() - images.double()
    assert torch.equal(result.norm, delta.abs().amax((1, 2, 3)))
    assert bool((result.norm <= eps * (1 + 1e-6)).all())


def ce(logits: Tensor, labels: Tensor) -> Tensor:
    return functional.cross_entropy(logits, labels, reduction="none")


def writes_labels(logits: Tensor, labels: Tensor) -> Tensor:
    values = ce(logits, labels.clone())
    labels.fill_(0)
    return values


def writes_logits(logits: Tensor, labels: Tensor) -> Tensor:
    values = ce(logits, labels)
    with torch.no_grad():
        logits.scatter_(1, labels.unsqueeze(1), -1e9)
    return values


def writes_logits_data(logits: Tensor, labels: Tensor) -> Tensor:
    values = ce(logits, labels)
    logits.data.fill_(float("nan"))
    return values


class WritesWhatItReturned:
    def __init__(self) -> None:
        self.last: Tensor | None = None

    def __call__(self, logits: Tensor, labels: Tensor) -> Tensor:
        if self.last is not None:
            self.last.data.fill_(1e9)
        self.last = ce(logits, labels)
        return self.last


LOSSES = [writes_labels, writes_logits, writes_logits_data, WritesWhatItReturned()]
ATTACKS = {
    "PGD": lambda model, loss: PGD(model, eps=EPS, steps=3, loss=loss, random_start=False),
    "OrthoPGD": lambda model, loss: OrthoPGD(model, eps=EPS, steps=3, loss=loss, early_stop=True, random_start=False),
    "OrthoAPGD": lambda model, loss: OrthoAPGD(model, eps=EPS, steps=5, loss=loss, eot_samples=2),
    "OrthoFGSM": lambda model, loss: OrthoFGSM(model, eps=EPS, loss=loss),
    "Square": lambda model, loss: Square(model, eps=EPS, queries=20, loss=loss),
    "OrthoSquare": lambda model, loss: OrthoSquare(model, eps=EPS, queries=20, loss=loss),
    "AutoAttack": lambda model, loss: AutoAttack(model, eps=EPS, steps=3, queries=5, loss=loss),
    "Bisection": lambda model, loss: Bisection(PGD(model, eps=EPS, steps=3, loss=loss), trials=3),
    "folded": lambda model, loss: PGD(model, eps=EPS, steps=3, loss=loss, optimize="auto", random_start=False),
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("loss", LOSSES)
def test_a_loss_gets_copies(model, images, labels, attack, loss):
    result, expected = (ATTACKS[attack](model, each).run(images, labels, seeds=range(8)) for each in (loss, ce))
    assert_same(result, expected)
    assert_true(result, model, images, labels, eps=1.0 if attack == "Bisection" else EPS)


def test_a_targeted_loss_gets_copies_too(model, images, labels):
    targets = (labels + 1) % 4
    result, expected = (
        PGD(model, eps=EPS, loss=each, targeted=True).run(images, targets) for each in (writes_labels, ce)
    )
    assert_same(result, expected)


def leaves_a_hook(m: Net) -> None:
    m.head.register_forward_hook(lambda module, inputs, logits: -logits)


def patches_forward(m: Net) -> None:
    m.forward = lambda images: m.head(m.body(images))


CHANGES: dict[str, Callable[[Net], object]] = {
    "weights (first: head.weight)": lambda m: m.head.weight.data.add_(1),
    "weights (first: head.bias)": lambda m: setattr(m.head, "bias", nn.Parameter(torch.zeros(4))),
    "buffers (first: body.1.running_var)": lambda m: m.body[1].running_var.data.fill_(9),
    "layers (first: head)": lambda m: setattr(m, "head", nn.Linear(36, 4)),
    "hooks (first: head._forward_hooks)": leaves_a_hook,
    "methods (first: forward)": patches_forward,
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("attack", ["PGD", "OrthoPGD", "AutoAttack", "Bisection", "folded"])
def test_a_loss_that_changes_the_model_is_an_error(model, images, labels, attack, change):
    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        values = ce(logits, labels)
        CHANGES[change](model)
        return values

    with pytest.raises(ModelChangedError) as error:
        ATTACKS[attack](model, loss).run(images, labels)
    assert str(error.value).startswith(f"the loss changed the model's {change}; they have been put back")


def test_a_loss_that_leaves_the_model_in_training_mode_is_judged_in_evaluation_mode(model, images, labels):
    model = copy.deepcopy(model)
    model.body[1] = nn.Identity()  # no statistics, which would be changed

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        model.train().requires_grad_(True)
        return ce(logits, labels)

    expected = PGD(model, eps=EPS, steps=3).run(images, labels)
    result = PGD(model, eps=EPS, steps=3, loss=loss).run(images, labels)
    with torch.no_grad():
        assert torch.equal(result.success, model(result.adversarials).argmax(1) != labels)
    assert not torch.equal(result.adversarials, expected.adversarials)  # its own gradients were noisy


def centres(images: Tensor) -> Tensor:
    images -= images.mean((1, 2, 3), keepdim=True)
    return images


def halves(images: Tensor) -> Tensor:
    kept = images.clone()
    images.mul_(0.5)
    return kept


def writes_data(images: Tensor) -> Tensor:
    kept = images.clone()
    images.data.zero_()
    return kept.flip(3)


class WritesDirection:
    def __init__(self) -> None:
        self.last: Tensor | None = None

    def __call__(self, images: Tensor) -> Tensor:
        if self.last is not None:
            self.last.fill_(1)
        self.last = images[:, [1, 0, 2]]
        return self.last


DIRECTIONS = {
    centres: lambda images: images - images.mean((1, 2, 3), keepdim=True),
    halves: lambda images: images,
    writes_data: lambda images: images.flip(3),
    WritesDirection(): lambda images: images[:, [1, 0, 2]],
}


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_direction_gets_copies(model, images, labels, direction, norm):
    eps = {"linf": 8 / 255, "l2": 0.5, "l1": 3.0}[norm]
    for scope in ("image", None):
        result, expected = (
            OrthoPGD(model, norm, eps, steps=3, scope=scope, directions=["constant", each], random_start=False).run(
                images, labels
            )
            for each in (direction, DIRECTIONS[direction])
        )
        assert_same(result, expected)
        assert bool((perturbation_norm(result.adversarials.double() - images, norm) <= eps * (1 + 1e-5)).all())
        assert bool((result.cosine <= 1e-6).all())


def test_a_direction_that_changes_the_model_is_an_error(model, images, labels):
    def direction(images: Tensor) -> Tensor:
        model.head.weight.data.add_(1)
        return images.flip(3)

    with pytest.raises(ModelChangedError, match=r"^a direction changed the model's weights \(first: head.weight\)"):
        OrthoPGD(model, eps=EPS, steps=2, directions=[direction]).run(images, labels)


class Changing(nn.Module):
    """Code of somebody else's that a layer, a function or a hook of torch may hold."""

    def __init__(self, model: Net) -> None:
        super().__init__()
        self.change = lambda: model.head.weight.data.add_(1)

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        self.change()
        return images.flip(3) if labels is None else nn.functional.cross_entropy(images, labels, reduction="none")


class Differentiated(torch.autograd.Function):
    """A function of one's own that torch calls."""

    model: Net

    @staticmethod
    def forward(ctx: object, logits: Tensor, labels: Tensor) -> Tensor:
        Differentiated.model.head.weight.data.add_(1)
        return logits.sum(1)

    @staticmethod
    def backward(ctx: object, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.unsqueeze(1).expand(-1, 4), None


def test_what_torch_holds_of_others_is_watched_too(model, images, labels):
    before = model.head.weight.clone()
    hooked = nn.CrossEntropyLoss(reduction="none")
    hooked.register_forward_hook(lambda *_: list(map(model.head.weight.data.add_, [1]))[1:] or None)
    patched = nn.CrossEntropyLoss(reduction="none")
    vars(patched)["forward"] = Changing(model)
    Differentiated.model = model
    held = nn.Sequential(Changing(model))
    for options in (
        {"directions": [held]},
        {"directions": [held.forward]},
        {"loss": nn.DataParallel(Changing(model))},
        {"loss": patched},
        {"loss": hooked},
        {"loss": Differentiated.apply},
    ):
        with pytest.raises(ModelChangedError, match=r"changed the model's weights \(first: head.weight\)"):
            OrthoPGD(model, eps=EPS, steps=2, **options).run(images, labels)
        assert torch.equal(model.head.weight, before)


def test_a_direction_of_complex_numbers_is_refused(model, images, labels):
    for direction in (torch.ones(3, 5, 5) * 1j, lambda x: x * 1j):
        with pytest.raises(ValueError, match=r"a direction must be real; got torch.complex64: give its .real and"):
            OrthoPGD(model, directions=[direction]).run(images, labels)


def test_a_direction_that_returns_no_tensor_is_named(model, images, labels):
    with pytest.raises(ValueError, match="a direction must return a tensor; got list"):
        OrthoPGD(model, directions=[lambda images: images.tolist()]).run(images, labels)


def score(images: Tensor) -> Tensor:
    return images.mean((1, 2, 3)) - 0.5


def writing_score(images: Tensor) -> Tensor:
    found = score(images)
    with torch.no_grad():
        images.fill_(0.5)
    return found


class WritingScore(nn.Module):
    def forward(self, images: Tensor) -> Tensor:
        found = score(images)
        images.data.zero_()
        return found


@pytest.mark.parametrize("enforce", ["perturbation", "gradient"])
@pytest.mark.parametrize("detector", [writing_score, WritingScore()])
def test_a_detector_gets_copies(model, images, labels, detector, enforce):
    result, expected = (
        DetectorEvasion(model, each, eps=EPS, steps=4, enforce=enforce).run(images, labels)
        for each in (detector, score)
    )
    assert_same(result, expected)


def test_a_detector_that_changes_the_model_is_an_error(model, images, labels):
    def detector(images: Tensor) -> Tensor:
        model.head.weight.data.add_(1)
        return score(images)

    with pytest.raises(ModelChangedError, match=r"^the detector changed the model's weights \(first: .*head.weight\)"):
        DetectorEvasion(model, detector, eps=EPS, steps=4).run(images, labels)


class Hostile(foolbox.attacks.LinfFastGradientAttack):
    """A user's subclass that does something else first, with the images and labels it gets."""

    def __init__(self, deed: Callable[..., object]) -> None:
        super().__init__(random_start=False)
        self.deed = deed

    def run(self, model, inputs, criterion, *, epsilon, **kwargs):
        criterion_ = foolbox.attacks.base.get_criterion(criterion)
        return (
            inputs
            if self.deed(inputs.raw, criterion_.labels.raw)
            else super().run(model, inputs, criterion, epsilon=epsilon)
        )


@pytest.mark.parametrize(
    "deed", [lambda images, labels: labels.fill_(0) is labels, lambda images, labels: labels.data.add_(1) is not None]
)
def test_a_foolbox_attack_gets_copies_of_the_labels(model, images, labels, deed):
    result = FromFoolbox(model, Hostile(deed), "linf", EPS).run(images, labels)
    assert_true(result, model, images, labels, EPS * (1 + 1e-5))
    assert not bool(result.success[result.norm == 0].any())


@pytest.mark.parametrize(
    "deed", [lambda images, labels: images.uniform_() is images, lambda images, labels: images.data.zero_() is not None]
)
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_what_lies_outside_the_ball_is_no_success(model, images, labels, deed, norm):
    """Foolbox clips to a ball around what the attack has made of the images."""
    attack = Hostile(deed)
    attack.distance = foolbox.distances.LpDistance({"linf": float("inf"), "l2": 2, "l1": 1}[norm])
    with pytest.warns(UserWarning, match=r"8 of 8 adversarials left the threat model, .* no success") as caught:
        result = FromFoolbox(model, attack, norm, EPS).run(images, labels)
    assert len(caught) == 1
    assert not result.success.any()
    with torch.no_grad():
        assert bool((model(result.adversarials).argmax(1) != labels).any())  # which would have been a success
    assert torch.equal(result.norm, perturbation_norm(result.adversarials.double() - images.double(), norm))
    assert bool((result.norm > EPS).all())


def test_a_model_that_begins_to_write_into_its_input_is_found_out_by_the_ball(model, images, labels):
    asked = 0

    def writes(x: Tensor) -> Tensor:
        nonlocal asked
        asked += 1
        logits = model(x.clone())
        if asked > 6:
            x.data.mul_(0.1)
        return logits

    with pytest.warns(UserWarning, match="adversarials left the threat model"):
        result = PGD(writes, eps=EPS, steps=8).run(images, labels)
    assert not result.success[result.norm > EPS * (1 + 1e-5)].any()


def test_images_of_nan_are_told_as_such(model, images, labels):
    class Nowhere(foolbox.attacks.LinfFastGradientAttack):
        def run(self, model, inputs, criterion, *, epsilon, **kwargs):
            return inputs * float("nan")

    with pytest.raises(ValueError, match="model returned NaN or infinite logits"):
        FromFoolbox(model, Nowhere(), "linf", EPS).run(images, labels)


def test_what_a_foolbox_attack_returned_is_not_its_to_change(model, images, labels):
    kept: list[Tensor] = []

    class Keeps(foolbox.attacks.LinfFastGradientAttack):
        def __call__(self, *args, **kwargs):
            found = super().__call__(*args, **kwargs)
            kept.append(found[1])
            return found

    result = FromFoolbox(model, Keeps(random_start=False), "linf", EPS).run(images, labels)
    before = result.adversarials.clone()
    kept[0].zero_()
    assert torch.equal(result.adversarials, before)


@pytest.mark.parametrize("change", CHANGES)
def test_a_foolbox_attack_that_changes_the_model_is_an_error(model, images, labels, change):
    attack = FromFoolbox(model, Hostile(lambda *_: CHANGES[change](model) is model), "linf", EPS)
    with pytest.raises(ModelChangedError, match=r"^the Foolbox attack changed the model's ") as error:
        attack.run(images, labels)
    assert change in str(error.value)


def test_a_foolbox_attack_that_flips_modes_is_put_right_and_judged_as_the_model_is(model, images, labels):
    def deed(*_: object) -> bool:
        model.body[4].train()
        model.requires_grad_(False)
        torch.manual_seed(0)
        return False

    numbers = torch.get_rng_state()
    result = FromFoolbox(model, Hostile(deed), "linf", EPS).run(images, labels)
    assert_true(result, model, images, labels)
    assert torch.equal(torch.get_rng_state(), numbers)


def test_a_foolbox_attack_that_returns_something_else_is_named(model, images, labels):
    class Short(foolbox.attacks.LinfFastGradientAttack):
        def __call__(self, *args, **kwargs):
            return None, super().__call__(*args, **kwargs)[1][:3], None

    with pytest.raises(ValueError, match=r"must return images \(8, 3, 5, 5\); got \(3, 3, 5, 5\)"):
        FromFoolbox(model, Short(), "linf", EPS).run(images, labels)


def test_ours_as_a_foolbox_attack_watches_a_users_loss(model, images, labels):
    fmodel = foolbox.PyTorchModel(model, bounds=(0, 1), device="cpu")
    honest, copied = (
        FoolboxAttack(OrthoPGD, steps=3, loss=loss, random_start=False)(fmodel, images, labels, epsilons=[EPS])
        for loss in (ce, writes_labels)
    )
    assert torch.equal(honest[1][0], copied[1][0])

    def loss(logits: Tensor, labels: Tensor) -> Tensor:
        values = ce(logits, labels)
        model.head.weight.data.add_(1)
        return values

    with pytest.raises(ModelChangedError, match=r"the loss changed the model's weights \(first: .*head.weight\)"):
        FoolboxAttack(OrthoPGD, steps=3, loss=loss)(fmodel, images, labels, epsilons=[EPS])


@pytest.mark.parametrize("normalised", [False, True])
def test_a_target_function_gets_copies(model, images, labels, normalised):
    def writes(x: Tensor, y: Tensor) -> Tensor:
        wanted = (y + 1) % 4
        x.zero_()
        y.zero_()
        return wanted

    found = []
    for targets in (lambda x, y: (y + 1) % 4, writes):
        attack = torchattacks.PGD(model, eps=EPS, steps=3, random_start=False)
        attack.set_mode_targeted_by_function(targets)
        if normalised:
            attack.set_normalization_used([0.5] * 3, [0.5] * 3)
        found.append(attack((images - 0.5) / 0.5 if normalised else images, labels))
    assert torch.equal(*found)


def test_a_target_function_may_draw_but_not_change_the_model(model, images, labels):
    attack = torchattacks.PGD(model, eps=EPS, steps=2, random_start=False)
    drawn: list[Tensor] = []

    def draws(x: Tensor, y: Tensor) -> Tensor:
        drawn.append((y + torch.randint(1, 4, y.shape)) % 4)
        return drawn[-1]

    attack.set_mode_targeted_by_function(draws)
    attack(images, labels)
    attack(images, labels)
    assert not torch.equal(*drawn)

    def changes(x: Tensor, y: Tensor) -> Tensor:
        model.head.weight.data.add_(1)
        return y

    attack.set_mode_targeted_by_function(changes)
    with pytest.raises(ModelChangedError, match=r"^the target function changed the model's weights"):
        attack(images, labels)


class OwnSearch:
    """A user's search, which writes the labels it is handed and offers the images themselves."""

    merit = "margin"

    def options(self, eps: float | Tensor) -> dict[str, object]:
        return {}

    def __call__(self, task: Task, start: Tensor | None) -> None:
        assert task.goal.labels is not None
        task.goal.labels.add_(1).remainder_(4)
        task.score(task.region.images.clone(), 0, with_gradient=False)


def test_a_users_search_is_judged_by_labels_it_never_saw(model, images, labels):
    attack = PGD(model, eps=EPS)
    result, _ = attack._run(images, labels, None, None, OwnSearch(), False)
    assert not bool(result.success.any())
    assert_true(result, model, images, labels)


class Writes(nn.Module):
    """A model that writes into its input, in a way that torch does not count."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, images: Tensor) -> Tensor:
        logits = self.inner(images.clone())
        images.data.zero_()
        return logits


@pytest.mark.parametrize("attack", [PGD, OrthoPGD, Square])
def test_a_model_that_writes_into_its_input_past_torch_is_refused(model, images, labels, attack):
    with pytest.raises(ValueError, match="the model changes its input in place"):
        attack(Writes(model), eps=EPS).run(images, labels)


def test_members_of_an_ensemble_do_not_see_what_another_wrote(model, images, labels):
    members = [Writes(model), model]
    assert torch.equal(Ensemble(members)(images.clone()), Ensemble([model, model])(images))
    assert torch.equal(fooled(Ensemble(members), images, labels), fooled(model, images, labels))


# --- Threads ---------------------------------------------------------------------------------------------------------


def at_once(calls: list[Callable[[], object]]) -> list[object]:
    """What the calls return, each in a thread of its own, started at the same moment."""
    barrier, found = threading.Barrier(len(calls)), [None] * len(calls)

    def work(k: int) -> None:
        barrier.wait()
        try:
            found[k] = calls[k]()
        except Exception as error:
            found[k] = error

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize("trials", [50, pytest.param(200, marks=pytest.mark.slow)])
def test_threads_attack_one_model_as_one_thread_would(images, labels, trials):
    """Two and three threads: different attacks, the same attack twice, a model that shares layers."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Flatten(), nn.Linear(75, 8), nn.BatchNorm1d(8), nn.Linear(8, 4))
    model[1].bias.requires_grad_(False)
    shared = PGD(model, eps=EPS, steps=1, random_start=True)
    attacks = [
        shared,
        shared,
        OrthoPGD(model, eps=EPS, steps=1, random_start=True, loss=lambda z, y: ce(z, y)),
        Square(nn.Sequential(model, nn.Identity()), eps=EPS, queries=2),
    ]
    calls = [lambda attack=attack: attack.run(images, labels, seeds=range(8)) for attack in attacks]
    expected = [call() for call in calls]
    before = [(name, value.clone()) for name, value in model.state_dict().items()]
    numbers = torch.get_rng_state()
    for trial in range(trials):
        chosen = [trial % 4, (trial // 4) % 4, 1][: 2 + trial % 2]
        for k, found in zip(chosen, at_once([calls[k] for k in chosen]), strict=True):
            assert isinstance(found, AttackResult), found
            assert_same(found, expected[k])
        assert [module.training for module in model.modules()] == [True] * 5
        assert [p.requires_grad for p in model.parameters()] == [True, False, True, True, True, True]
        assert torch.equal(torch.get_rng_state(), numbers)
    assert all(torch.equal(a, b) for (_, a), b in zip(before, model.state_dict().values(), strict=True))


def test_threads_share_faster_copies_and_foolbox_streams(model, images, labels):
    """Tracing for a faster copy patches every module's call; Foolbox draws from the process's random numbers."""
    honest_loss = PGD(model, eps=EPS, steps=2, random_start=True)

    def made() -> list[Callable[[], AttackResult]]:
        folded = [PGD(model, eps=EPS, steps=2, random_start=True, optimize="auto") for _ in range(2)]
        theirs = [
            FromFoolbox(
                model, foolbox.attacks.LinfPGD(steps=2), "linf", EPS, generator=torch.Generator().manual_seed(k)
            )
            for k in range(2)
        ]
        return [lambda a=a: a.run(images, labels, seeds=range(8)) for a in [*folded, *theirs, honest_loss]]

    expected = [call() for call in made()]
    for _ in range(10):
        for found, wanted in zip(at_once(made()), expected, strict=True):
            assert isinstance(found, AttackResult), found
            assert_same(found, wanted)


def test_a_model_made_in_inference_mode_is_attacked_by_several_threads(images, labels):
    with torch.inference_mode():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Flatten(), nn.Linear(75, 4))
    parameters = list(model.parameters())
    call = lambda: PGD(model, eps=EPS, steps=3).run(images, labels, seeds=range(8))  # noqa: E731
    expected = call()
    for _ in range(20):
        for found in at_once([call] * 3):
            assert isinstance(found, AttackResult), found
            assert_same(found, expected)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))

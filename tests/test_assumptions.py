"""Models that are not what an attack assumes: refused with what mends it, warned of, or attacked all the same."""

from __future__ import annotations

import random
import warnings
from collections import namedtuple
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

import orthattack
from orthattack import (
    APGD,
    PGD,
    AttackResult,
    AutoAttack,
    Bisection,
    DetectorEvasion,
    Ensemble,
    OrthoAPGD,
    OrthoAutoAttack,
    OrthoPGD,
    OrthoSquare,
    Square,
    fooled,
)
from orthattack.assumptions import PROBABILITIES, Behaviour, batch_statistics, observe
from orthattack.models import checked_logits
from tests.attacks.test_attacks import Recorder, drawn, linear_model, small_model
from tests.attacks.test_promises import trained

pytestmark = pytest.mark.heavy

# --- what a model answers --------------------------------------------------------------------------------------------

Output = namedtuple("Output", ["loss", "logits"])
MASK = torch.tensor([0.0, -torch.inf, 0.0])


def linear(classes: int = 3) -> nn.Module:
    return linear_model(classes=classes)


REFUSED = [
    (lambda z: z[:, :1], r"at least two logits .* got \(6, 1\).*softmax of \(0, z\).*pad\(model\(x\), \(1, 0\)\)"),
    (lambda z: z[:, 0], r"at least two logits .* got \(6,\).*pad\(model\(x\).view\(-1, 1\), \(1, 0\)\)"),
    (lambda z: z.argmax(1), r"got \(6,\) of torch.int64, as of predicted classes"),
    (lambda z: z[:, :0], r"logits of shape \(6, classes\); got \(6, 0\)"),
    (lambda z: SimpleNamespace(logits=z), r"got SimpleNamespace: attack lambda x: model\(x\).logits instead, after"),
    (lambda z: SimpleNamespace(scores=z), r"got SimpleNamespace: attack lambda x: model\(x\).scores instead"),
    (lambda z: Output(z.sum(), z), r"got Output: attack lambda x: model\(x\).logits instead"),
    (lambda z: (z.sum(), z), r"got tuple: attack lambda x: model\(x\)\[1\] instead"),
    (lambda z: [z, z], r"got list: attack lambda x: model\(x\)\[0\] instead"),
    (lambda z: {"aux": z, "logits": z}, r"got dict: attack lambda x: model\(x\)\['logits'\] instead"),
    (lambda z: {"features": z[:, :, None], "out": z}, r"got dict: attack lambda x: model\(x\)\['out'\] instead"),
    (lambda z: z.detach().numpy(), "got ndarray: return a torch.Tensor"),
    (lambda z: None, "got NoneType: return a torch.Tensor"),
    (lambda z: (100 * z).int(), r"got torch.int32: attack lambda x: model\(x\).float\(\), after .* only Square"),
    (lambda z: z > 0, r"got torch.bool: attack lambda x: model\(x\).float\(\)"),
    (lambda z: z[..., None, None], r"got \(6, 3, 1, 1\): attack lambda x: model\(x\)\.flatten\(1\), after model"),
    (lambda z: torch.complex(z, z), r"got torch.complex64: attack lambda x: model\(x\).abs\(\)"),
    (lambda z: z.to(torch.float8_e4m3fn), r"of at least 16 bits; got torch.float8_e4m3fn: .*\.float\(\), after [^;]*$"),
    (lambda z: z.to_sparse(), r"dense and with values; got torch.sparse_coo on cpu"),
    (lambda z: z.to("meta"), r"dense and with values; got torch.strided on meta"),
    (lambda z: z + MASK, r"\(sample 0\): -inf for class 1, .*clamp\(min=-1e\+04\)"),
    (lambda z: z + torch.tensor([0.0, torch.inf, 0.0]), r"torch.float32 overflows: compute in a wider dtype"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "message"), REFUSED)
@pytest.mark.parametrize("ask", ["PGD", "Square", "fooled"])
def test_what_is_not_logits_is_refused_with_the_line_that_mends_it(answer, message, ask):
    inner, (images, _) = linear(), drawn()
    labels = torch.zeros(6, dtype=torch.long)

    def model(x: Tensor) -> object:
        return answer(inner(x))

    attacks = {"PGD": PGD(model, steps=2), "Square": Square(model, queries=3)}
    with pytest.raises(ValueError, match=message):
        fooled(model, images, labels) if ask == "fooled" else attacks[ask](images, labels)


@pytest.mark.parametrize(
    ("shape", "helps"),
    [((4, 3, 1, 1), True), ((4, 3, 1), True), ((4, 3, 2, 1), False), ((5, 3, 1, 1), False), ((4, 1, 1, 1), False),
     ((5, 3), False), ((4, 0), False), ((4, 0, 1), False)],
)  # fmt: skip
def test_flattening_is_advised_where_it_makes_logits(shape, helps):
    with pytest.raises(ValueError, match=r"model must return logits of shape \(4, classes\); got") as error:
        checked_logits(torch.zeros(shape), 4)
    assert ("attack lambda x: model(x).flatten(1), after model.eval()" in str(error.value)) == helps


def test_nan_is_refused_by_attacks_and_is_no_answer_to_fooled():
    inner, (images, _) = linear(), drawn()

    def model(x: Tensor) -> Tensor:
        return inner(x) * torch.tensor([1.0, torch.nan, 1.0])

    with pytest.raises(ValueError, match=r"\(sample 0\): NaN: look for a division"):
        Square(model, queries=2)(images, torch.zeros(6, dtype=torch.long))
    with pytest.warns(UserWarning, match="NaN about 6 of 6 adversarials, which counts as not fooled and is no sign of"):
        assert not fooled(model, images, torch.zeros(6, dtype=torch.long)).any()


def test_classes_that_come_and_go_are_refused():
    inner, (images, labels), calls = linear(4), drawn(), []

    def model(x: Tensor) -> Tensor:
        calls.append(len(x))
        return inner(x)[:, : 3 + len(calls) % 2]

    with pytest.raises(ValueError, match=r"the same classes each time; got [34], then [34]"):
        PGD(model, steps=3, random_start=False)(images, labels % 3)


def test_a_loss_of_nan_is_not_called_saturated():
    images, labels = drawn()[0], torch.zeros(6, dtype=torch.long)
    with pytest.warns(UserWarning, match=r"zero_gradients\): its value is NaN or infinite\. They climbed the margin"):
        PGD(linear(), steps=2, loss=lambda z, _: z[:, 0] * torch.nan)(images, labels)
    with pytest.raises(ValueError, match=r"loss must return real values; got torch\.complex64"):
        PGD(linear(), steps=2, loss=lambda z, _: z[:, 0] * 1j)(images, labels)


ROOMLESS = [
    (1, 0.5, {"scope": "pixel"}, {}),
    (3, 1.0, {"scope": "image"}, {}),
    (3, 1.0, {"scope": None, "directions": ["constant"]}, {}),
    (3, 0.5, {"scope": "image"}, {"eps": 1e-30}),
]


@pytest.mark.parametrize(("channels", "grey", "threat", "options"), ROOMLESS)
def test_images_that_nothing_may_be_done_to_are_told_of(channels, grey, threat, options):
    """One channel of each pixel, white images, a radius below round-off: what is not fooled was never attacked."""
    images, labels = torch.full((4, channels, 2, 2), grey), torch.zeros(4, dtype=torch.long)
    model = nn.Sequential(nn.Flatten(), nn.Linear(4 * channels, 3))
    model[1].bias.data = torch.tensor([9.0, 0, 0])
    options = {"eps": 0.1, **threat, **options}
    for attack in (PGD(model, steps=2, **options), Square(model, queries=3, **options)):
        with pytest.warns(UserWarning, match="leaves nothing but the image itself for 4 of 4 images") as caught:
            result = attack.run(images, labels)
        assert len(caught) == 1
        assert attack.run(images, labels).norm.max() == 0  # which is not said again
        assert not result.success.any()
        assert result.norm.max() == 0


def test_images_that_merely_stand_are_not_said_to_be_without_room():
    images, _ = drawn()
    labels = linear()(images).argmax(1)
    for options in ({"eps": 0.0}, {"alpha": 0.0}):
        attack = PGD(linear(), **{"steps": 1, "eps": 0.1, "random_start": False, "scope": "image", **options})
        assert attack.run(images, labels).norm.max() == 0


def test_a_sigmoid_written_as_two_logits_is_the_same_classifier():
    """The line of the message, word for word: softmax of (0, z) is the sigmoid of z, and it falls."""
    model, (images, _) = linear(1), drawn()

    def mended(x: Tensor) -> Tensor:
        return torch.nn.functional.pad(model(x), (1, 0))

    with torch.no_grad():
        torch.testing.assert_close(mended(images).softmax(1)[:, 1], model(images).sigmoid()[:, 0])
        labels = (model(images)[:, 0] > 0).long()
    assert not fooled(mended, images, labels).any()
    assert PGD(mended, eps=0.3).run(images, labels).success.all()


def test_the_floor_for_masked_classes_lies_below_all_other_logits():
    inner, (images, _) = linear(), drawn()

    def model(x: Tensor) -> Tensor:
        return 1e6 * inner(x) + MASK

    with pytest.raises(ValueError, match=r"clamp\(min=-\de\+0[5-8]\)") as caught:
        PGD(model)(images, torch.zeros(6, dtype=torch.long))
    floor = float(str(caught.value).split("clamp(min=")[1].split(")")[0])
    logits = model(images[:1])
    assert floor < logits[logits.isfinite()].min()


# --- the observation -------------------------------------------------------------------------------------------------

SMALL = small_model()


class Net(nn.Module):
    """A small convolutional network with whatever norm is given, and dropout."""

    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.Identity() if norm is None else norm
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.drop(self.norm(self.conv(x)).relu().mean((2, 3))))


class Later(Net):
    def forward(self, x: Tensor) -> Tensor:
        return functional.batch_norm(super().forward(x), None, None, training=True)


INDEPENDENT = {
    "plain": Net(),
    "running statistics": Net(nn.BatchNorm2d(8)),
    "instance norm": Net(nn.InstanceNorm2d(8)),
    "group norm": Net(nn.GroupNorm(2, 8)),
    "quantised": lambda x: SMALL((x * 32).round() / 32),
    "quantised inside": lambda x: (Net().eval()(x) * 1e4).round() / 1e4,
    "half": Net().half(),
    "bfloat16": Net().bfloat16(),
}
OF_THE_BATCH = {
    "batch norm": Net(nn.BatchNorm2d(8, track_running_stats=False)),
    "refuses one image": Later(),
    "centred by the batch": lambda x: SMALL(x - x.mean()),
    "softmax over the batch": lambda x: 10 * SMALL(x).softmax(0),
    "scaled by the batch": lambda x: SMALL(x) / SMALL(x).std(),
    "size of the batch": lambda x: SMALL(x) / len(x),
    "ranks": lambda x: SMALL(x) + 0.1 * SMALL(x).argsort(0),
    "divided by the batch's largest pixel": lambda x: SMALL(x / x.amax()),
    "stretched to the batch's range": lambda x: SMALL((x - x.amin()) / (x.amax() - x.amin())),
}


def shown(model: object, images: Tensor) -> Behaviour:
    if isinstance(model, nn.Module):
        model.eval()
        images = images.to(next(model.parameters()).dtype)
    return observe(model, images)


@pytest.mark.parametrize("name", INDEPENDENT)
def test_an_answer_of_its_own_is_seen_as_such(name):
    for seed in range(4):
        assert shown(INDEPENDENT[name], drawn(seed)[0]) == Behaviour()


@pytest.mark.parametrize("name", OF_THE_BATCH)
def test_an_answer_that_depends_on_the_batch_is_seen(name):
    found = shown(OF_THE_BATCH[name], drawn(n=1)[0])
    assert found.is_of_the_batch
    assert not found.is_random
    assert "depends on the rest of its batch" in found.on_batches()
    assert ("batch norm without running statistics ('norm')" in found.on_batches()) == (name == "batch norm")


def test_what_is_not_known_of_a_dependence_is_not_said():
    """Of a model that draws, the batch norms alone tell."""
    assert "beside another image" not in Behaviour(0.1, 0.0, ("norm",)).on_batches()
    assert "beside another image it moves by 0.2 of" in Behaviour(0.0, 0.2).on_batches()


def test_a_dependence_on_the_batchs_range_is_seen_on_images_that_fill_it_too():
    images, _ = drawn(n=1)
    images[..., 1, 1], images[..., 2, 2] = 0.0, 1.0
    assert shown(OF_THE_BATCH["stretched to the batch's range"], images).is_of_the_batch


def test_batch_norms_without_statistics_are_named():
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Sequential(nn.BatchNorm2d(4, track_running_stats=False))
    )
    assert batch_statistics(model) == ["2.0"]
    assert batch_statistics(lambda x: x) == []


def noisy(size: float):
    return lambda x: SMALL(x + size * torch.randn_like(x))


def rarely(x: Tensor) -> Tensor:
    return SMALL(x + (0.1 if float(torch.rand(())) < 0.3 else 0.0))


RANDOM = {
    "dropout": lambda x: SMALL(functional.dropout(x, 0.5)),
    "noise": noisy(0.1),
    "little noise": noisy(1e-4),
    "noise of NumPy": lambda x: SMALL(x + float(np.random.rand())),
    "noise of Python": lambda x: SMALL(x + random.random()),
    "now and then": rarely,
    "one draw for the whole batch": lambda x: SMALL(x * (0.5 + torch.rand(()))),
}


@pytest.mark.parametrize("name", RANDOM)
def test_a_model_that_draws_is_seen_and_the_streams_are_left_alone(name):
    images, _ = drawn()
    before = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    found = observe(RANDOM[name], images)
    assert found.is_random
    assert "eot_samples" in found.on_randomness()
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]
    assert np.random.get_state()[1].tolist() == before[2]


def test_it_costs_three_images_and_no_more_where_nothing_differs():
    asked: list[int] = []

    def model(x: Tensor) -> Tensor:
        asked.append(len(x))
        return x.flatten(1)[:, :5] - 1

    observe(model, drawn()[0])
    assert asked == [1, 2]


def test_probabilities_are_seen():
    images, _ = drawn()
    assert observe(lambda x: SMALL(x).softmax(1), images).probabilities
    assert not observe(lambda x: SMALL(x).log_softmax(1), images).probabilities
    assert not observe(lambda x: SMALL(x).sigmoid(), images).probabilities
    assert "remove the final softmax" in PROBABILITIES


def test_probabilities_of_half_precision_add_up_to_1_but_for_its_digits():
    images, _ = drawn()
    for other, are in ((0.5078125, True), (0.515625, False)):
        row = torch.tensor([0.5, other], dtype=torch.bfloat16)
        assert observe(lambda x, row=row: row.expand(len(x), 2), images).probabilities is are


def test_round_off_is_measured_by_the_size_of_logits_that_are_all_alike():
    assert observe(lambda x: torch.full((len(x), 3), -100.0).double() + 1e-5 * len(x), drawn()[0]) == Behaviour()


@pytest.mark.parametrize("bounds", [(0, 1), (-3, 5)])
def test_what_a_model_is_asked_about_lies_in_the_bounds(bounds):
    (low, high), asked = bounds, []

    def model(x: Tensor) -> Tensor:
        asked.append(x)
        return x.flatten(1)[:, :3].double() - 9 + 1e-6 * len(x)  # so that all is asked

    observe(model, low + (high - low) * drawn()[0], bounds)
    assert len(asked) == 4
    for x in asked:
        assert x.min() >= low
        assert x.max() <= high


SIGMOID = nn.Sequential(small_model(), nn.Sigmoid())


@pytest.mark.parametrize("model", [
    lambda x: SMALL(x).sigmoid(), SIGMOID, lambda x: SMALL(x).sigmoid().double().view(len(x), -1).clone(),
    lambda x: SMALL(x)[:, :2].sigmoid(),
])  # fmt: skip
def test_sigmoids_are_seen(model):
    for n in (1, 6):
        seen = observe(model, drawn(n=n)[0])
        assert seen.sigmoids
        assert not seen.probabilities


@pytest.mark.parametrize("model", [
    SMALL, lambda x: SMALL(x).softmax(1), lambda x: x.flatten(1)[:, :5], lambda x: SMALL(x).sigmoid().logit(),
    lambda x: 0.5 + 1e-4 * SMALL(x), lambda x: 2 * SMALL(x).sigmoid(), lambda x: SMALL(x).sigmoid().detach() * 1,
    lambda x: functional.pad(SMALL(x)[:, :1], (1, 0)), lambda x: SMALL(x).sigmoid() @ torch.eye(5) / 5,
])  # fmt: skip
def test_logits_that_happen_to_lie_between_0_and_1_are_no_sigmoids(model):
    assert not observe(model, drawn()[0]).sigmoids


def test_a_model_that_fails_shows_nothing():
    def model(x: Tensor) -> Tensor:
        raise RuntimeError("only batches of 8")

    assert observe(model, drawn()[0]) == Behaviour()


# --- warnings of an attack -------------------------------------------------------------------------------------------


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


MESSAGES = {
    "random": (RANDOM["noise"], r"draws at random .* at least 8 of 10 fresh answers .* eot_samples"),
    "batch": (OF_THE_BATCH["batch norm"], r"batch norm without running statistics \('norm'\) uses those of the batch"),
    "mixed": (OF_THE_BATCH["centred by the batch"], "depends on the rest of its batch"),
    "probabilities": (lambda x: SMALL(x).softmax(1), "returns probabilities, not logits .* remove the final softmax"),
    "sigmoids": (SIGMOID, "seems to return sigmoids, not logits .* remove the final sigmoid"),
}


@pytest.mark.parametrize("kind", MESSAGES)
@pytest.mark.parametrize("make", [
    lambda m: PGD(m, steps=2),
    lambda m: OrthoSquare(m, queries=3),
    lambda m: AutoAttack(m, steps=1, targets=1, queries=2),
    lambda m: Bisection(PGD(m, steps=1), trials=3),
])  # fmt: skip
def test_what_an_attack_does_not_expect_is_warned_of_once_where_it_was_called(kind, make):
    model, message = MESSAGES[kind]
    images, labels = drawn()
    attack = make(model)
    with pytest.warns(UserWarning, match=message) as caught:
        attack.run(images, labels)
    assert [w.filename for w in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        attack.run(images[:1], labels[:1])


def test_a_single_image_is_enough_and_counts_and_bits_are_those_without_the_look(monkeypatch):
    images, labels = drawn(n=1)
    with pytest.warns(UserWarning, match="depends on the rest of its batch"):
        PGD(OF_THE_BATCH["batch norm"], steps=2).run(images, labels)
    found = PGD(SMALL, steps=3, generator=seeded()).run(images, labels)
    assert found.forward_calls.tolist() == [4]
    monkeypatch.setattr("orthattack.assumptions.observe", lambda *a: Behaviour())
    plain = PGD(SMALL, steps=3, generator=seeded()).run(images, labels)
    for name, value in vars(plain).items():
        assert torch.equal(value, getattr(found, name)), name


def test_a_model_is_looked_at_once_and_again_when_its_parts_change():
    asked: list[int] = []

    class Asked(Net):
        def forward(self, x: Tensor) -> Tensor:
            asked.append(len(x))
            return super().forward(x)

    model, (images, labels) = Asked(), drawn()
    attack = PGD(model, steps=1, random_start=False)
    attack.run(images, labels)
    first = len(asked)
    attack.run(images, labels)
    assert len(asked) - first == 2  # an attack of one step, and nothing else
    model.norm = nn.BatchNorm2d(8, track_running_stats=False)
    with pytest.warns(UserWarning, match="batch norm without running statistics"):
        attack.run(images, labels)


def test_a_module_does_not_remember_that_it_was_looked_at():
    recorder = Recorder(SMALL)
    PGD(recorder, steps=2)(*drawn())
    assert [len(x) for x in recorder.seen] == [6, 6, 6]


def test_a_buffer_that_a_module_writes_into_is_left_as_it_was():
    class Counting(Net):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x)

    model, images = Counting(), drawn()[0]
    observe(model, images, module=model)
    assert model.calls == 0


# --- models that draw ------------------------------------------------------------------------------------------------


class Drawing(nn.Module):
    """A trained model behind noise, as a randomised defence has it."""

    def __init__(self, model: nn.Module, size: float) -> None:
        super().__init__()
        self.model, self.size = model, size

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x + self.size * torch.randn_like(x))


@pytest.mark.parametrize(("make", "least"), [
    (lambda m: PGD(m, eps=2 / 255, steps=5, generator=seeded()), 1),
    (lambda m: OrthoPGD(m, eps=3 / 255, steps=5, early_stop=True, generator=seeded()), 1),
    pytest.param(lambda m: PGD(m, eps=3 / 255, steps=4, eot_samples=3, generator=seeded()), 1, marks=pytest.mark.slow),
    (lambda m: AutoAttack(m, eps=3 / 255, steps=3, targets=1, queries=5, generator=seeded()), 1),
    pytest.param(lambda m: Square(m, eps=16 / 255, queries=30, generator=seeded()), 0, marks=pytest.mark.slow),
    (lambda m: Bisection(PGD(m, eps=3 / 255, steps=3, generator=seeded()), trials=6), 4),
])  # fmt: skip
def test_what_is_reported_of_a_model_that_draws_holds(make, least):
    """Fooled in most of 40 draws that nobody has seen: at least 9 of 10 of what is reported."""
    model, images, labels = trained()
    drawing = Drawing(model, 0.04)
    attack = make(drawing)
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = attack.run(images, labels)
    torch.manual_seed(4)
    with torch.no_grad():
        share = torch.stack([drawing(result.adversarials).argmax(1) != labels for _ in range(40)]).float().mean(0)
    assert result.success.sum() >= least
    assert (share[result.success] > 0.5).float().mean().nan_to_num(1.0) >= 0.9


def test_a_coin_is_not_fooled():
    """Right and wrong alike: a single draw calls half of the images fooled, ten of which eight are wrong hardly any."""

    def coin(x: Tensor) -> Tensor:
        side = torch.randn(len(x)) + 1e-3 * x.mean((1, 2, 3))
        return torch.stack([side, -side], 1)

    images, labels = make_pairs(200)
    for attack in (PGD(coin, steps=3), Square(coin, queries=3), PGD(coin, steps=3, early_stop=True)):
        with pytest.warns(UserWarning, match="draws at random"):
            result = attack.run(images, labels)
        assert result.success.float().mean() < 0.12  # 0.055 by chance


@pytest.mark.parametrize("kind", ["random", "batch", "mixed"])
def test_fooled_warns_of_what_the_attacks_warn_of(kind):
    model, message = MESSAGES[kind]
    images, labels = drawn()
    before = torch.get_rng_state()
    with pytest.warns(UserWarning, match=message.removesuffix(" .* eot_samples")) as caught:
        fooled(model, images, labels)
    assert [w.filename for w in caught] == [__file__]
    assert "eot_samples" not in str(caught[0].message)  # there is no gradient to average
    assert torch.equal(torch.get_rng_state(), before)
    fooled(SMALL, images, labels)  # without a word
    fooled(model, images[:0], labels[:0])


def test_fooled_asks_a_model_that_draws_for_ten_fresh_answers():
    def coin(x: Tensor) -> Tensor:
        side = torch.randn(len(x)) + 1e-3 * x.mean((1, 2, 3))
        return torch.stack([side, -side], 1)

    images, labels = make_pairs(400)
    with pytest.warns(UserWarning, match="at least 8 of 10 fresh answers"):
        share = fooled(coin, images, labels, batch_size=100).float().mean()
    assert 0.02 < share < 0.1  # 56 of 1,024 by chance, where one answer would call half of them fooled
    model, images, labels = trained()
    drawing = Drawing(model, 0.04)
    with pytest.warns(UserWarning, match="draws at random"):
        missed = fooled(drawing, images, labels)
    assert missed.float().mean() < 0.5
    with pytest.warns(UserWarning, match="draws at random"):
        reached = fooled(drawing, images, labels, targeted=True)
    assert not (missed & reached).any()
    assert reached.float().mean() > 0.5


def make_pairs(n: int) -> tuple[Tensor, Tensor]:
    return torch.rand(n, 1, 2, 2, generator=seeded()), torch.zeros(n, dtype=torch.long)


# --- gradients that vanish -------------------------------------------------------------------------------------------


def quiet(run) -> AttackResult:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return run()


@pytest.mark.parametrize("scale", [1e4, 1e6, 1e-4, 1e-8, 1e-30])
@pytest.mark.parametrize("attack", [OrthoPGD, APGD])
def test_the_scale_of_the_logits_costs_no_strength(attack, scale):
    model, images, labels = trained()
    options = {"eps": 2 / 255, "steps": 5}
    margin = attack(model, loss="margin", generator=seeded(), **options).run(images, labels)
    scaled = quiet(
        lambda: attack(lambda x: scale * model(x), loss="ce", generator=seeded(), **options).run(images, labels)
    )
    assert margin.success.any()
    assert scaled.success.sum() >= margin.success.sum()
    assert (scaled.zero_gradients > 0).any() == (scale > 1)


def test_an_ensembles_mean_loss_climbs_the_margin_where_it_is_saturated():
    model, images, labels = trained()
    options = {"eps": 2 / 255, "steps": 5, "loss": Ensemble.mean_loss}
    margin = OrthoPGD(model, generator=seeded(), **{**options, "loss": "margin"}).run(images, labels)

    def scaled(scale: float) -> Ensemble:
        return Ensemble([Scaled(model, scale), Scaled(model, scale)], "loss")

    with pytest.warns(UserWarning, match="climbed the margin instead"):
        found = OrthoPGD(scaled(1e4), generator=seeded(), **options).run(images, labels)
    assert found.success.sum() >= margin.success.sum() > 0
    assert (found.zero_gradients > 0).any()
    plain = OrthoPGD(scaled(1.0), generator=seeded(), **options).run(images, labels)
    own = OrthoPGD(scaled(1.0), generator=seeded(), **{**options, "loss": _mean}).run(images, labels)
    assert torch.equal(plain.adversarials, own.adversarials)  # where nothing is saturated, nothing changes
    assert torch.equal(plain.loss, own.loss)


class Scaled(nn.Module):
    def __init__(self, model: nn.Module, scale: float) -> None:
        super().__init__()
        self.model, self.scale = model, scale

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * self.model(x)


def _mean(logits: Tensor, labels: Tensor) -> Tensor:
    return Ensemble.mean_loss(logits, labels)


def test_the_smallest_norm_is_found_whatever_the_scale():
    model, images, labels = trained()
    plain = Bisection(PGD(model, steps=3, loss="margin", generator=seeded()), trials=6).run(images, labels)
    attack = Bisection(PGD(lambda x: 1e4 * model(x), steps=3, loss="ce", generator=seeded()), trials=6)
    with pytest.warns(UserWarning, match="climbed the margin instead") as caught:
        large = attack.run(images, labels)
    assert len(caught) == 1
    assert large.success.all()
    assert large.norm.median() <= 1.2 * plain.norm.median()


def test_a_loss_of_ones_own_is_climbed_by_the_margin_where_it_is_flat_and_not_beyond_the_goal():
    model, (images, _) = linear_model(classes=3), drawn()
    labels = model(images).argmax(1)

    def hinge(
        logits: Tensor, labels: Tensor
    ) -> Tensor:  # flat while the label leads by more than 1e-3, and at the goal
        return orthattack.losses.margin(logits, labels).clamp(-1e-3, 1e-3)

    with pytest.warns(UserWarning, match="climbed the margin instead"):
        result = PGD(model, eps=0.5, alpha=0.05, steps=20, loss=hinge, random_start=False).run(images, labels)
    assert result.success.all()
    further = PGD(model, eps=0.5, alpha=0.05, steps=20, loss="margin", random_start=False).run(images, labels)
    with torch.no_grad():  # it stops where the loss does
        assert (orthattack.losses.margin(model(result.adversarials), labels) < 0.5 * further.loss).all()


def test_a_loss_without_a_gradient_is_the_losss_fault():
    with pytest.raises(ValueError, match="loss has no gradient with respect to the logits"):
        PGD(SMALL, loss=lambda logits, labels: logits.argmax(1).float())(*drawn())


def test_a_loss_of_kept_features_is_climbed():
    """Its gradient does not come by way of the logits."""
    kept: list[Tensor] = []

    def model(x: Tensor) -> Tensor:
        kept[:] = [x.flatten(1).mean(1)]
        return SMALL(x)

    images, labels = drawn()
    result = PGD(model, steps=3, eps=0.1, loss=lambda logits, labels: kept[0], random_start=False).run(images, labels)
    torch.testing.assert_close(result.adversarials, (images + 0.1).clamp(max=1))


# --- masked gradients ------------------------------------------------------------------------------------------------


def stairs(x: Tensor) -> Tensor:
    return trained()[0]((x * 32).round() / 32)


def partly(x: Tensor) -> Tensor:
    """No gradient for images whose first pixel is dark, NaN for those where it is bright."""
    model = trained()[0]
    first = x[:, :1, :1, :1]
    x = torch.where(first < 0.3, (x * 32).round() / 32, x)
    return model(x) + 0 * torch.where(first > 0.7, first - first.detach(), 1).abs().sqrt().flatten(1)


def images_for(first: list[float]) -> tuple[Tensor, Tensor]:
    images = trained()[1][: len(first)].clone()
    images[:, 0, 0, 0] = torch.tensor(first)
    with torch.no_grad():
        return images, trained()[0](images).argmax(1)


@pytest.mark.parametrize("attack", [PGD, OrthoAPGD])
def test_a_sample_without_a_gradient_is_unfooled_alone_or_not(attack):
    images, labels = images_for([0.1, 0.5, 0.9])
    options = {"eps": 1e-3, "steps": 3, "generator": seeded()}
    together = quiet(lambda: attack(partly, **options).run(images, labels, seeds=[1, 2, 3]))
    assert (together.zero_gradients > 0).tolist() == [True, False, True]
    for size in (1, 2):
        parts = quiet(lambda: attack(partly, **options).run(images, labels, seeds=[1, 2, 3], batch_size=size))  # noqa: B023
        assert torch.equal(parts.zero_gradients, together.zero_gradients)
    for k, clause in enumerate(["nothing could be climbed.*Square", None, "nothing could be climbed.*Square"]):
        one = attack(partly, **options)
        if clause is None:
            alone = one.run(images[k : k + 1], labels[k : k + 1], seeds=[k + 1])
        else:
            with pytest.warns(UserWarning, match=clause) as caught:
                alone = one.run(images[k : k + 1], labels[k : k + 1], seeds=[k + 1])
            assert len(caught) == 1
        assert int(alone.zero_gradients) == int(together.zero_gradients[k])
        assert bool(alone.success) == bool(together.success[k])
        torch.testing.assert_close(alone.adversarials[0], together.adversarials[k], rtol=0, atol=1e-6)
    with pytest.warns(UserWarning, match="2 of 3 images had no usable gradient") as caught:
        attack(partly, **options).run(images, labels)
    assert len(caught) == 1


@pytest.mark.heavy
@pytest.mark.parametrize("auto", [AutoAttack, OrthoAutoAttack])
@pytest.mark.parametrize("mask", ["stairs", "detached"])
def test_autoattack_goes_on_and_lets_the_squares_speak(auto, mask):
    _, images, labels = trained()
    model = stairs if mask == "stairs" else lambda x: trained()[0](x.detach())
    square = (Square if auto is AutoAttack else OrthoSquare)(model, eps=24 / 255, queries=60, generator=seeded())
    alone = square.run(images, labels)
    attack = auto(model, eps=24 / 255, steps=2, targets=1, queries=60, generator=seeded())
    with pytest.warns(UserWarning, match="nothing could be climbed.*Square") as caught:
        result = attack.run(images, labels)
    assert len(caught) == 1
    assert alone.success.any()
    assert result.success.sum() >= alone.success.sum() - 1
    with torch.no_grad():
        assert torch.equal(result.success, model(result.adversarials).argmax(1) != labels)
    if mask == "detached":
        with pytest.raises(ValueError, match=r"no gradient with respect to the images.*Square needs none"):
            PGD(model).run(images, labels)


def test_the_smallest_norm_keeps_what_it_found():
    images, labels = images_for([0.5, 0.1, 0.5, 0.9])
    labels[2] = (labels[2] + 1) % 10  # misclassified as it is
    attack = Bisection(PGD(partly, eps=4 / 255, steps=3, random_start=False), trials=6)
    with pytest.warns(UserWarning, match="2 of 4 images had no usable gradient") as caught:
        result = attack.run(images, labels)
    assert len(caught) == 1
    assert result.success.tolist() == [True, False, True, False]
    assert float(result.norm[2]) == 0
    for k in range(4):
        alone = quiet(lambda: attack.run(images[k : k + 1], labels[k : k + 1]))  # noqa: B023
        assert bool(alone.success) == bool(result.success[k])
        torch.testing.assert_close(alone.norm[0], result.norm[k], rtol=1e-2, atol=1e-6)


@pytest.mark.parametrize("what", ["raises", "nan", "-inf"])
def test_what_later_trials_meet_costs_nothing(what):
    model, (images, _) = linear_model(classes=3), drawn()
    labels = model(images).argmax(1)
    calls = 0

    def later(x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > 30 and what == "raises":
            raise RuntimeError("out of memory")
        return model(x) + (0 if calls <= 30 else {"nan": torch.nan, "-inf": MASK}.get(what, 0))

    attack = Bisection(PGD(later, eps=0.5, steps=5, random_start=False), trials=12)
    clause = {
        "raises": " of 12 failed, and what was found before it is kept: out of memory",
        "nan": "images at points that were tried: no success, and no sign of robustness",
    }.get(what)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = attack.run(images, labels)
    assert clause is None or any(clause in str(w.message) for w in caught)
    assert calls > 30
    assert result.success.all()
    assert not (model(result.adversarials).argmax(1) == labels).any()


@pytest.mark.parametrize("attack", [PGD, OrthoAPGD, Square, AutoAttack])
@pytest.mark.parametrize("what", [torch.nan, torch.inf])
def test_points_without_an_answer_are_told_of_once(attack, what):
    """A division that fails where the images are changed: no success there, and not silently so."""
    model, (images, _) = linear_model(classes=3), drawn()
    images = images * 0.5 + 0.25
    labels = model(images).argmax(1)

    def breaks(x: Tensor) -> Tensor:
        bad = torch.zeros(len(x)) if len(x) != 6 else (x - images).abs().amax((1, 2, 3)) > 0.02
        return model(x) + torch.where(bad, what, 0.0).unsqueeze(1)

    options = {"steps": 3} if attack in (PGD, OrthoAPGD) else {"queries": 4}
    if attack is AutoAttack:  # without FAB, which looks nearer, and finds some
        options["parts"] = ["apgd-ce", "apgd-t", "square"]
    one = attack(breaks, eps=0.1, generator=seeded(), **options)
    start = {"start": images} if attack is not AutoAttack else {}
    for told in (1, 0):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = one.run(images, labels, **start)
        assert not result.success.any()
        assert sum("NaN or infinite answers for 6 of 6 images" in str(w.message) for w in caught) == told


# --- detectors -------------------------------------------------------------------------------------------------------


def test_a_detector_that_draws_is_told_of_and_evading_it_is_confirmed():
    model, (images, _) = SMALL, drawn()
    labels = (model(images).argmax(1) + 1) % 5  # all misclassified: it is the detector that decides

    def score(x: Tensor) -> Tensor:
        return 0.01 * x.mean((1, 2, 3)) + torch.randn(len(x))  # seen by half of the draws, whatever the image

    attack = DetectorEvasion(model, score, eps=0.01, steps=12)
    with pytest.warns(UserWarning, match="the detector draws at random or keeps a state") as caught:
        result = attack.run(images, labels)
    assert "average them with eot_samples" in str(caught[0].message)
    assert (
        result.success.float().mean() <= 0.5
    )  # 8 of 10 have a chance of 1 in 18; any of 13 steps one of 8,191 in 8,192
    quiet_one = DetectorEvasion(model, lambda x: x.mean((1, 2, 3)), 2.0, eps=0.01, steps=2)
    assert quiet_one.run(images, labels).success.all()


def test_eot_samples_average_the_detectors_gradient():
    """Noise of ten times the slope: the mean of 100 draws points down it for 84 % of the pixels, one draw for 54 %."""
    images, labels = drawn(n=20)
    images = images.clamp(0.1, 0.9)
    labels = (SMALL(images).argmax(1) + 1) % 5  # fooled all along, so each step is the detector's

    def score(x: Tensor) -> Tensor:
        return (x * (1 + 10 * torch.randn_like(x))).mean((1, 2, 3))

    down = {}
    for samples in (1, 100):
        torch.manual_seed(0)
        attack = DetectorEvasion(
            SMALL, score, 2.0, eps=0.01, alpha=0.01, steps=1, mode="selective", eot_samples=samples
        )
        delta = quiet(lambda attack=attack: attack.run(images, labels)).adversarials - images
        down[samples] = float((delta < 0)[delta != 0].float().mean())
    assert down[1] == pytest.approx(0.54, abs=0.03)
    assert down[100] == pytest.approx(0.84, abs=0.03)


def test_a_detector_that_depends_on_the_batch_is_told_of():
    images, labels = drawn()

    def score(x: Tensor) -> Tensor:
        return (x - x.mean(0)).mean((1, 2, 3)) + 1

    with pytest.warns(UserWarning, match="the detector's answer to an image depends on the rest of its batch"):
        DetectorEvasion(SMALL, score, eps=0.01, steps=2).run(images, labels)

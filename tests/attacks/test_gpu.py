"""The paths for GPUs, with or without one (see `tests.pretend`): no step asks the device, and results are the same."""

from __future__ import annotations

import itertools
import re
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import orthattack
from orthattack import ThreatModel, attacks
from orthattack.attacks import Attack, AttackResult
from orthattack.threat import perturbation_norm
from tests.pretend import OnGpu, pretended, to_gpu

RADII = {"linf": 8 / 255, "l2": 1.0, "l1": 12.0}
CONSTRAINTS: dict[str, dict[str, Any]] = {
    "plain": {"scope": None},
    "image": {"scope": "image"},
    "channel": {"scope": "channel"},
    "pixel": {"scope": "pixel"},
    "block means": {"scope": "block4", "normal": "constant"},
    "luma": {"scope": "pixel", "normal": "luma"},
    "image and constant": {"scope": "image", "directions": ["constant"]},
    "channel means": {"scope": None, "directions": ["channel-constant"]},
}
Make = Callable[[nn.Module, int], Attack]
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
GRADIENT = ("PGD", "FGSM", "MIFGSM", "NIFGSM", "APGD")
SETTINGS: dict[str, dict[str, Any]] = {
    "gradient form": {"enforce": "gradient"},
    "bfloat16": {"precision": "bfloat16"},
    "optimize": {"optimize": "auto"},
    "margin": {"loss": "margin"},
    "targeted": {"targeted": True},
    "function": {"loss": lambda logits, labels: nn.functional.cross_entropy(logits, labels, reduction="none")},
    "restarts": {"restarts": 2},
    "momentum": {"momentum": 0.9, "nesterov": True},
    "eps per image": {"eps": torch.tensor([2.0, 4.0, 6.0, 8.0]) / 255},
    "tiny eps": {"eps": 1e-5},
}


def small_model(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = (nn.Conv2d(3, 8, 3, stride=2), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 25, 5))
    return nn.Sequential(*layers).eval()


def cases() -> list[Any]:
    made: list[tuple[str, Make]] = []
    for (norm, eps), (name, options) in itertools.product(RADII.items(), CONSTRAINTS.items()):
        made.append((f"PGD-{norm}-{name}", partial(_made, "PGD", norm=norm, eps=eps, **options)))
    for kind, ortho, norm in itertools.product(GRADIENT[1:], ("", "Ortho"), ("linf", "l2")):
        made.append((f"{ortho}{kind}-{norm}", partial(_made, ortho + kind, norm=norm, eps=RADII[norm])))
    for ortho, norm in itertools.product(("", "Ortho"), ("linf", "l2")):
        made.append((f"{ortho}Square-{norm}", partial(_made, f"{ortho}Square", norm=norm, eps=RADII[norm])))
    for norm, (name, options) in itertools.product(RADII, list(CONSTRAINTS.items())[:2]):
        made.append(
            (f"MinimumNorm-{norm}-{name}", partial(_made, "MinimumNorm", norm=norm, eps=RADII[norm], **options))
        )
    made += [(f"OrthoPGD-{name}", partial(_made, "OrthoPGD", **{"eps": 8 / 255, **o})) for name, o in SETTINGS.items()]
    made += [(f"detector-{norm}", partial(_evasion, norm=norm, eps=RADII[norm])) for norm in ("linf", "l2")]
    return [pytest.param(make, id=name.replace(" ", "-"), marks=marks_of(name)) for name, make in made]


def lane(norm: str = "", name: str = "") -> list[Any]:
    """L1 steps on many planes are too long for the fast lane: on a GPU each search is as long as the longest."""
    return [pytest.mark.slow] * (norm == "l1" and name != "plain")


def marks_of(name: str) -> list[Any]:
    """Those that are long and have shorter ones beside them are for the slow lane."""
    is_long = re.match(r"MinimumNorm-(l1|\w+-image)|PGD-l2-(image and constant|luma)", name)
    return [pytest.mark.slow] if is_long else lane(*name.split("-")[1:])


def _made(kind: str, model: nn.Module, steps: int, **options: Any) -> Attack:
    count = {} if kind in ("FGSM", "OrthoFGSM") else {"queries" if "Square" in kind else "steps": steps}
    count = {"gradients": 20 + 5 * steps} if kind == "MinimumNorm" else count
    attack: Attack = getattr(orthattack, kind)(model, **count, **options)
    return attack


def _evasion(model: nn.Module, steps: int, **options: Any) -> Attack:
    weight = next(model.parameters())
    detector = to_gpu(small_model(1)) if isinstance(weight, OnGpu) else small_model(1).to(weight.device)
    return orthattack.DetectorEvasion(model, lambda x: detector(x)[:, 0], steps=steps, **options)


def batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    images = torch.rand(4, 3, 12, 12)
    return images, small_model()(images).argmax(1)


def on_cpu(make: Make, steps: int) -> AttackResult:
    images, labels = batch()
    torch.manual_seed(1)
    return make(small_model(), steps).run(images, labels)


def on_pretended_gpu(make: Make, steps: int, monkeypatch: Any) -> tuple[Counter[tuple[str, str]], AttackResult]:
    """What a first call asks of a GPU, and its result."""
    images, labels = batch()
    torch.manual_seed(1)
    with pretended(monkeypatch) as mode:
        here = images.to("cuda"), labels.to("cuda")
        attack = make(to_gpu(small_model()), steps)
        mode.asked.clear()
        result = attack.run(*here)
        asked = Counter(mode.asked)
    for name, value in vars(result).items():
        assert isinstance(value, OnGpu), name
    return asked, AttackResult(**{name: value.as_subclass(Tensor) for name, value in vars(result).items()})


def on_gpu(make: Make, steps: int) -> tuple[Counter[tuple[str, str]], AttackResult]:
    """The same with a GPU, whose own debug mode says what waits."""
    images, labels = batch()
    torch.manual_seed(1)
    here = images.cuda(), labels.cuda()
    attack = make(small_model().cuda(), steps)
    attack.run(*here)  # the first call loads kernels
    torch.manual_seed(1)
    attack = make(small_model().cuda(), steps)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            result = attack.run(*here)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    asked = Counter((f"{w.filename}:{w.lineno}", "waits") for w in caught if "synchronizing" in str(w.message))
    return asked, AttackResult(**{name: value.cpu() for name, value in vars(result).items()})


@pytest.mark.parametrize("device", ["pretended", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("make", cases())
@pytest.mark.filterwarnings("ignore:.*CUDA is not available")
@pytest.mark.usefixtures("bfloat16")
def test_a_step_asks_a_gpu_nothing(make, device, monkeypatch):
    run = on_gpu if device == "cuda" else partial(on_pretended_gpu, monkeypatch=monkeypatch)
    few, _ = run(make, 1)
    many, found = run(make, 2)
    expected = on_cpu(make, 2)
    more = {line: count - few.get(line, 0) for line, count in many.items() if count != few.get(line, 0)}
    assert not more, "asked at each step"
    attack = make(small_model(), 2)
    models = 2 if isinstance(attack, orthattack.DetectorEvasion) else 1
    assert sum(many.values()) <= 10 + 3 * (models - 1), many
    assert found.cosine.max() <= 1e-6 or not attack.card.is_orthogonal or not attack.card.exact
    assert (found.norm <= torch.as_tensor(attack.eps, dtype=torch.float64) * (1 + 1e-6)).all()
    if attack.precision == "float32":  # claims in reduced precision are confirmed, and there are none without a GPU
        assert torch.equal(found.forward_calls, expected.forward_calls)
    # The searches for the multipliers are as long as they are whatever they find: the last digits differ.
    tolerance = 0.06 if attack.norm == "l1" else 0.02
    assert found.loss == pytest.approx(expected.loss, rel=tolerance, abs=tolerance)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("OrthoPGD", {"norm": "l2", "eps": 1.0, "random_start": True}),
        ("PGD", {"eps": torch.linspace(2, 8, 36) / 255}),
        ("Square", {"eps": 8 / 255}),
        ("MinimumNorm", {"norm": "l2"}),
    ],
)
def test_pieces_ask_a_gpu_nothing_at_a_step_either(kind, options, monkeypatch):
    images = batch()[0].repeat(9, 1, 1, 1)
    labels = small_model()(images).argmax(1)

    def run(steps: int, batch_size: int | None) -> tuple[Counter[tuple[str, str]], Tensor]:
        torch.manual_seed(1)
        with pretended(monkeypatch) as mode:
            here = images.to("cuda"), labels.to("cuda")
            attack = _made(kind, to_gpu(small_model()), steps, **options)
            mode.asked.clear()
            found = attack.run(*here, batch_size=batch_size).adversarials
            return Counter(mode.asked), found.as_subclass(Tensor)

    (few, _), (many, pieces), (once, whole) = run(1, 4), run(2, 4), run(2, None)  # 32 images and 4
    assert few == many
    # Each batch asks whether its first logits are finite, and a piece whether anything but the plane is in the way.
    assert sum(many.values()) <= sum(once.values()) + 9 + 3
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-5)


@needs_gpu
@pytest.mark.parametrize(("kind", "options"), [("OrthoPGD", {"alpha": 0.0}), ("Square", {})])
def test_pieces_give_what_one_call_gives_with_a_generator_on_a_gpu(kind, options):
    """Of OrthoPGD the random starts: a GPU's gradients differ with the batch's size, and a step by a whole α."""
    images = batch()[0].repeat(9, 1, 1, 1).cuda()
    model = small_model().cuda()
    labels = model(images).argmax(1)

    def found(batch_size: int | None) -> tuple[Tensor, Tensor]:
        generator = torch.Generator("cuda").manual_seed(3)
        attack = _made(kind, model, 3, eps=8 / 255, generator=generator, **options)
        return attack.run(images, labels, batch_size=batch_size).adversarials, generator.get_state()

    (pieces, state), (whole, state_of_whole) = found(2), found(None)
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-5)
    assert torch.equal(state, state_of_whole)


@pytest.mark.parametrize(
    ("norm", "name"), [pytest.param(n, c, marks=lane(n, c)) for n, c in itertools.product(RADII, CONSTRAINTS)]
)
def test_a_step_on_a_gpu_gains_as_much(norm, name, monkeypatch):
    torch.manual_seed(0)
    images, gradient = (torch.rand(3, 3, 12, 12) * 1.4 - 0.2).clamp(0, 1), torch.randn(3, 3, 12, 12)
    threat = ThreatModel(norm, RADII[norm], **{"scope": None, **CONSTRAINTS[name]})
    alpha = torch.full((3, 1, 1, 1), RADII[norm] / 4)

    def steps(images: Tensor, gradient: Tensor, alpha: Tensor) -> list[Tensor]:
        region = threat.around(images)
        points = [region.random_start(torch.Generator().manual_seed(0))]
        for k in range(4):
            points.append(region.step(points[-1], gradient.roll(k, 3), alpha))
        return points

    points = steps(images, gradient, alpha)
    with pretended(monkeypatch):
        on_gpu = steps(images.to("cuda"), gradient.to("cuda"), alpha.to("cuda"))
    found = [point.as_subclass(Tensor) for point in on_gpu]
    for y in found:
        delta = y.double() - images.double()
        assert (perturbation_norm(delta, norm) <= RADII[norm] * (1 + 1e-6)).all()
        assert not threat.is_orthogonal or threat.cosine(delta, images).max() <= 1e-6
    gains = [
        torch.stack(
            [((y - x) * gradient.roll(k, 3)).double().sum((1, 2, 3)) for k, (x, y) in enumerate(pairwise(path))]
        )
        for path in (points, found)
    ]
    assert (gains[1].sum(0) >= 0.995 * gains[0].sum(0)).all(), gains


def test_the_pretended_gpu_refuses_what_a_gpu_refuses_and_counts_what_stops_it(monkeypatch):
    with pretended(monkeypatch) as mode:
        a = torch.rand(3, device="cuda")
        assert isinstance(a * 2 + torch.zeros(3, device="cuda"), OnGpu)
        with pytest.raises(RuntimeError, match="on one device, found cuda:0 and cpu"):
            a + torch.rand(3)
        assert not mode.asked
        for ask in (
            lambda: bool((a > 0).all()), lambda: a.tolist(), lambda: a.cpu(), lambda: a[a > 0.5], lambda: a.nonzero(),
            lambda: torch.tensor(2.0, device="cuda"), lambda: torch.ones(3).to("cuda"), lambda: torch.equal(a, a),
            lambda: float(a[0]), lambda: torch.ones(3).to(a), lambda: torch.where(a > 0.5),
        ):  # fmt: skip
            mode.asked.clear()
            ask()
            assert sum(mode.asked.values()) == 1
    assert attacks.PGD is orthattack.PGD


@pytest.mark.parametrize(
    ("scope", "normal"),
    [("image", "image"), ("channel", "image"), ("image", "constant"), ("channel", "luma"), ("block8", "constant")],
)
def test_a_small_step_is_not_given_up_on_a_gpu(scope, normal, monkeypatch):
    """Where rounding has moved it off the plane, which it does to 8-bit images beside a small L2 radius."""
    generator = torch.Generator().manual_seed(0)
    images = (torch.rand(4, 3, 32, 32, generator=generator) * 255).round() / 255
    gradients = torch.randn(3, *images.shape, generator=generator)
    threat = ThreatModel("l2", 0.1, scope=scope, normal=normal)

    def stepped(x: Tensor, along: Tensor) -> Tensor:
        region, alpha = threat.around(x), torch.full_like(x[:, :1, :1, :1], 0.02)
        mode.asked.clear()
        points = x
        for g in along:
            points = region.step(points, g, alpha)
        return points

    with pretended(monkeypatch) as mode:
        found = stepped(images.to("cuda"), gradients.to("cuda")).as_subclass(Tensor)
        assert not mode.asked
    assert threat.cosine(found.double() - images.double(), images).max() <= 1e-6
    torch.testing.assert_close(found, stepped(images, gradients), rtol=0, atol=2e-4)
    assert (found - images).flatten(1).norm(dim=1).min() >= 0.03

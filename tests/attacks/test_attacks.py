from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import nn

from orthattack import FGSM, PGD, AttackResult, OrthoFGSM, OrthoPGD, alignment, orthogonalize
from orthattack.attacks.scoring import has_bfloat16
from tests.conftest import examples, image_kinds, make_images, scopes, seeds

pytestmark = pytest.mark.heavy

SIZE = (3, 6, 6)


def linear_model(seed: int = 0, classes: int = 2, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(SIZE), classes)).to(dtype)
    model[1].weight.data.mul_(scale)
    return model.eval()


def small_model(seed: int = 0) -> nn.Module:
    """Differentiable, not linear, and different for every sample."""
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8 * 16, 5)).eval()


def drawn(seed: int = 0, n: int = 6, kind: str = "8-bit") -> tuple[torch.Tensor, torch.Tensor]:
    labels = torch.randint(5, (n,), generator=torch.Generator().manual_seed(seed))
    return make_images(kind, (n, *SIZE), seed), labels


class Recorder(nn.Module):
    """Remembers every batch it sees."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.seen: list[torch.Tensor] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.seen.append(x.detach().clone())
        return self.model(x)


ALL = [FGSM, OrthoFGSM, PGD, OrthoPGD]


@pytest.mark.parametrize("attack", ALL)
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_tensors_in_tensors_out(attack, norm, dtype):
    model = small_model().to(dtype)
    images, labels = drawn()
    images = images.to(dtype)
    result = attack(model, norm=norm).run(images, labels)
    assert isinstance(result, AttackResult)
    assert result.adversarials.shape == images.shape
    assert result.adversarials.dtype == dtype
    assert not result.adversarials.requires_grad
    for name in ("success", "loss", "steps", "cosine", "norm", "zero_gradients", "forward_calls", "gradient_calls"):
        assert getattr(result, name).shape == labels.shape, name
    assert result.success.dtype == torch.bool
    assert type(attack(model)(images, labels)) is torch.Tensor


@pytest.mark.filterwarnings("ignore:the threat model leaves nothing but the image itself")  # white ones
@examples(25)
@given(image_kinds, scopes, seeds, st.sampled_from(["linf", "l2"]), st.sampled_from(["ce", "margin", "dlr"]))
def test_results_satisfy_every_constraint_and_report_what_they_are(image, scope, seed, norm, loss):
    model, (images, labels) = small_model(seed), drawn(seed, 4, image)
    eps = 8 / 255 if norm == "linf" else 0.5
    attack = OrthoPGD(model, norm=norm, eps=eps, scope=scope, steps=4, loss=loss)
    result = attack.run(images, labels)
    delta = result.adversarials.double() - images.double()
    assert result.adversarials.min() >= 0
    assert result.adversarials.max() <= 1
    flat = delta.flatten(1)
    size = flat.abs().amax(1) if norm == "linf" else flat.norm(dim=1)
    assert (size <= eps * (1 + 1e-6)).all()
    assert alignment(delta, images.double(), scope).abs().max() <= 1e-6
    assert alignment(delta, images.double()).abs().max() <= 1e-6
    torch.testing.assert_close(result.norm, size)
    torch.testing.assert_close(result.cosine, alignment(delta, images.double(), scope).abs().view(4, -1).amax(1))
    with torch.no_grad():
        logits = model(result.adversarials)
    assert torch.equal(result.success, logits.argmax(1) != labels)


@pytest.mark.parametrize("scope", ["image", "channel", "pixel"])
@pytest.mark.parametrize("kind", ["uniform", "8-bit", "saturated", "mixed"])
def test_the_step_reaches_the_optimum_of_a_linear_model(scope, kind):
    """A two-class linear model's margin is <w, x> + b, so the best perturbation is a linear program over delta."""
    model, (images, _) = linear_model(3, dtype=torch.float64), drawn(1, 3, kind)
    images = images.double()
    labels = model(images).argmax(1)
    eps = 8 / 255
    one = OrthoFGSM(model, eps=eps, scope=scope, loss="margin").run(images, labels)
    many = OrthoPGD(model, eps=eps, scope=scope, loss="margin", steps=40).run(images, labels)
    weight = (model[1].weight[1] - model[1].weight[0]).detach().numpy()
    with torch.no_grad():
        clean = model(images)
    for i in range(3):
        x, y = images[i].numpy(), int(labels[i])
        w = (weight if y == 0 else -weight).reshape(SIZE)
        lead = {"image": [np.s_[:]], "channel": [np.s_[c] for c in range(3)]}
        parts = lead.get(scope) or [np.s_[:, r, c] for r in range(6) for c in range(6)]
        best = 0.0
        for part in parts:
            xs, ws = x[part].ravel(), w[part].ravel()
            bounds = np.stack([np.maximum(-eps, -xs), np.minimum(eps, 1 - xs)], axis=1)
            best -= linprog(-ws, A_eq=xs[None], b_eq=[0.0], bounds=bounds, method="highs").fun
        expected = float(clean[i, 1 - y] - clean[i, y]) + best
        assert float(one.loss[i]) == pytest.approx(expected, abs=1e-6 * abs(best) + 1e-9)
        # Many small steps from a random start come close: a pixel near the tie may be on its way still.
        assert float(many.loss[i]) == pytest.approx(expected, abs=1e-3 * abs(best) + 1e-9)


@pytest.mark.filterwarnings("ignore:eps=5000 allows every image")
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.1), ("l2", 0.1), ("l1", 0.1), ("l1", 5.0), ("l1", 5000.0)])
@pytest.mark.parametrize(("single", "iterated"), [(FGSM, PGD), (OrthoFGSM, OrthoPGD)])
def test_fgsm_is_one_step_of_pgd_bit_for_bit(norm, eps, single, iterated):
    model, (images, labels) = small_model(), drawn(n=20)
    a = single(model, norm=norm, eps=eps).run(images, labels)
    b = iterated(model, norm=norm, eps=eps, alpha=eps, steps=1, random_start=False, loss="margin").run(images, labels)
    for name in ("adversarials", "success", "loss", "steps"):
        assert torch.equal(getattr(a, name), getattr(b, name))


def test_plain_fgsm_is_the_textbook_formula():
    model, (images, labels) = linear_model(classes=5), drawn()
    x = images.clone().requires_grad_()
    (g,) = torch.autograd.grad(nn.functional.cross_entropy(model(x), labels, reduction="sum"), x)
    expected = (images + 8 / 255 * g.sign()).clamp(0, 1)
    torch.testing.assert_close(FGSM(model, eps=8 / 255, loss="ce")(images, labels), expected, rtol=0, atol=1e-7)


@pytest.mark.parametrize("reference", ["clean", "iterate"])
@pytest.mark.parametrize("scope", ["image", "channel", "pixel"])
def test_the_gradient_form_is_pgd_with_projected_gradients(reference, scope):
    model, (images, labels) = small_model(), drawn()
    images, model = images.double(), model.double()
    eps, alpha, steps = 8 / 255, 2 / 255, 5
    x = images.clone()
    for _ in range(steps):
        leaf = x.clone().requires_grad_()
        (g,) = torch.autograd.grad(nn.functional.cross_entropy(model(leaf), labels, reduction="sum"), leaf)
        g = orthogonalize(g, images if reference == "clean" else x, scope)
        x = (x + alpha * g.sign()).clamp(images - eps, images + eps).clamp(0, 1)
    options = {"enforce": "gradient", "reference": reference, "scope": scope, "random_start": False}
    recorder = Recorder(model)
    OrthoPGD(recorder, eps=eps, alpha=alpha, steps=steps, loss="ce", **options)(images, labels)
    torch.testing.assert_close(recorder.seen[-1], x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("attack", [PGD, OrthoPGD])
def test_every_iterate_is_scored_once_and_the_best_is_returned(attack):
    model, (images, labels) = Recorder(small_model()), drawn(n=20)
    options = {"eps": 0.2, "alpha": 0.2, "steps": 6, "loss": "ce", "generator": torch.Generator().manual_seed(0)}
    result = attack(model, **options).run(images, labels)
    assert len(model.seen) == 7
    assert (result.forward_calls == 7).all()
    assert (result.gradient_calls == 6).all()
    with torch.no_grad():
        logits = torch.stack([model.model(x) for x in model.seen])
    loss = torch.stack([nn.functional.cross_entropy(z, labels, reduction="none") for z in logits])
    fooled = logits.argmax(2) != labels
    for i in range(20):
        allowed = fooled[:, i] if fooled[:, i].any() else torch.ones(7, dtype=torch.bool)
        best = 6 - int(torch.where(allowed, loss[:, i], -torch.inf).flip(0).argmax())  # the last of equals
        assert int(result.steps[i]) == best
        assert torch.equal(result.adversarials[i], model.seen[best][i])
        assert bool(result.success[i]) == bool(fooled[:, i].any())
        assert float(result.loss[i]) == pytest.approx(float(loss[best, i]), rel=1e-5, abs=1e-6)


def test_the_last_iterate_counts():
    """Only the last of the steps crosses the boundary: an attack that forgets to score it reports a failure."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(math.prod(SIZE), 2, bias=True))
    model[1].weight.data[0], model[1].weight.data[1] = -1.0, 1.0
    model[1].bias.data = torch.tensor([math.prod(SIZE) * (1.0 + 2 * 0.095), 0.0])  # the boundary: all pixels at 0.595
    result = PGD(model, eps=0.1, alpha=0.01, steps=10, random_start=False).run(
        torch.full((1, *SIZE), 0.5), torch.tensor([0])
    )
    assert bool(result.success[0])
    assert int(result.steps[0]) == 10


def test_an_overshooting_step_does_not_lose_the_clean_success():
    """The clean image is misclassified already and the step leads back: the first iterate is the answer."""

    def model(x: torch.Tensor) -> torch.Tensor:
        brightness = x.mean((1, 2, 3))
        return torch.stack([(brightness - 0.5) ** 2 * 100, torch.full_like(brightness, 0.1)], dim=1)

    images = torch.full((1, *SIZE), 0.49)
    result = PGD(model, eps=0.3, alpha=0.3, steps=1, random_start=False).run(images, torch.tensor([0]))
    assert bool(result.success[0])
    assert torch.equal(result.adversarials, images)


@pytest.mark.parametrize("attack", [PGD, OrthoPGD])
def test_early_stop_returns_the_first_that_fools_and_the_same_successes(attack):
    images, labels = drawn(n=40)
    full, early = Recorder(small_model()), Recorder(small_model())
    options = {"eps": 0.1, "alpha": 0.01, "steps": 12, "loss": "ce"}
    a = attack(full, **options, generator=torch.Generator().manual_seed(0)).run(images, labels)
    b = attack(early, **options, early_stop=True, generator=torch.Generator().manual_seed(0)).run(images, labels)
    with torch.no_grad():
        fooled = torch.stack([full.model(x).argmax(1) != labels for x in full.seen])
    assert 0 < int(b.success.sum()) < 40
    assert torch.equal(a.success, b.success)
    for i in range(40):
        if bool(b.success[i]):
            first = int(fooled[:, i].long().argmax())
            assert int(b.steps[i]) == first
            torch.testing.assert_close(b.adversarials[i], full.seen[first][i], rtol=0, atol=1e-5)
            assert int(b.forward_calls[i]) == first + 1
    assert sum(len(x) for x in early.seen) == int(b.forward_calls.sum())
    assert [len(x) for x in early.seen] == sorted((len(x) for x in early.seen), reverse=True)


def test_restarts_keep_the_best_of_each_sample():
    model, (images, labels) = small_model(), drawn(n=30)
    options = {"eps": 0.03, "steps": 3}
    # SplitMix64 adds this to its state with each output, and each restart draws once.
    seeds = [[seed + k * (0x9E3779B97F4A7C15 - 2**64) for seed in range(30)] for k in range(4)]
    seeds = [[(seed + 2**63) % 2**64 - 2**63 for seed in row] for row in seeds]
    singles = [OrthoPGD(model, **options).run(images, labels, seeds=row) for row in seeds]
    result = OrthoPGD(model, **options, restarts=4).run(images, labels, seeds=range(30))
    success = torch.stack([r.success for r in singles])
    loss = torch.stack([torch.where(r.success == success.any(0), r.loss, -torch.inf) for r in singles])
    assert torch.equal(result.success, success.any(0))
    torch.testing.assert_close(result.loss, loss.amax(0))
    assert (result.forward_calls == 16).all()
    early = OrthoPGD(model, **options, restarts=4, early_stop=True)
    assert torch.equal(early.run(images, labels, seeds=range(30)).success, result.success)


@pytest.mark.parametrize("attack", ALL)
def test_targeted_attacks_reach_their_targets(attack):
    model, (images, _) = linear_model(classes=5), drawn(n=20)
    with torch.no_grad():
        targets = model(images).topk(2).indices[:, 1]
    result = attack(model, eps=0.3, targeted=True).run(images, targets)
    with torch.no_grad():
        reached = model(result.adversarials).argmax(1) == targets
    assert torch.equal(result.success, reached)
    assert reached.float().mean() > 0.9
    gentle = attack(model, eps=1e-4, targeted=True).run(images, targets)
    assert gentle.success.float().mean() < 0.5


def test_a_run_repeats_bit_for_bit():
    model, (images, labels) = small_model(), drawn()

    def run(seed: int) -> torch.Tensor:
        return OrthoPGD(model, generator=torch.Generator().manual_seed(seed), restarts=2)(images, labels)

    assert torch.equal(run(5), run(5))
    assert not torch.equal(run(5), run(6))
    torch.manual_seed(11)
    state = torch.get_rng_state()
    first = OrthoPGD(model)(images, labels)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(11)
    attack = OrthoPGD(model)
    assert torch.equal(attack(images, labels), first)
    assert not torch.equal(attack(images, labels), first)  # the attack's own stream goes on


@pytest.mark.parametrize("attack", ALL)
@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_a_sample_does_not_depend_on_its_batch(attack, norm):
    model, (images, labels) = small_model().double(), drawn(n=8)
    images = images.double()
    options = {"random_start": False, "steps": 5} if attack in (PGD, OrthoPGD) else {}
    together = attack(model, norm=norm, eps=0.1, **options).run(images, labels)
    for i in range(8):
        alone = attack(model, norm=norm, eps=0.1, **options).run(images[i : i + 1], labels[i : i + 1])
        torch.testing.assert_close(alone.loss[0], together.loss[i], rtol=1e-6, atol=1e-9)
        assert bool(alone.success[0]) == bool(together.success[i])
        torch.testing.assert_close(alone.adversarials[0], together.adversarials[i], rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["black", "white", "constant", "saturated"])
@pytest.mark.parametrize("scope", ["image", "channel", "pixel"])
def test_degenerate_images_are_attacked_without_nan(kind, scope):
    model, (images, labels) = small_model(), drawn(0, 3, kind)
    for attack in (OrthoFGSM, OrthoPGD):
        result = attack(model, eps=8 / 255, scope=scope).run(images, labels)
        assert result.adversarials.isfinite().all()
        assert result.cosine.max() <= 1e-6
        if kind == "white":
            assert torch.equal(result.adversarials, images)
        if kind == "black":  # orthogonal to everything, so only the ball and the bounds bind
            assert result.norm.min() == pytest.approx(8 / 255, rel=1e-5)


def test_zero_gradients_are_counted_per_sample():
    """Red samples are on a plateau of the model, the others are not."""

    def model(x: torch.Tensor) -> torch.Tensor:
        flat = x.flatten(1).mean(1)
        value = torch.where(x[:, 0].mean((1, 2)) > 0.9, torch.zeros_like(flat), flat)
        return torch.stack([value, -value], dim=1)

    images = torch.full((3, *SIZE), 0.5)
    images[1, 0] = 1.0
    with pytest.warns(UserWarning, match="1 of 3 images had no usable gradient"):
        result = PGD(model, steps=4, random_start=False).run(images, torch.tensor([0, 0, 0]))
    assert result.zero_gradients.tolist() == [0, 4, 0]
    assert result.samples_with_zero_gradient == 1
    assert torch.equal(result.adversarials[1], images[1])


def test_a_saturated_loss_is_counted_not_an_error():
    """Logits far apart: the cross-entropy's gradient underflows, the model's does not."""
    model, (images, _) = linear_model(scale=1e6), drawn()
    labels = model(images).argmax(1)
    with pytest.warns(UserWarning, match="no usable gradient for 6 of 6 images .* climbed the margin instead"):
        result = PGD(model, steps=2, random_start=False, loss="ce").run(images, labels)
    assert result.samples_with_zero_gradient == len(images)
    assert PGD(model, steps=2, random_start=False).run(images, labels).samples_with_zero_gradient == 0


def test_confident_models_are_still_attacked_orthogonally():
    """Gradients of 1e-13, at which an absolute threshold stops projecting."""
    model, (images, _) = linear_model(scale=300.0, dtype=torch.float64), drawn()
    images = images.double()
    labels = model(images).argmax(1)
    x = images.clone().requires_grad_()
    (g,) = torch.autograd.grad(nn.functional.cross_entropy(model(x), labels, reduction="sum"), x)
    sizes = g.abs().amax((1, 2, 3))
    assert 0 < sizes.min() < 1e-13
    result = OrthoFGSM(model, eps=0.05, loss="ce").run(images, labels)
    assert result.cosine.max() <= 1e-6
    assert (result.norm > 0.049).all()


def test_non_finite_gradients_do_not_spread():
    def model(x: torch.Tensor) -> torch.Tensor:
        value = x.flatten(1).mean(1)
        root = (x[:, 0, 0, 0]).sqrt()  # infinite slope at zero
        return torch.stack([value + root, -value], dim=1)

    images = torch.full((2, *SIZE), 0.5)
    images[0, 0, 0, 0] = 0.0
    with pytest.warns(UserWarning, match="1 of 2 images had no usable gradient"):
        result = OrthoPGD(model, steps=3, random_start=False).run(images, torch.tensor([0, 0]))
    assert result.adversarials.isfinite().all()
    assert result.zero_gradients.tolist() == [3, 0]


def test_a_processor_without_bfloat16_computes_in_float32_and_says_so(monkeypatch):
    seen = []

    def model(x: torch.Tensor) -> torch.Tensor:
        seen.append(torch.is_autocast_enabled("cpu"))
        return network(x)

    network, (images, labels) = small_model(), drawn(n=2)
    attack = PGD(model, steps=1, precision="bfloat16", random_start=False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    with pytest.warns(UserWarning, match="computes in float32 here: this CPU has no arithmetic for bfloat16") as warned:
        found = attack(images, labels)
    assert [w.filename for w in warned] == [__file__]
    assert not any(seen)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(found, PGD(model, steps=1, random_start=False)(images, labels))
        attack(images, labels)
        assert not any(seen)
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False, raising=False)
        for has_amx in (False, True):
            monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda has=has_amx: has, raising=False)
            attack(images, labels)
            assert any(seen) == has_amx
        monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")  # an older torch does not say
        assert has_bfloat16(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda: False)
    assert not has_bfloat16(torch.device("cuda"))


@pytest.mark.parametrize("attack", [PGD, OrthoPGD])
@pytest.mark.usefixtures("bfloat16")
def test_reduced_precision_is_judged_in_full(attack):
    model, (images, labels) = small_model(), drawn(n=30)
    options = {"eps": 0.05, "steps": 5, "loss": "ce"}
    seeded = torch.Generator().manual_seed(0)
    result = attack(model, **options, precision="bfloat16", generator=seeded).run(images, labels)
    with torch.no_grad():
        logits = model(result.adversarials)
    assert torch.equal(result.success, logits.argmax(1) != labels)
    loss = torch.nn.functional.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(result.loss, loss, rtol=1e-5, atol=1e-6)  # bfloat16's is off by 1e-2
    full = attack(model, **options, generator=seeded.manual_seed(0)).run(images, labels)
    assert (result.success == full.success).float().mean() > 0.9
    assert (result.gradient_calls == 5).all()
    assert (result.forward_calls >= 6).all()
    if attack is OrthoPGD:
        assert result.cosine.max() <= 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models(dtype):
    model, (images, labels) = small_model().to(dtype), drawn()
    result = OrthoPGD(model, eps=16 / 255, steps=4).run(images.to(dtype), labels)
    assert result.adversarials.dtype == dtype
    assert result.norm.max() <= 16 / 255 * (1 + 1e-6)
    with torch.no_grad():
        assert torch.equal(result.success, model(result.adversarials).argmax(1) != labels)


def test_other_bounds_and_integer_labels():
    inner, (images, labels) = small_model(), drawn()
    result = OrthoPGD(lambda x: inner(x / 255), eps=8, bounds=(0, 255)).run(255 * images, labels.to(torch.uint8))
    assert result.adversarials.max() > 1
    assert result.norm.max() <= 8 * (1 + 1e-6)
    assert result.cosine.max() <= 1e-6


def test_an_empty_batch_is_an_empty_result():
    result = OrthoPGD(small_model()).run(torch.rand(0, *SIZE), torch.zeros(0, dtype=torch.long))
    assert result.adversarials.shape == (0, *SIZE)
    assert result.success.shape == result.cosine.shape == result.norm.shape == (0,)


def test_eps_zero_returns_the_images():
    images, labels = drawn()
    for attack in ALL:
        for norm in ("linf", "l2"):
            assert torch.equal(attack(small_model(), norm=norm, eps=0)(images, labels), images)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_denormal_pixels_are_those_of_the_caller_where_the_processor_takes_them_for_zero(norm):
    model, (images, labels) = small_model(), drawn()
    images[:, :, 2, 3] = torch.tensor([1e-40, 3e-39, 0.0])
    try:
        torch.set_flush_denormal(True)
        found = OrthoPGD(model, norm, eps=0.1, steps=3, scope="pixel")(images, labels)
    finally:
        torch.set_flush_denormal(False)
    assert torch.equal(found[:, :, 2, 3], images[:, :, 2, 3])
    assert alignment(found.double() - images.double(), images.double(), "pixel").abs().max() <= 1e-6


def test_round_off_beyond_the_bounds_is_clamped():
    images, labels = drawn()
    clean = images.clone()
    clean[0, :, 0, 0], clean[0, :, 1, 0] = 0.0, 1.0
    images[0, :, 0, 0], images[0, :, 1, 0] = -3e-8, 1 + 2.4e-7
    result = OrthoPGD(small_model(), random_start=False).run(images, labels)
    assert torch.equal(result.adversarials, OrthoPGD(small_model(), random_start=False)(clean, labels))
    assert result.adversarials.min() >= 0
    assert result.adversarials.max() <= 1


@pytest.mark.parametrize("strides", ["channels_last", "transposed", "expanded", "sliced"])
def test_memory_layout_does_not_matter(strides):
    images, labels = drawn(n=4)
    expected = OrthoPGD(small_model(), random_start=False)(images, labels)
    if strides == "expanded":
        images = images[:1].expand(4, -1, -1, -1)
        expected = OrthoPGD(small_model(), random_start=False)(images.contiguous(), labels)
    elif strides == "channels_last":
        images = images.to(memory_format=torch.channels_last)
    elif strides == "transposed":
        images = images.mT.contiguous().mT
    else:
        images = torch.stack([images, images], dim=-1)[..., 0]
    torch.testing.assert_close(OrthoPGD(small_model(), random_start=False)(images, labels), expected)


IMAGES, LABELS = torch.full((2, *SIZE), 0.5), torch.tensor([0, 1])
WRONG = IMAGES.clone()
WRONG[1, 0, 0, 0] = -2.12
BROKEN = IMAGES.clone()
BROKEN[1, 0, 0, 0] = float("nan")


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (WRONG, LABELS, r"in bounds \(0, 1\); found min -2.12, max 0.5 \(sample 1\): they look normalised; pass them"),
        (255 * IMAGES, LABELS, r"found min 127.5, max 127.5 \(sample 0\): they look 8-bit; divide them by 255"),
        (BROKEN, LABELS, r"images must be finite; found NaN or infinity \(sample 1\)"),
        (IMAGES[0], LABELS, r"images must have shape \(N, C, H, W\); got \(3, 6, 6\)"),
        ((255 * IMAGES).byte(), LABELS, "images must be floating point; got torch.uint8: divide 8-bit images by 255"),
        (IMAGES, LABELS[:1], r"labels must have shape \(2,\), one per image; got \(1,\)"),
        (IMAGES, LABELS[:, None], r"labels must have shape \(2,\), one per image; got \(2, 1\)"),
        (IMAGES, LABELS.float(), "labels must be integers; got torch.float32"),
        (IMAGES, LABELS + 4, r"labels must lie in \[0, 4\], the model has 5 classes; found 5 \(sample 1\)"),
        (IMAGES, LABELS - 1, r"labels must lie in \[0, 4\], the model has 5 classes; found -1 \(sample 0\)"),
        (IMAGES.numpy(), LABELS, "images must be a tensor; got ndarray: convert it"),
        (IMAGES, [0, 1], "labels must be a tensor; got list: convert it"),
        (IMAGES, LABELS.to("meta"), r"images \(cpu\) and labels \(meta\) must be on the same device"),
    ],
)
def test_bad_input_is_explained_and_nothing_is_changed(images, labels, message):
    model = small_model().train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        PGD(model)(images, labels)
    assert model.training
    assert all(p.requires_grad for p in model.parameters())
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda x: x.detach().flatten(1)[:, :3], "the model has no gradient with respect to the images"),
        (lambda x: torch.ones(len(x), 3, requires_grad=True), "the model has no gradient with respect to the images"),
        (lambda x: x, r"model must return logits of shape \(2, classes\); got \(2, 3, 6, 6\)"),
        (lambda x: x.flatten(1)[:1], r"model must return logits of shape \(2, classes\); got \(1, 108\)"),
        (lambda x: [x], r"model must return logits of shape \(2, classes\); got list"),
        (lambda x: x.flatten(1)[:, :3] / 0, r"model returned NaN or infinite logits \(sample 0\)"),
        (small_model().to("meta"), r"images \(cpu\) and model \(meta\) must be on the same device"),
    ],
)
def test_bad_models_are_explained(model, message):
    with pytest.raises(ValueError, match=message):
        OrthoPGD(model)(IMAGES, LABELS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"eps": -0.1}, "eps must be a finite number >= 0"),
        ({"alpha": -0.1}, "alpha must be a finite step size >= 0, in pixel units such as 2/255; got -0.1"),
        ({"steps": 0}, "steps must be an integer >= 1; got 0"),
        ({"steps": 2.5}, "steps must be an integer >= 1; got 2.5"),
        ({"restarts": 0}, "restarts must be an integer >= 1; got 0"),
        ({"restarts": 2, "random_start": False}, "restarts=2 needs random_start=True"),
        ({"norm": "l0"}, "norm must be one of 'linf', 'l2', 'l1'; got 'l0'"),
        (
            {"loss": "mse"},
            "loss must be one of 'ce', 'margin', 'dlr', 'scaled-ce', 'logit-difference', 'kl' or callable; got 'mse'",
        ),
        ({"scope": "row"}, "scope must be one of"),
        ({"enforce": "both"}, "enforce must be one of 'perturbation', 'gradient'; got 'both'"),
        ({"reference": "start"}, "reference must be one of 'clean', 'iterate'; got 'start'"),
        ({"reference": "iterate"}, 'reference="iterate" needs enforce="gradient"'),
        ({"precision": "float8"}, "precision must be one of 'float32', 'bfloat16'; got 'float8'"),
        ({"bounds": (1, 0)}, "bounds must be two finite numbers"),
    ],
)
def test_bad_options_are_explained(options, message):
    with pytest.raises(ValueError, match=message):
        OrthoPGD(small_model(), **options)


def test_a_model_must_be_callable():
    with pytest.raises(ValueError, match="model must be callable on a batch of images; got str"):
        PGD("resnet18")


def test_repr_shows_what_matters():
    assert repr(OrthoPGD(small_model(), eps=8 / 255, scope="pixel")) == (
        "OrthoPGD(norm='linf', eps=0.0313725, alpha=0.0627451, steps=10, schedule='linear', scope='pixel', "
        "enforce='perturbation')"
    )
    fixed = PGD(small_model(), norm="l2", eps=0.5, schedule="fixed")
    assert repr(fixed) == "PGD(norm='l2', eps=0.5, alpha=0.125, steps=10)"
    assert repr(PGD(small_model(), eps=0.5, alpha=0.25)) == "PGD(norm='linf', eps=0.5, alpha=0.25, steps=10)"

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linprog
from torch import Tensor

from orthattack import ThreatModel, alignment
from orthattack.projection import cut, scope_dims
from orthattack.threat import Region, perturbation_norm
from tests.conftest import examples, gradient_kinds, image_kinds, make_gradient, make_images, seeds

pytestmark = pytest.mark.heavy

threats = st.builds(
    ThreatModel,
    norm=st.sampled_from(["linf", "l2", "l1"]),
    eps=st.sampled_from([0.0, 1e-3, 0.5 / 255, 8 / 255, 0.5, 2.0]),
    bounds=st.just((0.0, 1.0)),
    scope=st.sampled_from([None, "image", "channel", "pixel"]),
)


def assert_inside(threat: ThreatModel, images: Tensor, points: Tensor) -> None:
    """All three constraints, recomputed in float64 from the tensors themselves."""
    assert points.shape == images.shape
    assert points.dtype == images.dtype
    low, high = threat.bounds
    delta = points.double() - images.double()
    assert points.isfinite().all()
    assert points.min() >= low
    assert points.max() <= high
    order = {"linf": np.inf, "l2": 2, "l1": 1}[threat.norm]
    norms = np.linalg.norm(delta.flatten(1), order, axis=1)
    assert (norms <= np.asarray(threat.eps) * (1 + 1e-6)).all()
    if threat.scope is not None:
        assert alignment(delta, images.double(), threat.scope).abs().max() <= 1e-6


@given(threats, image_kinds, gradient_kinds, seeds, st.sampled_from([1e-30, 1.0, 1e20]))
def test_start_and_steps_stay_inside(threat, image, gradient, seed, scale):
    images = make_images(image, (3, 3, 8, 8), seed)
    region = threat.around(images)
    points = region.random_start(torch.Generator().manual_seed(seed))
    assert_inside(threat, images, points)
    for k in range(3):
        points = region.step(points, make_gradient(gradient, images, seed + k, scale), threat.eps / 2)
        assert_inside(threat, images, points)


def make_dark(kind: str, seed: int) -> Tensor:
    """Images (2, 3, 8, 8) with values down to 1e-45, the smallest that float32 can hold."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.rand(2, 3, 8, 8, generator=generator, dtype=torch.float64)
    tiny = x * 10.0 ** torch.randint(-45, -30, x.shape, generator=generator).double()
    half = torch.rand(x.shape, generator=generator) < 0.5
    dark = {
        "all": tiny,
        "half": torch.where(half, tiny, x),
        "half of the colours": torch.where(half[:, :1], tiny, x),
        "one channel": torch.cat([x[:, :1], tiny[:, 1:2], 1e-15 * x[:, 2:]], 1),
        "or zero": torch.where(half, tiny, 0 * x),
        "all scales": x * 10.0 ** torch.randint(-45, 0, x.shape, generator=generator).double(),
    }
    return dark[kind].float()


@given(
    threats,
    st.sampled_from(["all", "half", "half of the colours", "one channel", "or zero", "all scales"]),
    seeds,
    st.booleans(),
)
def test_denormal_pixels_keep_every_promise(threat, kind, seed, flushed):
    """Also where the processor takes denormal numbers for zero; what is promised is measured where it does not."""
    images = make_dark(kind, seed)

    def measured(points):
        torch.set_flush_denormal(False)
        assert_inside(threat, images, points)
        torch.set_flush_denormal(flushed)

    try:
        torch.set_flush_denormal(flushed)
        region = threat.around(images)
        points = region.random_start(torch.Generator().manual_seed(seed))
        measured(points)
        for k in range(2):
            points = region.step(points, make_gradient("normal", images, seed + k), threat.eps / 2)
            measured(points)
        measured(region.project(images + make_gradient("normal", images, seed)))
        measured(region.select(torch.tensor([1, 0])).project(points)[[1, 0]])
    finally:
        torch.set_flush_denormal(False)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_colour_of_denormals_stays_and_the_others_are_perturbed(norm):
    images = make_images("uniform", (1, 3, 8, 8), 0)
    images[0, :, 2, 3] = torch.tensor([1e-40, 3e-39, 0.0])
    eps = {"linf": 8 / 255, "l2": 0.5, "l1": 5.0}[norm]
    points = ThreatModel(norm, eps, scope="pixel").around(images).step(images, make_gradient("normal", images, 0), eps)
    assert torch.equal(points[0, :, 2, 3], images[0, :, 2, 3])
    assert float(perturbation_norm(points.double() - images.double(), norm)) >= 0.9 * eps


@given(threats, image_kinds, seeds, st.floats(0, 3))
def test_projection_lands_inside_and_keeps_what_is_inside(threat, image, seed, spread):
    images = make_images(image, (2, 3, 8, 8), seed)
    region = threat.around(images)
    points = region.project(images + spread * make_gradient("normal", images, seed))
    assert_inside(threat, images, points)
    if threat.scope != "pixel":  # on a pixel's grid every repair is a small move
        torch.testing.assert_close(region.project(points), points, rtol=0, atol=1e-5 * max(threat.eps, 0.1))
    assert torch.equal(region.project(images), images)


@given(threats, image_kinds, seeds, st.floats(0, 1))
def test_projection_obeys_the_variational_inequality(threat, image, seed, spread):
    """<p - y, q - y> <= 0 for every q of the region: what makes y the nearest point."""
    images = make_images(image, (2, 3, 6, 6), seed, torch.float64)
    region = threat.around(images)
    p = images + spread * make_gradient("normal", images, seed)
    y = region.project(p)
    generator = torch.Generator().manual_seed(seed)
    others = [images, *(region.random_start(generator) for _ in range(5))]
    others += [region.step(y, make_gradient("normal", images, seed + k), threat.eps) for k in range(5)]
    for q in others:
        product = ((p - y) * (q - y)).flatten(1).sum(1)
        assert (product <= 2e-5 * (p - images).flatten(1).norm(dim=1) * max(threat.eps, 1e-6) * 10 + 1e-12).all()


@given(
    st.sampled_from(["linf", "l2", "l1"]),
    st.sampled_from([None, "image", "channel"]),
    st.lists(st.sampled_from(["constant", "channel-constant"]), min_size=1, max_size=2, unique=True),
    image_kinds,
    gradient_kinds,
    seeds,
)
def test_several_directions_hold_at_every_step(norm, scope, directions, image, gradient, seed):
    images = make_images(image, (2, 3, 8, 8), seed)
    eps = {"linf": 8 / 255, "l2": 0.5, "l1": 5.0}[norm]
    threat = ThreatModel(norm, eps, scope=scope, directions=tuple(directions))
    region = threat.around(images)
    points = region.random_start(torch.Generator().manual_seed(seed))
    for k in range(3):
        assert_inside(threat, images, points)
        delta = points.double() - images.double()
        vectors = [torch.ones_like(delta)] if "constant" in directions else []
        if "channel-constant" in directions:
            vectors += [torch.ones_like(delta) * torch.eye(3)[c].view(1, 3, 1, 1).double() for c in range(3)]
        for vector in vectors:
            assert alignment(delta, vector).abs().max() <= 1e-6
        assert threat.cosine(delta, images).max() <= 1e-6
        points = region.step(points, make_gradient(gradient, images, seed + k), eps / 2)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("scope", [None, "image"])
def test_each_sample_has_its_own_eps(norm, scope):
    images = make_images("8-bit", (4, 3, 8, 8), 0, torch.float64)
    eps = {"linf": 0.03, "l2": 0.5, "l1": 5.0}[norm] * torch.tensor([0.0, 0.2, 1.0, 3.0], dtype=torch.float64)
    points = images + make_gradient("normal", images, 0)
    together = ThreatModel(norm, eps, scope=scope).around(images).project(points)
    for i in range(4):
        part = slice(i, i + 1)
        alone = ThreatModel(norm, float(eps[i]), scope=scope).around(images[part]).project(points[part])
        torch.testing.assert_close(together[part], alone, rtol=0, atol=1e-9)


def l1_ball(p: np.ndarray, x: np.ndarray, eps: float) -> np.ndarray:
    """The projection onto the L1 ball around x, by sorting (Duchi et al. 2008)."""
    size = np.sort(np.abs(p - x))[::-1]
    if size.sum() <= eps:
        return p
    thresholds = (np.cumsum(size) - eps) / np.arange(1, len(size) + 1)
    mu = thresholds[np.nonzero(size > thresholds)[0][-1]]
    return x + np.sign(p - x) * np.maximum(np.abs(p - x) - mu, 0)


@pytest.mark.parametrize("scope", [None, "image", "pixel"])
@pytest.mark.parametrize("seed", range(4))
def test_l1_projection_agrees_with_dykstras_algorithm(seed, scope):
    images = make_images(
        "mixed", (1, 3, 1 if scope == "pixel" else 2, 1 if scope == "pixel" else 3), seed, torch.float64
    )
    p = images + make_gradient("normal", images, seed)
    result = ThreatModel("l1", 0.7, scope=scope).around(images).project(p).flatten().numpy()
    x = images.flatten().numpy()
    projections = [lambda y: np.clip(y, 0, 1), lambda y: l1_ball(y, x, 0.7)]
    if scope is not None:
        projections.append(lambda y: y - (y - x) @ x / max(x @ x, 1e-30) * x)
    expected = alternate(p.flatten().numpy(), projections)
    np.testing.assert_allclose(result, expected, atol=2e-5)


def best_l1_step(g: Tensor, x: Tensor, planes: np.ndarray, alpha: float, limit: float) -> tuple[float, float]:
    """The most that <g, s> can be for ‖s‖₁ <= alpha, |s| <= limit, s orthogonal to the planes, in the box, by scipy;
    and ‖s‖₁."""
    g, x = g.flatten().numpy(), x.flatten().numpy()
    size = np.abs(g).max()
    widths = np.concatenate([np.minimum(1 - x, limit), np.minimum(x, limit)])
    solved = linprog(
        -np.concatenate([g, -g]) / size,
        A_ub=np.ones((1, 2 * len(x))),
        b_ub=[alpha],
        A_eq=np.concatenate([planes, -planes], axis=1) if len(planes) else None,
        b_eq=np.zeros(len(planes)) if len(planes) else None,
        bounds=np.stack([0 * widths, widths], axis=1),
    )
    assert solved.status == 0, solved.message
    return -size * solved.fun, np.abs(solved.x[: len(x)] - solved.x[len(x) :]).sum()


def planes_of(x: Tensor, scope: str | None) -> np.ndarray:
    """The vectors of a scope, (K, n)."""
    count = x[0].numel()
    groups = {
        None: torch.zeros(0, count),
        "image": torch.ones(1, count),
        "channel": torch.eye(3).repeat_interleave(count // 3, 1),
        "pixel": torch.eye(count // 3).repeat(1, 3),
    }[scope]
    planes = (groups.double() * x.flatten()).numpy()
    return planes[np.abs(planes).sum(1) > 0]


@pytest.mark.parametrize("scope", [None, "image", "channel", "pixel"])
@pytest.mark.parametrize("kind", ["8-bit", "saturated", "mixed", "dark"])
@pytest.mark.parametrize("eps", [1.0, 8.0, 1000.0])
def test_the_l1_step_is_the_best_one_and_spends_its_radius_up_to_the_box(kind, scope, eps):
    """Against scipy: a hundredth of the pixels at least, and where they have no room for it, fewer with more each."""
    for seed in range(2):
        images = make_images(kind, (1, 3, 12, 12), seed, torch.float64)
        g = make_gradient("normal", images, seed)
        points = ThreatModel("l1", eps, scope=scope).around(images).step(images, g, eps)
        delta = points - images
        planes = planes_of(images, scope)
        best, used = best_l1_step(g, images, planes, eps, eps / 4)  # a hundredth of 432 pixels
        if scope is None:
            capacity = float(torch.where(g > 0, 1 - images, images).sum())
            assert float(delta.abs().sum()) == pytest.approx(min(eps, capacity), rel=1e-6)
        elif used < (1 - 1e-6) * eps:
            best, used = best_l1_step(g, images, planes, eps, 1.0)
        assert float((g * delta).sum()) == pytest.approx(best, rel=2e-4)


@pytest.mark.parametrize("directions", [("constant",), ("channel-constant",), (torch.arange(432.0).view(3, 12, 12),)])
@pytest.mark.parametrize("kind", ["8-bit", "saturated", "mixed", "dark"])
@pytest.mark.parametrize(("norm", "eps"), [("linf", 0.1), ("l1", 8.0)])
def test_a_step_on_a_plane_that_is_not_the_images_is_the_best_one(norm, eps, kind, directions):
    """With no more than one direction for each pixel, all else is as for the image's own, against scipy."""
    images = make_images(kind, (1, 3, 12, 12), 1, torch.float64)
    g = make_gradient("normal", images, 1)
    threat = ThreatModel(norm, eps, scope=None, directions=directions)
    delta = threat.around(images).step(images, g, eps) - images
    planes = threat._vectors(images)[0].flatten(1).numpy()
    assert np.abs(planes @ delta.flatten().numpy()).max() <= 1e-9 * np.abs(planes).sum()
    if norm == "linf":
        best, _ = best_l1_step(g, images, planes, 1e9, eps)
    else:
        best, used = best_l1_step(g, images, planes, eps, eps / 4)
        if used < (1 - 1e-6) * eps:
            best, _ = best_l1_step(g, images, planes, eps, 1.0)
    assert float((g * delta).sum()) == pytest.approx(best, rel=2e-4 if norm == "l1" else 1e-6)


def test_an_l1_step_of_few_pixels_with_room_takes_more_of_each():
    """3 of 432 pixels are neither white nor black, with room for 0.5 each; a hundredth of the pixels would take 0.3."""
    images = make_images("saturated", (1, 3, 12, 12), 1, torch.float64)
    images[0, :, 3, 4] = 0.5
    g = 2 * images - 1  # out of the box, but for those three
    g[0, :, 3, 4] = torch.tensor([1.0, -3.0, 2.0])
    points = ThreatModel("l1", 1.2, scope=None).around(images).step(images, g, 1.2)
    expected = torch.tensor([0.3, -0.5, 0.4], dtype=torch.float64)  # 0.3 each, then what is left by gain
    torch.testing.assert_close((points - images)[0, :, 3, 4], expected, rtol=0, atol=1e-9)
    assert float((points - images).abs().sum()) == pytest.approx(1.2)


@pytest.mark.parametrize("scope", [None, "image", "pixel"])
def test_a_tied_l1_step_is_shared(scope):
    """A gradient of one size on a grey image: no pixel goes before the others."""
    images = torch.full((1, 3, 12, 12), 0.5, dtype=torch.float64)
    g = torch.ones_like(images)
    g[:, 0] = -1
    g[:, 2] = 0
    points = ThreatModel("l1", 3.0, scope=scope).around(images).step(images, g, 3.0)
    expected = 3.0 / 288 * g
    torch.testing.assert_close(points - images, expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("eps", "message"),
    [
        ("8/255", "eps must be a finite number >= 0, in pixel units such as 8/255; got '8/255'"),
        (True, "eps must be a finite number >= 0"),
        ([0.1, 0.2], r"eps must be a number, or a tensor with one per sample; got a list: use torch.tensor\(eps\) for"),
        (torch.tensor([0.1, -0.1]), "eps must be a finite number >= 0"),
        (torch.tensor([[0.1]]), r"eps must be a number or one per sample, \(N,\); got shape \(1, 1\)"),
        (torch.tensor([0.1, 0.2, 0.3]), "eps has 3 values for 2 images"),
    ],
)
def test_wrong_radii_are_explained(eps, message):
    with pytest.raises(ValueError, match=message):
        ThreatModel("linf", eps).around(torch.rand(2, 3, 4, 4))


@pytest.mark.parametrize(
    "direction", [torch.rand(3, 4), torch.rand(5, 3, 4, 5), lambda x: x[:1, 0], torch.full((3, 4, 4), torch.nan)]
)
def test_wrong_directions_are_explained(direction):
    with pytest.raises(ValueError, match="a direction must"):
        ThreatModel("linf", 0.1, directions=(direction,)).around(torch.rand(2, 3, 4, 4))


def dykstra(p: np.ndarray, x: np.ndarray, eps: float, rounds: int = 20_000) -> np.ndarray:
    """The projection of p onto box, plane and ball by Dykstra's alternating projections (1983): slow, and unrelated."""
    projections = [
        lambda y: np.clip(y, 0, 1),
        lambda y: y - (y - x) @ x / (x @ x) * x,
        lambda y: x + (y - x) * min(1, eps / np.linalg.norm(y - x)),
    ]
    return alternate(p, projections, rounds)


def alternate(p: np.ndarray, projections: list, rounds: int = 20_000) -> np.ndarray:
    corrections = [np.zeros_like(p) for _ in projections]
    y = p
    for _ in range(rounds):
        for k, project in enumerate(projections):
            z = y + corrections[k]
            y = project(z)
            corrections[k] = z - y
    return y


@pytest.mark.parametrize("seed", range(8))
def test_l2_projection_agrees_with_dykstras_algorithm(seed):
    images = make_images("mixed", (1, 3, 2, 3), seed, torch.float64)
    p = images + make_gradient("normal", images, seed)
    result = ThreatModel("l2", 0.3).around(images).project(p).flatten().numpy()
    expected = dykstra(p.flatten().numpy(), images.flatten().numpy(), 0.3)
    np.testing.assert_allclose(result, expected, atol=2e-5)


@pytest.mark.parametrize("bounds", [(0.0, 255.0), (-1.0, 1.0), (-2.0, 3.0)])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("scope", [None, "image", "channel", "pixel"])
def test_other_bounds(bounds, norm, scope):
    low, high = bounds
    images = low + (high - low) * make_images("mixed", (2, 3, 8, 8), 0)
    threat = ThreatModel(norm, (high - low) * (8 / 255 if norm == "linf" else 0.5), bounds, scope)
    region = threat.around(images)
    points = region.random_start(torch.Generator().manual_seed(0))
    for k in range(3):
        assert_inside(threat, images, points)
        points = region.step(points, make_gradient("normal", images, k), threat.eps / 4)
    assert_inside(threat, images, points)
    assert (points - images).abs().max() > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("scope", [None, "image"])
def test_half_precision_keeps_bounds_and_ball(dtype, norm, scope):
    images = make_images("uniform", (2, 3, 32, 32), 0, dtype)
    threat = ThreatModel(norm, 8 / 255 if norm == "linf" else 1.0, scope=scope)
    region = threat.around(images)
    points = region.random_start(torch.Generator().manual_seed(0))
    for k in range(4):
        points = region.step(points, make_gradient("normal", images, k), threat.eps / 2)
        assert points.dtype == dtype
        assert points.min() >= 0
        assert points.max() <= 1
        delta = points.double() - images.double()
        assert perturbation_norm(delta, norm).max() <= threat.eps * (1 + 1e-6)
        if scope is not None:
            assert alignment(delta, images.double()).abs().max() <= 2e-2
    assert delta.abs().mean() > 0.2 * threat.eps / (1 if norm == "linf" else 55)


HALF = {  # docs/attacks/threat-models.md: the largest |cos| by norm
    torch.float16: {"linf": 5e-4, "l2": 4e-3, "l1": 1e-2},
    torch.bfloat16: {"linf": 2e-3, "l2": 2e-2, "l1": 8e-2},
}


@pytest.mark.parametrize("bounds", [(0.0, 1.0), (-1.0, 1.0), (0.0, 255.0)])
@pytest.mark.parametrize("scope", ["image", "channel"])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_orthogonal_as_the_documentation_says(dtype, norm, scope, bounds):
    width = bounds[1] - bounds[0]
    images = (bounds[0] + width * make_images("8-bit", (4, 3, 32, 32), 0)).to(dtype)
    threat = ThreatModel(norm, {"linf": 8 / 255, "l2": 0.5, "l1": 12.0}[norm] * width, bounds, scope)
    region = threat.around(images)
    points = region.random_start(torch.Generator().manual_seed(0))
    for k in range(3):
        points = region.step(
            points, torch.randn(images.shape, generator=torch.Generator().manual_seed(k)), threat.eps / 4
        )
        cosine = threat.cosine(points.double() - images.double(), images.double()).max()
        assert cosine <= HALF[dtype][norm]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_a_pixels_colour_in_half_precision_is_refused(dtype, norm):
    images = make_images("uniform", (2, 3, 8, 8), 0, dtype)
    with pytest.raises(
        ValueError, match=f'scope="pixel" needs images of float32 or float64; got {dtype}.*images.float'
    ):
        ThreatModel(norm, 0.1, scope="pixel").around(images)
    ThreatModel(norm, 0.1, scope=None).around(images)


def test_float64_is_orthogonal_to_float64():
    images = make_images("8-bit", (2, 3, 32, 32), 0, torch.float64)
    for scope in ("image", "channel", "pixel"):
        region = ThreatModel("linf", 8 / 255, scope=scope).around(images)
        points = region.step(images, make_gradient("normal", images, 0), 8 / 255)
        assert alignment(points - images, images, scope).abs().max() <= 1e-12


@given(image_kinds, gradient_kinds, seeds)
def test_the_plain_linf_step_is_the_sign_step(image, gradient, seed):
    images = make_images(image, (2, 3, 8, 8), seed, torch.float64)
    g = make_gradient(gradient, images, seed)
    points = ThreatModel("linf", 0.1, scope=None).around(images).step(images, g, 0.1)
    torch.testing.assert_close(points, (images + 0.1 * g.sign()).clamp(0, 1), rtol=0, atol=1e-15)


@given(seeds, gradient_kinds)
def test_the_l2_step_in_the_open_is_the_normalised_projection(seed, gradient):
    """Where no bound is near, the best step has a closed form."""
    images = 0.4 + 0.2 * make_images("uniform", (2, 3, 8, 8), seed, torch.float64)
    g = make_gradient(gradient, images, seed)
    points = ThreatModel("l2", 0.3).around(images).step(images, g, 0.2)
    flat, x = g.flatten(1), images.flatten(1)
    projected = flat - (flat * x).sum(1, keepdim=True) / (x * x).sum(1, keepdim=True) * x
    length = projected.norm(dim=1, keepdim=True)
    expected = torch.where(length > 1e-12 * flat.norm(dim=1, keepdim=True), 0.2 * projected / length, 0)
    torch.testing.assert_close((points - images).flatten(1), expected, rtol=0, atol=1e-6)


@examples(12)  # of sixty steps each
@given(seeds, st.sampled_from(["linf", "l2"]), st.sampled_from([None, "image", "pixel"]))
def test_steps_gain_until_the_optimum_of_a_linear_loss(seed, norm, scope):
    """On a linear loss the ascent is monotone and ends where no feasible point is better."""
    images = make_images("8-bit", (1, 3, 6, 6), seed, torch.float64)
    g = make_gradient("normal", images, seed)
    eps = 0.1 if norm == "linf" else 0.5
    region = ThreatModel(norm, eps, scope=scope).around(images)
    values, points = [], images
    for _ in range(60):
        points = region.step(points, g, eps / 4)
        values.append(float((g * points).sum()))
    assert (np.diff(values) >= -1e-6 * float(g.norm())).all()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(20):
        other = region.random_start(generator)
        assert float((g * other).sum()) <= values[-1] + 1e-6 * float(g.norm())


@pytest.mark.parametrize(("norm", "eps"), [("linf", 1 / 255), ("l2", 0.05), ("l1", 0.5)])
@pytest.mark.parametrize("kind", ["8-bit", "mixed"])
def test_many_directions_beside_a_small_perturbation_leave_it_something(kind, norm, eps):
    """Also where many pixels are at a bound: settling finds others to move."""
    images = make_images(kind, (6, 3, 32, 32), 3)
    basis = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    directions = ["constant", "channel-constant", basis, lambda x: x.flip(3)]
    threat = ThreatModel(norm, eps, scope="channel", directions=directions)
    region = threat.around(images)
    for seed in range(4):
        points = region.step(images, make_gradient("normal", images, seed), eps / 2)
        assert_inside(threat, images, points)
        assert threat.cosine(points.double() - images.double(), images).max() <= 1e-6
        assert (perturbation_norm(points - images, norm) >= 0.2 * eps).all()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("scope", [None, "image", "channel", "pixel"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shrinking_pulls_straight_towards_the_image(norm, scope, dtype):
    """Where nothing is clipped: the perturbation keeps its direction and has the smaller radius, or what it had."""
    images = make_images("8-bit", (3, 3, 12, 12), 5, dtype)
    eps = {"linf": 0.1, "l2": 0.6, "l1": 6.0}[norm]
    large = ThreatModel(norm, eps, scope=scope)
    points = large.around(images).random_start(torch.Generator().manual_seed(1))
    delta = points.double() - images.double()
    size = perturbation_norm(delta, norm)
    radii = size * torch.tensor([0.3, 1.0, 2.0], dtype=torch.float64)
    small = ThreatModel(norm, radii, scope=scope)
    shrunk = small.around(images).shrunk(points)
    moved = shrunk.double() - images.double()
    unit = 1e-5 if dtype == torch.float32 else 1e-12  # three pixels have a grid to be repaired on
    if scope == "pixel" and norm == "l1" and dtype == torch.float32:
        unit = 3e-4  # a colour may be given up for that
    torch.testing.assert_close(moved[0], 0.3 * delta[0], rtol=0, atol=unit * float(size[0]))
    torch.testing.assert_close(moved[1:], delta[1:], rtol=0, atol=unit * float(size.max()))
    assert_inside(small, images, shrunk)


@given(image_kinds, seeds, st.sampled_from(["linf", "l2", "l1"]), st.sampled_from([None, "image", "channel", "pixel"]))
def test_shrinking_ends_in_the_smaller_region_and_stays_there(image, seed, norm, scope):
    """From the larger region, from outside of both, and again from where it ended."""
    images = make_images(image, (2, 3, 8, 8), seed)
    eps = {"linf": 8 / 255, "l2": 0.4, "l1": 3.0}[norm]
    small = ThreatModel(norm, eps, scope=scope)
    region = small.around(images)
    inside = ThreatModel(norm, 4 * eps, scope=scope).around(images).random_start(torch.Generator().manual_seed(seed))
    outside = images + 3 * eps * make_gradient("normal", images, seed)
    for points in (inside, outside, images):
        once = region.shrunk(points)
        assert_inside(small, images, once)
        torch.testing.assert_close(region.shrunk(once), once, rtol=0, atol=1e-6 * max(1, eps))
    assert torch.equal(once, images)


def test_random_starts_fill_the_ball_and_repeat():
    images = make_images("uniform", (4, 3, 32, 32), 0)
    for threat in (ThreatModel("linf", 8 / 255), ThreatModel("l2", 1.0), ThreatModel("linf", 8 / 255, scope=None)):
        region = threat.around(images)
        first = region.random_start(torch.Generator().manual_seed(3))
        assert torch.equal(first, region.random_start(torch.Generator().manual_seed(3)))
        assert not torch.equal(first, region.random_start(torch.Generator().manual_seed(4)))
        assert (perturbation_norm(first - images, threat.norm) >= 0.9 * threat.eps).all()
    spread = (ThreatModel("linf", 0.1, scope=None).around(images * 0 + 0.5).random_start() - 0.5).flatten()
    assert abs(float(spread.mean())) < 0.003
    assert float(spread.std()) == pytest.approx(0.1 / 3**0.5, rel=0.03)  # uniform


def test_a_ball_whose_edge_is_a_number_of_the_dtype_reaches_to_it():
    images = torch.full((1, 3, 4, 4), 0.5)
    region = ThreatModel("linf", 0.25, scope=None).around(images)
    assert set(region.project(torch.rand(1, 3, 4, 4).round()).unique().tolist()) == {0.25, 0.75}


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("scope", [None, "image"])
def test_random_starts_are_uniform_in_a_small_ball(norm, scope):
    """Of three numbers, so that the volume within a radius shows; in the open, where no bound clips."""
    images = torch.full((4000, 3, 1, 1), 0.5, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    delta = (ThreatModel(norm, 0.1, scope=scope).around(images).random_start(generator) - images).flatten(1) / 0.1
    size = perturbation_norm(delta.view(-1, 3, 1, 1), norm)
    assert float(size.mean()) == pytest.approx(3 / 4, abs=0.01)
    assert float((size < 0.5).double().mean()) == pytest.approx(1 / 8, abs=0.015)
    assert float(size.max()) <= 1
    assert (delta.mean(0).abs() <= 0.02).all()
    spread = delta.square().mean(0)
    torch.testing.assert_close(spread, spread.mean().expand(3), rtol=0.06, atol=0)
    if scope is None:  # of the uniform distribution in the ball: 1/5, and for L1 2/20
        assert float(spread.mean()) == pytest.approx(1 / 5 if norm == "l2" else 1 / 10, rel=0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_random_number_at_the_end_of_its_range_does_not_spoil_a_start(dtype):
    """Of 0, one in 2^24 in float32, the L1 norm's direction would be infinite, and the start the image itself."""
    images = torch.full((2, 3, 4, 4), 0.5, dtype=dtype)

    def draw(shape, draws, dtype):
        drawn = draws(shape, generator=torch.Generator().manual_seed(0), dtype=dtype)
        drawn[0, 0, 0, 0] = 0 if shape[1] > 1 else drawn[0, 0, 0, 0]
        return drawn

    start = ThreatModel("l1", 0.4).around(images).random_start(draw)
    assert (start - images).abs().sum((1, 2, 3)).min() > 0.3
    assert (start != images).all()


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_with_a_generator_each_a_start_does_not_depend_on_the_others(norm):
    images = make_images("uniform", (3, 3, 6, 6), 0)
    region = ThreatModel(norm, 0.3).around(images)

    def generators(seeds):
        return [torch.Generator().manual_seed(seed) for seed in seeds]

    together = region.random_start(generators([1, 2, 3]))
    for k in range(3):
        index = torch.tensor([k])
        torch.testing.assert_close(region.select(index).random_start(generators([k + 1])), together[index])
    assert not torch.equal(together[:1], region.random_start(generators([2, 2, 3]))[:1])


def test_directions_in_whatever_form_they_come():
    images = make_images("uniform", (2, 3, 4, 4), 0)
    one, two = torch.rand(2, 3, 4, 4, generator=torch.Generator().manual_seed(1))

    def vectors(*directions, scope=None):
        return ThreatModel("linf", 0.1, scope=scope, directions=directions)._vectors(images)

    both = torch.stack([one, two]).expand(2, -1, -1, -1, -1)
    for form in ((one, two), (torch.stack([one, two]),), (lambda x: torch.stack([one, two])[None],),
                 (lambda x: one.expand(len(x), -1, -1, -1), two.double()), (both,)):  # fmt: skip
        assert torch.equal(vectors(*form), both)
    assert torch.equal(vectors(lambda x: x.flip(3)), images.flip(3)[:, None])
    assert torch.equal(vectors("constant"), torch.ones(2, 1, 3, 4, 4))
    channels = torch.zeros(2, 3, 3, 4, 4)
    for c in range(3):
        channels[:, c, c] = 1
    assert torch.equal(vectors("channel-constant"), channels)
    assert torch.equal(vectors("constant", scope="image"), torch.stack([images, torch.ones_like(images)], 1))
    assert torch.equal(vectors(one, scope="channel"), torch.cat([images[:, None] * channels, both[:, :1]], 1))


def test_the_cosine_is_the_largest_of_all_that_should_be_zero():
    x = torch.full((1, 3, 2, 2), 0.5)
    delta = torch.zeros(1, 3, 2, 2)
    delta[0, 0, 0, 0], delta[0, 1, 0, 0] = 0.3, -0.1
    length = 0.1**0.5
    with_image = 0.2 / (length * 12**0.5)
    assert ThreatModel("linf", 1, scope="image").cosine(delta, x).tolist() == pytest.approx([with_image])
    assert ThreatModel("linf", 1, scope=None).cosine(delta, x).tolist() == pytest.approx([with_image])
    assert ThreatModel("linf", 1, scope="channel").cosine(delta, x).tolist() == pytest.approx([0.5])
    assert ThreatModel("linf", 1, scope="pixel").cosine(delta, x).tolist() == pytest.approx([0.2 / (length * 3**0.5)])
    first = torch.zeros(3, 2, 2)
    first[1, 0, 0] = 5
    for scope in (None, "image"):
        threat = ThreatModel("linf", 1, scope=scope, directions=(first, "constant"))
        assert threat.cosine(delta, x).tolist() == pytest.approx([0.1 / length])
    assert ThreatModel("linf", 1, scope=None, directions=("constant",)).cosine(delta, x).tolist() == pytest.approx(
        [with_image]
    )
    assert ThreatModel("linf", 1).cosine(delta, x).dtype == torch.float64


@pytest.mark.parametrize(
    ("options", "is_orthogonal"),
    [({"scope": None}, False), ({}, True), ({"scope": "pixel"}, True),
     ({"scope": None, "directions": ["constant"]}, True)],
)  # fmt: skip
def test_what_is_orthogonal(options, is_orthogonal):
    threat = ThreatModel("linf", 0.1, **options)
    assert threat.is_orthogonal == is_orthogonal
    x = make_images("uniform", (2, 3, 4, 4), 0)
    g = make_gradient("normal", x, 0)
    assert torch.equal(threat.tangent(g, x), g) != is_orthogonal
    assert (threat.cosine(threat.tangent(g, x), x).abs().max() <= 1e-6) == is_orthogonal


def test_a_black_pixel_may_be_a_negative_zero():
    images = make_images("mixed", (1, 3, 8, 8), 0, torch.float64)
    g = make_gradient("normal", images, 0)
    negative = torch.where(images == 0, -0.0, images)
    for scope in ("image", "pixel"):
        threat = ThreatModel("linf", 0.1, scope=scope)
        assert torch.equal(threat.around(negative).step(negative, g, 0.1), threat.around(images).step(images, g, 0.1))


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("scope", [None, "image", "channel"])
@pytest.mark.parametrize("directions", [(), ("constant",)])
def test_a_step_avoids_a_direction(norm, scope, directions):
    """In the open, where the projection after it moves nothing."""
    images = 0.4 + 0.2 * make_images("uniform", (2, 3, 8, 8), 0, torch.float64)
    eps, alpha = {"linf": (0.1, 0.01), "l2": (0.5, 0.05), "l1": (5.0, 0.05)}[norm]
    region = ThreatModel(norm, eps, scope=scope, directions=directions).around(images)
    start = region.project(images + 0.1 * alpha * make_gradient("normal", images, 1))
    g, avoid = make_gradient("normal", images, 2), make_gradient("normal", images, 3)
    moved = region.step(start, g, alpha, avoid=avoid) - start
    assert ((g * moved).flatten(1).sum(1) > 0).all()
    if norm != "l1":  # of which the few pixels that move are chosen after
        assert alignment(moved, avoid).abs().max() <= 1e-6
        assert alignment(region.step(start, g, alpha) - start, avoid).abs().min() > 1e-4
    limit = {"linf": alpha, "l2": alpha, "l1": 3 * alpha}[norm]
    assert (perturbation_norm(moved, norm) <= limit * (1 + 1e-6)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_linf_ball_of_a_coarse_grid_is_inside_the_ball(dtype):
    """Its ends are numbers of the dtype within eps, and the next ones would be outside."""
    images = make_images("uniform", (2, 3, 16, 16), 0, dtype)
    for eps in (8 / 255, 0.01):
        region = ThreatModel("linf", eps, scope=None).around(images)
        for sign in (1, -1):
            points = region.step(images, torch.full_like(images, sign), 1.0)
            reach = sign * (points.double() - images.double())
            assert reach.max() <= eps
            free = (points > 0) & (points < 1)
            beyond = torch.nextafter(points, torch.full_like(points, sign * torch.inf))
            assert ((sign * (beyond.double() - images.double()))[free] > eps).all()


def test_selected_rows_are_the_same_region():
    images = make_images("uniform", (4, 3, 8, 8), 0)
    region = ThreatModel("linf", 8 / 255).around(images)
    g = make_gradient("normal", images, 0)
    index = torch.tensor([2, 0])
    part = region.select(index)
    assert isinstance(part, Region)
    torch.testing.assert_close(part.step(images[index], g[index], 0.01), region.step(images, g, 0.01)[index])


def test_memory_layout_does_not_matter():
    images = make_images("uniform", (2, 3, 8, 8), 0)
    g = make_gradient("normal", images, 0)
    expected = ThreatModel("linf", 8 / 255).around(images).step(images, g, 0.01)
    last = torch.channels_last
    strided = images.to(memory_format=last)
    result = ThreatModel("linf", 8 / 255).around(strided).step(strided, g.to(memory_format=last), 0.01)
    assert torch.equal(result, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "l3"}, "norm must be one of 'linf', 'l2', 'l1', 'l0'; got 'l3'"),
        ({"eps": -0.1}, "eps must be a finite number >= 0, in pixel units such as 8/255; got -0.1"),
        ({"eps": float("nan")}, "eps must be a finite number"),
        ({"bounds": (1, 0)}, r"bounds must be two finite numbers \(low, high\) with low < high; got \(1, 0\)"),
        ({"scope": "row"}, "scope must be one of 'image', 'channel', 'pixel', or .*'block8'; got 'row'"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        ThreatModel(**{"norm": "linf", "eps": 0.1, **options})


@pytest.mark.parametrize("scope", ["image", "channel", "pixel"])
@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("eps", [1e-7, 1e-6, 1e-5])
def test_a_tiny_ball_is_orthogonal_as_stored(norm, scope, eps):
    """There the dtype's grid is coarse beside the perturbation."""
    for seed in range(3):
        x = make_images("8-bit", (2, 3, 16, 16), seed)
        region = ThreatModel(norm, eps, scope=scope).around(x)
        points = region.random_start(torch.Generator().manual_seed(seed))
        for step in range(3):
            delta = points.double() - x.double()
            assert alignment(delta, x.double(), scope).abs().max() <= 1e-6
            assert perturbation_norm(delta, norm).max() <= eps * (1 + 1e-6)
            points = region.step(points, make_gradient("normal", x, step), eps / 2)


@pytest.mark.parametrize(("norm", "eps", "alpha"), [("linf", 4 / 255, 1 / 255), ("l2", 2.0, 0.5)])
def test_a_large_image_steps_alike_alone_and_in_a_batch_on_several_threads(norm, eps, alpha):
    """torch shares the sum over one large image among threads, but not those over several, in another order."""
    generator = torch.Generator().manual_seed(0)
    images, gradient = torch.rand(2, 4, 3, 224, 224, generator=generator).unbind()

    def step(part: slice) -> torch.Tensor:
        region = ThreatModel(norm, eps).around(images[part])
        return region.step(images[part].clone(), gradient[part], alpha)

    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = step(slice(None))
        for k in range(len(images)):
            assert torch.equal(step(slice(k, k + 1))[0], together[k])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize(
    "more", [{"scope": None}, {"scope": "image"}, {"scope": "block2"}, {"scope": "image", "directions": ["constant"]}]
)
def test_a_resized_region_is_the_one_of_these_radii(norm, more):
    torch.manual_seed(0)
    images, gradient = torch.rand(3, 3, 6, 6), torch.randn(3, 3, 6, 6)
    eps = torch.tensor([0.01, 0.1, 0.7], dtype=torch.float64)
    resized = ThreatModel(norm, 1e30, **more).around(images).resized(eps)
    anew = ThreatModel(norm, eps, **more).around(images)
    for region in (resized, anew):
        found = region.step(images, gradient, 0.5 * eps.view(-1, 1, 1, 1).float())
        torch.testing.assert_close(found, anew.step(images, gradient, 0.5 * eps.view(-1, 1, 1, 1).float()))
        torch.testing.assert_close(region.project(images + gradient), anew.project(images + gradient))
        assert (perturbation_norm((found - images).double(), norm) <= eps * (1 + 1e-6)).all()


@pytest.mark.parametrize("norm", ["l2", "l1"])
@pytest.mark.parametrize("scope", ["pixel", "block8"])
def test_what_rounding_puts_beyond_the_ball_costs_the_smallest_groups(norm, scope):
    """Of many; where one of them is not small, the point stays."""
    images = make_images("uniform", (3, 3, 64, 64), 1)
    eps = {"l2": 1.0, "l1": 30.0}[norm]
    threat = ThreatModel(norm, eps, scope=scope)
    found = threat.around(images).project(images + 0.1 * make_gradient("normal", images, 2))
    assert_inside(threat, images, found)
    delta = (found - images).double()
    size = perturbation_norm(delta, norm)
    assert (size >= eps * (1 - 1e-3)).all()
    less = size * torch.tensor([1 - 1e-6, 1 - 2e-4, 0.5], dtype=torch.float64)
    back = ThreatModel(norm, less, scope=scope).around(images)._put_back(found, size.view(-1, 1, 1, 1))
    assert torch.equal(back[2], found[2])
    left = perturbation_norm((back - images).double(), norm)
    parts = cut(delta, scope).abs().sum(scope_dims(scope)).flatten(1)
    gone = cut(back != found, scope).any(scope_dims(scope)[0]).flatten(2 if scope != "pixel" else 1)
    gone = gone.any(2) if scope != "pixel" else gone
    for k in range(2):
        if scope == "pixel" or gone[k].any():
            assert 0 < int(gone[k].sum()) < 0.2 * parts.shape[1]
            assert less[k] * (1 - 1e-3) <= left[k] <= less[k]
        changed = back[k] != found[k]
        assert torch.equal(back[k][changed], images[k][changed])
    if norm == "l1":  # those that stay are no smaller
        for of, part in zip(gone, parts, strict=True):
            assert not of.any() or part[of].max() <= part[~of & (part > 0)].min()

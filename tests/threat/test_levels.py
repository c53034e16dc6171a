"""The grid of stored images: what is promised there holds for integers, exactly."""

from __future__ import annotations

import foolbox
import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from scipy.optimize import Bounds, LinearConstraint, milp
from torchvision.transforms.functional import to_tensor

from orthattack import ThreatModel
from orthattack.projection import cut, scope_dims
from orthattack.threat.levels import grid_units, level_values, levels_of
from tests.conftest import examples, seeds

pytestmark = pytest.mark.heavy

RADII = {"linf": 4 / 255, "l2": 0.3, "l1": 5.0}
KINDS = ["uniform", "black", "white", "constant", "two values", "few dark values", "ramp"]


def integers(kind: str, shape: tuple[int, ...], levels: int, seed: int) -> torch.Tensor:
    """Images as numbers of levels."""
    generator = torch.Generator().manual_seed(seed)
    top = levels - 1
    drawn = torch.randint(0, levels, shape, generator=generator)
    if kind == "two values":
        return torch.where(drawn > top // 2, top, 0)
    if kind == "few dark values":
        return drawn % min(levels, 5)
    if kind == "ramp":
        return torch.linspace(0, top, shape[-1]).round().long().expand(shape).contiguous()
    constant = {"black": 0, "white": top, "constant": top // 3}.get(kind)
    return drawn if constant is None else torch.full(shape, constant)


def samples(count: int) -> torch.Tensor:
    """Foolbox's images, 224×224."""
    model = foolbox.PyTorchModel(torch.nn.Identity().eval(), bounds=(0, 1))
    images, _ = foolbox.samples(model, "imagenet", batchsize=count, data_format="channels_first")
    return (images * 255).round() / 255


def assert_exact(threat: ThreatModel, k: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """All that is promised, as integers; returns the perturbation."""
    (low, high), top = threat.bounds, threat.levels - 1
    kept = ((points.double() - low) * (top / (high - low))).round().long()
    assert kept.min() >= 0
    assert kept.max() <= top
    assert torch.equal(level_values(threat.levels, threat.bounds, points)[kept], points)
    d = kept - k
    radius, flat = threat.eps * top / (high - low) * (1 + 1e-6), d.flatten(1)
    size = {"linf": flat.abs().amax(1), "l2": flat.square().sum(1), "l1": flat.abs().sum(1)}[threat.norm]
    assert (size <= (radius**2 if threat.norm == "l2" else radius)).all()
    if threat.scope is not None:
        shift, scale = grid_units(threat.levels, threat.bounds)
        luma = torch.tensor([299, 587, 114]).view(1, 3, 1, 1)
        n = scale * k + shift if threat.normal == "image" else luma if threat.normal == "luma" else 1
        product = cut(d * n, threat.scope)
        assert (product.sum(scope_dims(threat.scope)) == 0).all()
    if "constant" in threat.directions:
        assert (d.flatten(1).sum(1) == 0).all()
    if "channel-constant" in threat.directions:
        assert (d.flatten(2).sum(2) == 0).all()
    return d


@given(
    st.sampled_from(KINDS),
    st.sampled_from([(3, 3, 8, 8), (2, 1, 5, 7), (2, 3, 1, 1), (1, 1, 1, 2)]),
    st.sampled_from(list(RADII)),
    st.sampled_from([0.0, 0.3, 1.0, 8.0]),
    st.sampled_from(
        [
            (None, "image"),
            ("image", "image"),
            ("channel", "image"),
            ("image", "constant"),
            ("channel", "constant"),
            ("block2", "image"),
            ("block4", "constant"),
            ("pixel", "constant"),
            ("image", "luma"),
            ("block4", "luma"),
            ("channel", "luma"),
        ]
    ),
    st.sampled_from([(), ("constant",), ("channel-constant",)]),
    st.sampled_from([(256, (0.0, 1.0)), (256, (0.0, 255.0)), (256, (-1.0, 1.0)), (2, (0.0, 1.0)), (17, (0.0, 1.0))]),
    seeds,
)
def test_what_is_stored_keeps_every_promise_as_integers(kind, shape, norm, factor, what, directions, form, seed):
    (levels, bounds), (scope, normal) = form, what
    if "block" in (scope or "") or scope == "pixel" or normal == "luma":
        directions = ()
    assume(normal != "luma" or shape[1] == 3)
    assume("block" not in (scope or "") or shape[-1] == 8)
    k = integers(kind, shape, levels, seed)
    images = level_values(levels, bounds, torch.empty(0))[k]
    eps = RADII[norm] * factor * (bounds[1] - bounds[0])
    threat = ThreatModel(norm, eps, bounds, scope, directions, normal, levels)
    region, generator = threat.around(images), torch.Generator().manual_seed(seed)
    points = region.random_start(generator)
    assert torch.equal(region.stored(images), images)
    for _ in range(2):
        assert_exact(threat, k, region.stored(points))
        points = region.step(points, torch.randn(shape, generator=generator), eps / 2)
    stored = region.stored(points)
    d = assert_exact(threat, k, stored)
    assert torch.equal(region.stored(stored), stored)  # what is on the grid and keeps all that stays
    assert_exact(threat, k, region.stored(images + torch.randn(shape, generator=generator)))  # from anywhere
    norms, cosines = threat.sizes(images, stored)
    order = {"linf": np.inf, "l2": 2, "l1": 1}[norm]
    unit = (bounds[1] - bounds[0]) / (levels - 1)
    np.testing.assert_allclose(norms, np.linalg.norm(d.flatten(1).double().numpy(), order, axis=1) * unit, rtol=1e-12)
    if scope is not None or directions:
        assert (cosines == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_the_levels_are_the_floats_of_an_image_file(dtype):
    """To the bit, so that a PNG read back is what was judged."""
    every = np.arange(256, dtype=np.uint8).reshape(16, 16, 1)
    if dtype == torch.float32:
        assert torch.equal(level_values(256, (0, 1), torch.empty(0)), to_tensor(every).flatten())
    values = level_values(256, (0, 1), torch.empty(0, dtype=dtype))
    assert torch.equal(values, torch.arange(256).to(dtype) / 255)
    assert torch.equal(levels_of(values, 256, (0, 1)).double(), torch.arange(256).double())
    images = values[torch.randint(0, 256, (2, 3, 8, 8))]
    threat = ThreatModel("linf", 4 / 255, levels=256)
    region = threat.around(images)
    stored = region.stored(region.random_start())
    assert stored.dtype == dtype
    assert_exact(threat, levels_of(images, 256, (0, 1)).long(), stored)


@given(seeds, st.sampled_from([None, "sums"]))
@examples(15)
def test_the_repair_is_near_the_best_there_is(seed, sums):
    """The nearest integers to a target, Σ|d - v| by `milp`; what rounding alone costs is a lower bound of it."""
    shape, generator = (1, 1, 6, 6), torch.Generator().manual_seed(seed)
    k = torch.randint(20, 236, shape, generator=generator)
    images = k / 255
    threat = ThreatModel("linf", 4 / 255, directions=("constant",) if sums else (), levels=256)
    region = threat.around(images)
    points = region.random_start(generator)
    v = ((points.double() - images.double()) * 255).flatten().numpy()
    d = assert_exact(threat, k, region.stored(points)).flatten().numpy()
    n, m = k.flatten().numpy(), len(v)
    # Minimise Σ t with t >= ±(d - v).
    rows = [np.concatenate([n, np.zeros(m)])] + ([np.concatenate([np.ones(m), np.zeros(m)])] if sums else [])
    eye = np.eye(m)
    best = milp(
        np.concatenate([np.zeros(m), np.ones(m)]),
        integrality=np.concatenate([np.ones(m), np.zeros(m)]),
        bounds=Bounds(np.concatenate([np.full(m, -4), np.zeros(m)]), np.concatenate([np.full(m, 4), np.full(m, 9)])),
        constraints=[
            LinearConstraint(np.array(rows), 0, 0),
            LinearConstraint(np.hstack([eye, -eye]), -np.inf, v),
            LinearConstraint(np.hstack([-eye, -eye]), -np.inf, -v),
        ],
        options={"time_limit": 20, "mip_rel_gap": 0.02},
    )
    assert best.x is not None
    assert np.abs(d - v).sum() <= best.fun + 6  # a few pixels by a level each


def test_a_perturbation_smaller_than_half_a_level_is_not_lost():
    """L2 at 0.5 is a third of a level at each of 150,000 pixels: the largest tenth become 1, and the ball is filled.

    Of integers of that norm none gains more than they do, two thirds of what real numbers gain along a normal gradient.
    """
    k = torch.randint(0, 256, (1, 3, 224, 224), generator=torch.Generator().manual_seed(0))
    images = k / 255
    for scope in (None, "image"):
        threat = ThreatModel("l2", 0.5, scope=scope, levels=256)
        region = threat.around(images)
        gradient = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
        d = assert_exact(threat, k, region.stored(region.step(images, gradient, 0.5)))
        assert d.double().norm() > 0.97 * 0.5 * 255
        best = gradient.abs().flatten().topk(int((0.5 * 255) ** 2)).values.sum()
        assert float((d * gradient).sum()) > 0.97 * float(best)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scope", "normal", "least"),
    [
        ("image", "image", 0.97),
        ("channel", "image", 0.97),
        ("block8", "image", 0.8),
        ("block8", "constant", 0.97),
        ("pixel", "constant", 0.7),
    ],
)
def test_what_is_lost_on_real_images_is_little(scope, normal, least):
    """A random step of 4/255 on Foolbox's images: as much gain, but for a share, as in real numbers."""
    images = samples(4)
    k = (images * 255).round().long()
    gradient = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    threat = ThreatModel("linf", 4 / 255, scope=scope, normal=normal, levels=256)
    region = threat.around(images)
    best = region.step(images, gradient, 4 / 255)
    d = assert_exact(threat, k, region.stored(best))
    gain, ideal = ((t * gradient).flatten(1).sum(1) for t in (d / 255, best - images))
    assert (gain > least * ideal).all()


@pytest.mark.parametrize(
    ("norm", "scope", "directions"),
    [
        # In the fast lane every norm and every kind of planes.
        pytest.param(norm, scope, directions, marks=[pytest.mark.slow] * ((j + k) % 3 > 0))
        for j, norm in enumerate(RADII)
        for k, (scope, directions) in enumerate(
            [("image", ()), ("channel", ()), ("image", ("constant",)), ("image", ("channel-constant",))]
        )
    ],
)
def test_the_fixed_trials_of_a_gpu_are_as_exact_and_lose_no_image(monkeypatch, norm, scope, directions):
    """There nothing is asked of the values; here the same is done without asking."""
    images = samples(4)
    k = (images * 255).round().long()
    gradient = torch.randn(images.shape, generator=torch.Generator().manual_seed(0))
    eps = {"linf": 4 / 255, "l2": 1.0, "l1": 30.0}[norm]
    threat = ThreatModel(norm, eps, scope=scope, directions=directions, levels=256)
    region = threat.around(images)
    points = region.step(region.random_start(torch.Generator().manual_seed(0)), gradient, eps)
    gains = []
    for asking in (True, False):
        monkeypatch.setattr("orthattack.threat.levels.asks", lambda tensor, asking=asking: asking)
        d = assert_exact(threat, k, region.stored(points))
        gains.append((d * gradient).flatten(1).sum(1))
    assert (gains[0] > 0).all()
    torch.testing.assert_close(gains[1], gains[0], rtol=0.02, atol=0)


def test_no_small_integers_leave_luma():
    """Why levels refuses it for each pixel: all d up to 15 are tried."""
    d = torch.cartesian_prod(*[torch.arange(-15, 16)] * 3)
    kept = d[(d @ torch.tensor([299, 587, 114]) == 0) & (d != 0).any(1)]
    assert sorted(kept.tolist()) == [[-15, 9, -7], [15, -9, 7]]


@pytest.mark.parametrize("norm", list(RADII))
@pytest.mark.parametrize("scope", ["image", "block8"])
def test_mean_luma_is_left_and_little_is_lost(norm, scope):
    images = samples(4)
    k = (images * 255).round().long()
    gradient = torch.randn(images.shape, generator=torch.Generator().manual_seed(1))
    eps = {"linf": 2 / 255, "l2": 2.0, "l1": 100.0}[norm]
    threat = ThreatModel(norm, eps, scope=scope, normal="luma", levels=256)
    free = ThreatModel(norm, eps, scope=None, levels=256)
    gains = []
    for model in (threat, free):
        region = model.around(images)
        d = assert_exact(model, k, region.stored(region.step(images, gradient, eps)))
        gains.append((d * gradient).flatten(1).sum(1))
    assert (gains[0] > 0.9 * gains[1]).all()


def test_few_colours_have_small_integers():
    """Why levels refuses scope "pixel": all d are tried, for 20,000 colours of Foolbox's images."""
    images = samples(20)
    generator = torch.Generator().manual_seed(0)
    colours = (images * 255).round().movedim(1, -1).reshape(-1, 3)
    colours = colours[torch.randperm(len(colours), generator=generator)[:20000]]
    gradient = torch.randn(colours.shape, generator=generator)
    for radius, share, gain in ((1, 0.07, 0.04), (2, 0.14, 0.06), (4, 0.31, 0.13)):
        d = torch.cartesian_prod(*[torch.arange(-radius, radius + 1.0)] * 3)
        some, best = 0, 0.0
        for part, g in zip(colours.split(2000), gradient.split(2000), strict=True):
            moved = part[:, None] + d
            allowed = (part @ d.T == 0) & (moved.amin(2) >= 0) & (moved.amax(2) <= 255)
            some += int((allowed.sum(1) > 1).sum())
            best += float(torch.where(allowed, g @ d.T, 0).amax(1).sum())
        assert some / len(colours) == pytest.approx(share, abs=0.01)
        assert best / float(gradient.abs().sum() * radius) == pytest.approx(gain, abs=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"levels": 1}, "levels must be an integer from 2 to 65536, such as 256 for 8 bits; got 1"),
        ({"levels": 255.5}, "levels must be an integer from 2 to 65536"),
        ({"levels": 256, "scope": "pixel"}, 'levels cannot be combined with scope="pixel"'),
        (
            {"levels": 256, "directions": [lambda x: x]},
            r"too few integers that are orthogonal to <lambda>\(images\)",
        ),
        ({"levels": 256, "normal": torch.ones(3, 8, 8)}, "too few integers that are orthogonal to a tensor"),
        ({"levels": 256, "directions": ["luma"]}, 'beside others: use scope="image", normal="luma" alone'),
        ({"levels": 256, "normal": "luma", "directions": ["constant"]}, "levels cannot be combined with 'luma' beside"),
        ({"levels": 256, "scope": "pixel", "normal": "luma"}, "15 levels are the least that leave luma"),
        ({"levels": 256, "bounds": (-0.71, 2.3)}, "leave no integers to be orthogonal to"),
    ],
)
def test_what_has_no_integers_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ThreatModel("linf", 4 / 255, **options)


def test_images_that_are_not_on_the_grid_are_refused_and_round_off_is_not():
    images = torch.randint(0, 256, (2, 3, 4, 4)) / 255
    nearly = (images * 255).round() * (1 / 255)
    threat = ThreatModel("linf", 4 / 255, levels=256)
    assert torch.equal(threat.around(nearly).images, images)
    images[1, 2, 0, 0] = 100.25 / 255
    with pytest.raises(ValueError, match=r"found 0\.393137, level 100\.250 \(sample 1\): round them first, \(images"):
        threat.around(images)
    with pytest.raises(ValueError, match=r"levels=65536 are more than torch\.float16 can tell apart"):
        ThreatModel("linf", 4 / 255, levels=65536).around(torch.zeros(1, 3, 2, 2, dtype=torch.float16))


def test_a_radius_is_as_many_whole_levels_as_fit():
    images = torch.full((1, 3, 8, 8), 100) / 255
    for eps, most in ((0.9 / 255, 0), (1 / 255, 1), (torch.tensor([4 / 255]), 4), (4.9 / 255, 4)):
        threat = ThreatModel("linf", eps, scope=None, levels=256)
        region = threat.around(images)
        d = ((region.stored(region.step(images, torch.randn(images.shape), 1.0)) - images) * 255).round()
        assert int(d.abs().max()) == most

"""Other normals than the image, and blocks of pixels: what stays as it was, judged by means and sums of its own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from torch import Tensor
from torch.nn.functional import avg_pool2d

from orthattack import PGD, DetectorEvasion, OrthoPGD, ThreatModel, alignment, orthogonalize
from orthattack.threat import perturbation_norm
from tests.attacks.test_attacks import small_model
from tests.conftest import examples, gradient_kinds, image_kinds, make_gradient, make_images, seeds
from tests.threat.test_region import best_l1_step

pytestmark = pytest.mark.heavy

LUMA = (0.299, 0.587, 0.114)
RADII = {"linf": 8 / 255, "l2": 0.5, "l1": 5.0}


def mixed_signs(images: Tensor) -> Tensor:
    """A normal of each image that has negative and zero entries, and a 4×4 block of zeros."""
    found = images.roll(1, 3) - 0.5 * images
    found[:, :, :4, :4] = 0
    return found


NORMALS = {
    "image": "image",
    "constant": "constant",
    "luma": "luma",
    "tensor": torch.linspace(-1, 2, 3 * 8 * 8).view(3, 8, 8),
    "function": mixed_signs,
}
SCOPES = ["image", "channel", "pixel", "block1", "block2", "block4", "block8"]
every = {
    "norm": st.sampled_from(list(RADII)), "normal": st.sampled_from(list(NORMALS)), "scope": st.sampled_from(SCOPES)
}  # fmt: skip


def normals_of(normal: str, images: Tensor) -> Tensor:
    """What the library is asked for, made here once more, in float64."""
    if normal == "luma":
        return torch.tensor(LUMA, dtype=torch.float64).view(1, 3, 1, 1).expand_as(images)
    made = {"image": images, "constant": torch.ones_like(images), "function": mixed_signs(images)}
    return (made[normal] if normal in made else NORMALS["tensor"].expand_as(images)).double()


def planes(normals: Tensor, scope: str) -> np.ndarray:
    """(K, n) the normal of each group of one image, zero elsewhere."""
    _, channels, height, width = normals.shape
    c, i, j = np.meshgrid(*map(np.arange, (channels, height, width)), indexing="ij")
    k = int(scope.removeprefix("block")) if scope.startswith("block") else 1
    group = {"image": 0 * c, "channel": c, "pixel": i * width + j}.get(scope, (c * height + i // k) * width + j // k)
    names, number = np.unique(group.ravel(), return_inverse=True)
    found = np.zeros((len(names), normals[0].numel()))
    found[number, np.arange(number.size)] = normals[0].double().numpy().ravel()
    return found[np.abs(found).sum(1) > 0]


def cosines(delta: Tensor, normals: Tensor, scope: str) -> float:
    """The largest |cos| of a group, in NumPy."""
    worst = 0.0
    for d, n in zip(delta.double().split(1), normals.split(1), strict=True):
        rows, flat = planes(n, scope), d.numpy().ravel()
        sizes = np.linalg.norm(rows, axis=1) * np.sqrt((rows != 0) @ flat**2)
        free = planes(torch.ones_like(n), scope)  # entries of a group where the normal is zero count as length too
        lengths = {tuple(np.flatnonzero(f)[:1]): np.sqrt((f != 0) @ flat**2) for f in free}
        for row, size in zip(rows, sizes, strict=True):
            of_group = next(f for f in free if (f[row != 0] != 0).all())
            size = np.linalg.norm(row) * lengths[tuple(np.flatnonzero(of_group)[:1])]
            worst = max(worst, abs(row @ flat) / size if size > 0 else 0.0)
    return worst


def assert_inside(threat: ThreatModel, normal: str, images: Tensor, points: Tensor) -> None:
    """Ball, bounds and planes, recomputed in float64 from the tensors themselves."""
    delta = points.double() - images.double()
    assert points.dtype == images.dtype
    assert points.min() >= 0
    assert points.max() <= 1
    assert perturbation_norm(delta, threat.norm).max() <= threat.eps * (1 + 1e-6)
    allowed = 1e-6 if images.dtype == torch.float32 else 1e-12
    assert cosines(delta, normals_of(normal, images), threat.scope) <= allowed
    assert threat.cosine(delta, images).max() <= allowed


@pytest.mark.heavy
@examples(120)
@given(
    **every,
    image=image_kinds,
    gradient=gradient_kinds,
    seed=seeds,
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_start_steps_and_projections_stay_inside(norm, normal, scope, image, gradient, seed, dtype):
    images = make_images(image, (2, 3, 8, 8), seed, dtype)
    threat = ThreatModel(norm, RADII[norm], scope=scope, normal=NORMALS[normal])
    region = threat.around(images)
    points = region.random_start(torch.Generator().manual_seed(seed))
    assert_inside(threat, normal, images, points)
    for k in range(2):
        points = region.step(points, make_gradient(gradient, images, seed + k), threat.eps / 2)
        assert_inside(threat, normal, images, points)
    assert_inside(threat, normal, images, region.project(images + make_gradient("normal", images, seed)))
    half = ThreatModel(norm, RADII[norm] / 2, scope=scope, normal=NORMALS[normal])
    assert_inside(half, normal, images, half.around(images).shrunk(points))


@examples(80)
@given(**every, image=image_kinds, seed=seeds)
def test_a_step_is_the_best_one(norm, normal, scope, image, seed):
    """Against scipy's linear programs; L2's, which is no program, is along the projected gradient."""
    images = make_images(image, (1, 3, 8, 8), seed, torch.float64)
    g = make_gradient("normal", images, seed)
    eps = {"linf": 0.1, "l2": 0.5, "l1": 4.0}[norm]
    threat = ThreatModel(norm, eps, scope=scope, normal=NORMALS[normal])
    delta = threat.around(images).step(images, g, eps) - images
    rows = planes(normals_of(normal, images), scope)
    gain = float((g * delta).sum())
    if norm == "l2":
        flat = g.numpy().ravel()
        along = flat - rows.T @ ((rows @ flat) / (rows**2).sum(1)) if len(rows) else flat
        p = images + eps * torch.from_numpy(along / max(np.linalg.norm(along), 1e-300)).view_as(images)
        if np.linalg.norm(along) > 1e-9:
            torch.testing.assert_close(delta, threat.around(images).project(p) - images, rtol=0, atol=1e-5)
        return
    if norm == "linf":
        best, _ = best_l1_step(g, images, rows, 1e9, eps)
    else:
        limit = eps / 2  # a hundredth of 192 pixels
        best, used = best_l1_step(g, images, rows, eps, limit)
        if used < (1 - 1e-6) * eps:
            best, _ = best_l1_step(g, images, rows, eps, 1.0)
    assert gain == pytest.approx(best, rel=2e-4 if norm == "l1" else 1e-6, abs=1e-9)


@pytest.mark.heavy
@examples(60)
@given(**every, image=image_kinds, seed=seeds)
def test_the_projection_is_the_nearest_point(norm, normal, scope, image, seed):
    """What is left, p - y, less the pull of an L2 ball, gains nothing anywhere else in the set: by linear programs."""
    images = make_images(image, (1, 3, 8, 8), seed, torch.float64)
    p = images + 0.3 * make_gradient("normal", images, seed)
    eps = {"linf": 0.1, "l2": 0.5, "l1": 3.0}[norm]
    y = ThreatModel(norm, eps, scope=scope, normal=NORMALS[normal]).around(images).project(p)
    rows = planes(normals_of(normal, images), scope)
    budget, limit = {"linf": (1e9, eps), "l2": (1e9, 1.0), "l1": (eps, 1.0)}[norm]

    def gap(pull: float) -> float:
        rest = p - y - pull * (y - images)
        if rest.abs().max() < 1e-12:
            return 0.0
        best, _ = best_l1_step(rest, images, rows, budget, limit)
        return best - float((rest * (y - images)).sum())

    is_on_the_ball = norm == "l2" and float((y - images).norm()) > eps * (1 - 1e-5)
    least = minimize_scalar(gap, bounds=(0, 20 * float((p - images).norm())), method="bounded", options={"xatol": 1e-7})
    assert (least.fun if is_on_the_ball else gap(0.0)) <= (3e-4 if norm == "l1" else 1e-5)


@given(image_kinds, seeds, st.sampled_from(list(RADII)))
def test_block_means_and_luma_are_what_they_were(image, seed, norm):
    images = make_images(image, (2, 3, 16, 16), seed)
    g = make_gradient("normal", images, seed)

    def moved(**options) -> Tensor:
        region = ThreatModel(norm, RADII[norm], **options).around(images)
        start = region.random_start(torch.Generator().manual_seed(seed))
        return region.step(start, g, RADII[norm] / 2).double() - images.double()

    size = RADII[norm]
    blocks, luma, colour = (
        moved(scope="block8", normal="constant"),
        moved(scope="pixel", normal="luma"),
        moved(scope="channel", normal="constant"),
    )
    assert avg_pool2d(blocks, 8).abs().max() <= 1e-6 * size
    assert torch.einsum("nchw,c->nhw", luma, torch.tensor(LUMA).double()).abs().max() <= 2e-6 * size
    assert colour.mean((2, 3)).abs().max() <= 1e-6 * size
    if image in ("uniform", "8-bit", "mixed"):
        assert min(float(perturbation_norm(d, norm).min()) for d in (blocks, luma, colour)) >= 0.4 * size


@pytest.mark.parametrize("norm", list(RADII))
@pytest.mark.parametrize(
    ("one", "other", "bits"),
    [
        ({"scope": None, "directions": ["constant"]}, {"scope": "image", "normal": "constant"}, True),
        ({"scope": None, "directions": ["channel-constant"]}, {"scope": "channel", "normal": "constant"}, True),
        ({"scope": None, "directions": ["luma"]}, {"scope": "image", "normal": "luma"}, True),
        ({"scope": "pixel", "normal": torch.ones(3, 16, 16)}, {"scope": "pixel", "normal": "constant"}, True),
        ({"scope": "block4", "normal": torch.ones_like}, {"scope": "block4", "normal": "constant"}, True),
        ({"scope": "image"}, {"scope": "image", "normal": lambda x: x}, False),
        ({"scope": "block4", "normal": "luma"}, {"scope": "block4", "normal": "constant"}, False),
        ({"scope": "block16", "normal": "constant"}, {"scope": "channel", "normal": "constant"}, False),
        ({"scope": "block16"}, {"scope": "channel"}, False),
        (
            {"scope": "block4", "normal": "constant", "directions": ["constant", "channel-constant", "luma"]},
            {"scope": "block4", "normal": "constant"},
            True,
        ),
        ({"scope": "pixel", "normal": "luma", "directions": ["luma"]}, {"scope": "pixel", "normal": "luma"}, True),
    ],
)
def test_two_ways_to_say_the_same(norm, one, other, bits):
    images = make_images("mixed", (2, 3, 16, 16), 0, torch.float32 if bits else torch.float64)
    found = []
    for options in (one, other):
        region = ThreatModel(norm, RADII[norm], **options).around(images)
        start = region.random_start(torch.Generator().manual_seed(0))
        found.append([start, region.step(start, make_gradient("normal", images, 0), RADII[norm] / 2)])
    for a, b in zip(*found, strict=True):
        # L1 steps are within 1e-4 of the best, and may differ by as much.
        torch.testing.assert_close(a, b, rtol=0, atol=0.0 if bits else 1e-2 if norm == "l1" else 1e-6)


@pytest.mark.parametrize("norm", list(RADII))
def test_where_the_normal_is_zero_a_group_is_free(norm):
    images = make_images("uniform", (1, 3, 8, 8), 0, torch.float64)
    g = make_gradient("normal", images, 0)
    weights = torch.ones(3, 8, 8)
    weights[:, :4] = 0
    none = ThreatModel(norm, RADII[norm], scope="block4", normal=torch.zeros(3, 8, 8)).around(images)
    free = ThreatModel(norm, RADII[norm], scope=None).around(images)
    some = ThreatModel("linf", 0.1, scope="block4", normal=weights).around(images).step(images, g, 0.1)
    torch.testing.assert_close(
        none.step(images, g, 0.1), free.step(images, g, 0.1), rtol=0, atol=1e-4 if norm == "l1" else 1e-9
    )
    assert torch.equal(some[:, :, :4], (images + 0.1 * g.sign()).clamp(0, 1)[:, :, :4])
    assert avg_pool2d(some - images, 4)[:, :, 1].abs().max() <= 1e-15


@pytest.mark.parametrize("scope", ["image", "channel", "pixel", "block4"])
@pytest.mark.parametrize("norm", list(RADII))
def test_a_normals_minus_zero_is_zero(norm, scope):
    """0 times a negative number is -0, and a gradient over that is infinite with the wrong sign."""
    images = make_images("uniform", (1, 3, 8, 8), 0)
    normal = make_gradient("sparse", images, 1)[0]
    assert (normal.signbit() & (normal == 0)).any()
    a, b = (
        ThreatModel(norm, RADII[norm], scope=scope, normal=n).around(images).step(images, -images, RADII[norm])
        for n in (normal, normal + 0.0)
    )
    assert torch.equal(a, b)


@pytest.mark.parametrize("norm", list(RADII))
@pytest.mark.parametrize("normal", ["image", "constant", "luma"])
def test_a_block_of_one_pixel_cannot_change(norm, normal):
    images = make_images("uniform", (2, 3, 4, 4), 0)
    region = ThreatModel(norm, RADII[norm], scope="block1", normal=normal).around(images)
    assert torch.equal(region.random_start(torch.Generator().manual_seed(0)), images)
    assert torch.equal(region.step(images, make_gradient("normal", images, 0), 0.1), images)


@pytest.mark.parametrize("norm", list(RADII))
def test_a_black_image_keeps_its_mean_only_as_it_is_and_a_grey_one_may_move(norm):
    black, grey = torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), 0.5)
    for scope in ("image", "channel", "pixel", "block4"):
        threat = ThreatModel(norm, RADII[norm], scope=scope, normal="constant")
        g = make_gradient("normal", black, 0)
        assert torch.equal(threat.around(black).step(black, g, 0.1), black)
        moved = threat.around(grey).step(grey, g, RADII[norm])
        assert perturbation_norm(moved - grey, norm).item() == pytest.approx(RADII[norm], rel=1e-4)


def test_the_normals_are_there_for_who_needs_them():
    images = make_images("uniform", (2, 3, 8, 8), 0)
    for normal in NORMALS:
        found = ThreatModel("linf", 0.1, scope="pixel", normal=NORMALS[normal]).normals(images)
        torch.testing.assert_close(found.double(), normals_of(normal, images))
        assert found.shape == images.shape


@pytest.mark.parametrize("norm", list(RADII))
@pytest.mark.parametrize("scope", ["image", "channel", "pixel", "block4"])
def test_selected_rows_and_single_samples_are_the_same(norm, scope):
    calls = []

    def normal(x):
        calls.append(len(x))
        return mixed_signs(x)

    images = make_images("mixed", (4, 3, 8, 8), 0)
    g = make_gradient("normal", images, 0)
    threat = ThreatModel(norm, RADII[norm], scope=scope, normal=normal)
    region, rows = threat.around(images), torch.tensor([2, 0])
    together = region.step(images, g, RADII[norm])
    assert torch.equal(region.select(rows).step(images[rows], g[rows], RADII[norm]), together[rows])
    assert calls == [4]
    alone = threat.around(images[1:2]).step(images[1:2], g[1:2], RADII[norm])
    assert torch.equal(alone, together[1:2])


def test_the_measures_take_any_normal_and_blocks():
    images = make_images("uniform", (2, 3, 8, 12), 0)
    g = make_gradient("normal", images, 0)
    found = alignment(g, images, "block4")
    assert found.shape == (2, 3, 2, 3)
    block = (slice(1, 2), slice(2, 3), slice(4, 8), slice(8, 12))
    assert found[1, 2, 1, 2].item() == pytest.approx(alignment(g[block], images[block]).item())
    assert alignment(g[1], images[1], "block4").shape == (3, 2, 3)
    rest = orthogonalize(g, torch.ones_like(g), "block4")
    assert avg_pool2d(rest, 4).abs().max() <= 1e-7
    torch.testing.assert_close(rest, g - avg_pool2d(g, 4).repeat_interleave(4, 2).repeat_interleave(4, 3))
    threat = ThreatModel("linf", 0.1, scope="block4", normal="constant")
    torch.testing.assert_close(threat.tangent(g, images), rest)
    assert threat.cosine(g, images).tolist() == pytest.approx(
        alignment(g, torch.ones_like(g), "block4").abs().flatten(1).amax(1).tolist()
    )


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ("orthogonal to the image",)),
        ({"scope": None}, ()),
        ({"scope": "pixel"}, ("orthogonal to the image in each pixel",)),
        ({"scope": "block8"}, ("orthogonal to the image in each 8×8 block",)),
        ({"scope": "block8", "normal": "constant"}, ("8×8 block means kept",)),
        ({"scope": "pixel", "normal": "luma"}, ("luma of each pixel kept",)),
        ({"scope": "channel", "normal": "luma"}, ("channel means kept",)),
        ({"scope": "image", "normal": "constant", "directions": ["constant", "luma"]}, ("mean kept", "mean luma kept")),
        ({"normal": torch.ones(3, 4, 4), "scope": "channel"}, ("orthogonal to a tensor in each channel",)),
        ({"directions": [mixed_signs]}, ("orthogonal to the image", "orthogonal to mixed_signs(images)")),
    ],
)  # fmt: skip
def test_what_is_kept_in_words(options, words):
    assert ThreatModel("linf", 0.1, **options).keeps == words
    assert PGD(small_model(), **{"scope": "image", **options}).card.keeps == words


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scope": "block0"}, "scope must be one of 'image', 'channel', 'pixel', or blocks of a size such as 'block8'"),
        ({"scope": "block"}, "got 'block'"),
        (
            {"normal": "row"},
            "normal must be 'image', 'constant', 'luma', a tensor or a function of the images; got 'row'",
        ),
        ({"normal": 3}, "normal must be"),
        ({"scope": None, "normal": "luma"}, "normal='luma' needs a scope, the vectors that it is for"),
        (
            {"scope": "block8", "directions": ["constant"]},
            'directions cannot be combined with scope="block8", which has a constraint for every block already; got '
            "'constant'",
        ),
        ({"scope": "pixel", "normal": "constant", "directions": ["luma"]}, "for every pixel already; got 'luma'"),
    ],
)
def test_wrong_options_are_explained(options, message):
    with pytest.raises(ValueError, match=message):
        ThreatModel("linf", 0.1, **options)


@pytest.mark.parametrize(
    ("options", "images", "message"),
    [
        ({"scope": "block8"}, torch.rand(1, 3, 12, 20), "multiples of 8; got 12×20: there, blocks of 2, 4 fit"),
        ({"scope": "block8"}, torch.rand(1, 3, 8, 9), "no block fits those, so crop or pad them"),
        ({"normal": "luma"}, torch.rand(1, 1, 8, 8), "luma is of red, green and blue; the images have 1 channels"),
        ({"normal": torch.rand(3, 8, 9)}, torch.rand(1, 3, 8, 8), r"a normal must have the images' shape \(3, 8, 8\)"),
        ({"normal": torch.rand(2, 3, 8, 8)}, torch.rand(1, 3, 8, 8), r"one for all images.*got \(2, 3, 8, 8\)"),
        ({"normal": torch.full((3, 8, 8), torch.nan)}, torch.rand(1, 3, 8, 8), "a normal must be finite"),
        ({"normal": lambda x: 1.0}, torch.rand(1, 3, 8, 8), "a normal must return a tensor; got float"),
        ({"scope": "block8"}, torch.rand(1, 3, 8, 8).half(), 'scope="block8" needs images of float32 or float64'),
    ],
)
def test_wrong_images_and_normals_are_explained(options, images, message):
    with pytest.raises(ValueError, match=message):
        ThreatModel("linf", 0.1, **options).around(images)


def test_a_detector_needs_room_that_blocks_do_not_leave():
    with pytest.raises(ValueError, match='"image" or "channel" here: "block8" leaves no room for another gradient'):
        DetectorEvasion(small_model(), lambda x: x.mean((1, 2, 3)), scope="block8")


def test_threat_models_and_cards_are_equal_by_their_normals():
    ones = torch.ones(3, 8, 8)
    threats = [ThreatModel("linf", 0.1, scope="image", normal=n) for n in (ones, ones.clone(), ones * 2, "luma")]
    cards = [OrthoPGD(small_model(), normal=n).card for n in (ones, ones.clone(), ones * 2, "luma")]
    for first, same, *others in (threats, cards):
        assert first == same
        assert hash(first) == hash(same)
        assert all(first != other for other in others)
    attack = OrthoPGD(small_model(), normal=ones)
    ones.zero_()
    assert attack.normal.min() == 1
    assert repr(OrthoPGD(small_model(), scope="block2", normal="constant")).endswith(
        "scope='block2', enforce='perturbation', normal='constant')"
    )

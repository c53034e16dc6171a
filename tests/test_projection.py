from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from orthattack import alignment, orthogonalize, orthonormal_basis, remove_directions
from orthattack.projection import Scope, total
from tests.conftest import gradient_kinds, image_kinds, make_gradient, make_images, scopes, seeds

shapes = st.sampled_from([(3, 4, 5), (1, 3, 8, 8), (2, 3, 16, 16), (2, 2, 1, 6, 7), (4, 1, 5, 5)])
scales = st.sampled_from([1e-30, 1e-13, 1e-6, 1.0, 1e6, 1e30])


def rows(tensor: Tensor, scope: Scope) -> np.ndarray:
    """(groups, n) in float64, by an independent reshape."""
    array = tensor.double().numpy()
    array = array.reshape(-1, *array.shape[-3:])
    n, c = array.shape[:2]
    if scope == "image":
        return array.reshape(n, -1)
    if scope == "channel":
        return array.reshape(n * c, -1)
    return array.transpose(0, 2, 3, 1).reshape(-1, c)


def projected(gradient: Tensor, images: Tensor, scope: Scope) -> np.ndarray:
    """g - <g, x> x / <x, x> in long double."""
    g, x = rows(gradient, scope).astype(np.longdouble), rows(images, scope).astype(np.longdouble)
    norm2 = (x * x).sum(1, keepdims=True)
    return g - np.divide((g * x).sum(1, keepdims=True), norm2, out=np.zeros_like(norm2), where=norm2 > 0) * x


@given(shapes, image_kinds, gradient_kinds, scopes, seeds, scales, st.sampled_from([torch.float32, torch.float64]))
def test_orthogonalize_agrees_with_the_formula_in_long_double(shape, image, gradient, scope, seed, scale, dtype):
    x = make_images(image, shape, seed, dtype)
    g = make_gradient(gradient, x, seed, scale)
    result = orthogonalize(g, x, scope)
    expected = projected(g, x, scope)
    size = np.linalg.norm(rows(g, scope), axis=1, keepdims=True)
    error = np.abs(rows(result, scope) - expected)
    assert (error <= 8 * torch.finfo(dtype).eps * size).all()


@given(shapes, image_kinds, gradient_kinds, scopes, seeds, scales)
def test_result_is_orthogonal_and_finite(shape, image, gradient, scope, seed, scale):
    for dtype, bound in ((torch.float32, 1e-6), (torch.float64, 1e-12)):
        x = make_images(image, shape, seed, dtype)
        result = orthogonalize(make_gradient(gradient, x, seed, scale), x, scope)
        assert result.isfinite().all()
        assert alignment(result, x, scope).abs().max() <= bound


@pytest.mark.parametrize("size", [32, 224, 512])
@pytest.mark.parametrize("angle", [1.0, 1e-2, 1e-4])
@pytest.mark.parametrize("scale", [1e-30, 1e-13, 1.0, 1e30])
def test_float32_precision_at_full_size(size, angle, scale):
    x = make_images("uniform", (1, 3, size, size), 0)
    g = ((x.double() + angle * make_gradient("normal", x, 0).double()) * scale).float()
    result = orthogonalize(g, x)
    assert (result != 0).any()
    assert alignment(result, x).abs().max() <= 1e-6


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 1e-4), (torch.bfloat16, 1e-3)])
@pytest.mark.parametrize("size", [32, 224, 512])
def test_half_precision_is_accumulated_higher(dtype, bound, size):
    # ‖x‖² of a bright image overflows float16 from 256 x 256 on.
    x = make_images("uniform", (1, 3, size, size), 0).add(1).div(2).to(dtype)
    g = make_gradient("normal", x, 0)
    result = orthogonalize(g, x)
    assert result.dtype == dtype
    assert alignment(result, x).abs().max() <= bound
    exact = orthogonalize(g.double(), x.double())
    assert (result.double() - exact).abs().max() <= torch.finfo(dtype).eps * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@given(seed=seeds, scale=st.floats(0.01, 100), scope=scopes)
def test_a_parallel_gradient_becomes_exactly_zero(dtype, seed, scale, scope):
    x = make_images("uniform", (2, 3, 32, 32), seed, dtype)
    assert (orthogonalize(scale * x, x, scope) == 0).all()
    assert (orthogonalize(-scale * x, x, scope) == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("length", [1, 1024])
def test_what_counts_as_round_off(dtype, length):
    """4 units of a gradient's length against one image, 16 against a basis: what is above is kept as it is."""

    def vectors(units: float) -> tuple[Tensor, Tensor]:
        image = torch.zeros(1, length, 2, dtype=dtype)
        image[..., 0] = 1
        gradient = image.clone()
        gradient[..., 1] = units * torch.finfo(dtype).eps
        return gradient, image

    for units, limit in ((3.5, 4), (4.5, 4), (15, 16), (17, 16)):
        gradient, image = vectors(units)
        rest = torch.zeros_like(image)
        if units > limit:
            rest[..., 1] = gradient[..., 1]
        if limit == 4:
            assert torch.equal(orthogonalize(gradient, image), rest)
        else:
            basis = orthonormal_basis(torch.stack([image, gradient], dim=-4))
            assert bool(basis[1].any()) == (units > limit)
            assert torch.equal(remove_directions(gradient, basis[:1]), rest)


@given(seed=seeds, scope=scopes)
def test_a_zero_image_removes_nothing(seed, scope):
    x = torch.zeros(2, 3, 8, 8)
    g = make_gradient("normal", x, seed)
    assert torch.equal(orthogonalize(g, x, scope), g)


def test_a_zero_group_among_others_removes_nothing_there():
    x = make_images("uniform", (1, 3, 4, 4), 0)
    x[:, 1] = 0
    x[:, :, 0, 0] = 0
    g = make_gradient("normal", x, 0)
    assert torch.equal(orthogonalize(g, x, "channel")[:, 1], g[:, 1])
    assert torch.equal(orthogonalize(g, x, "pixel")[:, :, 0, 0], g[:, :, 0, 0])


@given(shapes, image_kinds, gradient_kinds, scopes, seeds)
def test_it_is_a_projection(shape, image, gradient, scope, seed):
    x = make_images(image, shape, seed, torch.float64)
    g, h = make_gradient(gradient, x, seed), make_gradient("normal", x, seed + 7)
    p, q = orthogonalize(g, x, scope), orthogonalize(h, x, scope)
    tolerance = 1e-12 * float(g.norm() * h.norm() + 1)
    assert (orthogonalize(p, x, scope) - p).abs().max() <= tolerance  # idempotent
    assert abs(float((p * h).sum() - (g * q).sum())) <= tolerance  # self-adjoint
    assert float(p.norm()) <= float(g.norm()) * (1 + 1e-12)  # non-expansive


@given(shapes, image_kinds, scopes, seeds, st.integers(-60, 60), st.integers(-20, 20))
def test_powers_of_two_in_gradient_and_image_come_out_exactly(shape, image, scope, seed, j, k):
    x = make_images(image, shape, seed)
    g = make_gradient("normal", x, seed)
    assert torch.equal(orthogonalize(g * 2.0**j, x * 2.0**k, scope), orthogonalize(g, x, scope) * 2.0**j)


@given(image_kinds, gradient_kinds, scopes, seeds)
def test_a_sample_does_not_depend_on_its_batch(image, gradient, scope, seed):
    x = make_images(image, (4, 3, 9, 9), seed)
    x[1] = x[1] * 1e-20
    g = make_gradient(gradient, x, seed)
    together = orthogonalize(g, x, scope)
    for i in range(4):
        alone = orthogonalize(g[i], x[i], scope)
        assert alone.shape == (3, 9, 9)
        torch.testing.assert_close(together[i], alone, rtol=1e-5, atol=1e-6 * float(g[i].abs().max()))


def test_memory_layout_does_not_matter():
    x = make_images("uniform", (2, 3, 8, 8), 0)
    g = make_gradient("normal", x, 0)
    expected = orthogonalize(g, x)
    last = torch.channels_last
    torch.testing.assert_close(orthogonalize(g.to(memory_format=last), x.to(memory_format=last)), expected)
    torch.testing.assert_close(orthogonalize(g.mT.contiguous().mT, x), expected)
    wide = torch.stack([x, x], dim=-1)[..., 0]
    torch.testing.assert_close(orthogonalize(g, wide), expected)
    torch.testing.assert_close(orthogonalize(g, x[:1].expand(2, -1, -1, -1))[0], expected[0])


def test_inputs_are_left_alone_and_gradients_flow():
    x = make_images("uniform", (2, 3, 4, 4), 0, torch.float64)
    g = make_gradient("normal", x, 0).requires_grad_()
    before = g.detach().clone(), x.clone()
    result = orthogonalize(g, x)
    assert torch.equal(g, before[0])
    assert torch.equal(x, before[1])
    h = make_gradient("normal", x, 3)
    (derivative,) = torch.autograd.grad((result * h).sum(), g)
    torch.testing.assert_close(derivative, orthogonalize(h, x))  # the projection is its own adjoint


@pytest.mark.parametrize(
    ("gradient", "images", "scope", "message"),
    [
        (torch.ones(4, 4), torch.ones(4, 4), "image", r"gradient must have shape \(\.\.\., C, H, W\); got \(4, 4\)"),
        (torch.ones(1, 2, 2), torch.ones(1, 2, 3), "image", r"\(1, 2, 2\) and images \(1, 2, 3\) must have the same"),
        (torch.ones(1, 2, 2), torch.ones(1, 2, 2).double(), "image", "float32.*float64.*same dtype"),
        (torch.ones(1, 2, 2).long(), torch.ones(1, 2, 2), "image", "gradient must be floating point; got torch.int64"),
        (
            torch.ones(1, 2, 2),
            torch.ones(1, 2, 2),
            "row",
            "scope must be one of 'image', 'channel', 'pixel', or .*'block8'; got 'row'",
        ),
    ],
)
def test_orthogonalize_explains_bad_input(gradient, images, scope, message):
    with pytest.raises(ValueError, match=message):
        orthogonalize(gradient, images, scope)


@given(shapes, image_kinds, gradient_kinds, scopes, seeds, scales)
def test_alignment_agrees_with_numpy(shape, image, gradient, scope, seed, scale):
    x = make_images(image, shape, seed, torch.float64)
    g = make_gradient(gradient, x, seed, scale)
    a, b = rows(g, scope), rows(x, scope)
    norms = np.linalg.norm(a / scale, axis=1) * np.linalg.norm(b, axis=1)
    expected = np.divide(((a / scale) * b).sum(1), norms, out=np.zeros_like(norms), where=norms > 0)
    result = alignment(g, x, scope)
    lead = shape[:-3]
    assert result.shape == {"image": lead, "channel": (*lead, shape[-3]), "pixel": (*lead, *shape[-2:])}[scope]
    np.testing.assert_allclose(result.numpy().ravel(), expected, atol=1e-14)


def test_alignment_of_known_vectors():
    a = torch.tensor([3.0, 4.0]).view(1, 1, 2)
    assert alignment(a, a).item() == 1
    assert alignment(a, -a).item() == -1
    assert alignment(a, torch.tensor([-4.0, 3.0]).view(1, 1, 2)).item() == 0
    assert alignment(a, torch.zeros_like(a)).item() == 0
    assert alignment(a * 1e-30, a.half()).dtype == torch.float32
    assert alignment(a * 1e-30, a * 1e30).item() == pytest.approx(1)
    assert math.isfinite(alignment(torch.full((1, 1, 2), 3e38), a).item())


def test_alignment_is_a_cosine_whatever_the_rounding():
    a = make_images("uniform", (2000, 3, 2, 2), 0, torch.float64)
    for dtype in (torch.float16, torch.float32, torch.float64):
        assert alignment(a.to(dtype), a.to(dtype) * 0.7).max() <= 1
        assert alignment(a.to(dtype), a.to(dtype) * -0.7).min() >= -1


def test_alignment_of_two_dtypes_is_computed_in_float64():
    a = make_images("uniform", (2, 3, 16, 16), 0, torch.float64)
    for dtype in (torch.float16, torch.float32):
        b = make_gradient("normal", a, 0).to(dtype)
        expected = alignment(a, b.double())
        torch.testing.assert_close(alignment(a, b), expected, rtol=1e-14, atol=0)
        torch.testing.assert_close(alignment(b, a), expected, rtol=1e-14, atol=0)
        assert alignment(b, b).dtype == torch.float32
        torch.testing.assert_close(alignment(a.to(dtype), b), alignment(a.to(dtype).double(), b.double()).float())


def test_half_precision_directions_are_computed_in_float32():
    x = make_images("uniform", (2, 3, 32, 32), 0).half()
    g = make_gradient("normal", x, 0)
    basis = orthonormal_basis(torch.stack([x, g], dim=1))
    assert torch.equal(basis, orthonormal_basis(torch.stack([x, g], dim=1).float()))
    h = make_gradient("normal", x, 1)
    assert torch.equal(remove_directions(h, basis), remove_directions(h.float(), basis).half())
    assert remove_directions(h, basis.double()).dtype == torch.float16
    assert remove_directions(h.double(), basis.half()).dtype == torch.float64


def test_the_sum_of_a_large_image_is_accumulated_in_float64():
    """A sum of float32 over 2²⁴ entries of 1 would stop at 2²⁴ where it goes one by one, and err by 1e-5 elsewhere."""
    rows = total(torch.full((2, 3, 512, 512), 0.1), (-3, -2, -1))
    assert rows.shape == (2, 1, 1, 1)
    assert rows.dtype == torch.float32
    assert rows.flatten().tolist() == pytest.approx([78643.2] * 2, rel=2e-7)
    assert total(torch.arange(24.0).view(1, 2, 3, 4), (-2, -1)).flatten().tolist() == [66, 210]
    assert total(torch.arange(24.0).view(1, 2, 3, 4), (-3,)).flatten().tolist() == [12 + 2 * k for k in range(12)]


@given(st.integers(1, 6), seeds, scales)
def test_basis_is_orthonormal_and_spans_the_directions(count, seed, scale):
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(2, count, 3, 4, 4, generator=generator, dtype=torch.float64) * scale
    basis = orthonormal_basis(directions).flatten(2)
    identity = torch.eye(count, dtype=torch.float64).expand(2, -1, -1)
    torch.testing.assert_close(basis @ basis.mT, identity, rtol=0, atol=1e-13)
    flat = directions.flatten(2) / scale
    torch.testing.assert_close(flat @ basis.mT @ basis, flat, rtol=0, atol=1e-12)


@pytest.mark.parametrize(("dtype", "apart"), [(torch.float64, 1e-7), (torch.float32, 1e-3)])
def test_nearly_parallel_directions_give_an_orthonormal_basis(dtype, apart):
    """What one pass leaves of the first direction in the second is round-off over what is left: 1e-9 in float64."""
    x = make_images("uniform", (2, 3, 8, 8), 0, torch.float64)
    others = [make_gradient("normal", x, seed) for seed in (1, 2)]
    basis = orthonormal_basis(torch.stack([x, *(x + apart * g for g in others)], dim=1).to(dtype)).double().flatten(2)
    identity = torch.eye(3, dtype=torch.float64).expand(2, -1, -1)
    torch.testing.assert_close(basis @ basis.mT, identity, rtol=0, atol=8 * torch.finfo(dtype).eps)


def test_zero_and_dependent_directions_are_dropped():
    x = make_images("uniform", (2, 3, 5, 5), 0)
    g = make_gradient("normal", x, 0)
    directions = torch.stack([x, torch.zeros_like(x), 3 * x, g, x - 2 * g, torch.ones_like(x)], dim=1)
    basis = orthonormal_basis(directions)
    assert basis.isfinite().all()
    assert basis.flatten(2).norm(dim=2).round().tolist() == [[1, 0, 0, 1, 0, 1]] * 2
    result = remove_directions(make_gradient("normal", x, 5), basis)
    for direction in (x, g, torch.ones_like(x)):
        assert alignment(result, direction).abs().max() <= 1e-6


@given(image_kinds, seeds, scales)
def test_removing_the_image_alone_is_orthogonalizing(image, seed, scale):
    x = make_images(image, (2, 3, 6, 6), seed, torch.float64)
    g = make_gradient("normal", x, seed, scale)
    basis = orthonormal_basis(x.unsqueeze(1))
    torch.testing.assert_close(remove_directions(g, basis), orthogonalize(g, x), rtol=1e-10, atol=1e-13 * scale)


@given(seeds)
def test_removing_each_channel_of_the_image_is_the_channel_scope(seed):
    x = make_images("uniform", (2, 3, 6, 6), seed, torch.float64)
    g = make_gradient("normal", x, seed)
    channels = x.unsqueeze(1) * torch.eye(3, dtype=torch.float64)[:, :, None, None]
    result = remove_directions(g, orthonormal_basis(channels))
    torch.testing.assert_close(result, orthogonalize(g, x, "channel"), rtol=1e-10, atol=1e-13)


def test_many_directions_at_full_size_in_float32():
    x = make_images("uniform", (1, 3, 224, 224), 0)
    directions = torch.stack([x, torch.ones_like(x), x**2, make_gradient("normal", x, 3)], dim=1)
    nearly = (directions.mean(1) + 1e-4 * make_gradient("normal", x, 9)).float()
    result = remove_directions(nearly, orthonormal_basis(directions))
    for direction in directions.unbind(1):
        assert alignment(result, direction).abs().max() <= 1e-6


def test_a_gradient_in_the_span_becomes_exactly_zero():
    x = make_images("uniform", (2, 3, 16, 16), 0)
    basis = orthonormal_basis(torch.stack([x, torch.ones_like(x)], dim=1))
    assert (remove_directions(0.3 * x - 2, basis) == 0).all()
    assert (remove_directions(torch.zeros_like(x), basis) == 0).all()


def test_bases_explain_bad_input():
    x = torch.rand(2, 3, 4, 4)
    with pytest.raises(ValueError, match=r"directions must be a floating-point tensor of shape .* got \(3, 4, 4\)"):
        orthonormal_basis(x[0])
    with pytest.raises(ValueError, match=r"basis must have shape \(\.\.\., K, C, H, W\); got \(3, 4, 4\)"):
        remove_directions(x[0], x[0])
    with pytest.raises(ValueError, match="must have the same shape"):
        remove_directions(x, x.unsqueeze(1)[:1])

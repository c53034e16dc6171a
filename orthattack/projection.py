"""Removing directions from gradients, and the cosine of a perturbation with an image.

Everything here is a pure function of tensors. Images and gradients have shape (..., C, H, W); a *scope* says which
entries form one vector:

==========  ==========================================  ===================
scope       one vector per                              shape of a number per vector
==========  ==========================================  ===================
"image"     image, of length C*H*W                      (...)
"channel"   channel, of length H*W                      (..., C)
"pixel"     pixel's colour, of length C                 (..., H, W)
"block8"    8×8 pixels of a channel, of length 64;      (..., C, H/8, W/8)
            likewise with any other size that divides
            the image's sides
==========  ==========================================  ===================

Two numerical rules hold throughout. Vectors are scaled by a power of two so that their largest entry is near 1 before
they are squared, so no threshold is absolute: gradients of 1e-30 are projected as well as gradients of 1. And each
projection is done twice, since one pass leaves round-off *of the size of the input*, which is not small beside a
nearly parallel remainder ("twice is enough", Giraud et al. 2005, doi:10.1007/s00211-005-0615-4).
"""

from __future__ import annotations

import re

import torch
from torch import Tensor

from orthattack.arguments import check_tensor

__all__ = ["Scope", "alignment", "orthogonalize", "orthonormal_basis", "remove_directions"]

Scope = str
"""Which entries form one vector: "image", "channel", "pixel", or "block" and a size, such as "block8"."""

IMAGE = (-3, -2, -1)
"""The dimensions of an image."""
_DIMS: dict[Scope, tuple[int, ...]] = {"image": IMAGE, "channel": (-2, -1), "pixel": (-3,)}


def scope_dims(scope: Scope) -> tuple[int, ...]:
    """The dimensions of a (..., C, H, W) tensor, `cut` if it is in blocks, that `scope` gathers into one vector.

    Raises:
        ValueError: `scope` is none.
    """
    if isinstance(scope, str) and (scope in _DIMS or block_size(scope) is not None):
        return _DIMS.get(scope, _DIMS["channel"])
    raise ValueError(
        f"scope must be one of {', '.join(map(repr, _DIMS))}, or blocks of a size such as 'block8'; got {scope!r}"
    )


def block_size(scope: Scope | None) -> int | None:
    """k of "blockk", None for other scopes."""
    found = re.fullmatch("block([1-9][0-9]{0,5})", scope or "", re.ASCII)
    return None if found is None else int(found[1])


def is_fine(scope: Scope | None) -> bool:
    """Whether its vectors are many, each of few pixels: the colours, or blocks."""
    return scope == "pixel" or block_size(scope) is not None


def cut(tensor: Tensor, scope: Scope) -> Tensor:
    """The blocks of k×k pixels as channels, (..., C·H/k·W/k, k, k), each then a vector of scope "channel"; `tensor` as
    it is for other scopes.

    Raises:
        ValueError: the blocks do not fill the images.
    """
    if (k := block_size(scope)) is None:
        return tensor
    *batch, channels, height, width = tensor.shape
    if height % k or width % k:
        fit = ", ".join(str(size) for size in range(2, min(height, width) + 1) if height % size + width % size == 0)
        raise ValueError(
            f"scope={scope!r} needs images whose sides are multiples of {k}; got {height}×{width}: "
            + (f"there, blocks of {fit} fit" if fit else "no block fits those, so crop or pad them")
        )
    blocks = tensor.reshape(*batch, channels, height // k, k, width // k, k).transpose(-3, -2)
    return blocks.reshape(*batch, channels * (height // k) * (width // k), k, k)


def joined(blocks: Tensor, like: Tensor) -> Tensor:
    """The tensor, of the shape of `like`, that was `cut` into `blocks`."""
    if blocks.shape == like.shape:
        return blocks
    *batch, channels, height, width = like.shape
    k = blocks.shape[-1]
    return blocks.reshape(*batch, channels, height // k, width // k, k, k).transpose(-3, -2).reshape(like.shape)


def orthogonalize(gradient: Tensor, images: Tensor, scope: Scope = "image") -> Tensor:
    """Remove from each gradient its component along the image: ``g - ⟨g, x⟩ / ⟨x, x⟩ · x``.

    Args:
        gradient: (..., C, H, W), any floating dtype, finite, any scale.
        images: the same shape, dtype and device; values may be in any range. Or another normal: ones take away the
            mean.
        scope: what counts as one vector: the whole "image", each "channel", each "pixel"'s colour, or, as "block8",
            each block of 8×8 pixels of a channel.

    Returns:
        The projected gradient, with the shape and dtype of `gradient`. Its cosine with the image is below 1e-6 for
        float32 and 1e-12 for float64; float16 and bfloat16 are computed in float32 and rounded once, at the end. Where
        the image is zero, the gradient comes back unchanged. Where the gradient is parallel to the image (the
        remainder is below 4 units of round-off of its dtype, relative to the gradient), the result is exactly zero,
        so that a following ``sign()`` does not turn round-off into a full step.

    Raises:
        ValueError: shapes, dtypes or devices differ, fewer than three dimensions, not floating point, unknown scope,
            or blocks that do not fill the images.

    Source: docs/method.md, "Projecting the gradient".

    >>> images = torch.tensor([0.5, 0.5, 0.0, 1.0]).view(1, 2, 2)
    >>> gradient = torch.tensor([1.0, 0.0, 2.0, -1.0]).view(1, 2, 2)
    >>> alignment(gradient, images).item() < -0.1
    True
    >>> abs(alignment(orthogonalize(gradient, images), images).item()) < 1e-6
    True
    """
    _check_pair("gradient", gradient, "images", images)
    dims = scope_dims(scope)
    working = torch.promote_types(gradient.dtype, torch.float32)
    g, exponent = scaled(cut(gradient, scope).to(working), dims)
    x, _ = scaled(cut(images, scope).to(working), dims)
    before, inverse = dot(g, g, dims), reciprocal(dot(x, x, dims))
    for _ in range(2):
        g = torch.addcmul(g, x, dot(g, x, dims) * inverse, value=-1)
    tolerance = 4 * torch.finfo(gradient.dtype).eps
    rest = g * (dot(g, g, dims) > tolerance**2 * before)
    return joined(times_power(rest, exponent), gradient).to(gradient.dtype)


def alignment(a: Tensor, b: Tensor, scope: Scope = "image") -> Tensor:
    """Cosine between two batches of vectors, ``⟨a, b⟩ / (‖a‖ ‖b‖)``: the honest test of orthogonality.

    Args:
        a: (..., C, H, W), any floating dtype, any scale.
        b: the same shape and device.
        scope: what counts as one vector, as in `orthogonalize`.

    Returns:
        A value in [-1, 1] per vector (see the table in the module's docstring for the shape), accumulated in float64
        and returned in the inputs' common dtype, at least float32. A zero vector has cosine 0 with everything.

    Raises:
        ValueError: shapes or devices differ, fewer than three dimensions, not floating point, unknown scope.
    """
    _check_pair("a", a, "b", b, same_dtype=False)
    dims = scope_dims(scope)
    a64, _ = scaled(cut(a, scope).double(), dims)
    b64, _ = scaled(cut(b, scope).double(), dims)
    norms = (dot(a64, a64, dims) * dot(b64, b64, dims)).sqrt()
    cosine = (dot(a64, b64, dims) * reciprocal(norms)).clamp(-1, 1).squeeze(dims)
    if (k := block_size(scope)) is not None:
        cosine = cosine.reshape(*a.shape[:-2], a.shape[-2] // k, a.shape[-1] // k)
    return cosine.to(torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32))


def orthonormal_basis(directions: Tensor) -> Tensor:
    """Orthonormalise several directions per sample by Gram-Schmidt, each direction projected twice.

    Args:
        directions: (..., K, C, H, W): K directions per sample, any floating dtype, any scale. For example
            ``torch.stack([images, torch.ones_like(images)], dim=-4)`` for the image and the brightness, or
            ``images.unsqueeze(-4) * torch.eye(3)[:, :, None, None]`` for the three channels of the image.

    Returns:
        (..., K, C, H, W), the inputs' dtype (at least float32): orthonormal vectors with the same span. A direction
        that is zero, or that depends on those before it (its remainder is below 16 units of round-off, relative to
        its length), is dropped: its row is zero, which `remove_directions` ignores.

    Raises:
        ValueError: fewer than four dimensions, or not floating point.

    Source: Giraud et al. 2005, doi:10.1007/s00211-005-0615-4.
    """
    check_tensor("directions", directions)
    if directions.ndim < 4 or not directions.dtype.is_floating_point:
        raise ValueError(
            "directions must be a floating-point tensor of shape (..., K, C, H, W); "
            f"got {tuple(directions.shape)} of {directions.dtype}"
        )
    working = torch.promote_types(directions.dtype, torch.float32)
    tolerance = 16 * torch.finfo(directions.dtype).eps
    kept: list[Tensor] = []
    for direction in directions.to(working).unbind(-4):
        vector, _ = scaled(direction, IMAGE)
        length2 = dot(vector, vector, IMAGE)
        for _ in range(2):
            for known in kept:
                vector = vector - dot(vector, known, IMAGE) * known
        rest2 = dot(vector, vector, IMAGE)
        independent = rest2 > tolerance**2 * length2
        kept.append(torch.where(independent, vector / rest2.sqrt(), 0))
    return torch.stack(kept, dim=-4)


def remove_directions(gradient: Tensor, basis: Tensor) -> Tensor:
    """Remove from each gradient its components along an orthonormal basis: ``g - Σ ⟨g, b_k⟩ b_k``.

    Args:
        gradient: (..., C, H, W), any floating dtype, finite, any scale.
        basis: (..., K, C, H, W) as `orthonormal_basis` returns it; zero rows are ignored.

    Returns:
        The projected gradient in the shape and dtype of `gradient`, exactly zero where the gradient lies in the span
        of the basis (the remainder is below 16 units of round-off, relative to the gradient).

    Raises:
        ValueError: the shapes do not match, not floating point, or the devices differ.
    """
    check_tensor("gradient", gradient)
    check_tensor("basis", basis)
    if basis.ndim < 4:
        raise ValueError(f"basis must have shape (..., K, C, H, W); got {tuple(basis.shape)}")
    for vector in basis.unbind(-4):
        _check_pair("gradient", gradient, "a direction of basis", vector, same_dtype=False)
    working = torch.promote_types(torch.promote_types(gradient.dtype, basis.dtype), torch.float32)
    g, exponent = scaled(gradient.to(working), IMAGE)
    rest = g
    for _ in range(2):
        for vector in basis.to(working).unbind(-4):
            rest = rest - dot(rest, vector, IMAGE) * vector
    tolerance = 16 * torch.finfo(gradient.dtype).eps
    inside = dot(rest, rest, IMAGE) <= tolerance**2 * dot(g, g, IMAGE)
    return times_power(torch.where(inside, 0, rest), exponent).to(gradient.dtype)


def dot(a: Tensor, b: Tensor, dims: tuple[int, ...], scratch: Tensor | None = None) -> Tensor:
    """⟨a, b⟩ per group, the summed dimensions kept."""
    return total(torch.mul(a, b, out=scratch), dims)


def total(values: Tensor, dims: tuple[int, ...]) -> Tensor:
    """The sum per group, the summed dimensions kept: rows first, then the rows' sums in float64.

    In one go, torch would share a single image among the threads but not several, in another order of summation: a
    sample's result would depend on the size of its batch.
    """
    if len(dims) == 1:
        return values.sum(dims, keepdim=True)
    return values.sum(-1, keepdim=True).sum(dims[:-1], keepdim=True, dtype=torch.float64).to(values.dtype)


def reciprocal(values: Tensor) -> Tensor:
    """1 / values, and 1 where they are zero: a zero vector then has products of zero with everything, never NaN."""
    return 1 / torch.where(values == 0, 1, values)


def scaled(vector: Tensor, dims: tuple[int, ...], out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """`vector` times a power of two per group (exact), with its largest entry in [1/2, 1), and the exponent."""
    largest = torch.maximum(vector.amax(dims, keepdim=True), -vector.amin(dims, keepdim=True))
    exponent = torch.frexp(largest).exponent
    return times_power(vector, -exponent, out), exponent


def times_power(vector: Tensor, exponent: Tensor, out: Tensor | None = None) -> Tensor:
    """`vector` times 2**exponent per group."""
    # In two factors, since 2**exponent overflows at either end of the range.
    half = exponent // 2
    two = torch.full((), 2, dtype=vector.dtype, device=vector.device)  # torch.tensor would stop a GPU
    return torch.mul(torch.mul(vector, two**half, out=out), two ** (exponent - half), out=out)


def _check_pair(name_a: str, a: Tensor, name_b: str, b: Tensor, same_dtype: bool = True) -> None:
    for name, tensor in ((name_a, a), (name_b, b)):
        check_tensor(name, tensor)
        if tensor.ndim < 3:
            raise ValueError(f"{name} must have shape (..., C, H, W); got {tuple(tensor.shape)}")
        if not tensor.dtype.is_floating_point:
            raise ValueError(f"{name} must be floating point; got {tensor.dtype}")
    if a.shape != b.shape:
        raise ValueError(f"{name_a} {tuple(a.shape)} and {name_b} {tuple(b.shape)} must have the same shape")
    if same_dtype and a.dtype != b.dtype:
        raise ValueError(f"{name_a} ({a.dtype}) and {name_b} ({b.dtype}) must have the same dtype")
    if a.device != b.device:
        raise ValueError(f"{name_a} ({a.device}) and {name_b} ({b.device}) must be on the same device")

"""Contrast: the gradient along an image is the loss's derivative by contrast, and what networks make it be."""

from __future__ import annotations

import copy
import math

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from benchmarks.study import numbers
from benchmarks.study.contrast import DIRECTIONS, central, curves, directions, lie
from benchmarks.study.gradients import loss_gradient
from benchmarks.study.training import small_network
from orthattack import Normalized
from orthattack.eval.models.load import load_classifier


def _images(seed: int, count: int = 4, size: int = 16, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.rand((count, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=dtype)


def _network(seed: int, kind) -> nn.Module:
    """A small network with statistics, scales and shifts as training leaves them."""
    torch.manual_seed(seed)
    model = small_network(5, "biases" if kind == "homogeneous" else kind).double()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1, 0.2)
            nn.init.normal_(module.bias, 0, 0.3)
            nn.init.normal_(module.running_mean, 0, 0.3)
            nn.init.uniform_(module.running_var, 0.02, 0.5)
        elif isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)
            if module.bias is not None:
                nn.init.normal_(module.bias, 0, 0.3)
        if kind == "homogeneous" and isinstance(module, nn.Conv2d | nn.Linear):
            module.bias = None
    return model.eval().requires_grad_(False)


@given(seed=st.integers(0, 10_000), shape=st.sampled_from([(1, 3, 8, 8), (3, 3, 7, 9), (2, 1, 5, 4)]))
def test_directions_are_as_long_as_the_image_and_keep_what_they_say(seed, shape):
    generator = torch.Generator().manual_seed(seed)
    images = torch.rand(shape, generator=generator, dtype=torch.float64)
    found = directions(images, generator)
    assert tuple(found) == DIRECTIONS
    length = images.flatten(1).norm(dim=1)
    for d in found.values():
        torch.testing.assert_close(d.flatten(1).norm(dim=1), length)
    assert torch.equal(found["contrast"], images)
    assert float(found["brightness"].flatten(1).std(1).max()) < 1e-12
    spectra = [torch.fft.fft2(found[name]) for name in ("pattern", "scrambled")]
    torch.testing.assert_close(spectra[0].abs(), spectra[1].abs(), atol=1e-9, rtol=1e-9)
    # The colours go together as before: the channels' cross-spectra are the same.
    for other in range(1, shape[1]):
        cross = [s[:, 0] * s[:, other].conj() for s in spectra]
        torch.testing.assert_close(cross[0], cross[1], atol=1e-9, rtol=1e-9)


def test_black_images_have_directions_of_length_zero():
    found = directions(torch.zeros(2, 3, 4, 4), torch.Generator().manual_seed(0))
    assert all(torch.equal(d, torch.zeros_like(d)) for d in found.values())


@given(seed=st.integers(0, 10_000))
def test_the_slope_along_a_direction_is_the_derivative_by_differences(seed):
    torch.manual_seed(seed)
    layers = [nn.Conv2d(3, 6, 3), nn.Tanh(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(54, 5)]  # smooth: no kinks
    model = Normalized(nn.Sequential(*layers), [0.4] * 3, [0.2] * 3).double().requires_grad_(False)
    x, y = _images(seed, size=8), torch.arange(4)
    table = lie(model, x, y, torch.Generator().manual_seed(seed))
    for name, d in directions(x, torch.Generator().manual_seed(seed)).items():
        reference = central(lambda z: nn.functional.cross_entropy(model(z), y, reduction="none"), x, d, 1e-4)
        rows = table[table["direction"] == name]
        np.testing.assert_allclose(rows["slope"], reference, rtol=1e-5, atol=1e-7)
        g = loss_gradient(model, x, y)
        assert rows["cosine"].to_numpy() == pytest.approx(
            [float(a @ b / a.norm() / b.norm()) for a, b in zip(g.flatten(1), d.flatten(1), strict=True)]
        )


@given(seed=st.integers(0, 10_000))
def test_without_biases_the_slope_along_the_image_follows_from_the_logits(seed):
    model, x, y = _network(seed, "homogeneous"), _images(seed), torch.arange(4)
    torch.testing.assert_close(model(3.5 * x), 3.5 * model(x))
    table = lie(model, x, y, torch.Generator().manual_seed(0))
    along = table[table["direction"] == "contrast"]
    np.testing.assert_allclose(along["slope"], along["homogeneous"], rtol=1e-9, atol=1e-12)


@given(seed=st.integers(0, 10_000), kind=st.sampled_from(["batch norm", "biases"]))
def test_with_biases_what_the_logits_owe_to_them_comes_off(seed, kind):
    """⟨g, x⟩ = ⟨p - y, f - β⟩, β being what the network's linear piece at x gives for the zero image."""
    model, x, y = _network(seed, kind), _images(seed), torch.arange(4)
    jacobian = torch.autograd.functional.jacobian(lambda z: model(z).sum(0), x)
    logits = model(x)
    off = logits.softmax(1) - nn.functional.one_hot(y, 5)
    beta = logits - (jacobian * x).sum((2, 3, 4)).T
    table = lie(model, x, y, torch.Generator().manual_seed(0))
    along = table[table["direction"] == "contrast"]
    np.testing.assert_allclose(along["slope"], (off * (logits - beta)).sum(1), rtol=1e-9, atol=1e-12)
    assert float(beta.abs().max()) > 1e-3  # it is no homogeneous network


@given(seed=st.integers(0, 10_000))
def test_batch_norm_computes_at_inference_what_biases_compute(seed):
    normed, plain, x = _network(seed, "batch norm"), _network(seed, "biases"), _images(seed)
    norms = [module for module in normed if isinstance(module, nn.BatchNorm2d)]
    convolutions = [[m for m in network if isinstance(m, nn.Conv2d)] for network in (normed, plain)]
    for norm, before, after in zip(norms, *convolutions, strict=True):
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        after.weight.copy_(before.weight * scale.view(-1, 1, 1, 1))
        after.bias.copy_(norm.bias - scale * norm.running_mean)
    plain[-1].load_state_dict(normed[-1].state_dict())
    torch.testing.assert_close(plain(x), normed(x))


@given(seed=st.integers(0, 10_000), factor=st.floats(0.5, 2))
def test_batch_statistics_take_the_contrast_of_a_whole_batch_away_and_fixed_ones_do_not(seed, factor):
    model, x, y = _network(seed, "batch norm"), _images(seed, size=32), torch.arange(4)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-14
    frozen = copy.deepcopy(model)
    model.train()
    torch.testing.assert_close(model(factor * x), model(x), rtol=1e-6, atol=1e-6)
    along = [(loss_gradient(m, x, y) * x).sum((1, 2, 3)) for m in (model, frozen)]
    assert abs(float(along[0].sum())) < 1e-8 * float(along[0].abs().sum())  # of the batch, not of each image
    assert float(along[0].abs().max()) > 1e-6
    assert abs(float(along[1].sum())) > 1e-6 * float(along[1].abs().sum())


def test_a_curve_passes_through_the_image_and_changes_what_it_says():
    classifier = load_classifier("cifar10-standard")
    x, y = _images(0, 2, 32, torch.float32), torch.tensor([3, 5])
    table = curves({"m": classifier}, lambda model: [(7, x, y)])
    table = table[table["position"] == 8]

    def loss(image: torch.Tensor) -> float:
        return float(nn.functional.cross_entropy(classifier.model(image[None]), y[1:]))

    def at(direction: str, shift: float) -> float:
        return float(table.loc[(table["direction"] == direction) & (table["shift"] == shift), "loss"].iloc[0])

    assert at("none", 0.0) == pytest.approx(loss(x[1]), rel=1e-4)
    assert at("contrast", -0.5) == pytest.approx(loss(0.5 * x[1]), rel=1e-4)
    shift = 0.2 * float(x[1].norm()) / math.sqrt(x[1].numel())
    assert at("brightness", 0.2) == pytest.approx(loss(x[1] + shift), rel=1e-4)


def test_a_ratio_of_medians_is_of_the_medians_and_its_interval_covers_it():
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"below": rng.uniform(1, 3, 200), "noise": rng.exponential(0.5 / math.log(2), 200)})
    table["above"], table["quarter"] = table["below"] * table["noise"], 0.25 * table["below"]
    assert numbers.ratio_of_medians(table, "quarter", "below") == pytest.approx((0.25, 0.25, 0.25))
    ratio, low, high = numbers.ratio_of_medians(table, "above", "below")
    assert ratio == pytest.approx(table["above"].median() / table["below"].median())
    assert low < 0.5 < high


def test_the_gap_to_the_numerical_derivative_is_in_units_of_a_random_slope():
    table = pd.DataFrame(
        {"slope": [0.2, 1.0], "cosine": [0.1, 0.5], "random": 0.05, "exact": [0.2, 1.0], "numeric": [0.21, np.nan]}
    )
    assert numbers.derivative_gap(table) == pytest.approx(0.01 / (2 * 0.05))  # the row without it does not count
    assert math.isnan(numbers.derivative_gap(pd.DataFrame()))  # before it is measured

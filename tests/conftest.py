"""Fixtures and input strategies that all tests share."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

# The `ci` profile draws the same examples every time; `HYPOTHESIS_PROFILE=explore` looks for new ones.
_common = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
settings.register_profile("ci", derandomize=True, max_examples=40, **_common)
settings.register_profile("explore", max_examples=500, **_common)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

SHARED = Path(os.environ.get("ORTHATTACK_SHARED", Path(__file__).parents[2] / "shared"))

IMAGE_KINDS = ["uniform", "8-bit", "saturated", "mixed", "dark", "sparse", "constant", "black", "white"]
GRADIENT_KINDS = ["normal", "heavy", "sparse", "nearly parallel", "parallel", "zero", "one-sided"]


def make_images(kind: str, shape: tuple[int, ...], seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Images in [0, 1], of the kinds on which attacks go wrong."""
    x = torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    images = {
        "uniform": x,
        "8-bit": (x * 255).round() / 255,
        "saturated": (x > 0.5).double(),
        "mixed": (3 * x - 1).clamp(0, 1),
        "dark": 1e-3 * x,
        "sparse": x * (x > 0.95),
        "constant": torch.full_like(x, 0.3),
        "black": torch.zeros_like(x),
        "white": torch.ones_like(x),
    }[kind]
    return images.to(dtype)


def make_gradient(kind: str, images: Tensor, seed: int, scale: float = 1.0) -> Tensor:
    """Gradients of the images' shape and dtype, times `scale`."""
    g = torch.randn(images.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    x = images.double()
    gradient = {
        "normal": g,
        "heavy": g**5,
        "sparse": g * (g > 2),
        "nearly parallel": x + 1e-4 * g,
        "parallel": 0.37 * x,
        "zero": torch.zeros_like(g),
        "one-sided": g.abs(),
    }[kind]
    return (scale * gradient).to(images.dtype)


image_kinds = st.sampled_from(IMAGE_KINDS)
gradient_kinds = st.sampled_from(GRADIENT_KINDS)
seeds = st.integers(0, 2**31 - 1)
scopes = st.sampled_from(["image", "channel", "pixel"])


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real photographs and trained models beside the checkout; skips without it."""
    if not SHARED.is_dir():
        pytest.skip(f"needs the shared data and weights in {SHARED}")
    return SHARED


@pytest.fixture(scope="session")
def browser() -> Iterator[Any]:
    """A headless Chromium; skips without one."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="needs the playwright package")
    names = ("chromium", "chromium-browser", "google-chrome")
    found = next((path for name in names if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"needs a browser: none of {', '.join(names)} is installed")
    quiet = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=quiet)
        yield browser
        browser.close()

"""What all tests share: the two lanes, the tests of extras, fixtures and input strategies.

The fast lane is everything but what is slow; `--runslow` adds that. Slow is what is marked so, what needs a browser or
the built site, all cases of a test of many parameters but those that show every pair of values (with the mark `heavy`,
every value), and whatever lies in a file of `SLOW_FILES`.
"""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch starts: workers share the cores, and so do the processes they start

import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch import Tensor

from orthattack.attacks import base

torch.set_num_threads(1)
if not torch.cuda.is_available():  # where Triton has no other way to run kernels; it reads this when it is imported
    os.environ["TRITON_INTERPRET"] = "1"

# Both lanes draw the same examples every time; `HYPOTHESIS_PROFILE=explore` looks for new ones.
_common = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}
settings.register_profile("fast", derandomize=True, max_examples=10, **_common)
settings.register_profile("full", derandomize=True, max_examples=40, **_common)
settings.register_profile("explore", max_examples=500, **_common)

# Scripts that a test runs: looking for doctests in them would run them too, in every worker.
collect_ignore = ["first_hour"]
# Whole files of tests that start processes, and those of Ray.
SLOW_FILES = ("faults/test_processes.py", "faults/test_ray.py", "test_site.py")
SLOW_FIXTURES = {"browser", "site"}


def examples(full: int) -> settings:
    """So many examples in the full profile, and in proportion in the others."""
    return settings(max_examples=max(1, full * settings().max_examples // 40))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--runslow", action="store_true", help="run the slow tests as well, and 40 examples, not 10")


def pytest_configure(config: pytest.Config) -> None:
    lane = "full" if config.getoption("runslow") else "fast"
    settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", lane))


@pytest.hookimpl(optionalhook=True)  # of xdist
def pytest_xdist_auto_num_workers() -> int:
    """The cores that are ours, by affinity and quota, but at most eight: each worker loads torch."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = Path("/sys/fs/cgroup/cpu.max")
    if quota.is_file() and (limit := quota.read_text().split())[0] != "max":
        count = min(count, max(1, int(limit[0]) // int(limit[1])))
    return min(count, 8)


# What is another attack with other defaults, or the plain form of one: in the fast lane OrthoDIFGSM, OrthoVMIFGSM,
# OrthoNES, OrthoSigmaZero and OrthoSparseRS stand for these, but in their own files. HopSkipJump asks so often that it
# is tested there alone.
RELATIVES = {
    "DIFGSM",
    "VMIFGSM",
    "TIFGSM",
    "SINIFGSM",
    "VNIFGSM",
    "OrthoTIFGSM",
    "OrthoSINIFGSM",
    "OrthoVNIFGSM",
    "NES",
    "SigmaZero",
    "SparseRS",
    "HopSkipJump",
    "OrthoHopSkipJump",
}
OWN_FILES = ("test_transfer.py", "test_nes.py", "test_sparse.py", "test_hop_skip_jump.py", "test_torchattacks.py")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    cases: dict[Any, list[pytest.Item]] = defaultdict(list)
    for item in items:
        code = getattr(getattr(item, "function", None), "__code__", None)  # doctests have none
        if code is not None and "importorskip" in code.co_names:
            item.add_marker("extra")
        if item.path.is_relative_to(here) and item.path.relative_to(here).as_posix() in SLOW_FILES:
            item.add_marker("slow")
        if SLOW_FIXTURES & set(getattr(item, "fixturenames", ())):
            item.add_marker("slow")
        named = {
            value for value in getattr(getattr(item, "callspec", None), "params", {}).values() if type(value) is str
        }
        if named & RELATIVES and item.path.name not in OWN_FILES:
            item.add_marker("slow")
        if hasattr(item, "callspec") and not item.get_closest_marker("slow"):
            cases[item.parent, getattr(item, "originalname", item.name)].append(item)
    for group in cases.values():
        for item in beyond(group, 1 if group[0].get_closest_marker("heavy") else 2):
            item.add_marker("slow")
    # Ray's wait for each other, so they begin, all with one worker: those that are left take from the others' ends.
    items.sort(key=lambda item: item.path.name != "test_ray.py")
    # Whoever names a file or a test means it.
    if config.getoption("runslow") or all("::" in name or name.endswith(".py") for name in config.args):
        return
    slow = [item for item in items if item.get_closest_marker("slow")]
    if slow:
        config.hook.pytest_deselected(items=slow)
        items[:] = [item for item in items if not item.get_closest_marker("slow")]


def beyond(group: list[Any], size: int) -> list[Any]:
    """The cases of one test without which the others still show every `size` values that occur together."""
    if len(group[0].callspec.params) < 2:
        return []
    values = {item: [(name, id(value)) for name, value in sorted(item.callspec.params.items())] for item in group}
    shown = {item: set(combinations(values[item], size)) for item in group}
    missing = set().union(*shown.values())
    left = list(group)
    while missing:
        best = max(left, key=lambda item: len(shown[item] & missing))  # the first of the best
        missing -= shown[best]
        left.remove(best)
    return left


@pytest.fixture(scope="session")
def once(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Callable[[Path], object]], Path]:
    """once(name, build): the folder that `build` has filled, built by the first worker that asks for it."""
    parallel = "PYTEST_XDIST_WORKER" in os.environ
    base = tmp_path_factory.getbasetemp().parent if parallel else tmp_path_factory.getbasetemp()

    def made(name: str, build: Callable[[Path], object]) -> Path:
        folder, done = base / f"once-{name}", base / f"once-{name}.done"
        with FileLock(base / f"once-{name}.lock"):
            if not done.exists():
                build(folder)
                done.touch()
        return folder

    return made


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
    """The folder of real images and trained models beside the checkout; skips without it."""
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


@pytest.fixture
def bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """A processor that has arithmetic for bfloat16, as far as attacks know."""
    monkeypatch.setattr(base, "has_bfloat16", lambda _: True)

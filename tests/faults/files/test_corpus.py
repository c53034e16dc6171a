"""The fuzzer's seeds and what it has found, once more: each is a value or the error that is meant for people."""

from __future__ import annotations

import importlib.util
import time
import warnings
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[3] / "scripts" / "fuzz.py"
CORPUS = Path(__file__).parents[1] / "corpus"
FILES = sorted(path for path in CORPUS.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def fuzz():
    specification = importlib.util.spec_from_file_location("fuzz", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def test_every_target_has_seeds(fuzz):
    assert {path.parent.name for path in FILES} == set(fuzz.TARGETS)
    assert sum(path.stat().st_size for path in FILES) < 100_000


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_seed_is_a_value_or_a_message(fuzz, path, tmp_path):
    run = fuzz.TARGETS[path.parent.name](tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        start = time.process_time()
        run(path.read_bytes())
        assert time.process_time() - start < fuzz.SLOW

"""Where the random numbers of attacks come from: a seed per image, of run, image and attack alone."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch

from orthattack.eval.attacks.kind import AttackKind


def image_seed(seed: int, image: str, attack: AttackKind) -> int:
    """The seed of one image's random numbers: it depends on nothing but the run's seed, the image and the attack."""
    digest = hashlib.sha256(json.dumps([seed, image, attack.identity]).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def joint_seed(seeds: Sequence[int]) -> int:
    """One seed for a batch, for attacks that draw for all its images at once."""
    digest = hashlib.sha256(json.dumps(list(seeds)).encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@contextmanager
def drawing(seed: int) -> Iterator[None]:
    """The global random numbers of torch, NumPy and Python start at `seed`, and are then put back."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_available() else []
    before = np.random.get_state(), random.getstate()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        np.random.seed(seed % 2**32)
        random.seed(seed)
        try:
            yield
        finally:
            np.random.set_state(before[0])
            random.setstate(before[1])

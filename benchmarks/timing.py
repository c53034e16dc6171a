"""The one timer of all benchmarks: candidates in turn, round by round (A B C A B C ...), and their peak memory."""

from __future__ import annotations

import ctypes
import gc
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

__all__ = ["DEVICE", "peak_memory", "seconds", "side_by_side"]

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def seconds(run: Callable[[], object]) -> float:
    """How long a run takes, the device's work included."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def side_by_side(
    candidates: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 1
) -> dict[str, list[float]]:
    """Seconds of each candidate in each round. What slows the machine for a while slows them all.

    Args:
        candidates: what is compared.
        rounds: how often each runs and is timed.
        warm_up: how often before that.
    """
    found: dict[str, list[float]] = {name: [] for name in candidates}
    for k in range(warm_up + rounds):
        for name, run in candidates.items():
            taken = seconds(run)
            if k >= warm_up:
                found[name].append(taken)
    return found


def peak_memory(run: Callable[[], object]) -> float:
    """Megabytes that a run needs beyond what was there before it."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)
    ctypes.CDLL(None).malloc_trim(0)  # what earlier runs freed would hide what this one needs
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # sets the peak to what is resident now
    before = _resident("VmRSS")
    run()
    return round((_resident("VmHWM") - before) / 1e3, 1)


def _resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return int(found[1])

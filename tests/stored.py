"""What a run has stored, and whether two runs stored the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pandas as pd


def contents(run: Path) -> dict[str, Any]:
    """Every stored row, but for the one column that time changes, and every stored image."""
    rows: dict[str, Any] = {
        str(path.relative_to(run)): pd.read_parquet(path).drop(columns="seconds", errors="ignore")
        for path in sorted(run.rglob("*.parquet"))
    }
    return rows | {str(path.relative_to(run)): path.read_bytes() for path in sorted(run.rglob("*.safetensors"))}


def assert_same(one: dict[str, Any], two: dict[str, Any]) -> None:
    """The same files with the same rows and images, bit for bit."""
    assert one.keys() == two.keys()
    for name, content in one.items():
        if isinstance(content, pd.DataFrame):
            pd.testing.assert_frame_equal(content, two[name], check_exact=True, obj=name)
        else:
            assert content == two[name], name


def seconds(run: Path) -> dict[tuple[str, ...], float]:
    """What differs from one computation to the next: by model, attack, radius and image, the time it took."""
    found = {}
    for folder in sorted({path.parent for path in run.glob("shards/*/*/*/*.parquet")}):
        frame = pd.concat([pd.read_parquet(path) for path in folder.glob("*.parquet")])
        for position, took in zip(frame["position"], frame["seconds"].fillna(-1), strict=True):
            found[(*folder.parts[-3:], str(position))] = float(took)
    return found

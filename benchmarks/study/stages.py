"""The study's stages by name, and the folder in which their results are kept."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd

from benchmarks.study.contrast import contrast, sensitivity, slopes
from benchmarks.study.cost import cost, smallest
from benchmarks.study.gradients import depth, gradients
from benchmarks.study.panel import Group, Study
from benchmarks.study.pictures import likeness, transfer
from benchmarks.study.training import BASE, scratch, tuning, twins
from orthattack.eval.errors import EvaluationError
from orthattack.eval.suite import differences

__all__ = ["TRAINED", "Store", "stages"]

TRAINED = ("scratch", "twins", "tuning")
"""The stages that train, or look at what was trained: of the group with the model that they begin with."""


def stages(study: Study) -> dict[str, Callable[[], pd.DataFrame]]:
    """What there is to do, in order: the name of each result, and what computes it."""
    per_group: dict[str, Callable[[Study, Group], pd.DataFrame]] = {
        "gradients": gradients,
        "slopes": slopes,
        "contrast": contrast,
        "sensitivity": sensitivity,
        "depth": depth,
        "scratch": scratch,
        "twins": twins,
        "cost": cost,
        "smallest": smallest,
        "likeness": likeness,
        "transfer": transfer,
        "tuning": tuning,
    }
    return {
        f"{name}-{group.key}": partial(stage, study, group)
        for name, stage in per_group.items()
        for group in study.groups
        if name in group.images or (name in TRAINED and study.train is not None and BASE in group.models)
    }


class Store:
    """A folder with a Parquet file per finished stage, and study.json, which says how they came about."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __contains__(self, name: str) -> bool:
        return self._path(name).exists()

    def about(self) -> dict[str, Any]:
        """Settings, and per stage its versions and CPU seconds."""
        try:
            found: dict[str, Any] = json.loads((self.folder / "study.json").read_text(encoding="utf-8"))
        except FileNotFoundError as error:
            raise EvaluationError(f"{self.folder} holds no study: there is no study.json") from error
        return found

    def begin(self, settings: dict[str, Any]) -> None:
        """Note the settings; refuse a folder that was begun with others."""
        settings = json.loads(json.dumps(settings))
        if (self.folder / "study.json").exists():
            lines = differences(self.about()["settings"], settings)
            if lines:
                raise EvaluationError(f"{self.folder} holds another study: {'; '.join(lines)}; give another --out")
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        about = {"settings": settings, "machine": platform.machine(), "versions": {}, "cpu_seconds": {}}
        self._replace("study.json", lambda path: path.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8"))

    def write(self, name: str, table: pd.DataFrame, seconds: float) -> None:
        """Keep the result of a stage: whole, or not at all."""
        self._replace(f"{name}.parquet", lambda path: table.to_parquet(path, index=False, compression="zstd"))
        about = self.about()
        about["cpu_seconds"][name] = round(seconds, 1)
        about["versions"][name] = " ".join(f"{package} {version(package)}" for package in ("orthattack", "torch"))
        self._replace("study.json", lambda path: path.write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8"))

    def read(self, stage: str) -> pd.DataFrame:
        """The results of a stage, all groups in one table, in their order; empty if there are none yet."""
        keys = [group["key"] for group in self.about()["settings"].get("groups", ())]
        paths = [self._path(f"{stage}-{key}") for key in keys] or sorted(self.folder.glob(f"{stage}-*.parquet"))
        return pd.concat(
            [pd.read_parquet(path) for path in paths if path.exists()] or [pd.DataFrame()], ignore_index=True
        )

    def _path(self, name: str) -> Path:
        return self.folder / f"{name}.parquet"

    def _replace(self, name: str, write: Callable[[Path], Any]) -> None:
        partial_path = self.folder / (name + ".partial")
        write(partial_path)
        partial_path.replace(self.folder / name)

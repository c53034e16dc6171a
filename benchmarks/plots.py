"""The plots of docs/performance.md."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import matplotlib as mpl

from benchmarks.stored import Row, by_machine, medians

mpl.use("svg")
mpl.rcParams["svg.hashsalt"] = "orthattack"
import matplotlib.pyplot as plt  # noqa: E402 -- after its backend is chosen


def draw(folder: Path, figures: Path) -> None:
    """Draw what is stored in `folder` into `figures`."""
    _steps(folder, figures)
    _growth(folder, figures)


def _save(figure: Any, path: Path) -> None:
    figure.savefig(path, metadata={"Date": None}, facecolor="white", bbox_inches="tight")
    plt.close(figure)


def _steps(folder: Path, figures: Path) -> None:
    for machine, contents in by_machine(folder, "steps").items():
        first: dict[tuple[str, int], list[Row]] = {}
        # Of several numbers of steps, the fewest.
        for rows in sorted((list(content.rows) for content in contents), key=lambda rows: int(rows[0]["steps"])):
            first.setdefault((rows[0]["model"], rows[0]["batch"]), rows)
        models = sorted({model for model, _ in first})
        batches = sorted({batch for _, batch in first})
        times = {at: medians(rows) for at, rows in first.items()}
        usual = len(times) / 2  # what few tables have, early stop for one, is left to them
        shown = [n for n in max(times.values(), key=len) if sum(n in middle for middle in times.values()) > usual]
        height = 0.4 + 0.19 * len(shown) * len(models)
        figure, axes = plt.subplots(
            len(models), len(batches), figsize=(2.3 * len(batches) + 2, height), sharex=True, sharey=True, squeeze=False
        )
        colours = [
            "#bbbbbb" if "Foolbox" in n or "torch" in n else "#555555" if "bare" in n else "#0072b2" for n in shown
        ]
        for row, model in enumerate(models):
            for axis, batch in zip(axes[row], batches, strict=True):
                axis.set_title(f"{model}, batch {batch}", fontsize=8)
                axis.tick_params(labelsize=7)
                middle = times.get((model, batch))
                if middle is None:
                    axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", fontsize=7)
                else:
                    axis.axvline(1, color="black", linewidth=0.8)
                    widths = [middle.get(n, float("nan")) / middle["bare step"] for n in shown]
                    axis.barh(range(len(shown)), widths, color=colours)
        for axis in axes[-1]:
            axis.set_xlabel("time of the bare step", fontsize=8)
        axes[0][0].set_yticks(range(len(shown)), shown)
        axes[0][0].invert_yaxis()
        figure.tight_layout(pad=0.4)
        _save(figure, figures / f"performance-steps-{machine}.svg")


def _growth(folder: Path, figures: Path) -> None:
    growth = next(iter(by_machine(folder, "growth").values()), None)
    if growth is not None:
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
        rows = list(growth[0].rows)
        names = dict.fromkeys(row["candidate"] for row in rows if row["against"] == "size")
        for name, colour in zip(names, ("#999999", "#000000", "#e69f00", "#0072b2"), strict=True):
            points = [
                (row["x"], statistics.median(row["ms"]))
                for row in rows
                if row["against"] == "size" and row["candidate"] == name
            ]
            left.loglog(*zip(*points, strict=True), marker="o", markersize=3, color=colour, label=name)
        left.set_xticks([64, 128, 224, 512], ["64", "128", "224", "512"])
        left.set_yticks([20, 50, 100, 200, 500], ["20", "50", "100", "200", "500"])
        left.minorticks_off()
        left.set_xlabel("pixels along a side (ResNet-18, batch 2)", fontsize=8)
        left.set_ylabel("ms per image and step", fontsize=8)
        left.legend(fontsize=7)
        points = [(row["x"], statistics.median(row["seconds"])) for row in rows if row["against"] == "count"]
        right.loglog(*zip(*points, strict=True), marker="o", markersize=3, color="#0072b2")
        right.set_xlabel("images of 32x32 in one call (batches of 50, 3 steps)", fontsize=8)
        right.set_ylabel("seconds", fontsize=8)
        for axis in (left, right):
            axis.tick_params(labelsize=8)
        figure.tight_layout()
        _save(figure, figures / "performance-growth.svg")

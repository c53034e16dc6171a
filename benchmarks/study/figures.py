"""The study's figures, for print: white background, colours that colour-blind readers tell apart, text as text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from benchmarks.study.cost import AGAIN, SCOPES
from benchmarks.study.gradients import random_cosine
from benchmarks.study.numbers import Read, in_units, interval_of_mean, paired, ratio_of_smallest

__all__ = ["FIGURES", "draw"]

# Okabe and Ito's palette, which is safe for the common kinds of colour blindness; lines differ in dashes too.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
DASHES: list[Any] = ["-", (0, (5, 2)), (0, (1.5, 1.5)), (0, (6, 2, 1.5, 2))]
MARKERS = "osD^v<>"
SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "orthattack",
    "font.family": "sans-serif",
    "font.sans-serif": ["Helvetica", "Arial", "DejaVu Sans"],
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8,
}
SHARES = np.linspace(0, 1, 101)
CHANGES = {
    "contrast": "contrast",
    "brightness": "brightness",
    "scrambled": "noise with the image's spectrum",
    "noise": "white noise",
}
PANELS = {
    "lite0": "EfficientNet-lite0",
    "lite1": "EfficientNet-lite1",
    "lite2": "EfficientNet-lite2",
    "tiny-standard": "ResNet-18, standard",
    "cifar10-standard": "RegNet, standard",
    "batch norm": "small, batch norm",
    "tiny-robust": "ResNet-18, robust",
    "cifar10-robust": "RegNet, robust",
    "biases": "small, biases instead",
}


def alignment(read: Read) -> Figure:
    """How |cos(g, x)| is distributed over the images, in units of a random direction's mean."""
    table = in_units(read("slopes"))
    models = [model for model in table["model"].unique() if "Foolbox" not in model]
    figure = Figure(figsize=(6.3, 3.3), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    for ax, direction in ((axes[0], "contrast"), (axes[1], "another image")):
        rows = table[table["direction"] == direction]
        for k, model in enumerate(models):
            sizes = rows.loc[rows["model"] == model, "size"]
            style: dict[str, Any] = {"color": COLOURS[k], "linestyle": DASHES[k % 4], "linewidth": 1.4}
            ax.plot(np.quantile(sizes, SHARES), SHARES, label=model, **style)
        noise = table.loc[table["direction"] == "noise", "size"]
        ax.plot(np.quantile(noise, SHARES), SHARES, color="0.6", linewidth=1, label="g and white noise")
        title = "gradient and its image" if direction == "contrast" else "gradient and another image"
        ax.set(xscale="log", xlim=(1e-2, 50), ylim=(0, 1), xlabel="|cos|, random direction = 1", title=title)
        ax.title.set_size(9)
    axes[0].set_ylabel("share of the images below")
    _legend(figure, axes[0])
    return figure


def contrast(read: Read) -> Figure:
    """The loss along changes of the same length: contrast, brightness, noise with the image's spectrum, white noise."""
    table = pd.concat([read("contrast").assign(seed=np.nan), read("twins")], ignore_index=True)
    models = [model for model in PANELS if (table["model"] == model).any()]
    figure, axes = _panels(len(models), 2 if len(models) == 4 else 3, 1.9, 0.5)
    for ax in axes.flat[len(models) :]:
        ax.set_axis_off()
    for ax, model in zip(axes.flat, models, strict=False):
        part = table[table["model"] == model]
        for k, (direction, label) in enumerate(CHANGES.items()):
            index = ["seed", "position"] if part["seed"].notna().any() else ["position"]
            loss = part[part["direction"].isin([direction, "none"])].pivot(index=index, columns="shift", values="loss")
            shifts = sorted(loss.columns)
            mean, low, high = np.array([interval_of_mean(loss[t] - loss[0.0]) for t in shifts]).T
            ax.fill_between(shifts, low, high, color=COLOURS[k], alpha=0.15, linewidth=0)
            ax.plot(shifts, mean, color=COLOURS[k], linestyle=DASHES[k], linewidth=1.4, label=label)
        ax.set_title(PANELS[model], size=9)
        ax.set_xticks([-0.5, 0, 0.5], ["−0.5", "0", "0.5"])
    return _labelled(figure, axes, "t", "L(x + td) − L(x)")


def sensitivity(read: Read) -> Figure:
    """How much each block answers to a relative change of contrast, and of others of the same length."""
    table = read("sensitivity")
    models = list(table["model"].unique())
    figure, axes = _panels(len(models), 2 if len(models) == 4 else 3, 1.9, 0.5)
    for ax in axes.flat[len(models) :]:
        ax.set_axis_off()
    for ax, model in zip(axes.flat, models, strict=False):
        part = table[table["model"] == model]
        names = list(part["block"].unique())
        place = np.arange(len(names)) / (len(names) - 1)
        for k, (direction, label) in enumerate(CHANGES.items()):
            along = part[part["direction"] == direction]
            points = [interval_of_mean(along.loc[along["block"] == name, "change"]) for name in names]
            mean, low, high = np.array(points).T
            ax.errorbar(place, mean, [mean - low, high - mean], color=COLOURS[k], linestyle=DASHES[k],
                        marker=MARKERS[k], markersize=3, linewidth=1.2, label=label)  # fmt: skip
        ax.axhline(1, color="0.6", linewidth=0.8)
        ax.set(yscale="log", title=model)
        ax.set_yticks([0.2, 0.5, 1, 2, 5, 10], ["0.2", "0.5", "1", "2", "5", "10"])
        ax.minorticks_off()
        ax.title.set_size(9)
    return _labelled(figure, axes, "depth, from image to logits", "‖J d‖ / ‖f‖")


def depth(read: Read) -> Figure:
    """Mean |cos| by block, in units of a random direction's."""
    table = read("depth")
    figure = Figure(figsize=(6.3, 3.1), layout="constrained")
    axes = figure.subplots(1, 2)
    for k, (model, part) in enumerate(table.groupby("model", sort=False)):
        names = list(part["block"].unique())
        pixels = int(part.loc[part["block"] == names[0], "size"].iloc[0])
        for ax, column in ((axes[0], "forward"), (axes[1], "backward")):
            shown = [name for name in names if column == "backward" or name != "input"]
            points = []
            for name in shown:
                rows = part[part["block"] == name]
                unit = random_cosine(pixels if column == "forward" else int(rows["size"].iloc[0]))
                points.append([value / unit for value in interval_of_mean(rows[column].abs())])
            mean, low, high = np.array(points).T
            place = np.array([names.index(name) for name in shown]) / (len(names) - 1)
            ax.errorbar(place, mean, [mean - low, high - mean], color=COLOURS[k], linestyle=DASHES[k % 4],
                        marker=MARKERS[k], markersize=4, linewidth=1.2, label=model)  # fmt: skip
    for ax, title in ((axes[0], "∇ₓ⟨v, f⟩ and the image"), (axes[1], "∂loss/∂f and f itself")):
        ax.axhline(1, color="0.6", linewidth=0.8)
        ax.set(yscale="log", xlim=(-0.05, 1.05), xlabel="depth of the block f, from input to last", title=title)
        shown = [
            k * 10.0**e for e in range(-2, 3) for k in (1, 2, 5) if ax.get_ylim()[0] <= k * 10.0**e <= ax.get_ylim()[1]
        ]
        ax.set_yticks(shown, [f"{tick:g}" for tick in shown])
        ax.minorticks_off()
        ax.title.set_size(9)
    axes[0].set_ylabel("mean |cos|, random direction = 1")
    _legend(figure, axes[1])
    return figure


def cost(read: Read) -> Figure:
    """Robust accuracy under OrthoPGD less under PGD, by radius and scope, in L-infinity."""
    table = read("cost")
    table = table[table["norm"] == "linf"]
    models = list(table["model"].unique())
    figure, axes = _panels(len(models), 3 if len(models) == 3 else min(2, len(models)), 2.3, 0.3)
    series = [*((f"OrthoPGD, {scope}", scope) for scope in SCOPES), (AGAIN, "plain PGD again")]
    for ax, model in zip(axes.flat, models, strict=False):
        radii = sorted(table.loc[table["model"] == model, "eps"].unique())
        for k, (attack, label) in enumerate(series):
            points = []
            for eps in radii:
                pair = paired(table, model, "linf", eps, attack)
                low, high = pair.interval() or (math.nan, math.nan)
                points.append([100 * (pair.difference or 0), 100 * low, 100 * high])
            mean, low_, high_ = np.array(points).T
            offset = 1 + 0.035 * (k - 1.5)  # so that the bars do not hide each other
            ax.errorbar(
                255 * np.array(radii) * offset,
                mean,
                [mean - low_, high_ - mean],
                color=[*COLOURS[:3], "0.55"][k],
                linestyle=DASHES[k],
                linewidth=1.2,
                marker=MARKERS[k],
                markersize=4,
                label=label,
            )
        ax.axhline(0, color="0.6", linewidth=0.8)
        ax.set_title(model, size=9)
        ax.set_xscale("log")
        ticks = [255 * eps for eps in radii]
        ax.set_xticks(ticks, [f"{tick:.3g}" for tick in ticks])
        ax.minorticks_off()
    return _labelled(figure, axes, "ε, in 255ths", "points above PGD's")


def smallest(read: Read) -> Figure:
    """How much larger the smallest radius is that fools, by scope."""
    table = read("smallest")
    models = list(table["model"].unique())
    figure = Figure(figsize=(6.3, 0.5 * len(models) + 1.2), layout="constrained")
    ax = figure.subplots()
    for row, model in enumerate(models):
        for k, scope in enumerate(SCOPES):
            _, (mean, low, high) = ratio_of_smallest(table, model, f"OrthoPGD, {scope}")
            ax.errorbar(
                [mean],
                [row + 0.2 * (k - 1)],
                xerr=[[mean - low], [high - mean]],
                color=COLOURS[k],
                marker=MARKERS[k],
                markersize=5,
                linestyle="none",
                label=scope if row == 0 else None,
            )
    ax.axvline(1, color="0.6", linewidth=0.8)
    ax.set(yticks=range(len(models)), yticklabels=models, xscale="log", xlabel="smallest ε of OrthoPGD / of PGD")
    ax.set_xticks([1, 1.2, 1.5, 2, 2.5, 3], ["1", "1.2", "1.5", "2", "2.5", "3"])
    ax.minorticks_off()
    ax.invert_yaxis()
    _legend(figure, ax)
    return figure


FIGURES: dict[str, tuple[str, Callable[[Read], Figure]]] = {
    "alignment": ("slopes", alignment),
    "contrast": ("contrast", contrast),
    "sensitivity": ("sensitivity", sensitivity),
    "depth": ("depth", depth),
    "cost": ("cost", cost),
    "smallest": ("smallest", smallest),
}
"""Each figure of the page, the stage that it needs, and what draws it."""


def draw(name: str, read: Read, folder: Path, suffix: str = "") -> Path:
    """Draw a figure and keep it as SVG, `name` and `suffix`; the same results give the same file."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}{suffix}.svg"
    with _style():
        FIGURES[name][1](read).savefig(path, metadata={"Date": None})
    # matplotlib ends some lines with blanks, which hooks and editors take away
    path.write_text("\n".join(map(str.rstrip, path.read_text(encoding="utf-8").splitlines())) + "\n", encoding="utf-8")
    return path


def _panels(count: int, columns: int, height: float, more: float) -> tuple[Figure, Any]:
    """A figure with that many panels or more, `columns` to a row, and their axes; heights in inches, of a row and of
    what is around the rows."""
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(6.3, height * rows + more), layout="constrained")
    return figure, figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)


def _labelled(figure: Figure, axes: Any, x: str, y: str) -> Figure:
    """The figure with what its panels' outer axes show, and one legend."""
    for ax in axes[-1]:
        ax.set_xlabel(x)
    for ax in axes[:, 0]:
        ax.set_ylabel(y)
    _legend(figure, axes[0, 0])
    return figure


def _legend(figure: Figure, ax: Any) -> None:
    """One legend below all panels, where it hides nothing."""
    handles, labels = ax.get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside lower center", ncols=min(5, len(labels)), columnspacing=1.2, handlelength=1.8
    )


@contextmanager
def _style() -> Iterator[None]:
    with mpl.rc_context(SETTINGS):
        yield

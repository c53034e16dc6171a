"""Figures of a report as inline SVG, whose colours are the page's own: light and dark, chosen by its style sheet.

No name that a user gave is drawn: models and attacks are named by the page beside the figure, where text is escaped.
"""

from __future__ import annotations

import hashlib
import io
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator
from numpy.typing import NDArray

COLOURS = 8

# Colours that stand for the page's until the figure is written.
_FOREGROUND, _MUTED, _GRID = "#010101", "#020202", "#030303"
_SERIES = [f"#0a0a{number:02x}" for number in range(COLOURS)]
_VARIABLES = {_FOREGROUND: "--fg", _MUTED: "--muted", _GRID: "--line"} | {
    colour: f"--c{number}" for number, colour in enumerate(_SERIES)
}
_MARKERS = "os^Dv<>pPX"
_LINES = {"orthogonal": "", "plain": "5 2.5", "foreign": "1.5 2", "user": "7 2 1.5 2"}
_SIZE = (5.0, 3.3)  # inches: about as many points as a phone is wide, so that text keeps its size there
_MARGINS = {"left": 0.175, "right": 0.98, "bottom": 0.15, "top": 0.97}
_SETTINGS = {
    "svg.fonttype": "none",
    "svg.hashsalt": "orthattack",
    "text.parse_math": False,
    "font.size": 11,
    "axes.edgecolor": _MUTED, "axes.labelcolor": _FOREGROUND, "axes.spines.top": False, "axes.spines.right": False,
    "xtick.color": _MUTED, "xtick.labelcolor": _FOREGROUND, "ytick.color": _MUTED, "ytick.labelcolor": _FOREGROUND,
    "grid.color": _GRID, "grid.linewidth": 0.6,
}  # fmt: skip


@dataclass(frozen=True)
class Style:
    """How a series is drawn, the same in every figure."""

    number: int  # of the series, its CSS class
    colour: int  # number of its colour; an attack and its baselines share one
    dashes: str  # lengths of strokes and gaps, as in SVG; solid if empty
    marker: str  # matplotlib's letter

    @property
    def line(self) -> Any:
        """The dashes as matplotlib wants them."""
        return (0, tuple(float(part) for part in self.dashes.split())) if self.dashes else "-"


def families(attacks: Mapping[str, Mapping[str, Any]]) -> dict[str, int]:
    """A number per attack, the same for an attack and its baselines, in the order of the attacks."""
    number: dict[str, int] = {}
    count = 0
    # Attacks with baselines first: they say what belongs together.
    for label in sorted(attacks, key=lambda label: not attacks[label].get("baselines")):
        family = [label, *(attacks[label].get("baselines") or [])]
        known = [number[member] for member in family if member in number]
        if not known:
            count += 1
        for member in family:
            number.setdefault(member, known[0] if known else count - 1)
    return {label: number[label] for label in attacks}


def styles(attacks: Mapping[str, Mapping[str, Any]]) -> dict[str, Style]:
    """A style per attack: colour by family, line by kind (orthogonal, plain, foreign, a user's), marker by turn."""
    colour, found = families(attacks), {}
    for number, (label, about) in enumerate(attacks.items()):
        source = str(about.get("source", "orthattack"))
        kind = "user" if source == "user" else "foreign" if source != "orthattack" else "plain"
        kind = "orthogonal" if about.get("orthogonal") else kind
        found[label] = Style(number, colour[label] % COLOURS, _LINES[kind], _MARKERS[number % len(_MARKERS)])
    return found


def coinciding(curves: Mapping[str, pd.DataFrame]) -> list[list[str]]:
    """Attacks whose curves are one line to the eye, in groups of two or more: they differ by no more than a line's
    width at every radius that is a point of both; of a curve with many points, all are."""
    groups: list[list[str]] = []
    for attack, curve in curves.items():
        for group in groups:
            few, many = sorted((curve, curves[group[0]]), key=len)
            at = few["eps"].to_numpy()
            if not len(at) or not np.isclose(at[-1], many["eps"].iloc[-1]):
                continue
            other = np.interp(at, many["eps"], many["robust_accuracy"])
            if np.abs(other - few["robust_accuracy"].to_numpy()).max() <= _LINE_WIDTH:
                group.append(attack)
                break
        else:
            groups.append([attack])
    return [group for group in groups if len(group) > 1]


_LINE_WIDTH = 0.008  # of a figure's height: 1.5 of some 195 points


def accuracy_by_eps(
    curves: Mapping[str, pd.DataFrame],
    look: Mapping[str, Style],
    unit: tuple[float, str],
    radii: Sequence[float],
    groups: Sequence[Sequence[str]] = (),
) -> str:
    """Robust accuracy against the radius, a line with its 95 % band per attack; a curve is one of `Run.curves`. Of each
    group of curves that coincide the solid ones are drawn widest, and the others on top, so that each is seen."""
    factor, name = unit
    ordered = [sorted(group, key=lambda attack: look[attack].dashes != "") for group in groups]
    above = {attack: len(group) - 1 - k for group in ordered for k, attack in enumerate(group)}  # how many lie on it
    alike = {attack: len(group) for group in groups for attack in group}
    with _figure() as (figure, axes):
        for attack, curve in curves.items():
            style = look[attack]
            x, colour = factor * curve["eps"].to_numpy(), _SERIES[style.colour]
            group = f"series-{style.number}"
            dense = len(curve) > 50
            y, low, high = (100 * curve[column].to_numpy() for column in ("robust_accuracy", "low", "high"))
            axes.fill_between(x, low, high, color=colour, alpha=0.1 / alike.get(attack, 1), linewidth=0, gid=group)
            every = len(curve) // 6 if dense else 1
            under = min(above.get(attack, 0), 3)
            marks: dict[str, Any] = {"marker": style.marker, "markersize": 4.5 + 3.5 * under, "markevery": every}
            if under:
                marks |= {"alpha": 0.45, "markerfacecolor": "none", "markeredgewidth": 1.5}
            axes.plot(x, y, color=colour, linestyle=style.line, linewidth=1.5 + 3 * under, gid=group,
                      zorder=3 - 0.1 * under, **marks)  # fmt: skip
        _percent(axes)
        axes.set_xlabel(f"radius ε{name}")
        ticks = [0.0, *(factor * eps for eps in radii)]
        if len(ticks) > 1:
            gap = max(ticks) / 12  # ticks nearer than that would write over each other
            kept = ticks[:1]
            for tick in sorted(ticks[1:]):
                if tick - kept[-1] >= gap:
                    kept.append(tick)
            axes.xaxis.set_major_locator(FixedLocator(kept))
        axes.xaxis.set_major_formatter(FuncFormatter(_short))
        return _svg(figure, "robust accuracy against the radius, with 95 % bands")


def accuracy_by_calls(rows: pd.DataFrame, look: Mapping[str, Style]) -> str:
    """Robust accuracy against gradient calls per image, a point with its 95 % interval per attack.

    `rows`: of `Run.table`, at one radius of one model.
    """
    with _figure() as (figure, axes):
        finite = rows[
            np.isfinite(rows["gradient_calls"].astype(float)) & np.isfinite(rows["robust_accuracy"].astype(float))
        ]
        calls = finite["gradient_calls"].to_numpy(float)
        y, low, high = (100 * finite[f"robust_accuracy{end}"].to_numpy(float) for end in ("", "_low", "_high"))
        most = float(calls.max(initial=1))
        logarithmic = most > 20
        x = np.log10(1 + calls) if logarithmic else calls
        gap = 0.022 * float(x.max(initial=1))
        for k, attack in enumerate(finite["attack"]):
            style = look[attack]
            same = np.flatnonzero(np.abs(x - x[k]) < gap / 2).tolist()  # side by side, or they would hide each other
            axes.errorbar(
                [x[k] + gap * (same.index(k) - (len(same) - 1) / 2)],
                [y[k]],
                [[max(0.0, y[k] - low[k])], [max(0.0, high[k] - y[k])]],  # not below 0 by round-off
                color=_SERIES[style.colour], elinewidth=1, gid=f"series-{style.number}",
                marker=style.marker, markersize=6, markeredgewidth=1.3,
                markerfacecolor="none" if style.dashes else _SERIES[style.colour],
            )  # fmt: skip
        _percent(axes)
        if len(y):  # from the data: the points of one radius lie near each other
            bottom, top = max(0.0, low.min() - 3), min(100.0, high.max() + 3)
            axes.set_ylim(bottom - 0.02 * (top - bottom), top + 0.02 * (top - bottom))  # room for a marker on the edge
            step = next(step for step in (1, 2, 5, 10, 20) if (top - bottom) / step <= 7)
            axes.set_yticks([tick for tick in range(0, 101, step) if bottom <= tick <= top])
        ticks = [0, 1, 10, 100, 1_000, 10_000, 100_000, 1_000_000]
        if logarithmic:
            ticks = [tick for tick in ticks if tick <= 2 * most]
            axes.xaxis.set_major_locator(FixedLocator([math.log10(1 + tick) for tick in ticks]))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{10**value - 1:,.0f}"))
        else:
            axes.xaxis.set_major_formatter(FuncFormatter(_short))
        axes.set_xlim(-3 * gap, max(float(x.max(initial=1)), 1e-9) + 6 * gap)
        axes.set_xlabel("gradient calls per image" + (", logarithmic" if logarithmic else ""))
        return _svg(figure, "robust accuracy against gradient calls per image")


def cosine_histogram(cosines: NDArray[Any]) -> str:
    """How often the gradient has which cosine with the image. `cosines`: (N,), in [-1, 1]."""
    with _figure() as (figure, axes):
        reach = max(0.05, 1.05 * float(np.abs(cosines).max(initial=0)))
        axes.stairs(*np.histogram(cosines, np.linspace(-reach, reach, 42)), fill=True, color=_SERIES[0], alpha=0.8)
        axes.axvline(0, color=_MUTED, linewidth=1)
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        axes.set_xlim(-reach, reach)
        axes.xaxis.set_major_locator(MaxNLocator(4, symmetric=True))
        axes.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.set_xlabel("cos(gradient, image)")
        axes.set_ylabel("images")
        axes.xaxis.set_major_formatter(FuncFormatter(_short))
        axes.yaxis.set_major_formatter(FuncFormatter(_short))
        return _svg(figure, "histogram of the cosine of the gradient and the image")


def histogram_path(counts: NDArray[np.int64], height: float = 30.0) -> str:
    """A histogram as the data of an SVG path: one unit wide per bin, `height` high at its largest count."""
    top = int(counts.max(initial=0))
    if top == 0:
        return ""
    bars = [
        f"M{number} {height:g}V{height * (1 - count / top):.2f}h1V{height:g}z"
        for number, count in enumerate(counts.tolist())
        if count
    ]
    return "".join(bars)


@contextmanager
def _figure() -> Iterator[tuple[Figure, Axes]]:
    with mpl.rc_context(_SETTINGS):
        figure = Figure(figsize=_SIZE)  # with fixed margins: to fit them, every figure would be drawn twice
        figure.patch.set_visible(False)
        axes = figure.subplots(gridspec_kw=_MARGINS)
        axes.patch.set_visible(False)
        yield figure, axes


def _percent(axes: Axes) -> None:
    axes.set_ylim(-2, 102)
    axes.set_yticks(range(0, 101, 20))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} %"))
    axes.set_ylabel("robust accuracy")
    axes.grid(axis="y")
    axes.set_axisbelow(True)


def _short(value: float, _: int) -> str:
    return f"{value:.4g}".replace("-", "−")


def _svg(figure: Figure, title: str) -> str:
    """The figure as an element to be put into HTML, beside others like it."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")))
    text = stream.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r"<style[^>]*>.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'id="series-(\d+)"', r'class="series-\1"', text)
    # What is referred to keeps an id, its own in the whole page; the others go.
    own = hashlib.sha256(text.encode()).hexdigest()[:8]
    used = set(re.findall(r'(?:url\(#|href="#)([^)"]+)', text))
    text = re.sub(r' id="([^"]*)"', lambda m: f' id="f{own}-{m[1]}"' if m[1] in used else "", text)
    text = re.sub(r'(url\(#|href="#)', rf"\g<1>f{own}-", text)
    text = re.sub(r" font-family: [^;\"]*;", "", text)
    text = text.replace('transform="rotate(-0 ', 'transform="rotate(0 ').replace("\n", " ")
    text = re.sub(r"> +<", "><", text)
    for placeholder, variable in _VARIABLES.items():
        text = text.replace(placeholder, f"var({variable})")
    width, height = (72 * inches for inches in _SIZE)
    head = f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{title}">'
    return re.sub(r"<svg[^>]*>", head, text, count=1, flags=re.DOTALL)

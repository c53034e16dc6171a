"""What a run tells, in the terminal and as files: results.json, results.csv, results.md and report.html."""

from __future__ import annotations

import html
import json
import math
import shutil
import textwrap
from pathlib import Path
from typing import Any

import pandas as pd
from tabulate import tabulate

from orthattack.eval.report.html import NORMS, number, page, percent, points
from orthattack.eval.results.comparison import CLEAN, compared, differences
from orthattack.eval.results.outcomes import cause, defined, records
from orthattack.eval.results.rates import DEFINITIONS
from orthattack.eval.results.stored_run import WORST, Run
from orthattack.eval.storage.run_folder import RunFolder, shown_eps

__all__ = ["compare", "leaderboard_table", "markdown", "write_report"]

NOTES = (
    *DEFINITIONS.split("; "),
    f"{WORST}: an image counts as fooled if any attack at that radius fooled it, as scored if any scored it",
    "norm: mean; a minimal attack succeeds at eps where its norm is at most eps, and its norm is of the fooled images",
    "cos: between perturbation and image; grads: gradient calls per image; s: the attack's own time, in all",
)
_WIDTH = 22
_COLUMNS = 132


def write_report(run: Run, folder: RunFolder | None = None) -> list[Path | str]:
    """Write the report into the run's folder, or another; returns where its files are.

    results.json, results.csv, results.md and report.html; and, where some attacks have another norm than the run, the
    same of these with the norm in their names.
    """
    written: list[Path | str] = []
    for view in (run, *map(run.in_norm, run.other_norms)):
        name = "{}" if view is run else f"{{}}-{view.norm}"
        for stem, ending, text in (
            ("results", "json", json.dumps(as_json(view), indent=1, allow_nan=False) + "\n"),
            ("results", "csv", _for_spreadsheets(view.table()).to_csv(index=False, lineterminator="\n")),
            ("results", "md", markdown(view)),
            ("report", "html", page(view)),
        ):
            written.append((folder or run.folder).write_text(f"{name.format(stem)}.{ending}", text))
    return written


def _for_spreadsheets(table: pd.DataFrame) -> pd.DataFrame:
    """The same, with an apostrophe before names that a spreadsheet would take for a formula."""

    def inert(value: object) -> object:
        return f"'{value}" if isinstance(value, str) and value.startswith(("=", "+", "-", "@", "\t", "\r")) else value

    return table.assign(**{name: table[name].map(inert) for name in ("model", "attack") if name in table})


def leaderboard_table(run: Run) -> str:
    """A table per model, at most 132 columns wide, with what the columns mean and what to beware of below."""
    table = run.table()
    parts = [_state(run)]
    for model in run.models:
        accuracy = run.clean_accuracy(model)
        low, high = accuracy.interval() or (None, None)
        right = f"clean accuracy {_ascii(percent(accuracy.value))}{_interval(low, high)} of {accuracy.total} images"
        parts.append(f"\n{_cut(model, 60)}: {right}")
        rows = table[table["model"] == model] if len(table) else table
        parts.append(_block(run, rows))
    parts += ["", *NOTES, *(line for text in _beware(run, table) for line in _wrapped(text))]
    return "\n".join(parts)


def _state(run: Run) -> str:
    done, expected = run.progress()
    attacks = f"{len(run.attacks)} attack{'' if len(run.attacks) == 1 else 's'}"
    text = f"{attacks}, norm {run.norm}, eps {', '.join(shown_eps(eps, run.norm) for eps in run.radii)}"
    if run.status == "complete" and done == expected:
        return text
    share = f" ({100 * done / expected:.0f} %)" if expected else ""
    return f"{run.status.upper()}: {done:,} of {expected:,} results{share}; {text}"


def _block(run: Run, rows: pd.DataFrame) -> str:
    head = ["eps", "attack", "n", "robust acc. [95 %]", "success", "norm", "mean |cos|", "max |cos|", "grads", "s"]
    left_out = len(rows) > 0 and any(_left_out(row) for row in rows.to_dict("records"))
    body, last = [], None
    for row in rows.to_dict("records"):
        eps = shown_eps(defined(row["eps"]), run.norm)
        line = [
            "" if eps == last else eps,
            _cut(row["attack"], _WIDTH),
            f"{row['scored']:,}",
            percent(row["robust_accuracy"]) + _interval(row["robust_accuracy_low"], row["robust_accuracy_high"]),
            percent(row["success_rate"]),
            _norm(run, row["mean_norm"]),
            number(row["mean_abs_cosine"], ".1e"),
            number(row["max_abs_cosine"], ".1e"),
            number(row["gradient_calls"], ".4g"),
            number(row["seconds"], ".3g"),
        ]
        body.append([_ascii(cell) for cell in line] + [str(_left_out(row) or "")] * left_out)
        last = eps
    align = ("left", "left", *["right"] * (len(head) + left_out - 2))
    return tabulate(body, head + ["left out"] * left_out, tablefmt="simple", disable_numparse=True, colalign=align)


def _beware(run: Run, table: pd.DataFrame) -> list[str]:
    """Images left out and why, by cause; warnings; and trust checks that did not pass. Nothing of it is cut off."""
    # The attacks that left out so many for that cause, and the cause in full.
    who: dict[tuple[str, str, int], tuple[str, list[str]]] = {}
    for (model, attack), rows in table.groupby(["model", "attack"], sort=False) if len(table) else []:
        most: dict[str, tuple[int, str]] = {}
        for text in rows["reasons"].dropna():
            for reason, count in json.loads(text).items():  # the most at any radius
                most[cause(reason)] = max(most.get(cause(reason), (0, "")), (count, reason), key=lambda found: found[0])
        for key, (count, reason) in most.items():
            who.setdefault((str(model), key, count), (reason, []))[1].append(str(attack))
    lines = []
    for (model, _, count), (reason, attacks) in who.items():
        some = attacks[0] + (f" and {len(attacks) - 1} more" if len(attacks) > 1 else "")
        by = "every attack" if len(attacks) == len(run.attacks) else some
        lines.append(f"left out of {model} by {by}: {count} x {reason}")
    lines += [f"warning: {text}" for text in run.manifest.get("warnings") or []]
    for check in run.checks() if run.norm == run.manifest["config"]["norm"] else ():  # once, not for every norm
        if check["status"] == "warned":
            found = ": ".join(text for text in (check["figures"], check["why"]) if text)
            lines.append(f"trust check warned, {check['model']}: {check['check']}: {found}")
    return lines


def _wrapped(text: str) -> list[str]:
    """A line for the terminal, as several if it is wider."""
    columns = min(_COLUMNS, max(60, shutil.get_terminal_size((_COLUMNS, 24)).columns))
    return textwrap.wrap(
        _ascii(text), columns, subsequent_indent="    ", break_on_hyphens=False, break_long_words=False
    ) or [""]


def as_json(run: Run) -> dict[str, Any]:
    """Everything a report shows but the images, with null for what is undefined."""
    table = records(run.table())
    for row in table:
        if row["attack"] == WORST:  # has no measures of its own
            row["reasons"] = {}
        else:
            row["reasons"] = json.loads(row["reasons"])
    done, expected = run.progress()
    return {
        "format": 1,
        "status": run.status,
        "results": done,
        "expected": expected,
        "definitions": list(NOTES),
        "table": table,
        "paired": records(run.paired()),
        "optimality": records(run.optimality()),
        "per_class": [
            {"model": model, "eps": eps, "class": run.class_name(model, row["label"]), **row}
            for model in run.models
            for eps in run.radii
            for row in records(run.per_class(model, eps))
        ],
        "checks": run.checks(),
        "manifest": dict(run.manifest),
    }


def markdown(run: Run) -> str:
    """The tables for a paper or an issue. Names are escaped: they are shown, whatever they are."""
    table = run.table()
    lines = [
        f"# {_md(', '.join(run.models) or 'no model')}: adversarial robustness, {NORMS.get(run.norm, run.norm)}",
        "",
    ]
    lines += [_md(_state(run)), ""]
    for model in run.models:
        accuracy = run.clean_accuracy(model)
        low, high = accuracy.interval() or (None, None)
        clean = f"{percent(accuracy.value)}{_interval(low, high)}"
        lines += [f"## {_md(model)}", "", f"Clean accuracy {clean} of {accuracy.total} images.", ""]
        head = [
            "ε",
            "attack",
            "n",
            "robust accuracy [95 %]",
            "success [95 %]",
            "mean norm",
            "mean abs(cos)",
            "max abs(cos)",
        ]
        head += ["gradients", "not scored"]
        body = [
            [
                shown_eps(defined(row["eps"]), run.norm),
                _md(row["attack"]),
                str(row["scored"]),
                percent(row["robust_accuracy"]) + _interval(row["robust_accuracy_low"], row["robust_accuracy_high"]),
                percent(row["success_rate"]) + _interval(row["success_rate_low"], row["success_rate_high"]),
                _norm(run, row["mean_norm"]),
                number(row["mean_abs_cosine"], ".1e"),
                number(row["max_abs_cosine"], ".1e"),
                number(row["gradient_calls"], ".4g"),
                "" if row["attack"] == WORST else str(_left_out(row)),
            ]
            for row in (table[table["model"] == model] if len(table) else table).to_dict("records")
        ]
        lines += [_pipes(head, body), ""]
    paired = run.paired()
    if len(paired):
        lines += ["## Beside the baselines", "", _paired(run, paired, _pipes), ""]
    optimal = run.optimality()
    if len(optimal):
        body = [
            [
                _md(row["attack"]),
                "global" if row["model"] is None else _md(row["model"]),
                str(row["images"] or ""),
                percent(row["local"]),
            ]
            for row in records(optimal)
        ]
        lines += ["## Optimality (arXiv:2404.19460)", "", _pipes(["attack", "model", "n", "optimality"], body), ""]
    lines += [f"- {_md(note)}" for note in [*NOTES, *_beware(run, table)]]
    return "\n".join(lines) + "\n"


def compare(first: Run, second: Run, *, as_markdown: bool = False) -> str:
    """Two runs on the same images, attack by attack, and what differs in how they were made.

    Raises:
        EvaluationError: where they cannot be compared, see `compared`.
    """
    table = compared(first, second)
    wrap = _md if as_markdown else _ascii
    head = ["model", "attack", "eps", "n", "first", "second", "difference [95 %]", "only first", "only second", "p"]
    body = [
        [
            _md(row["model"]) if as_markdown else row["model"],
            _md(row["attack"]) if as_markdown else row["attack"],
            shown_eps(row["eps"], first.norm) if row["eps"] is not None or row["attack"] != CLEAN else "",
            str(row["n"]),
            percent(row["first_accuracy"]),
            percent(row["second_accuracy"]),
            _difference(row),
            str(row["first_robust_alone"]),
            str(row["second_robust_alone"]),
            number(row["p"], ".2g"),
        ]
        for row in records(table)
    ]
    alike = differences(first, second)
    notes = [
        "right images of n that both scored, matched by name and label; only: right in this run and not in the other",
        "difference: first less second, in points, Tango's score interval, 95 %; p: McNemar's exact test",
    ]
    unmatched = [
        f"{row['model']}: the runs scored {row['first_images']} and {row['second_images']} images, {row['n']} the same"
        for row in records(table)
        if row["attack"] == CLEAN and not row["first_images"] == row["second_images"] == row["n"]
    ]
    texts = [f"first: {first.folder}", f"second: {second.folder}", *notes, *unmatched]
    if as_markdown:
        parts = [*(f"- {wrap(text)}" for text in texts), "", _pipes(head, body), "", "What differs:", ""]
        parts += [f"- {wrap(text)}" for text in alike] or ["- nothing"]
    else:
        rows = [[_cut(cell, _WIDTH) if k < 2 else _ascii(cell) for k, cell in enumerate(line)] for line in body]
        align = ("left", "left", *["right"] * 8)
        parts = [tabulate(rows, head, tablefmt="simple", disable_numparse=True, colalign=align), ""]
        parts += [*map(wrap, texts), "", "what differs:"]
        parts += [f"  {line}" for text in alike or ["nothing"] for line in textwrap.wrap(_ascii(text), 128)]
    return "\n".join(parts) + ("\n" if as_markdown else "")


def _paired(run: Run, table: pd.DataFrame, form: Any) -> str:
    head = ["ε", "model", "attack", "baseline", "n", "difference [95 %], points", "only attack", "only baseline", "p"]
    body = [
        [
            shown_eps(row["eps"], run.norm),
            _md(row["model"]),
            _md(row["attack"]),
            _md(row["baseline"]),
            str(row["n"]),
            _difference(row),
            str(row["fooled_by_attack_alone"]),
            str(row["fooled_by_baseline_alone"]),
            number(row["p"], ".2g"),
        ]
        for row in records(table)
    ]
    return str(form(head, body))


def _difference(row: dict[str, Any]) -> str:
    interval = "" if row["low"] is None else f" [{points(row['low'])}, {points(row['high'])}]"
    return points(row["difference"]) + interval


def _pipes(head: list[str], body: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *body]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _md(text: str) -> str:
    """Text that Markdown shows as it is: no markup, no HTML, no end of a cell."""
    escaped = html.escape(" ".join(str(text).split()), quote=False)
    return "".join("\\" + c if c in "\\`*_[]|~$!#" else c for c in escaped)


def _left_out(row: dict[Any, Any]) -> int:
    return sum(0 if math.isnan(row[k]) else int(row[k]) for k in ("error", "unreadable", "invalid"))


def _norm(run: Run, value: float | None) -> str:
    return "–" if value is None or math.isnan(value) else shown_eps(value, run.norm)


def _interval(low: float | None, high: float | None) -> str:
    return "" if low is None or high is None or math.isnan(low) else f" [{100 * low:.1f}, {100 * high:.1f}]"


def _ascii(text: str) -> str:
    """`text` on one line in ASCII, whatever characters a name may hold and a terminal may lack."""
    plain = str(text).replace("–", "-").replace("−", "-")
    return "".join(c if c.isprintable() and c.isascii() else ascii(c)[1:-1] for c in plain)


def _cut(text: str, width: int = _WIDTH) -> str:
    plain = _ascii(text)
    return plain if len(plain) <= width else plain[: width - 2] + ".."

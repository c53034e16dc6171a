"""The tables of a report: which columns each has and how its numbers are written, for terminal, Markdown and page."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, islice
from operator import itemgetter
from typing import Any

import pandas as pd

from orthattack.eval.results.comparison import CLEAN
from orthattack.eval.results.outcomes import records
from orthattack.eval.results.stored_run import WORST, Run
from orthattack.eval.storage.run_folder import shown_eps

UNDEFINED = "–"
NORMS = {"linf": "L∞", "l2": "L2", "l1": "L1", "l0": "L0"}
Row = Mapping[str, Any]


def percent(value: float | None) -> str:
    """A share as people write it."""
    return UNDEFINED if value is None or math.isnan(value) else f"{100 * value:.1f} %"


def points(value: float | None) -> str:
    """A difference of shares, in points, with its sign."""
    return UNDEFINED if value is None or math.isnan(value) else f"{100 * value:+.1f}".replace("-", "−")


def number(form: str, value: float | None) -> str:
    """Any other number."""
    if value is None or math.isnan(value):
        return UNDEFINED
    mantissa, e, exponent = f"{value:{form}}".partition("e")
    return (mantissa + (f"e{int(exponent)}" if e else "")).replace("-", "−")


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def _norm(norm: str, value: float | None) -> str:
    return UNDEFINED if value is None else shown_eps(value, norm)


@dataclass(frozen=True)
class Column:
    """A column: the number, or name, at `key` of each row, and its 95 % interval where it has one."""

    head: str
    key: str
    show: Callable[[Any], str] = str
    ends: tuple[str, str] = ("", "")  # keys of the interval
    title: str = ""  # what the page adds to its head
    first: str = "ascending"  # how the page sorts by it at first
    of: str = ""  # key of a count that stands behind the number, in brackets

    @property
    def is_name(self) -> bool:
        """Whether it holds text that somebody chose."""
        return self.key in ("model", "attack", "baseline", "source", "target", "class", "taken_for")

    def interval(self, row: Row) -> str:
        """The interval, "" where there is none."""
        low, high = (row.get(end) for end in self.ends)
        return "" if low is None else "[{}, {}]".format(*(self.show(end).removesuffix(" %") for end in (low, high)))

    def text(self, row: Row) -> str:
        """Without the interval."""
        value = row[self.key]
        return self.show(value) + (f" ({row[self.of]:,.0f})" if self.of and value is not None else "")

    def cell(self, row: Row) -> str:
        """All of it as text."""
        return f"{self.text(row)} {self.interval(row)}".rstrip()


def share(head: str, key: str) -> Column:
    """A column of shares, as `outcomes.rate_columns` has them."""
    return Column(head, key, percent, (f"{key}_low", f"{key}_high"))


MODEL, ATTACK, N = Column("model", "model"), Column("attack", "attack"), Column("n", "n", _count, first="descending")
P = Column("p", "p", partial(number, ".2g"))
DIFFERENCE = Column("difference [95 %]", "difference", points, ("low", "high"))
SUCCESS = share("success [95 %]", "success_rate")


def leaderboard(norm: str, rows: Iterable[Row]) -> dict[str, Column]:
    """The columns of the leaderboard, by key; that of queries where a row has any."""
    small = partial(number, ".1e")
    columns = [
        ATTACK, MODEL,
        share("robust accuracy [95 %]", "robust_accuracy"),
        Column("n", "scored", _count, title="images scored", first="descending"),
        Column("not scored", "left_out", _count, first="descending"), _eps(norm),
        Column("success", "success_rate", percent, first="descending"),
        Column("queries (n)", "median_queries", partial(number, ".5g"), of="fooled",
               title="evaluations of the model until the first success, median of the n fooled images"),
        Column("norm", "mean_norm", partial(_norm, norm), title="mean norm of the perturbation"),
        Column("mean |cos|", "mean_abs_cosine", small), Column("max |cos|", "max_abs_cosine", small),
        Column("grads", "gradient_calls", partial(number, ".4g"), title="gradient calls per image"),
        Column("s", "seconds", partial(number, ".3g"), title="seconds, in all"),
    ]  # fmt: skip
    queries = _have_queries(rows)
    return {column.key: column for column in columns if queries or column.key != "median_queries"}


def _have_queries(rows: Iterable[Row]) -> bool:
    return any(row.get("median_queries") is not None for row in rows)


def paired(norm: str) -> dict[str, Column]:
    """The columns of attacks beside their baselines, by key."""
    columns = [
        ATTACK, Column("baseline", "baseline"), DIFFERENCE, MODEL, P, N, _eps(norm),
        Column("attack's", "attack_accuracy", percent), Column("baseline's", "baseline_accuracy", percent),
        *(Column(f"only {who}", f"fooled_by_{who}_alone", str, title=f"images that the {who} alone fooled",
                 first="descending")
          for who in ("attack", "baseline")),
    ]  # fmt: skip
    return {column.key: column for column in columns}


_RUNS = ("first", "second")
COMPARED = [
    MODEL, ATTACK, Column("eps", "shown_eps"), N, *(Column(run, f"{run}_accuracy", percent) for run in _RUNS),
    DIFFERENCE, *(Column(f"only {run}", f"{run}_robust_alone") for run in _RUNS), P,
]  # fmt: skip
TAKEN = [
    ATTACK, MODEL, Column("ε", "shown_eps"), Column("class", "class"), Column("taken for", "taken_for"),
    *(Column(head, key, _count, first="descending") for head, key in (("images", "images"), ("successes", "success"))),
]  # fmt: skip
TRANSFER = [ATTACK, Column("eps", "shown_eps"), Column("source", "source"), Column("target", "target"), N, SUCCESS]
DETECTION = [
    ATTACK, MODEL, Column("eps", "shown_eps"), Column("FPR", "false_positive_rate", percent), N,
    Column("fooled", "fooled", _count, first="descending"),
    share("detected [95 %]", "detected_share"), share("evaded [95 %]", "evaded_share"),
]  # fmt: skip
OPTIMALITY = [ATTACK, MODEL, Column("n", "images", _count), Column("optimality", "local", percent)]


def _eps(norm: str) -> Column:
    return Column("ε", "eps", partial(shown_eps, norm=norm))


def leaderboard_rows(run: Run) -> list[dict[str, Any]]:
    """The rows of `Run.table`, with ``left_out``, how many images were not scored, and why (``reasons``)."""
    rows = records(run.table())
    for row in rows:
        row["reasons"] = json.loads(row["reasons"]) if row["attack"] != WORST else {}
        counts = [row[status] for status in ("error", "unreadable", "invalid")]
        row["left_out"] = None if row["attack"] == WORST else sum(map(int, filter(None, counts)))
    return rows


def optimality_rows(run: Run) -> list[dict[str, Any]]:
    """The rows of `Run.optimality`; the mean over the models is called global."""
    return [{**row, "model": row["model"] or "global"} for row in records(run.optimality())]


def taken_rows(run: Run, most: int) -> list[dict[str, Any]]:
    """What attacked images are taken for, see `Run.confusion`, by model, radius and attack: the `most` frequent."""
    return [
        {"model": model, "eps": eps, "shown_eps": shown_eps(eps, run.norm), **row,
         "class": run.class_name(model, row["label"]), "taken_for": run.class_name(model, row["prediction"])}
        for model in run.models
        for eps in run.radii
        for _, rows in groupby(run.cell(model, eps).confusion, itemgetter("attack"))
        for row in islice(rows, most)
    ]  # fmt: skip


def with_eps(table: pd.DataFrame, norm: str) -> list[dict[str, Any]]:
    """The rows of a table, with their radii as text, which clean images have none of."""
    rows = records(table)
    return [{**row, "shown_eps": "" if row["attack"] == CLEAN else shown_eps(row["eps"], norm)} for row in rows]


def detected(run: Run, rows: Iterable[Row]) -> list[str]:
    """What the numbers of detection are, and the thresholds."""
    places = {
        f"{row['model']} at FPR {percent(row['false_positive_rate'])}: above {row['threshold']:.4g}, as are "
        f"{row['flagged']} of {row['clean']} clean images"
        for row in rows
    }
    name = str(run.detector).removeprefix("function:").partition(", source")[0]
    return [
        f"detector: {name}, which flags what scores above a threshold",
        "FPR: at most that share of the clean images is flagged",
        "detected: flagged, of the fooled",
        "evaded: fooled and not flagged, of n, the images initially correct and scored",
        *sorted(places),
    ]


def transferred(run: Run) -> list[str]:
    """What the numbers of transfer are."""
    stopped = any(about.get("early_stop") for about in run.manifest["attacks"])
    return [
        "n: images that source and target both classify correctly; success: of these, where the source's adversarial "
        "image fools the target",
        *["early stop: what was left at its first success transfers worse than after all steps"] * stopped,
    ]


_QUERIES = "queries (n): evaluations of the model until an image's first success, median of the n fooled images"
_LOSSES = {
    "ce": "the cross-entropy", "scaled-ce": "the scaled cross-entropy", "margin": "the margin", "dlr": "DLR",
}  # fmt: skip


def _climbed(about: Mapping[str, Any]) -> str:
    """The loss that an attack climbs, in words, and whether in falling steps; nothing for one of its own."""
    loss = str(about.get("loss") or "")
    falls = about.get("schedule") in ("linear", "cosine")
    return loss and _LOSSES.get(loss, loss) + (", in falling steps" if falls else "")


def promised(run: Run, rows: Iterable[Row]) -> list[str]:
    """What attacks promise to leave as it is, and the losses that they climb, a line for those that do the same; and
    which left each image at its first success."""
    kept = {label: "; ".join(about.get("keeps") or ()) for label, about in run.attacks.items()}
    climbed = {label: _climbed(about) for label, about in run.attacks.items()}
    lines = [_QUERIES] if _have_queries(rows) else []
    for verb, each in (("promised", kept), ("climbed", climbed)):
        for what in dict.fromkeys(filter(None, each.values())):
            labels = ", ".join(label for label, own in each.items() if own == what)
            lines.append(f"{verb} by {labels}: {what}")
    if stopped := [label for label, about in run.attacks.items() if about.get("early_stop")]:
        lines.append(
            f"early stop: norm, cos, grads and s of {', '.join(stopped)} are those of each image's first success"
        )
    return lines


def grid(columns: Sequence[Column], rows: Iterable[Row], name: Callable[[str], str]) -> list[list[str]]:
    """The cells of a table, those that hold names passed through `name`."""
    return [[name(row[c.key]) if c.is_name else c.cell(row) for c in columns] for row in rows]

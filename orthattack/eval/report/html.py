"""The report of a run as one HTML file that needs no other and no network."""

from __future__ import annotations

import base64
import hashlib
import io
import json
from collections import Counter
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import DictLoader, Environment, StrictUndefined, Template
from markupsafe import Markup
from PIL import Image
from torch import Tensor

from orthattack.eval.errors import printable
from orthattack.eval.report import gallery, plots
from orthattack.eval.report import table as tables
from orthattack.eval.report.table import NORMS, UNDEFINED, Row, number, percent
from orthattack.eval.results.outcomes import records
from orthattack.eval.results.rates import defined
from orthattack.eval.results.stored_run import COSINE_EDGES, WORST, Run
from orthattack.eval.storage.run_folder import shown_eps

SHOWN_SIZE = 224
LOSSLESS_SIZE = 64
IMAGE_BYTES = 7_000_000  # before base64, which makes them 9.4 MB
MAX_CARDS = 3_000


def page(run: Run) -> str:
    """The whole report. Undefined numbers are shown as "–"."""
    template, script = _template()
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    # The script by its hash and nothing else: a name that slipped through as markup still could not run.
    policy = f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src data:"
    return template.render(
        policy=policy,
        script=Markup(script),  # noqa: S704
        **_context(run),
    )


@cache
def _template() -> tuple[Template, str]:
    """The page's template, compiled, and its script."""
    read = {name: files("orthattack.eval.report").joinpath("templates", name).read_text("utf-8") for name in _FILES}
    environment = Environment(
        loader=DictLoader(read), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True,
        finalize=_seen,
    )  # fmt: skip
    environment.filters.update(percent=percent, number=lambda value, form: number(form, value), tip=_tip)
    return environment.get_template("report.html.j2"), read["report.js"]


_FILES = ("report.html.j2", "report.css", "report.js")


def _seen(value: Any, keep: str = "\n\t") -> Any:
    """The same, with what cannot be seen in its texts escaped, such as marks that turn the direction of text."""
    if type(value) is str:  # not what is markup already
        return printable(value, keep)
    if isinstance(value, dict):
        return {key: _seen(item, keep) for key, item in value.items()}
    return [_seen(item, keep) for item in value] if isinstance(value, list) else value


def _tip(row: Row) -> str:
    return "; ".join(f"{count} × {reason}" for reason, count in row["reasons"].items())


def _context(run: Run) -> dict[str, Any]:
    table = run.table()
    look = plots.styles(run.attacks)
    models, attacks = list(run.models), list(run.attacks)
    radii = [{"index": i, "eps": eps, "text": shown_eps(eps, run.norm)} for i, eps in enumerate(run.radii)]
    chosen = (len(radii) - 1) // 2
    done, expected = run.progress()
    unit = (255.0, " in 1/255") if run.norm == "linf" and max(_known(run), default=0) < 0.2 else (1.0, "")
    rows, paired = tables.leaderboard_rows(run), records(run.paired())
    for row in rows + paired:
        row |= {"model_index": models.index(row["model"]), "eps_index": run.radii.index(row["eps"])}
        row["eps_text"] = shown_eps(row["eps"], run.norm)
    cards, images, stored = _cards(run)
    data = {"models": models, "attacks": attacks, "radii": [radius["text"] for radius in radii], "cards": cards}
    data |= {"images": images, "classes": _classes(run), "worst": WORST}
    data["targeted"] = run.targets is not None
    data["families"] = list(plots.families(run.attacks).values())
    columns, seen = tables.leaderboard(run.norm, rows), tables.with_eps(run.detection(), run.norm)
    for row in seen:
        row |= {"model_index": models.index(row["model"]), "eps_index": run.radii.index(row["eps"])}
    return {
        "run": run,
        "tables": tables,
        "shown": len(cards),
        "norm": NORMS.get(run.norm, run.norm),
        "others": [{"name": NORMS.get(norm, norm), "file": _file(run, norm)} for norm in run.other_norms],
        "models": models,
        "attacks": attacks,
        "radii": radii,
        "chosen": chosen,
        "look": look,
        "worst": WORST,
        "columns": columns,
        "rows": rows,
        "worst_rows": [row for row in rows if row["attack"] == WORST],
        "accuracy": {model: run.clean_accuracy(model) for model in models},
        "paired": paired,
        "taken": [] if run.targets is None else tables.taken_rows(run, 5),
        "transfer": _matrices(run),
        "transferred": tables.transferred(run)[1:],
        "judges": list(run.judges()),
        "detection": seen,
        "detected": tables.detected(run, seen),
        "optimality": tables.optimality_rows(run),
        "by_eps": {model: _by_eps(run, model, look, unit) for model in models},
        "by_calls": _by_calls(run, table, look),
        "gradients": {m: Markup(plots.cosine_histogram(run.gradient_cosines(m))) for m in models},  # noqa: S704
        "gradient_counts": {m: len(run.gradient_cosines(m)) for m in models},
        "sparks": _sparks(run, rows),
        "spark_bins": len(COSINE_EDGES) - 1,
        "checks": run.checks(),
        "trust": _trust(run.checks()),
        "doubts": _doubts(run.checks()),
        "warnings": run.manifest.get("warnings") or [],
        "manifest": json.dumps(dict(run.manifest), indent=2, ensure_ascii=False),
        "done": done,
        "expected": expected,
        "definitions": [*defined(run.targets, run.queries), *tables.promised(run, rows)],
        "data": _seen(data, keep=""),
        "stored": stored,
        "session": (run.manifest.get("sessions") or [{}])[-1],
    }


def _trust(checks: list[dict[str, str]]) -> dict[str, str]:
    """What the trust checks came to, in a few words and as a status."""
    count = Counter(check.get("status", "") for check in checks)
    ran = len(checks) - count["not run"]
    if not ran:
        return {"status": "not-run", "text": "trust checks not run"}
    if count["passed"] == ran:
        return {"status": "passed", "text": f"all {ran} trust checks passed" if ran > 1 else "the trust check passed"}
    return {"status": "warned", "text": f"{ran - count['passed']} of {ran} trust checks warned"}


def _doubts(checks: list[dict[str, str]]) -> list[dict[str, Any]]:
    """The checks that warned, each reason once, with the models and figures that it is of."""
    found: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for check in checks:
        if check.get("status") not in ("passed", "not run"):
            of = check.get("model", ""), check.get("figures", "")
            found.setdefault((check.get("check", ""), check.get("why", "")), []).append(of)
    return [{"check": check, "why": why, "found": of} for (check, why), of in found.items()]


def _file(run: Run, norm: str) -> str:
    return "report.html" if norm == run.manifest["config"]["norm"] else f"report-{norm}.html"


def _known(run: Run) -> list[float]:
    return [eps for eps in run.radii if eps is not None]


def _cells(run: Run) -> list[dict[str, Any]]:
    """Every model at every radius, as the page's figures name them."""
    pairs = [(m, model, e, eps) for m, model in enumerate(run.models) for e, eps in enumerate(run.radii)]
    return [{"model": model, "m": m, "e": e, "at": eps, "eps": shown_eps(eps, run.norm)} for m, model, e, eps in pairs]


def _by_eps(run: Run, model: str, look: dict[str, plots.Style], unit: tuple[float, str]) -> dict[str, Any]:
    curves = run.curves(model)
    groups = plots.coinciding(curves)
    svg = Markup(plots.accuracy_by_eps(curves, look, unit, _known(run), groups))  # noqa: S704
    return {"svg": svg, "coinciding": groups}


def _matrices(run: Run) -> list[dict[str, Any]]:
    """Per attack and radius how often the images of each source fool each target, by source and target."""
    found: dict[tuple[str, str], dict[str, Any]] = {}
    for row in tables.with_eps(run.transfer(), run.norm):
        empty: dict[str, Any] = {"attack": row["attack"], "eps": row["shown_eps"], "cells": {}}
        place = found.setdefault((row["attack"], row["shown_eps"]), empty)
        place["e"] = "" if row["eps"] is None else run.radii.index(row["eps"])
        place["cells"].setdefault(row["source"], {})[row["target"]] = row
    return list(found.values())


def _by_calls(run: Run, table: pd.DataFrame, look: dict[str, plots.Style]) -> list[dict[str, Any]]:
    found = _cells(run)
    for cell in found:
        rows = table
        if len(table):  # without an attack in this norm it has no columns
            at = table["eps"].isna() if cell["at"] is None else table["eps"] == cell["at"]
            rows = table[(table["model"] == cell["model"]) & at & (table["attack"] != WORST)]
        cell["svg"] = Markup(plots.accuracy_by_calls(rows, look)) if len(rows) else None  # noqa: S704
    return found


def _sparks(run: Run, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Per model and radius the attacks with the histogram of log10 |cos(perturbation, image)|."""
    by_place = {(row["model_index"], row["eps_index"], row["attack"]): row for row in rows}
    found = _cells(run)
    for cell in found:
        place, counts = (cell["m"], cell["e"]), run.cosine_histograms(cell["model"], cell["at"])
        cell["lines"] = [
            {
                "attack": attack,
                "path": plots.histogram_path(n),
                "count": int(n.sum()),
                "row": by_place[(*place, attack)],
            }
            for attack, n in counts.items()
        ]
    return found


def _classes(run: Run) -> list[dict[str, Any]]:
    """Per model the names of the classes met and, by radius and attack, [robust, scored] of each."""
    found = []
    for model in run.models:
        tables = [run.per_class(model, eps) for eps in run.radii]
        labels = sorted({int(label) for table in tables for label in table["label"]})
        cells = []
        for table in tables:
            counts = {
                (attack, label): [robust, scored]
                for label, attack, scored, robust in table.itertuples(index=False, name=None)
            }
            columns = [*run.attacks, WORST] if run.attacks else []
            cells.append([[counts.get((attack, label), [0, 0]) for label in labels] for attack in columns])
        found.append({"names": [run.class_name(model, label) for label in labels], "cells": cells})
    return found


def _cards(run: Run) -> tuple[list[list[Any]], list[str], int]:
    """Cards of the gallery, the images they refer to by number, and how many cards there could have been.

    Every model, attack and radius gets a card before any gets a second one, and all show the same images. What is
    in the page is bounded by bytes and by number.
    """
    cells = []
    for model in run.models:
        order = gallery.order(run, model)
        for attack in run.attacks if order else []:
            for eps in run.radii_of(attack):
                stored = set(run.folder.image_positions(model, attack, eps))
                cells.append((model, attack, eps, [position for position in order if position in stored]))
    # Evenly strided, so that a limit met on the way leaves out some of every model rather than all of the last.
    cells = [cells[i] for i in _strided(len(cells))]
    images = _Images()
    cards: list[tuple[int, list[Any]]] = []

    def fill(first: int, last: int) -> None:
        for model, attack, eps, positions in cells:
            wanted = positions[first:last]
            for example in gallery.examples(run, model, attack, eps, wanted):
                if images.size < IMAGE_BYTES and len(cards) < MAX_CARDS:
                    turn = first + wanted.index(example.row["position"])
                    cards.append((turn, _card(run, model, attack, eps, example, images)))

    fill(0, 1)  # tells how much a round takes
    if cards:
        by_bytes = int(0.95 * (IMAGE_BYTES - images.size) / images.size)
        fill(1, 1 + min(by_bytes, MAX_CARDS // len(cards) - 1))
    cards.sort(key=lambda item: (item[0], item[1][:3]))
    # Strided once more, so that what is seen first is of many images and attacks.
    return [cards[i][1] for i in _strided(len(cards))], images.uris, sum(len(positions) for *_, positions in cells)


def _strided(count: int) -> list[int]:
    """The numbers below count in an order whose every beginning is spread over all of them (the golden ratio's)."""
    order: list[int] = np.argsort(np.arange(count) * 0.6180339887498949 % 1, kind="stable").tolist()
    return order


class _Images:
    """The images of a page, each once."""

    def __init__(self) -> None:
        self.uris: list[str] = []
        self.size = 0
        self._known: dict[tuple[str, int], int] = {}

    def add(self, image: Tensor, exact: bool = False, key: tuple[str, int] | None = None) -> int:
        """The number of the image, which is new unless its key is known."""
        if key is not None and key in self._known:
            return self._known[key]
        self.uris.append(data_uri(image, exact))
        self.size += len(self.uris[-1]) * 3 // 4
        if key is not None:
            self._known[key] = len(self.uris) - 1
        return len(self.uris) - 1


def _card(run: Run, model: str, attack: str, eps: float | None, example: gallery.Example, images: _Images) -> list[Any]:
    row = example.row
    return [
        list(run.models).index(model),
        list(run.attacks).index(attack),
        -1 if eps is None else run.radii.index(eps),
        *(run.class_name(model, row[name]) for name in ("label", "clean_prediction", "adversarial_prediction")),
        int(row["success"] is True),
        UNDEFINED if row[run.norm] is None else shown_eps(row[run.norm], run.norm),
        number(".1e", row["cosine"]),
        f"{example.magnification:.3g}",
        str(row["name"]),
        images.add(example.clean, key=(model, row["position"])),
        images.add(example.adversarial),
        images.add(example.perturbation, exact=True),
    ]


def data_uri(image: Tensor, exact: bool = False) -> str:
    """An image (3, H, W) in [0, 1] as WebP: lossless if small, else of high quality and at most 224 pixels wide."""
    # In NumPy: torch wakes its threads for each of thousands of small images.
    pixels = np.rint(255 * np.clip(image.numpy(), 0, 1)).astype(np.uint8)
    picture = Image.fromarray(np.ascontiguousarray(np.moveaxis(pixels, 0, -1)))
    if max(picture.size) > SHOWN_SIZE:
        # A perturbation is made of single pixels, which a smooth filter would average away.
        picture.thumbnail((SHOWN_SIZE, SHOWN_SIZE), Image.Resampling.NEAREST if exact else Image.Resampling.LANCZOS)
    stream = io.BytesIO()
    if max(picture.size) <= LOSSLESS_SIZE:
        picture.save(stream, "WEBP", lossless=True, quality=50, method=2)
    else:
        picture.save(stream, "WEBP", quality=50 if exact else 88, method=2)
    return "data:image/webp;base64," + base64.b64encode(stream.getvalue()).decode()

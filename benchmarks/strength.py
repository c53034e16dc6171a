"""How much PGD leaves robust, ours beside Foolbox's and torchattacks', by model, norm and number of gradients.

The evaluation runs them on the same images, a folder per model, norm and number of gradients, each of which resumes.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from tabulate import tabulate

from benchmarks.defaults import models
from benchmarks.stored import Row, Stored, Table, stored
from orthattack.eval import evaluate
from orthattack.eval.results.outcomes import FOOLED, ROBUST, UNSCORED, WRONG, floats
from orthattack.eval.results.paired import Paired
from orthattack.threat import Norm

NORMS: tuple[Norm, ...] = ("linf", "l2", "l1")
GRADIENTS = (10, 20, 50, 100)
OTHERS = ("Foolbox PGD", "torchattacks PGD")
OURS = ("PGD", "OrthoPGD")
ALIKE = {name: f"{name}, ce, fixed" for name in OURS}
"""Ours with the loss and the steps of theirs."""
RADII: dict[str, tuple[float, float]] = {
    "cifar10-robust": (0.5, 12),
    "cifar10-standard": (0.15, 2.5),
    "resnet18-tiny20-robust": (1, 24),
    "resnet18-tiny20-standard": (0.5, 12),
    "efficientnet-lite0": (0.1, 8),
    "efficientnet-lite2": (0.12, 8),
    "pyautoattack-resnet18": (0.08, 1.2),
}
"""In L2 and in L1, at which some images stand and some fall; in L-infinity they are those of `defaults.models`."""
SIGN = {"linf": "L∞", "l2": "L2", "l1": "L1"}
_FOOLBOX = {"linf": "LinfPGD", "l2": "L2PGD", "l1": "L1PGD"}
_TORCHATTACKS = {"linf": "PGD", "l2": "PGDL2"}  # it has none in L1


def attacks(norm: Norm, gradients: int) -> dict[str, dict[str, Any]]:
    """By label: the others' climb the cross-entropy in steps of 2.5 eps / steps, and so do ours of that label."""
    found: dict[str, dict[str, Any]] = {"Foolbox PGD": {"name": f"foolbox:{_FOOLBOX[norm]}"}}
    if norm in _TORCHATTACKS:
        found["torchattacks PGD"] = {"name": f"torchattacks:{_TORCHATTACKS[norm]}"}
    found |= {name: {"name": name, "early_stop": True} for name in OURS}
    alike = {"early_stop": True, "loss": "ce", "schedule": "fixed"}
    found |= {label: {"name": name, **alike} for name, label in ALIKE.items()}
    return {label: {"label": label, "steps": gradients, **attack} for label, attack in found.items()}


def tables(
    shared: Path, build: Path, limit: int, names: list[str] | None, norms: Sequence[Norm], budgets: Sequence[int],
    folder: Path,
) -> Iterator[tuple[str, list[Row]]]:  # fmt: skip
    """Each table of which an attack is not stored yet for as many images, on whatever machine."""
    known = models(shared, build)
    for gradients, norm, name in product(budgets, norms, names or known):
        model, data, largest = known[name]
        eps = float(dict(zip(NORMS, (largest, *RADII[name]), strict=True))[norm])
        table, wanted = f"{name}-{norm}-{gradients}", attacks(norm, gradients)
        done = _merged(stored(folder)).get(table)
        have: dict[str, Row] = {}
        size = limit
        if done is not None and done.rows[0]["limit"] >= limit and done.rows[0]["eps"] == eps:
            have, size = {row["attack"]: row for row in done.rows}, done.rows[0]["limit"]
        if missing := [attack for label, attack in wanted.items() if label not in have]:
            out = build / "strength" / f"{table}-{size}-{len(missing)}"
            have |= {
                row["attack"]: row
                for row in _rows(model | {"label": name}, data | {"limit": size}, missing, out, norm, eps)
            }
            yield table, [have[label] for label in wanted]


def _rows(
    network: dict[str, Any], data: dict[str, Any], asked: list[dict[str, Any]], out: Path, norm: Norm, eps: float
) -> list[Row]:
    """A row per attack; `robust` has a digit for each image, 1 where it is right, clean and adversarial."""
    run = evaluate(
        [network], data, asked, out=out, norm=norm, eps=eps, checks=False, report=False, save_images="none",
        batch_size=50,
    )  # fmt: skip
    (model,) = run.models
    found = []
    for attack in run.attacks:
        outcome = run.outcomes(model, attack, eps).dense(run.images(model))
        if (outcome == UNSCORED).any():
            raise RuntimeError(f"{attack} on {model} left images unscored; the run in {out} says why")
        measured = run.rows(model, attack, eps)
        measured = measured[measured["status"] == "ok"]
        found.append({
            "attack": attack, "limit": data["limit"], "images": len(outcome), "eps": eps,
            "clean": round(float((outcome != WRONG).mean()), 4),
            "robust": "".join(map(str, (outcome == ROBUST).astype(int))),
            "max |cos|": float(np.nanmax(np.abs(floats(measured["cosine"])), initial=0.0)),
            "max norm / eps": float(floats(measured[norm]).max(initial=0.0)) / eps,
            "gradients": round(float(floats(measured["gradient_calls"]).mean()), 2),
            "fooled": int((outcome == FOOLED).sum()),
        })  # fmt: skip
    return found


def pages(files: Iterable[Stored]) -> dict[str, str]:
    """The tables of docs/strength.md, of all machines together."""
    known = _merged(files)
    if not known:
        return {}
    cells = sorted(known.values(), key=_place)
    found = {"strength/summary": _summary(cells), "strength/lost": _lost(cells), "strength/kept": _kept(cells)}
    found["strength/loss"] = _loss(cells)
    for norm, name in enumerate(NORMS):
        if here := [cell for cell in cells if _place(cell)[1] == norm]:
            found[f"strength/{name}"] = _details(here)
    return found


def _merged(files: Iterable[Stored]) -> dict[str, Table]:
    """Tables by name; of several machines' the one of the most images."""
    found: dict[str, Table] = {}
    for table in (table for file in files if file.what == "strength" for table in file.tables):
        if table.name not in found or table.rows[0]["images"] > found[table.name].rows[0]["images"]:
            found[table.name] = table
    return found


def _place(table: Table) -> tuple[str, int, int]:
    """Model, number of the norm, gradients."""
    model, norm, gradients = table.name.rsplit("-", 2)
    return model, [*NORMS].index(norm), int(gradients)  # type: ignore[arg-type]


def _robust(table: Table) -> dict[str, np.ndarray[Any, np.dtype[np.bool_]]]:
    return {str(row["attack"]): np.array([digit == "1" for digit in row["robust"]]) for row in table.rows}


def _radius(eps: float, norm: int) -> str:
    return f"{255 * eps:.4g}/255" if NORMS[norm] == "linf" else f"{eps:g}"


def _percent(column: Any) -> str:
    return f"{100 * column.mean():.1f}"


def _told(pair: Paired) -> str:
    """A difference in points with its interval."""
    low, high = pair.interval() or (-1.0, 1.0)
    return f"{100 * (pair.difference or 0.0):+.1f} ({100 * low:+.1f} to {100 * high:+.1f})"


def _strongest(robust: dict[str, Any]) -> str:
    return min((name for name in OTHERS if name in robust), key=lambda name: robust[name].sum())


_show = partial(tabulate, tablefmt="github", disable_numparse=True)


def _summary(cells: Sequence[Table]) -> str:
    """A row per norm and model at its fewest gradients, and for each norm all images of all models."""
    table = []
    for norm, sign in enumerate(SIGN.values()):
        pooled: dict[str, list[Any]] = {name: [] for name in ("theirs", *OURS)}
        for model in dict.fromkeys(_place(cell)[0] for cell in cells if _place(cell)[1] == norm):
            here = {_place(cell)[2]: cell for cell in cells if _place(cell)[:2] == (model, norm)}
            first, robust = here[min(here)].rows[0], _robust(here[min(here)])
            found = {"theirs": robust[_strongest(robust)], **{name: robust[name] for name in OURS}}
            for name, column in found.items():
                pooled[name].append(column)
            table.append([f"{sign}, {_radius(first['eps'], norm)}", model, first["images"], *_compared(found)])
        if pooled["theirs"]:
            every = {name: np.concatenate(columns) for name, columns in pooled.items()}
            table.append([sign, "all", len(every["theirs"]), *_compared(every)])
    head = ["norm, ε", "model", "images", "theirs", *OURS, "PGD less theirs", "OrthoPGD less PGD"]
    hardware = ", ".join(sorted({cell.hardware for cell in cells}))
    versions = ", ".join(sorted({f"{name} {at}" for cell in cells for name, at in cell.versions.items()}))
    return f"{hardware}; {versions}:\n\n{_show(table, head)}"


def _compared(robust: dict[str, Any]) -> list[str]:
    theirs, plain, orthogonal = robust.values()
    differences = Paired.of(plain, theirs), Paired.of(orthogonal, plain)
    return [*map(_percent, (theirs, plain, orthogonal)), *map(_told, differences)]


def _lost(cells: Sequence[Table]) -> str:
    """Where others leave fewer images robust with as many gradients: under the default loss, and under the same."""
    table = []
    for cell in cells:
        (model, norm, gradients), robust = _place(cell), _robust(cell)
        other = _strongest(robust)
        for name in (*OURS, *ALIKE.values()):
            pair = Paired.of(robust[name], robust[other])
            if pair.first_only > pair.second_only:
                where = [model, SIGN[NORMS[norm]], gradients]
                table.append([*where, name, other, pair.second_only, pair.first_only, _told(pair)])
    if not table:
        return "None."
    head = ["model", "norm", "gradients", "ours", "theirs", "fooled by ours alone", "by theirs alone", "points"]
    return _show(table, head)


def _loss(cells: Sequence[Table]) -> str:
    """The default loss and steps less theirs, over all images of all models, and of the model where it is worst."""
    table = []
    for norm, gradients in sorted({_place(cell)[1:] for cell in cells}):
        here = {_place(cell)[0]: _robust(cell) for cell in cells if _place(cell)[1:] == (norm, gradients)}
        for name in OURS:
            pairs = {model: Paired.of(robust[name], robust[ALIKE[name]]) for model, robust in here.items()}
            every = [np.concatenate([robust[each] for robust in here.values()]) for each in (name, ALIKE[name])]
            worst = max(pairs, key=lambda model: pairs[model].difference or 0.0)
            table.append([
                SIGN[NORMS[norm]], gradients, name, f"{len(every[0])} of {len(here)}", *map(_percent, reversed(every)),
                _told(Paired.of(*every)), f"{100 * (pairs[worst].difference or 0.0):+.1f}, {worst}",
            ])  # fmt: skip
    head = [
        "norm",
        "gradients",
        "attack",
        "images, models",
        "ce, fixed",
        "default",
        "default less ce, fixed",
        "at worst",
    ]
    return _show(table, head)


def _kept(cells: Sequence[Table]) -> str:
    """What the returned images keep, and what part of the gradients was needed, over all that was attacked."""
    table = []
    for name in (*OTHERS, *OURS, *ALIKE.values()):
        rows = [(cell, row) for cell in cells for row in cell.rows if row["attack"] == name]
        if rows:
            share = np.mean([row["gradients"] / _place(cell)[2] for cell, row in rows])
            table.append([
                name, sum(round(row["clean"] * row["images"]) for _, row in rows),
                f"{max(row['max |cos|'] for _, row in rows):.1e}",
                f"{max(row['max norm / eps'] for _, row in rows):.7f}", f"{100 * share:.0f} %",
            ])  # fmt: skip
    return _show(table, ["attack", "attacked images", "max \\|cos\\|", "max norm / ε", "gradients taken"])


def _details(cells: Sequence[Table]) -> str:
    """Robust accuracy in %, a row per model and number of gradients."""
    names = [name for name in (*OTHERS, *OURS, *ALIKE.values()) if any(name in _robust(cell) for cell in cells)]
    table = []
    for cell in cells:
        (model, _, gradients), robust = _place(cell), _robust(cell)
        shown = (_percent(robust[name]) if name in robust else "–" for name in names)
        table.append([model, cell.rows[0]["images"], gradients, *shown])
    return _show(table, ["model", "images", "gradients", *names])

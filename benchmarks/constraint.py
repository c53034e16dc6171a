"""Tables of what the constraint costs and rules out, of what is stored: transfer, radii, detectors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from tabulate import tabulate

from benchmarks import detector, radii, transfer
from benchmarks.stored import Row, Stored, Table
from orthattack.eval.results.paired import Paired


def pages(files: Iterable[Stored]) -> dict[str, str]:
    """Each table in Markdown, by "WHAT/MACHINE/NAME"."""
    found: dict[str, str] = {}
    for file in files:
        if file.what == "detector":
            made = {name: text for table in file.tables for name, text in detector_tables(table).items()}
        else:
            made = MAKERS[file.what](file.tables) if file.what in MAKERS else {}
        found |= {f"{file.what}/{file.machine}/{name}": text for name, text in made.items()}
    return found


def transfer_tables(measured: Sequence[Table]) -> dict[str, str]:
    """Of each group of models two tables: by attack, over all pairs of models, and by pair.

    With several seeds of training, "by seed" is what is lost between networks of one seed, the least and the most.
    """
    found = {}
    for group in dict.fromkeys(row["group"] for table in measured for row in table.rows):
        rows = [row for table in measured for row in table.rows if row["group"] == group]
        pairs = transfer.compared(measured, group)
        of_seed = [transfer.compared(tables, group) for tables in transfer.by_seed(measured, group).values()]
        lines = []
        for attack in dict.fromkeys(row["attack"] for row in rows):
            whole = _joined(pairs, attack)
            lost = [_joined(of, attack).loss for of in of_seed]
            differ = sum((pair.p or 0.0) < 0.05 for pair in whole.pairs)
            gradients = next(row["gradients"] for row in rows if row["attack"] == attack)
            lines.append(
                [attack, gradients, *(f"{100 * whole.rate(form):.1f} %" for form in transfer.FORMS), _points(whole),
                 *([f"{_sign(min(lost), 100, 1)} to {_sign(max(lost), 100, 1)}"] if len(lost) > 1 else []),
                 f"{differ} of {len(whole.pairs)}"]
            )  # fmt: skip
        seeds = ["by seed"] if len(of_seed) > 1 else []
        head = ["attack", "gradients", "plain", "orthogonal", "lost", *seeds, "p < 0.05"]
        images = next(len(value) for key, value in rows[0].items() if key.startswith("fools "))
        about = f"L∞, ε = {rows[0]['eps * 255']:g}/255, {images} images, {len(whole.pairs)} pairs of models"
        found[f"{group}-attacks"] = f"{about}:\n\n{tabulate(lines, head, 'github', disable_numparse=True)}"
        attacks = list(dict.fromkeys(row["attack"] for row in rows))
        table = [[f"{source} → {target}", *(_both(of[attack]) for attack in attacks)]
                 for (source, target), of in pairs.items()]  # fmt: skip
        found[f"{group}-pairs"] = tabulate(table, ["source → target", *attacks], "github", disable_numparse=True)
    return found


def _joined(pairs: Mapping[tuple[str, str], Mapping[str, transfer.Compared]], attack: str) -> transfer.Compared:
    return transfer.Compared.joined([of[attack] for of in pairs.values()])


def _points(found: transfer.Compared) -> str:
    low, high = found.interval()
    return _signed(found.loss, low, high, 100, 1)


def _signed(value: float, low: float, high: float, unit: float, digits: int) -> str:
    """A difference with its interval."""
    told, *ends = (_sign(x, unit, digits) for x in (value, low, high))
    return f"{told} [{', '.join(ends)}]"


def _sign(value: float, unit: float, digits: int) -> str:
    """A difference with its sign; 0 has none."""
    shown = round(unit * value, digits) + 0.0
    return f"{shown:{'+' if shown else ''}.{digits}f}".replace("-", "−")


def _both(found: transfer.Compared) -> str:
    """Both rates in %, bold if the interval of their difference is without 0."""
    low, high = found.interval()
    told = " / ".join(f"{100 * found.rate(form):.0f}" for form in transfer.FORMS)
    return f"**{told}**" if low > 0 or high < 0 else told


def radii_tables(measured: Sequence[Table]) -> dict[str, str]:
    """The radius that each constraint needs, a column for each model; and what fools at one radius."""
    order = [table for name in radii.MODELS for table in measured if table.name == name]
    needed, fixed = [], []
    for kept in radii.searches(order[0].rows):
        line = [kept]
        for table in order:
            found = radii.searches(table.rows)
            row, plain = found[kept], found["nothing"]
            share = f"{row['fooled'].count('1')} of {len(row['fooled'])}"
            middle = f"median {radii.median(row):.3g}/255"
            if kept in radii.CONTRAST:
                line.append(f"{middle} ({share})")
            elif row is plain:
                line.append(middle)
            else:
                ratio, low, high = radii.relative(row, plain)
                line.append(f"{ratio:.2f} [{low:.2f}, {high:.2f}]" + (f" ({share})" if "0" in row["fooled"] else ""))
        needed.append(line)
    at_radius = {table.name: [row for row in table.rows if "eps * 255" in row] for table in order}
    for k, row in enumerate(next(iter(at_radius.values()))):
        fixed.append([row["kept"], *(_fooled_beside(rows[k], rows[0]) for rows in at_radius.values())])
    head = ["kept", *(f"{table.name}, {len(table.rows[0]['fooled'])} images" for table in order)]
    at = ["kept", *(f"{name}, {rows[0]['eps * 255']}/255" for name, rows in at_radius.items())]
    return {
        "needed": tabulate(needed, head, "github", disable_numparse=True),
        "fixed": tabulate(fixed, at, "github", disable_numparse=True),
    }


def _fooled_beside(row: Row, plain: Row) -> str:
    """The share fooled in %, and by how many points that is above plain's, with Tango's interval."""
    first, second = (np.array(list(of["fooled"])) == "1" for of in (row, plain))
    told = f"{100 * first.mean():.0f} %"
    if row is plain:
        return told
    pair = Paired.of(~second, ~first)
    low, high = pair.interval() or (-1.0, 1.0)
    return f"{told}, {_signed(pair.difference or 0.0, low, high, 100, 0)}"


def detector_tables(content: Table) -> dict[str, str]:
    """A table for each kind of images that detectors were to tell plain PGD's from: areas under the ROC curve, the mean
    of the seeds, and the shares detected at 5 % false positives."""
    found = {}
    for against in detector.AGAINST:
        rows = [row for row in content.rows if row["against"] == against]
        lines = []
        for row in rows:
            flagged = np.array([list(row[key]) for key in row if key.startswith("flagged, ")]) == "1"
            fools, detected = np.array(list(row["fools"])) == "1", 100 * flagged.mean(1)
            (low, high), (lower, upper) = row["interval"], row["its interval"]
            lines.append(
                [row["detector"], row["perturbation"], f"{100 * fools.mean():.0f} %",
                 f"{row['area']:.2f} [{low:.2f}, {high:.2f}]",
                 "–" if row["perturbation"] == "plain" else _signed(row["above plain"], lower, upper, 1, 3),
                 f"{np.mean(detected):.0f} % ({min(detected):.0f} to {max(detected):.0f})",
                 f"{100 * (fools & ~flagged).mean():.0f} %"]
            )  # fmt: skip
        head = ["detector", "perturbation", "fools", "area", "above plain's", "detected", "fools undetected"]
        about = f"{content.name}, L∞, ε = {rows[0]['eps * 255']}/255, {rows[0]['images']} images to test on"
        found[f"{content.name}-{against}"] = f"{about}:\n\n{tabulate(lines, head, 'github', disable_numparse=True)}"
    return found


MAKERS = {"transfer": transfer_tables, "radii": radii_tables}

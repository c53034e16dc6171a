"""Which loss, schedule and start PGD should have by default: robust accuracy that each leaves, over several models.

The evaluation runs them, in a folder that a second start resumes.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

from benchmarks.networks import networks
from benchmarks.stored import Row
from orthattack.eval import evaluate

LOSSES = ("ce", "margin", "dlr")
FORMS: dict[str, dict[str, Any]] = {
    "fixed": {},
    "fixed, no random start": {"random_start": False},
    "linear from 2 eps": {"schedule": "linear", "alpha": 2.0},  # of eps
    "cosine from 2 eps": {"schedule": "cosine", "alpha": 2.0},
}
BUDGETS = (5, 10, 20, 50)


def tables(shared: Path, build: Path, limit: int, names: list[str] | None) -> Iterator[tuple[str, list[Row]]]:
    """Of each model, what each choice leaves robust, in % of `limit` images."""
    for name, network in networks(shared, build).items():
        if names and name not in names:
            continue
        eps = network.radii["linf"]
        cells = list(product(LOSSES, FORMS, BUDGETS))
        attacks = {
            f"{loss}, {form}, {steps}": {
                "name": "PGD", "loss": loss, "steps": steps, "early_stop": True, **FORMS[form],
                **({"alpha": FORMS[form]["alpha"] * eps} if "alpha" in FORMS[form] else {}),
            }
            for loss, form, steps in cells
        }  # fmt: skip
        run = evaluate(
            [network.model], network.data | {"limit": limit}, [{"label": k, **v} for k, v in attacks.items()],
            out=build / name, eps=eps, checks=False, report=False, save_images="none", batch_size=50,
        )  # fmt: skip
        found = run.table().set_index("attack")["robust_accuracy"]
        yield name, [
            {"loss": loss, "form": form, "steps": steps, "eps * 255": round(255 * eps, 4), "images": limit,
             "robust accuracy": round(100 * float(found[f"{loss}, {form}, {steps}"]), 2)}
            for loss, form, steps in cells
        ]  # fmt: skip

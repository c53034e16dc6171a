"""What orthogonality costs: robust accuracy across radii, norms and scopes, and the smallest radius that fools."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from benchmarks.study.panel import Group, Study
from orthattack import PGD, Bisection, OrthoPGD
from orthattack.eval.results.outcomes import FOOLED, ROBUST, UNSCORED
from orthattack.eval.results.stored_run import Run
from orthattack.projection import Scope

__all__ = ["SCOPES", "cost", "smallest"]

SCOPES: tuple[Scope, ...] = ("image", "channel", "pixel")
AGAIN = "PGD, another start"


def _attacks(group: Group) -> list[dict[str, Any]]:
    common: dict[str, Any] = {"early_stop": True, "loss": "ce", "schedule": "fixed"}
    linf: list[dict[str, Any]] = [
        {"name": "PGD", **common},
        *({"name": "OrthoPGD", "label": f"OrthoPGD, {scope}", "scope": scope, **common} for scope in SCOPES),
        {"name": "OrthoPGD", "label": "OrthoPGD, gradient only", "enforce": "gradient", **common},
    ]
    # Without a plane per pixel, whose projection onto the L2 ball takes ten times as long as a step of ResNet-18.
    l2 = [
        {**attack, "label": f"{attack.get('label', attack['name'])} (l2)", "norm": "l2", "eps": list(group.l2)}
        for attack in linf[:3]
    ]
    return linf + l2


def cost(study: Study, group: Group) -> pd.DataFrame:
    """A row per model, norm, radius, attack and image: fooled, robust or initially misclassified, and |cos(delta, x)|.

    Plain PGD is run a second time with other random starts: that two runs of the *same* attack differ on an image is
    what any difference has to be compared with.
    """
    radii = list(group.linf)
    plain = [attack for attack in _attacks(group) if attack["name"] == "PGD"]
    again = [{**attack, "label": label} for attack, label in zip(plain, (AGAIN, f"{AGAIN} (l2)"), strict=True)]
    runs = [
        study.attack(f"cost-{group.key}", group, _attacks(group), group.images["cost"], eps=radii),
        study.attack(f"cost-{group.key}-again", group, again, group.images["cost"], seeds=[1], eps=radii),
    ]
    parts = [part for run in runs for norm in ("linf", "l2") for part in _rows(run.in_norm(norm))]
    return pd.concat(parts, ignore_index=True)


def _rows(run: Run) -> list[pd.DataFrame]:
    parts = []
    for model in run.models:
        for attack in run.attacks:
            for eps in run.radii_of(attack):
                rows = run.rows(model, attack, eps, ["position", "label", "status", "success", "cosine", run.norm])
                found = run.outcomes_of(rows, attack, eps)
                if (found.outcome == UNSCORED).any():
                    raise RuntimeError(f"{attack} on {model} left images unscored: {rows['status'].value_counts()}")
                parts.append(
                    pd.DataFrame(
                        {
                            "model": model,
                            "norm": run.norm,
                            "eps": eps,
                            "attack": attack.removesuffix(" (l2)"),
                            "position": found.position,
                            "outcome": found.outcome,
                            "cosine": np.abs(rows["cosine"].to_numpy(np.float32, na_value=np.nan)),
                        }
                    )
                )
    return parts


def smallest(study: Study, group: Group) -> pd.DataFrame:
    """The smallest L-infinity radius at which each attack fools each image that the model gets right; inf if none.

    Each search begins at the group's radius, so that its trials are not spent on much larger ones.
    """

    def searching(scope: Scope | None) -> Callable[[nn.Module, int], Bisection]:
        def search(model: nn.Module, steps: int) -> Bisection:
            options: dict[str, Any] = {"eps": group.eps, "steps": steps, "loss": "ce", "schedule": "fixed"}
            attack = PGD(model, **options) if scope is None else OrthoPGD(model, **options, scope=scope)
            return Bisection(attack, trials=group.trials)

        return search

    attacks = {"PGD": searching(None)} | {f"OrthoPGD, {scope}": searching(scope) for scope in SCOPES}
    run = study.attack(f"smallest-{group.key}", group, attacks, group.images["smallest"], eps=[group.eps])
    parts = []
    for model in run.models:
        for attack in run.attacks:
            rows = run.rows(model, attack, None, ["position", "label", "status", "success", "linf"])
            outcome = run.outcomes_of(rows, attack, None).outcome
            norm = np.where(outcome == FOOLED, rows["linf"].to_numpy(float, na_value=np.nan), np.inf)
            kept = (outcome == FOOLED) | (outcome == ROBUST)
            position = rows["position"][kept].to_numpy(int)
            parts.append(pd.DataFrame({"model": model, "attack": attack, "position": position, "norm": norm[kept]}))
    return pd.concat(parts, ignore_index=True)

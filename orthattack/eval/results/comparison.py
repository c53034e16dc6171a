"""Two runs, or two models, beside each other: the same images, paired, and what differs in how they were made."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import pandas as pd

from orthattack.eval import suite
from orthattack.eval.errors import EvaluationError
from orthattack.eval.results.outcomes import ROBUST, UNSCORED, WRONG, bools, is_, paired_row
from orthattack.eval.results.paired import Paired
from orthattack.eval.results.stored_run import Run
from orthattack.eval.storage.run_folder import RunFolder

CLEAN = "(clean)"  # what the rows are called that compare the models on the images as they are


def opened(place: str) -> Run:
    """A run, or one of its models, RUN:MODEL; EvaluationError if there is no such run, or it has no such model."""
    for k in (k for k in range(len(place) - 1, 0, -1) if place[k] == ":" and place[k:][:3] != "://"):
        if not RunFolder(place).exists and (folder := RunFolder(place[:k])).exists:
            return Run.open(str(folder)).of_model(place[k + 1 :])
    return Run.open(place)


def compared(first: Run, second: Run) -> pd.DataFrame:
    """Every attack that both runs have at the same radius on the same model, on the images that both scored.

    Images are the same if their names and labels are. A model is the same if it has the same label; of two runs with
    one model each, those are compared whatever they are called. Columns: model, attack, eps, first_images,
    second_images (scored by that run), and those of `Paired`, the first run less the second; attack "(clean)" is the
    models on the images as they are. EvaluationError: where the norms differ, or no model or no image is shared."""
    if first.norm != second.norm:
        raise EvaluationError(
            f"{first.folder} is of norm {first.norm} and {second.folder} of {second.norm}: "
            "robust accuracies in different norms cannot be compared"
        )
    pairs = [(label, label) for label in first.models if label in second.models]
    if not pairs and len(first.models) == len(second.models) == 1:
        pairs = [(next(iter(first.models)), next(iter(second.models)))]
    if not pairs:
        raise EvaluationError(
            f"the runs have no model in common: {', '.join(first.models)} in {first.folder} and "
            f"{', '.join(second.models)} in {second.folder}; say which to compare, as RUN:MODEL"
        )
    radii = [(a, b) for a in first.radii for b in second.radii if a == b or (a and b and math.isclose(a, b))]
    rows = []
    for one, other in pairs:
        cells: list[tuple[str, float | None, float | None]] = [(CLEAN, None, None)]
        cells += [(attack, *eps) for eps in radii for attack in first.attacks if attack in second.attacks]
        for attack, eps, other_eps in cells:
            name = None if attack == CLEAN else attack
            left, right = _robust_by_image(first, one, name, eps), _robust_by_image(second, other, name, other_eps)
            both = left.merge(right, on=["name", "label", "occurrence"], suffixes=("_first", "_second"))
            scored = both[(both["outcome_first"] != UNSCORED) & (both["outcome_second"] != UNSCORED)]
            paired = Paired.of(scored["robust_first"].to_numpy(bool), scored["robust_second"].to_numpy(bool))
            rows.append(
                {
                    "model": one if one == other else f"{one} / {other}",
                    "attack": attack,
                    "eps": eps,
                    "first_images": int((left["outcome"] != UNSCORED).sum()),
                    "second_images": int((right["outcome"] != UNSCORED).sum()),
                    **paired_row(paired),
                }
            )
    table = pd.DataFrame(rows)
    if not table["n"].any():
        raise EvaluationError(
            f"{first.folder} and {second.folder} share no image that both scored: images are matched by name and label"
        )
    return table.rename(
        columns={
            "attack_accuracy": "first_accuracy",
            "baseline_accuracy": "second_accuracy",
            "fooled_by_attack_alone": "second_robust_alone",
            "fooled_by_baseline_alone": "first_robust_alone",
        }
    )


def _robust_by_image(run: Run, model: str, attack: str | None, eps: float | None) -> pd.DataFrame:
    """Outcome and robustness by name and label, for matching with another run; attack None is the clean image.

    Columns name, label, occurrence (0 but where a name comes again), outcome, robust.
    """
    if attack is None:
        rows = run.clean(model, ["name", "label", "status", "prediction"])
        right = bools(rows["prediction"] == rows["label"])
        outcome = np.where(is_(rows["status"], "ok"), np.where(right, ROBUST, WRONG), UNSCORED).astype(np.int8)
    else:
        rows = run.rows(model, attack, eps, ["position", "name", "label", "status", "success", run.norm])
        outcome = run.outcomes_of(rows, attack, eps).outcome
    table = rows[["name", "label"]].assign(outcome=outcome, robust=outcome == ROBUST)
    table.insert(2, "occurrence", table.groupby(["name", "label"], dropna=False).cumcount())
    return table


def differences(first: Run, second: Run) -> list[str]:
    """What differs between two runs: settings, attacks and models by label, the versions and the random
    numbers of the last session."""
    sides: list[dict[str, Any]] = [_settings(first), _settings(second)]
    found = []
    models: list[Mapping[str, Mapping[str, Any]]] = [first.models, second.models]
    if len(first.models) == len(second.models) == 1:  # which are compared whatever they are called
        models = [{"": about} for run in (first, second) for about in run.models.values()]
    for kind, one, other in (("attack", first.attacks, second.attacks), ("model", models[0], models[1])):
        for label in dict.fromkeys([*one, *other]):
            if label in one and label in other:
                for side, about in zip(sides, (one[label], other[label]), strict=True):
                    # Class names are as many as there are classes; where they differ, so do their number or source.
                    side[f"{kind} {label}".rstrip()] = {k: v for k, v in about.items() if k != "class_names"}
            else:
                found.append(f"{kind} {label}: only in the {'first' if label in one else 'second'} run")
    return found + suite.differences(sides[0], sides[1], "{}: {} -> {}")


def _settings(run: Run) -> dict[str, Any]:
    sessions = run.manifest.get("sessions") or [{}]
    return {
        "orthattack": run.manifest.get("orthattack"),
        "status": run.status,
        # What the configuration says of attacks and models, the manifest says of each in full.
        "config": {k: v for k, v in run.manifest["config"].items() if k not in ("attacks", "models")},
        "versions": sessions[-1].get("versions"),
        "random_numbers": sessions[-1].get("random_numbers"),
    }

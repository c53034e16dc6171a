"""What the trust checks run on a few images of each model: short attacks, and the model on what was saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from orthattack.eval.attacks.kind import AttackKind
from orthattack.eval.attacks.load import attack_kind
from orthattack.eval.suite import AttackSpec, Entry, Suite
from orthattack.threat.norms import BALLS

TRANSFER = "transfer from "
"""What the label of a probe begins with that tries another model's adversarials; the other's label follows."""

SAVED = "saved images of "
"""What the label of a probe begins with that asks about the images on the disk; the attack's label follows."""

QUERIES = 200  # evaluations per image of the query-based probe


def probes(suite: Suite, size: int) -> list[Entry]:
    """The attacks of the checks, at the middle one of the radii, for a model whose square input has `size` pixels; none
    in L0, where PGD has no step."""
    steps, norm, radius = suite.steps, suite.norm, sorted(suite.eps)[len(suite.eps) // 2]
    if not suite.checks or radius == 0:
        return []

    def pgd(**options: Any) -> AttackKind:
        return attack_kind("PGD", {"steps": steps, "early_stop": True, **options})

    found = {
        "one step": (attack_kind("FGSM"), radius),
        "PGD": (pgd(), radius),
        "PGD, 4 times the steps": (pgd(steps=4 * steps), radius),
        "PGD, 3 restarts": (pgd(restarts=3), radius),
        "PGD, twice the radius": (pgd(), 2 * radius),
        "PGD, any image": (pgd(), 0.5 * BALLS[norm].of_ones(3 * size * size)),
        "queries only": (attack_kind("Square", {"queries": QUERIES, "early_stop": True}), radius),
    }
    return [
        Entry(AttackSpec(name=kind.name, label=label), kind, norm, eps, 0, label, early_stop=bool(kind.early_stop))
        for label, (kind, eps) in found.items()
        if norm in kind.norms
    ]


def planned_probes(
    suite: Suite, models: Sequence[Mapping[str, Any]], entries: Sequence[Entry] = ()
) -> list[dict[str, Any]]:
    """Every probe of every model, for the manifest: model, label and eps, and the norm of images saved in 8 bits."""
    exact = [entry for entry in entries if entry.levels and suite.save_images != "none"]
    found: list[dict[str, Any]] = []
    for model in models:
        planned = probes(suite, model["preprocessing"]["crop"])
        found += [{"model": model["label"], "label": probe.label, "eps": probe.eps} for probe in planned]
        others = [other["label"] for other in models if other is not model and _comparable(model, other)]
        eps = next((probe.eps for probe in planned if probe.label == "PGD"), None)
        if eps is not None:
            found += [{"model": model["label"], "label": f"{TRANSFER}{other}", "eps": eps} for other in others]
        found += [
            {"model": model["label"], "label": f"{SAVED}{entry.label}", "eps": entry.eps, "norm": entry.norm}
            for entry in exact
        ]
    return found


def _comparable(model: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether one model's images and classes are the other's."""
    mine, theirs = ((about["num_classes"], about["data"], about["preprocessing"]["crop"]) for about in (model, other))
    return mine == theirs

"""What the trust checks run on a few images of each model: short attacks, and the model on what was saved."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from orthattack.eval.attacks.kind import AttackKind
from orthattack.eval.attacks.load import attack_kind
from orthattack.eval.suite import Entry, Suite
from orthattack.threat import Norm
from orthattack.threat.norms import BALLS

TRANSFER = "transfer from "
"""What the label of a probe begins with that tries another model's adversarials; the other's label follows."""

SAVED = "saved images of "
"""What the label of a probe begins with that asks about the images on the disk; the attack's label follows."""

QUERIES = 200  # evaluations per image of the query-based probe


@dataclass(frozen=True)
class Probe:
    """A short attack of the checks."""

    label: str
    kind: AttackKind
    eps: float


def probes(norm: Norm, eps: Sequence[float], steps: int, size: int) -> list[Probe]:
    """The attacks of the checks, at the middle one of the radii, for a model whose square input has `size` pixels; none
    in L0, where PGD has no step."""
    radius = sorted(eps)[len(eps) // 2]
    everything = 0.5 * BALLS[norm].of_ones(3 * size * size)

    def pgd(**options: Any) -> AttackKind:
        return attack_kind("PGD", {"steps": steps, "early_stop": True, **options})

    found = [
        Probe("one step", attack_kind("FGSM"), radius),
        Probe("PGD", pgd(), radius),
        Probe("PGD, 4 times the steps", pgd(steps=4 * steps), radius),
        Probe("PGD, 3 restarts", pgd(restarts=3), radius),
        Probe("PGD, twice the radius", pgd(), 2 * radius),
        Probe("PGD, any image", pgd(), everything),
        Probe("queries only", attack_kind("Square", {"queries": QUERIES, "early_stop": True}), radius),
    ]
    return [probe for probe in found if radius > 0 and norm in probe.kind.norms]


def planned_probes(
    suite: Suite, models: Sequence[Mapping[str, Any]], entries: Sequence[Entry] = ()
) -> list[dict[str, Any]]:
    """Every probe of every model, for the manifest: model, label and eps, and the norm of images saved in 8 bits."""
    exact = [entry for entry in entries if entry.levels and suite.save_images != "none"]
    found: list[dict[str, Any]] = []
    for model in models:
        planned = probes(suite.norm, suite.eps, suite.steps, model["preprocessing"]["crop"])
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

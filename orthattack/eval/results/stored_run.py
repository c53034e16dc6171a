"""What a stored run says, as numbers.

One attack at one radius is read at a time, and of it the columns that are asked for: memory grows with the images, not
with how often they were attacked.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import BaseModel

from orthattack.eval.errors import EvaluationError, told
from orthattack.eval.results.detection import detection
from orthattack.eval.results.outcomes import (
    FOOLED,
    ROBUST,
    UNSCORED,
    WRONG,
    Outcomes,
    bools,
    compare,
    confusion,
    floats,
    is_,
    measures,
    median_queries,
    paired_row,
    per_class,
    rate_columns,
    rates,
)
from orthattack.eval.results.paired import Paired, optimality
from orthattack.eval.results.rates import Rate
from orthattack.eval.storage.run_folder import RunFolder
from orthattack.eval.storage.schema import CheckRecords, Kind, ManifestRecord, TransferRecords, from_json, unfit

WORST = "worst case of all"
"""Name of the rows in which an image counts as fooled if any attack at that radius fooled it."""

COSINE_EDGES = np.linspace(-10, 0, 51)
"""Edges of the histograms of log10 |cos|; what is smaller, 0 included, is counted in the first bin."""

TARGETS = "transfer.json"
"""The file that says which models have judged the adversarial images of others."""

FREQUENT = 100
"""How many pairs of a class and what its images are taken for are told of an attack: there may be a million."""

_COLUMNS = ["position", "label", "status", "message", "success", "cosine", "forward_calls", "gradient_calls"]
_COLUMNS += ["rounded_success", "seconds", "adversarial_prediction", "evaluations"]


@dataclass(frozen=True)
class _Cell:
    """All that is told of one model at one radius."""

    rows: list[dict[str, Any]]
    pairs: list[dict[str, Any]]
    classes: list[dict[str, Any]]
    confusion: list[dict[str, Any]]
    cosines: dict[str, NDArray[np.int64]]


class Run:
    """A run read back from its folder. What is read is kept, so open it again to see what has come since.

    Radii in different norms cannot be compared, so a run is seen one norm at a time.

    Args:
        folder: the run's folder.
        manifest: what its manifest.json says.
        norm: whose attacks to see; by default the run's main norm.
        checks: the trust checks as they have just been judged; by default what checks.json says.
    """

    def __init__(
        self,
        folder: RunFolder,
        manifest: Mapping[str, Any],
        norm: str | None = None,
        checks: list[dict[str, str]] | None = None,
    ) -> None:
        self.folder = folder
        self.manifest = manifest
        if (why := unfit(ManifestRecord, manifest)) is not None:
            raise EvaluationError(f"{folder}/manifest.json lacks what a report needs ({why})")
        config = manifest["config"]
        self.norm: str = norm or config["norm"]
        self.models: dict[str, Mapping[str, Any]] = {model["label"]: model for model in manifest["models"]}
        norms = [attack.get("norm") or config["norm"] for attack in manifest["attacks"]]
        self.attacks: dict[str, Mapping[str, Any]] = {
            attack["label"]: attack for attack, own in zip(manifest["attacks"], norms, strict=True) if own == self.norm
        }
        main = config["eps"] if self.norm == config["norm"] else ()
        own = [eps for attack in self.attacks.values() for eps in attack.get("eps", ()) if eps is not None]
        # None for attacks that minimise the norm, if there is no radius to see them at.
        self.radii: list[float | None] = [*sorted({float(eps) for eps in (*main, *own)})] or [None]
        self.other_norms = sorted(set(norms) - {self.norm})
        self._checks = checks
        self._cells: dict[tuple[str, float | None], _Cell] = {}
        self._views: dict[str, Run] = {self.norm: self}

    @classmethod
    def open(cls, place: Path | str) -> Run:
        """Open the folder of a run, or its URL, finished or not; EvaluationError if it is none."""
        folder = RunFolder(place)
        return cls(folder, folder.manifest())

    def in_norm(self, norm: str) -> Run:
        """The same run, its attacks in another norm."""
        if norm not in self._views:
            self._views[norm] = Run(self.folder, self.manifest, norm, self._checks)
        return self._views[norm]

    def of_model(self, label: str) -> Run:
        """The same run, of one of its models alone; EvaluationError that says which it has, if not this one."""
        if label not in self.models:
            raise EvaluationError(f"{self.folder} has no model {label!r}; it has {', '.join(self.models) or 'none'}")
        models = [model for model in self.manifest["models"] if model["label"] == label]
        return Run(self.folder, {**self.manifest, "models": models}, self.norm, self._checks)

    def radii_of(self, attack: str) -> list[float | None]:
        """The radii under which the rows of an attack are stored: None alone for one that minimises the norm."""
        about = self.attacks[attack]
        return [None] if about.get("minimal") else list(about.get("eps") or self.radii)

    def attacks_at(self, eps: float | None) -> list[str]:
        """The attacks that are seen at a radius: those that were run at it, and those that minimise the norm."""
        return [attack for attack in self.attacks if self.radii_of(attack) == [None] or eps in self.radii_of(attack)]

    @property
    def status(self) -> str:
        """ "complete", "interrupted" or "running"."""
        return str(self.manifest.get("status", "running"))

    def checks(self) -> list[dict[str, str]]:
        """The trust checks: model, check, status ("passed", "warned" or "not run"), figures, why."""
        if self._checks is None:
            self._checks = self._records("checks.json", CheckRecords)
        return self._checks

    def _records(self, name: str, kind: type[BaseModel]) -> list[Any]:
        """A file of records of the run, none if there is no such file."""
        try:
            found: list[Any] = from_json(self.folder.read_text(name) or "[]")
            if (why := unfit(kind, found)) is not None:
                raise ValueError(why)
        except (OSError, ValueError, RecursionError) as error:
            raise EvaluationError(f"{self.folder}/{name} cannot be read ({told(error)})") from error
        return found

    def images(self, model: str) -> int:
        """How many images the run set out to attack."""
        return int((self.models[model].get("data") or {}).get("images") or 0)

    def class_name(self, model: str, label: int) -> str:
        """A class as people call it, or its number."""
        names = self.models[model].get("class_names")
        return str(names[label]) if names and 0 <= label < len(names) else str(label)

    def stored_eps(self, attack: str, eps: float | None) -> float | None:
        """The radius under which the rows of an attack are stored: None for one that minimises the norm."""
        return None if self.attacks[attack].get("minimal") else eps

    def rows(self, model: str, attack: str, eps: float | None, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """The stored rows of an attack at a radius of the run, in the order of the images."""
        return self._stored("shards", model, attack, self.stored_eps(attack, eps), columns)

    def clean(self, model: str, columns: Sequence[str] | None = None) -> pd.DataFrame:
        """The stored rows of the model on the images as they are."""
        return self._stored("clean", model, "clean", None, columns)

    def _stored(
        self, kind: Kind, model: str, attack: str, eps: float | None, columns: Sequence[str] | None
    ) -> pd.DataFrame:
        rows = self.folder.read(kind, model, attack, eps, columns, unfinished=self.status != "complete")
        if "position" in rows and len(rows) and rows["position"].iloc[-1] >= self.images(model):
            raise EvaluationError(f"{self.folder} has rows of {model} for more images than manifest.json says")
        return rows

    def clean_accuracy(self, model: str) -> Rate:
        """Right on the clean image, over the images that could be read and predicted."""
        return self._clean[model][0]

    def gradient_cosines(self, model: str) -> NDArray[np.float64]:
        """Cosines of the loss's gradient and the image, of the images that have one. (N,)"""
        return self._clean[model][1]

    @functools.cached_property
    def _clean(self) -> dict[str, tuple[Rate, NDArray[np.float64]]]:
        found = {}
        for model in self.models:
            rows = self.clean(model, ["label", "status", "prediction", "gradient_cosine"])
            ok = is_(rows["status"], "ok")
            right = bools(rows["prediction"] == rows["label"]) & ok
            cosine = floats(rows["gradient_cosine"])[ok]
            found[model] = Rate(int(right.sum()), int(ok.sum())), cosine[np.isfinite(cosine)]
        return found

    def outcomes(self, model: str, attack: str, eps: float | None) -> Outcomes:
        """What became of each image. An attack that minimises the norm fools at eps what it fools within eps."""
        columns = ["position", "label", "status", "success", self.norm]
        return self.outcomes_of(self.rows(model, attack, eps, columns), attack, eps)

    def outcomes_of(self, rows: pd.DataFrame, attack: str, eps: float | None) -> Outcomes:
        """The same, of rows that have been read."""
        return Outcomes.of(rows, self.norm, eps if self.attacks[attack].get("minimal") else None)

    def table(self) -> pd.DataFrame:
        """The leaderboard: a row per model, radius and attack, and one for the worst case of all.

        Counts (images, rows, scored, ok, robust, fooled, misclassified, error, unreadable, invalid), rates with
        intervals (robust_accuracy, success_rate, clean_accuracy; _low, _high), mean_norm and max_norm (of attacked
        images; of fooled ones where the attack minimises the norm), mean_abs_cosine and max_abs_cosine, forward_calls
        and gradient_calls per attacked image, seconds in all, rounded_success (share of the fooled that stay so in 8
        bits), median_queries (evaluations of the model until the first success, over the fooled; of attacks that stop
        there and ask for no gradient, or of all that stop there in a run with a budget), and reasons, why images were
        not scored, with counts, as JSON. NaN is undefined.
        """
        return pd.DataFrame([row for cell in self._all() for row in cell.rows])

    def paired(self) -> pd.DataFrame:
        """Each attack beside its baselines on the images that both scored; columns as in `Paired`."""
        columns = ["model", "eps", "attack", "baseline", *paired_row(Paired(0, 0, 0, 0))]
        return pd.DataFrame([row for cell in self._all() for row in cell.pairs], columns=columns)

    def per_class(self, model: str, eps: float | None) -> pd.DataFrame:
        """Robust accuracy per class and attack: columns label, attack, scored, robust."""
        return pd.DataFrame(self.cell(model, eps).classes, columns=["label", "attack", "scored", "robust"])

    def confusion(self, model: str, eps: float | None) -> pd.DataFrame:
        """What attacked images are taken for, by attack: columns attack, label, prediction, images, and, how many of
        these are successes, success. Without those that are taken for what they are."""
        found = []
        for attack in self.attacks_at(eps):
            table = self.rows(model, attack, eps, [*_COLUMNS, self.norm])
            minimal, outcome = bool(self.attacks[attack].get("minimal")), self.outcomes_of(table, attack, eps).outcome
            found += confusion(attack, table, minimal, outcome)
        return pd.DataFrame(found, columns=["attack", "label", "prediction", "images", "success"])

    @property
    def targets(self) -> str | None:
        """How the classes to reach were chosen, of a targeted run."""
        how = self.manifest["config"].get("targets")
        return None if how is None else str(how)

    @property
    def queries(self) -> int | None:
        """How many evaluations of the model per image there may be, of a run with a query budget."""
        most = self.manifest["config"].get("queries")
        return None if most is None else int(most)

    def cosine_histograms(self, model: str, eps: float | None) -> dict[str, NDArray[np.int64]]:
        """How many attacked images have log10 ``|cos(perturbation, image)|`` per bin of `COSINE_EDGES`, by attack."""
        return self.cell(model, eps).cosines

    def curves(self, model: str) -> dict[str, pd.DataFrame]:
        """Robust accuracy against eps with pointwise intervals, by attack: columns eps, robust_accuracy, low, high.

        It begins at eps 0 with clean accuracy. An attack that minimises the norm has the whole curve, others a point
        per radius.
        """
        clean = self.clean_accuracy(model)
        found = {}
        for attack, about in self.attacks.items():
            if about.get("minimal"):
                found[attack] = self._whole_curve(model, attack)
                continue
            points = [(0.0, clean)]
            for eps in self.radii_of(attack):
                row = next(row for row in self.cell(model, eps).rows if row["attack"] == attack)
                points.append((float(eps or 0), Rate(row["robust"], row["scored"])))
            found[attack] = _curve(points)
        return found

    def _whole_curve(self, model: str, attack: str) -> pd.DataFrame:
        rows = self.rows(model, attack, None, ["position", "label", "status", "success", self.norm])
        outcome = self.outcomes_of(rows, attack, None).outcome
        norms = np.sort(floats(rows[self.norm])[outcome == FOOLED])
        scored, right = int((outcome != UNSCORED).sum()), int((outcome > WRONG).sum())
        reach = max([eps for eps in self.radii if eps is not None], default=float(norms.max(initial=0.0)))
        grid = np.linspace(0, reach, 201)
        counts = right - np.searchsorted(norms, grid, side="right")
        return _curve([(float(eps), Rate(int(count), scored)) for eps, count in zip(grid, counts, strict=True)])

    def optimality(self) -> pd.DataFrame:
        """Local optimality per model and minimal attack, and global, its mean over the models where it is defined.

        The best distance of an image is over all attacks of the run, at every radius; the images are those that all
        attacks which minimise the norm scored. Columns model, attack, images, local; the global one has model None.
        """
        minimal = [label for label, about in self.attacks.items() if about.get("minimal")]
        found = []
        for model in self.models if minimal else []:
            distances = {attack: self._distances(model, attack) for attack in self.attacks}
            scored = np.logical_and.reduce([~np.isnan(distances[attack]) for attack in minimal])
            best = np.fmin.reduce(list(distances.values()))[scored]
            found += [
                {"model": model, "attack": a, "images": len(best), "local": optimality(distances[a][scored], best)}
                for a in minimal
            ]
        table = pd.DataFrame(found, columns=["model", "attack", "images", "local"])
        means = [
            {"model": None, "attack": a, "images": None, "local": table.loc[table["attack"] == a, "local"].mean()}
            for a in minimal
        ]
        return pd.concat([table, pd.DataFrame(means)]) if means else table

    def _distances(self, model: str, attack: str) -> NDArray[np.float64]:
        """Smallest norm by position: 0 where initially misclassified, inf where not fooled, NaN where not scored."""
        best = np.full(self.images(model), np.nan)
        for eps in self.radii_of(attack):
            rows = self.rows(model, attack, eps, ["position", "label", "status", "success", self.norm])
            found = self.outcomes_of(rows, attack, None)
            distance = np.select(
                [found.outcome == WRONG, found.outcome == ROBUST, found.outcome == FOOLED],
                [0.0, np.inf, floats(rows[self.norm])],
                np.nan,
            )
            best[found.position] = np.fmin(best[found.position], distance)
        return best

    def judges(self) -> dict[str, Mapping[str, Any]]:
        """The models that have judged the adversarial images of others, by label: `orthattack transfer`."""
        return {str(one["label"]): one for one in self._records(TARGETS, TransferRecords)}

    def transfer(self) -> pd.DataFrame:
        """How often the adversarial images of one model, the source, fool another, the target.

        Of the images that both classify correctly and that the run has kept; where both are the same model, of all that
        the attack had: its success rate. To fool is to be taken for any other class, in targeted runs too.

        A row per attack, radius, source and target: columns attack, eps, source, target, n (images that both classify
        correctly), fooled, success_rate with its interval (_low, _high). Without `orthattack transfer` it has no rows.
        """
        return self._transfer.copy()

    @functools.cached_property
    def _transfer(self) -> pd.DataFrame:
        judges = [*self.judges()]
        found = [
            row
            for attack in (self.attacks if judges else ())
            for eps in self.radii_of(attack)
            for source in self.models
            for row in self._transferred(attack, eps, source, judges)
        ]
        columns = ["attack", "eps", "source", "target", "n", "fooled", *rate_columns("success_rate", Rate(0, 0))]
        return pd.DataFrame(found, columns=columns)

    def _transferred(
        self, attack: str, eps: float | None, source: str, targets: Sequence[str]
    ) -> Iterator[dict[str, Any]]:
        size = self.images(source)
        columns = ["position", "label", "status", "success", "adversarial_prediction"]
        rows = self.rows(source, attack, eps, columns)
        if self.targets is not None:
            rows = rows.assign(success=rows["adversarial_prediction"] != rows["label"])
        own = Outcomes.of(rows, self.norm).dense(size)
        for target in targets:
            theirs = own
            if target != source:
                rows = self.folder.read("transfer", target, attack, eps, columns, source)
                theirs = Outcomes.of(rows, self.norm).dense(size)
            both = (own > WRONG) & (theirs > WRONG)
            n, fooled = int(both.sum()), int((both & (theirs == FOOLED)).sum())
            place = {"attack": attack, "eps": eps, "source": source, "target": target}
            yield {**place, "n": n, "fooled": fooled, **rate_columns("success_rate", Rate(fooled, n))}

    @property
    def detector(self) -> str | None:
        """The run's detector, if it has one."""
        name = self.manifest["config"].get("detector")
        return None if name is None else str(name)

    def detection(self) -> pd.DataFrame:
        """What the run's detector sees, a row per model, false-positive rate, radius and attack, and the worst case.

        Columns model, false_positive_rate, threshold (the smallest clean score that at most that share of the clean
        images exceed), clean and flagged (how many clean images there are, and exceed it), eps, attack, n (initially
        correct, scored by attack and detector), fooled, detected (of these, above the threshold), evaded (of these,
        not), detected_share, of the fooled, and evaded_share, of n, with intervals (_low, _high). In the worst case an
        image evades if it does under any attack. Without a detector it has no rows.
        """
        return self._detection.copy()

    @functools.cached_property
    def _detection(self) -> pd.DataFrame:
        return pd.DataFrame(detection(self, WORST))

    def progress(self) -> tuple[int, int]:
        """Rows that are there, and rows that there will be."""
        rows = [row for cell in self._all() for row in cell.rows if row["attack"] != WORST]
        # Those of an attack that minimises the norm are the same at every radius.
        rows = [row for row in rows if row["eps"] == self.radii[0] or not self.attacks[row["attack"]].get("minimal")]
        return sum(row["rows"] for row in rows), sum(row["images"] for row in rows)

    def _all(self) -> list[_Cell]:
        return [self.cell(model, eps) for model in self.models for eps in self.radii]

    def cell(self, model: str, eps: float | None) -> _Cell:
        """Everything of one model at one radius, read once."""
        if (model, eps) not in self._cells:
            self._cells[model, eps] = self._read(model, eps)
        return self._cells[model, eps]

    def _read(self, model: str, eps: float | None) -> _Cell:
        size = self.images(model)
        rows, classes, taken, cosines = [], [], [], {}
        by_position: dict[str, NDArray[np.int8]] = {}
        labels = np.full(size, -1, np.int32)
        attacks = self.attacks_at(eps)
        for attack in attacks:
            about = self.attacks[attack]
            minimal = bool(about.get("minimal"))
            table = self.rows(model, attack, eps, [*_COLUMNS, self.norm])
            found = self.outcomes_of(table, attack, eps)
            by_position[attack] = found.dense(size)
            labels[found.position] = found.label
            row = self._row(model, attack, eps, found.outcome) | measures(table, self.norm, minimal, found.outcome)
            row["median_queries"] = median_queries(table, about, self.queries is not None, found.outcome)
            rows.append(row)
            classes += per_class(attack, found.label, found.outcome)
            taken += confusion(attack, table, minimal, found.outcome, FREQUENT)
            cosine = np.abs(floats(table["cosine"])[found.outcome > WRONG])
            logs = np.log10(np.maximum(cosine[np.isfinite(cosine)], 10.0 ** COSINE_EDGES[0]))
            cosines[attack] = np.histogram(np.minimum(logs, 0.0), COSINE_EDGES)[0]
        if by_position:
            # By the numbers: fooled beats robust beats wrong, and not scored counts only where nobody scored.
            worst = np.maximum.reduce(list(by_position.values()))
            complete = np.minimum.reduce(list(by_position.values())) != UNSCORED
            row = self._row(model, WORST, eps, worst)
            rows.append(row | {"rows": row["scored"], "scored_by_all": int(complete.sum())})
            classes += per_class(WORST, labels, worst)
        pairs = [
            {"model": model, "eps": eps, "attack": attack, "baseline": baseline}
            | paired_row(compare(by_position[attack], by_position[baseline]))
            for attack in attacks
            for baseline in self.attacks[attack].get("baselines") or []
            if baseline in by_position
        ]
        return _Cell(rows, pairs, classes, taken, cosines)

    def _row(self, model: str, attack: str, eps: float | None, outcome: NDArray[np.int8]) -> dict[str, Any]:
        row = {"model": model, "attack": attack, "eps": eps, "images": self.images(model)}
        clean = self.clean_accuracy(model)
        return row | rates(outcome, clean.count > 0) | rate_columns("clean_accuracy", clean)


def _curve(points: list[tuple[float, Rate]]) -> pd.DataFrame:
    rows = [(eps, rate.value, *(rate.interval() or (None, None))) for eps, rate in points]
    return pd.DataFrame(rows, columns=["eps", "robust_accuracy", "low", "high"], dtype=float)

"""Trust checks: whether a robustness evaluation shows the signs of one that went wrong.

After Carlini et al. 2019 (arXiv:1902.06705), "On Evaluating Adversarial Robustness", and Pintor et al. 2022
(arXiv:2106.09947), "Indicators of Attack Failure". Some read what the run measured anyway; for the others a few short
attacks run on a few images of each model (`probes`). A check passes or warns, with its figures; it never changes a
result.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor

from orthattack.eval.checks.clean import CLEAN_COLUMNS, clean_suspicions, differentiated
from orthattack.eval.checks.probes import SAVED, TRANSFER
from orthattack.eval.errors import EvaluationError, first_line
from orthattack.eval.storage.run_folder import RunFolder, shown_eps
from orthattack.threat import NAMED, Norm, ThreatModel, perturbation_norm


@dataclass(frozen=True)
class Check:
    """One check of one model."""

    model: str  # its label
    check: str  # what was checked
    status: Literal["passed", "warned", "not run"]  # passed, warned, or not run
    figures: str  # what was found
    why: str = ""  # what it means, if it warns, or why it was not run


Found = str | tuple[bool, str, str]
"""Of a check: whether it passed, its figures, and what it means if not; or why it was not run."""

NOTHING_LEFT = "no image was left: none was initially correct and scored by both"


def assess(folder: RunFolder, manifest: Mapping[str, Any]) -> list[Check]:
    """Every check of every model, from what is stored."""
    found: list[Check] = []
    for model in manifest["models"]:
        found += _Model(folder, manifest, model).checks()
    return found


class _Model:
    """One model's rows, as the checks need them."""

    def __init__(self, folder: RunFolder, manifest: Mapping[str, Any], model: Mapping[str, Any]) -> None:
        self.folder, self.manifest, self.label = folder, manifest, str(model["label"])
        self.classes, self.images = int(model["num_classes"]), int(model["data"]["images"])
        self.published: float | None = model.get("published_accuracy")
        config = manifest["config"]
        self.norm: Norm = config["norm"]
        self.radius = sorted(config["eps"])[len(config["eps"]) // 2]
        self.at = f"at eps {shown_eps(self.radius, self.norm)}"

    def checks(self) -> list[Check]:
        helps = self._never_helps
        found: dict[str, Found] = {
            "model, data and preprocessing belong together": self._clean(),
            "gradients are not zero, NaN or missing": self._gradients(),
            "more steps never help the defender": helps("PGD", "PGD, 4 times the steps"),
            "more restarts never help the defender": helps("PGD", "PGD, 3 restarts"),
            "a larger radius never helps the defender": helps("PGD", "PGD, twice the radius"),
            "a radius that allows any image leaves nothing robust": self._any_image(),
            "iterating is no weaker than a single step": helps("one step", "PGD"),
            "queries are no stronger than gradients": self._no_stronger("queries only"),
            "transfer is no stronger than gradients": self._transfer(),
            "robust accuracy falls as eps grows": self._larger_eps(),
            "success survives rounding to 8 bits": self._rounding(),
            "saved images keep budget and orthogonality": self._saved(),
        }
        if any(attack.get("levels") for attack in self.manifest["attacks"]):
            found["saved images are exact in 8 bits"] = self._exact()
        checks = []
        for name, result in found.items():
            if isinstance(result, str):
                checks.append(Check(self.label, name, "not run", "", result))
            else:
                passed, figures, why = result
                checks.append(Check(self.label, name, "passed" if passed else "warned", figures, "" if passed else why))
        return checks

    def _clean(self) -> Found:
        rows = self.folder.read("clean", self.label, columns=CLEAN_COLUMNS)
        rows = rows[rows["status"] == "ok"]
        if rows.empty:
            return "no image could be scored"
        from scipy.special import bdtr  # scipy.stats takes a second to import

        right, n = int((rows["wrong_share"] <= 0.5).sum()), len(rows)
        against = "" if self.published is None else f" (published: {100 * self.published:.1f} %)"
        found, numbers = clean_suspicions(rows, self.classes), rows[CLEAN_COLUMNS[2:]]
        if self.published is not None and bdtr(right, n, self.published) < 0.01 and right / n < self.published - 0.05:
            found.append(
                "clean accuracy is well below what the weights' authors publish for ImageNet's validation set: other "
                "images may be the reason, or labels, resizing or normalisation that are not the model's"
            )
        low, high = numbers.min(), numbers.max()
        return (
            not found,
            f"{100 * right / n:.1f} % of {n} right{against}, "
            f"logits from {low['logit_min']:.3g} to {high['logit_max']:.3g}, "
            f"pixels from {low['image_min']:.3g} to {high['image_max']:.3g}",
            "; ".join(found),
        )

    def _gradients(self) -> Found:
        rows = self.folder.read("clean", self.label, columns=["position", "status", "gradient_norm", "evaluations"])
        rows = rows[rows["position"].isin(differentiated(self.images)) & (rows["status"] == "ok")]
        if rows.empty:
            return "no image could be scored"
        if (rows["evaluations"] > 1).all():
            return "the model answers at random, so one gradient says little: use eot_samples"
        usable = rows["gradient_norm"].notna() & (rows["gradient_norm"] > 0)
        bad = int((~usable.fillna(False)).sum())
        return (
            bad == 0, f"{bad} of {len(rows)} images without a usable gradient",
            "a masked or saturated gradient hides adversarials from gradient attacks; trust the query-based ones",
        )  # fmt: skip

    def _probe(self, label: str) -> pd.Series[bool]:
        """Whether a probe fooled an image, by position; empty if it was not run."""
        for entry in self.manifest.get("probes", []):
            if (entry["model"], entry["label"]) == (self.label, label):
                return self._read("checks", label, entry["eps"])
        return pd.Series(dtype=bool)

    def _read(self, kind: Literal["shards", "checks"], label: str, eps: float | None) -> pd.Series[bool]:
        rows = self.folder.read(kind, self.label, label, eps, ["position", "status", "success"])
        return rows[rows["status"] == "ok"].set_index("position")["success"].astype(bool)

    def _probes(self, one: str, other: str) -> tuple[pd.Series[bool], pd.Series[bool]]:
        """What two probes did to the images that both scored."""
        first, second = self._probe(one).align(self._probe(other), join="inner")
        return first, second

    def _never_helps(self, weaker: str, stronger: str) -> Found:
        weak, strong = self._probes(weaker, stronger)
        if weak.empty:
            return NOTHING_LEFT
        before, after, n = int((~weak).sum()), int((~strong).sum()), len(weak)
        if n - before <= _slack(n):  # whatever the other does, it could not lose more than means nothing
            return f"too few images to lose: {weaker!r} fooled {n - before} of {n}, {self.at}"
        return (
            after <= before + _slack(n), f"{before} of {n} robust, then {after}, {self.at}",
            "the attack does not use what it is given: its loss or gradient is broken, or its steps are too large",
        )  # fmt: skip

    def _no_stronger(self, other: str) -> Found:
        gradient, rival = self._probes("PGD, 4 times the steps", other)
        if gradient.empty:
            return NOTHING_LEFT
        left, n = int((~gradient).sum()), len(gradient)
        if left <= _slack(n):
            return f"too few images were left: gradients fooled {n - left} of {n}, {self.at}"
        alone = int((rival & ~gradient).sum())
        return (
            alone <= _slack(n),
            f"{alone} of {n} fooled by it alone, {self.at}",
            "the gradients are masked: gradient attacks overestimate this model's robustness",
        )  # fmt: skip

    def _any_image(self) -> Found:
        fooled = self._probe("PGD, any image")
        if len(fooled) <= 1:
            return NOTHING_LEFT if fooled.empty else "one image says too little"
        robust = int((~fooled).sum())
        return (
            robust <= _slack(len(fooled)), f"{robust} of {len(fooled)} robust",
            "an attack that may turn an image into any other must succeed: the gradient is masked or the loss broken",
        )  # fmt: skip

    def _transfer(self) -> Found:
        rivals = [
            entry["label"]
            for entry in self.manifest.get("probes", [])
            if entry["model"] == self.label and entry["label"].startswith(TRANSFER)
        ]
        if not rivals:
            return "it needs a second model with the same classes and input size"
        worst = [self._no_stronger(rival) for rival in rivals]
        return min(worst, key=lambda found: 2 if isinstance(found, str) else found[0])  # warned, passed, not run

    def _larger_eps(self) -> Found:
        """Of every attack of the run with several radii: a larger one never leaves more robust."""
        found: list[tuple[int, str, list[int], int]] = []
        several = False
        for attack in self.manifest["attacks"]:
            radii = sorted(eps for eps in attack.get("eps", ()) if eps is not None)
            if len(radii) < 2:
                continue
            rows = [self._read("shards", attack["label"], eps) for eps in radii]
            counts = [int((~fooled).sum()) for fooled in rows]
            n, several = min(map(len, rows)), True
            if n - min(counts[:-1]) <= _slack(n):  # so few fell below the largest radius that none can be lost again
                continue
            rises = [b - a for a, b in pairwise(counts)]
            found.append((max(rises), attack["label"], counts, n))
        if not found:
            return "too few images were fooled below the largest radius" if several else "it needs several radii"
        rise, label, counts, n = max(found)
        return (
            rise <= _slack(n),
            f"of {len(found)} attacks, {label} is the least regular: {', '.join(map(str, counts))} robust of {n}",
            "a larger ball contains the smaller one, so the attack fails to use it",
        )

    def _rounding(self) -> Found:
        kept: dict[tuple[str, float], list[int]] = {}
        for attack in self.manifest["attacks"]:
            for eps in attack["eps"]:
                if eps is None:  # the smallest perturbation that fools is one that rounding undoes, by construction
                    continue
                rows = self.folder.read("shards", self.label, attack["label"], eps, ["rounded_success"]).dropna()
                both = kept.setdefault((attack["norm"], eps), [0, 0])
                both[0] += int(rows["rounded_success"].sum())
                both[1] += len(rows)
        shares = {key: (a, b) for key, (a, b) in kept.items() if b > 1}
        if not shares:
            most = max((b for _, b in kept.values()), default=0)
            return "one success says too little" if most else "no attack with a radius succeeded"
        figures = ", ".join(f"{100 * a / b:.1f} % at {shown_eps(eps, norm)}" for (norm, eps), (a, b) in shares.items())
        return (
            all(b - a <= max(1, 0.1 * b) for a, b in shares.values()),
            figures,
            "an 8-bit file cannot hold these adversarials; what it holds fools less often",
        )

    def _saved(self) -> Found:
        """Budget and |cos| of the stored images, from nothing but the files, and after rounding to 8 bits."""
        clean = dict(self.folder.images(self.label, "clean", None))
        if not clean:
            return "no images were saved"
        count, orthogonal, worst, cosine, rounded, others = 0, 0, 0.0, 0.0, 0.0, False
        for attack in self.manifest["attacks"]:
            threat, unnamed = _promise(attack)
            for eps in attack["eps"]:
                if unnamed:  # measured on the same pixels, when they were at hand
                    rows = self.folder.read("shards", self.label, attack["label"], eps, ["promised_cosine"]).dropna()
                    cosine, others = max(cosine, rows["promised_cosine"].max()) if len(rows) else cosine, True
                for position, image in self.folder.images(self.label, attack["label"], eps):
                    if position not in clean:
                        raise EvaluationError(
                            f"the saved images of {self.label} are damaged: {attack['label']} has one of image "
                            f"{position}, and there is no clean one: remove the folder images, and start the run again"
                        )
                    x, adversarial = clean[position].double()[None], image.double()[None]
                    delta = adversarial - x
                    count += 1
                    if eps:
                        worst = max(worst, float(perturbation_norm(delta, attack["norm"])) / eps)
                    if threat is not None:
                        orthogonal += 1
                        cosine = max(cosine, float(threat.cosine(delta, x)))
                        rounded = max(rounded, float(threat.cosine((adversarial * 255).round() / 255 - x, x)))
        if count == 0:
            return "no adversarial image was saved"
        promised = f"|cos| at most {cosine:.1e} where promised, {rounded:.1e} after rounding to 8 bits"
        return (
            worst <= 1 + 1e-4 and cosine <= 1e-6,
            f"{count} images: norm at most {worst:.7g} eps, "
            + (promised if orthogonal or others else "none of an attack that promises orthogonality")
            + others * "; tensors and functions as measured during the run",
            "what was saved is not what the attack promised",
        )

    def _exact(self) -> Found:
        """Ball and products with the image as whole numbers, from nothing but the files, and the model's answers."""
        clean = dict(self.folder.images(self.label, "clean", None))
        count, bound, off, worst, largest = 0, 0, 0, 0.0, 0.0
        for attack in self.manifest["attacks"]:
            if not attack.get("levels"):
                continue
            threat = _promise(attack)[0] if attack["source"] == "orthattack" else None  # others' are only rounded
            levels = ThreatModel("l2", 0.0, scope=None, levels=256) if threat is None else replace(threat, levels=256)
            for eps in attack["eps"]:
                for position, image in self.folder.images(self.label, attack["label"], eps):
                    if position not in clean:
                        continue
                    x, adversarial = clean[position][None], image[None]
                    count += 1
                    off += not (_is_8_bit(x) and _is_8_bit(adversarial))
                    norm, cosine = replace(levels, norm=attack["norm"]).sizes(x, adversarial)
                    worst = max(worst, float(norm) / eps) if eps else worst
                    if threat is not None:
                        bound, largest = bound + 1, max(largest, float(cosine))
        if count == 0:
            return "no adversarial image was saved"
        judged, other = self._judged_again()
        answers = f"; the model's prediction is the same for {judged - other} of {judged}" if judged else ""
        return (
            off == 0 and worst <= 1 + 1e-6 and largest == 0 and other == 0,
            f"{count} images: {off} not of 8 bits, norm at most {worst:.7g} eps; "
            + (f"(delta * image).sum() == 0 for {bound}" if largest == 0 else f"|cos| up to {largest:.1e} of {bound}")
            + answers,
            "what was saved is not exact, or not what was judged",
        )

    def _judged_again(self) -> tuple[int, int]:
        """How many of the saved images the model was asked about again, and of how many it said something else.

        One that answers at random may: only images count about which all its answers were the same each time."""
        columns = ["position", "status", "adversarial_prediction", "wrong_share"]
        judged = other = 0
        for probe in self.manifest.get("probes", []):
            if probe["model"] != self.label or not probe["label"].startswith(SAVED):
                continue
            label, eps = probe["label"], probe["eps"]
            before = self.folder.read("shards", self.label, label.removeprefix(SAVED), eps, columns)
            again = self.folder.read("checks", self.label, label, eps, columns)
            first, second = (frame[frame["status"] == "ok"].set_index("position") for frame in (before, again))
            first, second = first.align(second, join="inner", axis=0)
            differs = first["adversarial_prediction"] != second["adversarial_prediction"]
            sure = first["wrong_share"].isin([0, 1]) & second["wrong_share"].isin([0, 1])
            judged, other = judged + len(first), other + int((differs & sure).sum())
        return judged, other


def _is_8_bit(image: Tensor) -> bool:
    """Whether these are the floats of an image of 8 bits."""
    return bool(torch.equal((image * 255).round() / 255, image))


def _promise(attack: Mapping[str, Any]) -> tuple[ThreatModel | None, bool]:
    """What an attack promises to be orthogonal to, as far as it can be told from the manifest, and whether that is not
    all: of tensors and functions there is only a description."""
    if not attack.get("orthogonal"):
        return None, False
    # Runs of 0.1.0 had the scope among the parameters only, and neither directions nor a normal.
    scope = attack["scope"] if "scope" in attack else attack.get("parameters", {}).get("scope", "image")
    normal, directions = attack.get("normal", "image"), attack.get("directions") or []
    try:
        named = [direction for direction in directions if direction in NAMED["directions"]]
        is_known = normal in NAMED["normal"]
        if not is_known:
            scope, normal = None, "image"
        known = ThreatModel("l2", 0.0, scope=scope, directions=named, normal=normal) if scope or named else None
    except (ValueError, TypeError) as error:
        raise EvaluationError(f"manifest.json: {attack['label']!r}: {first_line(error)}") from error
    return known, len(named) < len(directions) or not is_known


def _slack(n: int) -> int:
    """How many of n images may go the wrong way without meaning anything: one, or 5 %."""
    return max(1, n // 20)

"""The study's numbers: stored results to tables, each value with its interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats
from tabulate import tabulate

from benchmarks.study.contrast import DIRECTIONS
from benchmarks.study.cost import SCOPES
from orthattack.eval.results.outcomes import ROBUST
from orthattack.eval.results.paired import Paired
from orthattack.eval.results.rates import Rate

__all__ = ["TABLES", "exact_cosines", "interval_of_mean", "over_seeds", "ratio_of_smallest"]

Read = Callable[[str], pd.DataFrame]
RESAMPLES = 2000
PER_SCOPE = [f"OrthoPGD, {scope}" for scope in SCOPES]


def interval_of_mean(values: Any) -> tuple[float, float, float]:
    """The mean over images with its 95 % interval: percentiles of 9,999 bootstrap resamples."""
    data = np.asarray(values, float)
    data = data[np.isfinite(data)]
    if len(data) == 0:
        return (math.nan,) * 3
    mean = float(data.mean())
    if np.ptp(data) == 0:
        return mean, mean, mean
    found = stats.bootstrap((data,), np.mean, method="percentile", batch=1000, random_state=np.random.default_rng(0))
    return mean, float(found.confidence_interval.low), float(found.confidence_interval.high)


def over_seeds(values: Sequence[float]) -> tuple[float, float, float]:
    """The mean over training runs with its 95 % interval by Student's t: of few runs, so wide."""
    data = np.asarray(values, float)
    mean = float(data.mean())
    if len(data) < 2:
        return mean, math.nan, math.nan
    half = float(stats.t.ppf(0.975, len(data) - 1) * data.std(ddof=1) / math.sqrt(len(data)))
    return mean, mean - half, mean + half


def ratio_of_smallest(table: pd.DataFrame, model: str, attack: str) -> tuple[int, tuple[float, float, float]]:
    """Geometric mean over images of an attack's smallest radius over plain PGD's, and of how many images."""
    wide = table[table["model"] == model].pivot(index="position", columns="attack", values="norm")
    ratios = (wide[attack] / wide["PGD"]).to_numpy(float)
    logs = np.log(ratios[np.isfinite(ratios)])
    mean, low, high = interval_of_mean(logs)
    return len(logs), (math.exp(mean), math.exp(low), math.exp(high))


def paired(table: pd.DataFrame, model: str, norm: str, eps: float, attack: str, baseline: str = "PGD") -> Paired:
    """Two attacks on the same images."""
    rows = table[(table["model"] == model) & (table["norm"] == norm) & np.isclose(table["eps"], eps)]
    wide = rows.pivot(index="position", columns="attack", values="outcome")
    return Paired.of((wide[attack] == ROBUST).to_numpy(), (wide[baseline] == ROBUST).to_numpy())


def _show(triple: tuple[float, float, float], form: str = ".3f", scale: float = 1.0) -> str:
    mean, low, high = (scale * value for value in triple)
    if math.isnan(mean):
        return "none"
    shown = _number(mean, form)
    return shown if math.isnan(low) else f"{shown} [{low:{form}}, {high:{form}}]"


def _number(value: float, form: str) -> str:
    """A number without the sign of a 0, which is that of last digits in which releases of NumPy differ."""
    shown = f"{value:{form}}"
    return f"{0.0:{form}}" if shown.startswith("-") and float(shown) == 0 else shown


def _points(pair: Paired) -> str:
    difference, interval = pair.difference, pair.interval()
    assert difference is not None
    assert interval is not None
    mark = "\\*" if (pair.p or 1) < 0.05 else ""
    return f"{_number(100 * difference, '+.1f')} [{100 * interval[0]:+.1f}, {100 * interval[1]:+.1f}]{mark}"


def _accuracy(rate: Rate) -> str:
    interval = rate.interval()
    assert rate.value is not None
    assert interval is not None
    return f"{100 * rate.value:.1f} % [{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def _markdown(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A table whose first column names each model once, in the first of its rows."""
    names = [None, *(row[0] for row in rows)]
    shown = [["" if row[0] == before else row[0], *row[1:]] for before, row in zip(names, rows, strict=False)]
    return tabulate(shown, head, tablefmt="github", disable_numparse=True) if rows else ""


def radius(eps: float, norm: str = "linf") -> str:
    """A radius as people write it."""
    return f"{255 * eps:.3g}/255" if norm == "linf" else f"{eps:g}"


def alignment_table(read: Read) -> str:
    table = read("slopes")
    rows = []
    for model, part in table.groupby("model", sort=False) if len(table) else ():
        cosine = part.pivot(index="position", columns="direction", values="cosine")
        rows.append(
            [
                model,
                len(cosine),
                _show(interval_of_mean(cosine["contrast"].abs()), ".4f"),
                f"{part['random'].iloc[0]:.4f}",
                _show(interval_of_mean(cosine["another image"].abs()), ".4f"),
                _show(interval_of_mean(cosine["contrast"]), "+.4f"),
            ]
        )
    head = ["model", "n", "mean \\|cos(g, x)\\|", "random direction", "\\|cos(g, other image)\\|", "mean cos(g, x)"]
    return _markdown(head, rows)


def share_table(read: Read) -> str:
    table = read("gradients")
    rows: list[list[Any]] = []
    noise: list[Any] = []
    for model, part in table.groupby("model", sort=False):
        before, noise = noise, ["noise instead of g", *(f"{100 * part[f'{s}_share_noise'].mean():.3g}" for s in SCOPES)]
        if rows and noise == before:  # of the same size, so of the same noise
            rows.pop()
        rows.append([model, *(_show(interval_of_mean(part[f"{s}_share"]), ".3g", 100) for s in SCOPES)])
        rows.append(noise)
    return _markdown(["model", *(f"{scope}, %" for scope in SCOPES)], rows)


def slopes_table(read: Read) -> str:
    """Mean |cos(g, d)| by direction d, in units of a random direction's."""
    table = read("slopes")
    rows = []
    for model, part in table.groupby("model", sort=False) if len(table) else ():
        wide = in_units(part).pivot(index="position", columns="direction", values="size")
        rows.append([model, len(wide), *(_show(interval_of_mean(wide[name]), ".2f") for name in DIRECTIONS)])
    return _markdown(["model", "n", *DIRECTIONS], rows)


def in_units(table: pd.DataFrame) -> pd.DataFrame:
    """The table with `size`, |cos| in units of a random direction's mean."""
    return table.assign(size=table["cosine"].abs() / table["random"])


def homogeneity_table(read: Read) -> str:
    """The loss's slope along images, that of a network without biases and the same logits, and a random direction's."""
    rows = []
    for model, part in along_images(read("slopes")).groupby("model", sort=False):
        ratios = [ratio_of_medians(part, *pair) for pair in (("along", "homogeneous"), ("homogeneous", "random_slope"))]
        medians = [f"{part[name].median():.3f}" for name in SLOPES]
        rows.append([model, *medians, *(_show(ratio, ".2f") for ratio in ratios)])
    head = ["model", "a: along x, \\|⟨g, x⟩\\|", "b: without biases, \\|⟨p − y, f⟩\\|", "r: random, ‖g‖‖x‖E\\|cos\\|"]
    return _markdown([*head, "a / b", "b / r"], rows)


SLOPES = ("along", "homogeneous", "random_slope")


def along_images(table: pd.DataFrame) -> pd.DataFrame:
    """The rows of the direction x, with the sizes `SLOPES`."""
    rows = table[table["direction"] == "contrast"]
    length = (rows["slope"] / rows["cosine"]).abs()
    sizes = {"along": rows["slope"].abs(), "random_slope": length * rows["random"]}
    return rows.assign(**sizes, homogeneous=rows["homogeneous"].abs())


def ratio_of_medians(table: pd.DataFrame, above: str, below: str) -> tuple[float, float, float]:
    """A ratio of the medians of two columns over the same images with its 95 % interval by bootstrap."""
    pair = table[[above, below]].to_numpy(float)
    rng = np.random.default_rng(0)
    medians = np.array([np.median(pair[rng.integers(0, len(pair), len(pair))], 0) for _ in range(RESAMPLES)])
    low, high = np.quantile(medians[:, 0] / medians[:, 1], [0.025, 0.975])
    value = np.median(pair, 0)
    return float(value[0] / value[1]), float(low), float(high)


def derivative_gap(table: pd.DataFrame) -> float:
    """The largest gap between ⟨g, d⟩ by autograd and by differences, over a random direction's mean |⟨g, d⟩|."""
    if table.empty:
        return math.nan
    rows = table.dropna(subset="numeric")
    scale = (rows["slope"] / rows["cosine"]).abs() * rows["random"]
    return float(((rows["numeric"] - rows["exact"]).abs() / scale).max())


def contrast_table(read: Read) -> str:
    """How many images are still classified correctly when they are changed a lot."""
    table = read("contrast")
    changes = {"x": ("none", 0.0), "0.5 x": ("contrast", -0.5), "1.5 x": ("contrast", 0.5)}
    changes |= {"darker": ("brightness", -0.5), "brighter": ("brightness", 0.5)}
    changes |= {"scrambled": ("scrambled", 0.5), "noise": ("noise", 0.5)}
    rows = []
    for model, part in table.groupby("model", sort=False) if len(table) else ():
        rights = [part.loc[(part["direction"] == d) & (part["shift"] == t), "right"] for d, t in changes.values()]
        rows.append([model, len(rights[0]), *(_accuracy(Rate(int(right.sum()), len(right))) for right in rights)])
    return _markdown(["model", "n", *changes], rows)


def twins_table(read: Read) -> str:
    """The small networks in training: accuracy, mean |cos(g, d)| in units of a random direction's, and slopes."""
    table = read("scratch")
    if table.empty:
        return ""
    rows = []
    for (kind, step), values in moments_of_training(table).groupby(level=["kind", "step"], sort=False):
        cells = [_show(over_seeds(values[name].tolist()), ".1f") for name in SHOWN_OF_TWINS]
        slopes = [_show(over_seeds(values[name].tolist()), ".2f") for name in ("along", "random_slope")]
        rows.append([kind, step, _show(over_seeds(values["right"].tolist()), ".0f", 100), *cells, *slopes])
    return _markdown(["network", "step", "accuracy, %", *SHOWN_OF_TWINS, "slope along x", "random slope"], rows)


SHOWN_OF_TWINS = ("contrast", "brightness", "another image")


def moments_of_training(table: pd.DataFrame) -> pd.DataFrame:
    """By kind, step and seed: accuracy, mean |cos| by direction in units of a random one's, median slopes."""
    keys = ["kind", "step", "seed"]
    sizes = in_units(table).groupby([*keys, "direction"], sort=False)["size"].mean().unstack()
    along = along_images(table).groupby(keys)
    return sizes.join(along["right"].mean()).join(along[["along", "random_slope"]].median())


def exact_cosines(table: pd.DataFrame) -> dict[str, str]:
    """By norm, the largest of the models' and scopes' mean |cos| after an exact step; nothing of nothing."""
    if table.empty:
        return {}
    names = {"linf": "exact", "l2": "exact_l2"}
    means = table.groupby("model")[[f"{scope}_{name}" for scope in SCOPES for name in names.values()]].mean()
    return {norm: f"{max(means[f'{scope}_{name}'].max() for scope in SCOPES):.1e}" for norm, name in names.items()}


def undone_table(read: Read) -> str:
    table = read("gradients")
    names = ("plain_sign", "sign", "sign_clip", "l2_clip")
    rows = [
        [
            model,
            scope,
            _show(interval_of_mean(part[f"{scope}_flipped"]), ".1f", 100),
            *(f"{part[f'{scope}_{name}'].mean():.3g}" for name in names),
        ]
        for model, part in table.groupby("model", sort=False)
        for scope in SCOPES
    ]
    head = ["model", "scope", "signs flipped, %", "sign(g)", "sign(g⊥)", "sign(g⊥), clipped", "L2: g⊥, clipped"]
    return _markdown(head, rows)


def attack_cosine_table(read: Read) -> str:
    table = read("cost")
    table = table[(table["norm"] == "linf") & (table["outcome"] > 0)]
    columns = {"PGD": ["PGD"], "gradient only": ["OrthoPGD, gradient only"], "OrthoPGD, all scopes": PER_SCOPE}
    rows = []
    for model, part in table.groupby("model", sort=False):
        cosines = [part.loc[part["attack"].isin(attacks), "cosine"] for attacks in columns.values()]
        rows.append([model, *(f"{cosine.mean():.1e} / {cosine.max():.1e}" for cosine in cosines)])
    return _markdown(["model", *columns], rows)


def cost_table(read: Read, norm: str) -> str:
    table = read("cost")
    table = table[table["norm"] == norm] if len(table) else table
    attacks = [attack for attack in PER_SCOPE if len(table) and (table["attack"] == attack).any()]
    rows = []
    for keys, part in table.groupby(["model", "eps"], sort=False) if len(table) else ():
        model, eps = str(keys[0]), float(str(keys[1]))
        plain = part.loc[part["attack"] == "PGD", "outcome"] == ROBUST
        cells = [_points(paired(table, model, norm, eps, attack)) for attack in attacks]
        name = f"{model} ({len(plain)})"
        rows.append([name, radius(eps, norm), f"{100 * plain.mean():.1f} %", *cells])
    return _markdown(["model (images)", "ε", "PGD", *attacks], rows)


def smallest_table(read: Read) -> str:
    table = read("smallest")
    rows = []
    for model, part in table.groupby("model", sort=False) if len(table) else ():
        plain = part.loc[part["attack"] == "PGD", "norm"]
        found = [ratio_of_smallest(table, str(model), attack) for attack in PER_SCOPE]
        ratios = [_show(ratio) for _, ratio in found]
        fewest, most = min(n for n, _ in found), max(n for n, _ in found)
        count = f"{fewest} to {most}" if fewest < most else most
        rows.append([model, count, f"{255 * plain.median():.2f}/255", *ratios])
    return _markdown(["model", "n", "median ε of PGD", *PER_SCOPE], rows)


def likeness_table(read: Read) -> str:
    table = read("likeness")
    # Perturbations far below a grey level change less than four places show.
    places = 6 if len(table) and table["ssim"].min() > 0.99 else 4
    rows = []
    for (model, attack), part in table.groupby(["model", "attack"], sort=False) if len(table) else ():
        plain = table[(table["model"] == model) & (table["attack"] == "PGD")].set_index("position")
        own = part.set_index("position")
        ssim = interval_of_mean((own["ssim"] - plain["ssim"]).dropna())
        rows.append(
            [
                f"{model} ({len(part)})",
                str(attack).removeprefix("OrthoPGD, "),
                f"{part['ssim'].mean():.{places}f}",
                "" if attack == "PGD" else _show(ssim, f"+.{places}f"),
                *(f"{part[name].mean():.{places}f}" for name in ("fsim", "haarpsi", "gmsd")),
                f"{part['l2'].mean():.3f}",
                f"{100 * part['along'].abs().mean():.{places - 1}f}",
                f"{255 * part['brightness'].abs().mean():.{places - 1}f}",
                f"{100 * part['contrast'].abs().mean():.{places - 2}f}",
            ]
        )
    head = ["source (images)", "attack or scope", "SSIM", "SSIM − PGD's", "FSIM", "HaarPSI", "GMSD"]
    head += ["‖δ‖₂", "along x, %", "brightness, grey levels", "contrast, %"]
    return _markdown(head, rows)


def transfer_table(read: Read) -> str:
    table = read("transfer")
    rows = []
    for (source, target), part in table.groupby(["source", "target"], sort=False) if len(table) else ():
        if source == target:
            continue
        plain = part.loc[part["attack"] == "PGD", "fooled"]
        cells = [_points(pair) for pair in transfer_pairs(part).values()]
        rows.append([source, target, len(plain), _accuracy(Rate(int(plain.sum()), len(plain))), *cells])
    return _markdown(["source", "target", "n", "PGD fools", *PER_SCOPE], rows)


def transfer_pairs(part: pd.DataFrame) -> dict[str, Paired]:
    """Of one source and target, each scope's attack against PGD: which images it fools."""
    wide = part.pivot(index="position", columns="attack", values="fooled").astype(bool)
    return {attack: Paired.of(wide[attack].to_numpy(), wide["PGD"].to_numpy()) for attack in PER_SCOPE}


MEASURES = {
    "right": "clean",
    "robust, PGD": "PGD",
    "robust, OrthoPGD, image": "OrthoPGD, image",
    "robust, OrthoPGD, pixel": "OrthoPGD, pixel",
    "right, half as bright": "×0.5",
    "right, half as bright again": "×1.5",
}


def tuned_means(table: pd.DataFrame) -> pd.DataFrame:
    """Means over the images, a row per arm and seed, a column per measure."""
    means: pd.DataFrame = table.pivot_table(
        index=["arm", "seed"], columns="measure", values="value", aggfunc="mean", sort=False
    )
    return means


def tuning_table(read: Read) -> str:
    table = read("tuning")
    if table.empty:
        return ""
    means = tuned_means(table)
    rows = []
    for arm, part in means.groupby(level="arm", sort=False):
        cells = [_show(over_seeds(part[name].tolist()), ".1f", 100) for name in MEASURES]
        rows.append([arm, len(part), *cells, _show(over_seeds(part["cosine"].tolist()), ".3f")])
    return _markdown(["trained on", "runs", *MEASURES.values(), "\\|cos(g, x)\\|"], rows)


def tuning_difference_table(read: Read) -> str:
    table = read("tuning")
    if table.empty:
        return ""
    means = tuned_means(table)
    rows = []
    for arm in (arm for arm in means.index.unique("arm") if arm.startswith("OrthoPGD")):
        apart = means.loc[arm] - means.loc["PGD"]
        cells = [_show(over_seeds(apart[name].tolist()), "+.1f", 100) for name in MEASURES]
        rows.append([f"{arm} − PGD", *cells, _show(over_seeds(apart["cosine"].tolist()), "+.3f")])
    return _markdown(["trained on", *MEASURES.values(), "\\|cos(g, x)\\|"], rows)


TABLES: dict[str, tuple[str, Callable[[Read], str]]] = {
    "alignment": ("slopes", alignment_table),
    "share": ("gradients", share_table),
    "slopes": ("slopes", slopes_table),
    "homogeneity": ("slopes", homogeneity_table),
    "contrast": ("contrast", contrast_table),
    "twins": ("scratch", twins_table),
    "undone": ("gradients", undone_table),
    "attack_cosine": ("cost", attack_cosine_table),
    "cost_linf": ("cost", lambda read: cost_table(read, "linf")),
    "cost_l2": ("cost", lambda read: cost_table(read, "l2")),
    "smallest": ("smallest", smallest_table),
    "likeness": ("likeness", likeness_table),
    "transfer": ("transfer", transfer_table),
    "tuning": ("tuning", tuning_table),
    "tuning_difference": ("tuning", tuning_difference_table),
}
"""Each table of the page, the stage that it needs, and what makes it of the results."""

"""The study's page: stored results to Markdown and figures."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from benchmarks.study import figures, numbers
from benchmarks.study.contrast import CHECKED
from benchmarks.study.cost import AGAIN, SCOPES
from benchmarks.study.numbers import Read
from benchmarks.study.stages import TRAINED, Store
from benchmarks.study.training import BASE

__all__ = ["APPENDIX", "MAIN", "PUBLISHED", "render", "write_page"]

HERE = Path(__file__).parent
PUBLISHED = HERE.parent / "results" / "study"
MAIN, APPENDIX = "study", "study-appendix"
LARGE = ("imagenet", "samples")
SHARED = ("slopes", "contrast", "sensitivity", "twins", "smallest")
SHARED_FIGURES = ("alignment", "contrast", "sensitivity", "smallest")
NOTHING = "*Not measured yet.*"


def write_page(store: Store, folder: Path) -> Path:
    """Write study.md, study-appendix.md and, beside them, their figures in study/.

    What was not measured yet, the pages say.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for page, read in _views(store).items():
        for name, (stage, _) in figures.FIGURES.items():
            left_out = page == APPENDIX and (name in SHARED_FIGURES or not _is_published(store))
            if not left_out and not read(stage).empty:
                figures.draw(name, read, folder / "study", suffix="-small" if page == APPENDIX else "")
        (folder / f"{page}.md").write_text(render(store, page), encoding="utf-8")
    return folder / f"{MAIN}.md"


def _views(store: Store) -> dict[str, Read]:
    """For each page, what reads a stage's results: of docs/study.md the large networks', of the appendix the others'.

    Of another study, the first page has all models.
    """
    whole = functools.cache(store.read)
    if not _is_published(store):
        return {MAIN: whole, APPENDIX: whole}
    settings = store.about()["settings"]
    large = {label for group in settings["groups"] if group["key"] in LARGE for label in group["models"]}

    def view(of_large: bool, stage: str) -> pd.DataFrame:
        table = whole(stage)
        column = next((name for name in ("model", "source") if name in table), None)
        if column is None or (of_large and stage in SHARED):
            return table
        return table[table[column].isin(large) == of_large]

    return {MAIN: functools.cache(functools.partial(view, True)), APPENDIX: functools.partial(view, False)}


def render(store: Store, page: str = MAIN) -> str:
    """A page. What the results of docs/study.md mean is said of those results only."""
    read = _views(store)[page]
    about = store.about()
    tables = {name: NOTHING if read(stage).empty else make(read) for name, (stage, make) in numbers.TABLES.items()}
    if not about["settings"]["trains"]:
        tables |= dict.fromkeys(("twins", "tuning", "tuning_difference"), "")
    groups, budget = about["settings"]["groups"], about["settings"]["budget"]
    shown = [g for g in groups if not _is_published(store) or (g["key"] in LARGE) == (page == MAIN)]
    values: dict[str, Any] = {
        "published": _is_published(store),
        "tables": tables,
        "budget": budget,
        "figures": {name for name, (stage, _) in figures.FIGURES.items() if not read(stage).empty},
        "images": {group["key"]: group["images"] for group in groups},
        "tuning_eps": numbers.radius(groups[-1]["eps"]),
        "missing": ", ".join(_missing(store)),
        "steps": budget["steps"],
        "eps": " and ".join(dict.fromkeys(numbers.radius(group["eps"]) for group in shown)),
        "minutes": round(sum(about["cpu_seconds"].values()) / 60),
        "checked": CHECKED,
        "measured_gap": not read("slopes").empty,
        "gap": f"{numbers.derivative_gap(read('slopes')):.1g}",
        "exact": numbers.exact_cosines(read("gradients")),
    }
    if values["published"]:
        values |= _facts(read) if page == APPENDIX else _main_facts(read)
    environment = Environment(
        loader=FileSystemLoader(HERE), undefined=StrictUndefined, keep_trailing_newline=True
    )  # the page is Markdown of our own numbers: nothing to escape
    text = environment.get_template(f"{page}.md.j2").render(values)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _is_published(store: Store) -> bool:
    return store.folder.resolve() == PUBLISHED


def _missing(store: Store) -> list[str]:
    """The stages that are not there yet."""
    settings = store.about()["settings"]
    names = [f"{stage}-{group['key']}" for group in settings["groups"] for stage in group["images"]]
    base = [group["key"] for group in settings["groups"] if settings["trains"] and BASE in group["models"]]
    names += [f"{stage}-{key}" for key in base for stage in TRAINED]
    return [name for name in names if name not in store]


def _main_facts(read: Read) -> dict[str, Any]:
    """The numbers in the text of docs/study.md."""
    slopes = numbers.in_units(read("slopes"))
    units = slopes.groupby(["direction", "model"], sort=False)["size"].mean()
    along = numbers.along_images(slopes)
    lite = [model for model in along["model"].unique() if model in ("lite0", "lite1", "lite2")]
    medians = along.groupby("model")[[*numbers.SLOPES]].median()
    ratios, lengths = medians["along"] / medians["homogeneous"], medians["homogeneous"] / medians["random_slope"]
    found, small, cost = read("gradients"), read("smallest"), read("cost")
    curves = read("contrast")
    return {
        "units": {d: _span(units[d][lite], ".2f") for d in units.index.unique("direction")},
        "others": {model: f"{units['contrast'][model]:.1f}" for model in units["contrast"].index},
        "share": _span([100 * g["image_share"].mean() for _, g in found.groupby("model")], ".2g") if len(found) else "",
        "pixel": _span([100 * g["pixel_share"].mean() for _, g in found.groupby("model")], ".0f") if len(found) else "",
        "ratios": {"lite": _span(ratios[lite], ".2f")} | {model: f"{ratios[model]:.2f}" for model in ratios.index},
        "lengths": {"lite": _span(lengths[lite], ".1f")} | {model: f"{lengths[model]:.1f}" for model in lengths.index},
        "kept": {
            (model, direction): _right(curves, model, direction)
            for model in (curves["model"].unique() if len(curves) else ())
            for direction in ("none", "contrast", "noise")
        },
        "small_ratio": _ratios(small, "OrthoPGD, image", "OrthoPGD, channel"),
        "pixel_ratio": _ratios(small, "OrthoPGD, pixel"),
        "significant": _significant(cost, "OrthoPGD, image", "OrthoPGD, channel") if len(cost) else "",
        "answers": _answers(read("sensitivity")),
        "radii": "0.5/255 to 8/255",
        "twins": _twins(read("scratch")),
    }


def _answers(table: pd.DataFrame) -> dict[str, str]:
    """Mean ‖J d‖ / ‖f‖: along images, of all blocks and models; along white noise, of each model's logits."""
    if table.empty:
        return {}
    mean = table[table["block"] != "input"].groupby(["direction", "model", "block"])["change"].mean()
    logits = mean["noise"].xs("logits", level="block")
    return {"contrast": _span(mean["contrast"], ".1f")} | {model: f"{value:.1f}" for model, value in logits.items()}


def _right(curves: pd.DataFrame, model: str, direction: str) -> str:
    """How many images are classified correctly at the ends of a curve, in %, or unchanged."""
    rows = curves[(curves["model"] == model) & (curves["direction"] == direction)]
    ends = [rows.loc[rows["shift"] == t, "right"].mean() for t in ([0.0] if direction == "none" else [-0.5, 0.5])]
    return _span(100 * np.array(ends), ".0f")


def _ratios(table: pd.DataFrame, *attacks: str) -> str:
    """From the smallest to the largest ratio of these attacks' smallest radii to plain PGD's."""
    models = table["model"].unique() if len(table) else ()
    return _span([numbers.ratio_of_smallest(table, m, attack)[1][0] for m in models for attack in attacks], ".2f")


def _twins(table: pd.DataFrame) -> dict[tuple[str, str], dict[str, str]]:
    """By kind of small network and moment of its training, what it was, from run to run; nothing of nothing."""
    if table.empty:
        return {}
    found = {}
    moments = numbers.moments_of_training(table)
    for (kind, step), part in moments.groupby(level=["kind", "step"]):
        found[str(kind), str(step)] = {
            "units": _span(part["contrast"], ".1f"),
            "right": _span(100 * part["right"], ".0f"),
            "along": _span(part["along"], ".2f"),
            "random": _span(part["random_slope"], ".2f"),
        }
    return found


def _facts(read: Any) -> dict[str, Any]:
    """The numbers in the text of the appendix."""
    found = read("gradients")
    cosine = found["cosine"].abs().groupby(found["model"]).mean()
    other = found["cosine_other"].abs().groupby(found["model"]).mean()
    small = read("smallest")
    models = small["model"].unique() if len(small) else []
    ratios = [numbers.ratio_of_smallest(small, model, "OrthoPGD, pixel")[1][0] for model in models]
    others = [
        numbers.ratio_of_smallest(small, model, attack)[1][0]
        for model in models
        for attack in ("OrthoPGD, image", "OrthoPGD, channel")
    ]
    constant = found.groupby("model")["image_constant"].mean()
    signs = [
        part[f"{scope}_sign"].mean() / part[f"{scope}_plain_sign"].mean()
        for _, part in found.groupby("model")
        for scope in ("image", "channel")
    ]
    clipped = found[[f"{scope}_l2_clip" for scope in SCOPES]].mean()
    return {
        "robust_factor": {g: f"{cosine[f'{g}-robust'] / cosine[f'{g}-standard']:.0f}" for g in ("tiny", "cifar10")},
        "image_constant": {g: f"{constant[f'{g}-standard']:.2f}" for g in ("tiny", "cifar10")},
        "grey": _span(100 * found.groupby("model")["grey_share"].mean(), ".0f"),
        "other_share": _span(other / cosine, ".1f"),
        "sign_ratio": _span(signs, ".1f"),
        "clip_l2": _span(clipped, ".1g"),
        "pixel_ratio": _span(ratios, ".1f"),
        "small_ratio": _span(others, ".2f"),
        "significant": _significant(read("cost"), "OrthoPGD, image", "OrthoPGD, channel"),
        "significant_pixel": _significant(read("cost"), "OrthoPGD, pixel"),
        "significant_gradient": _significant(read("cost"), "OrthoPGD, gradient only"),
        "significant_again": _significant(read("cost"), AGAIN),
    }


def _span(values: Any, form: str) -> str:
    """From the smallest to the largest; nothing of nothing."""
    if len(values) == 0:
        return ""
    low, high = f"{min(values):{form}}", f"{max(values):{form}}"
    return low if low == high else f"{low} to {high}"


def _significant(table: pd.DataFrame, *attacks: str) -> str:
    """How many comparisons of these attacks with PGD have p < 0.05."""
    cells = table[table["attack"].isin(attacks)][["model", "norm", "eps", "attack"]].drop_duplicates()
    pairs = [numbers.paired(table, *cell) for cell in cells.itertuples(index=False, name=None)]
    return f"{int(np.sum([(pair.p or 1) < 0.05 for pair in pairs]))} of {len(pairs)}"

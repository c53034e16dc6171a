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
from benchmarks.study.gradients import random_cosine
from benchmarks.study.numbers import Read
from benchmarks.study.stages import TRAINED, Store
from benchmarks.study.training import BASE
from orthattack.eval.results.paired import Paired

__all__ = ["APPENDIX", "MAIN", "PUBLISHED", "render", "write_page"]

HERE = Path(__file__).parent
PUBLISHED = HERE.parent / "results" / "study"
MAIN, APPENDIX = "study", "study-appendix"
LARGE = ("imagenet", "samples")
SHARED = ("slopes", "contrast", "sensitivity", "twins", "smallest")
SHARED_FIGURES = ("alignment", "contrast", "sensitivity", "smallest")
SPARED = ("OrthoPGD, image", "OrthoPGD, channel")  # what the constraint costs little
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
    found, smallest = read("gradients"), read("smallest")
    of_lite = smallest["model"].isin(lite)
    curves = read("contrast")
    return {
        "units": {d: _span(units[d][lite], ".2f") for d in units.index.unique("direction")},
        "others": {model: f"{units['contrast'][model]:.1f}" for model in units["contrast"].index},
        "share": _span([100 * g["image_share"].mean() for _, g in found.groupby("model")], ".2g") if len(found) else "",
        "pixel": _span([100 * g["pixel_share"].mean() for _, g in found.groupby("model")], ".0f") if len(found) else "",
        "ratios": {"lite": _span(ratios[lite], ".2f")} | {model: f"{ratios[model]:.2f}" for model in ratios.index},
        "lengths": {"lite": _span(lengths[lite], ".1f")} | {model: f"{lengths[model]:.1f}" for model in lengths.index},
        "kept": {
            (name, direction): _right(curves[curves["model"].isin(models)], direction)
            for name, models in [("lite", lite), *((m, [m]) for m in (curves["model"].unique() if len(curves) else ()))]
            for direction in ("none", "contrast", "noise")
        },
        "small": _needed(smallest[~of_lite]),
        "lite": _needed(smallest[of_lite]),
        "robust_channel": _ratios(smallest[smallest["model"].str.endswith("-robust")], "OrthoPGD, channel"),
        "answers": _answers(read("sensitivity")),
        "radii": "0.5/255 to 8/255",
        "cost": _cost(read("cost")),
        "depth": _depth(read("depth")),
        "likeness": _likeness(read("likeness")),
        "twins": _twins(read("scratch")),
    }


def _cost(table: pd.DataFrame) -> dict[str, str]:
    """What a stage "cost" shows: how many comparisons with PGD have p < 0.05; by how many points those of image and
    channel differ at most, and how far their intervals reach; and by how many those of pixel differ."""
    if table.empty:
        return {}
    spared, pixel = (_compared(table, *attacks) for attacks in (SPARED, ("OrthoPGD, pixel",)))
    reach = [abs(bound) for pair in spared for bound in pair.interval() or ()]
    return {
        "spared": _significant(table, *SPARED),
        "again": _significant(table, AGAIN),
        "pixel": _significant(table, "OrthoPGD, pixel"),
        "largest": f"{100 * max(abs(pair.difference or 0) for pair in spared):.0f}",
        "reach": f"{100 * max(reach):.0f}",
        "points": _span([100 * (pair.difference or 0) for pair in pixel], "+.0f"),
    }


def _answers(table: pd.DataFrame) -> dict[str, str]:
    """Mean ‖J d‖ / ‖f‖: along images, of all blocks and models; along white noise, of each model's logits."""
    if table.empty:
        return {}
    mean = table[table["block"] != "input"].groupby(["direction", "model", "block"])["change"].mean()
    logits = mean["noise"].xs("logits", level="block")
    return {"contrast": _span(mean["contrast"], ".1f")} | {model: f"{value:.1f}" for model, value in logits.items()}


def _right(curves: pd.DataFrame, direction: str) -> str:
    """How many images are classified correctly at the ends of models' curves, in %, or unchanged."""
    rows = curves[
        (curves["direction"] == direction) & curves["shift"].isin([0.0] if direction == "none" else [-0.5, 0.5])
    ]
    return _span(100 * rows.groupby(["model", "shift"])["right"].mean(), ".0f")


def _needed(table: pd.DataFrame) -> dict[str, str]:
    """What smallest radii are, relative to plain PGD's, on how many images per model, and how many of image and channel
    are plain PGD's to a thousandth."""
    wide = table.pivot(index=["model", "position"], columns="attack", values="norm")
    ratios = wide[[*SPARED]].div(wide["PGD"], axis=0).to_numpy()
    return {
        "same": f"{(np.abs(ratios - 1) < 1e-3).sum()} of {np.isfinite(ratios).sum()}",
        "spared": _ratios(table, *SPARED),
        "pixel": _ratios(table, "OrthoPGD, pixel"),
        "images": _counts(table),
    }


def _ratios(table: pd.DataFrame, *attacks: str) -> str:
    """From the smallest to the largest ratio of these attacks' smallest radii to plain PGD's."""
    models = table["model"].unique() if len(table) else ()
    return _span([numbers.ratio_of_smallest(table, m, attack)[1][0] for m in models for attack in attacks], ".2f")


def _counts(table: pd.DataFrame) -> str:
    """From the fewest to the most images per model, in whose smallest radii two attacks are compared."""
    models = table["model"].unique() if len(table) else ()
    return _span([numbers.ratio_of_smallest(table, m, f"OrthoPGD, {s}")[0] for m in models for s in SCOPES], ".0f")


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
    found, small = read("gradients"), read("smallest")
    cosine = found["cosine"].abs().groupby(found["model"]).mean()
    other = found["cosine_other"].abs().groupby(found["model"]).mean()
    constant = found.groupby("model")["image_constant"].mean()
    signs = [
        part[f"{scope}_sign"].mean() / part[f"{scope}_plain_sign"].mean()
        for _, part in found.groupby("model")
        for scope in ("image", "channel")
    ]
    clipped = found.groupby("model")[[f"{scope}_l2_clip" for scope in SCOPES]].mean()
    return {
        "robust_factor": {g: f"{cosine[f'{g}-robust'] / cosine[f'{g}-standard']:.0f}" for g in ("tiny", "cifar10")},
        "image_constant": {g: f"{constant[f'{g}-standard']:.2f}" for g in ("tiny", "cifar10")},
        "grey": _span(100 * found.groupby("model")["grey_share"].mean(), ".0f"),
        "other_share": _span(other / cosine, ".1f"),
        "sign_ratio": _span(signs, ".1f"),
        "clip_l2": f"{clipped.to_numpy().max():.1g}",
        "pixel_ratio": _ratios(small, "OrthoPGD, pixel"),
        "small_ratio": _ratios(small, *SPARED),
        "small_images": _counts(small),
        "robust_channel": _ratios(small[small["model"].str.endswith("-robust")], "OrthoPGD, channel"),
        "likeness": _likeness(read("likeness")),
        "transfer": _transfer(read("transfer")),
        "significant": _significant(read("cost"), *SPARED),
        "significant_pixel": _significant(read("cost"), "OrthoPGD, pixel"),
        "significant_gradient": _significant(read("cost"), "OrthoPGD, gradient only"),
        "significant_again": _significant(read("cost"), AGAIN),
    }


def _likeness(table: pd.DataFrame) -> dict[str, str]:
    """The largest mean change of SSIM by planes per image and channel; what is left of PGD's 1 - SSIM per pixel."""
    if table.empty:
        return {}
    means = table.groupby(["model", "attack"])[["ssim", "l2"]].mean().astype(float).unstack()
    apart = means["ssim"][[*SPARED]].sub(means["ssim", "PGD"], axis=0).abs().to_numpy().max()
    return {
        "ssim": np.format_float_positional(float(f"{apart:.2g}"), trim="-"),
        "unlike": _span((1 - means["ssim", "OrthoPGD, pixel"]) / (1 - means["ssim", "PGD"]), ".2f"),
        "length": _span(means["l2", "OrthoPGD, pixel"] / means["l2", "PGD"], ".2f"),
        "images": _span(table[table["attack"] == "PGD"].groupby("model").size(), ".0f"),
    }


def _depth(table: pd.DataFrame) -> dict[str, str]:
    """Mean |cos|, in units of a random direction's: of the image and the gradient of random functions of a network's
    first block and of the others; of the loss's gradient by the last block's output, and that output."""
    if table.empty:
        return {}
    first, rest, last = [], [], []
    for _, part in table.groupby("model"):
        pixels, *blocks = (rows for _, rows in part.groupby("block", sort=False))
        unit = random_cosine(int(pixels["size"].iloc[0]))
        forward = [block["forward"].abs().mean() / unit for block in blocks]
        first.append(forward[0])
        rest += forward[1:]
        last.append(blocks[-1]["backward"].abs().mean() / random_cosine(int(blocks[-1]["size"].iloc[0])))
    return {"first": _span(first, ".1f"), "rest": _span(rest, ".2f"), "last": _span(last, ".0f")}


def _transfer(table: pd.DataFrame) -> dict[str, str]:
    """How many pairs of networks show a difference per pixel, and how many points the other scopes' intervals reach."""
    if table.empty:
        return {}
    pairs = [
        numbers.transfer_pairs(part)
        for _, part in table[table["source"] != table["target"]].groupby(["source", "target"])
    ]
    reach = [100 * abs(bound) for pair in pairs for attack in SPARED for bound in pair[attack].interval() or ()]
    shown = sum((pair["OrthoPGD, pixel"].p or 1) < 0.05 for pair in pairs)
    return {"pixel": f"{shown} of the {len(pairs)}", "rest": str(len(pairs) - shown), "reach": f"{max(reach):.0f}"}


def _span(values: Any, form: str) -> str:
    """From the smallest to the largest; nothing of nothing."""
    if len(values) == 0:
        return ""
    low, high = f"{min(values):{form}}", f"{max(values):{form}}"
    return low if low == high else f"{low} to {high}"


def _significant(table: pd.DataFrame, *attacks: str) -> str:
    """How many comparisons of these attacks with PGD have p < 0.05."""
    pairs = _compared(table, *attacks)
    return f"{int(np.sum([(pair.p or 1) < 0.05 for pair in pairs]))} of {len(pairs)}"


def _compared(table: pd.DataFrame, *attacks: str) -> list[Paired]:
    """Each of these attacks beside PGD, by model, norm and radius."""
    cells = table[table["attack"].isin(attacks)][["model", "norm", "eps", "attack"]].drop_duplicates()
    return [numbers.paired(table, *cell) for cell in cells.itertuples(index=False, name=None)]

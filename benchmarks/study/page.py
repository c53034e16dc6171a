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
from benchmarks.study.cost import AGAIN, SCOPES
from benchmarks.study.stages import Store
from benchmarks.study.training import BASE

__all__ = ["PUBLISHED", "render", "write_page"]

HERE = Path(__file__).parent
PUBLISHED = HERE.parent / "results" / "study"
NOTHING = "*Not measured yet.*"


def write_page(store: Store, folder: Path) -> Path:
    """Write study.md and, beside it, its figures in study/; what was not measured yet, the page says."""
    folder.mkdir(parents=True, exist_ok=True)
    read = functools.cache(store.read)
    for name, (stage, _) in figures.FIGURES.items():
        if not read(stage).empty:
            figures.draw(name, read, folder / "study")
    path = folder / "study.md"
    path.write_text(render(store), encoding="utf-8")
    return path


def render(store: Store) -> str:
    """The page. What the results of docs/study.md mean is said of those results only."""
    read = functools.cache(store.read)
    about = store.about()
    tables = {name: NOTHING if read(stage).empty else make(read) for name, (stage, make) in numbers.TABLES.items()}
    if not about["settings"]["trains"]:
        tables |= dict.fromkeys(("moments", "tuning", "tuning_difference"), "")
    groups, budget = about["settings"]["groups"], about["settings"]["budget"]
    values: dict[str, Any] = {
        "published": store.folder.resolve() == PUBLISHED,
        "tables": tables,
        "budget": budget,
        "figures": {name for name, (stage, _) in figures.FIGURES.items() if not read(stage).empty},
        "tuning_eps": numbers.radius(groups[-1]["eps"]),
        "missing": ", ".join(_missing(store)),
        "steps": budget["steps"],
        "eps": " and ".join(dict.fromkeys(numbers.radius(group["eps"]) for group in groups)),
        "minutes": round(sum(about["cpu_seconds"].values()) / 60),
        "exact": numbers.exact_cosines(read("gradients")),
    }
    if values["published"]:
        values |= _facts(read)
    environment = Environment(
        loader=FileSystemLoader(HERE), undefined=StrictUndefined, keep_trailing_newline=True
    )  # the page is Markdown of our own numbers: nothing to escape
    text = environment.get_template("study.md.j2").render(values)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def _missing(store: Store) -> list[str]:
    """The stages that are not there yet."""
    settings = store.about()["settings"]
    names = [
        f"{stage}-{group['key']}"
        for stage in ("gradients", "depth", "cost", "smallest", "likeness", "transfer", "scratch", "tuning")
        for group in settings["groups"]
        if stage not in ("scratch", "tuning") or (settings["trains"] and BASE in group["models"])
    ]
    return [name for name in names if name not in store]


def _facts(read: Any) -> dict[str, Any]:
    """The numbers in the text of docs/study.md."""
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
    looked = read("scratch")
    scratch = looked["cosine"].abs().groupby(looked["step"]).mean() if len(looked) else pd.Series(dtype=float)
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
        "moments": [f"{scratch[step]:.3f}" for step in (scratch.index[:1].union(scratch.index[-1:]))],
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

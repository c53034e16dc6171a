"""The study's page: stored results to Markdown and figures."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from benchmarks.study import figures, numbers
from benchmarks.study.cost import SCOPES
from benchmarks.study.stages import Store

__all__ = ["PUBLISHED", "render", "write_page"]

HERE = Path(__file__).parent
PUBLISHED = HERE / "results"
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
        "steps": budget["steps"],
        "eps": " and ".join(dict.fromkeys(numbers.radius(group["eps"]) for group in groups)),
        "minutes": round(sum(about["cpu_seconds"].values()) / 60),
    }
    if values["published"]:
        values |= _facts(read)
    environment = Environment(
        loader=FileSystemLoader(HERE), undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
    )  # the page is Markdown of our own numbers: nothing to escape
    return environment.get_template("study.md.j2").render(values)


def _facts(read: Any) -> dict[str, Any]:
    """The numbers in the text of docs/study.md."""
    found = read("gradients")
    cosine = found["cosine"].abs().groupby(found["model"]).mean()
    small = read("smallest")
    ratios = (
        [numbers.ratio_of_smallest(small, m, "OrthoPGD, pixel")[1][0] for m in small["model"].unique()]
        if len(small)
        else []
    )
    constant = found.groupby("model")["image_constant"].mean()
    clipped = found[[f"{scope}_l2_clip" for scope in SCOPES]].mean()
    return {
        "robust_factor": {g: f"{cosine[f'{g}-robust'] / cosine[f'{g}-standard']:.0f}" for g in ("tiny", "cifar10")},
        "image_constant": {g: f"{constant[f'{g}-standard']:.2f}" for g in ("tiny", "cifar10")},
        "grey": {m: f"{100 * share:.0f}" for m, share in found.groupby("model")["grey_share"].mean().items()},
        "clip_l2": f"{clipped.min():.0e} to {clipped.max():.0e}",
        "pixel_ratio": f"{min(ratios):.1f} to {max(ratios):.1f}" if ratios else "several",
        "significant": _significant(read("cost")),
        "transfer_text": "",
        "tuning_text": "",
    }


def _significant(table: pd.DataFrame) -> str:
    """How many comparisons of PGD with a plane per image or channel have p < 0.05."""
    if table.empty:
        return ""
    pairs = [
        numbers.paired(table, model, norm, eps, attack)
        for (model, norm, eps) in table[["model", "norm", "eps"]].drop_duplicates().itertuples(index=False)
        for attack in ("OrthoPGD, image", "OrthoPGD, channel")
    ]
    return f"{int(np.sum([(pair.p or 1) < 0.05 for pair in pairs]))} of {len(pairs)} comparisons"

"""How small the perturbations are that attacks find, measured with AttackBench's own library beside adv-lib's and
Foolbox's attacks: every attack is given the same number of passes through the model, counted by AttackBench.

    pip install --no-deps attackbenchlib adv-lib
"""

from __future__ import annotations

import copy
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import product
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.defaults import in_turns, models
from benchmarks.radii import geometric_mean
from benchmarks.stored import Row, Stored, Table, machine, stored
from benchmarks.strength import NORMS, SIGN
from orthattack import MinimumNorm, OrthoMinimumNorm
from orthattack.eval.data import load_dataset
from orthattack.eval.models import load_classifier
from orthattack.eval.results.paired import optimality

OURS = {"MinimumNorm": "plain", "OrthoMinimumNorm": "ortho"}  # as two tables call them
ORDER = {"linf": float("inf"), "l2": 2, "l1": 1}
TRIALS = 10  # of attacks that fill a ball, between which AttackBench bisects
ALIKE = 0.001  # norms that differ by no more than this share count as equal

Run = Callable[[nn.Module, Tensor, Tensor], Tensor]


def ours(kind: Any, norm: str, passes: int) -> Run:
    """The adapter: AttackBench gives a model, images and labels, and wants adversarial images."""

    def run(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        found: Tensor = kind(model, norm, gradients=passes // 2)(inputs, labels)
        return found

    return run


def candidates(norm: str, passes: int) -> dict[str, Run]:
    """All attacks that minimise this norm, with what AttackBench sets, and as many steps as the passes allow."""
    _attackbench()
    from adv_lib import attacks as adv_lib
    from attackbench.attacks.adv_lib.wrapper import adv_lib_minimal_wrapper
    from attackbench.attacks.foolbox.wrapper import foolbox_wrapper
    from foolbox import attacks as foolbox

    steps = passes // 2
    order = ORDER[norm]
    start = {"linf": 1 / 255, "l2": 1.0, "l1": 1.0}[norm]
    apgd = partial(adv_lib.apgd, norm=order, n_iter=steps // TRIALS, n_restarts=1, loss_function="dlr", rho=0.75,
                   use_large_reps=False, use_rs=True)  # fmt: skip
    theirs: dict[str, Any] = {
        "adv-lib FMN": partial(adv_lib.fmn, norm=order, steps=steps, α_init=10 if norm == "linf" else 1),
        "adv-lib FAB": partial(adv_lib.fab, norm=order, n_iter=steps),
        "adv-lib APGD, bisected": partial(adv_lib_minimal_wrapper, attack=apgd, init_eps=start, search_steps=TRIALS,
                                          max_eps=1 if norm == "linf" else None),
    }  # fmt: skip
    if norm != "linf":
        far = 0.1 if norm == "l2" else 0.5
        theirs["adv-lib ALMA"] = partial(adv_lib.alma, distance=norm, num_steps=steps, α=0.9, init_lr_distance=far)
    if norm != "l2":
        theirs["adv-lib PDPGD"] = partial(adv_lib.pdpgd, norm=order, num_steps=steps)
    else:
        theirs["adv-lib DDN"] = partial(adv_lib.ddn, steps=steps, levels=None)
        theirs["adv-lib PDGD"] = partial(adv_lib.pdgd, num_steps=steps)
        theirs["adv-lib SuperDeepFool"] = partial(adv_lib.sdf, steps=steps)
        theirs["adv-lib C&W"] = partial(
            adv_lib.carlini_wagner_l2, max_iterations=max(1, steps // 9), binary_search_steps=9
        )
        theirs["Foolbox DDN"] = partial(foolbox.DDNAttack, steps=steps)
    if norm == "linf":
        theirs["adv-lib C&W"] = partial(adv_lib.carlini_wagner_linf, max_iterations=steps)
    if norm == "l1":
        theirs["Foolbox EAD"] = partial(foolbox.EADAttack, steps=steps // 9, binary_search_steps=9)
    fmn = {"linf": foolbox.LInfFMNAttack, "l2": foolbox.L2FMNAttack, "l1": foolbox.L1FMNAttack}[norm]
    theirs["Foolbox FMN"] = partial(fmn, steps=steps)

    def wrapped(name: str, attack: Any) -> Run:  # with these three arguments alone, for AttackBench gives all it finds
        call = partial(foolbox_wrapper, attack) if name.startswith("Foolbox") else attack
        return lambda model, inputs, labels: call(model=model, inputs=inputs, labels=labels)

    return {
        **{name: wrapped(name, attack) for name, attack in theirs.items()},
        "MinimumNorm": ours(MinimumNorm, norm, passes),
        "OrthoMinimumNorm": ours(OrthoMinimumNorm, norm, passes),
    }


def loaded(spec: dict[str, Any], data: dict[str, Any], limit: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A model of `defaults.models`, and the first images that it classifies correctly, of each class in turn."""
    classifier = load_classifier(spec["name"], spec.get("weights"), spec.get("image_size"))
    dataset = load_dataset(data["source"], classifier, Path(data["labels"]) if "labels" in data else None)
    order = in_turns(dataset.labels)[: 3 * limit]
    images = torch.stack([dataset.load(k, classifier.preprocessing) for k in order])
    labels = torch.tensor([dataset.labels[k] for k in order])
    with torch.no_grad():
        right = classifier.model(images).argmax(1) == labels
    return classifier.model.eval(), images[right][:limit], labels[right][:limit]


def tables(
    shared: Path, build: Path, limit: int, names: list[str] | None, norms: Sequence[str], budgets: Sequence[int],
    only: Sequence[str] | None, folder: Path,
) -> Iterator[tuple[str, list[Row]]]:  # fmt: skip
    """A table of a model, norm and budget, of gradients and as many evaluations, once more after each attack that this
    machine has not stored yet.

    Raises:
        ValueError: an attack that there is not, or a table of the same model and norm is stored for other images.
    """
    attacks = {norm: [*candidates(norm, 2)] for norm in norms}
    if unknown := set(only or ()).difference(*attacks.values()):
        raise ValueError(f"no attack is called {min(unknown)!r}; there are {sorted(set().union(*attacks.values()))}")
    networks = models(shared, build)
    for name in names or networks:
        model, images, labels = loaded(*networks[name][:2], limit)
        for norm, budget in product(norms, budgets):
            here = [table for file in stored(folder) if (file.what, file.machine) == ("minimal", machine()[0])
                    for table in file.tables if _group(table.name) == f"{name}-{norm}"]  # fmt: skip
            for table in here:
                if (count := _images(table)) != len(images):
                    raise ValueError(
                        f"{table.name} is stored with {count} images, to be compared one by one, and these are "
                        f"{len(images)}: give --limit {count}, or remove the tables of {name}-{norm} first"
                    )
            title = f"{name}-{norm}-{budget}"
            rows = [row for table in here if table.name == title for row in table.rows]
            for attack in attacks[norm]:
                if attack in (only or attacks[norm]) and attack not in [row["attack"] for row in rows]:
                    run = candidates(norm, 2 * budget)[attack]
                    rows.append({"attack": attack, **measured(run, model, images, labels, norm, budget)})
                    yield title, rows


def measured(run: Run, model: nn.Module, images: Tensor, labels: Tensor, norm: str, budget: int) -> Row:
    """The smallest norm that an attack finds of each image, and its passes, as AttackBench counts them."""
    loader = DataLoader(TensorDataset(images, labels), batch_size=len(images))
    run_attack, began = _attackbench().run_attack, time.process_time()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        told = run_attack(copy.deepcopy(model), loader, run, norm, images.device, query_budget=2 * budget, debug=True)
    largest = float(torch.linalg.vector_norm(torch.ones_like(images[0]), ORDER[norm]))
    return {
        "norms": [min(d, largest) for d in told["distances"][norm]],
        "gradients": sum(told["num_backwards"]) / len(images),
        "evaluations": sum(told["num_forwards"]) / len(images),
        "seconds": round(time.process_time() - began, 1),
    }


def _attackbench() -> Any:
    """AttackBench; it and adv-lib import clients of two sites, to which nothing here goes."""
    for missing, name in (("wandb", "Api"), ("visdom", "Visdom")):
        stub = ModuleType(missing)
        setattr(stub, name, object)
        sys.modules.setdefault(missing, stub)
    import attackbench

    return attackbench


def pages(files: Iterable[Stored]) -> dict[str, str]:
    """The tables of docs/minimal-norm.md, of all machines together.

    Raises:
        ValueError: tables of one model and norm are of different numbers of images.
    """
    cells = _cells(files)
    if not cells:
        return {}
    found = {"minimal/summary": _summary(cells), "minimal/lost": _lost(cells)}
    for norm in NORMS:
        if here := [cell for cell in cells if cell.norm == norm]:
            found[f"minimal/{norm}"] = _details(here)
    return found


@dataclass(frozen=True)
class _Cell:
    """One table, and the local optimality of its attacks: 1 for the smallest norms that anything finds at any budget
    for the same model and norm."""

    table: Table
    model: str
    norm: str
    gradients: int
    optimality: Mapping[str, float]

    def norms(self, attack: str) -> list[float]:
        (found,) = (row["norms"] for row in self.table.rows if row["attack"] == attack)
        return list(found)

    def others(self) -> list[str]:
        return [name for name in self.optimality if name not in OURS]

    def ratios(self, ours: str, other: str) -> list[float]:
        return [a / b for a, b in zip(self.norms(ours), self.norms(other), strict=True)]

    def compared(self, ours: str, other: str) -> list[str]:
        """Ours over the other: the mean ratio of the norms, and on how many images they are smaller and larger."""
        ratios = self.ratios(ours, other)
        smaller, larger = sum(ratio < 1 - ALIKE for ratio in ratios), sum(ratio > 1 + ALIKE for ratio in ratios)
        middle, low, high = geometric_mean(ratios)
        return [f"{middle:.3f} [{low:.3f}, {high:.3f}]", f"{smaller}, {larger}"]


def _cells(files: Iterable[Stored]) -> list[_Cell]:
    """By norm, model and budget; of several machines' tables of one name the one of the most images, then attacks."""
    tables: dict[str, Table] = {}
    for table in (table for file in files if file.what == "minimal" for table in file.tables):
        size = _images(table), len(table.rows)
        if table.name not in tables or size > (_images(tables[table.name]), len(tables[table.name].rows)):
            tables[table.name] = table
    smallest = {}
    for group in {_group(name) for name in tables}:
        here = [table for name, table in tables.items() if _group(name) == group]
        if len(counts := {_images(table) for table in here}) > 1:
            raise ValueError(f"the tables of {group} are of {sorted(counts)} images; measure or remove some")
        smallest[group] = np.min([row["norms"] for table in here for row in table.rows], 0)
    found = []
    for name, table in tables.items():
        model, norm, gradients = name.rsplit("-", 2)
        best = smallest[_group(name)]
        scores = {row["attack"]: optimality(np.array(row["norms"]), best) or 0.0 for row in table.rows}
        found.append(_Cell(table, model, norm, int(gradients), scores))
    return sorted(found, key=lambda cell: (NORMS.index(cell.norm), cell.model, cell.gradients))


def _group(name: str) -> str:
    """The model and norm of a table."""
    return name.rsplit("-", 1)[0]


def _images(table: Table) -> int:
    return len(table.rows[0]["norms"])


def _bold(value: float | None, best: float) -> str:
    if value is None:
        return "–"
    return f"**{value:.4f}**" if value == best else f"{value:.4f}"


_show = partial(tabulate, tablefmt="github", disable_numparse=True)


def _summary(cells: Sequence[_Cell]) -> str:
    """Ours beside the best of the others, a row per norm, model and budget."""
    table = []
    for cell in cells:
        if not cell.others() or not set(OURS) <= set(cell.optimality):
            continue
        best = max(cell.others(), key=cell.optimality.__getitem__)
        scores = [cell.optimality[name] for name in (*OURS, best)]
        told = [_bold(score, max(scores)) for score in scores]
        where = [SIGN[cell.norm], cell.model, str(_images(cell.table)), str(cell.gradients)]
        orthogonal = f"{geometric_mean(cell.ratios('OrthoMinimumNorm', 'MinimumNorm'))[0]:.3f}"
        compared = cell.compared("MinimumNorm", best)
        table.append([*where, *told[:2], orthogonal, f"{told[2]}, {best}", *compared])
    head = ["norm", "model", "images", "gradients", "plain", "ortho", "ortho / plain", "best other", "plain / other"]
    shown = _show(table, [*head, "smaller, larger"])
    hardware = ", ".join(sorted({cell.table.hardware for cell in cells}))
    versions = ", ".join(sorted({f"{name} {at}" for cell in cells for name, at in cell.table.versions.items()}))
    minutes = sum(row["seconds"] for cell in cells for row in cell.table.rows) / 60
    return f"{hardware}; {versions}; {minutes:.0f} CPU minutes for all tables:\n\n{shown}"


def _lost(cells: Sequence[_Cell]) -> str:
    """Each attack that has a higher optimality than ours at the same budget, or smaller norms in the mean."""
    table = []
    for cell in cells:
        for ours, other in product(OURS, cell.others()):
            if ours not in cell.optimality:
                continue
            own, theirs = cell.optimality[ours], cell.optimality[other]
            if theirs > own or round(geometric_mean(cell.ratios(ours, other))[0], 3) > 1:
                where = [SIGN[cell.norm], cell.model, str(cell.gradients), OURS[ours], other]
                table.append([*where, f"{own:.4f}", f"{theirs:.4f}", *cell.compared(ours, other)])
    if not table:
        return "None."
    head = ["norm", "model", "gradients", "ours", "other", "optimality", "other's"]
    return _show(table, [*head, "ours / other", "smaller, larger"])


def _details(cells: Sequence[_Cell]) -> str:
    """Local optimality in one norm, a column per model and budget; first what is nearest the best of its columns."""
    best = [max(cell.optimality.values()) for cell in cells]
    table = []
    for name in {name for cell in cells for name in cell.optimality}:
        scores = [cell.optimality.get(name) for cell in cells]
        behind = [most - score for most, score in zip(best, scores, strict=True) if score is not None]
        passes = [(row["gradients"] + row["evaluations"]) / (2 * cell.gradients)
                  for cell in cells for row in cell.table.rows if row["attack"] == name]  # fmt: skip
        shown = map(_bold, scores, best)
        table.append((statistics.mean(behind), [name, *shown, f"{100 * statistics.mean(passes):.0f} %"]))
    head = ["attack", *(f"{cell.model}, {cell.gradients}" for cell in cells), "passes taken"]
    return _show([row for _, row in sorted(table)], head)

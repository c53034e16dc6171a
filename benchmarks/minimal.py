"""How small the perturbations are that attacks find, measured with AttackBench's own library beside adv-lib's and
Foolbox's attacks: every attack is given the same number of passes through the model, counted by AttackBench.

    pip install --no-deps attackbenchlib adv-lib
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.stored import RESULTS, Row, Stored, keep
from orthattack import MinimumNorm, OrthoMinimumNorm
from orthattack.eval.data import load_dataset
from orthattack.eval.models import load_classifier

NORMS = ("linf", "l2", "l1")
ORDER = {"linf": float("inf"), "l2": 2, "l1": 1}
TRIALS = 10  # of attacks that fill a ball, between which AttackBench bisects

Run = Callable[[nn.Module, Tensor, Tensor], Tensor]


def ours(kind: Any, norm: str, passes: int) -> Run:
    """The adapter: AttackBench gives a model, images and labels, and wants adversarial images."""

    def run(model: nn.Module, inputs: Tensor, labels: Tensor) -> Tensor:
        found: Tensor = kind(model, norm, gradients=passes // 2)(inputs, labels)
        return found

    return run


def candidates(norm: str, passes: int) -> dict[str, Run]:
    """All attacks that minimise this norm, with what AttackBench sets, and as many steps as the passes allow."""
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


def loaded(weights: Path | None, data: str, limit: int) -> tuple[str, nn.Module, Tensor, Tensor]:
    """A model with its name, and the first images that it classifies correctly, class by class."""
    classifier = load_classifier("cifar10-robust") if weights is None else load_classifier("resnet18", weights, 64)
    dataset = load_dataset(data, classifier)
    by_class: dict[int, list[int]] = {}
    for k, label in enumerate(dataset.labels):
        by_class.setdefault(label, []).append(k)
    order = [k for turn in zip(*by_class.values(), strict=False) for k in turn][: 3 * limit]
    images = torch.stack([dataset.load(k, classifier.preprocessing) for k in order])
    labels = torch.tensor([dataset.labels[k] for k in order])
    with torch.no_grad():
        right = classifier.model(images).argmax(1) == labels
    name = "cifar10-robust" if weights is None else weights.stem
    return name, classifier.model.eval(), images[right][:limit], labels[right][:limit]


def measured(
    name: str,
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    norms: Sequence[str],
    budgets: Sequence[int],
    only: Iterable[str] | None = None,
    folder: Path = RESULTS,
) -> None:
    """Measure each attack at each budget, of gradients and as many evaluations, and store it."""
    run_attack = _attackbench().run_attack

    loader = DataLoader(TensorDataset(images, labels), batch_size=len(images))
    for norm in norms:
        for budget in budgets:
            for attack, run in candidates(norm, 2 * budget).items():
                if only is not None and attack not in only:
                    continue
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    told = run_attack(
                        copy.deepcopy(model), loader, run, norm, images.device, query_budget=2 * budget, debug=True
                    )
                largest = float(torch.linalg.vector_norm(torch.ones_like(images[0]), ORDER[norm]))
                row = {
                    "attack": attack,
                    "norms": [min(d, largest) for d in told["distances"][norm]],
                    "gradients": sum(told["num_backwards"]) / len(images),
                    "evaluations": sum(told["num_forwards"]) / len(images),
                    "seconds": round(sum(told["times"]), 1),
                }
                _keep(f"{name}-{norm}-{budget}", row, folder)


def _attackbench() -> Any:
    """AttackBench; it imports clients of two sites, to which nothing here goes."""
    for missing, name in (("wandb", "Api"), ("visdom", "Visdom")):
        stub = ModuleType(missing)
        setattr(stub, name, object)
        sys.modules.setdefault(missing, stub)
    import attackbench

    return attackbench


def optimality(name: str, rows: Sequence[Row], known: Mapping[str, Sequence[Row]]) -> dict[str, float]:
    """AttackBench's local optimality of each attack (its equation 5): 1 if it finds the smallest norms that anything
    finds at any budget for the model and norm of the table `name`."""
    group = name.rsplit("-", 1)[0]
    every = [row["norms"] for other, of in known.items() if other.rsplit("-", 1)[0] == group for row in of]
    smallest = torch.tensor(every, dtype=torch.float64).amin(0)
    radius = smallest.max()  # at which nothing is robust any more
    gained = (radius - smallest).sum()
    return {
        row["attack"]: float((radius - torch.tensor(row["norms"]).double().clamp(max=float(radius))).sum() / gained)
        for row in rows
    }


def _keep(name: str, row: Row, folder: Path) -> None:
    """Store a row in place of the one of the same attack."""
    rows = [old for old in tables(folder).get(name, []) if old["attack"] != row["attack"]] + [row]
    keep("minimal", name, rows, torch.get_num_threads(), folder)


def tables(folder: Path = RESULTS) -> dict[str, list[Row]]:
    """The stored rows by the names of their tables."""
    files = [Stored.model_validate_json(path.read_text(encoding="utf-8")) for path in folder.glob("minimal/*.json")]
    return {table.name: table.rows for file in files for table in file.tables}

"""How fast the attacks are, beside the bare model, Foolbox and torchattacks, in one process and in turn.

    python benchmarks/performance.py steps [--models NAME ...] [--batches 1 8 32] [--steps 10] [--rounds 4]
    python benchmarks/performance.py accuracy --weights FILE ... --data FOLDER [--limit 500]
    python benchmarks/performance.py growth
    python benchmarks/performance.py start
    python benchmarks/performance.py report

`steps`: time per gradient step and image, and peak memory. `accuracy`: seconds and gradient calls to reach the robust
accuracy that Foolbox's LinfPGD reaches. `growth`: time against image size and number of images. `start`: of the import
and of --help. Each writes its rows to a file in --out, benchmarks/performance by default; `report` writes them
into docs/performance.md and draws its plots. The device is the GPU if there is one.

All candidates of a table run in turn, round by round (A B C A B C ...); figures are medians and ranges over the rounds.
Where weights are random, that changes no time. Foolbox and torchattacks are needed: pip install torchattacks --no-deps
"""

from __future__ import annotations

import argparse
import gc
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch import Tensor, nn

from orthattack import PGD, OrthoPGD
from orthattack.attacks import AttackResult
from orthattack.eval.data import load_photographs
from orthattack.eval.models import load_classifier

EPS = 4 / 255
PEERS = ("bare step", "torchattacks PGD", "Foolbox LinfPGD")
Row = dict[str, Any]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["steps", "accuracy", "growth", "start", "report"])
    parser.add_argument("--models", nargs="+", metavar="NAME", default=["resnet18"])
    parser.add_argument("--batches", type=int, nargs="+", default=[8])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--weights", type=Path, nargs="+", default=[], help="ResNet-18s for 64x64 photographs")
    parser.add_argument("--data", help="their photographs")
    parser.add_argument("--limit", type=int, default=500)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "performance")
    parser.add_argument("--docs", type=Path, default=Path(__file__).parents[1] / "docs")
    args = parser.parse_args()
    if args.table == "report":
        page = args.docs / "performance.md"
        page.write_text(filled(page.read_text(encoding="utf-8"), tables(args.out)), encoding="utf-8")
        draw(_stored(args.out), args.docs / "figures")
        print(page)
        return
    torch.set_num_threads(args.threads)
    args.out.mkdir(exist_ok=True)
    if args.table == "steps":
        for name in args.models:
            for batch in args.batches:
                keep(args, f"steps {name} {batch}", step_rows(name, batch, args.size, args.steps, args.rounds))
    elif args.table == "accuracy":
        for weights in args.weights:
            keep(args, f"accuracy {weights.stem}", accuracy_rows(weights, args.data, args.limit))
    elif args.table == "growth":
        keep(args, "growth", [*size_rows(args.rounds), *count_rows()])
    else:
        keep(args, "start", start_rows(args.rounds))


def keep(args: argparse.Namespace, name: str, rows: Iterable[Row]) -> None:
    """Write one table's rows, with what they were measured on, and show them."""
    rows = list(rows)
    hardware = torch.cuda.get_device_name() if DEVICE.type == "cuda" else f"CPU, {args.threads} threads"
    content = {"hardware": hardware, "torch": torch.__version__.partition("+")[0], "rows": rows}
    (args.out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(f"{name}: {hardware}\n\n{tabulate([_flat(row) for row in rows], 'keys', 'github')}\n", flush=True)


def _flat(row: Row) -> Row:
    return {
        key: f"{statistics.median(value):.4g} ({min(value):.4g} to {max(value):.4g})"
        if isinstance(value, list)
        else value
        for key, value in row.items()
    }


# Time per step


def step_rows(
    name: str, batch: int, size: int, steps: int, rounds: int, only: Sequence[str] | None = None
) -> list[Row]:
    import torchvision

    torch.manual_seed(0)
    model = getattr(torchvision.models, name)().eval().to(DEVICE)
    images = pictures(batch, size).to(DEVICE)
    with torch.no_grad():
        labels = model(images).argmax(1)  # so that nothing is fooled from the start
    runs = candidates(model, images, labels, steps)
    runs = runs if only is None else {key: runs[key] for key in only}
    seconds: dict[str, list[float]] = {key: [] for key in runs}
    memory: dict[str, float] = {}
    for key, run in runs.items():  # to warm up
        memory[key] = peak_memory(run)
    for _ in range(rounds):
        for key, run in runs.items():
            seconds[key].append(timed(run) / steps / batch * 1e3)
    return [
        {"model": name, "batch": batch, "size": size, "steps": steps, "candidate": key, "ms": seconds[key],
         "peak MB": memory[key]}
        for key in runs
    ]  # fmt: skip


def pictures(count: int, size: int) -> Tensor:
    """Images that are smooth in places, saturated in others, of 8 bits."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(count, 3, 12, 12, generator=generator) * 1.4 - 0.2
    smooth = nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")
    noise = 0.05 * torch.randn(smooth.shape, generator=generator)
    return ((smooth + noise).clamp(0, 1) * 255).round() / 255


def candidates(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> dict[str, Callable[[], object]]:
    """What is timed; each does `steps` gradient steps. Parameters ask for gradients, as they do in a user's hands."""
    import foolbox
    import torchattacks

    def bare(reduced: bool) -> None:
        model.requires_grad_(False)
        for _ in range(steps):
            leaf = images.clone().requires_grad_()
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=reduced):
                logits = model(leaf)
            torch.autograd.grad(nn.functional.cross_entropy(logits.float(), labels, reduction="sum"), leaf)
        model.requires_grad_(True)

    def foolbox_pgd() -> None:
        attack = foolbox.attacks.LinfPGD(steps=steps, abs_stepsize=EPS / 4)
        attack(foolbox.PyTorchModel(model, bounds=(0, 1), device=DEVICE), images, labels, epsilons=EPS)
        model.zero_grad(set_to_none=True)

    def ours(kind: Any, **options: Any) -> Callable[[], Tensor]:
        attack = kind(model, alpha=EPS / 4, steps=steps, eps=EPS, **options)
        return lambda: attack(images, labels)

    peer = torchattacks.PGD(model, eps=EPS, alpha=EPS / 4, steps=steps)
    return {
        "Foolbox LinfPGD": foolbox_pgd,
        "torchattacks PGD": lambda: peer(images, labels),
        "bare step": partial(bare, False),
        "bare step, bfloat16": partial(bare, True),
        "PGD": ours(PGD),
        "OrthoPGD, gradient": ours(OrthoPGD, enforce="gradient"),
        "OrthoPGD": ours(OrthoPGD),
        "OrthoPGD, early stop": ours(OrthoPGD, early_stop=True),
        "PGD, bfloat16": ours(PGD, precision="bfloat16"),
        "OrthoPGD, bfloat16": ours(OrthoPGD, precision="bfloat16"),
        "PGD, optimize": ours(PGD, optimize="auto"),
        "OrthoPGD, optimize": ours(OrthoPGD, optimize="auto"),
        "OrthoPGD, bfloat16, optimize": ours(OrthoPGD, optimize="auto", precision="bfloat16"),
        "OrthoPGD, bfloat16, optimize, early stop": ours(
            OrthoPGD, optimize="auto", precision="bfloat16", early_stop=True
        ),
    }


def timed(run: Callable[[], object]) -> float:
    """Seconds that a run takes."""
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def peak_memory(run: Callable[[], object]) -> float:
    """Megabytes that a run needs beyond what was there before it."""
    gc.collect()
    if DEVICE.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return round((torch.cuda.max_memory_allocated() - before) / 1e6, 1)
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # sets the peak to what is resident now
    before = _resident("VmRSS")
    run()
    return round((_resident("VmHWM") - before) / 1e3, 1)


def _resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return int(found[1])


# Time to the same robust accuracy


def accuracy_rows(weights: Path, data: str, limit: int) -> list[Row]:
    """What Foolbox's LinfPGD reaches in 20 steps, and what each candidate needs for no more robust accuracy."""
    import foolbox

    classifier = load_classifier("resnet18", weights, 64)
    photographs = load_photographs(data, classifier).limited(limit)
    images = torch.stack([photographs.load(k, classifier.preprocessing) for k in range(len(photographs))]).to(DEVICE)
    labels = torch.tensor(photographs.labels, device=DEVICE)
    model = classifier.model.to(DEVICE)
    with torch.no_grad():
        right = torch.cat([model(part).argmax(1) for part in images.split(50)]) == labels  # type: ignore[no-untyped-call]
    images, labels, total = images[right], labels[right], len(images)
    batches = [slice(k, k + 50) for k in range(0, len(images), 50)]

    def robust(adversarials: Tensor, part: slice) -> int:
        with torch.no_grad():
            return int((model(adversarials).argmax(1) == labels[part]).sum())

    def theirs(steps: int) -> tuple[int, float, float]:
        attack, standing, seconds = foolbox.attacks.LinfPGD(steps=steps, rel_stepsize=2.5 / steps), 0, 0.0
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=DEVICE)
        for part in batches:
            found: list[Tensor] = []
            seconds += timed(lambda p=part, f=found: f.append(attack(wrapped, images[p], labels[p], epsilons=EPS)[1]))  # type: ignore[misc]
            standing += robust(found[0], part)
        return standing, seconds, float(steps)

    def mine(steps: int, kind: Any, **options: Any) -> tuple[int, float, float]:
        attack = kind(model, eps=EPS, steps=steps, generator=torch.Generator().manual_seed(0), **options)
        found: list[AttackResult] = []
        seconds = timed(lambda: found.append(attack.run(images, labels, batch_size=50)))
        standing = sum(robust(found[0].adversarials[part], part) for part in batches)
        return standing, seconds, float(found[0].gradient_calls.double().mean())

    early: dict[str, Any] = {"early_stop": True}
    fast = {**early, "optimize": "auto", "precision": "bfloat16"}
    named: dict[str, Callable[[int], tuple[int, float, float]]] = {
        "PGD": partial(mine, kind=PGD),
        "PGD, early stop": partial(mine, kind=PGD, **early),
        "OrthoPGD": partial(mine, kind=OrthoPGD),
        "OrthoPGD, early stop": partial(mine, kind=OrthoPGD, **early),
        "OrthoPGD, bfloat16, optimize, early stop": partial(mine, kind=OrthoPGD, **fast),
    }
    theirs(1)
    target, seconds, calls = theirs(20)
    rows = [_reached(weights.stem, "Foolbox LinfPGD", 20, target, total, seconds, calls)]
    for name, run in named.items():
        run(1)  # to warm up
        for steps in (3, 5, 7, 10, 15, 20, 30, 50):
            standing, seconds, calls = run(steps)
            if standing <= target:
                break
        rows.append(_reached(weights.stem, name, steps, standing, total, seconds, calls))
    again = theirs(20)[1]
    rows[0]["seconds"] = [rows[0]["seconds"][0], again]  # before and after the others
    return rows


def _reached(model: str, name: str, steps: int, standing: int, total: int, seconds: float, calls: float) -> Row:
    return {
        "model": model,
        "candidate": name,
        "steps": steps,
        "robust accuracy": round(100 * standing / total, 2),
        "images": total,
        "seconds": [round(seconds, 2)],
        "gradient calls": round(calls, 2),
    }


# Growth


def size_rows(rounds: int) -> list[Row]:
    shown = ("Foolbox LinfPGD", "bare step", "PGD", "OrthoPGD")
    measured = [row for size in (64, 128, 224, 320, 512) for row in step_rows("resnet18", 2, size, 3, rounds, shown)]
    return [{"against": "size", "x": row["size"], "candidate": row["candidate"], "ms": row["ms"]} for row in measured]


def count_rows() -> list[Row]:
    """Seconds for 10^2 to 10^4 images of 32x32 in one call, and the memory that the attack needs."""
    classifier = load_classifier("cifar10-standard")
    model = classifier.model.to(DEVICE)
    rows = []
    for count in (100, 1_000, 10_000):
        images = pictures(100, 32).repeat(count // 100, 1, 1, 1).to(DEVICE)
        labels = torch.zeros(count, dtype=torch.long, device=DEVICE)
        attack = OrthoPGD(model, eps=EPS, steps=3)
        seconds: list[float] = []
        memory = peak_memory(lambda a=attack, x=images, y=labels, s=seconds: s.append(  # type: ignore[misc]
            timed(lambda: a.run(x, y, batch_size=50))))  # fmt: skip
        rows.append({"against": "count", "x": count, "candidate": "OrthoPGD", "seconds": seconds, "peak MB": memory})
    return rows


def start_rows(rounds: int) -> list[Row]:
    commands = {
        "import orthattack": [sys.executable, "-c", "import orthattack"],
        "import torch": [sys.executable, "-c", "import torch"],
        "from orthattack import OrthoPGD": [sys.executable, "-c", "from orthattack import OrthoPGD"],
        "orthattack --help": [sys.executable, "-m", "orthattack", "--help"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(rounds + 1):
        for name, command in commands.items():
            start = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds[name].append(round(time.perf_counter() - start, 3))
    return [{"command": name, "seconds": times[1:]} for name, times in seconds.items()]


# Tables and plots


def tables(folder: Path) -> dict[str, str]:
    """The table of each stored file, in Markdown."""
    read = _stored(folder)
    makers = {"steps": _steps_table, "accuracy": _accuracy_table}
    return {name: makers.get(name.partition(" ")[0], _plain_table)(content) for name, content in read.items()}


def filled(page: str, content: Mapping[str, str]) -> str:
    """A page with each table between its two comments, ``<!-- NAME -->`` and ``<!-- /NAME -->``."""
    for name, table in content.items():
        comments = f"<!-- {name} -->", f"<!-- /{name} -->"
        pattern = re.escape(comments[0]) + ".*?" + re.escape(comments[1])
        block = f"{comments[0]}\n\n{table}\n\n{comments[1]}"
        page = re.sub(pattern, lambda _, block=block: block, page, flags=re.DOTALL)  # type: ignore[misc]
    return page


def _stored(folder: Path) -> dict[str, Any]:
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}


def _plain_table(content: Row) -> str:
    return f"{content['hardware']}:\n\n{tabulate([_flat(row) for row in content['rows']], 'keys', 'github')}"


def _steps_table(content: Row) -> str:
    rows = content["rows"]
    middle = {row["candidate"]: statistics.median(row["ms"]) for row in rows}
    table = [
        [row["candidate"], f"{middle[row['candidate']]:.2f}", f"{min(row['ms']):.2f} to {max(row['ms']):.2f}",
         *(f"{middle[row['candidate']] / middle[of]:.2f}" for of in PEERS),
         f"{row['peak MB']:.0f}"]
        for row in rows
    ]  # fmt: skip
    head = ["", "ms", "range", "of the bare step", "of torchattacks'", "of Foolbox's", "peak MB"]
    about = f"{rows[0]['model']}, batch {rows[0]['batch']}, {rows[0]['steps']} steps, {len(rows[0]['ms'])} rounds"
    return f"{about} ({content['hardware']}):\n\n{tabulate(table, head, 'github', disable_numparse=True)}"


def _accuracy_table(content: Row) -> str:
    rows = content["rows"]
    first = statistics.median(rows[0]["seconds"])
    table = [
        [row["candidate"], row["steps"], f"{row['robust accuracy']:.1f} %", f"{row['gradient calls']:.1f}",
         f"{statistics.median(row['seconds']):.1f}", f"{statistics.median(row['seconds']) / first:.2f}"]
        for row in rows
    ]  # fmt: skip
    head = ["", "steps", "robust accuracy", "gradient calls per image", "seconds", "of Foolbox's"]
    about = f"{rows[0]['model']}, {rows[0]['images']} images ({content['hardware']}):"
    return f"{about}\n\n{tabulate(table, head, 'github', disable_numparse=True)}"


def draw(read: Mapping[str, Any], figures: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "orthattack"
    import matplotlib.pyplot as plt

    def save(figure: Any, name: str) -> None:
        figure.savefig(
            figures / f"performance-{name}.svg", metadata={"Date": None}, facecolor="white", bbox_inches="tight"
        )
        plt.close(figure)

    steps = {name: content for name, content in read.items() if name.startswith("steps")}
    if steps:
        shown = [row["candidate"] for row in next(iter(steps.values()))["rows"]]
        figure, axes = plt.subplots(1, len(steps), figsize=(2.6 * len(steps) + 2, 3.8), sharey=True, squeeze=False)
        for axis, content in zip(axes[0], steps.values(), strict=True):
            middle = {row["candidate"]: statistics.median(row["ms"]) for row in content["rows"]}
            values = [middle[name] / middle["bare step"] for name in shown]
            colours = [
                "#bbbbbb" if "Foolbox" in n or "torch" in n else "#555555" if "bare" in n else "#0072b2" for n in shown
            ]
            axis.barh(range(len(shown)), values, color=colours)
            axis.axvline(1, color="black", linewidth=0.8)
            axis.set_title(f"{content['rows'][0]['model']}, batch {content['rows'][0]['batch']}", fontsize=9)
            axis.tick_params(labelsize=8)
            axis.set_xlabel("time of the bare step", fontsize=8)
        axes[0][0].set_yticks(range(len(shown)), shown)
        axes[0][0].invert_yaxis()
        save(figure, "steps")
    accuracy = {name: content for name, content in read.items() if name.startswith("accuracy")}
    if accuracy:
        figure, axes = plt.subplots(
            1, len(accuracy), figsize=(4.5 * len(accuracy) + 2, 2.4), sharey=True, squeeze=False
        )
        for axis, (name, content) in zip(axes[0], accuracy.items(), strict=True):
            names = [f"{row['candidate']}" for row in content["rows"]]
            values = [statistics.median(row["seconds"]) for row in content["rows"]]
            axis.barh(range(len(names)), values, color=["#bbbbbb"] + ["#0072b2"] * (len(names) - 1))
            for at, (value, row) in enumerate(zip(values, content["rows"], strict=True)):
                axis.text(value, at, f" {row['steps']} steps", va="center", fontsize=7)
            axis.set_title(name.removeprefix("accuracy "), fontsize=9)
            axis.set_xlabel(f"seconds to {content['rows'][0]['robust accuracy']:.1f} % robust accuracy", fontsize=8)
            axis.tick_params(labelsize=8)
            axis.margins(x=0.18)
        axes[0][0].set_yticks(range(len(names)), names)
        axes[0][0].invert_yaxis()
        save(figure, "accuracy")
    if "growth" in read:
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
        rows = read["growth"]["rows"]
        for name, colour in zip(
            ("Foolbox LinfPGD", "bare step", "PGD", "OrthoPGD"),
            ("#999999", "#000000", "#e69f00", "#0072b2"),
            strict=True,
        ):
            points = [
                (row["x"], statistics.median(row["ms"]))
                for row in rows
                if row["against"] == "size" and row["candidate"] == name
            ]
            left.loglog(*zip(*points, strict=True), marker="o", markersize=3, color=colour, label=name)
        left.set_xticks([64, 128, 224, 512], ["64", "128", "224", "512"])
        left.minorticks_off()
        left.set_xlabel("pixels along a side (ResNet-18, batch 2)", fontsize=8)
        left.set_ylabel("ms per image and step", fontsize=8)
        left.legend(fontsize=7)
        points = [(row["x"], statistics.median(row["seconds"])) for row in rows if row["against"] == "count"]
        right.loglog(*zip(*points, strict=True), marker="o", markersize=3, color="#0072b2")
        right.set_xlabel("images of 32x32 in one call (batches of 50, 3 steps)", fontsize=8)
        right.set_ylabel("seconds", fontsize=8)
        for axis in (left, right):
            axis.tick_params(labelsize=8)
        figure.tight_layout()
        save(figure, "growth")


if __name__ == "__main__":
    main()

"""How fast the attacks are, beside the bare model, Foolbox and torchattacks, in one process and in turn.

    python benchmarks/performance.py steps [--models NAME ...] [--batches 1 8 32] [--steps 10] [--rounds 4]
    python benchmarks/performance.py accuracy --weights FILE ... --data FOLDER [--limit 300]
    python benchmarks/performance.py growth
    python benchmarks/performance.py start
    python benchmarks/performance.py report

`steps`: time per gradient step and image, and peak memory. `accuracy`: seconds and gradient calls to reach the robust
accuracy that Foolbox's LinfPGD reaches. `growth`: time against image size and number of images. `start`: of the import
and of --help. Each writes its rows to a file in --out, benchmarks/performance by default, that is named after what was
measured and on what; `report` writes them into docs/performance.md and draws its plots. The device is the GPU if there
is one.

All candidates of a table run in turn, round by round (A B C A B C ...); figures are medians and ranges over the rounds.
Where weights are random, that changes no time. Foolbox and torchattacks are needed: pip install torchattacks --no-deps
"""

from __future__ import annotations

import argparse
import ctypes
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
from orthattack.eval.data.load import load_photographs
from orthattack.eval.models.load import load_classifier

EPS = 4 / 255
TRIED_STEPS = (3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 20, 30, 50)
PEERS = ("bare step", "torchattacks PGD", "Foolbox LinfPGD")
Row = dict[str, Any]
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("table", choices=["steps", "accuracy", "growth", "start", "report"])
    parser.add_argument("--models", nargs="+", metavar="NAME", default=["resnet18"])
    parser.add_argument("--batches", type=int, nargs="+", default=[8])
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--only", nargs="+", metavar="CANDIDATE", help="rows of `steps` to measure")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--weights", type=Path, nargs="+", default=[], help="ResNet-18s for 64x64 photographs")
    parser.add_argument("--data", help="their photographs")
    parser.add_argument("--limit", type=int, default=300)
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
                rows = step_rows(name, batch, args.size, args.steps, args.rounds, args.only)
                keep(args, f"steps {name} {batch} {args.steps}", rows)
    elif args.table == "accuracy":
        for weights in args.weights:
            keep(args, f"accuracy {weights.stem}", accuracy_rows(weights, args.data, args.limit, args.rounds))
    elif args.table == "growth":
        keep(args, "growth", [*size_rows(args.rounds), *count_rows()])
    else:
        keep(args, "start", start_rows(args.rounds))


def keep(args: argparse.Namespace, name: str, rows: Iterable[Row]) -> None:
    """Write one table's rows, with what they were measured on, and show them."""
    rows = list(rows)
    if DEVICE.type == "cuda":
        place = hardware = torch.cuda.get_device_name()
    else:
        place = torch.backends.cpu.get_cpu_capability()  # AVX2, AVX512: what bfloat16 costs depends on it
        hardware = f"CPU with {place}, {args.threads} threads"
    content = {"hardware": hardware, "torch": torch.__version__.partition("+")[0], "rows": rows}
    (args.out / f"{name}, {place}.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
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
    for layer in model.modules():  # torchvision sets the last layer of its transformers to 0
        if isinstance(layer, nn.Linear) and not bool(layer.weight.any()):
            nn.init.normal_(layer.weight, std=0.02)
    images = pictures(batch, size).to(DEVICE)
    with torch.no_grad():
        labels = model(images).argmax(1)  # so that nothing is fooled from the start
    runs = candidates(model, steps)
    runs = runs if only is None else {key: runs[key] for key in only}
    for run in runs.values():  # to warm up
        run(images[:1], labels[:1])
    short = candidates(model, 2)  # need as much memory as longer ones
    memory = {key: peak_memory(partial(short[key], images, labels)) for key in runs}
    seconds: dict[str, list[float]] = {key: [] for key in runs}
    for _ in range(rounds):
        for key, run in runs.items():
            seconds[key].append(timed(partial(run, images, labels)) / steps / batch * 1e3)
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


def candidates(model: nn.Module, steps: int) -> dict[str, Callable[[Tensor, Tensor], object]]:
    """What is timed; each does `steps` gradient steps. Parameters ask for gradients, as they do in a user's hands."""
    import foolbox
    import torchattacks

    def bare(images: Tensor, labels: Tensor, reduced: bool) -> None:
        model.requires_grad_(False)
        for _ in range(steps):
            leaf = images.clone().requires_grad_()
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=reduced):
                logits = model(leaf)
            torch.autograd.grad(nn.functional.cross_entropy(logits.float(), labels, reduction="sum"), leaf)
        model.requires_grad_(True)

    def foolbox_pgd(images: Tensor, labels: Tensor) -> None:
        attack = foolbox.attacks.LinfPGD(steps=steps, abs_stepsize=EPS / 4)
        attack(foolbox.PyTorchModel(model, bounds=(0, 1), device=DEVICE), images, labels, epsilons=EPS)
        model.zero_grad(set_to_none=True)

    def ours(kind: Any, **options: Any) -> Callable[[Tensor, Tensor], object]:
        attack: Callable[[Tensor, Tensor], object] = kind(model, alpha=EPS / 4, steps=steps, eps=EPS, **options)
        return attack

    peer = torchattacks.PGD(model, eps=EPS, alpha=EPS / 4, steps=steps)
    return {
        "Foolbox LinfPGD": foolbox_pgd,
        "torchattacks PGD": peer,
        "bare step": partial(bare, reduced=False),
        "bare step, bfloat16": partial(bare, reduced=True),
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
    ctypes.CDLL(None).malloc_trim(0)  # what earlier runs freed would hide what this one needs
    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # sets the peak to what is resident now
    before = _resident("VmRSS")
    run()
    return round((_resident("VmHWM") - before) / 1e3, 1)


def _resident(field: str) -> int:
    found = re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text(encoding="ascii"))
    assert found is not None
    return int(found[1])


# Time to the same robust accuracy


def accuracy_rows(weights: Path, data: str, limit: int, rounds: int) -> list[Row]:
    """What each candidate needs to leave no more robust than Foolbox's LinfPGD does in 20 steps.

    The fewest steps are sought first; then the candidates, Foolbox with 20 steps first, are timed in turn.
    """
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
        attack = foolbox.attacks.LinfPGD(steps=steps, rel_stepsize=2.5 / steps)
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=DEVICE)
        returned: list[Tensor] = []
        seconds = timed(
            lambda: returned.extend(attack(wrapped, images[part], labels[part], epsilons=EPS)[1] for part in batches)
        )
        return sum(map(robust, returned, batches)), seconds, float(steps)

    def mine(steps: int, kind: Any, **options: Any) -> tuple[int, float, float]:
        attack = kind(model, eps=EPS, steps=steps, generator=torch.Generator().manual_seed(0), **options)
        found: list[AttackResult] = []
        seconds = timed(lambda: found.append(attack.run(images, labels, batch_size=50)))
        standing = sum(robust(found[0].adversarials[part], part) for part in batches)
        return standing, seconds, float(found[0].gradient_calls.double().mean())

    early: dict[str, Any] = {"early_stop": True}
    fast = {**early, "optimize": "auto", "precision": "bfloat16"}
    falling: dict[str, Any] = {"alpha": 2 * EPS, "schedule": "linear"}
    named: dict[str, Callable[[int], tuple[int, float, float]]] = {
        "Foolbox LinfPGD, fewest steps": theirs,
        "PGD": partial(mine, kind=PGD),
        "PGD, early stop": partial(mine, kind=PGD, **early),
        "OrthoPGD": partial(mine, kind=OrthoPGD),
        "OrthoPGD, early stop": partial(mine, kind=OrthoPGD, **early),
        "OrthoPGD, bfloat16, optimize, early stop": partial(mine, kind=OrthoPGD, **fast),
        "the same, steps from 2 eps down to 0": partial(mine, kind=OrthoPGD, **fast, **falling),
    }
    target = theirs(20)[0]
    fewest = {
        name: next((n for n in TRIED_STEPS if run(n)[0] <= target), TRIED_STEPS[-1]) for name, run in named.items()
    }
    named, fewest = {"Foolbox LinfPGD": theirs, **named}, {"Foolbox LinfPGD": 20, **fewest}
    rows: list[Row] = [
        {"model": weights.stem, "candidate": name, "steps": steps, "images": total, "seconds": []}
        for name, steps in fewest.items()
    ]
    for _ in range(rounds):
        for row in rows:
            standing, seconds, calls = named[row["candidate"]](row["steps"])
            row["seconds"].append(round(seconds, 2))
            row |= {"robust accuracy": round(100 * standing / total, 2), "gradient calls": round(calls, 2)}
    return rows


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
        run, seconds = partial(attack.run, images, labels, batch_size=50), list[float]()
        memory = peak_memory(lambda run=run, seconds=seconds: seconds.append(timed(run)))  # type: ignore[misc]
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
    found = {name: makers.get(name.partition(" ")[0], _plain_table)(content) for name, content in read.items()}
    steps = _steps_by_place(read)
    return found | ({"summary": _summary(steps.values())} if steps else {})


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


def _steps_by_place(read: Mapping[str, Any]) -> dict[str, list[Row]]:
    """What was stored of `steps`, by the place in the files' names."""
    found: dict[str, list[Row]] = {}
    for name, content in read.items():
        if name.startswith("steps"):
            found.setdefault(name.rpartition(", ")[2], []).append(content)
    return found


def _plain_table(content: Row) -> str:
    return f"{content['hardware']}:\n\n{tabulate([_flat(row) for row in content['rows']], 'keys', 'github')}"


def _medians(rows: Sequence[Row]) -> dict[str, float]:
    return {row["candidate"]: statistics.median(row["ms"]) for row in rows}


def _steps_table(content: Row) -> str:
    rows = content["rows"]
    middle = _medians(rows)
    table = [
        [row["candidate"], f"{middle[row['candidate']]:.2f}", f"{min(row['ms']):.2f} to {max(row['ms']):.2f}",
         *(f"{middle[row['candidate']] / middle[of]:.2f}" for of in PEERS),
         f"{row['peak MB']:.0f}"]
        for row in rows
    ]  # fmt: skip
    head = ["", "ms", "range", "of the bare step", "of torchattacks'", "of Foolbox's", "peak MB"]
    about = f"{rows[0]['model']}, batch {rows[0]['batch']}, {rows[0]['steps']} steps, rounds: {len(rows[0]['ms'])}"
    return f"{about} ({content['hardware']}):\n\n{tabulate(table, head, 'github', disable_numparse=True)}"


def _summary(places: Iterable[Sequence[Row]]) -> str:
    """All models and batches, a table for each hardware: time of a step in parts of Foolbox's."""
    columns = ["bare step", "torchattacks PGD", "PGD", "OrthoPGD", "OrthoPGD, bfloat16", "PGD, optimize",
               "OrthoPGD, optimize", "OrthoPGD, bfloat16, optimize"]  # fmt: skip
    found = []
    for contents in places:
        here = [content["rows"] for content in contents]
        here.sort(key=lambda rows: [rows[0][key] for key in ("model", "batch", "steps")])
        shown = [name for name in columns if any(name in _medians(rows) for rows in here)]
        table = []
        for rows in here:
            middle = _medians(rows)
            theirs = middle["Foolbox LinfPGD"]
            ratios = (f"{middle[name] / theirs:.2f}" if name in middle else "–" for name in shown)
            table.append([rows[0]["model"], rows[0]["batch"], rows[0]["steps"], f"{theirs:.1f}", *ratios])
        head = ["model", "batch", "steps", "Foolbox, ms", *shown]
        found.append(f"{contents[0]['hardware']}:\n\n{tabulate(table, head, 'github', disable_numparse=True)}")
    return "\n\n".join(found)


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

    for place, contents in _steps_by_place(read).items():
        first: dict[tuple[str, int], list[Row]] = {}
        # Of several numbers of steps, the fewest.
        for rows in sorted((content["rows"] for content in contents), key=lambda rows: int(rows[0]["steps"])):
            first.setdefault((rows[0]["model"], rows[0]["batch"]), rows)
        models = sorted({model for model, _ in first})
        batches = sorted({batch for _, batch in first})
        times = {at: _medians(rows) for at, rows in first.items()}
        usual = len(times) / 2  # what few tables have, early stop for one, is left to them
        shown = [n for n in max(times.values(), key=len) if sum(n in middle for middle in times.values()) > usual]
        height = 0.4 + 0.19 * len(shown) * len(models)
        figure, axes = plt.subplots(
            len(models), len(batches), figsize=(2.3 * len(batches) + 2, height), sharex=True, sharey=True, squeeze=False
        )
        colours = [
            "#bbbbbb" if "Foolbox" in n or "torch" in n else "#555555" if "bare" in n else "#0072b2" for n in shown
        ]
        for row, model in enumerate(models):
            for axis, batch in zip(axes[row], batches, strict=True):
                axis.set_title(f"{model}, batch {batch}", fontsize=8)
                axis.tick_params(labelsize=7)
                middle = times.get((model, batch))
                if middle is None:
                    axis.text(0.5, 0.5, "not measured", transform=axis.transAxes, ha="center", fontsize=7)
                else:
                    axis.axvline(1, color="black", linewidth=0.8)
                    widths = [middle.get(n, float("nan")) / middle["bare step"] for n in shown]
                    axis.barh(range(len(shown)), widths, color=colours)
        for axis in axes[-1]:
            axis.set_xlabel("time of the bare step", fontsize=8)
        axes[0][0].set_yticks(range(len(shown)), shown)
        axes[0][0].invert_yaxis()
        figure.tight_layout(pad=0.4)
        save(figure, f"steps-{re.sub(r'[^a-z0-9]+', '-', place.lower())}")
    accuracy = {name: content for name, content in read.items() if name.startswith("accuracy")}
    if accuracy:
        figure, axes = plt.subplots(
            1, len(accuracy), figsize=(4.5 * len(accuracy) + 2, 2.4), sharey=True, squeeze=False
        )
        for axis, (name, content) in zip(axes[0], accuracy.items(), strict=True):
            names = [f"{row['candidate']}" for row in content["rows"]]
            values = [statistics.median(row["seconds"]) for row in content["rows"]]
            axis.barh(range(len(names)), values, color=["#bbbbbb" if "Foolbox" in n else "#0072b2" for n in names])
            for at, (value, row) in enumerate(zip(values, content["rows"], strict=True)):
                missed = row["robust accuracy"] > content["rows"][0]["robust accuracy"]
                label = f" not in {row['steps']} steps" if missed else f" {row['steps']} steps"
                axis.text(value, at, label, va="center", fontsize=7)
            axis.set_title(name.removeprefix("accuracy ").rpartition(", ")[0], fontsize=9)
            axis.set_xlabel(f"seconds to {content['rows'][0]['robust accuracy']:.1f} % robust accuracy", fontsize=8)
            axis.tick_params(labelsize=8)
            axis.margins(x=0.25)
        axes[0][0].set_yticks(range(len(names)), names)
        axes[0][0].invert_yaxis()
        save(figure, "accuracy")
    growth = next((content for name, content in read.items() if name.startswith("growth")), None)
    if growth is not None:
        figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3))
        rows = growth["rows"]
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
        left.set_yticks([20, 50, 100, 200, 500], ["20", "50", "100", "200", "500"])
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

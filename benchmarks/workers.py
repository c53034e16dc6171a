"""What the Ray engine costs, and how many workers its driver can feed.

`cost_rows`: the bundled robust model under OrthoPGD, units of about that many seconds each, in a plain process and in
some workers. Of each worker, the gaps between the end of one unit and the beginning of its next are the engine's; the
rest is work. The first unit of each worker, which loads the model, is left out of both. On a machine with fewer cores
than workers the work is slower, not the gaps.

`driver_rows`: the real plan, queue and driver of 50,000 images x 10 attacks x 20 models, with work that is a sleep.
Instead of 256 processes, which no small machine holds, 8 Ray actors stand for 32 workers each and answer like them: at
once, for the most that the driver can hand out, then after a sleep. Memory is the driver's own, at its largest.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from benchmarks.stored import Row
from orthattack.eval.running.chunk import Done
from orthattack.eval.running.plan import Plan, Unit
from orthattack.eval.running.progress import Watch
from orthattack.eval.running.ray import Crew, RayWorker, ray_crew, seat
from orthattack.eval.running.run import run_suite, suite_inputs
from orthattack.eval.running.worker import Worker
from orthattack.eval.storage.run_folder import RunFolder
from orthattack.eval.suite import Suite, make_suite

PER_UNIT = 5
RAY_WORKERS = 8


# What the engine costs


def work_suite(steps: int, units: int) -> Suite:
    """That many units, each of `PER_UNIT` images: 4 of the package's images, times copies of the model."""
    return make_suite(
        {
            "models": [{"name": "cifar10-robust", "label": f"copy {k}"} for k in range(max(1, units // 4))],
            "data": {"source": "cifar10-samples", "limit": PER_UNIT * min(units, 4)},
            "attacks": ["OrthoPGD"],
            "steps": steps,
            "shard_size": PER_UNIT,
            "batch_size": PER_UNIT,
            "attack_misclassified": True,
            "checks": False,
        },
        "engine",
    )


def note(folder: Path, unit: Unit, start: float) -> None:
    """Set down when this process did a unit."""
    line = [os.getpid(), f"{unit.model} {unit.chunk}", start, time.time()]
    with (folder / f"{os.getpid()}.times").open("a") as stream:
        stream.write(json.dumps(line) + "\n")


class TimedWorker(RayWorker):
    """A worker that sets down its times beside the run."""

    def start(self, *arguments: Any) -> dict[str, Any]:
        self.times = Path(arguments[2]).parent
        return super().start(*arguments)

    def do(self, unit: Unit, following: Unit | None) -> Any:
        start = time.time()
        done = super().do(unit, following)
        note(self.times, unit, start)
        return done


class TimedHere:
    """This process as an engine that sets down its times."""

    name = "none"

    def __init__(self, suite: Suite, folder: Path) -> None:
        self.workers: list[dict[str, Any]] = []
        self.suite, self.folder = suite, folder

    def __call__(self, units: Sequence[Unit], plan: Plan, watch: Watch, say: Callable[[str], None], /) -> None:
        worker = Worker(plan, suite_inputs(self.suite), torch.device("cpu"), say)
        for unit in units:
            start = time.time()
            worker.do(unit, None, watch)
            note(self.folder, unit, start)
        worker.close()


def plain(steps: int, units: int, folder: Path, part: tuple[int, int]) -> None:
    suite = work_suite(steps, units)
    engine = TimedHere(suite, folder)
    run_suite(suite, suite_inputs(suite), RunFolder(folder / "run"), share=part, engine=engine, progress=False)


def cost_rows(seconds: float, numbers: Sequence[int]) -> list[Row]:
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    steps = calibrated(seconds)
    rows: list[Row] = []
    for number in numbers:
        kind, workers, units = ("Ray", number, max(4, 2 * number)) if number else ("plain", 1, 4)
        with tempfile.TemporaryDirectory() as temporary:
            folder, began = Path(temporary), time.time()
            cpu = time.process_time()
            if kind == "plain":
                processes = [
                    subprocess.Popen(
                        [
                            sys.executable,
                            "-m",
                            "benchmarks",
                            "workers",
                            "--threads",
                            "1",
                            "--alone",
                            f"{steps},{units},{folder},{i},{workers}",
                        ]
                    )
                    for i in range(1, workers + 1)
                ]
                assert [process.wait() for process in processes] == [0] * workers
            else:
                on_ray(steps, units, folder, workers)
            cpu = time.process_time() - cpu
            about: Row = {"": kind, "workers": workers, "units": units, "images x steps": f"{PER_UNIT} x {steps}"}
            rows.append(about | summary(folder, began) | {"driver's CPU, s": round(cpu, 2)})
    return rows


def calibrated(seconds: float) -> int:
    """How many steps make a unit of that many seconds."""
    with tempfile.TemporaryDirectory() as temporary:
        plain(20, 2, Path(temporary), (1, 1))
        (_, _, start, end) = json.loads(next(Path(temporary).glob("*.times")).read_text().splitlines()[-1])
    return max(1, int(20 * 1.1 * seconds / (end - start)))


def on_ray(steps: int, units: int, folder: Path, workers: int) -> None:
    import ray

    suite = work_suite(steps, units)
    with ray_crew(None, workers, "cpu"):
        crew = Crew(ray, workers, "cpu", ray.remote(seat(TimedWorker)).options(num_cpus=1).remote)
        run_suite(suite, suite_inputs(suite), RunFolder(folder / "run"), engine=crew, progress=False)


def summary(folder: Path, began: float) -> Row:
    """Seconds until the first unit, mean seconds of one, mean gap before the next in ms, and the gaps' share."""
    of: dict[int, list[tuple[float, float]]] = defaultdict(list)
    for path in folder.glob("*.times"):
        for process, _, start, end in map(json.loads, path.read_text().splitlines()):
            of[process].append((start, end))
    work, gaps, first = [], [], min(start for times in of.values() for start, _ in times) - began
    for times in of.values():
        work += [end - start for start, end in times[1:]]
        gaps += [after[0] - before[1] for before, after in pairwise(times)]
    share = sum(gaps) / (sum(gaps) + sum(work))
    mean = 1000 * sum(gaps) / len(gaps)
    return {
        "until the first, s": round(first, 1),
        "s per unit": round(sum(work) / len(work), 2),
        "gap, ms": round(mean, 1),
        "gaps, % of the time": round(100 * share, 2),
    }


# How many workers the driver can feed


class Stub:
    """A Ray actor that stands for many workers."""

    def here(self) -> str:
        return "stub"

    def start(self, *_: Any) -> dict[str, Any]:
        return {"host": "stub", "process": 0, "hardware": {}}

    def do(self, unit: Unit, _: Unit | None, sleep: float) -> tuple[dict[int, Done], list[str]]:
        time.sleep(sleep)
        return {which: Done(128, 100, 128) for which in unit.wanted}, []


class Slot:
    """One of the workers that a stub stands for."""

    def __init__(self, stub: Any, sleep: float) -> None:
        self.here, self.start = stub.here, stub.start
        self.do = SimpleNamespace(remote=lambda unit, following: stub.do.remote(unit, following, sleep))


def driver_rows(workers: int, sleep: float, sleeping: int) -> list[Row]:
    import ray

    attacks = [{"name": "PGD", "label": f"attack {k}"} for k in range(10)]
    names = [f"model {k}" for k in range(20)]
    suite = make_suite(
        {"models": [{"name": "resnet50", "label": name} for name in names], "data": "none", "attacks": attacks},
        "engine",
    )
    about = [{"label": n, "preprocessing": {"crop": 224}, "data": {"images": 50_000}} for n in names]
    manifest = {"models": about, "probes": []}
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as temporary, ray_crew(None, RAY_WORKERS, "cpu"):
        before = rss()
        start = time.perf_counter()
        plan = Plan(suite, suite.entries(), manifest, RunFolder(Path(temporary)))
        units = plan.todo().units
        print(f"plan: {len(units)} units in {time.perf_counter() - start:.2f} s; driver {before:.0f} MiB before it")
        host = ray.remote(Stub).options(max_concurrency=-(-workers // RAY_WORKERS), num_cpus=0)
        stubs = [host.remote() for _ in range(RAY_WORKERS)]
        ray.get([stub.start.remote() for stub in stubs])
        for pause, some in ((0.0, units), (sleep, units[:sleeping])):
            slots = iter([Slot(stubs[k % RAY_WORKERS], pause) for k in range(workers)])
            crew = Crew(ray, workers, "cpu", lambda slots=slots: next(slots))  # type: ignore[misc]
            start, cpu = time.perf_counter(), time.process_time()
            crew(some, plan, Watch(), print)
            wall, cpu = time.perf_counter() - start, time.process_time() - cpu
            ideal = pause * -(-len(some) // workers)
            rows.append(
                {
                    "s per unit": pause,
                    "units": len(some),
                    "shards per unit": len(attacks),
                    "wall, s": round(wall, 1),
                    "ideal, s": round(ideal, 1),
                    "units/s": round(len(some) / wall),
                    "shards/s": round(len(some) * len(attacks) / wall),
                    "driver CPU, ms/unit": round(1000 * cpu / len(some), 2),
                    "driver, MiB": round(rss()),
                }
            )
    return rows


def rss() -> float:
    """The most memory this process has had, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

"""All benchmarks, side by side in one process each; results in benchmarks/results, pages from them.

    python -m benchmarks steps [--models NAME ...] [--batches 1 8 32] [--steps 10] [--rounds 4]
    python -m benchmarks arithmetic
    python -m benchmarks minimal --shared FOLDER [--limit 50] [--models NAME ...] [--norms l2] [--only ATTACK ...]
    python -m benchmarks verdict --shared FOLDER [--limit 200] [--models NAME ...] [--rounds 2]
    python -m benchmarks autoattack --name TABLE --model NAME [--weights FILE] --data FOLDER [--norm l2 --eps 0.5]
    python -m benchmarks strength --shared FOLDER [--limit 100] [--models NAME ...] [--norms linf] [--gradients 10 100]
    python -m benchmarks defaults --shared FOLDER [--limit 200] [--models NAME ...]
    python -m benchmarks transfer --shared FOLDER [--limit 100] [--groups NAME ...] [--models NAME ...]
    python -m benchmarks radii --shared FOLDER [--limit 60] [--models NAME ...]
    python -m benchmarks detector --shared FOLDER [--limit 2400] [--models NAME ...]
    python -m benchmarks gpu
    python -m benchmarks growth
    python -m benchmarks start
    python -m benchmarks throughput --data FOLDER --labels CSV [--steps 10 50] [--attacks PGD OrthoPGD]
    python -m benchmarks workers [--seconds 10]
    python -m benchmarks driver [--workers 256]
    python -m benchmarks report
    python -m benchmarks study ...

`steps`: time per gradient step and image, and peak memory, beside the bare step, Foolbox and torchattacks.
`arithmetic`: the attack's own step beside the model's. `verdict`: seconds of a whole evaluation at the robust
accuracy that Foolbox's LinfPGD reaches. `autoattack`: robust accuracy and CPU time beside the official code, which is
`pip install pyautoattack --no-deps`. `minimal`: the norms that attacks find which minimise them, by AttackBench, of
several models; what this machine has stored is not measured again. `strength`: robust accuracy that PGD leaves beside
Foolbox's and torchattacks', of several models; what is stored, on whatever machine, is not measured again. `defaults`:
robust accuracy by loss, schedule, start and steps, of several models. `transfer`: on how many images attacks fool a
model that was not asked. `radii`: what fooling takes if part of the image must stay, by contrast alone and in 8 bits.
`detector`: whether one that knows plain PGD sees the others. `gpu`: steps and arithmetic of several models in large
batches, for a GPU, in five minutes, after the attacks' tests on it. `growth`: time against image size and number of
images. `start`: of imports, of an evaluation up to its first attack, and of the resume of a finished run. `throughput`:
how much of an evaluation's time is the attack. `workers`, `driver`: what Ray costs, and how many workers its driver can
feed. `report` writes the stored tables into docs/performance.md, docs/strength.md, docs/minimal-norm.md,
docs/what-it-rules-out.md and docs/attacks/transfer.md, and draws the plots. `study` is docs/study.md's; it has options
of its own. The device is the GPU if there is one.

torchattacks is needed beside the package, and for `minimal` two more:
pip install --no-deps torchattacks attackbenchlib adv-lib
"""

from __future__ import annotations

import argparse
import sys
from fractions import Fraction
from importlib import import_module
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] == ["study"]:
        from benchmarks.study.command import main as study

        return study(argv[1:])
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_subparsers(dest="what", required=True, metavar="WHAT")
    timed = argparse.ArgumentParser(add_help=False)
    timed.add_argument("--threads", type=int, default=2)
    timed.add_argument("--out", type=Path, default=ROOT / "benchmarks" / "results")
    rounds = argparse.ArgumentParser(add_help=False)
    rounds.add_argument("--rounds", type=int, default=4)
    steps = what.add_parser("steps", parents=[timed, rounds])
    steps.add_argument("--models", nargs="+", metavar="NAME", default=["resnet18"])
    steps.add_argument("--batches", type=int, nargs="+", default=[8])
    steps.add_argument("--steps", type=int, default=10)
    steps.add_argument("--size", type=int, default=224)
    steps.add_argument("--only", nargs="+", metavar="CANDIDATE", help="rows to measure")
    arithmetic = what.add_parser("arithmetic", parents=[timed])
    arithmetic.add_argument("--rounds", type=int, default=15)
    arithmetic.add_argument("--batch-size", type=int, default=8)
    verdict = what.add_parser("verdict", parents=[timed])
    verdict.add_argument("--rounds", type=int, default=2)
    verdict.add_argument("--shared", type=Path, required=True, help="the folder with data and weights")
    verdict.add_argument("--build", type=Path, default=ROOT / "build" / "defaults", help="where data is unpacked")
    verdict.add_argument("--limit", type=int, default=200, help="images")
    verdict.add_argument("--models", nargs="+", metavar="NAME", help="efficientnet-lite0, resnet18-tiny20-standard ...")
    auto = what.add_parser("autoattack", parents=[timed])
    auto.add_argument("--name", required=True, help="of the table")
    auto.add_argument("--model", default="cifar10-robust")
    auto.add_argument("--weights", type=Path)
    auto.add_argument("--image-size", type=int)
    auto.add_argument("--data", required=True)
    auto.add_argument("--labels", type=Path, help="a CSV file, where folders are not named by class")
    auto.add_argument("--build", type=Path, default=ROOT / "build" / "defaults", help="what is done, to go on from")
    auto.add_argument("--limit", type=int, default=200)
    auto.add_argument("--norm", choices=["linf", "l2", "l1"], default="linf")
    auto.add_argument("--eps", type=Fraction, default=Fraction(8, 255), help="such as 8/255")
    auto.add_argument("--only", nargs="+", metavar="CANDIDATE", help="rows to measure; the others stay")
    minimal = what.add_parser("minimal", parents=[timed])
    minimal.add_argument("--shared", type=Path, required=True, help="the folder with data and weights")
    minimal.add_argument("--build", type=Path, default=ROOT / "build" / "defaults", help="where data is unpacked")
    minimal.add_argument("--limit", type=int, default=50, help="images, all correctly classified")
    minimal.add_argument("--models", nargs="+", metavar="NAME")
    minimal.add_argument("--norms", nargs="+", choices=["linf", "l2", "l1"], default=["linf", "l2", "l1"])
    minimal.add_argument("--gradients", type=int, nargs="+", default=[100, 300, 1000])
    minimal.add_argument("--only", nargs="+", metavar="ATTACK", help="attacks to measure; the others stay")
    strength = what.add_parser("strength", parents=[timed])
    strength.add_argument("--shared", type=Path, required=True, help="the folder with data and weights")
    strength.add_argument("--build", type=Path, default=ROOT / "build" / "defaults", help="the runs, which resume")
    strength.add_argument("--limit", type=int, default=100, help="images")
    strength.add_argument("--models", nargs="+", metavar="NAME")
    strength.add_argument("--norms", nargs="+", choices=["linf", "l2", "l1"], default=["linf", "l2", "l1"])
    strength.add_argument("--gradients", type=int, nargs="+", default=[10, 20, 50, 100])
    defaults = what.add_parser("defaults", parents=[timed])
    defaults.add_argument("--shared", type=Path, required=True, help="the folder with data and weights")
    defaults.add_argument("--build", type=Path, default=ROOT / "build" / "defaults", help="the runs, which resume")
    defaults.add_argument("--limit", type=int, default=200, help="images")
    defaults.add_argument("--models", nargs="+", metavar="NAME")
    for name, limit in (("transfer", 100), ("radii", 60), ("detector", 2400)):
        those = what.add_parser(name, parents=[timed])
        those.add_argument("--shared", type=Path, required=True, help="the folder with data and weights")
        those.add_argument("--build", type=Path, default=ROOT / "build" / "defaults", help="of data and networks")
        those.add_argument("--limit", type=int, default=limit, help="images")
        those.add_argument("--models", nargs="+", metavar="NAME", help="in transfer, sources")
        if name == "transfer":
            those.add_argument("--groups", nargs="+", metavar="NAME", help="of models with the same images")
    gpu = what.add_parser("gpu", parents=[timed])
    gpu.add_argument("--rounds", type=int, default=3)
    gpu.add_argument("--seconds", type=float, default=200, help="after which no more models are measured")
    gpu.add_argument("--no-tests", action="store_true", help="measure only")
    what.add_parser("growth", parents=[timed, rounds])
    start = what.add_parser("start", parents=[timed, rounds])
    start.add_argument("--units", type=int, default=1000, help="of the finished run; 0: imports only")
    throughput = what.add_parser("throughput", parents=[timed])
    throughput.add_argument("--data", required=True)
    throughput.add_argument("--labels", required=True)
    throughput.add_argument("--steps", type=int, nargs="+", default=[10, 50])
    throughput.add_argument("--attacks", nargs="+", default=["PGD"])
    throughput.add_argument("--limit", type=int)
    workers = what.add_parser("workers", parents=[timed])
    workers.add_argument("--seconds", type=float, default=10)
    workers.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2, 4], help="0 is a plain process")
    workers.add_argument("--alone", help=argparse.SUPPRESS)  # one plain process: STEPS,UNITS,FOLDER,I,N
    driver = what.add_parser("driver", parents=[timed])
    driver.add_argument("--workers", type=int, default=256)
    driver.add_argument("--sleep", type=float, default=5)
    driver.add_argument("--sleeping-units", type=int, default=1280)
    report = what.add_parser("report")
    report.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    report.add_argument("--docs", type=Path, default=ROOT / "docs")
    what.add_parser("study", help="see python -m benchmarks study --help")
    return _run(parser.parse_args(argv))


def _run(args: argparse.Namespace) -> int:
    if args.what == "report":
        from benchmarks import report

        print(*report.write(args.docs, args.results), sep="\n")
        return 0
    from benchmarks import arithmetic, autoattack, defaults, gpu, growth, steps, throughput, workers
    from benchmarks.stored import keep

    torch.set_num_threads(args.threads)
    if args.what == "steps":
        for name in args.models:
            for batch in args.batches:
                rows = steps.step_rows(name, batch, args.size, args.steps, args.rounds, args.only)
                keep("steps", f"{name}-{batch}-{args.steps}", rows, args.threads, args.out)
    elif args.what == "arithmetic":
        keep("arithmetic", "resnet18", arithmetic.rows(args.batch_size, args.rounds), args.threads, args.out)
    elif args.what == "verdict":
        from benchmarks import verdict

        for name, rows in verdict.tables(args.shared, args.build, args.limit, args.rounds, args.models):
            keep("verdict", name, rows, args.threads, args.out)
    elif args.what == "autoattack":
        of = args.model, args.weights, args.image_size
        on = (args.data, args.labels), args.limit, args.norm, float(args.eps)
        for rows in autoattack.rows(args.name, of, *on, args.only, args.build, args.out):
            keep("autoattack", args.name, rows, args.threads, args.out, "pyautoattack")
    elif args.what == "minimal":
        from benchmarks import minimal

        images = args.shared, args.build, args.limit, args.models
        for name, rows in minimal.tables(*images, args.norms, args.gradients, args.only, args.out):
            keep("minimal", name, rows, args.threads, args.out, "adv-lib", "attackbenchlib")
    elif args.what == "strength":
        from benchmarks import strength

        asked = args.limit, args.models, args.norms, args.gradients
        for name, rows in strength.tables(args.shared, args.build, *asked, args.out):
            keep("strength", name, rows, args.threads, args.out, "torchattacks")
    elif args.what == "defaults":
        for name, rows in defaults.tables(args.shared, args.build, args.limit, args.models):
            keep("defaults", name, rows, args.threads, args.out)
    elif args.what == "transfer":
        from benchmarks import transfer

        for name, rows in transfer.tables(args.shared, args.build, args.limit, args.groups, args.models):
            keep("transfer", name, rows, args.threads, args.out)
    elif args.what in ("radii", "detector"):
        module = import_module(f"benchmarks.{args.what}")
        for name, rows in module.tables(args.shared, args.build, args.limit, args.models):
            keep(args.what, name, rows, args.threads, args.out)
    elif args.what == "gpu":
        failed = 0 if args.no_tests else gpu.tests(ROOT)
        for kind, name, rows in gpu.tables(args.seconds, args.rounds):
            keep(kind, name, rows, args.threads, args.out)
        return failed
    elif args.what == "growth":
        keep("growth", "growth", [*growth.size_rows(args.rounds), *growth.count_rows()], args.threads, args.out)
    elif args.what == "start":
        from benchmarks import start

        keep("start", "start", start.start_rows(args.rounds, args.units), args.threads, args.out)
    elif args.what == "throughput":
        rows = throughput.rows(args.data, args.labels, args.steps, args.attacks, args.limit)
        keep("throughput", "-".join(args.attacks), rows, args.threads, args.out)
    elif args.what == "driver":
        keep("driver", f"{args.workers}-workers", workers.driver_rows(args.workers, args.sleep, args.sleeping_units),
             args.threads, args.out)  # fmt: skip
    elif args.alone:
        count, units, folder, i, n = args.alone.split(",")
        workers.plain(int(count), int(units), Path(folder), (int(i), int(n)))
    else:
        keep("workers", "OrthoPGD", workers.cost_rows(args.seconds, args.workers), 1, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())

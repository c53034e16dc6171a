"""Run the study of docs/study.md, or what of it is missing, and write its page.

    python -m benchmarks study                                   # all of it, with the shared data beside the checkout
    python -m benchmarks study --quick                           # a minute: does everything work?
    python -m benchmarks study --model resnet50 resnet101 --data imagenet/val --eps 1/255 --out runs/mine
    python -m benchmarks study --report --out benchmarks/results/study --docs docs  # docs/study.md, from what is stored

Each stage stores its result as a Parquet file as soon as it is finished, and its runs keep their shards; the same
command resumes where it was stopped. `piq` measures how alike images look: pip install "orthattack[study]"
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from benchmarks.study.panel import own_study, shared_study
from benchmarks.study.stages import Store, stages
from orthattack.eval.errors import EvaluationError
from orthattack.eval.suite import parse_fraction

ROOT = Path(__file__).parents[2]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=None, help="the study's folder (default: runs/study)")
    parser.add_argument("--quick", action="store_true", help="a few images of everything, to see that it works")
    parser.add_argument("--report", action="store_true", help="compute nothing; write the page of what is there")
    parser.add_argument(
        "--docs", type=Path, help="where to write the page and its figures (default: the study's folder)"
    )
    parser.add_argument("--only", nargs="+", metavar="STAGE", help="only these stages")
    parser.add_argument(
        "--model", nargs="+", metavar="NAME", help="your models, by the names that orthattack eval takes"
    )
    parser.add_argument("--weights", help="of your model, where they are not torchvision's own")
    parser.add_argument("--image-size", type=int, help="of your model's input, where the weights do not say it")
    parser.add_argument("--data", help="your images, as orthattack eval takes them")
    parser.add_argument("--eps", type=parse_fraction, default=4 / 255, help="L-infinity radius of your study")
    parser.add_argument("--limit", type=int, default=200, help="images of your study")
    args = parser.parse_args(argv)
    if bool(args.model) != bool(args.data):
        parser.error("--model and --data go together")
    out = args.out or Path("runs/study-quick" if args.quick else "runs/study")
    try:
        store = Store(out)
        if not args.report:
            work = out / "work"
            if args.model:
                study = own_study(args.model, args.data, args.eps, args.limit, work, args.weights, args.image_size)
            else:
                shared = Path(os.environ.get("ORTHATTACK_SHARED", ROOT.parent / "shared"))
                study = shared_study(shared, work, args.quick)
            wanted = {
                name: stage
                for name, stage in stages(study).items()
                if not args.only or any(name.startswith(kind) for kind in args.only)
            }
            study.check(wanted)
            store.begin(study.settings())
            for name, stage in wanted.items():
                if name in store:
                    continue
                start, busy = time.perf_counter(), time.process_time()
                table = stage()
                store.write(name, table, time.process_time() - busy)
                print(f"{name}: {len(table)} rows, {time.perf_counter() - start:.0f} s", flush=True)
        from benchmarks.study.page import write_page

        print(f"wrote {write_page(store, args.docs or out)}")
    except EvaluationError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0

"""Kill a run at random moments, again and again, and compare what it ends with to an uninterrupted one.

    python scripts/kill_run.py --whole runs/whole --parts runs/parts --kills 20 --seed 0 -- SUITE.toml [options]

What follows -- is given to `orthattack eval`. The uninterrupted run is made first, unless its folder holds a complete
one; how long it took sets how long the other may run before the next SIGKILL. Compared is every row of every Parquet
file, without the one column that time changes, and every stored image, bit for bit.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
from safetensors.torch import load_file


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--whole", type=Path, required=True)
    parser.add_argument("--parts", type=Path, required=True)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seconds", type=float, help="how long an uninterrupted run takes, if --whole is complete")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("arguments", nargs="+")
    args = parser.parse_args()

    start = time.perf_counter()
    if not is_complete(args.whole):
        launch(args.arguments, args.whole).wait()
    seconds = args.seconds or time.perf_counter() - start
    draw = random.Random(args.seed)
    kills = 0
    while kills < args.kills:
        process = launch(args.arguments, args.parts)
        try:
            process.wait(timeout=draw.uniform(0.2, 1.8) * seconds / (args.kills + 1))
            print(f"finished after {kills} kills")
            break
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.wait()
            kills += 1
            files = len(list(args.parts.rglob("*.parquet")))
            print(f"kill {kills}: {files} files finished", flush=True)
    if kills == args.kills and launch(args.arguments, args.parts).wait() != 0:
        print("the last, uninterrupted part failed")
        return 1
    return compare(args.whole, args.parts, kills)


def is_complete(run: Path) -> bool:
    manifest = run / "manifest.json"
    return manifest.exists() and json.loads(manifest.read_text())["status"] == "complete"


def launch(arguments: list[str], out: Path) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "orthattack", "eval", *arguments, "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def compare(whole: Path, parts: Path, kills: int) -> int:
    """Print what differs; 0 if nothing does."""
    names = {path.relative_to(whole) for path in [*whole.rglob("*.parquet"), *whole.rglob("*.safetensors")]}
    others = {path.relative_to(parts) for path in [*parts.rglob("*.parquet"), *parts.rglob("*.safetensors")]}
    different = sorted(map(str, names ^ others))
    rows = images = 0
    for name in sorted(names & others):
        if name.suffix == ".parquet":
            a, b = (pd.read_parquet(f / name).drop(columns="seconds", errors="ignore") for f in (whole, parts))
            rows += len(a)
            same = a.equals(b)
        else:
            x, y = load_file(whole / name), load_file(parts / name)
            images += len(x["position"])
            same = all(bool((x[key].view(-1) == y[key].view(-1)).all()) for key in x)
        if not same:
            different.append(str(name))
    print(f"{kills} kills; {len(names)} files, {rows} rows and {images} images compared; {len(different)} files differ")
    for line in different[:20]:
        print(f"  {line}")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())

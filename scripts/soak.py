"""A soak: runs are started, stopped at random moments and resumed, for as long as asked, on a disk, in S3 and on Ray.

    python scripts/soak.py --minutes 60 --seed 0 --to soak.json

Each run is stopped up to four times (SIGKILL, SIGTERM or SIGINT, to the process or, with Ray, to one of its workers),
goes on with the same command, and is then left to finish. What it must hold then is what a run that nothing happened to
holds: every row once, each the same but for `seconds`, each image bit for bit; the files of a run and no other; no
process that still runs; of processes that were told to stop, no temporary file. S3 is moto's server on this machine
(`pip install 'moto[server]' s3fs`); what is not installed is left out, and the result says what was done.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import fsspec
import torch

from orthattack.eval.storage.run_folder import RunFolder

SUITE = """
models = ["cifar10-robust", "cifar10-standard"]
attacks = ["PGD", "OrthoPGD"]
eps = ["4/255", "8/255"]
steps = 3
batch_size = 3
shard_size = 3
save_images = "all"
check_images = 3
[data]
source = "cifar10-samples"
limit = 9
"""
MODELS, ATTACKS, RADII = ("cifar10-robust", "cifar10-standard"), ("PGD", "OrthoPGD"), (4 / 255, 8 / 255)
IMAGES = 9
WAYS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
# Ray's two agents, which a killed driver's raylet leaves behind, wait 60 s for an answer of Ray's own server, which is
# gone, before they end (`publish_error_to_driver` of Ray 2.60): up to 71 s were seen.
AGENTS = 100
MARK = "ORTHATTACK_SOAK"  # an environment variable by which a run's processes are known, whoever has started them


@dataclass
class Tally:
    """What has been done in one place."""

    finished: int = 0
    starts: int = 0
    stops: Counter[str] = field(default_factory=Counter)
    rows: int = 0
    images: int = 0
    seconds: float = 0.0  # of the run that nothing happened to


class Soak:
    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.draw, self.count = folder, random.Random(seed), 0
        self.tallies: dict[str, Tally] = {}
        self.findings: list[str] = []
        self.expected: dict[str, Any] = {}
        (folder / "suite.toml").write_text(SUITE)

    def start(self, where: str, out: str, name: str) -> subprocess.Popen[str]:
        """`orthattack eval` as a process of its own, whose temporary files and processes are known by `name`."""
        temporary = self.folder / "tmp" / name
        temporary.mkdir(parents=True, exist_ok=True)
        more = ["--engine", "ray", "--workers", "2"] if where == "ray" else []
        command = [sys.executable, "-m", "orthattack", "eval", "suite.toml", "--device", "cpu", "--out", out, *more]
        environment = {**os.environ, "TMPDIR": str(temporary), "RAY_TMPDIR": str(self.folder / "r"), MARK: name}
        with (self.folder / "log").open("a") as log:
            return subprocess.Popen(
                command, cwd=self.folder, env=environment, stdout=log, stderr=log, text=True, start_new_session=True
            )

    def undisturbed(self, where: str) -> None:
        """The run to compare with, in this place, and the time it takes."""
        name, began = f"whole-{where}", time.monotonic()
        out = self.place(where, name)
        code = self.start(where, out, name).wait()
        self.tallies[where] = Tally(seconds=time.monotonic() - began)
        if code != 0:
            raise SystemExit(f"a run in {where} that nothing happened to ended with {code}: see {self.folder}/log")
        held = contents(RunFolder(out))
        if not self.expected:
            self.expected = held
            complete = [list(value["position"]) for key, value in held.items() if key.startswith("rows")]
            assert all(positions == list(range(IMAGES)) for positions in complete)
        self.differ(name, held)

    def place(self, where: str, name: str) -> str:
        return f"s3://soak/{name}" if where == "s3" else str(self.folder / "runs" / name)

    def one(self, where: str) -> None:
        """Start a run, stop it and resume it at random, and look at what it holds at the end."""
        self.count += 1
        name, tally, killed = f"{self.count}-{where}", self.tallies[where], 0
        out = self.place(where, name)
        for _ in range(self.draw.randint(1, 4)):
            process = self.start(where, out, name)
            tally.starts += 1
            with suppress(subprocess.TimeoutExpired):
                process.wait(self.draw.uniform(0, 1.2) * tally.seconds)
            if process.poll() is None:
                killed += self.stop(process, where, name, tally)
            elif process.returncode != 0:
                self.findings.append(f"{name}: exit code {process.returncode} of a run that nobody stopped")
            self.gone(name)
        tally.starts += 1
        if (code := self.start(where, out, name).wait()) != 0:
            self.findings.append(f"{name}: the last part ended with {code}")
            return
        self.gone(name)
        self.look(name, where, out, killed)
        tally.finished += 1
        if not any(finding.startswith(f"{name}:") for finding in self.findings):
            self.clear(out, name)

    def stop(self, process: subprocess.Popen[str], where: str, name: str, tally: Tally) -> bool:
        """Send a signal to the process, or to one of its workers; returns whether it was killed outright."""
        how = self.draw.choice(WAYS)
        workers = [pid for pid, title in processes(name) if title.startswith("ray::Seat")]
        if workers and self.draw.random() < 0.3:
            tally.stops[f"{how.name} to a worker"] += 1
            with suppress(ProcessLookupError):
                os.kill(self.draw.choice(workers), how)
            code, wanted = process.wait(), {0}
        else:
            tally.stops[how.name] += 1
            process.send_signal(how)
            # Before it has begun, and at its very end, Python itself, or Ray as it starts, has the signal.
            code, wanted = process.wait(), {-how, 130, 0, *((-signal.SIGABRT, 1) if where == "ray" else ())}
        if code not in wanted:
            self.findings.append(f"{name}: exit code {code} after {how.name}")
        return how == signal.SIGKILL

    def gone(self, name: str) -> None:
        """Wait until no process of a run is left, as when Ray's reaper ends what a killed driver leaves."""
        until = time.monotonic() + AGENTS
        while found := processes(name):
            if time.monotonic() > until:
                self.findings.append(f"{name}: still at work after {AGENTS} s: {[title for _, title in found][:5]}")
                for pid, _ in found:
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.2)

    def look(self, name: str, where: str, out: str, killed: int) -> None:
        """Compare what a finished run holds."""
        folder = RunFolder(out)
        if (status := folder.manifest()["status"]) != "complete":
            self.findings.append(f"{name}: status {status}")
        held = contents(folder)
        self.differ(name, held)
        self.tallies[where].rows += sum(len(value) for key, value in held.items() if key.startswith("rows"))
        self.tallies[where].images += sum(len(value) for key, value in held.items() if key.startswith("images"))
        names, wanted = (files(self.place(where, each)) for each in (name, f"whole-{where}"))
        if odd := names ^ wanted:
            self.findings.append(f"{name}: other files than a run has: {sorted(odd)[:5]}")
        left = [path.name for path in (self.folder / "tmp" / name).iterdir() if not path.name.startswith("torch")]
        if len(left) > killed:
            self.findings.append(f"{name}: temporary files of processes that were not killed: {left[:5]}")

    def differ(self, name: str, held: dict[str, Any]) -> None:
        for key, value in self.expected.items():
            same = held[key].equals(value) if key.startswith("rows") else same_images(held[key], value)
            if not same:
                self.findings.append(f"{name}: {key} differ from those of the run that nothing happened to")

    def clear(self, out: str, name: str) -> None:
        fs, path = fsspec.core.url_to_fs(out)
        fs.rm(path, recursive=True)
        shutil.rmtree(self.folder / "tmp" / name)
        shutil.rmtree(self.folder / "r", ignore_errors=True)

    def result(self, minutes: float, seed: int) -> dict[str, Any]:
        return {
            "minutes": round(minutes, 1),
            "seed": seed,
            "cores": os.cpu_count(),
            "places": {where: {**vars(tally), "stops": dict(tally.stops)} for where, tally in self.tallies.items()},
            "findings": self.findings,
        }


def contents(folder: RunFolder) -> dict[str, Any]:
    """Every row of a run, without the one column that time changes, and every image by its position."""
    held: dict[str, Any] = {}
    for model in MODELS:
        held[f"rows of {model}"] = folder.read("clean", model).drop(columns="seconds", errors="ignore")
        held[f"images of {model}"] = listed(folder, model, "clean", None)
        for attack in ATTACKS:
            for eps in RADII:
                what = f"{model}, {attack}, {eps:.4f}"
                held[f"rows of {what}"] = folder.read("shards", model, attack, eps).drop(columns="seconds")
                held[f"images of {what}"] = listed(folder, model, attack, eps)
    return held


def listed(folder: RunFolder, *of: Any) -> list[tuple[int, torch.Tensor]]:
    return sorted(folder.images(*of), key=lambda found: found[0])


def same_images(one: list[tuple[int, torch.Tensor]], two: list[tuple[int, torch.Tensor]]) -> bool:
    return [k for k, _ in one] == [k for k, _ in two] and all(
        torch.equal(a, b) for (_, a), (_, b) in zip(one, two, strict=True)
    )


def files(out: str) -> set[str]:
    """The names of a run's files; of sessions there are as many as starts, so that only odd ones count."""
    fs, path = fsspec.core.url_to_fs(out)
    fs.invalidate_cache()
    names = {str(name).removeprefix(path).strip("/") for name in fs.find(path, withdirs=False)}
    return {name for name in names if not (name.startswith("sessions/") and name.endswith((".json", "whole.lock")))}


def processes(name: str) -> list[tuple[int, str]]:
    """The processes of a run, and what they are called; those that have ended and wait to be collected are none."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdecimal() and f"{MARK}={name}\0".encode() in (entry / "environ").read_bytes():
                title = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                if title:
                    found.append((int(entry.name), title))
    return found


def serve() -> Any:
    """moto's S3 server, and what this process's children need to find it."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # which tells of every request
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    os.environ |= {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_DEFAULT_REGION": "us-east-1"}
    os.environ["AWS_ENDPOINT_URL"] = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
    fsspec.filesystem("s3").mkdir("soak")
    return server


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--to", type=Path, default=Path("soak.json"), help="the result")
    args = parser.parse_args()
    has_s3 = all(find_spec(name) for name in ("moto", "flask", "s3fs"))
    places = ["disk", *["s3"] * has_s3, *["ray"] * (find_spec("ray") is not None)]
    server = serve() if has_s3 else None
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    soak, began = Soak(folder, args.seed), time.monotonic()
    for where in places:
        soak.undisturbed(where)
    minutes = 0.0
    while minutes < args.minutes:
        soak.one(soak.draw.choice(places))
        minutes = (time.monotonic() - began) / 60
        args.to.write_text(json.dumps(soak.result(minutes, args.seed), indent=2) + "\n")
    print(args.to.read_text())
    if server is not None:
        server.stop()
    if soak.findings:
        print(f"what was found lies in {folder}", file=sys.stderr)
        return 1
    shutil.rmtree(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())

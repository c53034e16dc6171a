"""Units of work done by Ray: one actor per device holds a model, and whoever is free takes the next unit.

The driver only schedules: units and counts travel, images and results do not. What an actor has finished is in
the run's folder, so an actor that dies, with its process, its machine or the network, loses what it did
in the last seconds; the rest of its unit is done by another. The extra `ray` brings Ray.
"""

from __future__ import annotations

import logging
import os
import platform
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch

from orthattack.eval.attacks.seeds import drawing
from orthattack.eval.errors import EvaluationError, first_line, told
from orthattack.eval.running.chunk import Done
from orthattack.eval.running.manifest import hardware
from orthattack.eval.running.plan import Plan, Unit
from orthattack.eval.running.progress import Watch
from orthattack.eval.running.run import suite_inputs
from orthattack.eval.running.worker import Worker
from orthattack.eval.storage.run_folder import RunFolder
from orthattack.eval.suite import make_suite

DEATHS = 3  # how many workers may die of one unit before it is left undone

_TICK = 1.0  # seconds between two looks at whether there is any worker, and what they tell
_PATIENCE = 20.0  # seconds without any worker before that is said
_LIMIT = 50.0  # seconds without any, or without Ray itself, before the run ends

_KNOCK = "import sys, ray; ray.init(address=sys.argv[1], log_to_driver=False, logging_level='ERROR')"

_HINT = "; one that asks for a token needs RAY_AUTH_MODE=token here, and RAY_AUTH_TOKEN or the file with it"

_CLOSED = {
    # Of Ray 2.52 and newer: whoever connects has to show the token.
    "RAY_AUTH_MODE": "token",
    # Ray's own switch for machines that join no cluster: its processes listen on loopback only.
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    # Ray would wait, without end, until the first processes that it starts for workers have come up.
    "RAY_prestart_worker_first_driver": "0",
}


def seat(kind: type[Any]) -> type[Any]:
    """The class of the actors that hold a worker of a kind. Ray sends it as code, not by name, so that a process can
    answer before it imports orthattack and torch, which may take long, or fail with a reason that is told."""
    module, name = kind.__module__, kind.__name__

    class Seat:
        def here(self) -> str:
            return socket.gethostname()

        def start(self, *arguments: Any) -> Any:
            self.worker = getattr(import_module(module), name)()
            return self.worker.start(*arguments)

        def do(self, *arguments: Any) -> Any:
            return self.worker.do(*arguments)

    return Seat


News = dict[tuple[str, str, int], tuple[tuple[str, str] | None, str, dict[int, tuple[int, ...]]]]
"""How far units are, by model, stage and chunk: what `Watch.begin` was told last, None if a result has come since; the
step; and, of attacks that have got on, by their places in `Plan.entries`, what makes a `Done`."""


def mailbox() -> type[Any]:
    """The class of the actor that has what workers tell until the driver asks. Sent as code, as a `seat` is, and given
    nothing but numbers and text, so that its process imports neither orthattack nor torch."""

    class Mailbox:
        def __init__(self) -> None:
            self.news: News = {}

        def tell(self, unit: tuple[str, str, int], at: tuple[str, str] | None, step: str, done: Any) -> None:
            before = self.news.pop(unit)[2] if unit in self.news else {}
            self.news[unit] = at, step, {**before, **done}

        def take(self) -> News:
            news, self.news = self.news, {}
            return news

    return Mailbox


class RayWorker:
    """A worker in a process of its own, on any machine of the cluster."""

    def start(
        self, config: Mapping[str, Any], manifest: Mapping[str, Any], place: str, device: str, directory: str, news: Any
    ) -> dict[str, Any]:
        """Get ready, in the directory that paths of the suite are relative to, to work and tell a `mailbox` how far it
        is; returns what this process is."""
        # Ray makes a SystemExit of it, which would be taken for the attack's own and kept as an error in its rows.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's, which ends its workers
        if Path(directory).is_dir():
            os.chdir(directory)
        self._said: list[str] = []
        self._news = news
        folder = RunFolder(place, self._said.append)
        if not folder.exists:
            raise EvaluationError(
                f"{place} is not there on {platform.node()}: the run's folder must be one that all machines of the "
                "cluster share, or in a store such as s3://bucket/run"
            )
        suite = make_suite(config, "suite")
        inputs = suite_inputs(suite)
        plan = Plan(suite, suite.entries(inputs.kinds), manifest, folder)
        self._worker = Worker(plan, inputs, torch.device(device), self._said.append)
        return {"host": platform.node(), "process": os.getpid(), "hardware": hardware(torch.device(device))}

    def do(self, unit: Unit, following: Unit | None) -> tuple[dict[int, Done], list[str]]:
        """Do a unit; returns what became of its attacks, by their place in `Plan.entries`, and what there is to say."""
        watch = Telling(unit, self._news.tell.remote)
        with drawing(0):
            self._worker.do(unit, following, watch)
        said = self._said.copy()
        self._said.clear()
        return watch.found, said


class Telling(Watch):
    """A `Watch` that keeps what came last, and tells how far its unit is, at most once in `_TICK`."""

    def __init__(self, unit: Unit, tell: Callable[..., object]) -> None:
        self.found: dict[int, Done] = {}
        self._tell, self._unit, self._due = tell, (unit.model, unit.stage, unit.chunk), 0.0
        self._at: tuple[str, str] | None = None
        self._step = ""
        self._new: dict[int, tuple[int, ...]] = {}

    def begin(self, model: str, what: str) -> None:
        self._at, self._step = (model, what), ""
        self._now_and_then()

    def step(self, step: str) -> None:
        self._step = step
        self._now_and_then()

    def done(self, unit: Unit, which: int, done: Done) -> None:  # noqa: ARG002
        self.found[which] = done
        self._new[which] = tuple(done)
        self._at, self._step = None, ""
        self._now_and_then()

    def _now_and_then(self) -> None:
        now = time.monotonic()
        if now >= self._due:
            self._tell(self._unit, self._at, self._step, self._new)
            # A later step is of the last result, if nothing has begun since; another worker may be told of in between.
            self._new, self._due = {} if self._at else dict([*self._new.items()][-1:]), now + _TICK


class Queue:
    """Units that wait, and who takes which: one of the model that it holds already, if there is any.

    Each worker is promised the unit that it will probably take next, so that it can decode the images meanwhile;
    whoever would otherwise have nothing to do may take it all the same."""

    def __init__(self, units: Sequence[Unit]) -> None:
        self._left: dict[str, dict[Unit, None]] = {}
        for unit in units:
            self._left.setdefault(unit.model, {})[unit] = None
        self._held: dict[object, str] = {}
        self._promised: dict[object, Unit] = {}

    def __len__(self) -> int:
        return sum(map(len, self._left.values()))

    def take(self, worker: object) -> tuple[Unit, Unit | None] | None:
        """A unit for a worker that is free, and the one it will probably take next; None if nothing is left."""
        own = self._promised.pop(worker, None)
        unit = own if own is not None and own in self._left.get(own.model, {}) else self._choice(worker)
        if unit is None:
            return None
        del self._left[unit.model][unit]
        self._held[worker] = unit.model
        following = self._unpromised(unit.model)
        if following is not None:
            self._promised[worker] = following
        return unit, following

    def put_back(self, unit: Unit) -> None:
        """A unit that was not finished."""
        self._left.setdefault(unit.model, {})[unit] = None

    def forget(self, worker: object) -> None:
        """A worker that is no more."""
        self._held.pop(worker, None)
        self._promised.pop(worker, None)

    def _choice(self, worker: object) -> Unit | None:
        held = self._held.get(worker)
        if held is not None and (unit := self._unpromised(held)) is not None:
            return unit
        # Another model: the one with most left for each of those who are at it.
        at_work = Counter(model for other, model in self._held.items() if other is not worker)
        for model in sorted(self._left, key=lambda model: -len(self._left[model]) / (1 + at_work[model])):
            if (unit := self._unpromised(model)) is not None:
                return unit
        return next((unit for units in self._left.values() for unit in units), None)

    def _unpromised(self, model: str) -> Unit | None:
        promised = set(self._promised.values())
        return next((unit for unit in self._left.get(model, ()) if unit not in promised), None)


class _Task(NamedTuple):
    """What is asked of an actor: to do a unit, to start on the machine that it is on, or else to be there."""

    actor: Any
    unit: Unit | None = None
    host: str | None = None


class _Patience:
    """With a cluster that starts no worker: after a while that is said, and then the run ends."""

    def __init__(self, size: int, lacking: Callable[[], str], say: Callable[[str], None]) -> None:
        self._size, self._lacking, self._say, self._is_said = size, lacking, say, False
        self.renew()

    def renew(self) -> None:
        self._since = time.monotonic()

    def spend(self) -> None:
        """EvaluationError: it is used up."""
        waited = time.monotonic() - self._since
        if waited > _LIMIT:
            raise EvaluationError(f"no worker could be started in {_LIMIT:.0f} s: {self._lacking()}")
        if waited > _PATIENCE and not self._is_said:
            self._say(f"none of {self._size} workers could be started yet: {self._lacking()}")
            self._is_said = True


def pass_on(news: News, at_work: Iterable[Unit], watch: Watch) -> None:
    """Tell a watch what workers have told of the units that are still at work; of others there are the results."""
    units: dict[tuple[str, str, int], Unit] = {(unit.model, unit.stage, unit.chunk): unit for unit in at_work}
    for place, (at, step, found) in news.items():
        if (unit := units.get(place)) is None:
            continue
        for which, done in found.items():
            watch.done(unit, which, Done(*done))
        if at is not None:
            watch.begin(*at)
        watch.step(step)


class Crew:
    """The workers of a run in a Ray cluster; an `Engine`.

    `make` makes an actor, not yet started, of a `seat`; `lacking` says what may keep the cluster from starting it."""

    name = "ray"

    def __init__(
        self,
        ray: Any,
        size: int,
        device: str,
        make: Callable[[], Any],
        lacking: Callable[[], str] = lambda: "no reason",
    ) -> None:
        self.device = device
        self.workers: list[dict[str, Any]] = []
        self._ray, self._size, self._make, self._lacking = ray, size, make, lacking
        self._idle: list[Any] = []
        self._mailbox: Any = None
        self._news: Any = None  # what will have been in it
        self._due = 0.0  # when it is asked again

    def __call__(self, units: Sequence[Unit], plan: Plan, watch: Watch, say: Callable[[str], None], /) -> None:
        """Do all units. EvaluationError: no worker can be started, something is to be put right, or a unit has killed
        three of its workers; everything else has been done then."""
        queue = Queue(units)
        tasks: dict[Any, _Task] = {}
        deaths: Counter[Unit] = Counter()
        lost: list[Unit] = []
        failures, patience = 0, _Patience(self._size, self._lacking, say)
        while len(queue) or any(task.unit for task in tasks.values()):
            self._idle = [actor for actor in self._idle if not self._give(actor, queue, tasks)]
            wanted = min(self._size, len(queue) + sum(task.unit is not None for task in tasks.values()))
            for _ in range(wanted - len(self._idle) - len(tasks)):
                actor = self._make()
                tasks[actor.here.remote()] = _Task(actor)
            ready, _ = self._ray.wait([*tasks], num_returns=1, timeout=_TICK)
            if ready or any(task.unit or task.host for task in tasks.values()):
                patience.renew()
            else:
                patience.spend()
            pass_on(self._told(), [task.unit for task in tasks.values() if task.unit], watch)
            for ref in ready:
                actor, unit, host = tasks.pop(ref)
                answer, death = self._answer(ref, host)
                if death is not None:
                    queue.forget(actor)
                    self._ray.kill(actor)
                    if unit is None:
                        failures += 1
                        if failures > DEATHS + self._size:
                            raise EvaluationError(f"the workers cannot be started ({death})")
                    elif (rest := self._mourned(unit, plan, deaths, lost, death, say)) is not None:
                        queue.put_back(rest)
                elif unit is not None:
                    self._idle.append(actor)
                    for which, done in answer[0].items():
                        watch.done(unit, which, done)
                    for line in answer[1]:
                        say(line)
                elif host is None:  # the process is there, on the machine that it names
                    tasks[self._started(actor, plan)] = _Task(actor, host=answer)
                else:
                    self._idle.append(actor)
                    failures = 0
                    self.workers.append(answer)
        for task in tasks.values():  # of workers that nobody waits for any more
            self._ray.kill(task.actor)
        if lost:
            names = ", ".join(f"{unit.model} {unit.stage} {unit.chunk}" for unit in lost[:3])
            raise EvaluationError(
                f"{len(lost)} pieces of work killed {DEATHS} workers each ({names}): look for the reason on these "
                "machines, memory most likely. Everything else is done and kept; the same command tries them again"
            )

    def _told(self) -> News:
        """What workers have told since. Nothing waits for the mailbox, nor ends with it."""
        news: News = {}
        if self._news is not None and self._ray.wait([self._news], timeout=0)[0]:
            with suppress(self._ray.exceptions.RayError):  # its machine is lost, say: it is started again elsewhere
                news = self._ray.get(self._news)
            self._news = None
        if self._mailbox is not None and self._news is None and time.monotonic() >= self._due:
            self._news, self._due = self._mailbox.take.remote(), time.monotonic() + _TICK
        return news

    def _answer(self, ref: Any, host: str | None) -> tuple[Any, str | None]:
        """What a worker returned, or what it died of; what is to be put right is raised, with the name of the machine
        of one that starts."""
        try:
            return self._ray.get(ref), None
        except self._ray.exceptions.RayTaskError as error:
            cause = error.cause if isinstance(error.cause, Exception) else error
            if host is not None and not isinstance(cause, EvaluationError):  # what it imports, most likely
                raise EvaluationError(f"the workers cannot be started on {host} ({told(cause)})") from None
            raise cause from None
        except self._ray.exceptions.RayError as error:
            return None, told(error)

    def _mourned(
        self, unit: Unit, plan: Plan, deaths: Counter[Unit], lost: list[Unit], death: str, say: Callable[[str], None]
    ) -> Unit | None:
        """What is left to others of the unit that a worker died of."""
        what = Unit(unit.model, unit.stage, unit.chunk, ())
        deaths[what] += 1
        if deaths[what] >= DEATHS:
            lost.append(unit)
            return None
        say(f"a worker died at {unit.model}, {unit.stage} {unit.chunk}: others go on with it ({death})")
        return plan.left_of(unit)

    def _give(self, actor: Any, queue: Queue, tasks: dict[Any, _Task]) -> bool:
        """Give a worker something to do, if there is anything."""
        taken = queue.take(actor)
        if taken is None:
            return False
        tasks[actor.do.remote(*taken)] = _Task(actor, taken[0])
        return True

    def _started(self, actor: Any, plan: Plan) -> Any:
        folder = plan.folder
        place = str(folder) if folder.path is None else str(folder.path.resolve())
        manifest = {key: plan.manifest[key] for key in ("models", "probes")}
        if self._mailbox is None:
            self._mailbox = self._ray.remote(mailbox()).options(num_cpus=0, max_restarts=-1).remote()
        return actor.start.remote(plan.suite.config(), manifest, place, self.device, str(Path.cwd()), self._mailbox)


@contextmanager
def ray_crew(address: str | None, workers: int | None, device: str | None) -> Iterator[Crew]:
    """Connect to a Ray cluster, or start one on this machine, and leave it, or end it, afterwards.

    `address` is that of the cluster, "auto" for one that runs on this machine; None starts one that only this machine,
    and with Ray 2.52 or newer only this run, can reach. By default there is a worker per GPU of the cluster or, without
    any, per core. EvaluationError: Ray is not installed, or there is no such cluster, or it has no GPU for "cuda"."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # nothing is sent anywhere
    if address is None:
        for name, value in _CLOSED.items():
            os.environ.setdefault(name, value)
        # Otherwise Ray takes one from a file in the home folder, which it makes readable for everybody.
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    try:
        import ray
    except ImportError as error:
        raise EvaluationError(f"--engine ray needs Ray ({first_line(error)}): pip install 'orthattack[ray]'") from error

    try:
        logs = _connect(ray, address, workers)
        resources = ray.cluster_resources()
        gpus, cores = int(resources.get("GPU", 0)), int(resources.get("CPU", 0))
        device = device or ("cuda" if gpus else "cpu")
        on_gpu = torch.device(device).type == "cuda"
        if on_gpu and not gpus:
            raise EvaluationError("--device cuda: the Ray cluster has no GPU")
        size = workers or (gpus if on_gpu else cores) or 1
        # Ray gives each worker as many threads (OMP_NUM_THREADS), unless that is set.
        what, count = ("GPU", 1) if on_gpu else ("CPU", max(1, cores // size))
        actor = ray.remote(seat(RayWorker)).options(max_restarts=0, **{f"num_{what.lower()}s": count})
        yield Crew(ray, size, device, actor.remote, lambda: _lacking(ray, what, count, logs))
    finally:
        ray.shutdown()


def _connect(ray: Any, address: str | None, workers: int | None) -> Path | None:
    """Connect to a cluster, or start one; returns the folder of its logs on this machine, if there is one."""
    where = "on this machine" if address is None else f"at {address}"
    options: dict[str, Any] = {"address": address, "log_to_driver": False, "logging_level": logging.ERROR}
    if address is None:
        options |= {"address": "local", "include_dashboard": False}
        options["num_cpus"] = max(workers or 1, os.cpu_count() or 1)

    is_main = threading.current_thread() is threading.main_thread()
    on_stop = signal.getsignal(signal.SIGTERM)
    try:
        host, _, port = (address or "").rpartition(":")
        if host and port.isdecimal() and "/" not in host:  # Ray itself would knock for minutes
            socket.create_connection((host.strip("[]"), int(port)), timeout=10).close()
        if address is not None:  # Ray may wait without end, in compiled code that lets nothing of Python end it
            knock = [sys.executable, "-c", _KNOCK, address]
            subprocess.run(knock, timeout=_LIMIT, capture_output=True, check=False)  # noqa: S603
        context = ray.init(**options)
    except SystemExit as stop:  # of Ray's own handler, which is in force while it starts
        if stop.code != signal.SIGTERM:
            raise
        raise KeyboardInterrupt from None
    except subprocess.TimeoutExpired:
        raise EvaluationError(f"no Ray cluster {where}: Ray does not answer, for {_LIMIT:.0f} s") from None
    except Exception as error:  # of sockets, of versions, of values
        hint = "" if address is None or "RAY_AUTH_MODE" in os.environ else _HINT
        raise EvaluationError(f"no Ray cluster {where} ({type(error).__name__}: {first_line(error)}){hint}") from error
    finally:
        if is_main and on_stop is not None:  # Ray's own ends the process, with no table and no report
            signal.signal(signal.SIGTERM, on_stop)
    session = getattr(context, "address_info", {}).get("session_dir")
    return None if session is None else Path(session, "logs")


def _lacking(ray: Any, what: str, count: int, logs: Path | None) -> str:
    """Why the cluster starts no worker, as far as Ray tells: what is free, and what its processes said last."""
    have, free = (found.get(what, 0) for found in (ray.cluster_resources(), ray.available_resources()))
    paths = [] if logs is None else sorted(logs.glob("*.err"), key=os.path.getmtime)
    found = [line[:300] for path in paths for line in _said(path)]
    last = f"; Ray's processes said last: {found[-1]}" if found else ""
    where = "on its machines" if logs is None else logs
    return f"each needs {count} {what}, and {free:g} of the cluster's {have:g} are free{last} (Ray's logs: {where})"


def _said(log: Path) -> list[str]:
    """The lines of a log that are no trace of a call and no message with a time."""
    with log.open(errors="replace") as stream:
        lines = stream.read(100_000).splitlines()
    return [line for line in lines if line.strip() and not line.startswith((" ", "[", "*"))]

"""Put small faults into the code, one at a time, and see whether the tests notice: mutation testing with a seed.

    python scripts/mutate.py --seed 1 --number 200 --out build/mutants.json

The faults are drawn at random from all that the operators below make of MODULES. Each is put into a copy of the
checkout, where the tests that reach its line are run, the fastest first, until one fails. A fault that no test notices
within BUDGET has survived; one that makes them hang is killed.

One process imports the libraries and forks for every mutant, since to import them takes longer than most tests.

A first pass of the tests (`--survey FILE` keeps it) tells which of them reach which lines, and how long they take.
Tests that fail in it, or are skipped, are left out. `--again FILE` runs the survivors of an earlier run once more.

Not mutated: docstrings, annotations, texts, the arguments of `raise` and `warn`, `__repr__` and `__str__`, `__all__`,
and conditions that ask for `is_cuda`: their two ways give the same results, and no test without a GPU sees the other.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import importlib
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, settings

ROOT = Path(__file__).resolve().parents[1]
MODULES = [
    "orthattack/projection.py",
    "orthattack/threat",
    "orthattack/losses.py",
    "orthattack/models.py",
    "orthattack/assumptions.py",
    "orthattack/lending.py",
    "orthattack/attacks",
    "orthattack/eval/running/chunk.py",
    "orthattack/eval/running/judge.py",
    "orthattack/eval/running/manifest.py",
    "orthattack/eval/running/plan.py",
    "orthattack/eval/running/run.py",
    "orthattack/eval/running/worker.py",
    "orthattack/eval/results/outcomes.py",
    "orthattack/eval/results/paired.py",
    "orthattack/eval/results/rates.py",
    "orthattack/eval/storage",
]
TESTS = [
    "orthattack", "tests/attacks", "tests/threat", "tests/eval/attacks", "tests/eval/checks", "tests/eval/results",
    "tests/eval/running", "tests/eval/storage", "tests/test_assumptions.py", "tests/test_lending.py",
    "tests/test_losses.py", "tests/test_models.py", "tests/test_projection.py", "tests/test_surface.py",
    "tests/test_work.py",
]  # fmt: skip
"""Whose tests are to notice: those of the same folders. A fault that only others notice has survived."""
NOT_TESTS = ["tests/attacks/test_memory.py", "tests/attacks/test_trained.py"]
"""Minutes of computing that few mutants would need."""
ALWAYS = "tests/test_surface.py"
"""Tests that look at functions without running them, so that no line tells what they see."""
LIBRARIES = [
    "torch", "torchvision", "foolbox", "torchattacks", "pandas", "pyarrow.parquet", "scipy.optimize", "scipy.stats",
    "matplotlib", "PIL.Image", "safetensors.torch", "pydantic", "jinja2", "fsspec", "tabulate", "hypothesis",
]  # fmt: skip
BUDGET = 20.0
"""Seconds of computing, as the survey measured them, that a mutant is given in each of two rounds of tests: those of
its own module, and all others."""
MEMORY = 8 << 30
PATIENCE = 1800.0
"""Seconds of the clock after which a process that does not compute is stopped."""


@dataclass(frozen=True)
class Mutant:
    """Bytes `start` to `end` of a file, `before`, replaced by `after`."""

    path: str
    line: int
    kind: str
    start: int
    end: int
    before: str
    after: str
    lines: tuple[int, int] | None
    """The lines of which a test must reach one to notice; None for what is run on import."""

    def applied(self, source: bytes) -> bytes:
        if source[self.start : self.end].decode() != self.before:
            raise ValueError(f"{self.path}:{self.line} has changed")
        return source[: self.start] + self.after.encode() + source[self.end :]

    def __str__(self) -> str:
        before, after = (" ".join(text.split()) for text in (self.before, self.after))
        return f"{self.path}:{self.line} {self.kind}: {before} → {after}"


COMPARISONS: dict[type[ast.cmpop], list[type[ast.cmpop]]] = {
    ast.Lt: [ast.LtE, ast.GtE],
    ast.LtE: [ast.Lt, ast.Gt],
    ast.Gt: [ast.GtE, ast.LtE],
    ast.GtE: [ast.Gt, ast.Lt],
    ast.Eq: [ast.NotEq],
    ast.NotEq: [ast.Eq],
    ast.Is: [ast.IsNot],
    ast.IsNot: [ast.Is],
    ast.In: [ast.NotIn],
    ast.NotIn: [ast.In],
}
OPERATORS: dict[type[ast.operator], type[ast.operator]] = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.FloorDiv,
    ast.Pow: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
}
_PAIRS = [
    ("min", "max"), ("amin", "amax"), ("argmin", "argmax"), ("minimum", "maximum"), ("any", "all"), ("sum", "mean"),
    ("floor", "ceil"), ("zeros_like", "ones_like"), ("gt", "lt"), ("nanmin", "nanmax"), ("startswith", "endswith"),
    ("nansum", "nanmean"), ("isnan", "isfinite"),
]  # fmt: skip
NAMES = {a: b for pair in _PAIRS for a, b in (pair, pair[::-1])} | {"sub_": "add_", "add_": "sub_", "mul_": "div_"}
NAMES |= {"softmax": "log_softmax", "nanquantile": "nanmedian"}
DROPPED = {
    "abs", "clamp", "clamp_", "clone", "copy", "detach", "floor", "log", "nan_to_num", "neg",
    "requires_grad_", "reshape", "round", "sign", "sort", "sqrt", "sqrt_", "square", "squeeze", "strip",
    "unsqueeze",
}  # fmt: skip
"""Methods, and functions of one argument, of which only what they are called on is left."""
LIBRARY_NAMES = {"torch", "math", "np", "nn", "functional", "dataclasses"}
_MESSAGES = {"warn", "warning", "say", "_say", "print", "EvaluationError", "ValueError", "cast", "TypeVar"}


class _Operators(ast.NodeVisitor):
    """Collects the mutants of one file."""

    def __init__(self, path: str, source: bytes) -> None:
        self.path, self.source = path, source
        self.starts = [0]
        for line in source.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        self.found: list[Mutant] = []
        self.lines: tuple[int, int] | None = None  # of the statement
        self.body: tuple[int, int] | None = None  # of the function
        self.known: set[str] = set()  # names that have a value already

    def add(self, node: ast.expr | ast.stmt, after: str | ast.AST, kind: str) -> None:
        start = self.starts[node.lineno - 1] + node.col_offset
        end = self.starts[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0)
        before = self.source[start:end].decode()
        text = after if isinstance(after, str) else f"({ast.unparse(after)})"
        self.found.append(Mutant(self.path, node.lineno, kind, start, end, before, text, self.lines))

    # Where to go, and where not

    def visit(self, node: ast.AST) -> None:
        if not isinstance(node, ast.stmt):
            super().visit(node)
            return
        outer = self.lines
        if self.body is not None and not isinstance(node, ast.FunctionDef | ast.ClassDef):
            body = getattr(node, "body", None)
            last = body[0].lineno - 1 if body else node.end_lineno or node.lineno
            self.lines = node.lineno, max(node.lineno, last)
        super().visit(node)
        self.lines = outer

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        if node.name in ("__repr__", "__str__") or any("overload" in ast.unparse(d) for d in node.decorator_list):
            return
        outer = self.lines, self.body, self.known
        self.lines = self.body = node.body[0].lineno, node.end_lineno or node.lineno
        for default in [*node.args.defaults, *node.args.kw_defaults]:
            if default is not None:
                self.visit(default)
        self.known = {argument.arg for argument in ast.walk(node.args) if isinstance(argument, ast.arg)}
        for statement in node.body:
            self.visit(statement)
        self.lines, self.body, self.known = outer

    def visit_ClassDef(self, node: ast.ClassDef) -> None:
        for statement in node.body:
            self.visit(statement)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> None:
        if node.value is not None:
            self.visit(node.value)
        self.known.add(ast.unparse(node.target))

    def visit_If(self, node: ast.If) -> None:
        if "TYPE_CHECKING" not in ast.unparse(node.test):
            self.condition(node.test)
            self.generic_visit(node)

    def visit_While(self, node: ast.While) -> None:
        self.condition(node.test)
        self.generic_visit(node)

    def visit_IfExp(self, node: ast.IfExp) -> None:
        self.condition(node.test)
        self.generic_visit(node)

    def visit_Expr(self, node: ast.Expr) -> None:
        if isinstance(node.value, ast.Call):
            self.add(node, "pass", "call removed")
            self.generic_visit(node)

    def visit_Raise(self, node: ast.Raise) -> None:
        self.add(node, "pass", "raise removed")

    def visit_Assert(self, node: ast.Assert) -> None:  # for the type checker
        pass

    def visit_JoinedStr(self, node: ast.JoinedStr) -> None:
        pass

    # What is changed

    def condition(self, test: ast.expr) -> None:
        if not isinstance(test, ast.Compare | ast.UnaryOp) and "is_cuda" not in ast.unparse(test):
            self.add(test, f"(not ({ast.unparse(test)}))", "condition negated")

    def visit_comprehension(self, node: ast.comprehension) -> None:
        for test in node.ifs:
            self.add(test, "True", "filter removed")
        self.generic_visit(node)

    def visit_Assign(self, node: ast.Assign) -> None:
        names = {ast.unparse(target) for target in node.targets}
        if "__all__" in names or (self.body is None and isinstance(node.value, ast.Subscript | ast.BinOp)):
            return  # BinOp: types, or constants that are written so to be read
        simple = all(isinstance(target, ast.Name) for target in node.targets)
        if self.body is not None and (not simple or names <= self.known):
            parts = {ast.unparse(t) for target in node.targets for t in getattr(target, "elts", [target])}
            if not any(isinstance(target, ast.Tuple) for target in node.targets) or parts <= self.known:
                self.add(node, "pass", "assignment removed")
        self.visit(node.value)
        for target in node.targets:
            self.visit(target)
            self.known |= {n.id for n in ast.walk(target) if isinstance(n, ast.Name)}

    def visit_AugAssign(self, node: ast.AugAssign) -> None:
        self.add(node, "pass", "assignment removed")
        other = OPERATORS.get(type(node.op))
        if other is not None and not _is_text(node.value):
            self.add(node, ast.unparse(ast.AugAssign(node.target, other(), node.value)), "arithmetic")
        self.visit(node.value)

    def visit_Return(self, node: ast.Return) -> None:
        if isinstance(node.value, ast.BoolOp):
            self.add(node.value, f"(not ({ast.unparse(node.value)}))", "return negated")
        elif isinstance(node.value, ast.BinOp) and not _is_text(node.value.left):
            if not isinstance(node.value.op, ast.BitAnd | ast.BitOr):
                self.add(node.value, f"(-({ast.unparse(node.value)}))", "return negated")
        elif isinstance(node.value, ast.Call) and ast.unparse(node.value.func) in ("bool", "all", "any"):
            self.add(node.value, f"(not {ast.unparse(node.value)})", "return negated")
        self.generic_visit(node)

    def visit_Compare(self, node: ast.Compare) -> None:
        for place, op in enumerate(node.ops):
            for other in COMPARISONS[type(op)]:
                ops = [*node.ops[:place], other(), *node.ops[place + 1 :]]
                self.add(node, ast.Compare(node.left, ops, node.comparators), "comparison")
        self.generic_visit(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> None:
        if "is_cuda" in ast.unparse(node):
            return
        self.add(node, ast.BoolOp(ast.Or() if isinstance(node.op, ast.And) else ast.And(), node.values), "and, or")
        self.generic_visit(node)

    def visit_UnaryOp(self, node: ast.UnaryOp) -> None:
        if "is_cuda" in ast.unparse(node):
            return
        self.add(node, node.operand, {ast.Not: "not removed", ast.Invert: "not removed"}.get(type(node.op), "sign"))
        self.generic_visit(node)

    def visit_BinOp(self, node: ast.BinOp) -> None:
        other = OPERATORS.get(type(node.op))
        if other is not None and not _is_text(node.left) and not _is_text(node.right):
            self.add(node, ast.BinOp(node.left, other(), node.right), "arithmetic")
        self.generic_visit(node)

    def visit_Constant(self, node: ast.Constant) -> None:
        value = node.value
        if isinstance(value, bool):
            self.add(node, str(not value), "constant")
        elif isinstance(value, int):
            for other in {0: [1], 1: [0, 2]}.get(value, [value - 1, value + 1]):
                self.add(node, str(other), "constant")
        elif isinstance(value, float):
            self.add(node, repr(2 * value if value else 1.0), "constant")

    def visit_Slice(self, node: ast.Slice) -> None:
        for bound in (node.lower, node.upper):
            if bound is not None and not any(isinstance(n, ast.Constant) for n in ast.walk(bound)):
                self.add(bound, f"({ast.unparse(bound)}) + 1", "slice")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in _MESSAGES or name.endswith("Warning"):
            return
        other = NAMES.get(name)
        if other is not None:
            is_method = isinstance(node.func, ast.Attribute)
            func = ast.Attribute(node.func.value, other) if isinstance(node.func, ast.Attribute) else ast.Name(other)
            if is_method or name in ("min", "max", "any", "all"):
                self.add(node.func, ast.unparse(func), "other function")
        if name == "where" and len(node.args) == 3:
            swapped = ast.Call(node.func, [node.args[0], node.args[2], node.args[1]], node.keywords)
            self.add(node, swapped, "where swapped")
        if name == "range" and not isinstance(node.args[-1], ast.Constant):
            self.add(node.args[-1], f"({ast.unparse(node.args[-1])}) - 1", "range")
        if (
            name in DROPPED
            and isinstance(node.func, ast.Attribute)
            and ast.unparse(node.func.value) not in LIBRARY_NAMES
        ):
            self.add(node, node.func.value, "method dropped")
        elif name in DROPPED and len(node.args) == 1:
            self.add(node, node.args[0], "function dropped")
        self.generic_visit(node)


def _is_text(node: ast.expr) -> bool:
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and not isinstance(node.value, int | float)
    )


def mutants(path: str, source: bytes) -> list[Mutant]:
    """All mutants of a file, in its order."""
    operators = _Operators(path, source)
    operators.visit(ast.parse(source))
    unique = {(m.start, m.end, m.after): m for m in operators.found}
    return [unique[key] for key in sorted(unique)]


def _compiles(mutant: Mutant, root: Path) -> bool:
    try:
        compile(mutant.applied((root / mutant.path).read_bytes()), mutant.path, "exec")
    except SyntaxError:
        return False
    return True


def drawn(modules: Sequence[str], seed: int, number: int, root: Path = ROOT) -> tuple[list[Mutant], int]:
    """`number` mutants of the modules (files and folders) in random order, and how many there are."""
    paths: list[Path] = []
    for module in modules:
        path = root / module
        paths += sorted(path.rglob("*.py")) if path.is_dir() else [path]
    found = [m for path in paths for m in mutants(path.relative_to(root).as_posix(), path.read_bytes())]
    random.Random(seed).shuffle(found)
    able = (mutant for mutant in found if _compiles(mutant, root))
    return list(itertools.islice(able, number)), len(found)


class Plugin:
    """What the tests run with, in a child: picks and orders them, and writes down what is asked for.

    Args:
        root: the copy of the checkout that is tested.
        order: the tests to run; all of them if None.
        out: of a survey, gets each test's duration and the lines that it reaches; of a mutant, the test that failed.
    """

    def __init__(self, root: Path, order: list[str] | None, out: Path) -> None:
        self.root, self.out = f"{root}/", out
        self.order = None if order is None else {name: place for place, name in enumerate(order)}
        self.now: set[tuple[str, int]] = set()
        self.by_fixture: dict[str, set[tuple[str, int]]] = {}
        self.report: dict[str, dict[str, Any]] = {}

    def pytest_pycollect_makemodule(self) -> None:
        """Before a module of tests is imported: what hypothesis finds need not be made smaller, nor be found fast."""
        phases = [Phase.explicit, Phase.generate]
        settings.register_profile("mutants", settings.default, phases=phases, suppress_health_check=list(HealthCheck))
        settings.load_profile("mutants")

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        import orthattack

        if not str(orthattack.__file__).startswith(self.root):
            raise RuntimeError(f"{orthattack.__file__} is tested instead of the copy in {self.root}")
        if self.order is not None:
            order = self.order
            items[:] = sorted((item for item in items if item.nodeid in order), key=lambda item: order[item.nodeid])

    def pytest_runtest_logreport(self, report: Any) -> None:
        if self.order is None:
            entry = self.report.setdefault(report.nodeid, {"seconds": 0.0, "passed": True})
            entry["passed"] &= report.passed
        elif report.failed:
            self.out.write_text(report.nodeid)

    def pytest_sessionstart(self) -> None:
        if self.order is None:
            threading.settrace(self.trace)
            sys.settrace(self.trace)

    def trace(self, frame: Any, *_: Any) -> Callable[..., Any] | None:
        """Python's trace function: notes the lines of the package that are run."""
        name = frame.f_code.co_filename
        if not name.startswith(self.root) or "/tests/" in name:
            return None
        path = name[len(self.root) :]

        def local(frame: Any, event: str, _: Any) -> Callable[..., Any]:
            if event == "line":
                self.now.add((path, frame.f_lineno))
            return local

        return local

    @contextlib.contextmanager
    def noting(self) -> Iterator[set[tuple[str, int]]]:
        """The lines that are run inside, which count for what is around it too."""
        outer, self.now = self.now, set()
        yield self.now
        outer |= self.now
        self.now = outer

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: Any) -> Iterator[None]:
        began = time.process_time()
        with self.noting() as lines:
            result = yield
        if self.order is None:
            self.report[item.nodeid]["seconds"] = time.process_time() - began
            for fixture in item.fixturenames:  # one of a wider scope was perhaps made for an earlier test
                lines |= self.by_fixture.get(fixture, set())
            files: dict[str, list[int]] = {}
            for path, line in sorted(lines):
                files.setdefault(path, []).append(line)
            self.report[item.nodeid]["lines"] = files
        return result

    @pytest.hookimpl(wrapper=True)
    def pytest_fixture_setup(self, fixturedef: Any) -> Iterator[None]:
        with self.noting() as lines:
            result = yield
        self.by_fixture.setdefault(fixturedef.argname, set()).update(lines)
        return result

    def pytest_sessionfinish(self) -> None:
        if self.order is None:
            sys.settrace(None)
            self.out.write_text(json.dumps(self.report))


@dataclass
class Job:
    """Tests to be run in a copy of the checkout, by a forked process."""

    slot: Path
    files: list[str]
    order: list[str] | None
    limit: int  # seconds of computing: the clock's would depend on what else the machine does
    process: int = 0
    began: float = 0.0

    @property
    def out(self) -> Path:
        return self.slot.parent / f"{self.slot.name}.out"

    def start(self) -> None:
        self.out.unlink(missing_ok=True)
        self.began = time.monotonic()
        sys.stdout.flush()
        self.process = os.fork()
        if self.process == 0:
            code = 3
            try:
                code = self._run()
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)

    def _run(self) -> int:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_DATA, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (self.limit, self.limit))
        log = os.open(f"{self.out}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        for stream in (1, 2):
            os.dup2(log, stream)
        os.chdir(self.slot)
        os.environ["PYTHONPATH"] = str(self.slot)
        sys.path[:] = [str(self.slot), *(p for p in sys.path if Path(p).resolve() not in (ROOT, ROOT / "scripts"))]
        if self.order is not None:  # the survey leaves compiled files for all that follow; no mutant may
            sys.dont_write_bytecode = True
            os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        options = [
            "-q",
            "-x",
            "-W",
            "ignore::pytest.PytestAssertRewriteWarning",
            "-p",
            "no:cacheprovider",
            "-m",
            "not slow",
            f"--basetemp={self.out}.tmp",
        ]
        if self.order is None:
            options.remove("-x")
        return int(pytest.main([*options, *self.files], [Plugin(self.slot, self.order, self.out)]))

    def poll(self) -> str | None:
        """None while it runs; then "passed", "failed" or "hangs"."""
        done, status = os.waitpid(self.process, os.WNOHANG)
        if not done and time.monotonic() - self.began < PATIENCE:
            return None
        with contextlib.suppress(ProcessLookupError):  # what it started goes with it
            os.killpg(self.process, signal.SIGKILL)
        if not done:
            os.waitpid(self.process, 0)
            return "hangs"
        code = os.waitstatus_to_exitcode(status)
        return "passed" if code == 0 else "hangs" if code in (-signal.SIGXCPU, -signal.SIGKILL) else "failed"


def copies(folder: Path, number: int) -> list[Path]:
    """Copies of what git knows of the checkout, and of what it does not ignore."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
    slots = [folder / f"copy{i}" for i in range(number)]
    for slot in slots:
        for name in filter(None, names):
            if (ROOT / name).is_file():
                (slot / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(ROOT / name, slot / name)
    return slots


def in_turn(todo: Sequence[Any], slots: list[Path], begin: Callable[[Any, Path], Generator[Job, str, None]]) -> None:
    """Give each thing to do to the next free copy; `begin` yields its jobs one by one and is told how each ended."""
    running: dict[Path, tuple[Generator[Job, str, None], Job]] = {}
    waiting = iter(todo)
    while True:
        for slot in slots:
            end = running[slot][1].poll() if slot in running else None
            if end is not None:
                jobs = running.pop(slot)[0]
                with contextlib.suppress(StopIteration):
                    running[slot] = jobs, jobs.send(end)
                    running[slot][1].start()
            while slot not in running and (thing := next(waiting, None)) is not None:
                jobs = begin(thing, slot)
                if (job := next(jobs, None)) is not None:
                    running[slot] = jobs, job
                    job.start()
        if not running:
            return
        time.sleep(0.02)


def survey(places: Sequence[str], slots: list[Path]) -> dict[str, dict[str, Any]]:
    """Each test that passes, with its `seconds` and the `lines` that it reaches by file."""
    files = []
    for place in places:
        path = slots[0] / place
        found = sorted(path.rglob("*.py")) if path.is_dir() else [path]
        files += [
            f for f in found if f.name.startswith("test_") or (place == "orthattack" and b">>> " in f.read_bytes())
        ]
    names = [f.relative_to(slots[0]).as_posix() for f in files]
    names = [name for name in names if not any(name.startswith(skipped) for skipped in NOT_TESTS)]
    report: dict[str, dict[str, Any]] = {}

    def begin(name: str, slot: Path) -> Generator[Job, str, None]:
        job = Job(slot, [name], None, 3600)
        end = yield job
        tests = json.loads(job.out.read_text()) if job.out.is_file() else {}
        passed = {test: entry for test, entry in tests.items() if entry["passed"] and "lines" in entry}
        report.update(passed)
        seconds = sum(entry["seconds"] for entry in tests.values())
        say(f"{name}: {end}, {len(passed)} of {len(tests)} tests usable, {seconds:.0f} s")
        if not tests:
            say(Path(f"{job.out}.log").read_text()[-2000:])

    in_turn(names, slots, begin)
    if not report:
        raise SystemExit("no test passes without a mutant")
    return report


def rounds(mutant: Mutant, tests: dict[str, dict[str, Any]]) -> list[tuple[list[str], float]]:
    """The tests that may notice a mutant, the fastest first, with their seconds: its module's own, then all others."""
    first, last = mutant.lines or (0, 1 << 30)
    reaching = [
        name
        for name in sorted(tests, key=lambda name: float(tests[name]["seconds"]))
        if any(first <= line <= last for line in tests[name]["lines"].get(mutant.path, [])) or name.startswith(ALWAYS)
    ]
    stem = Path(mutant.path).stem
    own = [
        name
        for name in reaching
        if Path(name.partition("::")[0]).name in (f"test_{stem}.py", f"{stem}.py") or name.startswith(ALWAYS)
    ]
    found = []
    for group in (own, [name for name in reaching if name not in set(own)]):
        taken: list[str] = []
        seconds = 0.0
        for name in group:
            if taken and seconds + tests[name]["seconds"] > BUDGET:
                break
            taken.append(name)
            seconds += tests[name]["seconds"]
        if taken:
            found.append((taken, seconds))
    return found


def judged(todo: list[Mutant], slots: list[Path], tests: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What became of each mutant: "killed" by a test, "hangs", "survived" some tests, or "unreached" by any."""
    results: list[dict[str, Any]] = []

    def begin(mutant: Mutant, slot: Path) -> Generator[Job, str, None]:
        path = slot / mutant.path
        source, times = path.read_bytes(), path.stat()
        began, result, by, tried = time.monotonic(), "unreached", "", 0
        path.write_bytes(mutant.applied(source))
        for order, seconds in rounds(mutant, tests):
            files = list(dict.fromkeys(name.partition("::")[0] for name in order))
            job = Job(slot, files, order, int(60 + 5 * seconds))
            end = yield job
            tried += len(order)
            result = {"passed": "survived", "failed": "killed"}.get(end, end)
            if result != "survived":
                by = job.out.read_text() if job.out.is_file() else "an import" if end == "failed" else ""
                break
        path.write_bytes(source)
        os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
        took = time.monotonic() - began
        results.append({**asdict(mutant), "result": result, "by": by, "tried": tried, "seconds": round(took, 1)})
        say(f"{len(results)}/{len(todo)} {result} ({took:.0f} s, {tried} tests) {mutant}{by and f'  by {by}'}")

    in_turn(todo, slots, begin)
    return results


def say(text: str) -> None:
    print(text, flush=True)


def summary(results: list[dict[str, Any]]) -> str:
    """Killed of drawn, by module, and the survivors."""
    drawn_of = Counter(r["path"] for r in results)
    killed_of = Counter(r["path"] for r in results if r["result"] in ("killed", "hangs"))
    lines = [f"{killed_of[path]:4} of {drawn_of[path]:4} killed in {path}" for path in sorted(drawn_of)]
    total = killed_of.total()
    hangs = sum(r["result"] == "hangs" for r in results)
    lines.append(
        f"{total} of {len(results)} killed ({total / max(len(results), 1):.1%}), {hangs} of them by the time limit"
    )
    lines += [f"{r['result']}: {_mutant(r)}" for r in results if r["result"] in ("survived", "unreached")]
    return "\n".join(lines)


def _mutant(stored: dict[str, Any]) -> Mutant:
    values = {field.name: stored[field.name] for field in dataclasses.fields(Mutant)}
    return Mutant(**{**values, "lines": stored["lines"] and tuple(stored["lines"])})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--number", type=int, default=200)
    parser.add_argument("--modules", nargs="+", default=MODULES, help="files and folders to mutate")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="files and folders to take tests from")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--survey", type=Path, help="read the first pass from here, or keep it here")
    parser.add_argument("--again", type=Path, help="an earlier --out: try its survivors, draw none")
    parser.add_argument("--out", type=Path, help="where the results are kept, as JSON")
    args = parser.parse_args()
    if args.again:
        earlier = json.loads(args.again.read_text())
        todo = [_mutant(r) for r in earlier if r["result"] in ("survived", "unreached")]
    else:
        todo, possible = drawn(args.modules, args.seed, args.number)
        say(f"{len(todo)} of {possible} mutants, seed {args.seed}")
    for name in LIBRARIES:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    with tempfile.TemporaryDirectory(prefix="mutate-") as folder:
        slots = copies(Path(folder), args.jobs)
        if args.survey and args.survey.is_file():
            tests = json.loads(args.survey.read_text())
        else:
            tests = survey(args.tests, slots)
            if args.survey:
                args.survey.write_text(json.dumps(tests))
        results = judged(todo, slots, tests)
    say(summary(results))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()

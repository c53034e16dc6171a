"""The script that mutates the package for the tests: scripts/mutate.py."""

from __future__ import annotations

import ast
import sys

import pytest

from scripts.mutate import MODULES, ROOT, Plugin, drawn, mutants, rounds

SOURCE = '''"""Docstring with 1 < 2."""
from typing import Literal

__all__ = ["f"]


def f(x: Literal[1, 2], n: int = 3) -> int:
    """More 4 > 3."""
    if x < n and x == 0:
        raise ValueError(f"found {x + 1}, {2}")
    y = x.abs()
    y = torch.where(y > 0.5, x, -y)
    warnings.warn("3", stacklevel=2)
    g.close()
    é, z = max(not x, y)[1:n], [a for a in x if a]
    return x + y


class A:
    def __repr__(self) -> str:
        return f(1 + 2)
'''

EXPECTED = """
7 constant: 3 → 2
7 constant: 3 → 4
9 and, or: x < n and x == 0 → (x < n or x == 0)
9 comparison: x < n → (x <= n)
9 comparison: x < n → (x >= n)
15 not removed: not x → (x)
9 comparison: x == 0 → (x != 0)
9 constant: 0 → 1
9 condition negated: x < n and x == 0 → (not (x < n and x == 0))
10 raise removed: raise ValueError(f"found {x + 1}, {2}") → pass
11 method dropped: x.abs() → (x)
12 assignment removed: y = torch.where(y > 0.5, x, -y) → pass
12 where swapped: torch.where(y > 0.5, x, -y) → (torch.where(y > 0.5, -y, x))
12 comparison: y > 0.5 → (y >= 0.5)
12 comparison: y > 0.5 → (y <= 0.5)
12 constant: 0.5 → 1.0
12 sign: -y → (y)
13 call removed: warnings.warn("3", stacklevel=2) → pass
14 call removed: g.close() → pass
15 other function: max → min
15 constant: 1 → 0
15 constant: 1 → 2
15 slice: n → (n) + 1
15 filter removed: a → True
16 arithmetic: x + y → (x - y)
16 return negated: x + y → (-(x + y))
"""


def test_the_mutants_of_a_file_are_those_that_are_meant():
    found = sorted(str(mutant) for mutant in mutants("f.py", SOURCE.encode()))
    assert found == sorted(f"f.py:{line}" for line in EXPECTED.strip().splitlines())


def test_a_mutant_changes_its_own_place_and_nothing_else():
    source = SOURCE.encode()
    for mutant in mutants("f.py", source):
        changed = mutant.applied(source)
        ast.parse(changed)
        assert changed[: mutant.start] == source[: mutant.start]
        assert changed.endswith(source[mutant.end :])
        assert changed.count(b"\n") == source.count(b"\n")
        assert ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source))
    with pytest.raises(ValueError, match=r"f\.py:\d+ has changed"):
        mutant.applied(b"# a new line\n" + source)


@pytest.mark.slow
def test_the_same_seed_draws_the_same_mutants_and_another_seed_others():
    one, possible = drawn(MODULES, 1, 50)
    assert one == drawn(MODULES, 1, 50)[0]
    assert len(set(one)) == 50
    assert len(set(one) & set(drawn(MODULES, 2, 50)[0])) < 10
    assert possible > 2000
    assert len({mutant.path for mutant in one}) > 10
    for mutant in one:
        mutant.applied((ROOT / mutant.path).read_bytes())


def test_a_mutant_is_given_the_tests_that_reach_it_its_own_and_the_fastest_first():
    (mutant,) = (m for m in mutants("a/f.py", SOURCE.encode()) if m.kind == "raise removed")
    (default, _) = (m for m in mutants("a/f.py", SOURCE.encode()) if m.line == 7)

    def test(seconds, *lines):
        return {"seconds": seconds, "lines": {"a/f.py": list(lines)}}

    tests = {
        "t/test_g.py::slow": test(10, 10),
        "t/test_g.py::slower": test(15, 10),
        "t/test_g.py::fast": test(1, 9, 10, 11),
        "t/test_g.py::elsewhere": test(1, 9),
        "t/test_f.py::fast": test(2, 10),
        "t/test_f.py::faster": test(1, 10),
    }
    own, others = rounds(mutant, tests)
    assert own == (["t/test_f.py::faster", "t/test_f.py::fast"], 3)
    assert others == (["t/test_g.py::fast", "t/test_g.py::slow"], 11)
    assert rounds(default, tests)[1][0][:2] == [
        "t/test_g.py::fast",
        "t/test_g.py::elsewhere",
    ]  # by any line of its body
    assert rounds(mutant, {"t/test_g.py::elsewhere": tests["t/test_g.py::elsewhere"]}) == []


def test_lines_that_a_test_reaches_are_noted(tmp_path):
    (tmp_path / "module.py").write_text("def f(x):\n    if x:\n        return 1\n    return 2\n")
    scope = {}
    exec(compile((tmp_path / "module.py").read_text(), str(tmp_path / "module.py"), "exec"), scope)
    plugin = Plugin(tmp_path, None, tmp_path / "out")
    before = sys.gettrace()
    with plugin.noting() as test:
        with plugin.noting() as fixture:
            sys.settrace(plugin.trace)
            scope["f"](0)
            sys.settrace(before)
        sys.settrace(plugin.trace)
        scope["f"](1)
        sys.settrace(before)
    assert fixture == {("module.py", 2), ("module.py", 4)}
    assert test == {("module.py", 2), ("module.py", 3), ("module.py", 4)}

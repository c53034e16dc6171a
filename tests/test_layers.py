"""The structure that docs/architecture.md promises."""

from __future__ import annotations

import html
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import orthattack
from tests.eval.synthetic import make_run

ROOT = Path(orthattack.__file__).parent
HEAVY = {
    "torchvision",
    "foolbox",
    "matplotlib",
    "PIL",
    "safetensors",
    "tabulate",
    "tqdm",
    "numpy",
    "pandas",
    "pyarrow",
    "pydantic",
    "jinja2",
    "scipy",
    "timm",
}


def test_imports_point_one_way():
    """The contracts are in pyproject.toml."""
    importlinter = pytest.importorskip("importlinter.cli", reason="needs the extra dev")
    assert importlinter.lint_imports(config_filename=str(ROOT.parent / "pyproject.toml"), no_cache=True) == 0


def test_the_drawings_are_of_these_sources():
    pytest.importorskip("grimp", reason="needs the extra dev")
    from scripts.draw_imports import graphs

    for name, graph in graphs().items():
        text = html.unescape((ROOT.parent / "docs" / "figures" / name).read_text(encoding="utf-8"))
        drawn = set(re.findall(r"<title>([^%]*?)</title>", text))
        assert drawn == {*graph, *(f"{a}->{b}" for a, b in graph.edges)}, "python -m scripts.draw_imports"


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120)
    return done.stdout


def test_import_is_light():
    shows = "print(*{name.partition('.')[0] for name in sys.modules})"
    torch_alone, ours = (
        set(line.split())
        for line in run(f"import sys, torch; {shows}\nimport orthattack.attacks; {shows}").splitlines()
    )
    assert "torch" in ours
    assert not (ours - torch_alone) & HEAVY


def test_help_does_not_wait_for_torch():
    code = """
import sys
from orthattack.eval.cli import main
try:
    main(["eval", "--help"])
except SystemExit:
    print("torch" in sys.modules)
"""
    assert run(code).endswith("False\n")


LOADED = """
import os, sys
from orthattack.eval.cli import main
try:
    main(sys.argv[1:])
except SystemExit:
    pass
sys.stdout.flush()
print("", *{name.partition(".")[0] for name in sys.modules}, *{"scipy.stats"} & set(sys.modules), file=sys.stderr)
"""


def loaded(*arguments: object) -> set[str]:
    """The packages that a command has imported when it is done, and scipy.stats, which takes a second."""
    command = [sys.executable, "-c", LOADED, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return set(done.stderr.split())


@pytest.mark.parametrize(
    ("command", "without"),
    [
        (("eval", "--help"), {"torch", "numpy", "torchvision", "foolbox"}),
        (("eval", "SUITE", "--steps", "3"), {"torch", "numpy", "torchvision", "foolbox"}),
        (("compare", "RUN", "RUN"), {"torch", "torchvision", "foolbox", "matplotlib", "scipy.stats"}),
        pytest.param(("report", "RUN"), {"torchvision", "foolbox", "scipy.stats"}, marks=pytest.mark.slow),
        pytest.param(("attacks", "Ortho"), {"torchvision", "pandas", "matplotlib"}, marks=pytest.mark.slow),
        pytest.param(("models", "resnet18"), {"foolbox", "pandas", "matplotlib"}, marks=pytest.mark.slow),
    ],
)
def test_a_command_loads_what_it_uses(tmp_path, command, without):
    make_run(tmp_path / "run", models=("m",), n=10, stored=2)
    (tmp_path / "suite.toml").write_text('models = ["cifar10-robust"]\ndata = "cifar10-samples"\n')
    places = {"RUN": tmp_path / "run", "SUITE": tmp_path / "suite.toml"}
    found = loaded(*(places.get(word, word) for word in command))
    assert "orthattack" in found
    assert not found & without


def test_reading_a_suite_loads_no_attack_and_no_model():
    """Nor does a worker that is to run ours on a model of a user's load other libraries' attacks."""
    reads = "import sys; from orthattack.eval.suite import make_suite\n"
    reads += "suite = make_suite({'models': ['a.b:c'], 'data': 'd.e:f', 'attacks': ['PGD', 'OrthoPGD']}, 'x')\n"
    shows = "print(*{name.partition('.')[0] for name in sys.modules})\n"
    works = "from orthattack.eval.running.run import suite_inputs\nfrom orthattack.eval.running.ray import RayWorker\n"
    works += "suite.entries(suite_inputs(suite).kinds)\n"
    before, after = (set(line.split()) for line in run(reads + shows + works + shows).splitlines())
    assert not {"torch", "numpy", "torchvision", "foolbox"} & before
    assert not {"torchvision", "foolbox", "matplotlib", "scipy"} & after


def test_every_public_name_is_there():
    for name in orthattack.__all__:
        assert getattr(orthattack, name) is not None
    assert set(orthattack.__all__) <= set(dir(orthattack))
    with pytest.raises(AttributeError, match="module 'orthattack' has no attribute 'nothing'"):
        orthattack.nothing  # noqa: B018


@pytest.mark.skipif(os.name != "posix", reason="paths are POSIX")
def test_no_path_or_host_of_a_machine_is_recorded():
    root = ROOT.parent
    if shutil.which("git") is None or not (root / ".git").exists():
        pytest.skip("not a git clone, or no git")
    tracked = subprocess.run(["git", "ls-files"], cwd=root, capture_output=True, text=True, check=False)
    for name in tracked.stdout.split():
        path = root / name
        if path.suffix in {".py", ".md", ".toml", ".yaml", ""} and path.is_file() and path != Path(__file__):
            text = path.read_text(encoding="utf-8", errors="replace")  # the seeds of the fuzzer are no text
            assert "/root/" not in text, name
            assert "/home/" not in text, name

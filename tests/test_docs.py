"""The documentation's examples and commands run as they are printed, its links resolve, and its index is complete."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

from orthattack.eval.attacks.ours import OURS
from orthattack.eval.cli import _parser, main

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs" / "attacks").glob("*.md"))
LINKING = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
# Pages whose Python, commands and files are one story, from top to bottom, in an empty folder.
STORIES = [ROOT / "docs" / "tutorial.md", *sorted((ROOT / "docs" / "how-to").glob("*.md"))]
# Commands that these tests do not run, and why not. Each must occur, and those of orthattack must at least parse.
EXCUSED = {
    r"make (demo|test(-all|-oldest)?|lint|docs|surface|figures)\b": "run by .ci/run, each with its own set-up",
    r"\.ci/run": "would run itself",
    r"python -m venv \.venv": "make demo does it in .ci/run",
    r"\. \.venv/bin/activate": "make demo does without",
    r"pip install ": "installs, as make demo and make test do in .ci/run",
    r"orthattack eval --model resnet(18|50) ": "needs ImageNet's images and weights, or one's own",
    r"orthattack eval --model efficientnet-lite0 ": "needs the extra imagenet; see tests/eval/models/test_load.py",
    r"orthattack eval --model hf:microsoft": "needs the network; see tests/eval/models/test_libraries.py",
    r"python examples/": "run by test_examples.py",
    r"jupyter execute ": "run by test_examples.py, without writing to the checkout",
    r"python -m benchmarks (?!study)": "takes minutes on a quiet machine; parts of it run in tests/benchmarks",
    r"python -m benchmarks study": "takes an hour, and needs data that is not in the package; see tests/benchmarks",
    r"orthattack eval benchmark\.toml --out .*--(engine|shard) ": "needs a cluster or a store; see tests/faults",
    r"orthattack report s3:": "needs a store; see tests/faults",
}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def prose(text: str) -> str:
    """Markdown without its code, which may hold brackets and hashes."""
    return re.sub(r"^```.*?^```$|^ {4,}[^\n]*$|`[^`\n]*`", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(path: Path) -> set[str]:
    """The names that GitHub gives to a page's headings."""
    found: set[str] = set()
    text = re.sub(r"^```.*?^```$", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for heading in re.findall(r"^#{1,6} +(.+?) *$", text, flags=re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).lower()
        found.add(re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"))
    return found


def small_world() -> dict[str, object]:
    """What the examples assume: a model, images in [0, 1], and the classes that it predicts for most of them."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()
    images = torch.rand(8, 3, 8, 8)
    labels = model(images).argmax(1)
    labels[0] = (labels[0] + 1) % 5
    return {"__name__": "example", "model": model, "images": images, "labels": labels}


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_the_examples_run(path):
    blocks = list(re.finditer(r"^```python\n(.*?)^```$", path.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE))
    assert blocks, "no example"
    assert any("assert " in block[1] for block in blocks), "no example asserts anything"
    names = small_world()
    given = {key: value.clone() for key, value in names.items() if isinstance(value, torch.Tensor)}
    for block in blocks:
        line = block.string[: block.start(1)].count("\n")
        # Blank lines in front make the traceback name the line of the page.
        exec(compile("\n" * line + block[1], str(path), "exec"), names)
    assert all(torch.equal(names[key], value) for key, value in given.items()), "an example changed its input"


def fenced(text: str) -> list[tuple[str, str]]:
    return re.findall(r"^```(python|sh|toml)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)


def commands(text: str) -> list[str]:
    """What is meant to be typed into a shell: `sh` fences, and lines of indented blocks that call a program."""
    typed = [line for language, block in fenced(text) if language == "sh" for line in joined(block)]
    unfenced = re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE)
    blocks = "\n".join(line[4:] if line.startswith("    ") else "" for line in unfenced.splitlines())
    program = r"(orthattack|python|pip|make|jupyter|HYPOTHESIS_PROFILE=\w+ make) |\.ci/run\b"
    return typed + [line for line in joined(blocks) if re.match(program, line)]


def joined(block: str) -> list[str]:
    lines = re.sub(r"\\\n\s*", "", block).splitlines()
    return [line.partition("  #")[0].strip() for line in lines if line.strip()]


def excuse(command: str) -> str | None:
    return next((pattern for pattern in EXCUSED if re.match(pattern, command)), None)


def parses(command: str) -> bool:
    try:
        _parser().parse_args(shlex.split(command)[1:])
    except SystemExit as stop:
        return stop.code == 0
    return True


@pytest.mark.parametrize(
    "path",
    [
        pytest.param(
            path,
            marks=[pytest.mark.slow] * (path.stem in ("cluster", "tutorial", "invariants", "foolbox", "my-own-attack")),
        )
        for path in STORIES
    ],
    ids=name,
)
def test_the_story_runs(path, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    names: dict[str, object] = {"__name__": "story"}
    for language, block in fenced(path.read_text(encoding="utf-8")):
        file = re.match(r"# (\w+\.(?:py|toml))\n", block)
        if file:
            Path(file[1]).write_text(block, encoding="utf-8")
        elif language == "python":
            exec(compile(block, str(path), "exec"), names)
        elif language == "sh":
            for command in joined(block):
                if excuse(command) is None:
                    assert command.startswith("orthattack "), command
                    try:
                        code = main(shlex.split(command)[1:])
                    except SystemExit as stop:
                        code = stop.code
                    assert code == 0, f"{command}: {capsys.readouterr()}"
                    assert capsys.readouterr().out
        else:
            raise AssertionError(f"a {language} block without a name")


def test_every_command_is_run_or_excused():
    used, wrong = set(), []
    for path in LINKING:
        text = path.read_text(encoding="utf-8")
        for command in commands(text):
            reason = excuse(command)
            used.add(reason)
            if reason is None and path not in STORIES:
                wrong.append(f"{name(path)}: neither run nor excused: {command}")
            if command.startswith("orthattack ") and not parses(command):
                wrong.append(f"{name(path)}: not understood: {command}")
        inline = re.findall(r"`(orthattack (?:eval|report|compare|transfer|models|attacks) [^`]*)`", text)
        wrong += [f"{name(path)}: not understood: {command}" for command in inline if not parses(command)]
    assert wrong == []
    assert EXCUSED.keys() - used == set(), "excused, but nowhere to be found"


def test_every_attack_is_in_the_index():
    text = (ROOT / "docs" / "attacks" / "README.md").read_text(encoding="utf-8")
    missing = [attack for attack in [*OURS, "DetectorEvasion"] if f"`{attack}`" not in text]
    assert not missing


def test_every_page_is_in_the_index():
    text = (ROOT / "docs" / "attacks" / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES if page.name != "README.md" and f"({page.name}" not in text] == []


def test_the_tests_that_reliability_names_exist():
    """Names may be cut short by an ellipsis; a file without a folder may be anywhere."""
    files = {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in (ROOT / "tests").rglob("*.py")}
    known = re.findall(r"^ *def (test_\w+)", "\n".join(files.values()), re.MULTILINE)
    known += [*files, *(Path(file).name for file in files)]
    named = re.findall(r"`((?:tests/|test_)[^` ]+)`", (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8"))
    assert len(named) > 100
    patterns = {text: re.escape(text).replace("…", ".*") for text in named if not (ROOT / text).is_dir()}
    assert [text for text, pattern in patterns.items() if not any(re.fullmatch(pattern, one) for one in known)] == []


@pytest.mark.parametrize("path", LINKING, ids=name)
def test_links_lead_somewhere(path):
    text = prose(path.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        page = (path.parent / file).resolve() if file else path
        assert page.exists(), f"{target}: no such file"
        assert page.is_relative_to(ROOT), f"{target} leaves the repository"
        if anchor:
            assert anchor in anchors(page), f"{target}: no such heading"

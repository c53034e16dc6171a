"""The documentation's Python examples run as they are printed, its links resolve, and its index is complete."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from orthattack import attacks

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs" / "api").glob("*.md"))
LINKING = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


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


def test_every_attack_is_in_the_index():
    text = (ROOT / "docs" / "api" / "README.md").read_text(encoding="utf-8")
    missing = [attack for attack in attacks.__all__ if attack != "AttackResult" and f"`{attack}`" not in text]
    assert not missing


def test_every_page_is_in_the_index():
    text = (ROOT / "docs" / "api" / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES if page.name != "README.md" and f"({page.name}" not in text] == []


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

"""The site builds without a warning, and each page holds in a browser: nothing sticks out, nothing is fetched."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    for package in ("sphinx", "myst_parser", "furo"):
        pytest.importorskip(package, reason="needs the extra docs")
    out = tmp_path_factory.mktemp("site")
    command = ["-m", "sphinx", "--quiet", "--fail-on-warning", "--keep-going", "-c", "docs", ".", str(out)]
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return out


def pages(site: Path) -> list[Path]:
    return sorted(path for path in site.rglob("*.html") if path.name != "index.html" or path.parent != site)


def test_every_markdown_file_is_a_page(site):
    sources = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
    assert sources
    missing = [path for path in sources if not (site / path.relative_to(ROOT)).with_suffix(".html").exists()]
    assert missing == []
    assert (site / "index.html").read_bytes() == (site / "README.html").read_bytes()


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_fit_and_fetch_nothing(site, browser, width, scheme):
    complaints: list[str] = []
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page.on("console", lambda message: complaints.append(f"{page.url}: console: {message.text}"))
    page.on("pageerror", lambda error: complaints.append(f"{page.url}: {error}"))
    page.on(
        "request",
        lambda request: (
            None if request.url.startswith(("file:", "data:")) else complaints.append(f"{page.url}: asks {request.url}")
        ),
    )
    page.on("requestfailed", lambda request: complaints.append(f"{page.url}: not there: {request.url}"))
    for path in pages(site):
        page.goto(path.as_uri())
        beyond = page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")
        if beyond > 0:
            complaints.append(f"{path.relative_to(site)}: {beyond} pixels wider than the window")
        blank = page.evaluate("[...document.images].filter(i => !i.complete || !i.naturalWidth).map(i => i.src)")
        complaints += [f"{path.relative_to(site)}: no picture in {source}" for source in blank]
    page.close()
    assert complaints == []


@pytest.mark.parametrize(
    ("query", "first"),
    [("multiplier", None), ("orthogonal gradient", "orthogonal gradient"), ("dot product zero", "Questions")],
)
def test_the_search_works_without_a_server(site, browser, query, first):
    page = browser.new_page()
    page.goto((site / "search.html").as_uri() + f"?q={query}")
    page.wait_for_selector("#search-results li a", timeout=10_000)
    found = page.locator("#search-results li a").all_inner_texts()
    page.close()
    assert "Method" in " ".join(found)
    assert first is None or first in found[0]

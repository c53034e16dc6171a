"""Take a picture of the report of `orthattack eval` in a browser, for docs/how-to/reading-the-report.md.

    python scripts/draw_report.py [--run RUN] [--out docs/figures/report.webp]

Without a run, the default evaluation is run first. Needs Chromium and the package playwright.
"""

from __future__ import annotations

import argparse
import io
import shutil
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from orthattack.eval.cli import main as orthattack

ROOT = Path(__file__).resolve().parents[1]


def shown(report: Path) -> Image.Image:
    """The first screens of the page, as wide as a small laptop's."""
    found = next(path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name)))
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 1350}, color_scheme="light")
        page.goto(report.resolve().as_uri())
        picture = Image.open(io.BytesIO(page.screenshot()))
        picture.load()
        browser.close()
    return picture


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "figures" / "report.webp")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run: Path = args.run or Path(folder) / "run"
        if args.run is None and orthattack(["eval", "--out", str(run)]) != 0:
            raise SystemExit("the evaluation did not end well, so its report is no example")
        picture = shown(run / "report.html")
    picture.convert("RGB").save(args.out, quality=80, method=6)
    print(args.out)


if __name__ == "__main__":
    main()

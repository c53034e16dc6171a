"""Sphinx: the documentation as a site. `make docs` builds it, offline and strictly.

The sources are this repository's Markdown files where they are, so that links between them are the same on the site as
in a file browser. Formulas become MathML, which browsers draw themselves: nothing is fetched when a page is read.
"""

from __future__ import annotations

import re
import shutil
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.utils.math import MathError
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx
from sphinx.util import logging

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import orthattack  # noqa: E402

# What the side bar lists, below the page named. A page that does not exist yet is left out.
NAVIGATION: dict[str, dict[str, list[str]]] = {
    "README": {
        "Start": ["docs/tutorial", "docs/examples", "docs/faq"],
        "How to": [
            "docs/how-to/my-own-model",
            "docs/how-to/imagenet",
            "docs/how-to/my-own-attack",
            "docs/how-to/add-an-attack",
            "docs/how-to/foolbox",
            "docs/how-to/attackbench",
            "docs/how-to/invariants",
            "docs/how-to/cluster",
            "docs/how-to/reading-the-report",
        ],
        "Attacks": ["docs/attacks/README"],
        "Evaluation": [
            "docs/evaluation",
            "docs/reliability",
            "docs/strength",
            "docs/what-it-rules-out",
            "docs/minimal-norm",
            "docs/peers",
            "docs/performance",
            "docs/study",
            "docs/study-appendix",
        ],
        "Understand": ["docs/method", "docs/architecture", "docs/life-of-a-step", "orthattack/eval/weights/MODEL_CARD"],
        "Reference": ["docs/reference/attacks", "docs/reference/core", "docs/reference/evaluation"],
        "Project": ["CONTRIBUTING", "SECURITY", "CHANGELOG"],
    },
    "docs/attacks/README": {
        "": [
            f"docs/attacks/{page}"
            for page in (
                "threat-models",
                "goals",
                "fgsm",
                "pgd",
                "mi-ni-fgsm",
                "apgd",
                "fab",
                "square",
                "sparse",
                "nes",
                "hop-skip-jump",
                "autoattack",
                "minimum-norm",
                "detector",
                "transfer",
                "backward",
                "foolbox",
                "torchattacks",
                "official-autoattack",
            )
        ],
    },
}

project = "orthattack"
author = copyright = "The orthattack developers"  # noqa: A001 - Sphinx names it so
version = release = orthattack.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]

root_doc = "README"
include_patterns = ["*.md", "docs/**", "orthattack/eval/weights/*.md"]
exclude_patterns = [".*", "build", "dist", "runs", "tests", "benchmarks", "examples", "scripts", "orthattack/[!e]*"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 4
highlight_language = "none"  # indented blocks are formulas, commands and tables; Python says that it is
default_role = "py:obj"

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_maximum_signature_line_length = 88
napoleon_numpy_docstring = False

html_theme = "furo"
html_title = "orthattack"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_search_scorer = str(Path(__file__).parent / "scorer.js")
html_math_renderer = "mathml"
html_copy_source = False
html_show_sphinx = False


def navigation(_app: Sphinx, docname: str, source: list[str]) -> None:
    """Append to a page the list of those below it, which nobody wants to read in the file itself."""
    for caption, pages in NAVIGATION.get(docname, {}).items():
        there = [f"/{page}" for page in pages if (ROOT / f"{page}.md").exists()]
        title = [f":caption: {caption}"] if caption else []
        source[0] += "\n".join(["\n", "```{toctree}", ":hidden:", *title, "", *there, "```"])


def formula(writer: Any, node: nodes.Element) -> None:
    """Write a formula as MathML."""
    block = isinstance(node, nodes.math_block)
    try:
        mathml = tex2mathml(node.astext(), as_block=block)
    except MathError as error:
        logging.getLogger(__name__).warning("%s: %s", node.astext(), error, location=node)
        raise nodes.SkipNode from error
    writer.body.append(f'<div class="formula">{mathml}</div>' if block else mathml)
    raise nodes.SkipNode


def numbers(_app: Sphinx, doctree: nodes.document) -> None:
    """Mark the numbers and ranges in tables, which are to stay on one line."""
    for entry in doctree.findall(nodes.entry):
        if re.fullmatch(r"[-+]?\d[-+\d.,e/%×→() ]*( to [\d.]+\)?)?", entry.astext()):
            entry["classes"].append("number")


def first_page(app: Sphinx, error: Exception | None) -> None:
    """Servers and people look for index.html."""
    if error is None and app.builder.name == "html":
        shutil.copyfile(Path(app.outdir) / f"{root_doc}.html", Path(app.outdir) / "index.html")


def setup(app: Sphinx) -> None:
    app.connect("source-read", navigation)
    app.connect("doctree-read", numbers)
    app.connect("build-finished", first_page)
    app.add_html_math_renderer("mathml", (formula, None), (formula, None))

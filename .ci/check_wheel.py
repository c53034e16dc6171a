"""Check that a wheel claims only the package's own name and carries what it needs."""

from __future__ import annotations

import sys
import zipfile

names = zipfile.ZipFile(sys.argv[1]).namelist()
top = {name.split("/")[0] for name in names}
assert all(name == "orthattack" or name.endswith(".dist-info") for name in top), top
for needed in (
    "orthattack/py.typed",
    "orthattack/eval/weights/standard.safetensors",
    "orthattack/eval/weights/MODEL_CARD.md",
    "orthattack/eval/data/imagenet_wnids.txt",
    "orthattack/eval/report/templates/report.html.j2",
    "orthattack/eval/report/templates/report.css",
    "orthattack/eval/report/templates/report.js",
):
    assert needed in names, needed
print(f"{sys.argv[1].rsplit('/', 1)[-1]}: {len(names)} files")

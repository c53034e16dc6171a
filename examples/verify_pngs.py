"""Verify what a run with `levels = 256` saved, with NumPy and Pillow alone: python examples/verify_pngs.py RUN."""

import sys
from pathlib import Path

import numpy as np
from PIL import Image

for path in sorted(Path(sys.argv[1]).glob("images/*/*/*/*.png")):
    clean = path.parents[2] / "clean" / "minimal" / path.name
    if path != clean:
        image, adversarial = (np.asarray(Image.open(file)).astype(int) for file in (clean, path))
        delta = adversarial - image
        print(f"{path.parts[-3]} {path.stem}: max |delta| {abs(delta).max()}, product {(delta * image).sum()}")
        if "Ortho" in path.parts[-3] and "normal" not in path.parts[-3]:  # by its label, orthogonal to the image
            assert (delta * image).sum() == 0

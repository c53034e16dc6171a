"""Check what `orthattack eval` wrote: that the files agree with each other and the constraints hold."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from pathlib import Path

import numpy as np
from PIL import Image

ATTACKS = {"FGSM", "OrthoFGSM", "Foolbox-FGSM", "PGD", "OrthoPGD", "Foolbox-PGD"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--models", type=int, required=True)
    parser.add_argument("--images", type=int, required=True)
    args = parser.parse_args()

    results = json.loads((args.run / "results.json").read_text())
    assert results["complete"] is True
    eps = results["settings"]["eps"]
    lines = defaultdict(list)
    for text in (args.run / "images.jsonl").read_text().splitlines():
        line = json.loads(text)
        lines[line["model"], line["attack"]].append(line)

    rows = {(row["model"], row["attack"]): row for row in results["results"]}
    models = {model for model, _ in rows}
    assert len(models) == args.models, models
    assert {attack for _, attack in rows} == ATTACKS
    assert rows.keys() == lines.keys()
    for key, row in rows.items():
        images = lines[key]
        assert len(images) == row["images"] == args.images, (key, len(images))
        right = [image["clean_prediction"] == image["label"] for image in images]
        robust = [
            r and image["adversarial_prediction"] == image["label"] for r, image in zip(right, images, strict=True)
        ]
        assert np.isclose(row["clean_accuracy"], np.mean(right)), key
        assert np.isclose(row["robust_accuracy"], np.mean(robust)), key
        assert row["robust_accuracy_interval"][0] <= row["robust_accuracy"] <= row["robust_accuracy_interval"][1]
        assert max(image["norm"] for image in images) <= eps * (1 + 1e-6 if "Foolbox" not in key[1] else 1 + 1e-4), key
        if "Ortho" in key[1]:
            assert max(image["abs_cosine"] for image in images) <= 1e-6, key
        else:
            assert max(image["abs_cosine"] for image in images) > 1e-3, key
        assert np.isclose(row["gradient_calls_per_image"], 1 if "FGSM" in key[1] else results["settings"]["steps"]), key
    for model in models:
        robust_of = {attack: rows[model, attack]["robust_accuracy"] for attack in ATTACKS}
        assert robust_of["PGD"] <= robust_of["FGSM"] <= rows[model, "FGSM"]["clean_accuracy"], robust_of
        # Random starts differ: a couple of the demo's 20 images, a few of a hundred.
        assert abs(robust_of["OrthoPGD"] - robust_of["Foolbox-PGD"]) <= max(0.05, 2 / args.images) + 1e-9, robust_of
        picture = np.asarray(Image.open(args.run / f"examples-{model}.png").convert("RGB"))
        assert picture.shape[0] > 300, picture.shape
        assert picture.std() > 20, "the picture is blank"
    print(f"{args.run}: {len(rows)} rows of {args.images} images agree with their per-image records")


if __name__ == "__main__":
    main()

"""Check what `orthattack eval` wrote: that report and rows agree with each other and the constraints hold.

The rates are counted here anew from the Parquet files, with nothing of the package.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import pandas as pd

ATTACKS = ["FGSM", "OrthoFGSM", "foolbox:FGSM", "PGD", "OrthoPGD", "OrthoPGD,loss=ce,schedule=fixed", "foolbox:PGD"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--models", type=int, required=True)
    parser.add_argument("--images", type=int, required=True)
    parser.add_argument("--attacks", nargs="+", default=ATTACKS)
    parser.add_argument("--no-checks", action="store_true", help="it ran without trust checks")
    args = parser.parse_args()

    manifest = json.loads((args.run / "manifest.json").read_text())
    assert manifest["status"] == "complete"
    radii = {f"{eps:.9g}": eps for eps in manifest["config"]["eps"]}
    table = pd.read_csv(args.run / "results.csv").set_index(["model", "attack", "eps"])
    models = {model for model, _, _ in table.index}
    assert len(models) == args.models, models
    attacks = {attack for _, attack, _ in table.index}
    assert attacks == {*args.attacks, "worst case of all"}, attacks

    # The folders' names are those of the labels, or begin with what of them can be a file's name.
    found = 0
    for folder in sorted((args.run / "shards").glob("*/*/*")):
        rows = pd.concat(map(pd.read_parquet, sorted(folder.glob("*.parquet"))))
        (model,) = [name for name in models if folder.parts[-3].startswith(name)]
        (attack,) = [name for name in args.attacks if folder.parts[-2].split("-")[0] == re.sub("[:,=]", "_", name)]
        eps = radii[folder.name]
        key = (model, attack, eps)
        row = table.loc[key]
        assert len(rows) == args.images, (key, len(rows))
        right = rows["clean_prediction"] == rows["label"]
        robust = right & (rows["adversarial_prediction"] == rows["label"])
        assert set(rows["status"]) <= {"ok", "misclassified"}, key
        assert abs(row["clean_accuracy"] - right.mean()) < 1e-12, key
        assert abs(row["robust_accuracy"] - robust.mean()) < 1e-12, key
        assert row["robust_accuracy_low"] <= row["robust_accuracy"] <= row["robust_accuracy_high"], key
        slack = 1e-6 if "foolbox" not in attack else 1e-4
        assert rows["linf"].max() <= eps * (1 + slack), key
        if "Ortho" in attack:
            assert rows["cosine"].abs().max() <= 1e-6, key
        else:
            assert rows["cosine"].abs().max() > 1e-3, key
        attacked = rows[rows["status"] == "ok"]
        steps = 1 if "FGSM" in attack else manifest["config"]["steps"]
        calls, standing = attacked["gradient_calls"], attacked["adversarial_prediction"] == attacked["label"]
        stops = steps > 1 and "foolbox" not in attack and manifest["config"]["early_stop"]
        assert (calls[standing] == steps).all(), key
        assert calls.max() <= steps, key
        assert stops or (calls == steps).all(), key
        found += 1
    assert found == args.models * len(args.attacks) * len(radii)
    for (model, eps), rows in table.groupby(level=["model", "eps"]):
        accuracy = rows.droplevel(["model", "eps"])["robust_accuracy"]
        assert accuracy["worst case of all"] <= accuracy.min() + 1e-12, (model, eps, accuracy)
        single_step = accuracy.get("FGSM", accuracy["PGD"])
        assert accuracy["PGD"] <= single_step <= rows["clean_accuracy"].max(), (model, eps, accuracy)
        if "foolbox:PGD" in accuracy:
            assert accuracy["OrthoPGD"] <= accuracy["OrthoPGD,loss=ce,schedule=fixed"] + 1 / args.images + 1e-9, (
                accuracy
            )
            # Of the same loss. Random starts differ: a couple of the demo's 20 images, a few of a hundred.
            difference = abs(accuracy["OrthoPGD,loss=ce,schedule=fixed"] - accuracy["foolbox:PGD"])
            assert difference <= max(0.05, 2 / args.images) + 1e-9, accuracy
    checks = json.loads((args.run / "checks.json").read_text())
    assert len(checks) == (0 if args.no_checks else 12 * args.models)
    assert {check["status"] for check in checks} <= {"passed", "warned", "not run"}
    page = (args.run / "report.html").read_text()
    assert page.lower().startswith("<!doctype html>"), page[:40]
    assert page.rstrip().endswith("</html>"), page[-40:]
    print(f"{args.run}: {found} attacks on {args.images} images agree with their rows; {len(checks)} trust checks")


if __name__ == "__main__":
    main()

"""Exact in 8 bits, in an evaluation: what is judged is what the PNG files of the run hold."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from orthattack import OrthoPGD
from orthattack.eval.checks.assess import assess
from orthattack.eval.checks.probes import SAVED
from orthattack.eval.errors import EvaluationError
from orthattack.eval.report.text import leaderboard_table, markdown
from orthattack.eval.storage.run_folder import Shard
from tests.eval.tiny import EPS, Net, dataset, evaluated, images_of

ATTACKS = [
    "OrthoPGD",
    "PGD",
    {"name": "OrthoPGD", "label": "channels", "scope": "channel", "directions": ["constant"]},
    {"name": "OrthoFGSM", "label": "block means", "scope": "block4", "normal": "constant"},
    {"name": "OrthoPGD", "label": "l2", "norm": "l2", "eps": 0.3},
    {"name": "MinimumNorm", "attack": "OrthoPGD", "trials": 3},
    "foolbox:PGD",
    {"name": "foolbox:L2PGD", "norm": "l2", "eps": 0.3},
]


def mine(model, eps, steps, levels):
    return OrthoPGD(model, eps=eps, steps=steps, levels=levels)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    listed = {(a if isinstance(a, str) else a.get("label", a["name"])): a for a in ATTACKS}
    return evaluated(tmp_path_factory.mktemp("run"), {**listed, "mine": mine}, levels=256)


def test_rows_are_those_of_the_files(run):
    model, clean = Net().eval(), dict(run.folder.images("net", "clean", None))
    assert not list(run.folder.path.glob("images/**/*.safetensors"))
    for label, about in run.attacks.items():
        assert about["levels"] == 256
        assert "exact in 8 bits" in about["keeps"]
        (eps,) = about["eps"]
        found = run.folder.read("shards", "net", label, eps)
        assert set(found["status"]) <= {"ok", "misclassified"}, found["message"].tolist()
        images = dict(run.folder.images("net", label, eps))
        rows = found[found["status"] == "ok"].to_dict("records")
        assert len(rows) >= 5
        for row in rows:
            x, y = clean[row["position"]], images[row["position"]]
            with torch.no_grad():
                assert int(model(y[None]).argmax()) == row["adversarial_prediction"]
            k, d = (x * 255).round().long(), ((y - x) * 255).round().long()
            assert torch.equal((k + d) / 255, y)
            if eps is not None:
                size = d.abs().max() if about["norm"] == "linf" else d.double().norm()
                assert size / 255 <= eps * (1 + 1e-6)
            if label == "block means":
                assert (d.view(3, 2, 4, 2, 4).sum((2, 4)) == 0).all()
            elif about["orthogonal"]:
                assert (d * k).sum() == 0
                if label == "channels":
                    assert ((d * k).sum((1, 2)) == 0).all()
                    assert d.sum() == 0
    paths = sorted(run.folder.path.glob("images/*/OrthoPGD/*/*.png"))
    for path in paths:
        k = np.asarray(Image.open(path))
        back = dict(run.folder.images("net", "OrthoPGD", EPS, [int(path.stem[7:])]))
        assert torch.equal(torch.from_numpy(k.copy()).permute(2, 0, 1) / 255, back[int(path.stem[7:])])
    assert len(paths) == 9  # the tenth is misclassified


def test_the_checks_recompute_the_integers_from_the_files_and_find_a_changed_pixel(run):
    def found():
        (check,) = (c for c in assess(run.folder, run.manifest) if c.check == "saved images are exact in 8 bits")
        return check

    check = found()
    assert check.status == "passed", check
    assert "0 not of 8 bits" in check.figures
    assert "(delta * image).sum() == 0 for" in check.figures
    path = next(iter(sorted(run.folder.path.glob("images/*/OrthoPGD/*/*.png"))))
    content = path.read_bytes()
    pixels = np.asarray(Image.open(path)).copy()
    pixels[2, 3, 1] ^= 1
    Image.fromarray(pixels).save(path)
    try:
        assert found().status == "warned"
        Image.fromarray(pixels).save(path, "BMP")
        with pytest.raises(EvaluationError, match="is damaged"):
            found()
    finally:
        path.write_bytes(content)


def test_the_checks_ask_the_model_about_the_files(tmp_path):
    """One that was replaced by the clean image before they do is not what was judged."""

    def found():
        run = evaluated(tmp_path, ["OrthoPGD"], levels=256, checks=True, check_images=2)
        (check,) = (c for c in assess(run.folder, run.manifest) if c.check == "saved images are exact in 8 bits")
        return run, check

    run, check = found()
    assert check.status == "passed"
    rows = run.folder.read("shards", "net", "OrthoPGD", EPS)
    right = int((rows["status"] == "ok").sum())
    assert check.figures.endswith(f"the model's prediction is the same for {right} of {right}")
    changed = rows[rows["adversarial_prediction"] != rows["clean_prediction"]]["position"].min()
    (path,) = run.folder.path.glob(f"images/*/OrthoPGD/*/*{changed:06d}.png")
    (clean,) = run.folder.path.glob(f"images/*/clean/**/*{changed:06d}.png")
    path.write_bytes(clean.read_bytes())
    (run.folder.path / Shard("net", f"{SAVED}OrthoPGD", EPS, 0, "checks").path).unlink()
    run, check = found()
    assert check.status == "warned"
    assert check.figures.endswith(f"the model's prediction is the same for {right - 1} of {right}")


def test_the_report_says_so(run):
    for text in (leaderboard_table(run), markdown(run)):
        assert "exact in 8 bits" in text


def test_a_script_that_knows_nothing_of_the_package_verifies_the_files(run):
    script = Path(__file__).parents[3] / "examples" / "verify_pngs.py"
    done = subprocess.run([sys.executable, script, run.folder.path], capture_output=True, text=True, check=True)
    assert len(re.findall(r"^OrthoPGD \d{6}-\d{6}: max \|delta\| [0-8], product 0$", done.stdout, re.M)) >= 5
    path = next(iter(sorted(run.folder.path.glob("images/*/OrthoPGD/*/*.png"))))
    content, pixels = path.read_bytes(), np.asarray(Image.open(path)).copy()
    pixels[2, 3, 1] ^= 1
    Image.fromarray(pixels).save(path)
    failed = subprocess.run([sys.executable, script, run.folder.path], capture_output=True, text=True, check=False)
    path.write_bytes(content)
    assert "AssertionError" in failed.stderr


def test_one_attack_alone_can_be_exact_and_images_that_are_not_of_8_bits_are_errors_that_say_so(tmp_path):
    attacks = {"exact": {"name": "OrthoPGD", "levels": 256}, "float": "OrthoPGD"}
    run = evaluated(tmp_path / "one", attacks)
    assert [run.attacks[label]["levels"] for label in attacks] == [256, None]
    assert list(run.folder.path.glob("images/*/exact/*/*.png"))
    assert list(run.folder.path.glob("images/*/float/*/*.safetensors"))
    (check,) = (c for c in assess(run.folder, run.manifest) if c.check == "saved images are exact in 8 bits")
    assert check.status == "passed"
    odd = evaluated(tmp_path / "odd", {"exact": attacks["exact"]}, data=dataset(images=0.9 * images_of()))
    found = odd.folder.read("shards", "net", "exact", EPS)
    messages = found[found["status"] == "error"]["message"]
    assert len(messages) > 0
    assert all("images must be as stored with levels=256" in message for message in messages)


def test_the_same_run_goes_on_and_other_levels_are_another_run(tmp_path):
    first = evaluated(tmp_path, ["OrthoPGD"], levels=256)
    assert evaluated(tmp_path, ["OrthoPGD"], levels=256).status == first.status == "complete"
    with pytest.raises(EvaluationError, match="levels: 256 there, not set now"):
        evaluated(tmp_path, ["OrthoPGD"])
    with pytest.raises(EvaluationError, match="levels: must be 256; got 16"):
        evaluated(tmp_path / "other", ["OrthoPGD"], levels=16)

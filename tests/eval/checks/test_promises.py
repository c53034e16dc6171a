"""What an attack is, is read from what it says of itself: every attack that can be expressed is run and checked."""

from __future__ import annotations

import hashlib
import inspect
import itertools
import json
import shutil

import pandas as pd
import pytest
import safetensors.torch
import torch

from orthattack import PGD, Bisection, DetectorEvasion, OrthoAutoAttack, OrthoFGSM, OrthoPGD, OrthoSquare
from orthattack.attacks.base import Card
from orthattack.eval.attacks.load import attack_kind
from orthattack.eval.attacks.ours import OURS
from orthattack.eval.checks.assess import assess
from orthattack.eval.errors import EvaluationError
from orthattack.eval.report.text import leaderboard_table
from orthattack.eval.storage.run_folder import RunFolder, Shard
from tests.eval.tiny import EPS, SIZE, Net, evaluated

DIRECTION = torch.randn(3, SIZE, SIZE, generator=torch.Generator().manual_seed(3))


def mirrored(images):
    return images.flip(-1)


def mean_score(images):
    return images.mean((1, 2, 3)) - 0.9


FORMS = {
    "no scope": ({"name": "OrthoPGD", "scope": None}, None, []),
    "channel": ({"name": "OrthoPGD", "scope": "channel"}, "channel", []),
    "pixel": ({"name": "OrthoFGSM", "scope": "pixel"}, "pixel", []),
    "constant": ({"name": "OrthoPGD", "directions": ["constant"]}, "image", ["constant"]),
    "constants alone": (
        {"name": "OrthoPGD", "scope": None, "directions": ["constant", "channel-constant"]},
        None,
        ["constant", "channel-constant"],
    ),
    "tensor": ({"name": "OrthoAPGD", "directions": [DIRECTION, "constant"]}, "image", None),
    "function": ({"name": "OrthoMIFGSM", "scope": None, "directions": (mirrored,)}, None, None),
    "detector": ({"name": "DetectorEvasion", "detector": mean_score, "scope": "image"}, "image", []),
    "minimal": (
        {"name": "MinimumNorm", "attack": "OrthoPGD", "directions": ["constant"], "trials": 2}, "image", ["constant"],
    ),
    "loss": (
        {"name": "OrthoPGD", "loss": lambda logits, labels: -logits.gather(1, labels[:, None])[:, 0]}, "image", [],
    ),
    "means of blocks": ({"name": "OrthoPGD", "scope": "block4", "normal": "constant"}, "block4", []),
    "luma": ({"name": "PGD", "scope": "pixel", "normal": "luma"}, "pixel", []),
    "a normal of mine": ({"name": "FGSM", "scope": "channel", "normal": DIRECTION}, "channel", []),
    "a normal of the image": ({"name": "APGD", "scope": "block2", "normal": mirrored}, "block2", []),
    "square": ({"name": "OrthoSquare", "queries": 5, "directions": ["constant"]}, "image", ["constant"]),
}  # fmt: skip
FREE = {
    "textbook": {"name": "OrthoPGD", "enforce": "gradient", "directions": ["constant"]},
    "minimal textbook": {"name": "MinimumNorm", "attack": "OrthoPGD", "enforce": "gradient", "trials": 2},
    "evasion": {"name": "DetectorEvasion", "detector": mean_score},
    "PGD": {"name": "PGD"},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    attacks = {label: table for label, (table, *_) in FORMS.items()} | FREE
    return evaluated(tmp_path_factory.mktemp("run") / "r", attacks, checks=True, check_images=4, report=True)


def rows(run, label):
    (eps,) = run.attacks[label]["eps"]
    found = run.folder.read("shards", "net", label, eps)
    return found[found["status"] != "misclassified"]


def of_scope(scope, x):
    """What the scope makes a perturbation orthogonal to, each with where it is compared: (vector, mask)."""
    if scope == "image":
        yield x, torch.ones_like(x)
    for c in range(3 if scope == "channel" else 0):
        mask = torch.zeros_like(x)
        mask[c] = 1
        yield x * mask, mask
    for k in range(SIZE * SIZE if scope == "pixel" else 0):
        mask = (torch.arange(SIZE * SIZE) == k).view(1, SIZE, SIZE).double().expand_as(x)
        yield x * mask, mask
    if scope is not None and scope.startswith("block"):
        k = int(scope.removeprefix("block"))
        for c, i, j in itertools.product(range(3), range(0, SIZE, k), range(0, SIZE, k)):
            mask = torch.zeros_like(x)
            mask[c, i : i + k, j : j + k] = 1
            yield x * mask, mask


def normal_of(normal, x):
    if isinstance(normal, torch.Tensor):
        return normal.double()
    if callable(normal):
        return normal(x[None])[0]
    weights = {"constant": (1, 1, 1), "luma": (0.299, 0.587, 0.114)}
    return torch.tensor(weights[normal], dtype=torch.double).view(3, 1, 1).expand_as(x) if normal in weights else x


def of_directions(directions, x):
    for direction in directions:
        if isinstance(direction, torch.Tensor):
            yield direction.double()
        elif callable(direction):
            yield direction(x[None])[0]
        elif direction == "constant":
            yield torch.ones_like(x)
        else:
            yield from torch.eye(3, dtype=torch.double).view(3, 3, 1, 1).expand(3, *x.shape)


@pytest.mark.parametrize("label", FORMS)
def test_what_is_promised_is_measured_in_every_row(run, label):
    table, scope, _ = FORMS[label]
    (eps,) = run.attacks[label]["eps"]
    clean = dict(run.folder.images("net", "clean", None))
    adversarials = dict(run.folder.images("net", label, eps))
    found = rows(run, label)
    assert len(found) >= 9
    assert set(found["status"]) == {"ok"}, found["message"].tolist()
    for row in found.to_dict("records"):
        x = clean[row["position"]].double()
        delta = adversarials[row["position"]].double() - x
        pairs = [(vector, delta * mask) for vector, mask in of_scope(scope, normal_of(table.get("normal", "image"), x))]
        pairs += [(vector, delta) for vector in of_directions(table.get("directions", []), x)]
        if not pairs:
            assert pd.isna(row["promised_cosine"])
            continue
        products = [abs(float((a * b).sum())) / max(float(a.norm() * b.norm()), 1e-300) for a, b in pairs]
        assert row["promised_cosine"] == pytest.approx(max(products), abs=1e-9)
        assert row["promised_cosine"] <= 1e-6


@pytest.mark.parametrize("label", [*FREE, "no scope"])
def test_what_promises_nothing_is_held_to_nothing(run, label):
    assert run.attacks[label]["orthogonal"] is False
    assert rows(run, label)["promised_cosine"].isna().all()


def test_the_checks_and_the_report_survive_all_of_them(run):
    check = next(c for c in run.checks() if c["check"] == "saved images keep budget and orthogonality")
    assert check["status"] == "passed", check
    assert "tensors and functions as measured during the run" in check["figures"]
    assert (run.folder.path / "report.html").exists()
    kept = json.loads((run.folder.path / "manifest.json").read_text())
    about = {attack["label"]: attack for attack in kept["attacks"]}
    for label, (_, scope, directions) in FORMS.items():
        assert about[label]["scope"] == scope, label
        if directions is not None:
            assert about[label]["directions"] == directions
    assert about["tensor"]["directions"][0].startswith(f"tensor of shape (3, {SIZE}, {SIZE}), torch.float32, SHA-256 ")
    source = hashlib.sha256(inspect.getsource(mirrored).encode()).hexdigest()[:16]
    assert about["function"]["directions"] == [f"{__name__}.mirrored, source SHA-256 {source}"]
    assert about["minimal"]["minimal"]
    assert (about["luma"]["normal"], about["luma"]["keeps"]) == ("luma", ["luma of each pixel kept"])
    assert about["a normal of mine"]["normal"] == about["tensor"]["directions"][0]
    assert about["a normal of the image"]["normal"] == about["function"]["directions"][0]
    assert about["PGD"]["keeps"] == about["textbook"]["keeps"] == []


def test_reports_say_what_is_kept(run):
    page, table = ((run.folder.path / name).read_text() for name in ("report.html", "results.md"))
    told = leaderboard_table(run)
    assert "promised by means of blocks: 4x4 block means kept" in told
    assert "promised by luma: luma of each pixel kept" in told
    assert "promised by detector, loss: orthogonal to the image\n" in told
    assert "- promised by means of blocks: 4×4 block means kept" in table
    assert "<dt>promised by luma</dt><dd>luma of each pixel kept</dd>" in page


def test_a_run_whose_attacks_are_all_in_another_norm_is_reported(tmp_path):
    run = evaluated(tmp_path / "r", [{"name": "PGD", "norm": "l2", "eps": 0.5}], report=True)
    assert "<h1" in (run.folder.path / "report.html").read_text()
    assert "PGD" in leaderboard_table(run.in_norm("l2"))


@pytest.mark.parametrize("label", ["constant", "constants alone", "channel", "means of blocks", "luma"])
def test_a_saved_image_that_breaks_a_promise_is_found(run, tmp_path, label):
    """A shift by a constant, orthogonal to nothing that these promise, is put into the files."""
    shutil.copytree(run.folder.path, tmp_path / "copy")
    folder = RunFolder(tmp_path / "copy")
    (path,) = (folder.path / Shard("net", label, EPS, 0).image_path.parent).glob("*.safetensors")
    stored = safetensors.torch.load_file(path)
    clean = dict(run.folder.images("net", "clean", None))
    shift = 1e-3 if label != "channel" else 1e-3 * clean[int(stored["position"][0])][:1]
    stored["images"][0, :1] += shift
    safetensors.torch.save_file(stored, path)
    manifest = folder.manifest()
    manifest["attacks"] = [attack for attack in manifest["attacks"] if attack["label"] == label]
    check = next(c for c in assess(folder, manifest) if c.check == "saved images keep budget and orthogonality")
    assert check.status == "warned"


def test_baselines_follow_from_what_attacks_are(run):
    about = {label: attack["baselines"] for label, attack in run.attacks.items()}
    assert about["channel"] == ["no scope", "PGD"]
    assert about["constants alone"] == ["no scope", "PGD"]
    assert about["textbook"] == ["no scope", "PGD"]
    assert about["no scope"] == about["PGD"] == []


def test_the_card_is_that_of_the_threat_model():
    model = Net()
    assert OrthoPGD(model).card == Card("PGD", "image", loss="scaled-ce", schedule="linear")
    assert PGD(model, loss="ce").card == Card("PGD", loss="ce", schedule="linear")
    assert OrthoPGD(model, scope=None).card == PGD(model).card
    assert OrthoFGSM(model, scope="pixel").card == Card("FGSM", "pixel", loss="margin")
    assert OrthoSquare(model, directions=["constant"]).card == Card("Square", "image", ("constant",))
    assert OrthoAutoAttack(model, enforce="gradient").card == Card("AutoAttack", "image", exact=False)
    assert DetectorEvasion(model, mean_score).card == Card("DetectorEvasion", loss="margin")
    bisected = Bisection(OrthoPGD(model, scope="channel"))
    assert bisected.card == Card("Bisection", "channel", minimal=True, loss="scaled-ce", schedule="linear")


def test_every_attack_and_its_orthogonal_form_are_of_one_family():
    cards = {name: attack_kind(name).card for name in OURS}
    for name, card in cards.items():
        assert card.is_orthogonal == (name.startswith("Ortho") or name == "Bisection"), name
        assert cards[name.removeprefix("Ortho")].family == card.family == name.removeprefix("Ortho")


def test_an_attack_that_has_its_model_already_and_a_detector_that_is_missing_are_refused(tmp_path):
    with pytest.raises(EvaluationError, match="OrthoPGD is bound to a model already; name it, or give a function"):
        evaluated(tmp_path / "r", {"mine": OrthoPGD(Net())})
    with pytest.raises(EvaluationError, match="DetectorEvasion needs a detector, a function of the images"):
        evaluated(tmp_path / "r", ["DetectorEvasion"])
    with pytest.raises(EvaluationError, match="OrthoSquare has no option 'enforce'"):
        evaluated(tmp_path / "r", [{"name": "OrthoSquare", "enforce": "gradient"}])

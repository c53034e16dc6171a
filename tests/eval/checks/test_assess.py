"""The trust checks: each passes on a sound evaluation and warns of the failure it is for."""

from __future__ import annotations

import pytest
import torch

from orthattack.eval.checks.assess import assess
from orthattack.eval.checks.clean import clean_suspicions, differentiated
from orthattack.eval.checks.probes import TRANSFER, planned_probes, probes
from orthattack.eval.storage.run_folder import RunFolder, Shard
from orthattack.eval.storage.schema import CLEAN_SCHEMA, ROW_SCHEMA
from orthattack.eval.suite import make_suite

N, EPS = 40, [2 / 255, 4 / 255, 8 / 255]
BIG = 0.5


def rows(successes, n=N, **more):
    """Rows of an attack that fools the first so many of n images."""
    success = [k < successes for k in range(n)]
    return {
        **{name: [None] * n for name in ROW_SCHEMA.names},
        "position": list(range(n)),
        "name": [str(k) for k in range(n)],
        "label": [0] * n,
        "status": ["ok"] * n,
        "success": success,
        "rounded_success": [True if s else None for s in success],
        **more,
    }


def clean_rows(n=N, **more):
    return {
        **{name: [None] * n for name in CLEAN_SCHEMA.names},
        "position": list(range(n)),
        "name": [str(k) for k in range(n)],
        "label": [0] * n,
        "status": ["ok"] * n,
        "wrong_share": [0.0] * n,
        "evaluations": [1] * n,
        "gradient_norm": [1.0] * n,
        "logit_min": [-3.0] * n,
        "logit_max": [5.0] * n,
        "logit_sum": [1.0] * n,
        "image_min": [0.0] * n,
        "image_max": [1.0] * n,
        **more,
    }


SOUND = {
    "one step": 10, "PGD": 20, "PGD, 4 times the steps": 21, "PGD, 3 restarts": 21, "PGD, twice the radius": 30,
    "PGD, any image": 40, "queries only": 12, f"{TRANSFER}b": 8,
}  # fmt: skip


RADIUS = {"PGD, twice the radius": 8 / 255, "PGD, any image": BIG}


def manifest_of(attacks, orthogonal=True, published=None, probes=tuple(SOUND)):
    return {
        "config": {"norm": "linf", "eps": EPS},
        "models": [{"label": "a", "num_classes": 10, "data": {"images": N}, "published_accuracy": published}],
        "probes": [{"model": "a", "label": label, "eps": RADIUS.get(label, 4 / 255)} for label in probes],
        "attacks": [
            {"label": label, "norm": "linf", "eps": EPS, "orthogonal": orthogonal, "parameters": {}}
            for label in attacks
        ],
    }


def run(tmp_path, fooled=None, clean=None, attacks=None, images=None, published=None):
    """A stored run whose probes fool as many images as said, and the statuses of its checks."""
    folder = RunFolder(tmp_path / "run")
    folder.create()
    counts = SOUND | (fooled or {})
    manifest = manifest_of(list(attacks or {"PGD": []}), published=published, probes=list(counts))
    for probe in manifest["probes"]:
        shard = Shard("a", probe["label"], probe["eps"], 0, "checks")
        folder.write(shard, rows(counts[probe["label"]]), {})
    folder.write(Shard("a", "clean", None, 0, "clean"), clean or clean_rows(), {} if images is None else images[0])
    found = attacks or {"PGD": [10, 20, 30]}
    for label, values in found.items():
        for eps, value in zip(EPS, values, strict=True):
            content = value if isinstance(value, dict) else rows(value)
            folder.write(Shard("a", label, eps, 0), content, {} if images is None else images[1])
    return {check.check: check for check in assess(folder, manifest)}


def test_a_sound_evaluation_passes_everything_it_can(tmp_path):
    checks = run(tmp_path)
    assert len(checks) == 12
    assert {name for name, check in checks.items() if check.status != "passed"} == {
        "saved images keep budget and orthogonality"
    }
    assert checks["saved images keep budget and orthogonality"].status == "not run"
    more = checks["more steps never help the defender"]
    assert more.figures == "20 of 40 robust, then 19, at eps 4/255"
    assert all(check.why == "" for check in checks.values() if check.status == "passed")


@pytest.mark.parametrize(
    ("fooled", "name", "figures"),
    [
        ({"PGD, 4 times the steps": 10}, "more steps never help the defender", "20 of 40 robust, then 30"),
        ({"PGD, 3 restarts": 15}, "more restarts never help the defender", "20 of 40 robust, then 25"),
        ({"PGD, twice the radius": 5}, "a larger radius never helps the defender", "20 of 40 robust, then 35"),
        ({"PGD, any image": 35}, "a radius that allows any image leaves nothing robust", "5 of 40 robust"),
        ({"one step": 30}, "iterating is no weaker than a single step", "10 of 40 robust, then 20"),
        ({"queries only": 30}, "queries are no stronger than gradients", "9 of 40 fooled by it alone"),
        ({f"{TRANSFER}b": 30}, "transfer is no stronger than gradients", "9 of 40 fooled by it alone"),
    ],
)
def test_each_sign_of_a_failed_attack_is_warned_of(tmp_path, fooled, name, figures):
    checks = run(tmp_path, fooled)
    assert checks[name].status == "warned"
    assert figures in checks[name].figures
    assert checks[name].why


def test_one_image_in_forty_is_no_sign(tmp_path):
    checks = run(tmp_path, {"PGD, 3 restarts": 19, "PGD, any image": 39, "PGD, 4 times the steps": 18})
    assert {check.status for check in checks.values()} == {"passed", "not run"}


def test_masked_gradients_are_counted(tmp_path):
    sample = differentiated(N)
    bad = [1.0 if k in sample else None for k in range(N)]
    bad[sample[0]], bad[sample[5]], bad[sample[-1]] = 0.0, float("nan"), None
    check = run(tmp_path, clean=clean_rows(gradient_norm=bad))["gradients are not zero, NaN or missing"]
    assert check.status == "warned"
    assert check.figures == f"3 of {len(sample)} images without a usable gradient"
    random = run(tmp_path / "r", clean=clean_rows(evaluations=[10] * N))["gradients are not zero, NaN or missing"]
    assert random.status == "not run"


@pytest.mark.parametrize(("right", "status"), [(32, "passed"), (26, "passed"), (20, "warned")])
def test_clean_accuracy_is_compared_with_the_published_one(tmp_path, right, status):
    wrong = clean_rows(wrong_share=[0.0] * right + [1.0] * (N - right))
    check = run(tmp_path, clean=wrong, published=0.77)["model, data and preprocessing belong together"]
    assert check.status == status  # 26 of 40 may be chance, 20 hardly
    assert f"{100 * right / N:.1f} % of 40 right (published: 77.0 %)" in check.figures
    assert ("below what the weights' authors publish" in check.why) == (status == "warned")


@pytest.mark.parametrize(
    ("column", "value", "why"),
    [
        ("wrong_share", 1.0, "clean accuracy is at chance"),
        ("image_min", -2.1, "the images look normalised"),
        ("image_max", 255.0, "the images look like 8-bit values"),
    ],
)
def test_what_does_not_belong_together_is_warned_of(tmp_path, column, value, why):
    check = run(tmp_path, clean=clean_rows(**{column: [value] * N}))["model, data and preprocessing belong together"]
    assert check.status == "warned"
    assert why in check.why


def test_robust_accuracy_that_rises_with_eps_is_warned_of(tmp_path):
    checks = run(tmp_path, attacks={"PGD": [10, 20, 30], "broken": [30, 20, 25]})
    check = checks["robust accuracy falls as eps grows"]
    assert check.status == "warned"
    assert "broken is the least regular: 10, 20, 15 robust of 40" in check.figures


def test_success_that_rounding_undoes_is_warned_of(tmp_path):
    half = rows(20, rounded_success=[k % 2 == 0 if k < 20 else None for k in range(N)])
    check = run(tmp_path, attacks={"PGD": [half, 20, 30]})["success survives rounding to 8 bits"]
    assert check.status == "warned"
    assert check.figures == "50.0 % at 2/255, 100.0 % at 4/255, 100.0 % at 8/255"


@pytest.mark.parametrize(("shift", "status"), [(0.0, "passed"), (0.01, "warned")])
def test_saved_images_are_measured_again(tmp_path, shift, status):
    torch.manual_seed(0)
    clean = torch.rand(3, 8, 8) * 0.5 + 0.2
    delta = torch.randn(3, 8, 8).double()
    delta -= (delta * clean).sum() / clean.double().square().sum() * clean
    adversarial = (clean + delta * (0.9 * EPS[0] / delta.abs().max()) + shift).float()
    name = "saved images keep budget and orthogonality"
    # One image: a single cosine of float32 rounding is far below what counts.
    check = run(tmp_path, images=({0: clean}, {0: adversarial}))[name]
    assert check.status == status
    assert check.figures.startswith("3 images: norm at most")


def test_probes_are_what_their_names_say():
    content = {"models": ["cifar10-robust"], "data": "cifar10-samples"}
    found = {probe.label: probe for probe in probes(make_suite({**content, "eps": EPS, "steps": 10}, "x"), 32)}
    assert found["PGD"].eps == found["PGD, 3 restarts"].eps == 4 / 255
    assert found["PGD, twice the radius"].eps == 8 / 255
    assert found["PGD, any image"].eps == 0.5
    assert found["PGD, 4 times the steps"].kind.parameters["steps"] == 40
    assert probes(make_suite({**content, "eps": [0.0]}, "x"), 32) == []
    assert probes(make_suite({**content, "checks": False}, "x"), 32) == []
    in_l2 = probes(make_suite({**content, "norm": "l2", "eps": [0.5]}, "x"), 32)
    assert {p.label: p.eps for p in in_l2}["PGD, any image"] == 0.5 * 3072**0.5
    suite = make_suite(content, "x")
    models = [
        {"label": label, "num_classes": k, "data": {"name": "x"}, "preprocessing": {"crop": 32}}
        for label, k in (("a", 10), ("b", 10), ("c", 100))
    ]
    planned = [(probe["model"], probe["label"]) for probe in planned_probes(suite, models)]
    assert [pair for pair in planned if pair[1].startswith(TRANSFER)] == [("a", f"{TRANSFER}b"), ("b", f"{TRANSFER}a")]


def test_nothing_scored_is_not_passed(tmp_path):
    empty = clean_rows(status=["unreadable"] * N)
    failed = rows(0, status=["error"] * N, success=[None] * N)
    checks = run(tmp_path, clean=empty, attacks={"PGD": [failed] * 3})
    for name in (
        "model, data and preprocessing belong together",
        "gradients are not zero, NaN or missing",
        "robust accuracy falls as eps grows",
        "success survives rounding to 8 bits",
    ):
        assert checks[name].status == "not run", name
    assert clean_suspicions(RunFolder(tmp_path / "run").read("clean", "a"), 10) == []


@pytest.mark.parametrize(
    ("fooled", "name", "why"),
    [
        (
            {"PGD": 0},
            "more steps never help the defender",
            "too few images to lose: 'PGD' fooled 0 of 40, at eps 4/255",
        ),
        ({"PGD": 2}, "more restarts never help the defender", "too few images to lose: 'PGD' fooled 2 of 40"),
        ({"PGD": 0}, "a larger radius never helps the defender", "too few images to lose: 'PGD' fooled 0 of 40"),
        ({"one step": 1}, "iterating is no weaker than a single step", "too few images to lose: 'one step' fooled 1"),
        (
            {"PGD, 4 times the steps": 40},
            "queries are no stronger than gradients",
            "too few images were left: gradients fooled 40 of 40, at eps 4/255",
        ),
        ({"PGD, 4 times the steps": 38}, "transfer is no stronger than gradients", "too few images were left"),
    ],
)
def test_what_could_not_have_warned_was_not_run(tmp_path, fooled, name, why):
    check = run(tmp_path, fooled)[name]
    assert (check.status, check.figures) == ("not run", "")
    assert check.why.startswith(why)


def test_probes_that_scored_no_image_in_common_have_not_been_run(tmp_path):
    """As of a model that is wrong on all of the images that the checks look at."""
    checks = run(tmp_path)
    folder = RunFolder(tmp_path / "run")
    wrong = rows(0, status=["misclassified"] * N, success=[None] * N)
    for label in SOUND:
        folder.write(Shard("a", label, RADIUS.get(label, 4 / 255), 0, "checks"), wrong, {})
    again = {check.check: check for check in assess(folder, manifest_of(["PGD"]))}
    for name in checks:
        if "defender" in name or "stronger" in name or "weaker" in name or "any image" in name:
            assert again[name].status == "not run", name
            assert again[name].why.startswith("no image was left")


@pytest.mark.parametrize(
    ("successes", "status", "why"),
    [
        ([0, 0, 0], "not run", "no attack with a radius succeeded"),
        ([0, 1, 1], "not run", "one success says too little"),
        ([0, 1, 2], "passed", ""),
    ],
)
def test_rounding_is_judged_by_more_than_one_success(tmp_path, successes, status, why):
    check = run(tmp_path, attacks={"PGD": successes})["success survives rounding to 8 bits"]
    assert (check.status, check.why) == (status, why)


def test_radii_that_fool_next_to_nothing_show_no_fall(tmp_path):
    name = "robust accuracy falls as eps grows"
    assert run(tmp_path / "a", attacks={"PGD": [0, 2, 30]})[name].why == (
        "too few images were fooled below the largest radius"
    )
    assert run(tmp_path / "b", attacks={"PGD": [0, 10, 3]})[name].status == "warned"


def test_saved_images_without_an_adversarial_or_a_promise_are_said_to_be(tmp_path):
    name, clean = "saved images keep budget and orthogonality", torch.rand(3, 8, 8)
    assert run(tmp_path / "a", images=({0: clean}, {}))[name].why == "no adversarial image was saved"
    run(tmp_path / "b", images=({0: clean}, {0: clean}))
    plain = {check.check: check for check in assess(RunFolder(tmp_path / "b" / "run"), manifest_of(["PGD"], False))}
    assert plain[name].status == "passed"
    assert plain[name].figures == "3 images: norm at most 0 eps, none of an attack that promises orthogonality"

"""A radius that allows every image is warned of in every norm, whoever's attack it is, and not of a trust check's."""

from __future__ import annotations

import pytest

from orthattack.eval.running.plan import boundless
from orthattack.eval.suite import make_suite
from tests.eval.tiny import evaluated


def entries(norm, *eps, attacks=("PGD", "foolbox:FGSM")):
    content = {"models": ["net"], "data": "x", "attacks": list(attacks), "norm": norm, "eps": list(eps)}
    return make_suite(content, "test").entries()


@pytest.mark.parametrize(
    ("norm", "size", "largest"), [("linf", 32, 1.0), ("l2", 32, 3072**0.5), ("l1", 32, 3072.0), ("l2", 8, 192**0.5)]
)
def test_from_the_diameter_of_all_images_on(norm, size, largest):
    models = [{"preprocessing": {"crop": size}}] * 2
    attacks = ["PGD", "MinimumNorm"]
    assert boundless(entries(norm, 0.99 * largest, attacks=attacks), models) == []
    (told,) = boundless(entries(norm, 0.5 * largest, largest, attacks=attacks), models)
    assert told.startswith(f"eps {largest:g} allows every image: in {norm}, images of {size}x{size} pixels are at most")
    assert f"{largest:.4g} apart" in told


def test_the_radius_of_eight_bits_is_guessed():
    models = [{"preprocessing": {"crop": 32}}]
    (told,) = boundless(entries("l2", 128, attacks=["PGD"]), models)
    assert told.endswith("are at most 55.43 apart; did you mean 128/255?")
    (told,) = boundless(entries("l1", 1e6, attacks=["PGD"]), models)
    assert told.endswith("choose a smaller radius")


def test_it_is_said_once_and_kept_and_the_check_that_allows_any_image_says_nothing(tmp_path, capsys):
    attacks = ["FGSM", "OrthoFGSM", {"name": "foolbox:L2FastGradientAttack", "label": "theirs"}]
    run = evaluated(tmp_path / "r", attacks, norm="l2", eps=128, steps=2, checks=True, check_images=2)
    told = capsys.readouterr().err
    assert told.count("allows every image") == 1
    assert "orthattack: eps 128 allows every image: in l2, images of 8x8 pixels are at most 13.86 apart" in told
    assert any("allows every image" in warning for warning in run.manifest["warnings"])
    evaluated(tmp_path / "s", attacks, norm="l2", eps=0.5, steps=2, checks=True, check_images=2)
    assert "allows every image" not in capsys.readouterr().err

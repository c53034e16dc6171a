"""An evaluation in L0, whose norm is the number of pixels."""

from __future__ import annotations

import pytest

from orthattack.eval.checks.assess import assess
from tests.eval.tiny import evaluated


def too_many(model, eps):
    """Changes a pixel more than it may, and two channels of one."""

    def attack(images, labels):
        found = images.clone()
        found[:, 0, 0, : int(eps) + 1] = 1 - images[:, 0, 0, : int(eps) + 1].round()
        found[:, 1, 0, 0] = (images[:, 1, 0, 0] - 1e-6).abs()
        return found

    return attack


@pytest.mark.slow
def test_pixels_are_counted_and_more_than_asked_for_are_invalid(tmp_path):
    ours = [{"name": name, "label": name, "queries": 8} for name in ("SparseRS", "OrthoSparseRS")]
    theirs = {"name": "foolbox:L0FMNAttack", "label": "FMN", "steps": 3}
    attacks = [*ours, theirs, {"name": f"{__name__}:too_many", "label": "bad"}]
    run = evaluated(tmp_path / "run", attacks, norm="l0", eps=[3], checks=True)
    for name in ("SparseRS", "OrthoSparseRS"):
        rows = run.rows("net", name, 3.0)
        sizes = rows.loc[rows["status"] == "ok", "l0"]
        assert len(sizes) == 9
        assert 0 < sizes.max() <= 3
    assert rows["promised_cosine"].max() <= 1e-6
    bad = run.table().set_index("attack").loc["bad"]
    assert bad["invalid"] == 9
    assert "left the ball: l0 norm 4, eps 3" in str(bad["reasons"])
    checks = {check.check: check for check in assess(run.folder, run.manifest)}
    assert "norm at most 1.333333 eps" in checks["saved images keep budget and orthogonality"].figures
    assert checks["queries are no stronger than gradients"].status == "not run"  # as there is no gradient step in L0

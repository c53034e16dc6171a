"""FAB's step against solvers, its search against known distances, and what AutoAttack makes of its parts."""

from __future__ import annotations

import pytest
import torch
from scipy.optimize import linprog, minimize

import orthattack
from orthattack import APGD, FAB, AutoAttack, OrthoAutoAttack, OrthoFAB, Square, ThreatModel
from orthattack.attacks.auto import VERSIONS
from orthattack.attacks.base import UNLIMITED
from orthattack.attacks.fab import _reached
from tests.attacks.test_attacks import Recorder, drawn, linear_model, small_model
from tests.attacks.test_family import RADII, linear_boundary, norms, seeded, sizes

pytestmark = pytest.mark.heavy

lean = pytest.mark.parametrize("norm", ["linf", *(pytest.param(norm, marks=pytest.mark.slow) for norm in ("l2", "l1"))])
versions = pytest.mark.parametrize("version", ["standard", pytest.param("plus", marks=pytest.mark.slow), "rand"])


def smallest(norm, start, x, g, needed, normal):
    """The norm of the smallest step from `start` that gains `needed` and stays in [0, 1] and on the plane, by scipy."""
    s, x, g = (part.flatten().double().numpy() for part in (start, x, g))
    n, planes = len(s), [] if normal is None else [normal.flatten().double().numpy()]
    if norm == "l2":
        rules = [{"type": "ineq", "fun": lambda d: g @ d - needed}]
        rules += [{"type": "eq", "fun": lambda d, b=b: b @ (s + d - x)} for b in planes]
        found = minimize(lambda d: d @ d, 0 * s, bounds=list(zip(-s, 1 - s, strict=True)), constraints=rules, tol=1e-12)
        return found.fun**0.5
    # Steps up and down, both >= 0, and for L-infinity their largest as one variable more.
    limits = [(0, 1 - v) for v in s] + [(0, v) for v in s]
    gain = [*-g, *g]
    equal = [[*b, *-b] for b in planes]
    if norm == "l1":
        cost, less, most = [1.0] * (2 * n), [gain], [-needed]
    else:
        cost, limits = [0.0] * (2 * n) + [1.0], [*limits, (0, None)]
        rows = torch.cat([torch.eye(2 * n), -torch.ones(2 * n, 1)], 1).tolist()
        less, most, equal = [[*gain, 0], *rows], [-needed] + [0.0] * (2 * n), [[*row, 0] for row in equal]
    found = linprog(cost, less, most, equal or None, [b @ (x - s) for b in planes] or None, limits)
    return found.fun


@norms
@pytest.mark.parametrize("ortho", [False, True])
@pytest.mark.parametrize("share", [0.1, 0.6])
def test_a_step_ends_at_the_nearest_point_of_box_plane_and_boundary(norm, ortho, share):
    """Also where so many pixels meet their bounds that the step is far from proportional to the gain."""
    x = torch.rand(3, 1, 3, 4, generator=seeded(1)).double()
    region = ThreatModel(norm, UNLIMITED, scope="image" if ortho else None).around(x)
    start = region.project(x + 0.1 * torch.randn(x.shape, generator=seeded(2)).double())
    g = torch.randn(x.shape, generator=seeded(3)).double()
    most = ((region.step(start, g, 1e3, count=1) - start) * g).sum((1, 2, 3), keepdim=True)
    needed = share * most
    end = _reached(region, start, g, needed)
    gain = ((end - start) * g).sum((1, 2, 3), keepdim=True)
    torch.testing.assert_close(gain, needed, rtol=0.05, atol=0)
    for k in range(3):
        best = smallest(norm, start[k], x[k], g[k], float(gain[k]), x[k] if ortho else None)
        assert best * (1 - 1e-4) <= float(sizes(end - start, norm)[k]) <= best * 1.01
    torch.testing.assert_close(_reached(region, start, -g, -needed), end)


@lean
@pytest.mark.parametrize("kind", [FAB, OrthoFAB])
def test_the_distance_from_a_linear_boundary_is_found(norm, kind):
    """Up to the overshoot of 1.05."""
    model, images, labels, w, lead = linear_boundary()
    rows = zip(images, w, lead.tolist(), strict=True)
    distance = torch.tensor([smallest(norm, x, x, g, m, x if kind is OrthoFAB else None) for x, g, m in rows])
    result = kind(model, norm, steps=8).run(images, labels)
    assert result.success.all()
    assert (result.norm >= distance * (1 - 1e-4)).all()
    assert (result.norm <= distance * 1.06).all()


@lean
def test_only_what_is_within_the_radius_counts(norm):
    model, (images, _) = small_model(), drawn(n=12)
    with torch.no_grad():
        labels = model(images).argmax(1)
    free = FAB(model, norm, steps=12).run(images, labels)
    eps = float(free.norm[free.success].median())
    for restarts, targets in ((1, None), (2, None), (1, 3)):
        result = FAB(model, norm, eps, 12, restarts, targets, generator=seeded()).run(images, labels)
        assert (result.norm <= eps).all()
        assert (result.success == (free.norm <= eps)).float().mean() >= 0.8
        with torch.no_grad():
            assert torch.equal(result.success, model(result.adversarials).argmax(1) != labels)
    found = FAB(model, norm, eps, 12, early_stop=True).run(images, labels)
    assert (found.success == (free.norm <= eps)).float().mean() >= 0.9
    assert found.forward_calls[found.success].max() <= 13


def test_fab_walks_to_each_of_the_likeliest_classes():
    model, (images, _) = linear_model(classes=6), drawn(n=4)
    with torch.no_grad():
        ranked = model(images).argsort(1, descending=True)
    result = FAB(model, "l2", steps=5, targets=3).run(images, ranked[:, 0])
    assert (result.gradient_calls == 15).all()
    nearest = FAB(model, "l2", steps=5, targets=5).run(images, ranked[:, 0])
    distances = []
    for k in range(1, 6):
        w = (model[1].weight[ranked[:, k]] - model[1].weight[ranked[:, 0]]).detach()
        logits = model(images).detach()
        lead = logits.gather(1, ranked[:, :1]) - logits.gather(1, ranked[:, k : k + 1])
        distances.append(lead.flatten() / w.norm(dim=1))
    least = torch.stack(distances).amin(0)
    assert (nearest.norm >= least * (1 - 1e-4)).all()  # that of the box is no smaller
    assert (nearest.norm <= result.norm * (1 + 1e-6)).all()
    targets = ranked[:, 3]
    reached = FAB(model, "l2", steps=20, targeted=True).run(images, targets)
    with torch.no_grad():
        assert torch.equal(reached.success, model(reached.adversarials).argmax(1) == targets)
    assert reached.success.all()


# --- AutoAttack's versions and parts ---------------------------------------------------------------------------------


def standing(n=24):
    model, (images, _) = small_model(), drawn(n=n)
    with torch.no_grad():
        labels = model(images).argmax(1)
    labels[0] = (labels[0] + 1) % 5  # wrong from the start
    return model, images, labels


QUICK = {"steps": 4, "targets": 2, "queries": 6, "generator": None}


@pytest.mark.parametrize("kind", [AutoAttack, OrthoAutoAttack])
@versions
def test_the_result_says_which_part_fooled_each_sample(kind, version, capsys):
    model, images, labels = standing()
    options = {"steps": 2, "targets": 1, "queries": 6, "eps": 0.03, "version": version}
    attack = kind(model, **options, generator=seeded(), verbose=True)
    result = attack.run(images, labels)
    assert tuple(attack.parts) == VERSIONS[version]
    assert not result.success.all()
    assert int(result.part[0]) == -1
    assert (result.part[~result.success] == -1).all()
    assert (result.part[1:][result.success[1:]] >= 0).all()
    after = attack.after_each_part(result)
    assert list(after) == ["clean", *VERSIONS[version]]
    assert after["clean"] == pytest.approx(23 / 24)
    assert list(after.values()) == sorted(after.values(), reverse=True)
    assert after[VERSIONS[version][-1]] == pytest.approx(float((~result.success).double().mean()))
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 1 + len(VERSIONS[version])
    for (part, share), line in zip(after.items(), said, strict=True):
        name = "the images themselves" if part == "clean" else part
        assert line.startswith(f"robust accuracy after {name}: {share:.2%} ({round(24 * share)} of 24; ")
    # The same parts one by one, each on all samples: what a part finds first, it finds alone.
    for part in VERSIONS[version][:1]:
        alone = kind(model, **options, parts=[part], generator=seeded()).run(images, labels)
        assert torch.equal(alone.success, (result.part == 0) | (result.success & (result.part == -1)))


@pytest.mark.slow
def test_the_versions_have_the_published_settings():
    model, images, labels = standing(6)
    recorded = Recorder(model)
    AutoAttack(recorded, eps=1e-7, steps=2, version="rand", generator=seeded()).run(images, labels)
    # Two APGDs with 20 passes for each point, the number of classes for DLR, and the images themselves.
    assert [len(seen) for seen in recorded.seen] == [6] * 20 + [5] * (20 * (3 + 1 + 3))
    plus = AutoAttack(model, eps=1e-7, steps=2, queries=3, targets=1, version="plus", generator=seeded())
    assert (plus.run(images, labels).gradient_calls[1:] == 2 * (5 + 5 + 5 + 1 + 1)).all()
    sparse = AutoAttack(model, "l1", eps=1e-4, steps=2, queries=3, targets=1, generator=seeded())
    assert (sparse.run(images, labels).gradient_calls[1:] == 2 * (5 + 1 + 1)).all()
    assert AutoAttack(model).eot_samples == 1
    assert AutoAttack(model, version="rand").eot_samples == 20
    assert AutoAttack(model, version="rand", eot_samples=3).eot_samples == 3


@norms
@pytest.mark.parametrize(
    ("part", "same"),
    [("square", lambda m, norm, eps: Square(m, norm, eps, 20, early_stop=True, generator=seeded())),
     ("apgd-ce", lambda m, norm, eps: APGD(m, norm, eps, 5, loss="ce", early_stop=True, generator=seeded())),
     ("apgd-dlr", lambda m, norm, eps: APGD(m, norm, eps, 5, loss="dlr", early_stop=True, generator=seeded())),
     ("fab", lambda m, norm, eps: FAB(m, norm, eps, 5, early_stop=True)),
     ("fab-t", lambda m, norm, eps: FAB(m, norm, eps, 5, targets=2, early_stop=True))],
)  # fmt: skip
def test_a_part_alone_is_that_attack(norm, part, same):
    model, images, labels = standing()
    images, labels, eps = images[1:], labels[1:], RADII[norm] / 4
    version = "rand" if part.startswith("apgd") else "standard"  # one start in L1 too
    more = {"eot_samples": 1} if version == "rand" else {}
    attack = AutoAttack(model, norm, eps, 5, 2, 20, version, [part], generator=seeded(), **more)
    found, other = attack.run(images, labels), same(model, norm, eps).run(images, labels)
    assert torch.equal(found.success, other.success)
    assert found.success.sum() > 0 or part in ("square", "apgd-dlr")
    assert torch.equal(found.adversarials[found.success], other.adversarials[found.success])


def test_parts_that_there_are_not_are_refused():
    for parts in ("square", [], ["square", "square"], 3):
        with pytest.raises(ValueError, match="parts must be a list of one or more different ones of apgd-ce"):
            AutoAttack(small_model(), parts=parts)
    with pytest.raises(ValueError, match=r"each of parts must be one of 'apgd-ce', .*; got 'apgd'"):
        AutoAttack(small_model(), parts=["apgd"])
    with pytest.raises(ValueError, match="version must be one of 'standard', 'plus', 'rand'; got 'custom'"):
        AutoAttack(small_model(), version="custom")


def test_gradient_parts_without_a_gradient_need_squares_beside_them():
    model, images, labels = standing(6)

    @torch.no_grad()
    def hidden(x):
        return model(x)

    with pytest.warns(UserWarning, match="nothing could be climbed"):
        result = AutoAttack(hidden, eps=0.2, **{**QUICK, "queries": 60}, version="plus").run(images, labels)
    assert set(result.part.tolist()) <= {-1, VERSIONS["plus"].index("square")}
    with pytest.raises(ValueError, match="no gradient with respect to the images"):
        AutoAttack(hidden, eps=0.2, version="rand", steps=2).run(images, labels)


def test_others_say_of_no_part():
    model, images, labels = standing(6)
    for name in ("FGSM", "Square", "FAB"):
        result = getattr(orthattack, name)(model, eps=0.1, **({"queries": 5} if name == "Square" else {})).run(
            images, labels
        )
        assert (result.part == -1).all()

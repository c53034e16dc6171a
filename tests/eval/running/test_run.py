"""Runs on the bundled models: what is stored is true, and a stop loses nothing."""

from __future__ import annotations

import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch import nn

from orthattack.eval import evaluate
from orthattack.eval.attacks.user import user_attack
from orthattack.eval.checks.probes import TRANSFER
from orthattack.eval.data import load
from orthattack.eval.data.dataset import ImageDataset
from orthattack.eval.data.load import load_dataset
from orthattack.eval.data.prefetch import Decoder
from orthattack.eval.errors import EvaluationError
from orthattack.eval.models.load import load_classifier
from orthattack.eval.running import chunk as jobs
from orthattack.eval.running.plan import GALLERY, Plan
from orthattack.eval.running.run import _working_in, run_suite, suite_inputs
from orthattack.eval.running.worker import Inputs
from orthattack.eval.storage.run_folder import RunFolder
from orthattack.eval.suite import make_suite
from tests.eval.tiny import CLASSES, SIZE, Net, dataset
from tests.eval.tiny import classifier as classifier_of
from tests.stored import assert_same, contents

EPS = 8 / 255
CONTENT = {
    "models": ["cifar10-robust"],
    "data": {"source": "cifar10-samples", "limit": 12},
    "eps": [EPS],
    "steps": 3,
    "batch_size": 4,
    "shard_size": 8,
    "checks": False,
    "save_images": "all",
}
EVERYONE = [
    "FGSM", "OrthoPGD", {"name": "OrthoPGD", "label": "textbook", "enforce": "gradient"},
    {"name": "MinimumNorm", "trials": 3}, "foolbox:LinfPGD", "foolbox:FGSM", "foolbox:BIM",
    {"name": "foolbox:L2PGD", "norm": "l2", "eps": 0.5},
    {"name": "foolbox:LinfDeepFoolAttack", "steps": 2, "candidates": 2},
    {"name": "Square", "queries": 5},
]  # fmt: skip


def suite(**more):
    return make_suite({**CONTENT, "attacks": ["FGSM", "OrthoPGD"], **more}, "test")


def start(path, chosen, **options):
    folder = RunFolder(path)
    source = options.pop("source", None) or suite_inputs(chosen)
    done = run_suite(chosen, source, folder, progress=False, **options)
    return folder, done


def rows_of(folder, label, eps=EPS, model="cifar10-robust", kind="shards"):
    return folder.read(kind, model, label, eps)


@pytest.fixture(scope="module")
def classifier():
    return load_classifier("cifar10-robust")


@pytest.fixture(scope="module")
def everyone(tmp_path_factory):
    """All kinds of attacks on 12 images, in chunks and batches that do not divide them."""
    path = tmp_path_factory.mktemp("run") / "all"
    chosen = suite(attacks=EVERYONE)
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    folder, done = start(path, chosen)
    assert done
    assert torch.equal(state, torch.get_rng_state())
    assert np.array_equal(numpy_state, np.random.get_state()[1])
    return folder, chosen


def test_what_is_stored_is_what_the_stored_images_do(everyone, classifier):
    folder, chosen = everyone
    clean = dict(folder.images("cifar10-robust", "clean", None))
    assert sorted(clean) == list(range(12))
    looked = folder.read("clean", "cifar10-robust").set_index("position")
    for entry in chosen.entries():
        rows = rows_of(folder, entry.label, entry.eps).set_index("position")
        assert rows.index.tolist() == list(range(12)), entry.label
        adversarials = dict(folder.images("cifar10-robust", entry.label, entry.eps))
        attacked = rows.index[rows["status"] != "misclassified"]
        assert sorted(adversarials) == attacked.tolist(), entry.label
        for k in range(12):
            row, x = rows.loc[k], clean[k].double()
            logits = classifier.model(clean[k][None])[0]
            assert row["clean_prediction"] == looked.loc[k, "prediction"] == int(logits.argmax())
            if row["label"] != row["clean_prediction"]:
                assert row["status"] == "misclassified"
                assert pd.isna(row["success"])
                continue
            assert row["status"] == "ok", (entry.label, row["message"])
            delta = adversarials[k].double() - x
            after = classifier.model(adversarials[k][None])[0]
            assert row["adversarial_prediction"] == int(after.argmax())
            assert row["success"] == (int(after.argmax()) != row["label"])
            assert (row["margin"] > 0) == row["success"]
            others = np.delete(after.detach().numpy(), row["label"])
            assert row["margin"] == pytest.approx(others.max() - float(after[row["label"]]), abs=1e-4)
            assert row["l0"] == int((delta != 0).any(0).sum())
            assert row["l1"] == pytest.approx(float(delta.abs().sum()), rel=1e-12)
            assert row["l2"] == pytest.approx(float(delta.norm()), rel=1e-12)
            assert row["linf"] == pytest.approx(float(delta.abs().max()), rel=1e-12)
            lengths = float(delta.norm() * x.norm())
            cosine = float((delta * x).sum()) / lengths if lengths else 0.0
            assert row["cosine"] == pytest.approx(cosine, abs=1e-9)
            if float(delta[1].norm()) > 0:
                green = float((delta[1] * x[1]).sum() / (delta[1].norm() * x[1].norm()))
                assert row["cosine_green"] == pytest.approx(green, abs=1e-9)
            if entry.kind.orthogonal:
                assert abs(row["cosine"]) <= 1e-6
            rounded = (adversarials[k] * 255).round() / 255
            if row["success"]:
                assert row["rounded_success"] == (int(classifier.model(rounded[None]).argmax()) != row["label"])
                assert row["rounded_norm"] == pytest.approx(
                    float((rounded.double() - x).norm() if entry.norm == "l2" else (rounded.double() - x).abs().max())
                )
            else:
                assert pd.isna(row["rounded_success"])


def test_the_gradients_cosine_is_that_of_the_cross_entropy(everyone, classifier):
    folder, _ = everyone
    rows = folder.read("clean", "cifar10-robust").set_index("position")
    clean = dict(folder.images("cifar10-robust", "clean", None))
    for k in (0, 7, 11):
        leaf = clean[k][None].requires_grad_()
        loss = nn.functional.cross_entropy(classifier.model(leaf), torch.tensor([int(rows.loc[k, "label"])]))
        (gradient,) = torch.autograd.grad(loss, leaf)
        cosine = nn.functional.cosine_similarity(gradient.flatten().double(), leaf.flatten().double(), dim=0).detach()
        assert rows.loc[k, "gradient_cosine"] == pytest.approx(float(cosine), abs=1e-5)
        assert rows.loc[k, "gradient_norm"] == pytest.approx(float(gradient.norm()), rel=1e-3)


def test_everyone_gets_the_same_steps_and_is_counted_alike(everyone):
    folder, chosen = everyone
    calls = {}
    for entry in chosen.entries():
        rows = rows_of(folder, entry.label, entry.eps)
        calls[entry.label] = rows.loc[rows["status"] == "ok", "gradient_calls"].max()
    assert calls["FGSM"] == calls["foolbox:FGSM"] == 1
    assert calls["OrthoPGD"] == calls["textbook"] == 3
    assert calls["foolbox:LinfPGD"] == calls["foolbox:L2PGD"] == calls["foolbox:BIM"] == 3
    assert calls["Square"] == 0
    assert calls["MinimumNorm"] > 3


def test_minimal_attacks_run_once_and_the_others_at_every_radius(tmp_path):
    chosen = suite(eps=[2 / 255, EPS], attacks=["FGSM", {"name": "MinimumNorm", "trials": 1}], data={
        "source": "cifar10-samples", "limit": 3})  # fmt: skip
    folder, _ = start(tmp_path / "r", chosen)
    assert folder.manifest()["attacks"][0]["eps"] == [2 / 255, EPS]
    assert folder.manifest()["attacks"][1]["eps"] == [None]
    assert len(rows_of(folder, "FGSM", 2 / 255)) == len(rows_of(folder, "MinimumNorm", None)) == 3


def test_torchattacks_are_run_at_the_same_eps_and_steps(tmp_path):
    pytest.importorskip("torchattacks", reason="needs the extra torchattacks")
    chosen = suite(attacks=["torchattacks:PGD", "torchattacks:APGD"], data={"source": "cifar10-samples", "limit": 6})
    folder, _ = start(tmp_path / "r", chosen)
    for label in ("torchattacks:PGD", "torchattacks:APGD"):
        rows = rows_of(folder, label)
        rows = rows[rows["status"] == "ok"]
        assert len(rows) > 0
        assert (rows["linf"] <= EPS * (1 + 1e-5) + 1.2e-7).all()
        assert rows["gradient_calls"].min() >= 3


@pytest.mark.slow  # a run that stops and resumes repeats itself too
def test_a_run_repeats(everyone, tmp_path):
    folder, chosen = everyone
    start(tmp_path / "again", chosen)
    assert_same(contents(folder.path), contents(tmp_path / "again"))


def test_an_image_keeps_its_random_numbers_in_another_order_and_company(everyone, tmp_path):
    """A subset in reverse, in other batches: the same rows, up to the rounding of another batch."""
    folder, _ = everyone
    names = rows_of(folder, "OrthoPGD").sort_values("position")["name"].tolist()[1:11:3][::-1]
    (tmp_path / "names.txt").write_text("\n".join(["# some of them", *names]))
    data = {"source": "cifar10-samples", "subset": str(tmp_path / "names.txt")}
    other, _ = start(tmp_path / "part", suite(attacks=["OrthoPGD"], data=data, batch_size=3, save_images="all"))
    few = rows_of(other, "OrthoPGD")
    assert few["name"].tolist() == names
    before = dict(folder.images("cifar10-robust", "OrthoPGD", EPS))
    position = rows_of(folder, "OrthoPGD").set_index("name")["position"]
    for k, image in other.images("cifar10-robust", "OrthoPGD", EPS):
        same = before[position[few["name"][k]]]
        # A sign of a gradient that is nearly zero may turn with the rounding of another batch size; the start may not.
        assert float((image - same).abs().gt(1e-6).float().mean()) < 0.02


def test_seeds_make_a_difference_and_model_order_does_not(tmp_path):
    few = {"source": "cifar10-samples", "limit": 4}
    one, _ = start(tmp_path / "a", suite(attacks=["OrthoPGD"], seeds=[0, 1], data=few))
    a, b = (dict(one.images("cifar10-robust", f"OrthoPGD (seed {s})", EPS)) for s in (0, 1))
    assert not all(torch.equal(a[k], b[k]) for k in a)
    two, _ = start(tmp_path / "b", suite(attacks=["OrthoPGD"], models=["cifar10-standard", "cifar10-robust"], data=few))
    c = dict(two.images("cifar10-robust", "OrthoPGD", EPS))
    assert all(torch.equal(a[k], c[k]) for k in a)


# Stops


def test_a_finished_run_is_not_run_again(everyone, monkeypatch):
    folder, chosen = everyone
    before = {path: path.stat().st_mtime_ns for path in folder.path.rglob("*.parquet")}
    monkeypatch.setattr(jobs.Part, "attack", lambda *_: pytest.fail("there was nothing to do"))
    _, done = start(folder.path, chosen)
    assert done
    assert before == {path: path.stat().st_mtime_ns for path in folder.path.rglob("*.parquet")}
    assert len(folder.manifest()["sessions"]) == 2


@pytest.mark.parametrize(
    "error",
    # Of the second, tests/faults/files/test_disk.py has a real one in the fast lane.
    [KeyboardInterrupt(), pytest.param(OSError(28, "No space left on device"), marks=pytest.mark.slow)],
)
def test_a_run_that_stops_goes_on_and_ends_as_if_it_had_not(tmp_path, monkeypatch, error):
    chosen = suite(attacks=["OrthoPGD", "foolbox:LinfPGD"])
    whole, _ = start(tmp_path / "whole", chosen)
    write, count = RunFolder.write, 0

    def fails(self, *arguments):
        nonlocal count
        count += 1
        if count == 4:
            raise error
        write(self, *arguments)

    monkeypatch.setattr(RunFolder, "write", fails)
    if isinstance(error, KeyboardInterrupt):
        folder, done = start(tmp_path / "parts", chosen)
        assert not done
    else:
        with pytest.raises(
            EvaluationError, match=r"could not write to .* \(No space left on device\): what is finished"
        ):
            start(tmp_path / "parts", chosen)
        folder = RunFolder(tmp_path / "parts")
    assert folder.manifest()["status"] == "interrupted"
    assert len(list(folder.path.rglob("*.parquet"))) == 3
    _, done = start(tmp_path / "parts", chosen)
    assert done
    assert folder.manifest()["status"] == "complete"
    assert_same(contents(whole.path), contents(folder.path))


def test_a_chunk_whose_clean_rows_are_gone_is_looked_at_again(tmp_path):
    """Every attack of the chunk is there; only what the model makes of its clean images is lost."""
    chosen = suite(attacks=["FGSM"])
    folder, done = start(tmp_path / "r", chosen)
    assert done
    before = contents(folder.path)
    lost = [path for path in (folder.path / "clean").rglob("*") if path.is_file()]
    assert len(lost) >= 2
    lost[0].unlink()
    assert start(tmp_path / "r", chosen)[1]
    assert_same(contents(folder.path), before)


@pytest.mark.slow
def test_a_run_killed_at_random_moments_ends_as_if_it_had_not(tmp_path):
    """Real processes, real SIGKILL. The whole suite of the acceptance test, killed 20 times, is scripts/kill_run.py."""
    names = ["FGSM", "OrthoPGD", "foolbox:LinfPGD"]
    arguments = [
        "eval", "--model", "cifar10-robust", "--attacks", *names, "--steps", "3", "--batch-size", "2", "--shard-size",
        "4", "--no-checks",
    ]  # fmt: skip
    code = f"import sys; from orthattack.eval.cli import main; sys.exit(main({arguments!r} + ['--out', sys.argv[1]]))"

    def launch(path):
        return subprocess.Popen(
            [sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def finished(path):
        return len(list(path.rglob("*.parquet")))

    whole = launch(tmp_path / "whole")
    _, errors = whole.communicate(timeout=300)
    assert whole.returncode == 0, errors
    draw, parts, kills = random.Random(0), tmp_path / "parts", 0
    while kills < 5:  # files of parts of an attack become one, so their number does not say how far it is
        process = launch(parts)
        wanted = finished(parts) + draw.randint(1, 4)
        while process.poll() is None and finished(parts) < wanted:
            time.sleep(0.002)
        time.sleep(draw.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        if process.returncode != -signal.SIGKILL:  # it was done before
            break
        kills += 1
    process = launch(parts)
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    assert kills > 1
    assert_same(contents(tmp_path / "whole"), contents(tmp_path / "parts"))


def test_another_configuration_is_refused_with_the_difference(everyone):
    folder, chosen = everyone
    other = make_suite({**chosen.config(), "steps": 4, "batch_size": 5}, "x")
    with pytest.raises(EvaluationError, match="holds another run; choose another folder") as caught:
        start(folder.path, other)
    assert "batch_size: 4 there, 5 now" in str(caught.value)
    assert "steps: 3 there, 4 now" in str(caught.value)


def test_other_images_or_weights_are_refused(everyone, classifier):
    folder, chosen = everyone
    source = suite_inputs(chosen)
    fewer = Inputs(source.classifier, lambda model: source.dataset(model).limited(11), source.kinds)
    with pytest.raises(EvaluationError, match=r"data\.images: 12 there, 11 now"):
        start(folder.path, chosen, source=fewer)
    changed = load_classifier("cifar10-robust")
    with torch.no_grad():
        next(changed.model.parameters()).add_(1e-3)
    object.__setattr__(changed, "file_sha256", None)
    with pytest.raises(EvaluationError, match="cifar10-robust: sha256: "):
        start(folder.path, chosen, source=Inputs(lambda _: changed, source.dataset, source.kinds))


def test_other_versions_are_a_warning(everyone, monkeypatch):
    folder, chosen = everyone
    session = folder.sessions()[-1]
    session["versions"]["torch"] = "2.4.0"
    folder.write_session(session)
    said = []
    start(folder.path, chosen, say=said.append)
    assert len(said) == 2
    assert "continued with other versions: torch 2.4.0 then" in said[0]
    assert said[1] == "resuming: 120 of 120 results kept"
    assert said[0] in folder.manifest()["warnings"]


# Attacks and models that misbehave


def with_attacks(path, functions, **more):
    chosen = suite(attacks=[{"name": f"mine:{label}", "label": label} for label in functions])
    kinds = {label: user_attack(label, function) for label, function in functions.items()}
    return start(path, chosen, source=suite_inputs(chosen, kinds), **more)[0]


def test_what_cannot_be_scored_is_neither_success_nor_failure(tmp_path):
    def crashes(model):
        def run(images, labels):
            raise RuntimeError("out of ideas\nand more")

        return run

    def half_outside(images, labels):
        adversarials = images.clone()
        adversarials[::2] += 2
        return adversarials

    def broken(images, labels):
        adversarials = images.clone()
        adversarials[0, 0, 0, 0] = float("nan")
        return adversarials

    folder = with_attacks(
        tmp_path / "r",
        {
            "crash": crashes,
            "outside": lambda model: half_outside,
            "ball": lambda model: lambda images, labels: 1 - images,
            "nan": lambda model: broken,
            "shape": lambda model: lambda images, labels: images[:1, :, :2],
            "list": lambda model: lambda images, labels: images.tolist(),
            "fine": lambda model: lambda images, labels: images,
        },
    )
    found = {label: rows_of(folder, label) for label in ("crash", "outside", "ball", "nan", "shape", "list", "fine")}
    wrong = found["fine"]["status"] == "misclassified"
    assert 0 < wrong.sum() < 12
    for label, status, message in (
        ("crash", "error", "RuntimeError: out of ideas"),
        (
            "shape",
            "error",
            "ValueError: returned shape (1, 3, 2, 32) for images of shape (4, 3, 32, 32): let it return one image",
        ),
        ("list", "error", "ValueError: returned list instead of a tensor: let it return the adversarial images alone"),
        ("ball", "invalid", "left the ball: linf norm"),
    ):
        attacked = found[label][~wrong]
        assert set(attacked["status"]) == {status}, label
        assert message in attacked["message"].iloc[0], label
        assert attacked["success"].isna().all()
    assert set(found["outside"]["status"]) == {"ok", "invalid", "misclassified"}
    assert (
        "left the bounds: pixels from"
        in found["outside"].loc[found["outside"]["status"] == "invalid", "message"].iloc[0]
    )
    assert "returned NaN or infinite pixels" in found["nan"]["message"].dropna().tolist()
    assert (found["nan"]["status"] == "ok").any()
    assert (found["fine"].loc[~wrong, "success"] == False).all()  # noqa: E712 - a nullable column


def test_what_images_take_is_said_before_it_is_taken(tmp_path, monkeypatch):
    said, path = [], tmp_path / "r"
    chosen = suite(attacks=["FGSM"], save_images="all")
    start(path, chosen, say=lambda text: said.append((text, (path / "images").exists())))
    monkeypatch.setattr(Plan, "image_bytes", lambda _: 2 * 10**19)
    start(tmp_path / "large", chosen, say=lambda text: said.append((text, (tmp_path / "large" / "images").exists())))
    ((text, begun),) = [entry for entry in said if "images take" in entry[0]]  # a few are not worth a line
    assert f"up to 20,000,000,000,000 MB in {tmp_path}/large/images" in text
    assert re.search(r"the disk has [\d,]+ MB left$", text)
    assert not begun


def test_memory_that_runs_out_halves_the_batch_and_says_so_once(tmp_path):
    sizes, said = [], []

    def hungry(model):
        def run(images, labels):
            sizes.append(len(images))
            if len(images) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return images

        return run

    chosen = suite(attacks=[{"name": "mine:hungry", "label": "hungry"}], batch_size=8)
    source = suite_inputs(chosen, {"hungry": user_attack("hungry", hungry)})
    folder, done = start(tmp_path / "r", chosen, source=source, say=said.append)
    assert done
    assert (rows_of(folder, "hungry")["status"].isin(["ok", "misclassified"])).all()
    assert said[0] == f"hungry: out of memory with {sizes[0]} images at a time; going on with {sizes[0] // 2}"
    assert len(said) == len(set(said)) <= 2  # said at each halving, not at each batch
    refused = [n for n in sizes if n > 2]
    assert sizes[-1] <= 2
    assert len(refused) <= 1 + 2  # the first batch, and its halves if they are still too large


def test_memory_that_runs_out_on_the_clean_images_halves_the_batch_too(tmp_path, classifier):
    class Hungry(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = classifier.model

        def forward(self, images):
            if len(images) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return self.model(images)

    said = []
    chosen = suite(attacks=["FGSM"], batch_size=8)
    hungry = replace(classifier, model=Hungry().eval())
    source = suite_inputs(chosen, classifiers={"cifar10-robust": hungry})
    folder, done = start(tmp_path / "r", chosen, source=source, say=said.append)
    assert done
    assert (folder.read("clean", "cifar10-robust")["status"] == "ok").all()
    assert (rows_of(folder, "FGSM")["status"] != "error").all()
    assert said == ["out of memory with 8 images at a time; going on with 4",
                    "out of memory with 4 images at a time; going on with 2"]  # fmt: skip


def test_an_attack_that_drops_the_fooled_gets_several_batches_and_the_model_one_at_a_time(
    tmp_path, classifier, monkeypatch
):
    sizes, pools, forward = [], [], jobs.CallCounter.forward
    monkeypatch.setattr(jobs.CallCounter, "forward", lambda self, x: (sizes.append(len(x)), forward(self, x))[1])
    measured = jobs.Part._measured
    monkeypatch.setattr(
        jobs.Part, "_measured", lambda self, e, r, b: (pools.append(len(b)), measured(self, e, r, b))[1]
    )
    early = {"name": "OrthoPGD", "early_stop": True, "optimize": "none"}  # a copy's calls are not seen here
    chosen = suite(attacks=[early], batch_size=2, shard_size=12, steps=8)
    folder, _ = start(tmp_path / "r", chosen)
    assert max(pools) > 2
    assert set(sizes) == {1, 2}
    rows = rows_of(folder, "OrthoPGD")
    rows = rows[rows["status"] == "ok"]
    looked = sum(sizes) - int(rows["forward_calls"].sum())  # at one image, alone and beside others, once: not counted
    assert looked in (3, 5, 7)
    assert sizes.count(1) < len(sizes) / 2  # packed: otherwise the late steps are one image at a time
    plain, _ = start(tmp_path / "p", suite(attacks=["OrthoPGD"], steps=8))
    other = rows_of(plain, "OrthoPGD")
    assert (rows["success"] == other[other["status"] == "ok"]["success"]).all()


def test_an_optimized_attack_is_counted_and_judged_like_the_others(tmp_path):
    small = {"name": "PGD", "loss": "ce", "schedule": "fixed"}  # steps that do not make much of a rounding error
    both = [small | {"optimize": "none", "label": "the model"}, small]
    folder, _ = start(tmp_path / "r", suite(attacks=both))
    one, two = (rows_of(folder, label) for label in ("the model", "PGD"))
    assert (one["success"] == two["success"]).all()
    assert (one["gradient_calls"] == two["gradient_calls"]).all()
    np.testing.assert_allclose(*(rows["margin"].to_numpy(float, na_value=np.nan) for rows in (one, two)), atol=0.1)


class Changed(nn.Module):
    """The robust model with its answer changed."""

    def __init__(self, model, change):
        super().__init__()
        self.model, self.change = model, change

    def forward(self, images):
        return self.change(self.model(images), images)


def with_model(path, classifier, change, said=None, **more):
    from dataclasses import replace

    changed = replace(classifier, model=Changed(classifier.model, change).eval(), file_sha256=None)
    chosen = suite(**more)
    dataset = suite_inputs(chosen).dataset
    source = Inputs(lambda _: changed, dataset, chosen.kinds())
    return start(path, chosen, source=source, say=(said if said is not None else []).append)[0]


def test_a_model_that_answers_at_random_is_judged_by_repetition(tmp_path, classifier):
    said = []
    folder = with_model(
        tmp_path / "a", classifier, lambda logits, _: logits + torch.randn_like(logits), said, attacks=["FGSM"]
    )
    assert any("answers at random: each image is judged by 10 evaluations" in line for line in said)
    rows = rows_of(folder, "FGSM")
    attacked = rows[rows["status"] == "ok"]
    assert set(attacked["evaluations"]) == {10}
    assert attacked["wrong_share"].between(0, 1).all()
    assert ((attacked["wrong_share"] > 0.5) == attacked["success"]).all()
    assert attacked["wrong_share"].nunique() > 2
    again = with_model(
        tmp_path / "b", classifier, lambda logits, _: logits + torch.randn_like(logits), attacks=["FGSM"]
    )
    assert_same(contents(folder.path), contents(again.path))


def test_a_model_that_answers_nan_is_an_error_not_a_success(tmp_path, classifier):
    def sometimes(logits, images):
        return torch.where(images.mean((1, 2, 3))[:, None] > 0.5, torch.nan, logits)

    folder = with_model(tmp_path / "r", classifier, sometimes, attacks=["foolbox:FGSM"])
    looked, rows = folder.read("clean", "cifar10-robust"), rows_of(folder, "foolbox:FGSM")
    broken = looked["status"] == "error"
    assert 0 < broken.sum() < 12
    assert set(looked.loc[broken, "message"]) == {"the model's answer is NaN or infinite"}
    assert (rows.loc[broken, "status"] == "error").all()
    assert rows.loc[broken, "success"].isna().all()


def test_a_doubtful_model_is_named_at_once(tmp_path, classifier):
    said = []
    with_model(tmp_path / "r", classifier, lambda logits, _: logits.softmax(1), said)
    assert any("returns probabilities, not logits" in line for line in said)


def test_an_image_that_cannot_be_read_is_a_row_that_says_so(tmp_path, classifier):
    from PIL import Image

    names = [str(k) for k in range(10)]
    for name in names:
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32), (25 * int(name), 99, 9)).save(tmp_path / "data" / name / "a.png")
    (tmp_path / "data" / "4" / "a.png").write_bytes(b"\x89PNG not really")
    chosen = suite(data=str(tmp_path / "data"), attacks=["FGSM"])
    folder, done = start(tmp_path / "r", chosen)
    assert done
    rows = rows_of(folder, "FGSM").set_index("name")
    assert rows.loc["4/a.png", "status"] == "unreadable"
    assert rows.loc["4/a.png", "message"]
    assert (rows.drop("4/a.png")["status"] != "unreadable").all()
    assert folder.read("clean", "cifar10-robust").set_index("name").loc["4/a.png", "status"] == "unreadable"


def test_the_misclassified_are_attacked_if_asked_and_change_no_rate(tmp_path, everyone):
    folder, _ = everyone
    other, _ = start(tmp_path / "r", suite(attacks=["OrthoPGD"], attack_misclassified=True))
    before, after = rows_of(folder, "OrthoPGD"), rows_of(other, "OrthoPGD")
    assert (after["status"] == before["status"]).all()
    wrong = after["status"] == "misclassified"
    assert after.loc[wrong, "linf"].notna().all()
    assert after.loc[wrong, "success"].isna().all()


# Memory and decoding


def test_of_the_checks_pgds_images_are_kept_and_tried_on_the_other_model(tmp_path):
    close = Net()
    close.head.weight.data += 0.02 * torch.randn(close.head.weight.shape, generator=torch.Generator().manual_seed(1))
    run = evaluate(
        [classifier_of(Net(), "a"), classifier_of(close, "b")], dataset(), ["FGSM"], out=tmp_path / "r", eps=EPS,
        steps=3, batch_size=4, shard_size=6, check_images=9, checks=True, progress=False, report=False,
    )  # fmt: skip
    (eps,) = {probe["eps"] for probe in run.manifest["probes"] if probe["label"] == "PGD"}
    for model, other, net in (("a", "b", close), ("b", "a", Net())):
        kept = dict(run.folder.images(model, "PGD", eps, kind="checks"))
        rows = run.folder.read("checks", model, "PGD", eps).set_index("position")
        assert sorted(kept) == rows.index[rows["status"] == "ok"].tolist() != []
        tried = run.folder.read("checks", other, f"{TRANSFER}{model}", eps).set_index("position")
        tried = tried[tried["status"] == "ok"]
        assert len(tried) > 4
        assert set(tried.index) <= set(kept)
        answers = net.eval()(torch.stack([kept[position] for position in tried.index])).argmax(1)
        assert tried["adversarial_prediction"].tolist() == answers.tolist()
    labels = {path.parent.parent.name for path in (run.folder.path / "checks").rglob("*.safetensors")}
    assert labels == {"PGD"}


def test_what_a_person_should_know_of_models_and_images_is_said_once_and_kept(tmp_path, capsys):
    nets = [replace(classifier_of(Net(), name), notes=("resized",)) for name in "ab"]
    run = evaluate(
        nets, replace(dataset(), notes=("names were guessed",)), ["FGSM"], out=tmp_path / "r", eps=EPS, checks=False,
        progress=False, report=False,
    )  # fmt: skip
    (session,) = run.folder.sessions()
    said = capsys.readouterr().err
    for note in ("a: resized", "b: resized", "names were guessed"):
        assert session["warnings"].count(note) == said.count(note) == 1


def test_who_may_still_do_the_same_work_in_a_store_is_named():
    folder, said = RunFolder("memory://bucket/working"), []
    others = [(1, "running", None), (2, "complete", None), (3, "running", "1/2")]
    for process, outcome, shard in others:
        about = {"host": "far", "process": process, "started": "today", "warnings": []}
        folder.write_session({"id": f"{process:05d}", "outcome": outcome, "shard": shard, **about})
    with _working_in(folder, None, {"shard": None}, said.append):
        pass
    (message,) = said
    assert message.startswith("process 1 on far, since today, has not ended its work on memory://bucket/working")


def test_no_more_than_two_chunks_are_decoded_ahead():
    lock, loaded, taken = threading.Lock(), set(), set()
    most = 0

    def load(position):
        nonlocal most
        with lock:
            loaded.add(position)
            most = max(most, len(loaded - taken))
        return torch.zeros(1)

    decoder = Decoder(load)
    chunks = [range(k, k + 5) for k in range(0, 100, 5)]
    for chunk, following in zip(chunks, [*chunks[1:], ()], strict=True):
        images = decoder.take(chunk)
        decoder.begin(following)
        assert list(images) == list(chunk)
        time.sleep(0.002)
        with lock:
            taken |= set(chunk)
    decoder.close()
    assert loaded == set(range(100))
    assert most <= 10


def test_what_goes_wrong_in_decoding_comes_with_its_position():
    def load(position):
        if position == 3:
            raise ValueError("no picture")
        return torch.full((1,), float(position))

    decoder = Decoder(load)
    images = decoder.take(range(3)) | decoder.take(range(3, 5))
    decoder.close()
    assert isinstance(images[3], ValueError)
    assert [float(images[k]) for k in (0, 1, 2, 4)] == [0, 1, 2, 4]


def test_what_was_decoded_for_nothing_is_given_up():
    decoder = Decoder(lambda k: torch.full((1,), float(k)))
    decoder.begin(range(4))
    decoder.begin(range(2, 6))
    assert list(decoder.take(range(10, 13))) == [10, 11, 12]
    assert float(decoder.take([3])[3]) == 3
    decoder.close()


def test_decoding_stops_when_nobody_takes_it_any_more():
    before = threading.active_count()
    decoder = Decoder(lambda k: torch.zeros(1))
    decoder.take(range(4))
    decoder.begin(range(100))
    decoder.close()
    assert threading.active_count() == before


def test_a_folder_is_listed_and_looked_at_once_for_all_models_of_the_same_classes(tmp_path, monkeypatch):
    for k in range(CLASSES):
        (tmp_path / "data" / str(k)).mkdir(parents=True)
        Image.new("RGB", (SIZE, SIZE), (40 * k, 9, 9)).save(tmp_path / "data" / str(k) / "a.png")
    counted: Counter[str] = Counter()

    def counting(function):
        def wrapped(*arguments):
            counted[function.__name__] += 1
            return function(*arguments)

        return wrapped

    monkeypatch.setattr(load, "_files_by_folder", counting(load._files_by_folder))
    monkeypatch.setattr(ImageDataset, "fingerprint", counting(ImageDataset.fingerprint))
    nets = [classifier_of(Net(seed), f"net{seed}") for seed in range(3)]
    named = replace(classifier_of(Net(), "named"), classes=tuple("abcde"))
    options = {"eps": EPS, "checks": False, "progress": False, "report": False}
    run = evaluate(nets, str(tmp_path / "data"), ["FGSM"], out=tmp_path / "run", **options)
    assert counted == {"_files_by_folder": 1, "fingerprint": 1}
    assert len({one["data"]["fingerprint"] for one in run.manifest["models"]}) == 1
    named = [named, nets[0], replace(named, name="again")]
    evaluate(named, str(tmp_path / "data"), ["FGSM"], out=tmp_path / "two", **options)
    assert counted == {"_files_by_folder": 3, "fingerprint": 3}  # once for each list of classes


def test_only_one_model_is_kept(tmp_path):
    chosen = suite(models=["cifar10-standard", "cifar10-robust"], data={"source": "cifar10-samples", "limit": 2})
    source = suite_inputs(chosen)
    assert source.classifier("cifar10-standard") is source.classifier("cifar10-standard")
    first = source.classifier("cifar10-standard")
    source.classifier("cifar10-robust")
    assert source.classifier("cifar10-standard") is not first
    assert load_dataset("cifar10-samples", first).names
    assert GALLERY > 0
    assert os.getpid() > 0

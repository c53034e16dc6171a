"""Runs towards classes: which they are, what counts as success, and what the results say of it."""

from __future__ import annotations

import json

import pytest
import torch

from orthattack import PGD
from orthattack.attacks import Card
from orthattack.eval.attacks.load import attack_kind
from orthattack.eval.errors import EvaluationError
from orthattack.eval.results.stored_run import Run
from tests.eval.tiny import CLASSES, Net, dataset, evaluated, images_of

EPS = 0.3


def model():
    return Net().eval()


def seen(run: Run, attack: str):
    """The rows of an attack's right images, and what the model makes of the stored adversarials."""
    rows = run.rows("net", attack, EPS).set_index("position")
    images = dict(run.folder.images("net", attack, EPS))
    return rows, {k: int(model()(image[None]).argmax(1)) for k, image in images.items()}


ATTACKS = ["PGD", "OrthoPGD", "foolbox:PGD", {"name": "Square", "queries": 300}]


def test_a_random_target_is_the_same_for_all_attacks_and_does_not_depend_on_batches(tmp_path):
    asked: dict[str, list[tuple[tuple[float, ...], int]]] = {}

    def recorder(name):
        def factory(model, eps, targeted=False):
            assert targeted

            def attack(images, labels):
                asked.setdefault(name, []).extend(
                    (tuple(x.flatten()[:4].tolist()), int(label)) for x, label in zip(images, labels, strict=True)
                )
                return PGD(model, eps=eps, steps=3, targeted=True)(images, labels)

            return attack

        return factory

    attacks = {"mine": recorder("mine"), "other": recorder("other"), "PGD": "PGD"}
    run = evaluated(tmp_path / "a", attacks, eps=EPS, targets="random")
    assert sorted(asked["mine"]) == sorted(asked["other"])
    labels, images = dataset().labels, images_of()
    target_of = dict(asked["mine"])
    targets = {k: target_of.get(tuple(images[k].flatten()[:4].tolist())) for k in range(len(labels))}
    assert all(target != label for target, label in zip(targets.values(), labels, strict=True))
    assert len({targets[k] for k in range(9)}) > 1
    for label in attacks:
        rows, predicted = seen(run, label)
        right = [k for k in rows.index if rows.loc[k, "status"] == "ok"]
        assert len(right) == 9
        assert [bool(rows.loc[k, "success"]) for k in right] == [predicted[k] == targets[k] for k in right]
        assert rows.loc[right, "success"].any()
    asked.clear()
    evaluated(tmp_path / "b", {"mine": recorder("mine")}, eps=EPS, targets="random", batch_size=3, shard_size=5)
    assert dict(asked["mine"]) == target_of
    asked.clear()
    evaluated(tmp_path / "c", {"mine": recorder("mine")}, eps=EPS, targets="random", seeds=[1])
    assert dict(asked["mine"]) != target_of


def test_the_least_likely_class_is_the_models_and_the_results_count_what_reached_it(tmp_path):
    run = evaluated(tmp_path / "run", ATTACKS, eps=EPS, targets="least-likely", report=True)
    x, labels = images_of(), torch.tensor(dataset().labels)
    with torch.no_grad():
        least = model()(x).scatter(1, labels[:, None], torch.inf).argmin(1)
    table, confusion = run.table().set_index("attack"), run.confusion("net", EPS)
    for attack in run.attacks:
        rows, predicted = seen(run, attack)
        right = [k for k in range(10) if rows.loc[k, "status"] == "ok"]
        reached = [predicted[k] == int(least[k]) for k in right]
        assert [bool(rows.loc[k, "success"]) for k in right] == reached
        assert 0 < sum(reached) == table.loc[attack, "fooled"]
        assert table.loc[attack, "robust"] == 9 - sum(reached)
        pairs = [(int(labels[k]), predicted[k], int(least[k])) for k in right if predicted[k] != labels[k]]
        own = confusion[confusion["attack"] == attack]
        assert {(r.label, r.prediction): (r.images, r.success) for r in own.itertuples()} == {
            (label, to): (
                sum(p[:2] == (label, to) for p in pairs),
                sum(p[:2] == (label, to) and p[2] == to for p in pairs),
            )
            for label, to, _ in pairs
        }
    stored = json.loads((tmp_path / "run" / "confusion.json").read_text("utf-8"))
    assert sum(row["success"] for row in stored) == sum(table.loc[list(run.attacks), "fooled"])
    for name in ("results.md", "report.html"):
        text = (tmp_path / "run" / name).read_text("utf-8")
        assert "Taken for" in text
        assert "least-likely" in text
    assert run.attacks["OrthoPGD"]["loss"] == "ce"  # as Foolbox's, to which it is compared
    assert "foolbox:PGD" in run.attacks["OrthoPGD"]["baselines"]


def test_targets_of_a_file(tmp_path):
    labels, names = dataset().labels, dataset().names
    path = tmp_path / "targets.csv"
    wanted = [(label + 2) % CLASSES for label in labels]
    path.write_text("file,label,target\n" + "".join(f"{n},{k},{t}\n" for n, k, t in zip(names, labels, wanted)))  # noqa: B905
    run = evaluated(tmp_path / "run", ["PGD"], eps=EPS, targets=str(path))
    rows, predicted = seen(run, "PGD")
    assert [bool(rows.loc[k, "success"]) for k in range(9)] == [predicted[k] == wanted[k] for k in range(9)]
    again = path.read_text().replace(f"09,{labels[9]},{wanted[9]}", f"09,{labels[9]},{(labels[9] + 3) % CLASSES}")
    path.write_text(again)
    with pytest.raises(EvaluationError, match="holds another run"):
        evaluated(tmp_path / "run", ["PGD"], eps=EPS, targets=str(path))
    for text, said in (
        ("file,label\n", "must have columns file and target; it has file, label"),
        ("file,target\n00,x\n", "line 2: target must be a class index >= 0; got 'x'"),
        ("file,target\n00,1\n", "has no target for"),
        ("file,target\n" + "".join(f"{n},{k}\n" for n, k in zip(names, labels)), "below 5 and not its label"),  # noqa: B905
    ):
        path.write_text(text)
        with pytest.raises(EvaluationError, match=said):
            evaluated(tmp_path / "other", ["PGD"], eps=EPS, targets=str(path))


@pytest.mark.parametrize(
    ("attack", "said"),
    [
        ("foolbox:FGSM", "foolbox:FGSM cannot be given classes to reach, as the run's targets ask: leave it out"),
        ({"mine": lambda model: PGD(model)}, "let it take targeted, which is then true, as an argument"),
    ],
)
def test_what_cannot_be_given_classes_is_refused_at_once(tmp_path, attack, said):
    attacks = attack if isinstance(attack, dict) else [attack]
    with pytest.raises(EvaluationError, match=said):
        evaluated(tmp_path / "run", attacks, targets="random")
    assert not (tmp_path / "run" / "manifest.json").exists()


def test_torchattacks_that_have_no_targeted_mode_are_refused():
    pytest.importorskip("torchattacks")
    attack_kind("torchattacks:PGD", {}).check("linf", 3, None, True)
    with pytest.raises(EvaluationError, match="torchattacks:DeepFool cannot be given classes to reach"):
        attack_kind("torchattacks:DeepFool", {}).check("l2", 3, None, True)


def test_a_users_function_says_that_it_is_minimal(tmp_path):
    asked = []

    def smallest(model, eps):
        asked.append(eps)
        return PGD(model, eps=EPS, steps=3)

    def attack(model, eps):
        made = smallest(model, eps)
        return lambda images, labels: made(images, labels)

    attack.card = Card("mine", minimal=True)
    run = evaluated(tmp_path / "run", {"mine": attack}, eps=[0.1, EPS])
    assert run.attacks["mine"]["minimal"]
    assert None in asked
    assert not {0.1, EPS} & set(asked)
    assert run.radii_of("mine") == [None]
    assert run.table().set_index(["attack", "eps"]).loc[("mine", EPS), "fooled"] > 0

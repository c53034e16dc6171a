"""One model at work on one chunk: who is attacked, in which batches, what is stored of each image."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from orthattack.eval.attacks.kind import AttackKind, Conditions, Found
from orthattack.eval.attacks.user import user_attack
from orthattack.eval.data.dataset import Unreadable
from orthattack.eval.errors import out_of_memory
from orthattack.eval.running import chunk
from orthattack.eval.running.chunk import Job, Part
from orthattack.eval.storage.run_folder import RunFolder, Shard
from orthattack.eval.suite import AttackSpec, Entry
from tests.eval.tiny import CLASSES, COUNT, Net, classifier, dataset, images_of

EPS = 0.5
CPU = torch.device("cpu")


class Seen(Net):
    def __init__(self):
        super().__init__()
        self.sizes = []

    def forward(self, images):
        self.sizes.append(len(images))
        return super().forward(images)


@pytest.fixture
def folder(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.create()
    return folder


@pytest.fixture
def job(folder):
    said = []
    made = Job("net", classifier(Seen()), dataset(), CPU, folder, 4, said.append)
    made.said = said
    made.judge.model.sizes.clear()
    return made


def part_of(job, keep=(), kind="shards", broken=(), positions=range(COUNT)):
    images = {k: images_of()[k] for k in positions} | dict(broken)
    return Part(job, 3, images, frozenset(keep), kind)


def entry_of(kind: AttackKind, eps=EPS, seed=0) -> Entry:
    return Entry(AttackSpec(name=kind.name, label=kind.name), kind, "linf", eps, seed, kind.name)


def attacked(part, factory, name="mine", eps=EPS, misclassified=False):
    """What is stored of an attack that is a function of the model, by position, and what it said."""
    entry = entry_of(user_attack(name, factory), eps)
    bound = part.job.bound(entry, Conditions("linf", eps, 3, CLASSES, 4))
    images, *robust = part.attack(bound, misclassified)
    assert images == len(part.positions)
    shard = Shard("net", name, eps, 3, part.kind)
    return part.job.folder.read_shard(shard).set_index("position"), tuple(robust)


def still(model):
    return lambda images, labels: images


def away(model):
    """Every image becomes the same grey one, which is of one class."""
    return lambda images, labels: 0.5 + 0 * images


def test_what_the_model_makes_of_each_image_is_stored_and_recalled(job):
    part = part_of(job, keep=[2, 5], broken=[(4, Unreadable("04", "a pipe")), (6, ValueError("odd\nmore"))])
    part.look()
    rows = job.folder.read_shard(Shard("net", "clean", None, 3, "clean")).set_index("position")
    assert rows.index.tolist() == list(range(COUNT))
    assert rows["status"].tolist() == ["unreadable" if k in (4, 6) else "ok" for k in range(COUNT)]
    assert rows.loc[4, "message"] == "a pipe"
    assert rows.loc[6, "message"] == "ValueError: odd"
    readable = [k for k in range(COUNT) if k not in (4, 6)]
    assert part.right == {k: k != COUNT - 1 for k in readable}
    assert rows["name"].tolist() == [f"{k:02d}" for k in range(COUNT)]
    assert rows["label"].tolist() == list(job.dataset.labels)
    for k in readable:
        logits = Net().eval()(images_of()[k][None])[0]
        assert part.predictions[k] == rows.loc[k, "prediction"] == int(logits.argmax())
        assert rows.loc[k, "logit_max"] == pytest.approx(float(logits.detach().max()), abs=1e-5)
    assert sorted(dict(job.folder.images("net", "clean", None))) == [2, 5]
    job.judge.model.sizes.clear()
    again = part_of(job, broken=[(4, Unreadable("04", "a pipe")), (6, ValueError("odd"))])
    again.look()
    assert job.judge.model.sizes == []
    assert (again.right, again.predictions) == (part.right, part.predictions)
    assert list(again.right) == list(part.right)


def test_the_checks_look_again_and_store_nothing(job):
    part_of(job).look()
    job.judge.model.sizes.clear()
    part = part_of(job, kind="checks", positions=[1, 2, 3])
    part.look()
    assert job.judge.model.sizes == [3]
    assert list(part.right) == [1, 2, 3]
    assert not list((job.folder.path / "checks").rglob("*.parquet"))


def test_the_model_is_asked_about_as_many_as_a_batch(job):
    part_of(job).look()
    assert sorted(job.judge.model.sizes) == [2, 4, 4]


def test_a_model_that_fails_on_some_images_is_an_error_there(job):
    part = part_of(job)
    model = job.judge.model.forward

    def fails(images):
        if bool((images == images_of()[5]).all(dim=(1, 2, 3)).any()):
            raise RuntimeError("cannot\nnow")
        return model(images)

    job.judge.model.forward = fails
    part.look()
    rows = job.folder.read_shard(Shard("net", "clean", None, 3, "clean")).set_index("position")
    assert rows["status"].tolist() == ["error" if 4 <= k < 8 else "ok" for k in range(COUNT)]
    assert rows.loc[5, "message"] == "RuntimeError: cannot"
    job.judge.model.forward = model
    found, robust = attacked(part, still)
    assert found["status"].tolist()[4:8] == ["error"] * 4
    assert found.loc[4, "message"] == "RuntimeError: cannot"
    assert robust == (5, 6)


def test_only_what_is_right_is_attacked_unless_it_is_asked_for(job):
    part = part_of(job, keep=[0, 9])
    part.look()
    rows, robust = attacked(part, still)
    assert robust == (9, 10)
    assert rows["status"].tolist() == ["ok"] * 9 + ["misclassified"]
    assert rows["success"].tolist()[:9] == [False] * 9
    assert rows["success"].isna().tolist() == [False] * 9 + [True]
    assert rows["clean_prediction"].tolist() == [part.predictions[k] for k in range(COUNT)]
    assert rows["linf"].tolist()[:9] == [0] * 9
    assert rows["linf"].isna().tolist()[9]
    assert sorted(dict(job.folder.images("net", "mine", EPS))) == [0]
    rows, robust = attacked(part, still, "again", misclassified=True)
    assert robust == (9, 10)
    assert rows["status"].tolist() == ["ok"] * 9 + ["misclassified"]
    assert rows.loc[9, "linf"] == 0
    assert sorted(dict(job.folder.images("net", "again", EPS))) == [0, 9]


def test_successes_are_counted_and_calls_are_shared_among_a_batch(job):
    part = part_of(job)
    part.look()

    def twice(model):
        def attack(images, labels):
            for _ in range(2):
                leaf = images.clone().requires_grad_()
                torch.autograd.grad(model(leaf).sum(), leaf)
            model(images[:1])
            return 0.5 + 0 * images

        return attack

    rows, (robust, scored) = attacked(part, twice, eps=1.0)
    grey = int(Net().eval()(torch.full((1, 3, 8, 8), 0.5)).argmax())
    fooled = [label != grey for label in rows["label"].tolist()[:9]]
    assert rows["success"].tolist()[:9] == fooled
    assert rows["adversarial_prediction"].tolist()[:9] == [grey] * 9
    assert (robust, scored) == (9 - sum(fooled), 10)
    assert rows["forward_calls"].tolist()[:9] == [2.25] * 8 + [3]
    assert rows["gradient_calls"].tolist()[:9] == [2] * 9
    assert (rows["seconds"][:9] > 0).all()
    assert rows["promised_cosine"].isna().all()


def test_what_an_attack_counts_itself_is_taken(job):
    part = part_of(job)
    part.look()

    def bind(model, conditions):
        assert conditions == Conditions("linf", EPS, 3, CLASSES, 4)

        def run(images, labels, seeds):
            n = len(images)
            return Found(
                images, steps=torch.arange(n), forward_calls=torch.arange(n) + 10, gradient_calls=5 + 0 * labels
            )

        return run

    kind = user_attack("mine", still)
    kind = AttackKind("mine", "user", {}, kind.card, ("linf",), bind)
    bound = job.bound(entry_of(kind), Conditions("linf", EPS, 3, CLASSES, 4))
    part.attack(bound, False)
    rows = job.folder.read_shard(Shard("net", "mine", EPS, 3))
    assert rows["steps"].tolist()[:9] == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    assert rows["forward_calls"].tolist()[:9] == [10, 11, 12, 13] * 2 + [10]
    assert rows["gradient_calls"].tolist()[:9] == [5] * 9


def test_an_attack_that_fails_is_an_error_of_its_batch_or_of_all(job):
    part = part_of(job)
    part.look()
    calls = []

    def now_and_then(model):
        def attack(images, labels):
            calls.append(len(images))
            if len(calls) == 2:
                raise KeyError("second")
            return images

        return attack

    rows, robust = attacked(part, now_and_then)
    assert calls == [4, 4, 1]
    assert rows["status"].tolist() == ["ok"] * 4 + ["error"] * 4 + ["ok", "misclassified"]
    assert rows.loc[5, "message"] == "KeyError: 'second'"
    assert rows.loc[5, "clean_prediction"] == part.predictions[5]
    assert robust == (5, 6)

    def unmade(model):
        raise ValueError("no such thing")

    rows, robust = attacked(part, unmade, "unmade")
    assert rows["status"].tolist() == ["error"] * 9 + ["misclassified"]
    assert rows.loc[0, "message"] == "ValueError: no such thing"
    assert robust == (0, 0)


@pytest.mark.parametrize("when", ["made", "run"])
def test_an_interrupt_is_no_attacks_failure(job, when):
    part = part_of(job)
    part.look()

    def interrupted(*_):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        attacked(part, interrupted if when == "made" else lambda _: interrupted)
    assert not job.folder.is_done(Shard("net", "mine", EPS, 3), COUNT)


@pytest.mark.parametrize(
    "error", [MemoryError(), torch.OutOfMemoryError("x"), RuntimeError("can't allocate memory: y")]
)
def test_a_batch_that_does_not_fit_is_halved_and_later_ones_begin_smaller(job, error):
    part = part_of(job)
    part.look()
    calls = []

    def greedy(model):
        def attack(images, labels):
            calls.append(len(images))
            if len(images) > 2:
                raise error
            return images

        return attack

    rows, robust = attacked(part, greedy)
    assert calls == [4, 2, 2, 2, 2, 1]
    assert rows["status"].tolist() == ["ok"] * 9 + ["misclassified"]
    assert robust == (9, 10)
    assert job.said == ["mine: out of memory with 4 images at a time; going on with 2"]
    assert (job.batch_size, job.judge.batch_size, job.was_halved) == (4, 4, False)  # for nobody else
    calls.clear()
    attacked(part, greedy)
    assert calls == [2, 2, 2, 2, 1]
    assert len(job.said) == 1


def test_where_one_of_ours_does_not_fit_later_batches_of_all_begin_smaller(job):
    part = part_of(job)
    part.look()
    calls = []

    def bind(model, conditions):
        def run(images, labels, seeds):
            calls.append(len(images))
            if len(images) > 2:
                raise MemoryError
            return Found(images)

        return run

    kind = AttackKind("PGD", "orthattack", {}, user_attack("a", still).card, ("linf",), bind, is_foreign=False)
    part.attack(job.bound(entry_of(kind), Conditions("linf", EPS, 3, CLASSES, 4)), False)
    assert calls == [4, 2, 2, 2, 2, 1]
    assert job.said == ["out of memory with 4 images at a time; going on with 2"]
    assert (job.batch_size, job.judge.batch_size, job.was_halved) == (2, 2, True)


def test_one_image_that_does_not_fit_is_an_error(job):
    part = part_of(job)
    part.look()

    def greedy(model):
        def attack(images, labels):
            raise MemoryError("too much")

        return attack

    rows, robust = attacked(part, greedy)
    assert rows["status"].tolist() == ["error"] * 9 + ["misclassified"]
    assert rows.loc[0, "message"] == "MemoryError: too much"
    assert robust == (0, 0)
    assert (job.batch_size, job.sizes) == (4, {"mine": 1})


def test_other_errors_do_not_halve(job):
    assert not out_of_memory(RuntimeError("another"))
    assert not out_of_memory(ValueError("can't allocate memory"))


def test_attacks_that_pack_are_given_several_batches_until_memory_runs_out(job):
    part = part_of(job, positions=range(9))
    part.look()
    sizes = []

    def bind(model, conditions):
        def run(images, labels, seeds):
            sizes.append(len(images))
            return Found(images)

        return run

    kind = AttackKind("packs", "user", {}, user_attack("a", still).card, ("linf",), bind, early_stop=True)
    conditions = Conditions("linf", EPS, 3, CLASSES, 4, early_stop=True)
    assert chunk.POOL == 4
    job.batch_size = 2
    part.attack(job.bound(entry_of(kind), conditions), False)
    assert sizes == [8, 1]
    sizes.clear()
    job.was_halved = True
    part.attack(job.bound(entry_of(kind), conditions), False)
    assert sizes == [2, 2, 2, 2, 1]


def test_random_numbers_belong_to_the_image_and_the_seed(job):
    part = part_of(job)
    part.look()
    given = []

    def bind(model, conditions):
        def run(images, labels, seeds):
            given.extend(seeds)
            return Found((images + 0.1 * torch.rand(images.shape) + 0.1 * np.random.rand()).clamp(0, 1))

        return run

    kind = AttackKind("draws", "user", {}, user_attack("a", still).card, ("linf",), bind)

    def drawn(seed, positions=range(COUNT)):
        given.clear()
        some = part_of(job, keep=positions, positions=positions, kind="checks")
        some.look()
        entry = entry_of(kind, seed=seed)
        some.attack(job.bound(entry, Conditions("linf", EPS, 3, CLASSES, 4)), False)
        return list(given), dict(job.folder.images("net", "draws", EPS, kind="checks"))

    seeds, images = drawn(0)
    assert len(set(seeds)) == 9
    again, same = drawn(0)
    assert again == seeds
    assert all(torch.equal(images[k], same[k]) for k in images)
    assert set(drawn(1)[0]).isdisjoint(seeds)
    assert drawn(0, [7, 2])[0] == [seeds[7], seeds[2]]


def test_adversarials_of_another_model_are_tried_where_both_are_right(job):
    part = part_of(job, kind="checks")
    part.look()
    others = {k: images_of()[k] * 0 + 0.5 for k in (0, 3, 9)} | {5: images_of()[5]}
    shard = Shard("net", "PGD of b", 1.0, 3, "checks")
    part.transfer(shard, "linf", 1.0, others)
    rows = job.folder.read_shard(shard).set_index("position")
    assert rows["status"].tolist() == ["ok" if k in (0, 3, 5) else "misclassified" for k in range(COUNT)]
    grey = int(Net().eval()(torch.full((1, 3, 8, 8), 0.5)).argmax())
    for k in (0, 3):
        assert rows.loc[k, "success"] == (rows.loc[k, "label"] != grey)
        assert rows.loc[k, "adversarial_prediction"] == grey
    assert not rows.loc[5, "success"]


def test_a_job_counts_and_judges_in_evaluation_mode(folder):
    model = nn.Sequential(Net())
    model.train()
    made = Job("net", classifier(model), dataset(), CPU, folder, 4, pytest.fail)
    assert not any(module.training for module in made.counter.modules())
    assert made.differentiated == frozenset(range(COUNT))
    torch.testing.assert_close(made.load(3), images_of()[3])

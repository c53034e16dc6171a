"""A call with `batch_size` searches a few batches at a time: the same results, in the memory of those."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orthattack import attacks
from orthattack.attacks import MIFGSM, PGD, OrthoPGD, base
from orthattack.attacks.ascent import Climb
from orthattack.attacks.rules import chain, normalize, variance
from orthattack.attacks.task import Turns
from tests.attacks.test_memory import peak

COUNT = 37
IMAGES = torch.rand(COUNT, 3, 4, 4, generator=torch.Generator().manual_seed(1))
LABELS = torch.arange(COUNT) % 5


class Alone(nn.Module):
    """Its answer to an image is the same bit for bit in every batch: nothing here is a matrix product."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("weight", torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(2)))

    def forward(self, images: Tensor) -> Tensor:
        return torch.stack([(images.tanh() * row).sum(3).sum(2).sum(1) for row in self.weight], 1)


def varied(model: Any, **options: Any) -> base.Attack:
    """An attack whose gradients are also taken around each point, which is drawn."""
    rule = chain(variance(2), normalize("linf"))
    return base.Attack(model, "linf", 8 / 255, Climb(rule, options.pop("steps"), 0.4, random_start=True), **options)


def unlike(images: Tensor) -> Tensor:
    """A detector's scores, which do not depend on the batch."""
    return (images * images.sin()).sum(3).sum(2).sum(1)


def detected(model: Any, **options: Any) -> base.Attack:
    return attacks.DetectorEvasion(model, unlike, **options)


def bisected(model: Any, **options: Any) -> Any:
    return attacks.Bisection(PGD(model, eps=0.02, random_start=True, **options), trials=3)


def own_loss(logits: Tensor, labels: Tensor) -> Tensor:
    return -logits.gather(1, labels.unsqueeze(1)).squeeze(1)


STARTS = {"start": (IMAGES + 0.01).clamp(max=1)}
CASES: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
    (PGD, {"steps": 3}, {}),
    (OrthoPGD, {"steps": 3, "norm": "l2", "eps": 0.5}, {}),
    (PGD, {"steps": 3, "norm": "l1", "eps": 0.4, "restarts": 2}, {}),
    (OrthoPGD, {"steps": 3, "early_stop": True, "restarts": 3, "eps": 8 / 255}, {}),
    (OrthoPGD, {"steps": 3, "targeted": "random", "scope": "pixel"}, {}),
    (OrthoPGD, {"steps": 3, "targeted": "each2", "early_stop": True, "enforce": "gradient"}, STARTS),
    (MIFGSM, {"steps": 3, "loss": "kl"}, {"eps": torch.linspace(0.01, 0.05, COUNT)}),
    (varied, {"steps": 3}, {}),
    (PGD, {"steps": 3, "random_start": True}, {"seeds": range(COUNT)}),
    (PGD, {"steps": 3, "random_start": False, "loss": own_loss}, STARTS),
    (attacks.OrthoDIFGSM, {"steps": 3}, {}),
    (attacks.Square, {"queries": 12, "early_stop": True, "targeted": "each2"}, STARTS),
    (attacks.OrthoSquare, {"norm": "l2", "eps": 0.5, "queries": 6}, {}),
    (attacks.SparseRS, {"eps": 4.0, "queries": 6}, {}),
    # Random starts for the samples that still stand, more than one piece, before and after the squares.
    (attacks.AutoAttack, {"eps": 2 / 255, "version": "plus", "steps": 2, "targets": 2, "queries": 9}, {}),
    (attacks.FAB, {"norm": "l2", "eps": 0.3, "steps": 3, "restarts": 2}, {}),
    (attacks.MinimumNorm, {"norm": "l2", "eps": 0.2, "gradients": 12}, {}),
    (attacks.SigmaZero, {"eps": 4.0, "steps": 3}, {}),
    (attacks.NES, {"queries": 16, "pairs": 2, "eps": 0.02}, {}),
    (attacks.HopSkipJump, {"norm": "l2", "eps": 0.3, "queries": 50, "probes": 5}, {}),
    (detected, {"steps": 3, "threshold": 13.0, "random_start": True}, {}),
    (bisected, {"steps": 3}, {}),
]


@pytest.mark.parametrize(
    ("kind", "options", "given", "batch_size"), [(*case, 2) for case in CASES] + [(*case, 1) for case in CASES[:3]]
)
def test_pieces_give_what_one_call_gives(kind, options, given, batch_size, monkeypatch):
    def found() -> tuple[Any, Tensor]:
        generator = torch.Generator().manual_seed(3)
        attack = kind(Alone(), generator=generator, **options)
        return attack.run(IMAGES, LABELS, batch_size=batch_size, **given), generator.get_state()

    seen: set[int] = set()
    piece = base._piece
    monkeypatch.setattr(base, "_piece", lambda *about: seen.add(piece(*about)) or max(seen))
    pieces, state = found()
    monkeypatch.setattr(base, "_piece", lambda _, __, count, ___: count)
    whole, state_of_whole = found()
    assert seen == {8 * batch_size}
    assert pieces == whole
    assert torch.equal(state, state_of_whole)
    assert 0 < int(whole.success.sum()) < COUNT


def test_each_turn_draws_the_same_and_the_stream_is_left_by_the_longest():
    shared, like = (torch.Generator().manual_seed(0) for _ in range(2))
    turns = Turns(shared)
    wanted = [torch.rand(2, 3, generator=like, dtype=torch.float64) for _ in range(3)]
    for drawings in (1, 3, 2):
        draw = turns.next()
        assert all(torch.equal(draw(2, 3), wanted[k]) for k in range(drawings))
    assert torch.equal(shared.get_state(), like.get_state())


def test_what_looks_at_all_samples_is_given_all_of_them():
    seen: list[int] = []

    def direction(images: Tensor) -> Tensor:
        seen.append(len(images))
        return torch.ones_like(images)

    PGD(Alone(), steps=1, directions=[direction]).run(IMAGES, LABELS, batch_size=2)
    PGD(Alone(), steps=1, on_step=lambda step: seen.append(len(step.index))).run(IMAGES, LABELS, batch_size=2)
    assert set(seen) == {COUNT}


def test_no_piece_escapes_the_checks_of_labels_and_logits():
    labels, images = LABELS.clone(), IMAGES.clone()
    labels[-1], images[-1] = 5, 0
    nes = attacks.NES(Alone(), queries=12, pairs=1)
    for attack in (PGD(Alone(), steps=2), detected(Alone(), steps=2), attacks.Square(Alone(), queries=3), nes):
        with pytest.raises(ValueError, match="labels must lie in"):
            attack.run(IMAGES, labels, batch_size=2)
    model = Alone()
    with pytest.raises(ValueError, match="finite"):
        attacks.MinimumNorm(lambda x: model(x) / x.amax((1, 2, 3)).unsqueeze(1)).run(images, LABELS, batch_size=2)


def test_hop_skip_jump_says_once_what_it_has_lost():
    with pytest.warns(UserWarning, match=f"for {COUNT} of {COUNT} images") as caught:
        attacks.HopSkipJump(lambda x: Alone()(x * 0) + torch.eye(5)[0], queries=3).run(
            IMAGES, torch.zeros(COUNT, dtype=torch.long), batch_size=2
        )
    assert len(caught) == 1


MEASURED: list[tuple[str, dict[str, Any]]] = [
    ("PGD", {"steps": 2}),
    ("OrthoPGD", {"steps": 2}),
    ("DIFGSM", {"steps": 2}),
    ("OrthoSquare", {"queries": 2}),
    ("SparseRS", {"eps": 9.0, "queries": 2}),
    ("AutoAttack", {"eps": 1e-4, "steps": 1, "targets": 1, "queries": 2}),
    ("OrthoFAB", {"norm": "l2", "steps": 2}),
    ("OrthoMinimumNorm", {"norm": "l2", "gradients": 4}),
    ("SigmaZero", {"steps": 2}),
    ("NES", {"queries": 4, "pairs": 1}),
    ("HopSkipJump", {"norm": "l2", "queries": 12, "probes": 2}),
    ("DetectorEvasion", {"steps": 2, "mode": "selective"}),
    ("Bisection", {"trials": 2}),
]


@pytest.mark.parametrize(("name", "options"), MEASURED)
@pytest.mark.filterwarnings("ignore:no random point fools the model")
def test_memory_grows_with_the_images_only_by_what_is_given_and_returned(name, options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(768, 5)).requires_grad_(False)
    inner = {"DetectorEvasion": (model, unlike, 1e9), "Bisection": (PGD(model, eps=1e-4, steps=1),)}.get(name, (model,))
    few = torch.rand(16, 3, 16, 16)  # as many as a piece, each of which has the same

    def needed(times: int) -> int:
        images = few.repeat(times, 1, 1, 1)
        attack = getattr(attacks, name)(*inner, **options)
        return peak(lambda: attack.run(images, model(images).argmax(1), batch_size=2))

    each = (needed(6) - needed(2)) / 4 / few.nbytes
    # Copies of the images, the adversarials, and what checks take for a moment; whole: 10 to 30.
    assert each < {"Bisection": 8}.get(name, 2.6)

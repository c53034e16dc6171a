"""A call with `batch_size` searches a few batches at a time: the same results, in the memory of those."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from orthattack.attacks import MIFGSM, PGD, OrthoPGD, base
from orthattack.attacks.ascent import Climb
from orthattack.attacks.rules import chain, normalize, variance
from orthattack.attacks.task import Streams
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


CASES: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
    (PGD, {}, {}),
    (OrthoPGD, {"norm": "l2", "eps": 0.5}, {}),
    (PGD, {"norm": "l1", "eps": 0.4, "restarts": 2}, {}),
    (OrthoPGD, {"early_stop": True, "restarts": 3, "eps": 8 / 255}, {}),
    (OrthoPGD, {"targeted": "random", "scope": "pixel"}, {}),
    (MIFGSM, {"loss": "kl"}, {"eps": torch.linspace(0.01, 0.05, COUNT)}),
    (varied, {}, {}),
    (PGD, {"random_start": True}, {"seeds": range(COUNT)}),
    (PGD, {"random_start": False}, {"start": (IMAGES + 0.01).clamp(max=1)}),
]


@pytest.mark.parametrize(("kind", "options", "given"), CASES)
@pytest.mark.parametrize("batch_size", [1, 2])
def test_pieces_give_what_one_call_gives(kind, options, given, batch_size, monkeypatch):
    def found() -> tuple[Any, Tensor]:
        attack = kind(Alone(), steps=3, generator=torch.Generator().manual_seed(3), **options)
        return attack.run(IMAGES, LABELS, batch_size=batch_size, **given), attack.generator.get_state()

    seen: list[int] = []
    piece = base._piece
    monkeypatch.setattr(base, "_piece", lambda *about: seen.append(piece(*about)) or seen[-1])
    pieces, state = found()
    monkeypatch.setattr(base, "_piece", lambda _, __, images, *___: len(images))
    whole, state_of_whole = found()
    assert seen == [16]
    assert pieces == whole
    assert torch.equal(state, state_of_whole)
    assert 0 < int(whole.success.sum()) < COUNT


@pytest.mark.parametrize("draws", [torch.rand, torch.randn])
def test_turns_draw_what_one_drawing_draws(draws):
    shape, size = (COUNT, 3, 2, 3), 16
    shared, like = (torch.Generator().manual_seed(0) for _ in range(2))
    streams = Streams(shared, None, COUNT)
    # The first piece needs one drawing only, as where early stop is done with it.
    wanted, got = [draws(shape, generator=like) for _ in range(3)], [[], [], []]
    for first, drawings in ((0, 1), (16, 3), (32, 2)):
        draw = streams.turn(first, size)
        for k in range(drawings):
            got[k].append(draw((min(size, COUNT - first), *shape[1:]), draws, torch.float32))
    assert torch.equal(torch.cat(got[0]), wanted[0])
    assert torch.equal(torch.cat(got[1]), wanted[1][16:])
    assert torch.equal(got[2][0], wanted[2][16:32])
    assert torch.equal(shared.get_state(), like.get_state())


@pytest.mark.parametrize("kind", [PGD, OrthoPGD])
def test_memory_grows_with_the_images_only_by_what_is_given_and_returned(kind):
    def needed(count: int) -> int:
        images = torch.rand(count, 3, 16, 16)
        model = nn.Sequential(nn.Flatten(), nn.Linear(768, 5)).requires_grad_(False)
        attack = kind(model, steps=2)
        return peak(lambda: attack.run(images, torch.zeros(count, dtype=torch.long), batch_size=2))

    few, many = needed(32), needed(160)
    each = (many - few) / 128 / (768 * 4)
    assert each < 2.6  # copies of the images, the adversarials, and what checks take for a moment; whole: 14.2

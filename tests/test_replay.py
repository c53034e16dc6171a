"""CUDA graphs, with or without a GPU: a recorder that calls functions again stands for one that launches kernels."""

from __future__ import annotations

import threading
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from orthattack import OrthoPGD, ThreatModel, replay
from orthattack.attacks import base
from orthattack.replay import Calls, Replayed
from tests.attacks.test_gpu import needs_gpu, small_model


class Again:
    """A recorder whose replays call the function."""

    made = 0

    def __init__(self) -> None:
        Again.made += 1

    def warm_up(self, body: Callable[[], None]) -> None:
        body()

    def record(self, body: Callable[[], None]) -> Callable[[], None]:
        body()
        return body


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=needs_gpu)])
def device(request, monkeypatch) -> str:
    Again.made = 0
    if request.param == "cpu":
        monkeypatch.setattr(replay, "Recorder", Again)
        monkeypatch.setattr(replay, "_shared", lambda: replay.Recorder())
        monkeypatch.setattr(replay, "_is_fit", lambda tensor: tensor.numel() <= replay._LARGEST)
        monkeypatch.setattr(replay, "_place", lambda tensor: (tensor.device, threading.get_ident()))
    return str(request.param)


def passed(model: Callable[[Tensor], Tensor], images: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    leaf = images.clone().requires_grad_()
    logits = model(leaf)
    (gradient,) = torch.autograd.grad(logits, leaf, slope)
    return logits.detach(), gradient


def batches(device: str, count: int = 6, size: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(size, 3, 12, 12, generator=generator).to(device) for _ in range(count)]


def test_answers_and_gradients_are_the_models(device):
    model = small_model().to(device).requires_grad_(False)
    replayed, slopes = Replayed(model), torch.randn(6, 4, 5, generator=torch.Generator().manual_seed(1)).to(device)
    for images, slope in zip(batches(device), slopes, strict=True):
        for found, expected in zip(passed(replayed, images, slope), passed(model, images, slope), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
        with torch.no_grad():
            torch.testing.assert_close(replayed(images), model(images), rtol=1e-4, atol=1e-5)
    assert all(found is not None for found in replayed._passes.values())
    assert len(replayed._passes) == 2  # with a gradient, and without


def test_what_was_answered_stays_when_the_next_is_asked(device):
    model = small_model().to(device).requires_grad_(False)
    replayed, slope = Replayed(model), torch.ones(4, 5, device=device)
    answers = [passed(replayed, images, slope) for images in batches(device)]
    for images, (logits, gradient) in zip(batches(device), answers, strict=True):
        expected = passed(model, images, slope)
        torch.testing.assert_close(logits, expected[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(gradient, expected[1], rtol=1e-4, atol=1e-5)


def test_an_answer_is_differentiated_before_the_next(device):
    replayed = Replayed(small_model().to(device).requires_grad_(False))
    for images in batches(device, 3):
        passed(replayed, images, torch.ones(4, 5, device=device))
    first, second = (images.requires_grad_() for images in batches(device, 2))
    answer = replayed(first)
    replayed(second)
    with pytest.raises(RuntimeError, match="before the next one is asked for"):
        answer.sum().backward()


def test_the_last_shapes_are_kept_and_others_recorded_again(device):
    replayed = Replayed(small_model().to(device).requires_grad_(False), kept=1)
    for size in (8, 1, 8):
        for images in batches(device, 3, size):
            passed(replayed, images, torch.ones(size, 5, device=device))
        assert [size for _, size in replayed._passes] == [size]


def test_smaller_batches_are_passed_in_a_larger_ones_place(device):
    model = small_model().to(device).requires_grad_(False)
    replayed = Replayed(model)
    for size in (8, 8, 8, 5, 2, 8, 1, 1, 3):
        images, slope = batches(device, 1, size)[0], torch.arange(1.0, 5 * size + 1, device=device).view(size, 5)
        for found, expected in zip(passed(replayed, images, slope), passed(model, images, slope), strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert [size for _, size in replayed._passes] == [8]  # one image would leave too much of it unused


def test_other_threads_have_passes_of_their_own(device):
    replayed = Replayed(small_model().to(device).requires_grad_(False))

    def ask() -> None:
        for images in batches(device, 3):
            passed(replayed, images, torch.ones(4, 5, device=device))

    ask()
    other = threading.Thread(target=ask)
    other.start()
    other.join()
    assert len(replayed._passes) == 2


class Slow(int):
    """A place whose comparison lets other threads go on."""

    __hash__ = int.__hash__

    def __eq__(self, other: object) -> bool:
        time.sleep(1e-4)
        return int(self) == other


def test_threads_that_share_a_model_do_not_meet_in_what_is_kept(monkeypatch):
    monkeypatch.setattr(replay, "_is_fit", lambda _: True)
    monkeypatch.setattr(replay, "_place", lambda _: Slow(threading.get_ident()))
    monkeypatch.setattr(replay, "_attempted", lambda *_: None)
    replayed, failed = Replayed(lambda images: images.sum((2, 3))), []

    def ask() -> None:
        try:
            for size in (1, 1, 1, 9, 9, 9, 60, 60, 60):
                replayed(torch.zeros(size, 1, 1, 1))
        except Exception as error:
            failed.append(error)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed


def test_what_is_given_may_be_a_single_number(device):
    calls, images = Calls(), batches(device)
    for given in images:
        factor = given.amax()
        assert torch.equal(calls(lambda a, b: a * b, given, factor, release=lambda: None), given * factor)
    assert all(found is not None for found in calls._made.values())


def test_working_memory_is_released_when_recording_fails(device):
    calls, released = Calls(), []

    def fails_the_third_time(images: Tensor) -> Tensor:
        if len(released) == 1:  # before the first time it is called to be recorded
            raise ValueError
        return 2 * images

    for images in batches(device, 4):
        assert torch.equal(calls(fails_the_third_time, images, release=lambda: released.append(0)), 2 * images)
    assert len(released) == 2


def test_only_what_waits_is_refused_not_the_remark_about_asking(monkeypatch):
    """Which torch makes when the debug mode is first set in a process."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    remark = "Synchronization debug mode is a prototype feature and does not yet detect all synchronizing operations"
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_sync_debug_mode", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", lambda _: warnings.warn(remark, stacklevel=1))
    recorder = object.__new__(replay.Recorder)
    recorder._stream = stream
    recorder.warm_up(lambda: None)
    with pytest.raises(RuntimeError, match="it waits for the GPU"):
        recorder.warm_up(lambda: warnings.warn("called a synchronizing CUDA operation", stacklevel=1))


def test_large_batches_are_not_recorded(device, monkeypatch):
    monkeypatch.setattr(replay, "_LARGEST", 4 * 3 * 12 * 12 - 1)
    replayed, calls, double = Replayed(small_model().to(device)), Calls(), lambda t: 2 * t
    for images in batches(device, 4):
        passed(replayed, images, torch.ones(4, 5, device=device))
        calls(double, images, release=lambda: None)
    assert not replayed._passes
    assert not calls._made


class Asking(nn.Module):
    """What cannot be recorded: it asks the GPU for a number."""

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1)[:, :5] * float(images.detach().amax() > -1)


class Refusing(Again):
    """A recorder of what asks."""

    def record(self, body: Callable[[], None]) -> Callable[[], None]:
        body()
        raise RuntimeError("operation not permitted when stream is capturing")


def test_what_cannot_be_recorded_is_called(device, monkeypatch):
    if device == "cpu":
        monkeypatch.setattr(replay, "Recorder", Refusing)
    replayed, calls = Replayed(Asking()), Calls()
    for images in batches(device, 5):
        logits, gradient = passed(replayed, images, torch.ones(4, 5, device=device))
        assert torch.equal(logits, images.flatten(1)[:, :5])
        assert gradient.sum() == 20
        assert torch.equal(calls(Asking().forward, images, release=lambda: None), logits)
    assert list(replayed._passes.values()) == [None]
    assert list(calls._made.values()) == [None]
    assert torch.rand(3, device=device).shape == (3,)  # its random numbers are not in the way


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
@pytest.mark.parametrize("scope", [None, "image", "channel", "pixel"])
def test_a_regions_steps_are_the_same(device, norm, scope):
    images, *gradients = batches(device, 7)
    eps = {"linf": 8 / 255, "l2": 1.0, "l1": 12.0}[norm]
    threat = ThreatModel(norm, eps, scope=scope)
    alpha = torch.linspace(0.1, 0.4, 4, device=device).view(-1, 1, 1, 1) * eps

    def steps(region_of: Callable[[], object]) -> list[Tensor]:
        region = region_of()
        points = [images]
        for k, gradient in enumerate(gradients):
            region.release()
            points.append(region.step(points[-1], gradient - 0.5, alpha / (k + 1)))
        return [*points, region.project(images + 0.1)]

    found = steps(lambda: threat.around(images))

    class Plain(Calls):
        def __call__(self, function, *given, release):
            return function(*given)

    def plain() -> object:
        region = threat.around(images)
        region._calls = Plain()
        return region

    for here, expected in zip(found, steps(plain), strict=True):
        assert torch.equal(here, expected)


def test_regions_made_of_one_record_for_themselves(device):
    images, gradient = batches(device, 2)
    region = ThreatModel("l2", 1.0, scope="image").around(images)
    for _ in range(4):
        region.step(images, gradient, 0.2)
    assert region._calls._made
    for other in (
        region.select(torch.tensor([0, 2], device=device)),
        region.resized(torch.full((4,), 0.5, device=device)),
    ):
        assert not other._calls._made


def test_attacks_find_the_same(device, monkeypatch):
    model, images = small_model().to(device), batches(device, 1)[0]
    labels = model(images).argmax(1)
    found = {}
    for name, largest in (("recorded", 2**23), ("called", 0)):
        monkeypatch.setattr(replay, "_LARGEST", largest)
        replayed = Replayed(model)
        monkeypatch.setattr(base, "fast_copy", lambda *_, made=replayed: (made, ""))
        attack = OrthoPGD(model, steps=8, generator=torch.Generator().manual_seed(0))
        found[name] = [attack.run(images, labels) for _ in range(2)]
        assert bool(replayed._passes) == (largest > 0)
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one.adversarials, other.adversarials, rtol=0, atol=1e-4)
        assert torch.equal(one.success, other.success)

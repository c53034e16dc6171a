"""Many small kernels launched at once: CUDA graphs of a model's passes, and of other functions of tensors on a GPU.

A model's pass at a batch of 32 is some 500 kernels, each of which takes the host longer to launch than many take to
run. A graph that is recorded once launches them together. What is recorded must not ask the GPU anything, and may not
depend on anything but its tensors: where recording fails, the function itself is called, as before.
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter, OrderedDict
from collections.abc import Callable, Hashable
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Larger batches keep a GPU busy for longer than their kernels take to launch, and recording holds on to their memory.
_LARGEST = 2**23
# Recording takes as long as some calls, so it waits for this one.
_THIRD = 3
# One recording at a time in a process.
_LOCK = threading.Lock()
_OWN = threading.local()


class Replayed:
    """A model that answers on a GPU by graphs of its forward and backward pass, once a shape has come three times.

    Args:
        model: images (N, C, H, W) to logits (N, K). What its forward pass does besides is not repeated, and its tensors
            must stay where they are.
        kept: of how many shapes graphs are kept, those used last; each holds the memory of a pass.
    """

    def __init__(self, model: Callable[[Tensor], Tensor], kept: int = 4) -> None:
        self.model, self._kept = model, kept
        self._seen: Counter[Hashable] = Counter()
        self._passes: OrderedDict[tuple[Hashable, int], _Pass | None] = OrderedDict()
        self._lock = threading.Lock()  # threads may share a model, though not a pass

    def __call__(self, images: Tensor) -> Tensor:
        if not _is_fit(images):
            return self.model(images)
        differentiates = torch.is_grad_enabled() and images.requires_grad
        with self._lock:
            found = self._found(images, differentiates)
        if found is None:
            return self.model(images)
        if not differentiates:
            return found.answer(images)
        logits: Tensor = _Answer.apply(images, found)
        return logits

    def _found(self, images: Tensor, differentiates: bool) -> _Pass | None:
        """The recorded pass for these images, recorded now if they are the third of their shape."""
        kind, size = (_place(images), _described(images), differentiates, _precision()), len(images)
        key = self._nearest(kind, size)
        if key is None:
            key = kind, size
            self._seen[key] += 1
            if self._seen[key] != _THIRD:
                return None
            self._passes[key] = _attempted(images, lambda: _Pass(self.model, images, differentiates))
            while len(self._passes) > self._kept:
                given_up, _ = self._passes.popitem(last=False)
                self._seen[given_up] = 0
        self._passes.move_to_end(key)
        return self._passes[key]

    def _nearest(self, kind: Hashable, size: int) -> tuple[Hashable, int] | None:
        """The smallest batch with a recorded pass that so many images fit into, if it is not much too large: it takes
        as long as it is, but smaller ones would take the host as long."""
        sizes = [known for of, known in self._passes if of == kind and size <= known <= 4 * size]
        return (kind, min(sizes)) if sizes else None


class _Pass:
    """A forward pass at a batch of one shape and, if it `differentiates`, the backward pass, which ends at the images:
    in tensors of its own, which each replay writes anew. In a smaller batch the last images are those from before."""

    def __init__(self, model: Callable[[Tensor], Tensor], images: Tensor, differentiates: bool) -> None:
        self._images = images.detach().clone().requires_grad_(differentiates)
        self._logits = self._slope = self._gradient = self._images
        self.turn = 0

        def forward() -> None:
            with torch.set_grad_enabled(differentiates), _uncached():
                self._logits = model(self._images)

        def backward() -> None:
            (self._gradient,) = torch.autograd.grad(self._logits, self._images, self._slope)

        def both() -> None:
            forward()
            self._slope = torch.zeros_like(self._logits)
            if differentiates:
                backward()

        recorder = Recorder()
        recorder.warm_up(both)
        self._forward = recorder.record(forward)
        if differentiates:
            self._backward = recorder.record(backward)

    def answer(self, images: Tensor) -> Tensor:
        """The logits, (N, K)."""
        with torch.no_grad():
            self._images[: len(images)] = images
        self.turn += 1
        self._forward()
        return self._logits.detach()[: len(images)].clone()

    def differentiated(self, slope: Tensor) -> Tensor:
        """The gradient (N, C, H, W) of ⟨slope, logits⟩ for the last answer."""
        self._slope[: len(slope)] = slope
        self._backward()
        return self._gradient.detach()[: len(slope)].clone()


class _Answer(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, images: Tensor, recorded: _Pass) -> Tensor:
        logits = recorded.answer(images)
        ctx.recorded, ctx.turn = recorded, recorded.turn
        return logits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        if ctx.turn != ctx.recorded.turn:
            raise RuntimeError("an answer of a recorded model is differentiated before the next one is asked for")
        return ctx.recorded.differentiated(slope), None


class Calls:
    """Calls functions of tensors, on a GPU by a graph from the third call with tensors of the same shapes on.

    What else a function reads must stay where it is while this lives.
    """

    def __init__(self) -> None:
        self._seen: Counter[Hashable] = Counter()
        self._made: dict[Hashable, _Call | None] = {}

    def __call__(self, function: Callable[..., Tensor], *given: Any, release: Callable[[], None]) -> Tensor:
        """`function(*given)`; `release` gives up the memory that it keeps between calls."""
        tensors = [value for value in given if isinstance(value, Tensor)]
        if not all(map(_is_fit, tensors)):
            return function(*given)
        described = [(value.shape[:1], _described(value)) if isinstance(value, Tensor) else value for value in given]
        key = (function.__name__, _place(tensors[0]), *described)
        self._seen[key] += 1
        if self._seen[key] == _THIRD:
            self._made[key] = _attempted(tensors[0], lambda: _Call(function, given, release))
        found = self._made.get(key)
        return function(*given) if found is None else found(tensors)


class _Call:
    def __init__(self, function: Callable[..., Tensor], given: tuple[Any, ...], release: Callable[[], None]) -> None:
        own = [value.clone() if isinstance(value, Tensor) else value for value in given]
        self._own, self._out = [value for value in own if isinstance(value, Tensor)], torch.empty(0)

        def body() -> None:
            release()
            try:
                self._out = function(*own)
            finally:  # or the next call would work in what a failed recording has allocated
                release()

        recorder = _shared()
        recorder.warm_up(body)
        self._replay = recorder.record(body)

    def __call__(self, tensors: list[Tensor]) -> Tensor:
        for own, tensor in zip(self._own, tensors, strict=True):
            own.copy_(tensor)
        self._replay()
        return self._out.clone()


class Recorder:
    """Records functions on a stream of its own, in memory of their own.

    Args:
        stays: what is no longer replayed leaves its memory to what is recorded next; otherwise torch reserves it until
            there is no other. Then nothing may be read that a replay has left, once another has begun.
    """

    def __init__(self, stays: bool = False) -> None:
        self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._pool = torch.cuda.graph_pool_handle()
        # Memory is kept as long as there is something recorded in it.
        self._kept = self.record(lambda: torch.zeros(1, device="cuda")) if stays else None

    def warm_up(self, body: Callable[[], None]) -> None:
        """Call it once, so that what is made when it is first called is there.

        Raises:
            RuntimeError: it waits for the GPU, which must not be tried while recording: see `record`.
        """
        now, mode = torch.cuda.current_stream(), torch.cuda.get_sync_debug_mode()
        self._stream.wait_stream(now)
        with torch.cuda.stream(self._stream), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                body()
            finally:
                torch.cuda.set_sync_debug_mode(mode)
        now.wait_stream(self._stream)
        # Not "synchronizing" alone, a word that the debug mode's own remark, of the first time it is set, has too.
        if any("called a synchronizing" in str(warning.message) for warning in caught):
            raise RuntimeError("it waits for the GPU")

    def record(self, body: Callable[[], object]) -> Callable[[], None]:
        """What launches again the kernels that `body` launches, on tensors that it has made or that stay."""
        now = torch.cuda.current_stream()
        self._stream.wait_stream(now)
        with torch.cuda.stream(self._stream):
            try:
                replay = self._captured(body)
            except BaseException:
                # Recording that fails leaves torch's random numbers as if it went on; recording that does not, in other
                # memory, ends that.
                with suppress(RuntimeError):
                    Recorder()._captured(lambda: torch.zeros(1, device="cuda"))
                raise
        now.wait_stream(self._stream)
        return replay

    def _captured(self, body: Callable[[], object]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        # Other threads may go on meanwhile: those of a loader allocate pinned memory.
        graph.capture_begin(self._pool, capture_error_mode="thread_local")
        try:
            body()
        except BaseException:
            with suppress(RuntimeError, UserWarning):  # which say that it has failed
                graph.capture_end()
            raise
        graph.capture_end()
        return graph.replay


def _shared() -> Recorder:
    """The recorder of all calls of a thread on the current stream, which come one after the other."""
    recorders: dict[Hashable, Recorder] = _OWN.__dict__.setdefault("recorders", {})
    place = torch.cuda.current_device(), torch.cuda.current_stream().cuda_stream
    if place not in recorders:
        recorders[place] = Recorder(stays=True)
    return recorders[place]


def _attempted(like: Tensor, make: Callable[[], Any]) -> Any:
    """What is made on a tensor's device, or None where something in it cannot be recorded."""
    with _LOCK, torch.cuda.device_of(like):  # type: ignore[no-untyped-call]
        try:
            return make()
        except (RuntimeError, ValueError, TypeError):
            _OWN.__dict__.clear()  # in the memory of a recording that has failed there may be no other
            return None


def _is_fit(tensor: Tensor) -> bool:
    return type(tensor) is Tensor and tensor.is_cuda and tensor.numel() <= _LARGEST


def _described(tensor: Tensor) -> Hashable:
    """What a batch is, but for its size."""
    return tuple(tensor.shape[1:]), tensor.stride(), tensor.dtype


def _place(tensor: Tensor) -> Hashable:
    """Where kernels are launched: threads and streams do not wait for each other."""
    return tensor.device, torch.cuda.current_stream(tensor.device).cuda_stream, threading.get_ident()


def _precision() -> Hashable:
    return (
        torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None,
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.deterministic,
    )


def _uncached() -> Any:
    """Autocast as it is now, but that casts weights in each pass, so that replays do so too."""
    if not torch.is_autocast_enabled("cuda"):
        return nullcontext()
    return torch.autocast("cuda", torch.get_autocast_dtype("cuda"), cache_enabled=False)

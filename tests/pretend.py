"""A GPU that is not there: tensors that say they are on "cuda:0", hold real numbers on the CPU, and count questions.

Under `Pretend`, whatever is made on or moved to a CUDA device is an `OnGpu`: the paths for GPUs run, on real numbers,
and autograd works. Mixing with a tensor on the CPU is the error that it would be. What makes the host wait for the
device is counted, with the line of the package that asks: a number, a truth value or a comparison that is read; a mask
that selects; a tensor copied from the host or to it.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from orthattack.threat import plane

__all__ = ["OnGpu", "Pretend", "pretended"]

GPU = torch.device("cuda", 0)
_READS = {
    *(getattr(Tensor, name) for name in ("__bool__", "__int__", "__float__", "__index__", "__contains__", "__repr__")),
    *(getattr(Tensor, name) for name in ("item", "tolist", "numpy", "nonzero", "equal", "allclose", "masked_select")),
    *(torch.equal, torch.allclose, torch.nonzero, torch.masked_select, torch.unique, torch.linalg.solve),
}
_FROM_HOST = {torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy}
_MOVES = {Tensor.to, Tensor.cpu, Tensor.cuda}
_MASKS = {Tensor.__getitem__, Tensor.__setitem__}
# These may be given a tensor of another device, or take nothing of a tensor but its description.
_ANYWHERE = _MOVES | _MASKS | {Tensor.copy_, Tensor.is_set_to, Tensor.__set__ if hasattr(Tensor, "__set__") else None}


class OnGpu(Tensor):
    """A tensor that says that it is on a GPU."""

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return GPU

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        made: Tensor = self.detach().clone()
        memo[id(self)] = made = nn.Parameter(made, self.requires_grad) if isinstance(self, nn.Parameter) else made
        return made


class Pretend(TorchFunctionMode):
    """While this is entered, there is a GPU; `asked` counts what made the host wait, by kind and line."""

    def __init__(self) -> None:
        super().__init__()
        self.asked: Counter[tuple[str, str]] = Counter()

    def _ask(self, what: str) -> None:
        frame = sys._getframe()
        while frame is not None and "/orthattack/" not in frame.f_code.co_filename:
            frame = frame.f_back
        name = frame.f_code.co_filename.rpartition("/orthattack/")[2] if frame else ""
        self.asked[what, f"{name}:{frame.f_lineno}" if frame else "the model"] += 1

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        given = _tensors((*args, *kwargs.values()))
        on_gpu = any(isinstance(leaf, OnGpu) for leaf in given)
        device, waits = kwargs.get("device"), True
        target = None if device is None else torch.device(device).type
        if func is Tensor.pin_memory:
            return args[0]
        if func in _MOVES:
            on_gpu, waits = isinstance(args[0], OnGpu), not kwargs.pop("non_blocking", False)
            moved = next((a for a in args[1:] if isinstance(a, str | torch.device | Tensor)), device)
            moved = moved.device if isinstance(moved, Tensor) else moved
            target = (
                "cpu" if func is Tensor.cpu else "cuda" if func is Tensor.cuda else moved and torch.device(moved).type
            )
            args = tuple(a for a in args if not isinstance(a, str | torch.device))
            if len(args) > 1 and isinstance(args[1], OnGpu):  # .to(like)
                args = (args[0], args[1].dtype, *args[2:])
            func = Tensor.to
        if target is not None:
            kwargs.pop("device", None)
            if target == "cpu":
                kwargs["device"] = "cpu"
        self._check(func, args, given, on_gpu, target, waits)
        if func is Tensor.to and len(args) == 1 and not kwargs:
            out = args[0]
        else:
            with torch._C.DisableTorchFunctionSubclass():
                out = func(*args, **kwargs)
        if func in (Tensor.device.__get__, Tensor.is_cuda.__get__):
            return out
        home = target == "cuda" or (on_gpu and target is None)
        if isinstance(out, Tensor):
            return _placed(out, home)
        return tree_map(lambda t: _placed(t, home), out) if isinstance(out, list | tuple) else out

    def _check(self, func: Any, args: Any, given: list[Tensor], on_gpu: bool, target: str | None, waits: bool) -> None:
        here = [t for t in given if not isinstance(t, OnGpu) and t.ndim > 0]
        if on_gpu and here and func not in _ANYWHERE:
            name = getattr(func, "__name__", str(func))
            raise RuntimeError(f"{name}: expected all tensors on one device, found {GPU} and cpu")
        if on_gpu and func in _READS:
            self._ask(getattr(func, "__name__", str(func)))
        if on_gpu and target == "cpu":
            self._ask("to the host")
        if target == "cuda" and not on_gpu and waits and (func in _FROM_HOST or func in _MOVES):
            self._ask("from the host")
        if on_gpu and func in _FROM_HOST and target is None and not isinstance(args[0], Tensor):
            self._ask("to the host")
        if on_gpu and func in _MASKS:
            keys = args[1] if isinstance(args[1], tuple) else (args[1],)
            masks = [key for key in keys if isinstance(key, Tensor) and key.dtype == torch.bool]
            if masks and (func is Tensor.__getitem__ or isinstance(args[2], Tensor)):
                self._ask("mask")
            if any(isinstance(key, list) for key in keys):
                self._ask("from the host")
        if func is torch.where and len(args) == 1:
            self._ask("where")


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among the arguments of a function, those in lists included."""
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _tensors(value)
    return found


def _placed(value: Any, home: bool) -> Any:
    if not isinstance(value, Tensor) or isinstance(value, OnGpu) == home:
        return value
    return value.as_subclass(OnGpu if home else Tensor)  # type: ignore[arg-type]


@contextmanager
def pretended(monkeypatch: Any) -> Iterator[Pretend]:
    """A GPU, with torch's functions for its random numbers, and without Triton."""
    monkeypatch.setattr(plane, "fused_step", lambda _: None)
    monkeypatch.setattr(plane, "fused_projection", lambda _: None)
    state = torch.zeros(16, dtype=torch.uint8)
    monkeypatch.setattr(torch.cuda, "get_rng_state", lambda *_: state.clone())
    monkeypatch.setattr(torch.cuda, "set_rng_state", lambda *_: None)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
    with Pretend() as mode:
        yield mode


def to_gpu(model: nn.Module) -> nn.Module:
    """The model, in place, with its weights and buffers on the GPU."""
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                moved = nn.Parameter(parameter.detach().as_subclass(OnGpu), parameter.requires_grad)  # type: ignore[arg-type]
                module._parameters[name] = moved
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.as_subclass(OnGpu)  # type: ignore[arg-type]
    return model

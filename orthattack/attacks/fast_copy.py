"""A faster copy of a model, for gradients only: convolutions with their batch norms folded in, channels last, compiled.

The model itself is left alone and goes on deciding about success. A copy is used only while it agrees with the model.
"""

from __future__ import annotations

import copy
import threading
from dataclasses import dataclass, field
from typing import Any, Literal, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from orthattack.models import Model
from orthattack.replay import Replayed

Optimize = Literal["auto", "none", "compile"]

# Folding reorders float32 arithmetic, which moves logits by 1e-5 of their spread at most; anything more is a mistake.
_AGREES = 1e-3
# Where convolutions round to TF32, of ten bits, unless they are told not to.
_AGREES_ON_GPU = 2e-2
# Threads may share a model.
_LOCK = threading.RLock()


@dataclass
class _Made:
    """What was last made of a model, None if nothing could be, why not, and of which state of it."""

    copy: Model | None = None
    why_not: str = ""
    state: tuple[object, ...] = ()
    sums: Tensor = field(default_factory=lambda: torch.empty(0))


_MADE: WeakKeyDictionary[nn.Module, dict[str, _Made]] = WeakKeyDictionary()
"""The copies of each model that is alive, for all attacks on it."""


def fast_copy(model: Model, how: Optimize, images: Tensor) -> tuple[Model | None, str]:
    """What to take gradients of in place of a model that is borrowed now, or None and why.

    A copy is made once for each state of a model. One whose state is another than at the call before, as in training,
    is not worth a copy until it comes twice.

    Args:
        model: the model.
        how: "auto", batch norms in evaluation mode folded into the convolutions before them and weights in
            channels-last memory, for models of several convolutions; "compile", that through `torch.compile` too, for
            any; "none".
        images: (N, C, H, W); on the first the copy has to agree with what it was made from.
    """
    if how == "none":
        return None, ""
    if not isinstance(model, nn.Module):
        return None, f"it is a {type(model).__name__}, not a torch.nn.Module"
    if how == "auto" and sum(isinstance(module, nn.Conv2d) for module in model.modules()) < 2:
        return None, "it has no convolutions to speak of"
    made = _Made()
    with _LOCK:
        try:
            made, state, sums = _MADE.setdefault(model, {}).setdefault(how, made), _state(model), _sums(model)
            is_known = made.state == state and torch.equal(made.sums, sums)
            if is_known and (made.copy is not None or made.why_not):
                return made.copy, made.why_not
            is_first = not made.state
            made.copy, made.why_not, made.state, made.sums = None, "", state, sums
            if how != "auto" or is_first or is_known:
                made.copy = _checked(model, how, images[:1])
        except Exception as error:  # a model's own code may raise anything, and so may tensors that have no sum
            made.why_not = str(error).strip().split("\n")[0] or type(error).__name__
        return made.copy, made.why_not


def _state(model: nn.Module) -> tuple[object, ...]:
    """Which tensors and settings a model has."""
    tensors = [*model.parameters(), *model.buffers()]
    versions = [(id(t), t.data_ptr(), -1 if t.is_inference() else t._version) for t in tensors]
    attributes = [
        (name, value)
        for module in model.modules()
        for name, value in vars(module).items()
        if isinstance(value, bool | int | float | str) and name != "training"
    ]
    return versions, attributes


def _sums(model: nn.Module) -> Tensor:
    """Of the bits of all tensors: their versions miss what is written through `.data`."""
    tensors = [t.detach().reshape(-1).contiguous() for t in (*model.parameters(), *model.buffers())]
    if tensors and tensors[0].is_cuda:  # all at once: launching a sum of each takes the host longer than a step
        tensors = [torch.cat([t for t in tensors if t.dtype == kind]) for kind in {t.dtype: None for t in tensors}]
    return torch.stack([_sum(t) for t in tensors]) if tensors else torch.empty(0)


def _sum(flat: Tensor) -> Tensor:
    """Eight bytes at a time, where they lie so: torch adds up integers of that size quickest."""
    size, at = (count * flat.itemsize for count in (flat.numel(), flat.storage_offset()))
    return flat.view(torch.long if size % 8 == at % 8 == 0 else torch.uint8).sum(dtype=torch.long)


def _checked(model: nn.Module, how: Optimize, sample: Tensor) -> Model:
    if isinstance(model, torch.jit.ScriptModule):
        raise TypeError("it is a TorchScript module, which cannot be traced again")
    if any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in model.modules()):
        raise ValueError("it has hooks, which a copy would lose")
    copied = copy.deepcopy(model)
    expected = copied(sample)  # not the model itself, which may count its calls
    made = _folded(copied).to(memory_format=torch.channels_last)
    fast = cast("Model", torch.compile(made)) if how == "compile" else made
    found = fast(sample)
    spread = (expected.amax() - expected.amin()).clamp(min=expected.abs().amax() * 1e-3)
    tolerance = _AGREES_ON_GPU if sample.is_cuda else _AGREES
    if not bool(((found - expected).abs() <= tolerance * spread).all()):
        raise ValueError("the faster copy's logits differ from the model's")
    # What was traced has no control flow that depends on data, so that it can be recorded.
    return Replayed(made) if how == "auto" and isinstance(made, fx.GraphModule) and sample.is_cuda else fast


class _Tracer(fx.Tracer):
    """A tracer that lets the other threads be: while it traces, every module's call in the process goes through it."""

    def __init__(self) -> None:
        super().__init__()
        self._thread = threading.get_ident()

    def call_module(self, m: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if threading.get_ident() != self._thread:
            return forward(*args, **kwargs)
        return super().call_module(m, forward, args, kwargs)


def _folded(model: nn.Module) -> nn.Module:
    """A module in evaluation mode with its batch norms folded into the convolutions that they follow.

    The module itself if its forward pass cannot be traced.
    """
    try:
        tracer = _Tracer()
        traced = tracer.trace(model)
        graph = fx.GraphModule(tracer.root, traced, type(model).__name__)
    except Exception:  # control flow that depends on data, or anything else in a model's own code
        return model
    modules = dict(graph.named_modules())
    pairs = {nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d, nn.Conv3d: nn.BatchNorm3d}
    used = [node.target for node in graph.graph.nodes if node.op == "call_module"]
    for node in list(graph.graph.nodes):
        before = node.args[0] if node.op == "call_module" and len(node.args) == 1 else None
        if not isinstance(before, fx.Node) or before.op != "call_module" or len(before.users) > 1:
            continue
        conv, norm = modules[str(before.target)], modules[str(node.target)]
        once = used.count(before.target) == used.count(node.target) == 1  # a layer used twice has another input there
        if not once or type(norm) is not pairs.get(type(conv)) or norm.running_mean is None:
            continue
        parent, _, name = str(before.target).rpartition(".")
        setattr(graph.get_submodule(parent), name, fuse_conv_bn_eval(conv, norm))
        node.replace_all_uses_with(before)
        graph.graph.erase_node(node)
    graph.recompile()
    return graph

"""A faster copy of a model, for gradients only: convolutions with their batch norms folded in, channels last, compiled.

The model itself is left alone and goes on deciding about success. A copy is used only while it agrees with the model.
"""

from __future__ import annotations

import copy
import threading
from typing import Any, Literal, cast

import torch
from torch import Tensor, fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from orthattack.arguments import warn
from orthattack.models import Model

Optimize = Literal["none", "auto", "compile"]

# Folding reorders float32 arithmetic, which moves logits by 1e-5 of their spread at most; anything more is a mistake.
_AGREES = 1e-3
# Threads may share an attack. Of the module, so that attacks can be copied and pickled.
_LOCK = threading.RLock()


class FastCopy:
    """The faster copy of one model, made when it is first asked for and again when the model has changed.

    Args:
        model: the model that is attacked.
        how: "none"; "auto", eval-mode batch norms folded into the convolutions before them and weights in channels-last
            memory; "compile", that through `torch.compile` too.
    """

    def __init__(self, model: Model, how: Optimize) -> None:
        self._model, self._how = model, how
        self._copy: Model | None = None
        self._state: tuple[object, ...] = ()
        self._sums = torch.empty(0)
        self._has_warned = False

    def __reduce__(self) -> tuple[object, ...]:
        return FastCopy, (self._model, self._how)  # the copy itself is made anew where it is needed

    def of(self, lent: Model, images: Tensor) -> Model | None:
        """What to take gradients of in place of the borrowed model `lent`; None, with a warning the first time, if a
        copy cannot be made or does not agree with it on the first of `images`."""
        if self._how == "none":
            return None
        try:
            with _LOCK:
                return self._checked(lent, images)
        except Exception as error:  # a model's own code may raise anything
            if not self._has_warned:
                reason = str(error).strip().split("\n")[0] or type(error).__name__
                warn(f"optimize={self._how!r} is not used for this model: {reason}")
            self._has_warned = True
            return None

    def _checked(self, lent: Model, images: Tensor) -> Model:
        if not isinstance(self._model, nn.Module):
            raise TypeError(f"it is a {type(self._model).__name__}, not a torch.nn.Module")
        if isinstance(self._model, torch.jit.ScriptModule):
            raise TypeError("it is a TorchScript module, which cannot be traced again")
        if any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in self._model.modules()):
            raise ValueError("it has hooks, which a copy would lose")
        tensors = [*self._model.parameters(), *self._model.buffers()]
        # Versions miss what is written through `.data`; sums of the values do not.
        sums = torch.stack([t.sum(dtype=torch.float64) for t in tensors]).view(torch.long) if tensors else images[:0]
        versions = [(id(t), t.data_ptr(), -1 if t.is_inference() else t._version) for t in tensors]
        attributes = [
            (name, value)
            for module in self._model.modules()
            for name, value in vars(module).items()
            if isinstance(value, bool | int | float | str)
        ]
        state = (versions, attributes)
        if self._copy is not None and state == self._state and torch.equal(sums, self._sums):
            return self._copy
        self._copy, self._state, self._sums = None, state, sums
        made = _folded(copy.deepcopy(self._model)).to(memory_format=torch.channels_last)
        fast = cast("Model", torch.compile(made)) if self._how == "compile" else made
        sample = images[:1]
        expected, found = lent(sample), fast(sample)
        spread = (expected.amax() - expected.amin()).clamp(min=expected.abs().amax() * 1e-3)
        if not bool(((found - expected).abs() <= _AGREES * spread).all()):
            raise ValueError("the faster copy's logits differ from the model's")
        self._copy = fast
        return fast


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

"""Lending a model to an attack and getting it back as it was, from our own attacks and from code that is not ours.

`borrowed` puts back what the attacks of this package change on purpose. `guarded` watches code that could do anything:
it puts back all that was changed, and raises if the results may depend on it. Both are counted, so that several threads
may attack one model, or models that share layers, at the same time: nothing is put back under another thread, and the
last one to finish leaves everything as the first one found it.
"""

from __future__ import annotations

import functools
import random
import sys
import threading
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn, overrides
from torch.nn.parameter import is_lazy
from torch.utils import _device, _python_dispatch

__all__ = ["Model", "ModelChangedError", "borrowed", "global_random_numbers", "guarded", "in_evaluation", "is_foreign"]

Model = Callable[[Tensor], Tensor]
"""Images (N, C, H, W) to logits (N, K): an nn.Module or any differentiable function."""

# Held while something is lent, compared or put back, not while an attack runs.
_LOCK = threading.RLock()
global_random_numbers = threading.RLock()
"""Held by whoever needs the process's random numbers for itself: other threads draw from them too."""


class ModelChangedError(RuntimeError):
    """Code that was lent a model changed its weights, buffers, layers, hooks, methods or attributes.

    They have been put back; what the code returned is not kept.
    """


@contextmanager
def borrowed(model: Model, device: torch.device) -> Iterator[Model]:
    """Lend a model to an attack, in evaluation mode and without gradients for its parameters.

    On the way out, also after an exception, every module's own training mode, every parameter's requires_grad, the
    buffers, and the global random state of the CPU and of `device` are what they were; of several threads that borrow
    the same at the same time, the last one sees to that. Parameters' ``.grad`` is never touched. Works inside
    ``torch.inference_mode()``, on models made there too.

    Raises:
        ModelChangedError: what another thread ran under `guarded` meanwhile has changed the model.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    parameters = [p for module in modules for p in module.parameters(recurse=False)]
    borrower = _Borrower()
    with torch.inference_mode(False), torch.no_grad():
        try:
            with _LOCK:
                borrower.take(_RANDOM, "cpu")
                if device.type == "cuda":
                    borrower.take(_RANDOM, str(device))
                for aspect, things in ((_BUFFERS, modules), (_FLAG, parameters), (_MODE, modules)):
                    for thing in things:
                        borrower.take(aspect, thing)
                for module in modules:  # not eval(), which a model may have overridden to do more than this
                    module.training = False
                for parameter in parameters:
                    if not parameter.is_inference():
                        parameter.requires_grad_(False)
            yield _differentiable(model)
        finally:
            with _LOCK:
                borrower.give_back()
    borrower.complain()


@contextmanager
def guarded(
    model: Model, images: Tensor | None = None, who: str = "the attack", may_draw: bool = False
) -> Iterator[None]:
    """Watch a model while code that is not ours runs, which may change whatever it can reach.

    On the way out, also after an exception, everything is as it was: each module's training mode, the parameters'
    requires_grad and ``.grad``, weights and buffers by value, layers, hooks, methods and attributes of each module, and
    of the process the random states (torch, NumPy, Python), grad mode, autocast, default dtype and device, number of
    threads, and the deterministic and cuDNN flags.

    The model may be any callable: the modules in a function's closure, a bound method, a partial or an object's
    attributes are watched too. It stays in the mode it is in. While the guard lasts there is one copy of all weights
    and buffers in memory; comparing reads them once more.

    Args:
        model: what the code could reach.
        images: (N, C, H, W) that the model takes. If it changed, it is asked about these once more, alone, in
            evaluation mode: what its own forward pass changes, such as a counter or a cache, is not held against the
            code. Buffers are put back all the same.
        who: the culprit in the message.
        may_draw: let the random states go on, as where each call is to draw anew.

    Raises:
        ModelChangedError: anything but training mode, requires_grad and ``.grad`` was changed, and the code itself
            raised nothing.
    """
    borrower = _Borrower()
    thread, has_grad = _read(_THREAD), torch.is_grad_enabled()  # which inference_mode(False) would turn on
    watched = None
    with torch.inference_mode(torch.is_inference_mode_enabled()), torch.set_grad_enabled(has_grad):
        try:
            with _LOCK, torch.inference_mode(False), torch.no_grad():
                borrower.take(_PROCESS, "process")
                if not may_draw:
                    borrower.take(_NUMBERS, "numbers")
                if isinstance(model, nn.Module) and images is not None and any(map(is_lazy, model.parameters())):
                    model(images[:1])  # which makes its parameters
                watched = _watched(borrower, model)
            yield
        finally:
            _write(_THREAD, thread)
            with _LOCK, torch.inference_mode(False), torch.no_grad():
                try:
                    if watched is not None:  # or Ctrl-C came before the code ran
                        _settle(borrower, watched, model, images, who)
                finally:
                    borrower.give_back()
    borrower.complain()


def in_evaluation(models: Sequence[Model]) -> bool:
    """Put borrowed models back into evaluation mode; whether they all were."""
    modules = [module for model in models if isinstance(model, nn.Module) for module in model.modules()]
    left = [module for module in modules if module.training]
    for module in left:
        module.training = False
    return not left


def is_foreign(code: object) -> bool:
    """Whether something can be called and is of neither this package nor torch, as far as its module's name says."""
    home = getattr(code, "__module__", None) or type(code).__module__
    return callable(code) and home.partition(".")[0] not in ("orthattack", "torch")


def _differentiable(model: Model) -> Model:
    """The model itself or, if its tensors were made in inference mode, which autograd refuses, one with copies."""
    if not isinstance(model, nn.Module):
        return model
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if not any(tensor.is_inference() for tensor in state.values()):
        return model
    copies = {name: tensor.detach().clone() for name, tensor in state.items()}

    def call(images: Tensor) -> Tensor:
        with _LOCK:  # meanwhile the copies are in the model's place
            logits: Tensor = torch.func.functional_call(model, copies, (images,))
        return logits

    return call


# --- Who has borrowed what ------------------------------------------------------------------------------------------


class _Aspect(NamedTuple):
    """Something about an object that is remembered, and how it is put back."""

    read: Callable[[Any], Any]
    write: Callable[[Any, Any], None] | None


class _Loan:
    """One aspect of one object: as the first borrower found it, and the threads of all who have it."""

    def __init__(self, before: Any) -> None:
        self.before = before
        self.threads: list[int] = []


_LOANS: dict[tuple[int, object], _Loan] = {}
_BORROWERS: list[_Borrower] = []


class _Borrower:
    """One borrower: each aspect it has taken, as it was then."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.taken: list[tuple[_Aspect, Any, Any]] = []
        self.error: ModelChangedError | None = None
        _BORROWERS.append(self)

    def take(self, aspect: _Aspect, thing: Any) -> Any:
        """Remember `aspect` of `thing`: as it is or, if another thread has it, as that found it."""
        key = _key(aspect, thing)
        loan = _LOANS.get(key)
        if loan is not None and not loan.threads:  # of a borrower that was interrupted
            loan = None
        state = loan.before if loan is not None and self._is_shared(loan) else aspect.read(thing)
        if loan is None:
            loan = _LOANS[key] = _Loan(state)
        loan.threads.append(self.thread)
        self.taken.append((aspect, thing, state))
        return state

    def give_back(self) -> None:
        """Put back what no other thread has: as this borrower found it, the last one as the first did."""
        _BORROWERS.remove(self)
        with ExitStack() as stack:  # which goes on after an error
            for aspect, thing, state in self.taken:
                key = _key(aspect, thing)
                loan = _LOANS[key]
                loan.threads.remove(self.thread)
                if not loan.threads:
                    del _LOANS[key]
                if aspect.write is not None and not self._is_shared(loan):
                    stack.callback(aspect.write, thing, state if loan.threads else loan.before)
        self.taken.clear()

    def others(self) -> list[_Borrower]:
        """Those in other threads who have something of the same model."""
        mine = {id(thing) for _, thing, _ in self.taken if not isinstance(thing, str)}
        others = [other for other in _BORROWERS if other.thread != self.thread]
        return [other for other in others if any(id(thing) in mine for _, thing, _ in other.taken)]

    def complain(self) -> None:
        if self.error is not None:
            raise self.error

    def _is_shared(self, loan: _Loan) -> bool:
        return any(thread != self.thread for thread in loan.threads)


def _key(aspect: _Aspect, thing: Any) -> tuple[int, object]:
    return id(aspect), thing if isinstance(thing, str) else id(thing)


# --- What an attack of this package changes -------------------------------------------------------------------------


def _set_training(module: nn.Module, mode: bool) -> None:
    module.training = mode


def _set_requires_grad(tensor: Tensor, flag: bool) -> None:
    if tensor.requires_grad != flag and tensor.is_leaf:
        tensor.requires_grad_(flag)


def _buffers(module: nn.Module) -> tuple[dict[str, Tensor | None], dict[str, Tensor]]:
    owned = dict(module._buffers)
    return owned, {name: b.clone() for name, b in owned.items() if b is not None}


def _set_buffers(module: nn.Module, state: tuple[dict[str, Tensor | None], dict[str, Tensor]]) -> None:
    owned, values = state
    for name, value in values.items():
        kept = owned[name]
        if kept is not None and not torch.equal(kept, value):
            with torch.inference_mode(kept.is_inference()):
                kept.copy_(value)
    for name in set(module._buffers.keys()) - owned.keys():  # registered during the attack
        del module._buffers[name]
    for name, kept in owned.items():
        if module._buffers[name] is not kept and not isinstance(module, torch.jit.ScriptModule):
            module._buffers[name] = kept


def _random_state(device: str) -> Tensor:
    return torch.get_rng_state() if device == "cpu" else torch.cuda.get_rng_state(device)


def _set_random_state(device: str, state: Tensor) -> None:
    if device == "cpu":
        torch.set_rng_state(state)
    else:
        torch.cuda.set_rng_state(state, device)


_MODE = _Aspect(lambda module: module.training, _set_training)
_FLAG = _Aspect(lambda tensor: tensor.requires_grad, _set_requires_grad)
_BUFFERS = _Aspect(_buffers, _set_buffers)
_RANDOM = _Aspect(_random_state, _set_random_state)


# --- What others may change in the process --------------------------------------------------------------------------

_Settings = dict[str, tuple[Callable[[], Any], Callable[[Any], object]]]


def _flag(holder: Any, name: str) -> tuple[Callable[[], Any], Callable[[Any], object]]:
    return lambda: getattr(holder, name), lambda value: setattr(holder, name, value)


def _autocast(device: str) -> tuple[Callable[[], Any], Callable[[Any], object]]:
    def write(value: tuple[bool, torch.dtype]) -> None:
        torch.set_autocast_enabled(device, value[0])
        torch.set_autocast_dtype(device, value[1])

    return lambda: (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)), write


def _modes() -> tuple[Any, ...]:
    """Function and dispatch modes, entered and not left, and what is remembered of the default device, which is one."""
    return (
        overrides._get_current_function_mode_stack(),  # type: ignore[no-untyped-call]
        _python_dispatch._get_current_dispatch_mode_stack(),
        _device.CURRENT_DEVICE,
        getattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context", None),
    )


def _set_modes(modes: tuple[Any, ...]) -> None:
    for stack, kind in ((_modes()[0], overrides), (_modes()[1], _python_dispatch)):
        for _ in stack:
            kind._pop_mode()
    for mode in modes[0]:
        overrides._push_mode(mode)  # type: ignore[no-untyped-call]
    for mode in modes[1]:
        _python_dispatch._push_mode(mode)
    _device.CURRENT_DEVICE, torch._GLOBAL_DEVICE_CONTEXT.device_context = modes[2:]


def _flushes() -> bool:
    """Whether numbers too small for the full precision become zero."""
    least = torch.full((1,), 1e-40, dtype=torch.float32, device="cpu")
    return bool((least + least == 0).all())


_HOOKS = [name for name in vars(nn.modules.module) if name.startswith("_global_")]


def _global_hooks() -> dict[str, Any]:
    """The hooks that are called for each module that there is."""
    held = {name: getattr(nn.modules.module, name) for name in _HOOKS}
    return {name: dict(hooks) if isinstance(hooks, dict) else hooks for name, hooks in held.items()}


def _set_global_hooks(before: dict[str, Any]) -> None:
    for name, hooks in before.items():
        if isinstance(hooks, dict):
            held = getattr(nn.modules.module, name)
            held.clear()
            held.update(hooks)
        else:
            setattr(nn.modules.module, name, hooks)


def _numpy_state() -> Any:
    numpy = sys.modules.get("numpy")
    return None if numpy is None else numpy.random.get_state()


_THREAD: _Settings = {
    "modes and default device": (_modes, _set_modes),
    "autocast on the CPU": _autocast("cpu"),
    "autocast on CUDA": _autocast("cuda"),
    "denormal numbers": (_flushes, torch.set_flush_denormal),
}
_GLOBAL: _Settings = {
    "default dtype": (torch.get_default_dtype, torch.set_default_dtype),
    "deterministic algorithms": (
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1]),
    ),
    "precision of products": (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    "threads": (torch.get_num_threads, torch.set_num_threads),
    "anomaly detection": (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    "hooks of all modules": (_global_hooks, _set_global_hooks),
    "oneDNN": (lambda: torch.backends.mkldnn.enabled, torch.backends.mkldnn.set_flags),
    "cuDNN": _flag(torch.backends.cudnn, "enabled"),
    "cuDNN deterministic": _flag(torch.backends.cudnn, "deterministic"),
    "cuDNN benchmark": _flag(torch.backends.cudnn, "benchmark"),
}
_DRAWN: _Settings = {
    "Python": (random.getstate, random.setstate),
    "NumPy": (_numpy_state, lambda state: state and sys.modules["numpy"].random.set_state(state)),
    "torch": (torch.get_rng_state, torch.set_rng_state),
    "CUDA": (
        lambda: torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],  # type: ignore[no-untyped-call]
        torch.cuda.set_rng_state_all,
    ),
}


def _read(settings: _Settings) -> dict[str, Any]:
    return {name: read() for name, (read, _) in settings.items()}


def _write(settings: _Settings, values: dict[str, Any]) -> None:
    for name, (read, write) in settings.items():
        if settings is _DRAWN or read() != values[name]:
            write(values[name])


_PROCESS = _Aspect(lambda _: _read(_GLOBAL), lambda _, values: _write(_GLOBAL, values))
_NUMBERS = _Aspect(lambda _: _read(_DRAWN), lambda _, values: _write(_DRAWN, values))


# --- What others may change in a model ------------------------------------------------------------------------------

_NOTHING = object()
_KINDS = {"_parameters": "weights", "_buffers": "buffers", "_modules": "layers"}
_ORDER = ["weights", "buffers", "layers", "hooks", "methods", "attributes"]
_CONTAINERS = (dict, OrderedDict, defaultdict, list, tuple, set)
_DESCRIPTORS = (property, classmethod, staticmethod)
_REACHED = "reached"  # the kind of what only leads to layers and tensors, and is not watched itself


class _Was:
    """One object that is watched, as it was: a tensor's values, or what any other holds, by name or position."""

    def __init__(self, thing: Any) -> None:
        self.type = type(thing)
        self.holds: dict[Any, Any] = {} if isinstance(thing, Tensor) else _holdings(thing)
        if isinstance(thing, Tensor):
            # The memory too: `.data` may have been pointed elsewhere.
            self.memory = thing if thing.is_inference() else thing.data
            self.values = _copy(thing)
            self.grad = thing.grad if thing.is_leaf else None
            self.grad_values = None if self.grad is None else _copy(self.grad)


_PICTURE = _Aspect(_Was, None)  # _mend puts it back


class _Watched(NamedTuple):
    thing: Any
    was: _Was
    name: str
    kind: str


class _Change(NamedTuple):
    """Something that was found changed and has been put back; one that makes no difference has no kind."""

    name: str
    kind: str
    redo: Callable[[], object] | None = None


def _watched(borrower: _Borrower, model: Any) -> dict[int, _Watched]:
    """Everything that can be reached from a model through its layers and their containers, with a name for each."""
    found: dict[int, _Watched] = {}
    queue = deque([(model, "", _REACHED if _is_fixed(model) else "attributes")])
    while queue:
        thing, name, kind = queue.popleft()
        if id(thing) in found:
            continue
        was: _Was = borrower.take(_PICTURE, thing)
        found[id(thing)] = _Watched(thing, was, name, kind)
        if isinstance(thing, nn.Module):
            borrower.take(_MODE, thing)
            queue.extend((cls, cls.__name__, "methods") for cls in was.type.__mro__ if _is_layer_class(cls))
        elif isinstance(thing, Tensor):
            borrower.take(_FLAG, thing)
        for key, held in was.holds.items():
            if isinstance(held, Tensor | nn.Module) or type(held) in _CONTAINERS or _is_array(held):
                queue.append((held, *_place(thing, name, kind, key, held)))
            elif not isinstance(thing, nn.Module) and (kind == _REACHED or thing is model) and _is_near(thing, held):
                queue.append((held, name, _REACHED))
    return found


def _is_layer_class(thing: Any) -> bool:
    return isinstance(thing, type) and issubclass(thing, nn.Module) and thing is not nn.Module


def _is_array(thing: Any) -> bool:
    return type(thing).__module__ == "numpy" and type(thing).__name__ == "ndarray"


def _is_fixed(thing: Any) -> bool:
    """Whether it is a function, a method or a partial, of which only what it refers to can be watched."""
    return isinstance(thing, functools.partial) or hasattr(thing, "__code__") or hasattr(thing, "__func__")


def _is_near(thing: Any, other: Any) -> bool:
    """Whether `other` is a function that `thing` refers to, and not one of a library that a function refers to."""
    home = getattr(thing, "__globals__", None)
    return _is_fixed(other) and (home is None or getattr(other, "__globals__", home) is home)


def _holdings(thing: Any) -> dict[Any, Any]:
    """What an object holds: names or positions to objects."""
    if isinstance(thing, torch.jit.ScriptModule):
        own = (thing.named_parameters(), thing.named_buffers(), thing.named_children())
        return {name: held for named in own for name, held in named}
    if _is_layer_class(thing):  # what it inherits is watched there
        return {name: held for name, held in vars(thing).items() if callable(held) or isinstance(held, _DESCRIPTORS)}
    if isinstance(thing, dict):
        return dict(thing)
    if isinstance(thing, list | tuple):
        return dict(enumerate(thing))
    if isinstance(thing, set):
        return dict.fromkeys(thing)
    if _is_array(thing):
        return {"values": thing.tobytes()}
    if isinstance(thing, functools.partial):
        return {"function": thing.func, "arguments": thing.args, "options": thing.keywords}
    if not _is_fixed(thing):
        return dict(getattr(thing, "__dict__", {}))
    holds: dict[Any, Any] = {}
    code = getattr(thing, "__code__", None)
    for name, cell in zip(getattr(code, "co_freevars", ()), getattr(thing, "__closure__", None) or (), strict=False):
        with suppress(ValueError):  # not filled yet
            holds[name] = cell.cell_contents
    for name in getattr(code, "co_names", ()):
        if name in thing.__globals__:
            holds[name] = thing.__globals__[name]
    owner = getattr(thing, "__self__", None)
    if owner is not None:
        holds |= {"self": owner} if isinstance(owner, nn.Module) else dict(getattr(owner, "__dict__", {}))
    return holds


def _place(thing: Any, name: str, kind: str, key: Any, held: Any) -> tuple[str, str]:
    """Name and kind of what `thing`, itself called `name`, holds as `key`."""
    if isinstance(thing, nn.Module) and key in _KINDS:
        return name, _KINDS[key]
    place = f"{name}.{key}" if name else str(key)
    if isinstance(held, nn.Parameter):
        return place, "weights"
    if kind == _REACHED:
        return place, "weights" if isinstance(held, Tensor) or _is_array(held) else kind
    if type(thing) in _CONTAINERS:  # what an attribute or the hooks contain goes by their name
        return (place if kind in _KINDS.values() else name), kind
    if "hooks" in str(key):
        return place, "hooks"
    return place, "methods" if callable(held) and not isinstance(held, nn.Module) else "attributes"


def _settle(borrower: _Borrower, watched: dict[int, _Watched], model: Model, images: Tensor | None, who: str) -> None:
    """Put a watched model right; if it was changed, the borrower and all who share the model get an error."""
    changes = _mended(watched)
    bad = [change for change in changes if change.kind]
    if bad and images is not None:
        for item in watched.values():
            if isinstance(item.thing, nn.Module):
                item.thing.training = False
        for sample in (images, images[:1]):
            with suppress(Exception):  # a model's own code may raise anything
                model(sample.detach().clone())
        own = {change.name for change in _mended(watched)}
        bad = [change for change in bad if change.name not in own]
        for change in changes:
            if change.name in own and change.redo is not None:
                change.redo()
    if not bad:
        return
    first = min(bad, key=lambda change: _ORDER.index(change.kind))
    if others := borrower.others():
        who += ", or what ran at the same time in another thread,"
    for one in (borrower, *others):
        one.error = ModelChangedError(
            f"{who} changed the model's {first.kind} (first: {first.name}); they have been put back, and the results "
            "are not kept"
        )


def _mended(watched: dict[int, _Watched]) -> list[_Change]:
    return [change for item in watched.values() for change in _mend(item, watched)]


def _mend(item: _Watched, watched: dict[int, _Watched]) -> list[_Change]:
    """Put one object right; what was found."""
    thing, was = item.thing, item.was
    if isinstance(thing, Tensor):
        return _mend_tensor(item)
    if item.kind == _REACHED and not isinstance(thing, nn.Module):
        return []
    changes = []
    if isinstance(thing, nn.Module) and type(thing) is not was.type:
        changes.append(_Change(item.name or "the model's class", "layers"))
        thing.__class__ = was.type
    now = _holdings(thing)
    for key in {**was.holds, **now}:
        old, new = was.holds.get(key, _NOTHING), now.get(key, _NOTHING)
        if old is new or (isinstance(thing, nn.Module) and key == "training") or _is_equal(old, new):
            continue
        name, kind = _place(thing, item.name, item.kind, key, new if old is _NOTHING else old)
        if isinstance(old, Tensor) and isinstance(new, Tensor) and _is_same(watched[id(old)].was.values, new):
            kind = ""
        redo = None if kind in ("", "buffers") else functools.partial(_hold, thing, key, new)
        changes.append(_Change(name, kind, redo))
        _hold(thing, key, old)
    if isinstance(thing, dict) and list(thing) != list(was.holds):  # the order of layers is that of a Sequential
        if not changes:
            changes.append(_Change(item.name or "their order", item.kind))
        thing.clear()
        thing.update(was.holds)
    return changes


def _hold(thing: Any, key: Any, value: Any) -> None:
    """Let `thing` hold `value` as `key`, or nothing there, past what its class does on assignment."""
    if _is_array(thing):
        thing.setflags(write=True)
        thing[...] = type(thing)(thing.shape, thing.dtype, value)
    elif isinstance(thing, list):
        thing[key : None if value is _NOTHING else key + 1] = [] if value is _NOTHING else [value]
    elif isinstance(thing, set):
        (thing.discard if value is _NOTHING else thing.add)(key)
    elif isinstance(thing, type):
        delattr(thing, key) if value is _NOTHING else setattr(thing, key, value)
    elif isinstance(thing, dict) or hasattr(thing, "__dict__"):
        held = thing if isinstance(thing, dict) else vars(thing)
        if value is _NOTHING:
            held.pop(key, None)
        else:
            held[key] = value


def _mend_tensor(item: _Watched) -> list[_Change]:
    tensor, was = item.thing, item.was
    changed = not _is_same(was.values, tensor)
    if not tensor.is_inference() and (changed or _address(tensor) != _address(was.memory)):
        tensor.data = was.memory
    if changed and was.values is not None:
        try:
            with torch.inference_mode() if tensor.is_inference() else nullcontext():
                tensor.copy_(was.values)
        except RuntimeError:  # memory that overlaps itself
            tensor.data = was.values.clone()
    if tensor.is_leaf and tensor.grad is not was.grad:
        tensor.grad = was.grad
    if was.grad is not None and was.grad_values is not None and not _is_same(was.grad_values, was.grad):
        was.grad.copy_(was.grad_values)
    return [_Change(item.name, item.kind)] if changed else []


def _address(tensor: Tensor) -> int | None:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # sparse
        return None


def _copy(tensor: Tensor) -> Tensor | None:
    """The values, or None for a tensor that has none yet, of a lazy module, or that cannot be copied."""
    try:
        return tensor.detach().clone()
    except (RuntimeError, NotImplementedError, ValueError):
        return None


def _is_same(values: Tensor | None, tensor: Tensor) -> bool:
    """Whether a tensor has these values, bit for bit where they are NaN; True if they cannot be compared."""
    if values is None:
        return True
    if values.dtype != tensor.dtype or values.shape != tensor.shape or values.device != tensor.device:
        return False
    is_compared = False
    tensor = tensor.detach()
    for as_bits in (False, True):
        with suppress(RuntimeError, NotImplementedError):
            both = (t.reshape(-1).view(torch.uint8) if as_bits else t for t in (values, tensor))
            if torch.equal(*both):
                return True
            is_compared = True
    return not is_compared


def _is_equal(old: Any, new: Any) -> bool:
    plain = bool | int | float | complex | str | bytes | None | torch.dtype | torch.device | torch.Size
    return type(old) is type(new) and isinstance(old, plain) and (old == new or (old != old and new != new))

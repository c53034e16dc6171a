"""Lending a model to an attack and getting it back as it was, from our own attacks and from code that is not ours.

`borrowed` puts back what the attacks of this package change on purpose. `guarded` watches code that could do anything:
it puts back all that was changed, and raises if the results may depend on it. Both are counted, so that several threads
may attack one model, or models that share layers, at once: the last to finish leaves all as the first found it.
"""

from __future__ import annotations

import random
import sys
import threading
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from types import MethodType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn, overrides
from torch.nn.parameter import is_lazy
from torch.utils import _device, _python_dispatch

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
    buffers, and torch's global random state on the CPU and `device` are what they were. Parameters' ``.grad`` is never
    touched. Works inside ``torch.inference_mode()``, on models made there too.

    Raises:
        ModelChangedError: what another thread ran under `guarded` meanwhile has changed the model.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    parameters = [p for module in modules for p in module.parameters(recurse=False)]
    borrower = _Borrower()
    with torch.inference_mode(False), torch.no_grad():
        try:
            with _LOCK:
                for where in ("cpu", str(device)) if device.type == "cuda" else ("cpu",):
                    borrower.take(_DRAWN, where)
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
    if borrower.error is not None:
        raise borrower.error


@contextmanager
def guarded(
    model: Model, images: Tensor | None = None, who: str = "the attack", may_draw: bool = False
) -> Iterator[None]:
    """Watch a model while code that is not ours runs, which may change whatever it can reach.

    On the way out, also after an exception, everything is as it was: each module's training mode, the parameters'
    requires_grad and ``.grad``, weights and buffers by value, layers, hooks, methods and attributes of each module, and
    of the process the random states (torch, NumPy, Python), grad mode, autocast, default dtype and device, number of
    threads, hooks of all modules, and the deterministic and cuDNN flags. The model stays in the mode it is in. There is
    one copy of all weights and buffers in memory meanwhile; comparing reads them once more.

    Args:
        model: what the code could reach; also the modules in a function's closure, or behind a bound method, a partial
            or an object's attributes.
        images: (N, C, H, W) that the model takes. If it changed, it is asked about these once more, alone, in
            evaluation mode: what its own forward pass changes, such as a counter or a cache, is not held against the
            code. Buffers are put back all the same.
        who: the culprit in the message.
        may_draw: let the random states go on, as where each call is to draw anew.

    Raises:
        ModelChangedError: anything but training mode, requires_grad and ``.grad`` of the model was changed, and the
            code itself raised nothing.
    """
    borrower, watched = _Borrower(), None
    thread, has_grad = _read(_THREAD), torch.is_grad_enabled()  # which inference_mode(False) would turn on
    with torch.inference_mode(torch.is_inference_mode_enabled()), torch.set_grad_enabled(has_grad):
        try:
            with _LOCK, torch.inference_mode(False), torch.no_grad():
                borrower.take(_PROCESS, "process")
                cards = range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)  # type: ignore[no-untyped-call]
                for stream in () if may_draw else ("Python", "NumPy", "cpu", *(f"cuda:{card}" for card in cards)):
                    borrower.take(_DRAWN, stream)
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
    if borrower.error is not None:
        raise borrower.error


def in_evaluation(models: Sequence[Model]) -> bool:
    """Put borrowed models back into evaluation mode; whether they all were."""
    modules = [module for model in models if isinstance(model, nn.Module) for module in model.modules()]
    left = [module for module in modules if module.training]
    for module in left:
        module.training = False
    return not left


def is_foreign(code: object) -> bool:
    """Whether something can be called and is of neither this package nor torch, as far as its module's name says.

    A layer of torch may hold others and have hooks, and a method is its object's, so that neither says whose it is.
    """
    if isinstance(code, MethodType) and is_foreign(code.__self__):
        return True
    home = getattr(code, "__module__", None) or type(code).__module__
    return callable(code) and (isinstance(code, nn.Module) or home.partition(".")[0] not in ("orthattack", "torch"))


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


class _Aspect(NamedTuple):
    """Something about an object that is remembered, and how it is put back."""

    read: Callable[[Any], Any]
    write: Callable[[Any, Any], object] | None


_Setting = tuple[Callable[[], Any], Callable[[Any], object]]
"""How something of the process is read and written."""
_LOANS: dict[tuple[int, object], tuple[Any, list[int]]] = {}
"""Aspects of objects, each as the first borrower found it, with the threads of all who have it."""
_BORROWERS: list[_Borrower] = []


class _Borrower:
    """One borrower: each aspect it has taken, as it was then."""

    def __init__(self) -> None:
        self.thread = threading.get_ident()
        self.taken: dict[tuple[int, object], tuple[_Aspect, Any, Any]] = {}
        self.error: ModelChangedError | None = None
        _BORROWERS.append(self)

    def take(self, aspect: _Aspect, thing: Any) -> Any:
        """Remember `aspect` of an object or a name: as it is or, if another thread has it, as that found it."""
        key = (id(aspect), thing if isinstance(thing, str) else id(thing))
        if key not in self.taken:
            first, threads = _LOANS.get(key, (None, []))
            state = first if set(threads) - {self.thread} else aspect.read(thing)
            if not threads:  # or they were those of a borrower that was interrupted
                _LOANS[key] = (state, threads)
            threads.append(self.thread)
            self.taken[key] = (aspect, thing, state)
        return self.taken[key][2]

    def give_back(self) -> None:
        """Put back what no other thread has: as this borrower found it, the last one as the first did."""
        _BORROWERS.remove(self)
        buffers: list[tuple[nn.Module, _BuffersOf]] = []
        with ExitStack() as stack:  # which goes on after an error
            for key, (aspect, thing, state) in self.taken.items():
                first, threads = _LOANS[key]
                threads.remove(self.thread)
                if not threads:
                    del _LOANS[key]
                if aspect.write is not None and not set(threads) - {self.thread}:
                    before = state if threads else first
                    if aspect is _BUFFERS:
                        buffers.append((thing, before))
                    else:
                        stack.callback(aspect.write, thing, before)
            pairs = [
                (kept, state[1][name]) for _, state in buffers for name, kept in state[0].items() if kept is not None
            ]
            same = _same_on_gpu(pairs)
            for module, state in buffers:
                stack.callback(_set_buffers, module, state, same)
        self.taken.clear()

    def others(self) -> list[_Borrower]:
        """Those in other threads who have something of the same model."""
        mine = {key[1] for key in self.taken if isinstance(key[1], int)}
        others = [other for other in _BORROWERS if other.thread != self.thread]
        return [other for other in others if any(key[1] in mine for key in other.taken)]


_BuffersOf = tuple[dict[str, Tensor | None], dict[str, Tensor]]
"""A module's buffers by name: themselves, and copies of their values."""


def _same_on_gpu(pairs: Sequence[tuple[Tensor, Tensor]]) -> set[int]:
    """The ids of the first of each pair on a GPU, if all have the same bits: one question to it, not one each."""
    pairs = [pair for pair in pairs if pair[0].is_cuda and pair[1].is_cuda]
    with suppress(RuntimeError, NotImplementedError):  # of several GPUs, or sparse
        joined = [
            torch.cat([t.detach().reshape(-1).view(torch.uint8) for t in side]) for side in zip(*pairs, strict=True)
        ]
        if joined and torch.equal(*joined):
            return {id(first) for first, _ in pairs}
    return set()


def _set_buffers(module: nn.Module, state: _BuffersOf, same: Collection[int] = ()) -> None:
    owned, values = state
    for name, value in values.items():
        kept = owned[name]
        if kept is not None and id(kept) not in same and not _is_same(value, kept):
            with torch.inference_mode(kept.is_inference()):
                kept.copy_(value)
    for name in set(module._buffers.keys()) - owned.keys():  # registered during the attack
        del module._buffers[name]
    for name, kept in owned.items():
        if module._buffers[name] is not kept and not isinstance(module, torch.jit.ScriptModule):
            module._buffers[name] = kept


def random_stream(name: str) -> _Setting:
    """How the state of a stream of random numbers is read and written."""
    if name == "Python":
        return random.getstate, random.setstate
    if name == "NumPy":  # if somebody has imported it
        numpy = getattr(sys.modules.get("numpy"), "random", None)
        return (lambda: None, lambda _: None) if numpy is None else (numpy.get_state, numpy.set_state)
    if name == "cpu":
        return torch.get_rng_state, torch.set_rng_state
    return partial(torch.cuda.get_rng_state, name), lambda state: torch.cuda.set_rng_state(state, name)


_NOTHING = object()


def _named(holder: Any, name: str) -> _Setting:
    def write(value: Any) -> None:
        delattr(holder, name) if value is _NOTHING else setattr(holder, name, value)

    return lambda: getattr(holder, name, _NOTHING), write


def _entered(kind: Any, read: Callable[[], Any]) -> _Setting:
    """Modes that are entered, and may not be left."""

    def write(modes: list[Any]) -> None:
        for _ in read():
            kind._pop_mode()
        for mode in modes:
            kind._push_mode(mode)

    return read, write


_OF_MODULES = vars(nn.modules.module)
_HOOKS = [name for name in _OF_MODULES if name.startswith("_global_")]  # called for each module that there is


def _hooks(name: str) -> _Setting:
    if not isinstance(_OF_MODULES[name], dict):
        return _named(nn.modules.module, name)
    held = _OF_MODULES[name]  # which handles refer to
    return lambda: dict(held), lambda before: (held.clear(), held.update(before))


_AUTOCAST: Any = [
    (torch.is_autocast_enabled, torch.set_autocast_enabled),
    (torch.get_autocast_dtype, torch.set_autocast_dtype),
]
_THREAD = [
    _entered(overrides, overrides._get_current_function_mode_stack),  # the default device is one
    _entered(_python_dispatch, _python_dispatch._get_current_dispatch_mode_stack),
    _named(_device, "CURRENT_DEVICE"),
    _named(torch._GLOBAL_DEVICE_CONTEXT, "device_context"),
    *((partial(read, device), partial(write, device)) for read, write in _AUTOCAST for device in ("cpu", "cuda")),
    # Whether numbers too small for the full precision become zero.
    (
        lambda: bool((torch.full((1,), 1e-40, dtype=torch.float32, device="cpu") * 2 == 0).all()),
        torch.set_flush_denormal,
    ),
]
_GLOBAL = [
    (torch.get_default_dtype, torch.set_default_dtype),
    (
        lambda: (torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()),
        lambda value: torch.use_deterministic_algorithms(value[0], warn_only=value[1]),
    ),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision),
    (torch.get_num_threads, torch.set_num_threads),
    (torch.is_anomaly_enabled, torch.autograd.set_detect_anomaly),
    *map(_hooks, _HOOKS),
    (lambda: torch.backends.mkldnn.enabled, torch.backends.mkldnn.set_flags),
    *(_named(torch.backends.cudnn, name) for name in ("enabled", "deterministic", "benchmark")),
]


def _read(settings: Sequence[Any]) -> list[Any]:
    return [read() for read, _ in settings]


def _write(settings: Sequence[Any], values: list[Any]) -> None:
    for (read, write), value in zip(settings, values, strict=True):
        if read() != value:
            write(value)


_MODE = _Aspect(lambda module: module.training, lambda module, mode: setattr(module, "training", mode))
_FLAG = _Aspect(
    lambda tensor: tensor.requires_grad,
    lambda tensor, flag: tensor.requires_grad != flag and tensor.is_leaf and tensor.requires_grad_(flag),
)
_BUFFERS = _Aspect(
    lambda module: (dict(module._buffers), {k: b.clone() for k, b in module._buffers.items() if b is not None}),
    _set_buffers,
)
_DRAWN = _Aspect(lambda name: random_stream(name)[0](), lambda name, state: random_stream(name)[1](state))
_PROCESS = _Aspect(lambda _: _read(_GLOBAL), lambda _, values: _write(_GLOBAL, values))


_KINDS = {"_parameters": "weights", "_buffers": "buffers", "_modules": "layers"}
_ORDER = ["weights", "buffers", "layers", "hooks", "methods", "attributes"]
_CONTAINERS = (dict, OrderedDict, defaultdict, list, tuple, set)
_DESCRIPTORS = (property, classmethod, staticmethod)
_PLAIN = bool | int | float | complex | str | bytes | None | torch.dtype | torch.device | torch.Size
_REACHED = "reached"  # the kind of what only leads to layers and tensors, and is not watched itself


class _Was:
    """One object that is watched, as it was: its class, what it holds, by name or position, and a tensor's values."""

    def __init__(self, thing: Any) -> None:
        self.type, self.holds = type(thing), _holdings(thing)
        if isinstance(thing, Tensor):
            # The memory too: `.data` may have been pointed elsewhere.
            self.memory = thing if thing.is_inference() else thing.data
            self.values: Tensor | None = None  # of a lazy module, or of a kind that cannot be copied
            with suppress(RuntimeError, NotImplementedError, ValueError):
                self.values = thing.detach().clone()


_PICTURE = _Aspect(_Was, None)  # _mend puts it back
_Watched = dict[int, tuple[Any, _Was, str, str]]
"""By their ids, the objects that are watched, each as it was, its name, and the kind of what it is."""
_Change = tuple[str, str, Callable[[], object] | None]
"""What was found changed and has been put back, its kind, "" if it makes no difference, and how to change it again."""


def _watched(borrower: _Borrower, model: Any) -> _Watched:
    """Everything that can be reached from a model through its layers and their containers, with a name for each."""
    found: _Watched = {}
    queue = deque([(model, "", _REACHED if _is_fixed(model) else "attributes")])
    while queue:
        thing, name, kind = queue.popleft()
        if id(thing) in found:
            continue
        was: _Was = borrower.take(_PICTURE, thing)
        found[id(thing)] = (thing, was, name, kind)
        if isinstance(thing, nn.Module):
            borrower.take(_MODE, thing)
            queue.extend((cls, cls.__name__, "methods") for cls in was.type.__mro__ if _is_layer_class(cls))
        elif isinstance(thing, Tensor):
            borrower.take(_FLAG, thing)
        for key, held in was.holds.items():
            if isinstance(held, Tensor | nn.Module) or type(held) in _CONTAINERS or _is_array(held):
                queue.append((held, *_place(thing, name, kind, key, held)))
            elif not isinstance(thing, nn.Module) and (kind == _REACHED or thing is model) and _is_fixed(held):
                home = getattr(thing, "__globals__", None)
                if home is None or getattr(held, "__globals__", home) is home:  # no library's, that a function uses
                    queue.append((held, name, _REACHED))
    return found


def _is_layer_class(thing: Any) -> bool:
    return isinstance(thing, type) and issubclass(thing, nn.Module) and thing is not nn.Module


def _is_array(thing: Any) -> bool:
    return type(thing).__module__ == "numpy" and type(thing).__name__ == "ndarray"


def _is_fixed(thing: Any) -> bool:
    """Whether it is a function, a method or a partial, of which only what it refers to can be watched."""
    return isinstance(thing, partial) or hasattr(thing, "__code__") or hasattr(thing, "__func__")


def _holdings(thing: Any) -> dict[Any, Any]:
    """What an object holds: names or positions to objects."""
    if isinstance(thing, Tensor):
        return {"grad": thing.grad} if thing.is_leaf else {}
    if isinstance(thing, torch.jit.ScriptModule):
        own = (thing.named_parameters(), thing.named_buffers(), thing.named_children())
        return {name: held for named in own for name, held in named}
    if _is_layer_class(thing):  # what it inherits is watched there
        return {name: held for name, held in vars(thing).items() if callable(held) or isinstance(held, _DESCRIPTORS)}
    if isinstance(thing, dict | set):
        return dict(thing) if isinstance(thing, dict) else dict.fromkeys(thing)
    if isinstance(thing, list | tuple):
        return dict(enumerate(thing))
    if _is_array(thing):
        return {"values": thing.tobytes()}
    if isinstance(thing, partial):
        return {"function": thing.func, "arguments": thing.args, "options": thing.keywords}
    if not _is_fixed(thing):
        return dict(getattr(thing, "__dict__", {}))
    holds: dict[Any, Any] = {}
    code = getattr(thing, "__code__", None)
    for name, cell in zip(getattr(code, "co_freevars", ()), getattr(thing, "__closure__", None) or (), strict=False):
        with suppress(ValueError):  # not filled yet
            holds[name] = cell.cell_contents
    holds |= {name: thing.__globals__[name] for name in getattr(code, "co_names", ()) if name in thing.__globals__}
    owner = getattr(thing, "__self__", None)
    return holds | ({"self": owner} if isinstance(owner, nn.Module) else dict(getattr(owner, "__dict__", {})))


def _place(thing: Any, name: str, kind: str, key: Any, held: Any) -> tuple[str, str]:
    """Name and kind of what `thing`, itself called `name`, holds as `key`."""
    if isinstance(thing, nn.Module) and key in _KINDS:
        return name, _KINDS[key]
    place = f"{name}.{key}" if name else str(key)
    if isinstance(thing, Tensor):
        return place, ""
    if isinstance(held, nn.Parameter):
        return place, "weights"
    if kind == _REACHED:
        return place, "weights" if isinstance(held, Tensor) or _is_array(held) else kind
    if type(thing) in _CONTAINERS:  # what an attribute or the hooks contain goes by their name
        return (place if kind in _KINDS.values() else name), kind
    if "hooks" in str(key):
        return place, "hooks"
    return place, "methods" if callable(held) and not isinstance(held, nn.Module) else "attributes"


def _settle(borrower: _Borrower, watched: _Watched, model: Model, images: Tensor | None, who: str) -> None:
    """Put a watched model right; if it was changed, the borrower and all who share the model get an error."""
    changes = _mended(watched)
    bad = [(name, kind) for name, kind, _ in changes if kind]
    if bad and images is not None:
        for thing, *_ in watched.values():
            if isinstance(thing, nn.Module):
                thing.training = False
        for sample in (images, images[:1]):
            with suppress(Exception):  # a model's own code may raise anything
                model(sample.detach().clone())
        own = {name for name, *_ in _mended(watched)}
        bad = [(name, kind) for name, kind in bad if name not in own]
        for name, _, redo in changes:
            if name in own and redo is not None:
                redo()
    if not bad:
        return
    first, kind = min(bad, key=lambda found: _ORDER.index(found[1]))
    if others := borrower.others():
        who += ", or what ran at the same time in another thread,"
    for one in (borrower, *others):
        one.error = ModelChangedError(
            f"{who} changed the model's {kind} (first: {first}); they have been put back, and the results are not kept"
        )


def _mended(watched: _Watched) -> list[_Change]:
    """Put everything right; what was found."""
    pairs = [(thing, was.values) for thing, was, *_ in watched.values() if isinstance(thing, Tensor)]
    same = _same_on_gpu([(a, b) for a, b in pairs if b is not None and _are_alike(a, b)])
    return [change for item in watched.values() for change in _mend(*item, watched, same)]


def _mend(thing: Any, was: _Was, at: str, of: str, watched: _Watched, same: set[int]) -> list[_Change]:
    if of == _REACHED and not isinstance(thing, nn.Module):
        return []
    changes: list[_Change] = []
    if isinstance(thing, Tensor) and _mend_values(thing, was, same):
        changes.append((at, of, None))
    if isinstance(thing, nn.Module) and type(thing) is not was.type:
        changes.append((at or "the model's class", "layers", None))
        thing.__class__ = was.type
    now = _holdings(thing)
    for key in now if now.keys() == was.holds.keys() else {**was.holds, **now}:
        old, new = was.holds.get(key, _NOTHING), now.get(key, _NOTHING)
        if old is new or (key == "training" and isinstance(thing, nn.Module)):
            continue
        if type(old) is type(new) and isinstance(old, _PLAIN) and (old == new or (old != old and new != new)):
            continue
        name, kind = _place(thing, at, of, key, new if old is _NOTHING else old)
        if isinstance(old, Tensor) and isinstance(new, Tensor) and _is_same(watched[id(old)][1].values, new):
            kind = ""
        changes.append((name, kind, None if kind in ("", "buffers") else partial(_hold, thing, key, new)))
        _hold(thing, key, old)
    if isinstance(thing, dict) and list(thing) != list(was.holds):  # the order of layers is that of a Sequential
        if not changes:
            changes.append((at or "their order", of, None))
        thing.clear()
        thing.update(was.holds)
    return changes


def _hold(thing: Any, key: Any, value: Any) -> None:
    """Let `thing` hold `value` as `key`, or nothing there, past what its class does on assignment."""
    is_gone = value is _NOTHING
    if _is_array(thing):
        thing.setflags(write=True)
        thing[...] = type(thing)(thing.shape, thing.dtype, value)
    elif isinstance(thing, list):
        thing[key : None if is_gone else key + 1] = [] if is_gone else [value]
    elif isinstance(thing, set):
        (thing.discard if is_gone else thing.add)(key)
    elif isinstance(thing, type | Tensor):
        delattr(thing, key) if is_gone else setattr(thing, key, value)
    elif isinstance(thing, dict) or hasattr(thing, "__dict__"):
        held = thing if isinstance(thing, dict) else vars(thing)
        held.pop(key, None) if is_gone else held.update({key: value})


def _mend_values(tensor: Tensor, was: _Was, same: set[int]) -> bool:
    """Give a tensor its memory and values back; whether these had changed."""
    changed = id(tensor) not in same and not _is_same(was.values, tensor)
    if not tensor.is_inference() and (changed or _address(tensor) != _address(was.memory)):
        tensor.data = was.memory
    if changed and was.values is not None:
        try:
            with torch.inference_mode() if tensor.is_inference() else nullcontext():
                tensor.copy_(was.values)
        except RuntimeError:  # memory that overlaps itself
            tensor.data = was.values.clone()
    return changed


def _address(tensor: Tensor) -> int | None:
    try:
        return tensor.data_ptr()
    except RuntimeError:  # sparse
        return None


def _are_alike(a: Tensor, b: Tensor) -> bool:
    return (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device)


def _is_same(values: Tensor | None, tensor: Tensor) -> bool:
    """Whether a tensor has these values, bit for bit where they are NaN; True if they cannot be compared."""
    if values is None:
        return True
    if not _are_alike(values, tensor):
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

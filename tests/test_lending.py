"""What is lent comes back as it was, and code that changes it is found out."""

from __future__ import annotations

import functools
import random
import threading
import warnings

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from orthattack.lending import ModelChangedError, borrowed, guarded

CPU = torch.device("cpu")


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.norm = nn.BatchNorm2d(4)
        self.head = nn.Sequential(nn.Flatten(), nn.Linear(64, 5))
        self.scale, self.shift, self.sizes = 1.0, torch.zeros(1), [1, 2]
        self.weights = np.ones(3)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.norm(self.conv(images)).relu() * self.scale + self.shift)


@pytest.fixture
def model() -> Small:
    torch.manual_seed(0)
    made = Small().eval()
    made.norm.train()
    made.conv.bias.requires_grad_(False)
    made.head[1].weight.grad = torch.ones(5, 64)
    return made


@pytest.fixture
def images() -> Tensor:
    return torch.rand(4, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def state(model: nn.Module) -> list[object]:
    seen: list[object] = [(name, type(module), module.training) for name, module in model.named_modules()]
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        grad = None if tensor.grad is None else tensor.grad.tolist()
        seen.append(
            (name, id(tensor), tensor.data_ptr(), tensor.requires_grad, grad, tensor.dtype, repr(tensor.tolist()))
        )
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks) for m in model.modules()]
    return [*seen, hooks, [sorted(vars(module)) for module in model.modules()], getattr(model, "sizes", None)]


def write_weight(m: Small) -> Small:
    m.conv.weight.data.mul_(2)
    return m


def point_elsewhere(m: Small) -> None:
    m.head[1].weight.data = torch.zeros(5, 64)


def replace_a_layer(m: Small) -> None:
    m.head[1] = nn.Linear(64, 5)


def swap_layers(m: Small) -> None:
    m.head.append(nn.ReLU())


def leave_a_hook(m: Small) -> None:
    m.conv.register_forward_hook(lambda *_: None)


def shadow_forward(m: Small) -> None:
    m.norm.forward = lambda x: x


def patch_the_class(m: Small) -> None:
    Small.forward = lambda self, x: self.head[1](x.flatten(1)[:, :64])


def change_class(m: Small) -> None:
    m.norm.__class__ = nn.InstanceNorm2d


CHANGES = {
    write_weight: "weights (first: conv.weight)",
    point_elsewhere: "weights (first: head.1.weight)",
    lambda m: m.half(): "weights (first: conv.weight)",
    lambda m: m.head[1].weight.data.fill_(float("nan")): "weights (first: head.1.weight)",
    lambda m: setattr(m.conv, "bias", None): "weights (first: conv.bias)",
    lambda m: m.register_parameter("more", nn.Parameter(torch.ones(1))): "weights (first: more)",
    lambda m: m.train()(torch.rand(4, 3, 6, 6)): "buffers (first: norm.running_mean)",
    lambda m: m.norm.running_var.zero_(): "buffers (first: norm.running_var)",
    lambda m: setattr(m.norm, "running_var", torch.zeros(4)): "buffers (first: norm.running_var)",
    lambda m: m.register_buffer("cache", torch.ones(1)): "buffers (first: cache)",
    lambda m: delattr(m.norm, "running_mean"): "buffers (first: norm.running_mean)",
    replace_a_layer: "layers (first: head.1)",
    swap_layers: "layers (first: head.2)",
    change_class: "layers (first: norm)",
    lambda m: m._modules.move_to_end("conv") if hasattr(m._modules, "move_to_end") else swap_layers(m): "layers",
    lambda m: setattr(m, "_modules", {}): "layers",
    leave_a_hook: "hooks (first: conv._forward_hooks)",
    shadow_forward: "methods (first: norm.forward)",
    patch_the_class: "methods (first: Small.forward)",
    lambda m: setattr(m, "scale", 0.0): "attributes (first: scale)",
    lambda m: m.shift.fill_(9): "attributes (first: shift)",
    lambda m: m.sizes.append(3): "attributes (first: sizes)",
    lambda m: m.weights.fill(0): "attributes (first: weights.values)",
}


@pytest.mark.parametrize("with_images", [True, False])
@pytest.mark.parametrize("change", CHANGES)
def test_whatever_is_changed_is_put_right_and_said(model, images, change, with_images):
    model.norm.running_mean[0] = float("nan")  # equal to itself
    before, expected = state(model), model.eval().conv(images)
    model.norm.train()
    with pytest.raises(ModelChangedError) as error, guarded(model, images if with_images else None, "the loss"):
        change(model)
    message = str(error.value)
    assert message.startswith(f"the loss changed the model's {CHANGES[change]}")
    assert message.endswith("they have been put back, and the results are not kept")
    assert state(model) == before
    assert torch.equal(model.eval().conv(images), expected)
    assert model.scale == 1
    assert model.shift.item() == 0
    assert model.weights.tolist() == [1, 1, 1]
    assert Small.forward.__qualname__ == "Small.forward"


def flip(m: Small) -> None:
    m.train()
    m.requires_grad_(False)


def differentiate(m: Small) -> None:
    m.requires_grad_(True).eval()(torch.rand(4, 3, 6, 6)).sum().backward()


def drop_gradients(m: Small) -> None:
    m.head[1].weight.grad.zero_()
    m.zero_grad()


def replace_by_its_equal(m: Small) -> None:
    m.conv.weight = nn.Parameter(m.conv.weight.detach().clone())
    m.head[1].bias.data = m.head[1].bias.data.clone()


def write_and_put_back(m: Small) -> None:
    kept = m.conv.weight.detach().clone()
    m.conv.weight.data.zero_()
    m.conv.weight.data.copy_(kept)


@pytest.mark.parametrize("change", [flip, differentiate, drop_gradients, replace_by_its_equal, write_and_put_back])
def test_what_any_attack_does_is_put_right_without_a_word(model, images, change):
    before = state(model)
    with guarded(model, images):
        change(model)
    assert state(model) == before


class Doubled(TorchFunctionMode):
    def __torch_function__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        return 2 * found if func is nn.functional.linear else found


class DoubledInside(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        return found + found if "addmm" in str(func) else found


def leave_traces() -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_default_device("meta")
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.set_num_threads(torch.get_num_threads() + 1)
    torch.set_float32_matmul_precision("medium")
    torch.set_autocast_enabled("cpu", True)
    torch.autograd.set_detect_anomaly(True)
    torch.backends.cudnn.benchmark = not torch.backends.cudnn.benchmark
    torch.backends.cudnn.deterministic = not torch.backends.cudnn.deterministic
    torch.set_grad_enabled(False)
    torch.inference_mode().__enter__()
    torch.set_flush_denormal(True)
    torch.backends.mkldnn.set_flags(False)
    Doubled().__enter__()
    DoubledInside().__enter__()
    torch.device("meta").__enter__()
    nn.modules.module.register_module_forward_hook(lambda module, given, found: 2 * found)
    nn.modules.module.register_module_forward_pre_hook(lambda module, given: None)
    nn.modules.module.register_module_full_backward_hook(lambda module, given, found: None)
    for seed in (torch.manual_seed, np.random.seed, random.seed):
        seed(7)


def process() -> list[object]:
    return [
        torch.get_default_dtype(), torch.get_default_device(), torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(), torch.get_num_threads(),
        torch.get_float32_matmul_precision(), torch.is_autocast_enabled("cpu"), torch.is_anomaly_enabled(),
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic, torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(), torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(),
        random.getstate(), torch.backends.mkldnn.enabled, bool((torch.full((1,), 1e-40) * 1 == 0).all()),
        nn.functional.linear(torch.ones(1, 2), torch.ones(1, 2), torch.ones(1)).tolist(),
        nn.Identity()(torch.ones(1)).tolist(), torch.zeros(()).is_meta,
    ]  # fmt: skip


@pytest.mark.parametrize("context", [torch.no_grad, torch.enable_grad, torch.inference_mode])
def test_what_is_left_in_the_process_is_put_right(model, images, context):
    with context():
        before = process()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with guarded(model, images):
                leave_traces()
        assert process() == before
    assert not hasattr(torch._GLOBAL_DEVICE_CONTEXT, "device_context")  # where torch 2.4 could not read None


def test_after_an_exception_too_which_is_what_is_raised(model, images):
    before = state(model)
    with pytest.raises(RuntimeError, match="size"), guarded(model, images):
        write_weight(model.train())(images[:, :2])
    assert state(model) == before


class Stateful(Small):
    """Counts, caches and registers in its own forward pass, which is nobody's fault."""

    def __init__(self) -> None:
        super().__init__()
        self.calls, self.cache = 0, {}
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        self.calls += 1
        self.cache[len(images)] = images
        self.seen += len(images)
        if not hasattr(self, "table"):
            self.register_buffer("table", torch.ones(1))
            self.late = nn.Identity()
        return super().forward(images)


def test_what_the_forward_pass_changes_is_not_held_against_the_code(images):
    model = Stateful().eval()
    with guarded(model, images):
        model(images[:3])
        model(images[:2])
    assert model.calls == 2
    assert model.seen.item() == 0
    assert not hasattr(model, "table")
    assert isinstance(model.late, nn.Identity)
    with pytest.raises(ModelChangedError, match=r"weights \(first: conv.weight\)"), guarded(model, images):
        write_weight(model)(images[:2])
    with pytest.raises(ModelChangedError, match="buffers"), guarded(model):
        model(images)


def old_weight_norm() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nn.Sequential(nn.Flatten(), nn.utils.weight_norm(nn.Linear(108, 5)))


def tied() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 108), nn.Linear(108, 108), nn.Linear(108, 5))
    model[2].weight = model[1].weight
    return model


def overlapping() -> nn.Module:
    model = nn.Sequential(nn.Flatten(), nn.Linear(108, 5))
    model.register_buffer("wide", torch.ones(1).expand(7))
    return model


def parametrized() -> nn.Module:
    layer = parametrizations.spectral_norm(parametrizations.weight_norm(nn.Linear(108, 5)), "bias")
    return nn.Sequential(nn.Flatten(), layer)


def in_inference_mode() -> nn.Module:
    with torch.inference_mode():
        return nn.Sequential(nn.Flatten(), nn.Linear(108, 5), nn.BatchNorm1d(5))


ODD = {
    "tied": tied,
    "weight_norm": old_weight_norm,
    "parametrized": parametrized,
    "inference": in_inference_mode,
    "overlapping": overlapping,
    "scripted": lambda: torch.jit.script(nn.Sequential(nn.Flatten(), nn.Linear(108, 5), nn.BatchNorm1d(5))),
    "traced": lambda: torch.jit.trace(nn.Sequential(nn.Flatten(), nn.Linear(108, 5)), torch.rand(1, 3, 6, 6)),
    "lazy": lambda: nn.Sequential(nn.Flatten(), nn.LazyLinear(5)),
    "recurrent": lambda: nn.Sequential(nn.Flatten(2), nn.LSTM(36, 8, batch_first=True)),
    "quantised": lambda: nn.Sequential(nn.Flatten(), torch.ao.nn.quantized.dynamic.Linear(108, 5)),
    "half": lambda: nn.Sequential(nn.Flatten(), nn.Linear(108, 5)).bfloat16(),
    "empty": nn.Flatten,
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ODD)
def test_odd_models_are_watched_without_a_false_word(kind, images):
    model = ODD[kind]().eval()
    if kind == "half":
        images = images.bfloat16()
    with torch.no_grad():
        expected = None if kind == "lazy" else model(images)
        with guarded(model, images):
            model.train().eval()
            model(images[:2])
        weights = [p for p in model.parameters() if p.numel() > 5]
        expected = model(images) if expected is None else expected
        if weights:
            mode = torch.inference_mode(weights[0].is_inference())
            with pytest.raises(ModelChangedError, match="weights"), guarded(model, images), mode:
                weights[0].data.zero_()
        found = model(images)
    for a, b in zip(*((x,) if isinstance(x, Tensor) else x[:1] for x in (expected, found)), strict=True):
        assert torch.equal(a, b)


def test_a_parametrization_left_on_a_layer_is_taken_off(model, images):
    before = state(model)
    with pytest.raises(ModelChangedError), guarded(model, images):
        parametrize.register_parametrization(model.conv, "weight", nn.Identity())
    assert state(model) == before
    assert model.conv.weight.shape == (4, 3, 3, 3)


def test_a_buffer_that_overlaps_itself_is_put_back():
    model = overlapping()
    with pytest.raises(ModelChangedError, match=r"buffers \(first: wide\)"), guarded(model):
        model.wide.data = torch.zeros(7)
    assert model.wide.tolist() == [1] * 7


class Holder:
    def __init__(self, net: nn.Module) -> None:
        self.net, self.calls = net, 0

    def __call__(self, images: Tensor) -> Tensor:
        self.calls += 1
        return self.net(images)

    def predict(self, images: Tensor) -> Tensor:
        return self(images)


def call(net: nn.Module, images: Tensor) -> Tensor:
    return net(images)


GLOBAL = nn.Sequential(nn.Flatten(), nn.Linear(108, 5))


def by_global(images: Tensor) -> Tensor:
    return GLOBAL(images)


@pytest.mark.parametrize("kind", ["closure", "list", "object", "method", "partial", "nested", "own forward", "global"])
def test_the_modules_behind_a_function_are_watched(kind, images):
    net = GLOBAL if kind == "global" else nn.Sequential(nn.Flatten(), nn.Linear(108, 5))
    several = [net]
    one = lambda x: net(x)  # noqa: E731
    made = {
        "closure": one,
        "list": lambda x: sum(n(x) for n in several),
        "object": Holder(net),
        "method": Holder(net).predict,
        "partial": functools.partial(call, net),
        "nested": lambda x: one(x) - 1,
        "own forward": net.forward,
        "global": by_global,
    }
    model, kept = made[kind], net[1].weight.detach().clone()
    with guarded(model, images):
        model(images)
    with pytest.raises(ModelChangedError, match=r"weights \(first: .*1.weight\)"), guarded(model, images):
        net[1].weight.data.zero_()
    assert torch.equal(net[1].weight, kept)


def test_guards_nest(model, images):
    before = state(model)
    with guarded(model, images):
        kept = model.conv.weight.detach().clone()
        model.conv.weight.data.mul_(2)
        with guarded(model, images), borrowed(model, CPU):  # which compares with what it found
            assert not model.norm.training
        assert model.norm.training
        with pytest.raises(ModelChangedError), guarded(model, images):
            model.conv.weight.data.mul_(3)
        assert torch.equal(model.conv.weight, 2 * kept)
        model.conv.weight.data.copy_(kept)
    assert state(model) == before


class Elsewhere:
    """A context that is entered and left in one and the same other thread, when told to."""

    def __init__(self, context: object) -> None:
        self.told, self.done, self.error = threading.Semaphore(0), threading.Semaphore(0), None
        self.context = context
        self.thread = threading.Thread(target=self.run)
        self.thread.start()

    def run(self) -> None:
        self.told.acquire()
        try:
            with self.context:
                self.done.release()
                self.told.acquire()
        except Exception as error:
            self.error = error
        self.done.release()

    def go_on(self) -> None:
        self.told.release()
        self.done.acquire()


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("first_out", [0, 1])
def test_the_last_of_two_threads_to_finish_puts_the_model_back(model, images, first_out, wrapped):
    before, numbers = state(model), torch.get_rng_state()
    other = nn.Sequential(model, nn.Identity()) if wrapped else model  # which shares the layers
    both = [Elsewhere(borrowed(model, CPU)), Elsewhere(borrowed(other, CPU))]
    both[0].go_on()
    model.norm.running_mean += 1
    both[1].go_on()
    torch.rand(3)
    both[first_out].go_on()
    assert not any(module.training for module in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    both[1 - first_out].go_on()
    assert state(model) == before
    assert torch.equal(torch.get_rng_state(), numbers)


def test_a_thread_that_changes_the_model_is_an_error_in_those_beside_it(model, images):
    before = state(model)
    guilty, guarded_too, plain = (
        Elsewhere(guarded(model, images, "the loss")),
        Elsewhere(guarded(model, images)),
        Elsewhere(borrowed(model, CPU)),
    )
    guilty.go_on()
    write_weight(model)  # before the others come
    guarded_too.go_on()
    plain.go_on()
    guilty.go_on()
    for other in (guarded_too, plain):
        other.go_on()
    for each in (guilty, guarded_too, plain):
        assert isinstance(each.error, ModelChangedError)
    assert "the loss, or what ran at the same time in another thread, changed the model's weights" in str(guilty.error)
    assert state(model) == before


def test_an_interrupt_while_the_guard_looks_is_an_interrupt(model, images, monkeypatch):
    """Ctrl-C may come at any moment: it is not turned into another error, and nothing is left behind."""

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    before = model.head[1].weight.clone()
    with monkeypatch.context() as patched:
        patched.setattr("orthattack.lending._watched", interrupted)
        with pytest.raises(KeyboardInterrupt), guarded(model, images):
            raise AssertionError("the code was run")
    with guarded(model, images):
        model.norm.eval()
    assert torch.equal(model.head[1].weight, before)
    assert model.norm.training

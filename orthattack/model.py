"""What an attack does with a model: normalise its input, borrow it, and give it back as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["Model", "Normalized", "borrowed"]

Model = Callable[[Tensor], Tensor]
"""Images (N, C, H, W) to logits (N, K): an nn.Module or any differentiable function."""


class Normalized(nn.Module):
    """A model that takes images in [0, 1] and normalises them itself: ``model((images - mean) / std)``.

    Args:
        model: takes normalised images.
        mean: one number per channel, in units of [0, 1] pixels.
        std: one number > 0 per channel.

    Raises:
        ValueError: the lengths differ, or a std is not positive.

    >>> model = Normalized(nn.Flatten(), mean=[0.5], std=[0.25])
    >>> model(torch.ones(1, 1, 1, 2))
    tensor([[2., 2.]])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, model: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if len(mean) != len(std) or min(std, default=0) <= 0:
            raise ValueError(f"mean and std must have one number per channel, std > 0; got {mean} and {std}")
        self.model = model
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.model((images - self.mean.to(images.dtype)) / self.std.to(images.dtype))
        return logits


@contextmanager
def borrowed(model: Model, device: torch.device) -> Iterator[Model]:
    """Lend a model to an attack, in evaluation mode and without gradients for its parameters.

    On the way out, also after an exception, every module's own training mode, every parameter's requires_grad, the
    buffers, and the global random state of the CPU and of `device` are what they were. Parameters' ``.grad`` is never
    touched. Works inside ``torch.inference_mode()``, on models made there too.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    training = [module.training for module in modules]
    parameters = [p for module in modules for p in module.parameters(recurse=False)]
    required = [p.requires_grad for p in parameters]
    buffers = [dict(module._buffers) for module in modules]
    with torch.inference_mode(False), torch.no_grad():
        values = [{name: b.clone() for name, b in owned.items() if b is not None} for owned in buffers]
        cuda = [device] if device.type == "cuda" else []
        try:
            with torch.random.fork_rng(devices=cuda):
                for module in modules:  # not eval(), which a model may have overridden to do more than this
                    module.training = False
                for parameter in parameters:
                    if not parameter.is_inference():
                        parameter.requires_grad_(False)
                yield _differentiable(model)
        finally:
            for module, mode in zip(modules, training, strict=True):
                module.training = mode
            for parameter, flag in zip(parameters, required, strict=True):
                if parameter.requires_grad != flag:
                    parameter.requires_grad_(flag)
            for module, owned, copies in zip(modules, buffers, values, strict=True):
                for name, value in copies.items():
                    kept = owned[name]
                    if kept is not None and not torch.equal(kept, value):
                        with torch.inference_mode(kept.is_inference()):
                            kept.copy_(value)
                for name in set(module._buffers.keys()) - owned.keys():  # registered during the attack
                    del module._buffers[name]
                for name, kept in owned.items():
                    if module._buffers[name] is not kept and not isinstance(module, torch.jit.ScriptModule):
                        module._buffers[name] = kept


def _differentiable(model: Model) -> Model:
    """The model itself or, if its tensors were made in inference mode, which autograd refuses, one with copies."""
    if not isinstance(model, nn.Module):
        return model
    state = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if not any(tensor.is_inference() for tensor in state.values()):
        return model
    copies = {name: tensor.detach().clone() for name, tensor in state.items()}

    def call(images: Tensor) -> Tensor:
        logits: Tensor = torch.func.functional_call(model, copies, (images,))
        return logits

    return call

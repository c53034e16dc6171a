"""What an attack does with a model: normalise its input, borrow it, and give it back as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn

__all__ = ["Ensemble", "Model", "Normalized", "borrowed", "fooled"]

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


class Ensemble(nn.Module):
    """Several models as one, to craft adversarials that transfer to others.

    Args:
        models: each takes images (N, C, H, W) and returns logits (N, K), with the same classes; at least one.
        average: "logits" averages the logits (Dong et al. 2018, arXiv:1710.06081); "loss" returns
            ``mean_m log softmax(z_m)``, from which ``loss=Ensemble.mean_loss`` makes the mean of the models'
            cross-entropies ("ce" would normalise once more).

    Raises:
        ValueError: no model, or an unknown average.

    >>> ensemble = Ensemble([nn.Flatten(), nn.Flatten()])
    >>> ensemble(torch.ones(1, 1, 1, 2))
    tensor([[1., 1.]])
    """

    def __init__(self, models: Sequence[nn.Module], average: Literal["logits", "loss"] = "logits") -> None:
        super().__init__()
        if len(models) == 0:
            raise ValueError("models must be at least one model")
        if average not in ("logits", "loss"):
            raise ValueError(f"average must be 'logits' or 'loss'; got {average!r}")
        self.models, self.average = nn.ModuleList(models), average

    def forward(self, images: Tensor) -> Tensor:
        logits = torch.stack([model(images) for model in self.models])
        mean: Tensor = (logits.log_softmax(2) if self.average == "loss" else logits).mean(0)
        return mean

    @staticmethod
    def mean_loss(logits: Tensor, labels: Tensor) -> Tensor:
        """The mean cross-entropy of the members, from the output of an ensemble with ``average="loss"``. (N,)."""
        return -logits.gather(1, labels.unsqueeze(1)).squeeze(1)


def fooled(model: Model, adversarials: Tensor, labels: Tensor, targeted: bool = False, batch_size: int = 64) -> Tensor:
    """Whether a model, for example one that the adversarials were not made for, is fooled by each of them.

    Args:
        model: images (N, C, H, W) to logits (N, K); it is evaluated in evaluation mode and comes back as it was.
        adversarials: (N, C, H, W).
        labels: (N,) the true classes or, if targeted, the classes to reach.
        targeted: whether the labels are targets.
        batch_size: images per evaluation.

    Returns:
        (N,) bool. An image that was misclassified to begin with counts as fooled.
    """
    found = torch.zeros(len(adversarials), dtype=torch.bool, device=adversarials.device)
    with borrowed(model, adversarials.device) as lent, torch.no_grad():
        for first in range(0, len(adversarials), batch_size):
            part = slice(first, first + batch_size)
            logits = lent(adversarials[part].clone())  # which a model may write into
            hit = logits.argmax(1) == labels[part]
            found[part] = (hit if targeted else ~hit) & ~logits.isnan().any(1)
    return found


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

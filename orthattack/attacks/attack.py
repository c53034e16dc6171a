"""The one loop that every attack here runs: climb a loss inside a threat model and keep the best iterate.

A concrete attack (see `orthattack.attacks.pgd`) chooses the options; it overrides nothing.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from orthattack.attacks.oracle import Evaluation, Oracle, Precision
from orthattack.losses import Loss, attack_loss
from orthattack.model import Model, borrowed
from orthattack.projection import alignment, orthogonalize
from orthattack.threat import Region, ThreatModel, perturbation_norm

__all__ = ["Attack", "AttackResult", "Enforce", "Reference"]

Enforce = Literal["perturbation", "gradient"]
Reference = Literal["clean", "iterate"]


@dataclass(frozen=True)
class AttackResult:
    """What an attack found, one entry per sample.

    Attributes:
        adversarials: (N, C, H, W), shape, dtype and device of the images.
        success: (N,) bool: the model, in its own precision, is fooled by exactly this adversarial (targeted: predicts
            the target).
        loss: (N,) the loss that the attack maximised, at the adversarial; negated if targeted.
        steps: (N,) int64: gradient steps from the start of its restart to the adversarial.
        cosine: (N,) largest |cos(delta, image)| over the vectors of the scope, from float64.
        norm: (N,) norm of the perturbation, in the norm of the attack and in pixel units.
        zero_gradients: (N,) int64: at how many steps the loss had no usable gradient: zero, or not finite.
        forward_calls: (N,) int64: how often the model was evaluated on the sample.
        gradient_calls: (N,) int64: how often its gradient was.
    """

    adversarials: Tensor
    success: Tensor
    loss: Tensor
    steps: Tensor
    cosine: Tensor
    norm: Tensor
    zero_gradients: Tensor
    forward_calls: Tensor
    gradient_calls: Tensor

    @property
    def samples_with_zero_gradient(self) -> int:
        """How many samples met a zero gradient at least once: a sign of a masked gradient or a saturated loss."""
        return int((self.zero_gradients > 0).sum())


class Attack:
    """A model, a threat model and the way to climb: call it with images and labels.

    ``attack(images, labels)`` returns the adversarial images, ``attack.run(images, labels)`` an `AttackResult`.
    Concrete attacks document their arguments.
    """

    def __init__(
        self,
        model: Model,
        *,
        threat: ThreatModel,
        alpha: float | None,
        loss: Loss,
        targeted: bool,
        precision: Precision,
        enforce: Enforce = "perturbation",
        reference: Reference = "clean",
        steps: int = 1,
        random_start: bool = False,
        restarts: int = 1,
        early_stop: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        if not callable(model):
            raise ValueError(f"model must be callable on a batch of images; got {type(model).__name__}")
        _check_choice("enforce", enforce, get_args(Enforce))
        _check_choice("reference", reference, get_args(Reference))
        _check_choice("precision", precision, get_args(Precision))
        if reference == "iterate" and enforce == "perturbation":
            raise ValueError(
                'reference="iterate" needs enforce="gradient": a perturbation is orthogonal to the clean image'
            )
        if generator is not None and not isinstance(generator, torch.Generator):
            raise ValueError(f"generator must be a torch.Generator; got {generator!r}: seed one with manual_seed")
        _check_count("steps", steps)
        _check_count("restarts", restarts)
        if alpha is None:
            alpha = 2.5 * threat.eps / steps
        if not (math.isfinite(alpha) and alpha >= 0):
            raise ValueError(f"alpha must be a finite step size >= 0, in pixel units such as 2/255; got {alpha!r}")
        if restarts > 1 and not random_start:
            raise ValueError(f"restarts={restarts} needs random_start=True: every restart would be the same")
        self.model = model
        self.threat = threat
        self.enforce, self.reference = enforce, reference
        self.alpha, self.steps = float(alpha), steps
        self.random_start, self.restarts = random_start, restarts
        self.loss, self.targeted = loss, targeted
        self.early_stop, self.precision = early_stop, precision
        self._loss = attack_loss(loss, targeted)
        # Its own stream, so that an attack leaves the global one alone; seeded by torch.manual_seed all the same.
        self.generator = torch.Generator().manual_seed(torch.initial_seed()) if generator is None else generator

    def __repr__(self) -> str:
        threat = self.threat
        options = [f"norm={threat.norm!r}", f"eps={threat.eps:.6g}", f"alpha={self.alpha:.6g}", f"steps={self.steps}"]
        if threat.scope is not None:
            options += [f"scope={threat.scope!r}", f"enforce={self.enforce!r}"]
        return f"{type(self).__name__}({', '.join(options)})"

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Adversarial images for (N, C, H, W) images and (N,) labels (targeted: the classes to reach)."""
        return self.run(images, labels).adversarials

    def run(self, images: Tensor, labels: Tensor) -> AttackResult:
        """Attack a batch and report.

        Each sample's adversarial is the best of all its iterates, in all restarts, the first and the last one
        included: one that fools the model if there is one, and of those (or of the others) the one with the highest
        loss. With `early_stop` it is the first that fools the model.

        Args:
            images: (N, C, H, W), floating point, inside the bounds; values off by round-off are clamped.
            labels: (N,), integers: the true classes or, if targeted, the classes to reach.

        Raises:
            ValueError: images or labels of the wrong kind (the message says what and where), or a model whose output
                is not (N, K) logits, is not finite, or does not depend differentiably on the images.
        """
        with torch.inference_mode(False), torch.no_grad():
            x, labels = self._checked(images, labels)
            best = _Best(x)
            if len(x) > 0:
                # The textbook form projects the gradient and nothing else: its perturbations are as free as PGD's.
                textbook = self.enforce == "gradient"
                region = (replace(self.threat, scope=None) if textbook else self.threat).around(x)
                with borrowed(self.model, x.device) as model:
                    oracle = Oracle(model, self._loss, self.targeted, self.precision)
                    for _ in range(self.restarts):
                        start = region.random_start(self.generator) if self.random_start else x.clone()
                        self._climb(oracle, region, x, labels, start, best)
                    if self.precision != "float32":  # what is returned is judged in the model's own precision
                        best.judge(oracle.evaluate(best.adversarials, labels, best.success, with_gradient=False))
            return best.result(x, self.threat)

    def _climb(self, oracle: Oracle, region: Region, x: Tensor, labels: Tensor, points: Tensor, best: _Best) -> None:
        """One restart from `points`: offer every iterate, the first and the last included, to `best`."""
        index = torch.arange(len(x), device=x.device)
        done = best.success.clone() if self.early_stop else torch.zeros_like(best.success)
        gradient: Tensor | None = None
        for step in range(self.steps + 1):
            if self.early_stop and bool(done.any()):
                left = (~done).nonzero().squeeze(1)
                if len(left) == 0:
                    return
                index, x, labels, points, region = index[left], x[left], labels[left], points[left], region.select(left)
                gradient = None if gradient is None else gradient[left]
            if gradient is not None:
                if self.enforce == "gradient" and self.threat.scope is not None:
                    gradient = orthogonalize(gradient, points if self.reference == "iterate" else x, self.threat.scope)
                points = region.step(points, gradient, self.alpha)
            evaluation = oracle.evaluate(points, labels, best.success[index], with_gradient=step < self.steps)
            best.offer(index, points, evaluation, step)
            done, gradient = evaluation.success, evaluation.gradient

    def _checked(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """Copies of images and labels, the images clamped to the bounds; ValueError if they are not what is needed."""
        if not all(isinstance(value, Tensor) for value in (images, labels)):
            kinds = f"{type(images).__name__} and {type(labels).__name__}"
            raise ValueError(f"images and labels must be tensors; got {kinds}: convert them with torch.as_tensor")
        if images.ndim != 4:
            raise ValueError(f"images must have shape (N, C, H, W); got {tuple(images.shape)}")
        if not images.dtype.is_floating_point:
            raise ValueError(f"images must be floating point; got {images.dtype}: divide 8-bit images by 255")
        if labels.shape != images.shape[:1]:
            raise ValueError(f"labels must have shape ({len(images)},), one per image; got {tuple(labels.shape)}")
        if labels.dtype.is_floating_point or labels.dtype.is_complex or labels.dtype == torch.bool:
            raise ValueError(f"labels must be integers; got {labels.dtype}")
        if labels.device != images.device:
            raise ValueError(f"images ({images.device}) and labels ({labels.device}) must be on the same device")
        if isinstance(self.model, torch.nn.Module):
            devices = {parameter.device for parameter in self.model.parameters()}
            if devices and images.device not in devices:
                raise ValueError(f"images ({images.device}) and model ({devices.pop()}) must be on the same device")
        if len(images) > 0:
            self._check_values(images)
        return images.detach().clamp(*self.threat.bounds).contiguous(), labels.detach().long().clone()

    def _check_values(self, images: Tensor) -> None:
        low, high = self.threat.bounds
        finite = images.isfinite().flatten(1).all(1)
        if not bool(finite.all()):
            raise ValueError(f"images must be finite; found NaN or infinity (sample {int(finite.long().argmin())})")
        # Round-off of a normalisation and its inverse is a few units in the last place; in half precision one of them
        # is as much as a perturbation may be.
        slack = max(torch.finfo(images.dtype).eps, 8e-7) * max(abs(low), abs(high))
        smallest, largest = images.flatten(1).amin(1), images.flatten(1).amax(1)
        outside = (smallest < low - slack) | (largest > high + slack)
        if bool(outside.any()):
            sample = int(outside.long().argmax())
            hint = "they look normalised; pass them unnormalised and put the normalisation inside the model"
            if float(smallest.min()) >= 0 and 2 < float(largest.max()) <= 255:
                hint = "they look 8-bit; divide them by 255, or pass bounds=(0, 255) if the model takes them so"
            raise ValueError(
                f"images must lie in bounds ({low:g}, {high:g}); found min {float(smallest[sample]):.4g}, "
                f"max {float(largest[sample]):.4g} (sample {sample}): {hint}"
            )


class _Best:
    """The best iterate of each sample so far."""

    def __init__(self, images: Tensor) -> None:
        n, device = len(images), images.device
        self.success = torch.zeros(n, dtype=torch.bool, device=device)
        self.adversarials = images.clone()
        self._loss = torch.full((n,), -torch.inf, dtype=torch.promote_types(images.dtype, torch.float32), device=device)
        self._steps, self._zero, self._forwards, self._gradients = torch.zeros(4, n, dtype=torch.long, device=device)

    def offer(self, index: Tensor, points: Tensor, evaluation: Evaluation, step: int) -> None:
        """Keep each of `points`, iterates of the samples at `index`, that beats what there is."""
        success, loss = evaluation.success, evaluation.loss.to(self._loss.dtype)
        better = success & ~self.success[index]
        # The later of two equals: a confident model's loss is exactly 0 long before its gradient is.
        better |= (success == self.success[index]) & (loss >= self._loss[index])
        rows = index[better]
        self.adversarials[rows] = points[better]
        self.success[rows], self._loss[rows], self._steps[rows] = success[better], loss[better], step
        self._zero[index] += evaluation.zero_gradient
        self._forwards[index] += evaluation.forward_calls
        self._gradients[index] += evaluation.gradient is not None

    def judge(self, evaluation: Evaluation) -> None:
        """Replace success and loss by those of a final evaluation of all adversarials."""
        self.success, self._loss = evaluation.success, evaluation.loss.to(self._loss.dtype)
        self._forwards += evaluation.forward_calls

    def result(self, images: Tensor, threat: ThreatModel) -> AttackResult:
        delta = self.adversarials.double() - images.double()
        cosine = alignment(delta, images.double(), threat.scope or "image").abs()
        cosine = cosine if cosine.ndim == 1 else cosine.flatten(1).amax(1)
        norm = perturbation_norm(delta, threat.norm)
        return AttackResult(
            self.adversarials, self.success, self._loss, self._steps, cosine, norm,
            self._zero, self._forwards, self._gradients,
        )  # fmt: skip


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")


def _check_count(name: str, value: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer >= 1; got {value!r}")

"""What is measured of a batch: the model on the clean images, and on exactly what an attack returned.

Nothing that an attack says about its success is believed; everything is recomputed here from the returned images, by
the model in its own precision, norms and cosines in float64.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor, nn

from orthattack.assumptions import observe
from orthattack.attacks.base import UNLIMITED, Card
from orthattack.attacks.scoring import input_gradient
from orthattack.eval.attacks.counter import CallCounter
from orthattack.eval.attacks.kind import Found
from orthattack.eval.attacks.seeds import drawing
from orthattack.eval.errors import FAILURES, EvaluationError
from orthattack.eval.models.classifier import Classifier
from orthattack.lending import borrowed
from orthattack.losses import Goal
from orthattack.projection import alignment
from orthattack.threat import Norm, ThreatModel, perturbation_norm

Columns = dict[str, list[Any]]

NOT_FINITE = "the model's answer is NaN or infinite"
CONTRADICTION = (
    "the model answers otherwise for the same pixels: its answer depends on the other images of the batch (batch "
    "statistics, as of a BatchNorm without running ones) or on what it was asked before, or two classes are level but "
    "for rounding"
)

EVALUATIONS = 10  # how often a model that answers at random is asked about an image


def check_batches(classifier: Classifier, batch_size: int) -> None:
    """Raise EvaluationError if a model's answer about an image depends on the images beside it, unless there are none.

    It is asked about one made-up image alone and beside others. One that fails at that fails on the images too,
    where it is recorded.
    """
    model, size = classifier.model, classifier.preprocessing.crop
    device = next((tensor.device for tensor in model.state_dict().values()), torch.device("cpu"))
    # A dark one: beside it are brighter ones, for a model that scales by the brightest pixel of a batch.
    image = 0.5 * torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
    try:
        with borrowed(model, device) as lent:
            found = observe(lent, image, module=model).on_batches()
    except FAILURES:
        return
    if found is not None and batch_size > 1:
        raise EvaluationError(
            f"{classifier.name}: {found}. Every rate would depend on the batch size; with batch_size = 1 "
            "(--batch-size 1) an evaluation asks about one image at a time"
        )


class Judge:
    """A model, in evaluation mode, as the one who decides what is fooled; its square input has `size` pixels."""

    def __init__(self, counter: CallCounter, size: int, device: torch.device, batch_size: int) -> None:
        self.counter, self.model, self.batch_size = counter, counter.model, batch_size
        probe = torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
        self.is_random = self._varies(probe)
        self.evaluations = EVALUATIONS if self.is_random else 1
        # On a CPU convolutional networks answer faster, the same but for rounding, if the channels come last.
        fits = device.type == "cpu" and not self.is_random and self._takes_channels_last(probe)
        self._layout = torch.channels_last if fits else torch.contiguous_format

    def _varies(self, images: Tensor) -> bool:
        """Whether the answer depends on when one asks, by more than the noise of a parallel sum."""
        first = None
        for seed in range(EVALUATIONS):
            try:
                with drawing(seed), torch.inference_mode():
                    before = torch.get_rng_state()
                    answer = self.model(images.clone())
                    draws = not torch.equal(before, torch.get_rng_state())
            except FAILURES:  # it will fail on the images too, where it is recorded
                return False
            if first is not None and not _alike(first, answer, 1e-3):
                return True
            if seed > 0 and not (draws or images.is_cuda):  # what draws may do so rarely
                return False
            first = answer if first is None else first
        return False

    def _takes_channels_last(self, images: Tensor) -> bool:
        """Whether the model gives the same answer to another layout; one that calls `view` raises."""
        with torch.inference_mode():
            try:
                answer = self.model(images.clone(memory_format=torch.channels_last))
                return _alike(answer, self.model(images.clone()), 1e-4)
            except FAILURES:  # whatever a user's model may raise
                return False

    def arranged(self, images: Tensor) -> Tensor:
        """A copy of the images, for a model may write into its input, in the layout that it is fastest with."""
        return images.clone(memory_format=self._layout)

    def logits(self, images: Tensor) -> list[Tensor]:
        """The logits (N, K), once for each evaluation; what the attack just had evaluated is not evaluated again."""
        known = self.counter.recall(images)
        with torch.inference_mode():
            if known is None or self.is_random:
                return [self._answer(images).float() for _ in range(self.evaluations)]
            answer, other = known
            if bool(other.any()):
                answer[other] = self._answer(images[other]).to(answer)
            return [answer.float()]

    def _answer(self, images: Tensor) -> Tensor:
        return torch.cat([self.model(self.arranged(part)) for part in torch.split(images, self.batch_size)])


def _alike(first: Tensor, second: Tensor, tolerance: float) -> bool:
    return bool((first - second).abs().max() <= tolerance * first.abs().max().clamp(min=1e-6))


def _verdict(
    answers: list[Tensor], labels: Tensor, targets: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Predictions (of several evaluations: the most frequent), mean margins, the share of wrong evaluations, and
    whether most are so, or, with `targets`, most are these.

    An answer that is not finite is class -1 with margin NaN.
    """
    finite = torch.stack([logits.isfinite().all(1) for logits in answers])
    votes = torch.stack([logits.argmax(1) for logits in answers]).where(finite, -1)
    margins = torch.stack([Goal(labels).margin(logits.nan_to_num()) for logits in answers])
    wrong = (votes != labels).float().mean(0)
    fooled = wrong > 0.5 if targets is None else (votes == targets).float().mean(0) > 0.5
    return votes.mode(0).values, margins.where(finite, torch.nan).mean(0), wrong, fooled


def clean_columns(judge: Judge, images: Tensor, labels: Tensor, with_gradient: bool) -> Columns:
    """The model on the images as they are, and if asked the gradient of its cross-entropy. See `CLEAN_SCHEMA`."""
    cosine = norm = [None] * len(images)
    if judge.is_random or not with_gradient:
        answers = judge.logits(images)
    else:  # one pass gives the logits and the gradient
        leaf = judge.arranged(images).requires_grad_()
        with torch.enable_grad():
            logits = judge.model(leaf).float()
            try:
                loss = nn.functional.cross_entropy(logits, labels, reduction="sum")
                gradient = input_gradient(loss, leaf).double()
                cosine = alignment(gradient, images.double()).tolist()
                norm = perturbation_norm(gradient, "l2").tolist()
            except (ValueError, RuntimeError):  # not differentiable: said by the column being empty
                pass
        answers = [logits.detach()]
    predictions, margins, wrong, _ = _verdict(answers, labels)
    first = answers[0]
    flat = images.flatten(1)
    broken = margins.isnan().tolist()
    return {
        "status": ["error" if bad else "ok" for bad in broken],
        "message": [NOT_FINITE if bad else None for bad in broken],
        "prediction": predictions.tolist(),
        "margin": margins.tolist(),
        "confidence": first.softmax(1).amax(1).tolist(),
        "gradient_cosine": cosine,
        "gradient_norm": norm,
        "logit_min": first.amin(1).tolist(),
        "logit_max": first.amax(1).tolist(),
        "logit_sum": first.sum(1).tolist(),
        "image_min": flat.amin(1).tolist(),
        "image_max": flat.amax(1).tolist(),
        "wrong_share": wrong.tolist(),
        "evaluations": [judge.evaluations] * len(images),
    }


def plain_copy(adversarials: object, images: Tensor) -> Tensor:
    """What an attack returned for a batch, as a tensor of our own, whatever view, subclass or device it was.
    ValueError: it cannot be scored at all."""
    if not isinstance(adversarials, Tensor):
        raise ValueError(
            f"returned {type(adversarials).__name__} instead of a tensor: let it return the adversarial images alone"
        )
    with torch._C.DisableTorchFunctionSubclass(), torch.no_grad():  # a subclass may say anything of itself
        if adversarials.dtype != images.dtype:
            raise ValueError(
                f"returned {adversarials.dtype}, where the images are {images.dtype}: let it return "
                "adversarials.to(images.dtype)"
            )
        if adversarials.shape != images.shape:
            raise ValueError(
                f"returned shape {tuple(adversarials.shape)} for images of shape {tuple(images.shape)}: let it return "
                "one image for each, of the same size"
            )
        if adversarials.layout != torch.strided or adversarials.is_meta:
            kind = "one without values (meta)" if adversarials.is_meta else str(adversarials.layout)
            raise ValueError(f"returned a tensor that is {kind}, not a dense one")
        return torch.empty_like(images).copy_(adversarials.detach())


def row_columns(
    judge: Judge,
    images: Tensor,
    found: Found,
    labels: Tensor,
    clean_right: Sequence[bool],
    clean: Sequence[int],
    norm: Norm,
    eps: float | None,
    targets: Tensor | None = None,
) -> Columns:
    """What an attack did to a batch, from the images it returned. See `ROW_SCHEMA`; without the columns of the run.

    An image that is not finite, leaves the bounds or the ball is ``invalid``: it counts neither for nor against the
    model. The ball's edge is as wide as float32's rounding of an image. Pixels that are those of the clean image have
    its prediction; where a model that does not answer at random says otherwise, that is an ``error``. `clean_right` and
    `clean` are what the model makes of each clean image. With `targets` a success is that the model predicts these.
    """
    adversarials: Tensor = found.adversarials
    x = images.double()
    delta = adversarials.double() - x
    sizes: dict[Norm, Tensor] = {name: perturbation_norm(delta, name) for name in get_args(Norm)}
    right = torch.tensor(clean_right, device=images.device)
    predictions, margins, wrong, reached = _verdict(judge.logits(adversarials.nan_to_num(0)), labels, targets)
    before = torch.tensor(clean, device=images.device)
    contradicts = (~_moved(adversarials, images) & (predictions != before) & (not judge.is_random)).tolist()
    message = _faults(adversarials, sizes[norm].tolist(), norm, eps)
    status = [
        "invalid" if fault else "ok" if is_right else "misclassified"
        for fault, is_right in zip(message, clean_right, strict=True)
    ]
    for k, margin in enumerate(margins.tolist()):
        if message[k] is None and (math.isnan(margin) or contradicts[k]):
            status[k], message[k] = "error", NOT_FINITE if math.isnan(margin) else CONTRADICTION
    fooled = (right & reached).tolist()
    rows = [k for k, state in enumerate(status) if state == "ok" and fooled[k]]
    rounded, contradicted = _rounded(judge, adversarials, images, labels, rows, norm, targets)
    for k in contradicted:
        status[k], message[k] = "error", CONTRADICTION
    per_channel = alignment(delta, x, "channel").flatten(1)
    return {
        "status": status,
        "message": message,
        "adversarial_prediction": predictions.tolist(),
        "success": [fooled[k] if state == "ok" else None for k, state in enumerate(status)],
        "margin": margins.tolist(),
        **{name: size.tolist() for name, size in sizes.items()},
        "cosine": alignment(delta, x).tolist(),
        **{f"cosine_{name}": per_channel[:, c].tolist() for c, name in enumerate(("red", "green", "blue"))},
        "steps": [None] * len(images) if found.steps is None else found.steps.tolist(),
        "wrong_share": wrong.tolist(),
        "evaluations": [judge.evaluations] * len(images),
        **rounded,
    }


def _faults(adversarials: Tensor, lengths: list[float], norm: Norm, eps: float | None) -> list[str | None]:
    """Why each image is invalid, None where it is not."""
    limit = math.inf if eps is None else eps * (1 + 1e-5) + (1.2e-7 if norm == "linf" else 0.0)
    flat = adversarials.flatten(1)
    found: list[str | None] = []
    for low, high, length in zip(flat.amin(1).tolist(), flat.amax(1).tolist(), lengths, strict=True):
        if not (-math.inf < low and high < math.inf):
            found.append("returned NaN or infinite pixels")
        elif low < 0 or high > 1:
            digits = 9 if 1 < high < 1.00001 else 6  # 1.00000012 is not 1
            found.append(f"left the bounds: pixels from {low:.6g} to {high:.{digits}g}")
        else:
            found.append(None if length <= limit else f"left the ball: {norm} norm {length:.6g}, eps {eps:.6g}")
    return found


def as_stored(adversarials: Tensor, images: Tensor, norm: Norm, eps: float | None, levels: int) -> Tensor:
    """Another library's adversarials on the grid of stored images, and in the ball there; what is invalid stays."""
    delta = adversarials.double() - images.double()
    sizes = perturbation_norm(delta, norm).tolist()
    rows = [k for k, fault in enumerate(_faults(adversarials, sizes, norm, eps)) if fault is None]
    if not rows:
        return adversarials
    threat = ThreatModel(norm, UNLIMITED if eps is None else eps, scope=None, levels=levels)
    stored = adversarials.clone()
    stored[rows] = threat.around(images[rows]).stored(adversarials[rows])
    return stored


def _moved(adversarials: Tensor, images: Tensor) -> Tensor:
    """(N,) whether any pixel differs."""
    return (adversarials != images).flatten(1).any(1)


def promised_cosine(adversarials: Tensor, images: Tensor, card: Card) -> list[Any]:
    """Largest |cos| of each perturbation with all that it should be orthogonal to; None where that is nothing.

    It calls the directions, and the normal, that are functions.
    """
    if not (card.is_orthogonal and card.exact):
        return [None] * len(images)
    threat = ThreatModel("l2", 0.0, scope=card.scope, directions=card.directions, normal=card.normal)
    found: list[Any] = threat.cosine(adversarials.double() - images.double(), images.clone()).tolist()
    return found


def _rounded(
    judge: Judge,
    adversarials: Tensor,
    images: Tensor,
    labels: Tensor,
    rows: list[int],
    norm: Norm,
    targets: Tensor | None,
) -> tuple[Columns, list[int]]:
    """What is left of the successes, at `rows`, when they are saved with 8 bits, and which of `rows` are then fooled by
    the pixels of the clean image, which the model was right on."""
    contradicted: list[int] = []
    columns: Columns = {name: [None] * len(images) for name in ("rounded_success", "rounded_cosine", "rounded_norm")}
    if rows:
        rounded = (adversarials[rows] * 255).round() / 255
        delta = rounded.double() - images[rows].double()
        aims = None if targets is None else targets[rows]
        _, _, _, fooled = _verdict(judge.logits(rounded), labels[rows], aims)
        if not judge.is_random:
            same = (~_moved(rounded, images[rows]) & fooled).tolist()
            contradicted = [row for row, is_so in zip(rows, same, strict=True) if is_so]
        values = (fooled.tolist(), alignment(delta, images[rows].double()).tolist())
        for row, success, cosine, size in zip(rows, *values, perturbation_norm(delta, norm).tolist(), strict=True):
            columns["rounded_success"][row] = success
            columns["rounded_cosine"][row] = cosine
            columns["rounded_norm"][row] = size
    return columns, contradicted

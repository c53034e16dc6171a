"""PGD: projected gradient descent, with and without the orthogonality."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor
from typing_extensions import Unpack

from orthattack.attacks.ascent import Climb, rate
from orthattack.attacks.base import Attack, Card, GradientOptions
from orthattack.attacks.rules import Schedule, accumulated
from orthattack.models import Model
from orthattack.threat import Norm


class PGD(Attack):
    """Projected gradient descent (Madry et al. 2018, arXiv:1706.06083): OrthoPGD without the orthogonality::

        x_{t+1} = project(x_t + alpha * sign(∇L(x_t)))

    for L-infinity; for L2 the gradient is normalised instead of its sign taken, for L1 the signs of the hundredth of
    the pixels with the largest gradient.

    Args:
        model: images (N, C, H, W) in `bounds` to logits (N, K); it normalises its input itself
            (see `orthattack.Normalized`) and comes back as it was. A plain function is taken as it is: put a module
            that it calls in evaluation mode first.
        norm: "linf", "l2" or "l1".
        eps: radius of the ball, in pixel units, e.g. ``4 / 255``; one number, or (N,) with one per sample.
        alpha: first step size in pixel units; by default ``2 * eps``, which crosses the ball, and with
            ``schedule="fixed"`` ``2.5 * eps / steps``, so that all steps together cross it.
        steps: gradient steps per restart, at least 1.
        random_start: start at a random point of the threat model instead of the image.
        restarts: how often to start; the best result of each sample is kept.
        loss: "scaled-ce", "ce", "margin", "dlr" or "logit-difference" (see `orthattack.losses.attack_loss` for the
            formulas), or a function of (logits, labels) returning (N,) values. By default "scaled-ce" (of other
            attacks "margin"), towards targets "ce", and with a `top_k` above 1 or a `confidence` "margin", which alone
            counts from there.
        targeted: True: labels are the classes to reach. "random" and "least-likely": labels are the true ones, and each
            sample has another class to reach, at random from its stream or the one with the smallest logit. "each":
            each other class is climbed to in turn, the likeliest first, and the point with the largest margin is kept;
            "each9": the nine likeliest.
        top_k: the label is to leave the k most likely classes, or the target to be among them.
        confidence: by how much logits are to be beyond that, at least; `loss` and margin are counted from there.
        scope: orthogonal to the image, or another `normal`, as a whole "image", per "channel", per "pixel" colour, or
            per block of 8×8 pixels, "block8"; None: not at all.
        reference: for ``enforce="gradient"``, project against the "clean" image or the current "iterate".
        enforce: "perturbation" keeps x_adv - x orthogonal to x; "gradient" only projects each gradient, the textbook
            form, whose signs and clips undo most of the projection (docs/method.md).
        early_stop: drop a sample from the batch as soon as it is fooled.
        bounds: smallest and largest pixel value.
        generator: source of the random starts; by default one of the attack's own, seeded from torch's seed.
        precision: "bfloat16" computes gradients under autocast; success is judged in the model's own precision. Where
            the processor has no arithmetic for it, gradients are computed in float32, and a warning says so.
        optimize: "auto" takes gradients of a faster copy of the model, its batch norms folded into the convolutions and
            its weights channels last, where one can be made; it takes as much memory as the model, and stays while the
            model does. On a GPU its passes are replayed as CUDA graphs, which keep the memory of four. "compile"
            compiles it too, and a warning says why where it cannot. "none" takes the model itself. Success is judged
            by the model itself in any case.
        schedule: of the step size: "linear" or "cosine", which fall to 0, or "fixed". By default "linear", and
            "fixed" if there is an `alpha`.
        momentum: 0, or the factor by which the sum of the past gradients is kept at each step (MI-FGSM).
        nesterov: take the gradient where the momentum leads (NI-FGSM).
        eot_samples: evaluations to average for a model that draws at random.
        directions: what else the perturbation stays orthogonal to, such as ``["constant"]`` for the mean brightness.
            `orthattack.ThreatModel` says more of this option and of the next three.
        normal: the "image", or what the perturbation is orthogonal to in its place.
        levels: what images are stored with, such as 256 for 8 bits: all points that are scored lie on that grid.
        mask: which pixels may move. A patch is a mask with a large `eps`.
        transform: what is done to the images before the model, for gradients only, such as a random resize: a
            differentiable function of (images (N, C, H, W), draws) that returns as many images of any size.
            ``draws.uniform(3)`` and ``draws.normal(3)`` are random numbers (N, 3), each image's from its own stream.
            ``eot_samples`` averages several. It must treat each image for itself. Of a list of such functions the
            gradients are averaged (`orthattack.attacks.transforms`).
        gradient_model: another model to take gradients of, such as one with a differentiable stand-in (BPDA) or a
            surrogate. The model itself scores every point, in one more evaluation, as it does with a transform; calls
            of either count.
        keep: "best", or "last", the last iterate (of the last restart) whether it fools the model or not, which is what
            papers on transfer report.
        on_step: a function that is told of each batch of points that is scored, an `orthattack.attacks.ScoredStep`.

    Raises:
        ValueError: an option out of its range; the call raises it for bad images, labels or models.
    """

    _climbs = "scaled-ce"

    def __init__(
        self,
        model: Model,
        norm: Norm = "linf",
        eps: float | Tensor = 4 / 255,
        alpha: float | None = None,
        steps: int = 10,
        random_start: bool = True,
        restarts: int = 1,
        *,
        schedule: Schedule | None = None,
        momentum: float = 0.0,
        nesterov: bool = False,
        **options: Unpack[GradientOptions],
    ) -> None:
        if schedule is None:
            schedule = "linear" if alpha is None else "fixed"
        rule = accumulated(schedule, momentum, nesterov)
        first = rate(2.5, steps) if schedule == "fixed" else 2.0
        super().__init__(model, norm, eps, Climb(rule, steps, first, alpha, random_start, restarts), **options)

    @property
    def card(self) -> Card:
        return replace(super().card, schedule=self.schedule)

    def _resolved(self) -> dict[str, Any]:
        return {"schedule": "fixed", **super()._resolved()}


class OrthoPGD(PGD, scope="image"):
    """Projected gradient descent whose perturbation stays orthogonal to the image, exactly and at every step::

        x_{t+1} = argmax_y ⟨∇L(x_t), y⟩  subject to
                  ‖y - x_t‖ <= alpha,  ‖y - x‖ <= eps,  low <= y <= high,  ⟨y - x, x⟩ = 0

    Arguments as for `PGD`, with ``scope="image"`` by default.

    Source: docs/method.md, "The best step".

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    >>> images, labels = torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 2, 0])
    >>> result = OrthoPGD(model, eps=8 / 255).run(images, labels)
    >>> bool((result.cosine <= 1e-6).all()), bool((result.norm <= 8 / 255 * (1 + 1e-6)).all())
    (True, True)
    """

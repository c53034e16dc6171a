"""The smallest perturbation that fools a model, by bisection over eps with any attack of this package."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, final

import torch
from torch import Tensor

from orthattack.arguments import check_count, check_real, warn
from orthattack.attacks.base import Attack, Card, checked_seeds, updated
from orthattack.attacks.configured import Configured
from orthattack.attacks.task import AttackResult, Counts, Merit, Task


@final
class Bisection(Configured):
    """Per sample, the smallest eps at which an attack succeeds::

        min ‖x_adv - x‖   subject to   the attack's goal, its bounds and its orthogonality

    Each trial runs the attack on the samples with a radius of their own: the middle between the largest that failed
    and the norm of the smallest adversarial found, starting from that adversarial pulled towards the image. Before
    anything has succeeded the radius is doubled. What comes back is what was found: an upper bound of the smallest
    norm, as good as the attack.

    Args:
        attack: any attack of this package; its eps is the first radius to try, its other options hold throughout.
        max_eps: the largest radius to try, in pixel units; by default the distance between the bounds (L-infinity),
            or 16 times the attack's eps.
        trials: how many radii to try for each sample, at least 1. Once one has succeeded, each halves the interval.

    Raises:
        ValueError: an argument outside these.

    Source: bisection, as in Foolbox's minimisation by binary search (Rauber et al. 2017, arXiv:1707.04131).

    >>> from orthattack import OrthoPGD
    >>> model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
    >>> images = torch.rand(4, 3, 2, 2)
    >>> result = Bisection(OrthoPGD(model, eps=8 / 255), max_eps=1.0).run(images, model(images).argmax(1))
    >>> bool((result.cosine <= 1e-6).all())
    True
    """

    def __init__(self, attack: Attack, max_eps: float | None = None, trials: int = 12) -> None:
        if not isinstance(attack, Attack):
            raise ValueError(f"attack must be an attack of orthattack; got {type(attack).__name__}")
        if attack.card.minimal:
            raise ValueError(f"attack must fill a ball; {type(attack).__name__} looks for the smallest norm itself")
        check_count("trials", trials)
        radii = torch.as_tensor(attack.threat.eps)
        largest = float(radii.max()) if radii.numel() > 0 else 0.0
        if largest == 0:
            raise ValueError("the attack's eps is the first radius to try, so it must be larger than 0")
        if max_eps is None:
            low, high = attack.threat.bounds
            max_eps = high - low if attack.threat.norm == "linf" else 16 * largest
        check_real("max_eps", max_eps, "a finite radius > 0, in pixel units", low=0, above=True)
        self.attack, self.max_eps, self.trials = attack, max_eps, trials

    @property
    def card(self) -> Card:
        """What it is: minimal, and orthogonal to what its attack is orthogonal to."""
        return replace(self.attack.card, family="Bisection", minimal=True)

    def __repr__(self) -> str:
        return f"Bisection({self.attack!r}, max_eps={self.max_eps:.6g}, trials={self.trials})"

    def _shared_by_copies(self) -> list[object]:
        return self.attack._shared_by_copies()

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Adversarial images for (N, C, H, W) images and (N,) labels (targeted: the classes to reach)."""
        return self.run(images, labels).adversarials

    def run(
        self, images: Tensor, labels: Tensor, *, seeds: Sequence[int] | None = None, batch_size: int | None = None
    ) -> AttackResult:
        """Search and report, as `Attack.run` does, with its `seeds` and `batch_size`; ``norm`` is the smallest found.

        A sample that is misclassified as it is (targeted: classified as the target) has norm 0; one that nothing
        fooled comes back as the last attack left it, with ``success`` false.
        """
        attack = self.attack
        attack._warn_of_radius(images, None)
        if vars(self)["_given"]["max_eps"] is not None and isinstance(images, Tensor):
            # The diameter itself is a way to say "up to any image".
            beyond = self.max_eps > 1.0001 * attack.threat.diameter(images.shape[1:])
            attack._warn_of_radius(images, self.max_eps if beyond else 0.0, "max_eps")
        each = None if seeds is None or not isinstance(images, Tensor) else checked_seeds(seeds, len(images))
        result, flat = attack._run(images, labels, 0.0, None, _Look(), True, batch_size=batch_size)
        stuck = torch.zeros_like(result.steps) if flat is None else flat
        eps = torch.as_tensor(attack.threat.eps, dtype=torch.float64, device=images.device)
        if eps.ndim == 1 and len(eps) not in (1, len(images)):
            raise ValueError(
                f"eps has {len(eps)} values for {len(images)} images: it must have one per sample or be one"
            )
        threat = attack.threat  # whole pixels and whole numbers of levels are all the radii there are
        step = 1.0 if threat.norm == "l0" else threat.unit if threat.norm == "linf" else 0.0
        eps = threat.on_grid(eps.expand(len(images)).clamp(max=self.max_eps)).clamp(min=step)
        low, high = torch.zeros_like(eps), torch.full_like(eps, torch.inf)
        high[result.success] = 0.0
        for trial in range(self.trials):
            # An interval that is narrower than 1 in 1000 is not worth a trial, nor one beyond the largest radius.
            wide = (high > 1.001 * low) & (high > low + 1.5 * step) & (low + step <= self.max_eps * (1 + 1e-6))
            rows = (wide & (low < self.max_eps)).nonzero().squeeze(1)
            if len(rows) == 0:
                break
            try:
                found, more = attack._run(
                    images[rows],
                    labels[rows],
                    eps[rows],
                    result.adversarials[rows],
                    attack.search,
                    early_stop=True,
                    seeds=None if each is None else [each[row] for row in rows.tolist()],
                    batch_size=batch_size,
                    is_first=False,
                    targets=result.targets[rows],
                )
            except Exception as error:
                if trial == 0:
                    raise
                reason = str(error).strip().split("\n")[0] or type(error).__name__
                warn(f"trial {trial + 1} of {self.trials} failed, and what was found before it is kept: {reason}")
                break
            if more is not None:
                stuck[rows] += more
            fooling = found.success & (found.norm < high[rows])
            low[rows] = torch.where(found.success, low[rows], eps[rows])
            high[rows] = torch.where(fooling, found.norm.double(), high[rows])
            result = updated(result, found, rows, fooling | ~result.success[rows], adds=True)
            del found  # which the next trial needs the memory of
            middle = torch.where(high.isfinite(), (low + high) / 2, 2 * eps)
            eps = threat.on_grid(middle.clamp(max=self.max_eps)).clamp(min=step)
        attack._warn_of_gradients(result, stuck)
        missed = int(((low >= self.max_eps * (1 - 1e-6)) & ~result.success).sum())
        if missed > 0 and self.max_eps * (1 + 1e-6) < threat.diameter(images.shape[1:]):
            attack._observer.say("max_eps", cap_reached(missed, len(images), self.max_eps))
        return result


def cap_reached(missed: int, count: int, max_eps: float) -> str:
    """What is said of so many of `count` images that the largest radius did not fool."""
    return (
        f"{missed} of {count} images were not fooled up to max_eps={max_eps:.6g}: that is no smallest norm. Choose a "
        "larger max_eps"
    )


class _Look(Counts):
    """The search that only scores the images themselves."""

    merit: ClassVar[Merit] = "loss"

    def __call__(self, task: Task, start: Tensor | None) -> None:  # noqa: ARG002
        for piece, _ in task.pieces():
            piece.score(piece.region.images.to(piece.region.dtype).clone(), 0, with_gradient=False)

"""Four published attacks, each in at most 25 lines of the package's public names, which has most of them built in too.

python examples/own_attacks.py

Each takes every option of the others: with ``scope="image"`` its perturbation is orthogonal to the image, exactly.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch.nn import functional

from orthattack.attacks import MIFGSM, Attack, Climb
from orthattack.attacks.rules import chain, momentum, normalize, smooth, variance
from orthattack.eval import load
from orthattack.threat import perturbation_norm


# Input diversity (Xie et al. 2019, arXiv:1803.06978): gradients at images that are shrunk and moved at random.
def resized_and_padded(images, draws, smallest=0.85, share=0.7):
    u = draws.uniform(4)
    side = torch.where(u[:, 0] < share, smallest + (1 - smallest) * u[:, 1], 1.0)
    place = (2 * u[:, 2:] - 1) * (1 - side[:, None])
    grid = torch.zeros(len(images), 2, 3, device=images.device, dtype=images.dtype)
    grid[:, 0, 0] = grid[:, 1, 1] = 1 / side
    grid[:, :, 2] = -place / side[:, None]
    at = functional.affine_grid(grid, list(images.shape), align_corners=False)
    return functional.grid_sample(images, at, align_corners=False)


class DIFGSM(MIFGSM, family="DIFGSM", transform=resized_and_padded):
    """MI-FGSM with input diversity."""


# Translation invariance (Dong et al. 2019, arXiv:1904.02884): the gradient smoothed by a Gaussian.
class TIFGSM(Attack):
    """MI-FGSM with smoothed gradients."""

    def __init__(self, model, norm="linf", eps=4 / 255, steps=10, sigma=1.5, **options):
        bell = torch.exp(-((torch.arange(7) - 3) ** 2) / (2 * sigma**2))
        rule = chain(smooth(bell / bell.sum()), normalize("l1"), momentum(1.0))
        super().__init__(model, norm, eps, Climb(rule, steps, rate=1 / steps), **options)


# Variance tuning (Wang & He 2021, arXiv:2103.15571): each gradient tuned by its neighbours'.
class VMIFGSM(Attack):
    """MI-FGSM with variance tuning."""

    def __init__(self, model, norm="linf", eps=4 / 255, steps=10, samples=5, **options):
        rule = chain(variance(samples), normalize("l1"), momentum(1.0))
        super().__init__(model, norm, eps, Climb(rule, steps, rate=1 / steps), **options)


# The fast minimum-norm attack (Pintor et al. 2021, arXiv:2102.12827): a ball per image that shrinks where it is fooled.
class Shrinking:
    def init(self, ascent, points):
        return {"radius": ascent.alpha.new_full((len(points),), torch.inf), "ever": points.new_zeros(len(points)) > 0}

    def update(self, ascent, state, points, evaluation, step):
        images, threat = ascent.region.images, ascent.region.threat
        falling = (1 + math.cos(math.pi * step / ascent.steps)) / 2
        gradient = threat.tangent(evaluation.gradient, images)
        dual = {"linf": "l1", "l2": "l2", "l1": "linf"}[threat.norm]
        norm = perturbation_norm(points - images, threat.norm)
        edge = norm + evaluation.margin.abs() / perturbation_norm(gradient, dual).clamp(min=1e-12)
        gamma, fooled = 0.001 + 0.049 * falling, evaluation.success
        grown = torch.where(state["ever"], state["radius"] * (1 + gamma), edge)
        radius = torch.where(fooled, torch.minimum(state["radius"], norm) * (1 - gamma), grown)
        length = perturbation_norm(gradient, "l2").clamp(min=1e-12).view(-1, 1, 1, 1)
        tried = points + ascent.alpha * (0.01 + 0.99 * falling) * gradient / length
        ball = replace(threat, eps=torch.minimum(radius, ascent.region.eps.view(-1))).around(images)
        return ball.project(tried), {"radius": radius, "ever": state["ever"] | fooled}


class FMN(Attack, loss="margin"):
    def __init__(self, model, norm="linf", eps=None, steps=100, **options):
        super().__init__(model, norm, eps, Climb(Shrinking(), steps, alpha=1.0, merit="norm"), **options)


def main() -> None:
    model, images, labels = load("cifar10-robust", "cifar10-samples")
    for kind, options in [
        (DIFGSM, {"eps": 8 / 255}),
        (TIFGSM, {"eps": 8 / 255}),
        (VMIFGSM, {"eps": 8 / 255}),
        (FMN, {"steps": 50}),
    ]:
        for scope in (None, "image"):
            result = kind(model, scope=scope, **options).run(images[4:8], labels[4:8])
            found = f"{int(result.success.sum())} of 4 fooled, median norm {255 * float(result.norm.median()):.2f}/255"
            print(f"{kind.__name__:<8} scope={scope!s:<6} {found}, |cos| at most {float(result.cosine.max()):.0e}")


if __name__ == "__main__":
    main()

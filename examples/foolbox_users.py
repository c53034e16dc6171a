"""A Foolbox script with five lines changed: the same call, and perturbations that are orthogonal to the images.

    python examples/foolbox_users.py

What changed is marked. Everything else is Foolbox's own, its samples included.
"""

from __future__ import annotations

import foolbox as fb

from orthattack import OrthoPGD, alignment  # new
from orthattack.eval.models import load_classifier
from orthattack.interop.foolbox import FoolboxAttack  # new

fmodel = fb.PyTorchModel(load_classifier("cifar10-robust").model, bounds=(0, 1), device="cpu")
images, labels = fb.samples(fmodel, dataset="cifar10", batchsize=20)
epsilons = [2 / 255, 8 / 255]

attacks = {
    "LinfPGD": fb.attacks.LinfPGD(steps=10, rel_stepsize=0.25),
    "OrthoPGD": FoolboxAttack(OrthoPGD, steps=10, rel_stepsize=0.25),  # new
}
for name, attack in attacks.items():
    _, clipped, success = attack(fmodel, images, labels, epsilons=epsilons)
    for eps, adversarials, fooled in zip(epsilons, clipped, success, strict=True):
        cosine = alignment(adversarials.double() - images.double(), images.double()).abs().max()  # new
        accuracy = 1 - fooled.float().mean().item()
        print(f"{name:8}  eps {255 * eps:.0f}/255  robust accuracy {accuracy:4.0%}  largest |cos| {cosine:.1e}")  # new

"""Attack the bundled robust model on the bundled images, and check what comes back.

python examples/quickstart.py
"""

from __future__ import annotations

from orthattack import OrthoPGD, alignment
from orthattack.eval import load

model, images, labels = load("cifar10-robust", "cifar10-samples")
adversarials = OrthoPGD(model, eps=8 / 255)(images, labels)

clean, attacked = (model(x).argmax(1) == labels for x in (images, adversarials))
delta = adversarials.double() - images.double()
print(f"clean images classified correctly: {clean.sum()} of {len(labels)}")
print(f"adversarial ones:                  {attacked.sum()} of {len(labels)}")
print(f"largest change of a pixel:         {255 * delta.abs().max():.4f}/255")
print(f"largest |cos| with an image:       {alignment(delta, images.double()).abs().max():.1e}")

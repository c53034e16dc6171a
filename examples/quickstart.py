"""Attack the bundled robust model on the bundled images, and check what comes back.

python examples/quickstart.py
"""

from __future__ import annotations

from orthattack import OrthoPGD, alignment
from orthattack.eval.data import load_dataset
from orthattack.eval.models import load_classifier

classifier = load_classifier("cifar10-robust")
(batch,) = load_dataset("cifar10-samples", classifier).batches(20, classifier.preprocessing)
model, images, labels = classifier.model, batch.images, batch.labels

adversarials = OrthoPGD(model, eps=8 / 255)(images, labels)

clean, attacked = (model(x).argmax(1) == labels for x in (images, adversarials))
delta = adversarials.double() - images.double()
print(f"right on clean images:       {clean.sum()} of {len(labels)}")
print(f"right on adversarial images: {attacked.sum()} of {len(labels)}")
print(f"largest change of a pixel:   {255 * delta.abs().max():.4f}/255")
print(f"largest |cos| with an image: {alignment(delta, images.double()).abs().max():.1e}")

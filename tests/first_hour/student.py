"""A student's first hour: "I have a gradient; how do I make it orthogonal to the image?", and torchattacks' README."""

import torch

from orthattack import OrthoPGD, alignment, orthogonalize
from orthattack.eval import load
from orthattack.interop import torchattacks

model, images, labels = load("cifar10-robust", "cifar10-samples")

# README and the questions: a gradient, orthogonal to the image per channel.
images.requires_grad_()
loss = torch.nn.functional.cross_entropy(model(images), labels)
(gradient,) = torch.autograd.grad(loss, images)
images.requires_grad_(False)
direction = orthogonalize(gradient, images, "channel")
print("cosine before", f"{alignment(gradient, images, 'channel').abs().max():.0e}")
assert alignment(direction, images, "channel").abs().max() < 1e-6

# What the method page warns of: a step along its sign, cut off at the bounds, is not orthogonal any more.
step = (images + 8 / 255 * direction.sign()).clamp(0, 1) - images
assert alignment(step, images, "channel").abs().max() > 1e-3
result = OrthoPGD(model, eps=8 / 255, scope="channel").run(images, labels)
delta = result.adversarials.double() - images.double()
assert alignment(delta, images.double(), "channel").abs().max() < 1e-6
print("fooled", int(result.success.sum()), "of", len(labels))

# torchattacks' README, one import changed.
atk = torchattacks.PGD(model, eps=8 / 255, alpha=2 / 255, steps=4)
adv_images = atk(images, labels)
assert (adv_images - images).abs().max() <= 8 / 255 + 1e-6
print("robust", int((model(adv_images).argmax(1) == labels).sum()))

atk.set_mode_targeted_random()
atk(images, labels)
atk.set_mode_targeted_least_likely(1)
atk(images, labels)
atk.set_mode_targeted_by_function(target_map_function=lambda images, labels: (labels + 1) % 10)
atk(images, labels)
atk.set_mode_targeted_by_label(quiet=True)
target_labels = (labels + 1) % 10
atk(images, target_labels)
atk.set_mode_default()

data_loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(images, labels), batch_size=8)
atk.save(data_loader, save_path="data.pt", verbose=True)
adv_loader = atk.load(load_path="data.pt")
print("stored", sum(len(labels) for _, labels in adv_loader))
atk.set_model_training_mode(model_training=False, batchnorm_training=False, dropout_training=False)

atk1 = torchattacks.FGSM(model, eps=8 / 255)
atk2 = torchattacks.PGD(model, eps=8 / 255, alpha=2 / 255, steps=40, random_start=True)
atk = torchattacks.MultiAttack([atk1, atk2])
print("robust to both", int((model(atk(images, labels)).argmax(1) == labels).sum()))

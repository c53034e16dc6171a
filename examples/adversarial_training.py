"""Adversarial training with OrthoPGD, and without, on scikit-learn's handwritten digits (8x8 pixels, real, offline).

    pip install scikit-learn
    python examples/adversarial_training.py

Each batch is replaced by adversarial images of the model as it is at that moment: that is all there is to it. After
each epoch the table shows the accuracy on test images that were not trained on, clean and under attacks that the
training did not use: plain PGD, and OrthoPGD, with more steps.
"""

from __future__ import annotations

import argparse

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from orthattack import PGD, OrthoPGD

EPS = 0.15


def digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Images (N, 1, 8, 8) in [0, 1] and labels (N,): 1,297 to train on, 500 to test on."""
    data = load_digits()
    images = torch.from_numpy(data.images).float().unsqueeze(1) / 16
    labels = torch.from_numpy(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    train, test = order[500:], order[:500]
    return images[train], labels[train], images[test], labels[test]


def network() -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(1, 32, 3, padding=1), nn.ReLU()),
        *(nn.Conv2d(32, 64, 3, stride=2, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(64 * 16, 10)),
    )


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    with torch.no_grad():
        return (model(images).argmax(1) == labels).float().mean().item()


def train(adversarial: bool, epochs: int) -> list[tuple[float, float, float]]:
    """Train a network; return its clean accuracy and its robust ones under PGD and OrthoPGD after each epoch."""
    x, y, test_x, test_y = digits()
    torch.manual_seed(0)
    model = network()
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    attack = OrthoPGD(model, eps=EPS, steps=5, loss="ce", schedule="fixed")  # as adversarial training has it
    history = []
    for epoch in range(epochs):
        for index in torch.randperm(len(y)).split(64):
            images = attack(x[index], y[index]) if adversarial else x[index]
            loss = nn.functional.cross_entropy(model(images), y[index])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        clean = accuracy(model, test_x, test_y)
        plain, orthogonal = (
            accuracy(model, judge(model, eps=EPS, steps=10)(test_x, test_y), test_y) for judge in (PGD, OrthoPGD)
        )
        print(f"{epoch + 1:5}  {clean:7.1%}  {plain:7.1%}  {orthogonal:8.1%}")
        history.append((clean, plain, orthogonal))
    return history


def main(epochs: int) -> dict[bool, list[tuple[float, float, float]]]:
    result = {}
    for adversarial in (False, True):
        print("adversarial training" if adversarial else "standard training")
        print("epoch    clean    PGD-10  OrthoPGD-10")
        result[adversarial] = train(adversarial, epochs)
    return result


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=6)
    main(parser.parse_args().epochs)

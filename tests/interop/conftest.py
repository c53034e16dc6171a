"""The bundled models and images."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from orthattack.eval.data.load import load_dataset
from orthattack.eval.models.load import load_classifier

Trained = tuple[nn.Module, Tensor, Tensor]


def loaded(name: str) -> Trained:
    classifier = load_classifier(name)
    (batch,) = load_dataset("cifar10-samples", classifier).batches(20, classifier.preprocessing)
    return classifier.model, batch.images, batch.labels


@pytest.fixture(scope="session")
def standard() -> Trained:
    return loaded("cifar10-standard")


@pytest.fixture(scope="session", params=["cifar10-standard", pytest.param("cifar10-robust", marks=pytest.mark.slow)])
def trained(request) -> Trained:
    return loaded(request.param)


@pytest.fixture
def robust_accuracy():
    def measured(model: nn.Module, adversarials: Tensor, labels: Tensor) -> float:
        with torch.inference_mode():
            return float((model(adversarials).argmax(1) == labels).float().mean())

    return measured

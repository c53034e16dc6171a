from __future__ import annotations

import io
import struct
import zlib

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from orthattack.eval.models.preprocessing import MAX_PIXELS, DecodeError, Preprocessing, decode


def encoded(image: Image.Image, format: str = "PNG", **options: object) -> bytes:  # noqa: A002 - Pillow's own name
    stream = io.BytesIO()
    image.save(stream, format, **options)
    return stream.getvalue()


def png_of_size(width: int, height: int) -> bytes:
    """A PNG whose header promises that size; its pixels are cut short."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("size", [(20_000, 20_000), (9_460, 9_460), (100_000, 1_000)])
def test_a_bomb_is_refused_by_its_header(size, monkeypatch):
    assert size[0] * size[1] > MAX_PIXELS

    def load(self):
        raise AssertionError("pixels were decoded")

    monkeypatch.setattr(Image.Image, "load", load)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", load)
    with pytest.raises(DecodeError, match="larger than 89 million pixels: too large to decode safely"):
        decode(png_of_size(*size))


@pytest.mark.parametrize("limit", [None, 10**12])
def test_the_limit_does_not_depend_on_pillows(monkeypatch, limit):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with pytest.raises(DecodeError, match=r"larger than 89 million pixels.*\(20000x20000\)"):
        decode(png_of_size(20_000, 20_000))


def test_sides_that_differ_too_much_are_refused():
    with pytest.raises(DecodeError, match="1x20000 pixels: its sides differ too much to make the shorter 256"):
        Preprocessing(256, 224)(Image.new("RGB", (1, 20_000)))
    assert Preprocessing(256, 224, aspect="squash")(Image.new("RGB", (1, 20_000))).shape == (3, 224, 224)


def test_damaged_files_have_a_plain_reason_that_repeats():
    noise = encoded(Image.effect_noise((90, 70), 60).convert("RGB"), "JPEG")
    with pytest.raises(DecodeError, match=r"^the file is empty$"):
        decode(b"")
    with pytest.raises(DecodeError, match=r"^not an image of a known format \(BMP, GIF"):
        decode(b"<html>404</html>")
    with pytest.raises(DecodeError, match=r"^damaged \(OSError: image file is truncated"):
        decode(noise[: len(noise) // 2])
    assert decode(noise).size == (90, 70)


@given(st.integers(0, 10**6), st.integers(0, 255))
def test_any_damage_is_a_decode_error_or_an_image(position, value):
    whole = bytearray(encoded(Image.linear_gradient("L").resize((32, 24)).convert("RGB"), "PNG"))
    whole[position % len(whole)] = value
    try:
        pixels = Preprocessing(8, 8)(decode(bytes(whole)))
    except DecodeError:
        return
    assert pixels.shape == (3, 8, 8)
    assert 0 <= pixels.min() <= pixels.max() <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_ignored_as_torchvision_ignores_it(orientation):
    image = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6) * 10).convert("RGB")
    exif = Image.Exif()
    exif[0x0112] = orientation
    assert torch.equal(Preprocessing(4, 4)(decode(encoded(image, "PNG", exif=exif))), Preprocessing(4, 4)(image))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow's, to standard error
def test_damaged_exif_data_is_no_reason_to_leave_an_image_out():
    image = Image.new("RGB", (8, 8), (255, 0, 0))
    data = encoded(image, "JPEG", exif=b"Exif\0\0MM\0*" + b"\xff" * 40)
    assert Preprocessing(8, 8)(decode(data))[0].min() > 0.9


@pytest.mark.parametrize(
    ("mode", "format"), [("CMYK", "JPEG"), ("L", "JPEG"), ("RGBA", "PNG"), ("LA", "PNG"), ("P", "GIF"), ("1", "PNG")]
)
def test_every_kind_of_file_becomes_rgb(mode, format):  # noqa: A002
    pixels = Preprocessing(8, 8)(decode(encoded(Image.new("RGB", (20, 30), (255,) * 3).convert(mode), format)))
    assert pixels.shape == (3, 8, 8)
    assert pixels.min() > 0.98


def test_a_palette_with_transparency_and_an_animation():
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 255, 0, 0])
    pixels = Preprocessing(8, 8)(decode(encoded(palette, "PNG", transparency=bytes([0, 128]))))
    assert pixels[:, 0, 0].tolist() == [1, 0, 0]
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert Preprocessing(8, 8)(decode(data))[:, 0, 0].tolist() == [1, 0, 0]


def test_squashing_is_torchvisions_resize_of_both_sides():
    image = Image.effect_noise((90, 50), 60).convert("RGB")
    expected = torchvision.transforms.Compose(
        [
            torchvision.transforms.Resize((20, 20), torchvision.transforms.InterpolationMode.BICUBIC),
            torchvision.transforms.CenterCrop(16),
            torchvision.transforms.ToTensor(),
        ]
    )
    ours = Preprocessing(20, 16, torchvision.transforms.InterpolationMode.BICUBIC, aspect="squash")
    assert torch.equal(ours(image), expected(image))


def test_the_description_is_complete_and_json():
    assert Preprocessing(256, 224).describe() == {
        "resize": 256,
        "crop": 224,
        "aspect": "keep",
        "interpolation": "bilinear",
        "antialias": True,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "exif_orientation": "ignored",
        "already_of_input_size": "used as it is",
    }

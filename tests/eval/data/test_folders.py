"""Class folders whose order could be meant in two ways, and files in them that are not read."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from orthattack.eval.data.dataset import _as_input
from orthattack.eval.data.load import load_dataset
from orthattack.eval.errors import EvaluationError
from orthattack.eval.models.classifier import Classifier
from orthattack.eval.models.preprocessing import DecodeError, Preprocessing


def classifier(num_classes: int, classes: tuple[str, ...] | None = None) -> Classifier:
    return Classifier("model", torch.nn.Identity(), Preprocessing(8, 8), classes, num_classes)


def folders(path, names, empty=()):
    for name in (*names, *empty):
        (path / name).mkdir(parents=True)
    for name in names:
        Image.new("RGB", (8, 8)).save(path / name / "a.png")
    return path


def labels(path, model, classes=None):
    dataset = load_dataset(str(path), model, classes=classes)
    return {name.partition("/")[0]: label for name, label in zip(dataset.names, dataset.labels, strict=True)}


FROM_1 = [str(k) for k in range(1, 11)]


@pytest.mark.parametrize(
    "names", [FROM_1, [f"class{k}" for k in range(1, 11)], [f"{k}_x" for k in range(12)], ["cat", "dog2", "dog10"]]
)
def test_numbered_folders_are_asked_about(names, tmp_path):
    model, path = classifier(len(names)), folders(tmp_path / "data", names)
    with pytest.raises(EvaluationError) as caught:
        load_dataset(str(path), model)
    message = str(caught.value)
    by_text, by_number = ", ".join(sorted(names)[:3]), ", ".join(names[:3])
    assert f"in another order as text ({by_text}" in message
    assert f"than by their numbers ({by_number}" in message
    assert "--classes text (torchvision's ImageFolder sorts so) or --classes numbers" in message
    assert labels(path, model, "text") == {name: k for k, name in enumerate(sorted(names))}
    assert labels(path, model, "numbers") == {name: k for k, name in enumerate(names)}
    assert load_dataset(str(path), model, classes="numbers").classes == tuple(names)


@pytest.mark.parametrize(
    "names",
    [
        [str(k) for k in range(12)],  # the model's indices
        [f"{k:02d}" for k in range(12)],
        [str(k) for k in range(1, 10)],
        ["n01440764", "n02102040", "n03000684"],
        ["Bee", "ant", "cat"],
    ],
)
def test_folders_in_one_order_only_are_not(names, tmp_path):
    expected = {name: k for k, name in enumerate(names)}
    assert labels(folders(tmp_path / "data", names), classifier(len(names))) == expected


def test_names_of_the_models_classes_need_no_order(tmp_path):
    own = tuple(reversed(FROM_1))
    assert labels(folders(tmp_path / "data", FROM_1), classifier(10, own)) == {name: own.index(name) for name in own}


def test_an_order_is_of_class_folders(tmp_path):
    with pytest.raises(EvaluationError, match=r"--classes numbers is the order of class folders; imagenet-samples has"):
        load_dataset("imagenet-samples", classifier(1000), classes="numbers")
    with pytest.raises(EvaluationError, match="has 3 class folders and model 4 classes"):
        load_dataset(str(folders(tmp_path / "data", "abc")), classifier(4), classes="text")


def test_an_order_that_is_none_is_told(tmp_path):
    with pytest.raises(EvaluationError, match=r"--classes number is neither text nor numbers, .* nor a file"):
        load_dataset(str(folders(tmp_path / "data", "abc")), classifier(3), classes="number")


def test_a_class_without_images_keeps_its_place(tmp_path):
    """Or the classes after it would all be one too low."""
    path = folders(tmp_path / "data", ["ant", "cat"], empty=["bee"])
    assert labels(path, classifier(3)) == {"ant": 0, "cat": 2}
    with pytest.raises(EvaluationError, match=r"as many as model has classes, but also 1 without any \(bee\): remove"):
        load_dataset(str(path), classifier(2))
    assert labels(folders(tmp_path / "numbered", ["0", "2"], empty=["1"]), classifier(3)) == {"0": 0, "2": 2}


def test_a_class_folder_may_be_a_link(tmp_path):
    folders(tmp_path / "elsewhere", ["b"])
    path = folders(tmp_path / "data", ["a"])
    (path / "b").symlink_to(tmp_path / "elsewhere" / "b", target_is_directory=True)
    assert labels(path, classifier(2)) == {"a": 0, "b": 1}


def test_files_that_are_not_read_are_counted_and_named(tmp_path):
    path = folders(tmp_path / "data", ["a", "b"])
    for k in range(3):
        np.save(path / "a" / f"{k}.npy", np.ones(2))
    for name in ("b/1.HEIC", "b/2.heic", "b/image", "a/.hidden.txt", "a/Thumbs.db"):
        (path / name).write_bytes(b"x")
    (path / "b" / ".ipynb_checkpoints").mkdir()
    shutil.copy(path / "a" / "a.png", path / "b" / ".ipynb_checkpoints" / "a.png")
    shutil.copy(path / "a" / "a.png", path / "loose.png")
    dataset = load_dataset(str(path), classifier(2))
    assert dataset.names == ("a/a.png", "b/a.png")
    (note,) = dataset.notes
    assert note.startswith(f"not read in {path}: 3 .npy, 2 .heic, ")
    for part in (
        "1 without an ending",
        "1 hidden folders inside",
        "1 images beside the class folders",
        "convert or rename",
    ):
        assert part in note
    assert load_dataset(str(folders(tmp_path / "clean", "ab")), classifier(2)).notes == ()


@pytest.mark.parametrize("ending", ["jfif", "JFIF", "jpe", "gif", "GIF", "pnm"])
def test_other_endings_of_known_formats_are_read(ending, tmp_path):
    path = folders(tmp_path / "data", ["a", "b"])
    kind = {"jfif": "JPEG", "jpe": "JPEG", "gif": "GIF", "pnm": "PPM"}[ending.lower()]
    Image.new("RGB", (8, 8), (255, 0, 0)).save(path / "b" / f"c.{ending}", kind)
    dataset = load_dataset(str(path), classifier(2))
    assert dataset.names[-1] == f"b/c.{ending}"
    red, green, _ = dataset.load(2, Preprocessing(8, 8)).mean((1, 2)).tolist()
    assert red > 0.9
    assert green < 0.1


def test_a_folder_without_images_says_what_it_has(tmp_path):
    path = folders(tmp_path / "data", [], empty="ab")
    np.save(path / "a" / "0.npy", np.ones(2))
    with pytest.raises(EvaluationError, match=r"names no images .*; not read in .*: 1 \.npy\."):
        load_dataset(str(path), classifier(2))
    loose = folders(tmp_path / "loose", [], empty="a")
    Image.new("RGB", (8, 8)).save(loose / "x.jpg")
    with pytest.raises(EvaluationError, match="has 1 images, but no class folders: put those of a class into a folder"):
        load_dataset(str(loose), classifier(2))


def pixels(name: str) -> torch.Tensor:
    image = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    edges = (image > 0.5).float()[None]
    return {
        "one pixel": image.clone().index_put_(
            (torch.tensor(0), torch.tensor(0), torch.tensor(0)), torch.tensor(1.0001)
        ),
        "bicubic": torch.nn.functional.interpolate(edges, scale_factor=2, mode="bicubic")[0, :, :32, :32],
        "normalised": (image - mean) / std,
        "bright and normalised": (0.9 + 0.1 * image - mean) / std,
        "centred": 2 * image - 1,
        "8-bit": (image * 255).round(),
        "16-bit": (image * 65535).round(),
        "8-bit, resized": image * 255,
        "nan": image * torch.nan,
    }[name]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("one pixel", "not in [0, 1]: they overshoot a little, as rounding or bicubic resizing makes them; clamp"),
        (
            "bicubic",
            "they overshoot a little, as rounding or bicubic resizing makes them; clamp them, image.clamp(0, 1)",
        ),
        ("normalised", "they look normalised; return them in [0, 1]"),
        ("bright and normalised", "they look normalised; return them in [0, 1]"),
        ("centred", "they look scaled to [-1, 1]; return (image + 1) / 2"),
        ("8-bit", "they look 8-bit; divide them by 255"),
        ("16-bit", "they look 16-bit; divide them by 65535"),
        ("8-bit, resized", "divide them by 255"),
        ("nan", "some pixels are NaN or infinite"),
    ],
)
def test_pixels_outside_their_range_are_explained(name, hint):
    with pytest.raises(DecodeError) as caught:
        _as_input(pixels(name), 32)
    assert hint in str(caught.value)


def test_round_off_is_no_fault():
    image = torch.full((3, 8, 8), 1 + 2**-23)
    assert float(_as_input(image, 8).max()) == 1

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from orthattack.eval.data.dataset import Batch, Unreadable
from orthattack.eval.data.load import SAMPLES, load_dataset
from orthattack.eval.errors import EvaluationError
from orthattack.eval.models.classifier import Classifier
from orthattack.eval.models.preprocessing import Preprocessing


def classifier(num_classes: int = 3, classes: tuple[str, ...] | None = None) -> Classifier:
    return Classifier("model", torch.nn.Identity(), Preprocessing(8, 8), classes, num_classes, "test")


@pytest.fixture
def folder(tmp_path) -> Path:
    """Three class folders, of 2, 3 and 1 images, each of one colour that tells which it is."""
    for label, (name, count) in enumerate({"cat": 2, "apple pie": 3, "zebra": 1}.items()):
        (tmp_path / name).mkdir()
        for k in range(count):
            Image.new("RGB", (8, 8), (10 * label, 10 * k, 0)).save(tmp_path / name / f"{k}.png")
    return tmp_path


def test_class_folders_in_sorted_order(folder):
    dataset = load_dataset(str(folder), classifier())
    assert list(zip(dataset.names, dataset.labels, strict=True)) == [
        ("apple pie/0.png", 0),
        ("apple pie/1.png", 0),
        ("apple pie/2.png", 0),
        ("cat/0.png", 1),
        ("cat/1.png", 1),
        ("zebra/0.png", 2),
    ]
    assert dataset.classes == ("apple pie", "cat", "zebra")
    assert dataset.limited(2).classes == dataset.classes


def test_class_folders_matched_by_name(folder):
    known = classifier(5, ("dog", "Zebra", "apple_pie", "house", "cat"))
    dataset = load_dataset(str(folder), known)
    labels = dict(zip(dataset.names, dataset.labels, strict=True))
    assert dataset.classes is None  # the model's own say it all
    assert labels["cat/0.png"] == 4
    assert labels["apple pie/0.png"] == 2
    assert labels["zebra/0.png"] == 1


def test_ambiguous_names_are_not_guessed(folder):
    with pytest.raises(EvaluationError, match="has a folder 'cat' that is not, or not the only, class of that name"):
        load_dataset(str(folder), classifier(4, ("cat", "cat", "apple pie", "zebra")))
    with pytest.raises(EvaluationError, match="has a folder 'zebra' that is not"):
        load_dataset(str(folder), classifier(3, ("apple pie", "cat", "horse")))
    with pytest.raises(EvaluationError, match="3 class folders and model 4 classes, so which is which is not known"):
        load_dataset(str(folder), classifier(4))


def test_folders_called_by_number_and_hidden_ones(tmp_path):
    for name in [*map(str, range(12)), ".cache"]:
        (tmp_path / name).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / name / "a.png")
    found = load_dataset(str(tmp_path), classifier(12))
    assert found.mapping == "folders called by the model's class indices"
    assert len(found) == 12
    assert all(label == int(name.split("/")[0]) for name, label in zip(found.names, found.labels, strict=True))


def test_sixteen_bit_grey_is_scaled_and_wider_pixels_are_refused():
    ramp = np.arange(64, dtype=np.uint16).reshape(8, 8) * 1040
    pixels = Preprocessing(8, 8)(Image.fromarray(ramp))
    np.testing.assert_allclose(pixels[0].numpy(), ramp / 65535, atol=1 / 255)
    with pytest.raises(ValueError, match="pixels of mode F have no known range"):
        Preprocessing(8, 8)(Image.new("F", (8, 8)))


def test_labels_from_a_file(folder):
    path = folder / "labels.csv"
    path.write_text("\ufefffile,wnid,label\ncat/1.png,n1,2\nzebra/0.png,n2,0\n", encoding="utf-8")
    dataset = load_dataset(str(folder), classifier(), path)
    assert list(zip(dataset.names, dataset.labels, strict=True)) == [("cat/1.png", 2), ("zebra/0.png", 0)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name,label\n", "must have columns file and label; it has name, label"),
        ("", "must have columns file and label; it has none"),
        (
            "file,label\ncat/0.png,one\n",
            r"line 2: label must be a class index >= 0, file a name; got 'cat/0.png', 'one'",
        ),
        ("file,label\ncat/0.png,-1\n", "line 2: label must be a class index >= 0"),
        ("file,label\ncat/0.png\n", "line 2: label must be a class index >= 0"),
        ("file,label\n,1\n", "line 2: label must be a class index >= 0"),
        ("file,label\ncat/0.png,0\ncat/0.png,1\n", "line 3: 'cat/0.png' is listed twice"),
        ("file,label\n../secret.png,0\n", r"line 2: '../secret.png' lies outside"),
        ("file,label\n/etc/passwd,0\n", "line 2: '/etc/passwd' lies outside"),
        ("file,label\n", "names no images"),
        (
            "file,label\ncat/0.png,3\n",
            "cat/0.png has label 3, but model has 3 classes, 0 to 2: is this the right model",
        ),
    ],
)
def test_bad_label_files_are_explained(folder, text, message):
    path = folder / "labels.csv"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(EvaluationError, match=message):
        load_dataset(str(folder), classifier(), path)


def test_label_files_that_are_not_text(folder):
    path = folder / "labels.csv"
    path.write_bytes(b"file,label\n\xff\xfe,1\n")
    with pytest.raises(EvaluationError, match="could not read labels file"):
        load_dataset(str(folder), classifier(), path)
    with pytest.raises(EvaluationError, match="could not read labels file"):
        load_dataset(str(folder), classifier(), folder / "none.csv")


def test_missing_and_empty_folders_are_explained(tmp_path):
    with pytest.raises(
        EvaluationError, match="does not exist; it must be a folder or imagenet-samples or cifar10-samples"
    ):
        load_dataset(str(tmp_path / "none"), classifier())
    with pytest.raises(EvaluationError, match="names no images"):
        load_dataset(str(tmp_path), classifier())
    with pytest.raises(EvaluationError, match="cifar10-samples has labels of its own"):
        load_dataset("cifar10-samples", classifier(), tmp_path / "labels.csv")


def test_corrupt_images_are_named_and_the_rest_is_read(folder):
    (folder / "cat" / "0.png").write_bytes(b"")
    whole = (folder / "apple pie" / "1.png").read_bytes()
    (folder / "apple pie" / "1.png").write_bytes(whole[: len(whole) // 2])
    (folder / "zebra" / "1.jpg").write_text("not an image")
    found = list(load_dataset(str(folder), classifier()).batches(2, Preprocessing(8, 8)))
    unreadable = [item.name for item in found if isinstance(item, Unreadable)]
    batches = [item for item in found if isinstance(item, Batch)]
    assert unreadable == ["apple pie/1.png", "cat/0.png", "zebra/1.jpg"]
    assert [batch.names for batch in batches] == [["apple pie/0.png", "apple pie/2.png"], ["cat/1.png", "zebra/0.png"]]
    assert batches[1].labels.tolist() == [1, 2]
    assert batches[1].images.shape == (2, 3, 8, 8)
    colours = (255 * batches[1].images[:, :2, 0, 0]).round().tolist()
    assert colours == [[0, 10], [20, 0]]


def test_a_listed_file_that_is_missing_is_unreadable(folder):
    path = folder / "labels.csv"
    path.write_text("file,label\ncat/9.png,0\ncat/0.png,1\n")
    found = list(load_dataset(str(folder), classifier(), path).batches(4, Preprocessing(8, 8)))
    assert [type(item) for item in found] == [Unreadable, Batch]
    assert found[0].reason == "no such file"


def test_a_limit_is_spread_evenly(folder):
    dataset = load_dataset(str(folder), classifier())
    assert dataset.limited(3).names == ("apple pie/0.png", "apple pie/2.png", "cat/1.png")
    assert dataset.limited(None) is dataset
    assert dataset.limited(100) is dataset
    with pytest.raises(EvaluationError, match="--limit must be at least 1; got 0"):
        dataset.limited(0)


@pytest.mark.parametrize("name", SAMPLES)
def test_the_samples_in_foolboxs_package(name):
    size = 224 if name == "imagenet-samples" else 32
    dataset = load_dataset(name, classifier(1000))
    assert len(dataset) == 20
    (batch,) = dataset.batches(20, Preprocessing(size, size))
    assert batch.images.shape == (20, 3, size, size)
    assert batch.images.flatten(1).std(dim=1).min() > 0.05
    if name == "cifar10-samples":
        assert batch.labels.tolist() == [3, 8, 8, 0, 6, 6, 1, 6, 3, 1, 0, 9, 5, 7, 9, 8, 5, 7, 8, 6]


def test_a_model_that_does_not_say_its_number_of_classes_is_asked(folder):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 8 * 8, 3))
    dataset = load_dataset(str(folder), Classifier("mine", model, Preprocessing(8, 8)))
    assert (max(dataset.labels), dataset.classes) == (2, ("apple pie", "cat", "zebra"))

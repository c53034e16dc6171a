from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from orthattack.eval.data.classes import imagenet_wnids, match_names
from orthattack.eval.data.load import load_dataset
from orthattack.eval.errors import EvaluationError
from orthattack.eval.models.classifier import Classifier
from orthattack.eval.models.preprocessing import Preprocessing


def classifier(num_classes: int, classes: tuple[str, ...] | None = None) -> Classifier:
    return Classifier("model", torch.nn.Identity(), Preprocessing(8, 8), classes, num_classes, "test")


@pytest.fixture
def folder(tmp_path) -> Path:
    for wnid in ("n01", "n02"):
        (tmp_path / "data" / wnid).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "data" / wnid / "a.png")
    return tmp_path / "data"


@given(st.permutations(range(7)))
def test_names_win_over_numbers(order):
    own = tuple(f"class_{k}" for k in order)
    matched = match_names([(f"Class {k}", "other") for k in range(7)], classifier(7, own), "data")
    assert [own[label] for label in matched.labels] == [f"class_{k}" for k in range(7)]


def test_numbers_serve_where_names_are_not_unique_but_agree():
    matched = match_names([("crane",), ("house",), ("crane",)], classifier(3, ("crane", "home", "crane")), "data")
    assert matched.labels == (0, 1, 2)
    assert "taken as the model's class indices, since there are as many (2 of 3 names agree)" in matched.mapping


def test_names_that_contradict_numbers_are_not_guessed():
    with pytest.raises(EvaluationError, match=r"which is not known .its class 0, 'dog', is the model's class 1"):
        match_names([("dog",), ("house",)], classifier(2, ("cat", "dog")), "data")
    with pytest.raises(EvaluationError, match=r"data has 2 classes and model 3, .* .'house' is not, or not the only"):
        match_names([("dog",), ("house",)], classifier(3, ("cat", "dog", "cow")), "data")


@pytest.mark.parametrize("columns", ["folder,label", "wnid,label", "class,index", "index,wnid,name"])
def test_a_class_map(folder, tmp_path, columns):
    values = {"folder": "n0{}", "wnid": "n0{}", "class": "n0{}", "name": "x", "label": "{}00", "index": "{}00"}
    rows = [",".join(values[name].format(k) for name in columns.split(",")) for k in (1, 2, 3, 2)]
    (tmp_path / "map.csv").write_text("\n".join([columns, *rows]) + "\n")
    dataset = load_dataset(str(folder), classifier(1000), classes=tmp_path / "map.csv")
    assert dict(zip(dataset.names, dataset.labels, strict=True)) == {"n01/a.png": 100, "n02/a.png": 200}
    assert dataset.mapping.startswith("classes matched by map.csv, columns ")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a,label\n", "must have a column folder, wnid or class, and a column label or index; it has a, label"),
        ("folder,label\nn01,1\nn1,2\n", "does not list 'n02', a class of .*; the nearest that it lists is 'n01'"),
        ("folder,label\nn01,1\nn01,2\n", "line 3: 'n01' has index 2, but 1 before"),
        ("folder,label\nn01,tench\n", "line 2: label must be a class index >= 0, folder a name; got 'n01', 'tench'"),
        ("folder,label\nn01,1\nn02,3\n", "has label 3, but model has 3 classes, 0 to 2: is this the right model"),
    ],
)
def test_bad_class_maps_are_explained(folder, tmp_path, text, message):
    (tmp_path / "map.csv").write_text(text)
    with pytest.raises(EvaluationError, match=message):
        load_dataset(str(folder), classifier(3), classes=tmp_path / "map.csv")


def test_a_class_map_goes_with_classes(folder, tmp_path):
    with pytest.raises(EvaluationError, match="--classes matches classes by name; imagenet-samples has the model's"):
        load_dataset("imagenet-samples", classifier(1000), classes=tmp_path / "map.csv")
    with pytest.raises(EvaluationError, match="could not read classes file"):
        load_dataset(str(folder), classifier(3), classes=tmp_path / "none.csv")


def test_some_of_imagenets_folders_are_known_by_their_wordnet_ids(tmp_path):
    wnids = imagenet_wnids()
    assert list(wnids) == sorted(wnids)
    assert (len(wnids), wnids["n01440764"], wnids["n03888257"], wnids["n15075141"]) == (1000, 0, 701, 999)
    for wnid in ("n03888257", "n01440764"):
        (tmp_path / wnid).mkdir()
        Image.new("RGB", (8, 8)).save(tmp_path / wnid / "a.png")
    known = load_dataset(str(tmp_path), classifier(1000))
    assert known.labels == (0, 701)
    assert [(known.classes or ())[k] for k in (0, 701, 999)] == ["tench", "parachute", "toilet tissue"]
    of_two = load_dataset(str(tmp_path), classifier(2))  # a model of these two
    assert (of_two.labels, of_two.classes) == ((0, 1), ("tench", "parachute"))
    samples = load_dataset("imagenet-samples", classifier(1000))
    assert {(samples.classes or ())[k] for k in samples.labels} >= {"jeep", "thatch", "strawberry"}
    (tmp_path / "n01440764").rename(tmp_path / "n01440765")  # which is none
    with pytest.raises(EvaluationError, match=r"2 class folders and model 1000 classes.*pass --classes FILE.csv"):
        load_dataset(str(tmp_path), classifier(1000))


def test_wnid_folders_with_a_model_of_1000_classes(shared):
    data = shared / "data" / "imagenet-sample"
    mapped = load_dataset(str(data), classifier(1000), classes=data / "labels.csv")
    labelled = load_dataset(str(data), classifier(1000), labels=data / "labels.csv")
    known = load_dataset(str(data), classifier(1000))
    assert known.mapping == "folders matched with ImageNet's classes by WordNet id"
    assert len(mapped) == 195
    for found in (mapped, known):
        assert dict(zip(found.names, found.labels, strict=True)) == dict(
            zip(labelled.names, labelled.labels, strict=True)
        )
    tiny = shared / "data" / "tiny-imagenet-20"
    by_file = load_dataset(str(tiny / "val"), classifier(20), classes=tiny / "classes.csv")
    assert by_file.labels == load_dataset(str(tiny / "val"), classifier(20)).labels

from __future__ import annotations

import hashlib
import io
import json
import pickle
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import torchvision
from PIL import Image

from orthattack.eval.data import readers as sources
from orthattack.eval.data.dataset import ImageDataset, Unreadable, read_names
from orthattack.eval.data.load import check_data, load_dataset
from orthattack.eval.errors import EvaluationError
from orthattack.eval.models.classifier import Classifier
from orthattack.eval.models.preprocessing import Preprocessing

EIGHT = Preprocessing(8, 8)
CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def classifier(num_classes: int = 3, classes: tuple[str, ...] | None = None) -> Classifier:
    return Classifier("model", torch.nn.Identity(), EIGHT, classes, num_classes, "test")


def png(value: int) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (value, 0, 0)).save(stream, "PNG")
    return stream.getvalue()


def shard(
    path: Path, values: list[int], *, classes: list[str] | None = None, rows: int = 3, image: str = "image"
) -> None:
    """Images whose red is their value, labelled value % 3, in row groups of `rows`."""
    column = pa.array(
        [{"bytes": png(v), "path": None} for v in values], pa.struct({"bytes": pa.binary(), "path": pa.string()})
    )
    table = pa.table({image: column, "label": pa.array([v % 3 for v in values], pa.int64())})
    if classes is not None:
        features = {"label": {"names": classes, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=rows)


def reds(dataset: ImageDataset) -> list[int]:
    return [round(255 * float(dataset.load(k, EIGHT)[0, 0, 0])) for k in range(len(dataset))]


def test_shards_are_read_in_order_across_row_groups(tmp_path):
    shard(tmp_path / "test-00001-of-00002.parquet", [50, 51])
    shard(tmp_path / "test-00000-of-00002.parquet", list(range(10)), image="image")
    for data in (tmp_path, tmp_path / "test-*.parquet"):
        dataset = load_dataset(str(data), classifier())
        assert reds(dataset) == [*range(10), 50, 51]
        assert dataset.labels == tuple(v % 3 for v in [*range(10), 50, 51])
        assert dataset.names[0] == "test-00000-of-00002/0"
        assert dataset.names[-1] == "test-00001-of-00002/1"
        assert dataset.mapping == "labels taken as the model's class indices"


def test_shards_of_plain_bytes_and_of_another_column_name(tmp_path):
    table = pa.table(
        {"img": pa.array([png(7), b"nonsense", None], pa.large_binary()), "label": pa.array([0, 1, 2], pa.int8())}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    dataset = load_dataset(str(tmp_path / "a.parquet"), classifier())
    assert dataset.load(0, EIGHT)[0, 0, 0] == pytest.approx(7 / 255)
    with pytest.raises(Unreadable, match="a/1: not an image of a known format"):
        dataset.load(1, EIGHT)
    with pytest.raises(Unreadable, match="a/2: the shard has no bytes for it"):
        dataset.load(2, EIGHT)


def test_classes_in_the_metadata_are_matched_by_name(tmp_path):
    shard(tmp_path / "a.parquet", [0, 1, 2], classes=["tench, Tinca tinca", "sea_lion", "zebra"])
    dataset = load_dataset(str(tmp_path), classifier(4, ("Zebra", "tench", "house", "sea lion")))
    assert dataset.labels == (1, 3, 0)
    assert dataset.mapping == "the data's classes matched with the model's by name"
    unnamed = load_dataset(str(tmp_path), classifier(3))
    assert unnamed.labels == (0, 1, 2)
    assert unnamed.classes == ("tench, Tinca tinca", "sea_lion", "zebra")
    assert "since there are as many (the model's have no names)" in unnamed.mapping


def test_row_groups_are_read_once_in_order_and_what_is_kept_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "CACHED_BYTES", 0)
    shard(tmp_path / "a.parquet", list(range(12)), rows=2)
    read = []
    original = sources.parquet.batches
    monkeypatch.setattr(
        sources.parquet, "batches", lambda file, path, columns, groups=None: read.append(groups)
        or original(file, path, columns, groups),
    )  # fmt: skip
    dataset = load_dataset(str(tmp_path), classifier())
    assert reds(dataset) == list(range(12))
    assert read == [None, *([k] for k in range(6))]  # the labels, then each once, in order
    assert len(dataset._source._cache) == 1


def test_threads_get_what_one_gets(tmp_path):
    shard(tmp_path / "a.parquet", list(range(60)), rows=4)
    dataset = load_dataset(str(tmp_path), classifier())
    order = [k * 37 % 60 for k in range(60)] * 3
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda k: round(255 * float(dataset.load(k, EIGHT)[0, 0, 0])), order))
    assert found == order


def test_shards_that_cannot_be_used_are_explained(tmp_path):
    def refused(data: Path | str) -> str:
        with pytest.raises(EvaluationError) as caught:
            load_dataset(str(data), classifier())
        return str(caught.value)

    (tmp_path / "broken.parquet").write_bytes(b"PAR1")
    assert "cannot be read as a Parquet file" in refused(tmp_path / "broken.parquet")
    assert f"no Parquet file fits {tmp_path}/x*.parquet" in refused(f"{tmp_path}/x*.parquet")
    pq.write_table(pa.table({"pixels": [b"1"], "label": [1]}), tmp_path / "b.parquet")
    assert "b.parquet has no column image or img; it has pixels, label" in refused(tmp_path / "b.parquet")
    pq.write_table(pa.table({"image": [[1]], "label": [1]}), tmp_path / "c.parquet")
    assert "column image must be a struct with bytes, or binary; it is list<" in refused(tmp_path / "c.parquet")
    pq.write_table(pa.table({"image": [b"1"], "label": ["cat"]}), tmp_path / "d.parquet")
    assert "column label must be an integer; it is" in refused(tmp_path / "d.parquet")
    pq.write_table(pa.table({"image": [b"1"], "label": pa.array([None], pa.int64())}), tmp_path / "e.parquet")
    assert "1 of its rows have no label" in refused(tmp_path / "e.parquet")
    pq.write_table(pa.table({"image": [b"1"], "label": [-1]}), tmp_path / "f.parquet")
    assert "f/0 has label -1: this split is not labelled" in refused(tmp_path / "f.parquet")
    for split in ("train", "test"):
        shard(tmp_path / "hub" / "data" / f"{split}-00000-of-00001.parquet", [1])
    assert "has shards of several splits, test and train: choose one, such as --data '" in refused(tmp_path / "hub")


def test_the_fingerprint_tells_data_apart_wherever_they_lie(tmp_path):
    for place in ("here", "there"):
        for k in range(5):
            (tmp_path / place / str(k % 3)).mkdir(parents=True, exist_ok=True)
            (tmp_path / place / str(k % 3) / f"{k}.png").write_bytes(png(k))

    def fingerprint(place: str = "there") -> str:
        return load_dataset(str(tmp_path / place), classifier()).fingerprint()

    first = fingerprint()
    assert fingerprint("here") == first == fingerprint()
    dataset = load_dataset(str(tmp_path / "there"), classifier())
    assert dataset.limited(4).fingerprint() != first
    assert dataset.subset(dataset.names[::-1]).fingerprint() != first
    target = tmp_path / "there" / "1" / "4.png"
    changed = png(9)
    assert len(changed) == target.stat().st_size
    target.write_bytes(changed)
    assert fingerprint() != first
    target.unlink()
    assert dataset.fingerprint() not in (first, fingerprint())
    shard(tmp_path / "a.parquet", list(range(6)))
    shards = load_dataset(str(tmp_path / "a.parquet"), classifier())
    assert shards.fingerprint() == load_dataset(str(tmp_path / "a.parquet"), classifier()).fingerprint()
    described = shards.describe()
    assert (described["images"], described["fingerprint"]) == (6, shards.fingerprint())


def test_a_subset_is_in_its_own_order(tmp_path):
    shard(tmp_path / "a.parquet", list(range(6)))
    dataset = load_dataset(str(tmp_path / "a.parquet"), classifier())
    (tmp_path / "names.txt").write_text("\ufeff# the hard ones\na/4\n\n  a/0\n", encoding="utf-8")
    names = read_names(tmp_path / "names.txt")
    chosen = dataset.subset(names)
    assert chosen.names == ("a/4", "a/0")
    assert chosen.labels == (1, 0)
    assert reds(chosen) == [4, 0]
    assert reds(chosen.limited(1)) == [4]
    with pytest.raises(EvaluationError, match=r"--subset names 'a/44', which .* does not have; the nearest is 'a/4'"):
        dataset.subset(["a/1", "a/44"])
    with pytest.raises(EvaluationError, match="--subset names 'a/1' twice"):
        dataset.subset(["a/1", "a/1"])
    with pytest.raises(EvaluationError, match="--subset names no images"):
        dataset.subset([])
    with pytest.raises(EvaluationError, match="could not read subset file"):
        read_names(tmp_path / "none.txt")


@pytest.fixture
def cifar10(tmp_path, monkeypatch) -> Path:
    """The real layout, with six random images and their own checksums."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    generator = np.random.default_rng(0)

    def write(name: str, content: dict[str, object]) -> tuple[str, str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return name, hashlib.md5((folder / name).read_bytes()).hexdigest()

    batch = {"data": generator.integers(0, 256, (6, 3072), dtype=np.uint8), "labels": [3, 8, 8, 0, 6, 1]}
    meta, digest = write("batches.meta", {"label_names": list(CIFAR)})
    kind = torchvision.datasets.CIFAR10
    monkeypatch.setattr(kind, "test_list", [write("test_batch", batch)])
    monkeypatch.setattr(kind, "train_list", [write("data_batch_1", {**batch, "labels": [1] * 6})])
    monkeypatch.setattr(kind, "meta", {"filename": meta, "key": "label_names", "md5": digest})
    return tmp_path


def test_torchvisions_cifar10(cifar10):
    dataset = load_dataset(f"torchvision:CIFAR10,root={cifar10}", classifier(10))
    assert dataset.labels == (3, 8, 8, 0, 6, 1)
    assert dataset.names == ("0", "1", "2", "3", "4", "5")
    assert dataset.classes == CIFAR
    raw = torchvision.datasets.CIFAR10(cifar10, train=False)
    assert torch.equal(dataset.load(2, Preprocessing(32, 32)), torchvision.transforms.functional.to_tensor(raw[2][0]))
    shuffled = load_dataset(f"torchvision:CIFAR10,root={cifar10}", classifier(10, CIFAR[::-1]))
    assert shuffled.labels == tuple(9 - k for k in dataset.labels)
    assert load_dataset(f"torchvision:CIFAR10,root={cifar10},split=train", classifier(10)).labels == (1,) * 6
    (cifar10 / "cifar-10-batches-py" / "test_batch").write_bytes(b"other")
    with pytest.raises(EvaluationError, match=r"torchvision could not open it .*Nothing is downloaded here"):
        load_dataset(f"torchvision:CIFAR10,root={cifar10}", classifier(10))


def test_torchvisions_imagenette_is_found_among_imagenets_classes(tmp_path):
    for wnid, colour in (("n01440764", 10), ("n03888257", 200)):
        folder = tmp_path / "imagenette2-160" / "val" / wnid
        folder.mkdir(parents=True)
        Image.new("RGB", (20, 30), (colour, 0, 0)).save(folder / "a.JPEG")
    names = tuple(torchvision.models.ResNet18_Weights.DEFAULT.meta["categories"])
    dataset = load_dataset(f"torchvision:Imagenette,root={tmp_path},size=160px", classifier(1000, names))
    assert [names[k] for k in dataset.labels] == ["tench", "parachute"]
    assert dataset.load(1, EIGHT)[0].mean() == pytest.approx(200 / 255, abs=0.02)


@pytest.mark.parametrize(
    ("spelling", "message"),
    [
        ("torchvision:CIFAR11,root=.", "torchvision has no data set 'CIFAR11'; did you mean CIFAR10"),
        ("torchvision:CIFAR10", "needs the folder that has the data: torchvision:CIFAR10,root=FOLDER"),
        ("torchvision:CIFAR10,root=nowhere", "there is no folder nowhere"),
        ("torchvision:CIFAR10,root=.,download=true", "'download=true' is not an option of CIFAR10; it has root, split"),
        ("torchvision:CIFAR10,root=.,split=val", "split must be train or test; got 'val'"),
        ("nowhere", "data folder nowhere does not exist; it must be a folder or imagenet-samples"),
    ],
)
def test_data_that_cannot_be_meant_are_refused_at_once(spelling, message):
    with pytest.raises(EvaluationError) as caught:
        check_data(spelling)
    assert message in str(caught.value)


@pytest.mark.parametrize("name", ["CIFAR100", "ImageNet", "Flowers102"])
def test_data_that_are_not_there_are_not_downloaded(tmp_path, name):
    with pytest.raises(EvaluationError, match=f"torchvision:{name},.*torchvision could not open it"):
        load_dataset(f"torchvision:{name},root={tmp_path}", classifier(10))
    assert list(tmp_path.iterdir()) == []


CODE = """
import numpy as np, torch
from PIL import Image

class Counted(torch.utils.data.Dataset):
    decoded = 0
    targets = [2, 0, 1, 1, 2]
    def __len__(self): return 5
    def __getitem__(self, k):
        Counted.decoded += 1
        return Image.new("RGB", (9, 9), (40 * k, 0, 0)), self.targets[k]

class Liar(Counted):
    labels = targets = None
    def __init__(self): self.targets = [0] * 5
    def __getitem__(self, k): return Image.new("L", (8, 8)), torch.tensor(k % 3)

def dataset(): return Counted()
def liar(): return Liar()
def pairs(): return [(np.full((8, 8, 3), 51, np.uint8), np.int64(1)), (torch.full((3, 8, 8), 0.5), 2),
                     (torch.full((3, 8, 8), 255, dtype=torch.uint8), 0), (torch.full((3, 8, 8), -2.0), 0),
                     (torch.zeros(3, 9, 9), 0), (torch.full((3, 8, 8), 200.0), 0), (np.zeros((8, 8)), 1), ("a.jpg", 1)]
def stream(): return iter(pairs())
def images(): return [Image.new("L", (8, 8))]
def words(): return [(Image.new("L", (8, 8)), "cat")]
def fails(): raise OSError("the disk is gone")
"""


@pytest.fixture
def user(tmp_path, monkeypatch):
    """A module of the user's in the current directory."""
    (tmp_path / "users_data.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "users_data", raising=False)
    return lambda function: load_dataset(f"users_data:{function}", classifier())


def test_a_users_data_set_is_not_decoded_for_its_labels(user):
    dataset = user("dataset")
    assert dataset.labels == (2, 0, 1, 1, 2)
    assert sys.modules["users_data"].Counted.decoded == 3
    assert reds(dataset) == [0, 40, 80, 120, 160]


def test_labels_that_the_items_contradict_are_not_believed(user):
    assert user("liar").labels == (0, 1, 2, 0, 1)


def test_what_a_users_items_may_be(user):
    dataset = user("pairs")
    assert dataset.labels == (1, 2, 0, 0, 0, 0, 1, 1)
    assert [float(dataset.load(k, EIGHT)[0, 0, 0]) for k in range(3)] == pytest.approx([0.2, 0.5, 1.0])
    reasons = [
        r"pixels lie in \[-2, -2\], not in \[0, 1\]: they look normalised; return them in \[0, 1\]",
        r"must have the model's input size \(3, 8, 8\); got \(3, 9, 9\): return a Pillow image to have it resized",
        r"\[200, 200\], not in \[0, 1\]: they look 8-bit; divide them by 255",
        r"an array must be \(H, W, 3\) of uint8; got \(8, 8\) of float64",
        "must be a Pillow image, an array or a tensor; got str",
    ]
    for k, reason in enumerate(reasons, start=3):
        with pytest.raises(Unreadable, match=reason):
            dataset.load(k, EIGHT)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("stream", "must be a sequence of .image, label., or a map-style Dataset; it is list_iterator"),
        ("images", "item 0 must be .image, class index., but is Image"),
        ("words", "item 0 must be .image, class index., but is .'Image', 'str'"),
        ("fails", r"users_data:fails\(\) failed .OSError: the disk is gone."),
        ("absent", "users_data.py has no function absent"),
        ("CODE", "users_data.py has no function CODE"),
    ],
)
def test_a_users_function_that_is_no_use_is_explained(user, function, message):
    with pytest.raises(EvaluationError, match=message):
        user(function)


def test_modules_that_cannot_be_imported_are_explained(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "needs.py").write_text("import a_package_that_there_is_not")
    (tmp_path / "wrong.py").write_text("1 / 0")
    for name, message in (
        ("nobodys.data:f", "there is no module nobodys on sys.path or in the current directory"),
        ("needs:f", "importing needs failed .ModuleNotFoundError: No module named 'a_package_that_there_is_not'"),
        ("wrong:f", "importing wrong failed .ZeroDivisionError: division by zero"),
    ):
        with pytest.raises(EvaluationError, match=message):
            load_dataset(name, classifier())

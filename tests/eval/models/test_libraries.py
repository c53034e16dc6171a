"""Classifiers of transformers and RobustBench, from files, as there is no network."""

from __future__ import annotations

import sys

import pytest
import torch
from PIL import Image

from orthattack.eval.errors import EvaluationError
from orthattack.eval.models.load import check_name, load_classifier

pytestmark = pytest.mark.extra


@pytest.fixture
def transformers(monkeypatch):
    found = pytest.importorskip("transformers", reason="needs the extra hf")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # or it tries for half a minute
    return found


@pytest.fixture
def folder(transformers, tmp_path):
    torch.manual_seed(0)
    names = ["cat", "dog", "cow", "ant"]
    config = transformers.ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, patch_size=8,
        id2label=dict(enumerate(names)), label2id={name: k for k, name in enumerate(names)},
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}, resample=3).save_pretrained(tmp_path / "vit")
    return tmp_path / "vit"


def test_a_folder_of_transformers_is_the_model_that_the_processor_prepares_for(transformers, folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    classifier = load_classifier("hf:./vit")
    assert (classifier.classes, classifier.num_classes) == (("cat", "dog", "cow", "ant"), 4)
    assert classifier.preprocessing.describe() | {"exif_orientation": ""} == {
        "resize": 32, "crop": 32, "aspect": "squash", "interpolation": "bicubic", "antialias": True, "mean": [0.5] * 3,
        "std": [0.5] * 3, "exif_orientation": "", "already_of_input_size": "used as it is",
    }  # fmt: skip
    image = Image.effect_mandelbrot((70, 50), (-2, -1, 1, 1), 50).convert("RGB")
    theirs = transformers.AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")
    with torch.no_grad():
        expected = transformers.AutoModelForImageClassification.from_pretrained(folder)(**theirs).logits
        found = classifier.model(classifier.preprocessing(image)[None])
    torch.testing.assert_close(found, expected, atol=2e-2, rtol=0)


@pytest.mark.parametrize(
    ("kind", "options", "expected"),
    [
        ("ConvNext", {"size": {"shortest_edge": 224}}, (256, 224, "keep")),
        ("ConvNext", {"size": {"shortest_edge": 384}}, (384, 384, "squash")),
        ("Bit", {}, (224, 224, "keep")),
        ("MobileNetV2", {}, (256, 224, "keep")),
        ("EfficientNet", {"include_top": False}, (346, 346, "squash")),
        ("EfficientNet", {}, "prepares images in another way"),  # normalises twice
        ("ViT", {"do_rescale": False}, "prepares images in another way"),
        ("ViT", {"size": {"height": 32, "width": 48}}, "cannot be followed"),
    ],
)
def test_a_processor_is_followed_or_refused(transformers, folder, kind, options, expected):
    getattr(transformers, f"{kind}ImageProcessor")(**options).save_pretrained(folder)
    if isinstance(expected, str):
        with pytest.raises(EvaluationError, match=rf"^hf:.*{expected}.*--model module:function$"):
            load_classifier(f"hf:{folder}")
    else:
        from orthattack.eval.models import hf

        found = hf._preprocessing("", transformers.AutoImageProcessor.from_pretrained(folder))
        assert (found.resize, found.crop, found.aspect) == expected


def test_what_transformers_cannot_give_is_explained(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")  # a pickle, whatever is in it
    with pytest.raises(EvaluationError, match=r"^could not load hf:\S+ \(OSError: .*model.safetensors of an image cla"):
        load_classifier(f"hf:{folder}")
    with pytest.raises(EvaluationError, match=r"^could not load hf:nobody/vit .*pass their folder as hf:./FOLDER$"):
        load_classifier("hf:nobody/vit")
    with pytest.raises(EvaluationError, match=r"hf:./none: ./none is no folder; it must be one that save_pretrained"):
        load_classifier("hf:./none")
    with pytest.raises(EvaluationError, match="--weights does not go with hf:"):
        load_classifier(f"hf:{folder}", "w.safetensors")


def test_code_that_comes_with_a_model_is_not_run(folder):
    config = (folder / "config.json").read_text()
    auto = '"auto_map": {"AutoConfig": "evil.Config", "AutoModelForImageClassification": "evil.Model"}, '
    (folder / "config.json").write_text(config.replace("{", "{" + auto, 1).replace('"vit"', '"evil"'))
    (folder / "evil.py").write_text(f"open({str(folder / 'ran')!r}, 'w')\n")
    with pytest.raises(EvaluationError, match="could not load"):
        load_classifier(f"hf:{folder}")
    assert not (folder / "ran").exists()


@pytest.fixture
def robustbench():
    return pytest.importorskip("orthattack.eval.models.robustbench", reason="needs the extra robustbench")


def network(robustbench, dataset, name):
    """A network of RobustBench's, which the zoo initialises at random."""
    torch.manual_seed(0)
    zoo = {
        (d.value, t.value): models for d, ts in robustbench._ROBUSTBENCH.all_models.items() for t, models in ts.items()
    }
    return zoo[dataset, "Linf"][name]["model"]().eval()


def test_a_model_of_robustbench_has_the_weights_of_the_file(robustbench, tmp_path):
    model = network(robustbench, "cifar10", "Andriushchenko2020Understanding")
    # Without the normalisation, and of two sets the last, as RobustBench takes them.
    state = {f"module.{key}": value for key, value in model.state_dict().items() if key not in ("mu", "sigma")}
    other = {key: value + 1 if value.is_floating_point() else value for key, value in state.items()}
    torch.save({"last": state, "best": other}, tmp_path / "w.pt")
    for name in ("Andriushchenko2020Understanding", "cifar10/Linf/Andriushchenko2020Understanding"):
        classifier = load_classifier(f"robustbench:{name}", tmp_path / "w.pt")
        assert (classifier.num_classes, classifier.preprocessing.crop) == (10, 32)
        images = torch.rand(2, 3, 32, 32)
        with torch.no_grad():
            assert torch.equal(classifier.model(images), model(images))


@pytest.mark.slow
def test_an_imagenet_model_of_robustbench_normalises_and_names_its_classes(robustbench, tmp_path):
    model = network(robustbench, "imagenet", "Salman2020Do_R18")
    torch.save({"model": model.model.state_dict()}, tmp_path / "w.pt")
    classifier = load_classifier("robustbench:imagenet/Linf/Salman2020Do_R18", tmp_path / "w.pt")
    assert (classifier.preprocessing.resize, classifier.preprocessing.crop) == (256, 224)
    assert (classifier.classes or ())[:2] == ("tench", "goldfish")
    images = torch.rand(1, 3, 224, 224)
    with torch.no_grad():
        assert torch.equal(classifier.model(images), model(images))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Wong2020Fst", "unknown model 'robustbench:Wong2020Fst'; did you mean robustbench:cifar10/Linf/Wong2020Fast"),
        ("cifar10/Linf/Chen2020Adversarial", "is an ensemble, or brings its weights .* --model module:function$"),
        ("imagenet/Linf/Wong2020Fast", "has images prepared by 'Crop288', which is not known here: .*function$"),
    ],
)
def test_what_robustbench_has_not_is_explained(robustbench, name, message):
    with pytest.raises(EvaluationError, match=message):
        load_classifier(f"robustbench:{name}")


def test_a_download_that_fails_says_what_to_fetch(robustbench, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def fails(gdrive_id, path):
        path.write_bytes(b"half")
        raise OSError("no network")

    monkeypatch.setattr(robustbench._ROBUSTBENCH, "download_gdrive_new", fails)
    with pytest.raises(
        EvaluationError,
        match=r"robustbench:Wong2020Fast \(OSError: no network\): fetch https://drive.google.com/uc\?id=\S+ elsewhere, "
        "and save it as models/cifar10/Linf/Wong2020Fast.pt, or pass it with --weights FILE$",
    ):
        load_classifier("robustbench:Wong2020Fast")
    assert not [*tmp_path.rglob("*.pt")]


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [
        ("hf:a/b", "transformers", "hf"),
        ("timm:resnet18", "timm", "timm"),
        ("robustbench:A", "robustbench", "robustbench"),
    ],
)
def test_a_library_that_is_missing_is_named_with_its_extra(monkeypatch, name, package, extra):
    for module in [one for one in sys.modules if one.partition(".")[0] == package]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, f"orthattack.eval.models.{extra}", raising=False)
    with pytest.raises(EvaluationError, match=rf"^{name} needs {package} \(.*\): pip install 'orthattack\[{extra}\]'$"):
        check_name(name)

"""torchvision's architectures trained on 20 classes of Tiny ImageNet, for the benchmark of transfer."""

from __future__ import annotations

import tarfile
from pathlib import Path

import torch
import torchvision
from safetensors.torch import save_file

from benchmarks.study.training import Set, train
from orthattack import Normalized
from orthattack.eval.data.load import load_dataset
from orthattack.eval.models.load import load_classifier
from orthattack.eval.models.preprocessing import IMAGENET_MEAN, IMAGENET_STD

ARCHITECTURES = ("mobilenet_v3_small", "shufflenet_v2_x0_5")
SEEDS = 3
EPOCHS = 10
BATCH = 100
_IMAGES: dict[Path, Set] = {}  # the training set, decoded once


def weights(shared: Path, build: Path, architecture: str, seed: int, epochs: int = EPOCHS) -> Path:
    """The weights after training on the training set of `shared`; made where they are not in `build` yet."""
    path = build / "networks" / f"{architecture}-{epochs}-{seed}.safetensors"
    if not path.exists():
        seen = _images(shared, build)
        torch.manual_seed(seed)
        model = torchvision.models.get_model(architecture, num_classes=int(seen.labels.max()) + 1)
        batches = seen.batches(BATCH, torch.Generator().manual_seed(seed))
        normalized = Normalized(model, IMAGENET_MEAN, IMAGENET_STD)
        train(normalized, batches, epochs * (len(seen.images) // BATCH), 0.1)
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        save_file(model.state_dict(), partial)
        partial.rename(path)
    return path


def _images(shared: Path, build: Path) -> Set:
    if shared not in _IMAGES:
        folder = build / "tiny-imagenet-20"
        if not folder.exists():
            partial = folder.with_suffix(".partial")
            with tarfile.open(shared / "data" / "tiny-imagenet-20" / "train.tar") as tar:
                tar.extractall(partial, filter="data")
            partial.rename(folder)
        known = load_classifier("resnet18", shared / "weights" / "resnet18-tiny20-standard.safetensors", 64)
        _IMAGES[shared] = Set.of(load_dataset(str(folder / "train"), known), known)
    return _IMAGES[shared]

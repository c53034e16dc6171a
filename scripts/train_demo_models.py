"""Train the two small CIFAR-10 models that `orthattack eval` uses by default.

    python scripts/train_demo_models.py DATA --kind standard --bfloat16 --epochs 30 --out standard.safetensors
    python scripts/train_demo_models.py DATA --kind robust --epochs 14 --init standard.safetensors \\
        --out robust-linf-8.safetensors

DATA holds train.tar with JPEG files in train/CLASS/NNNN.jpg. The standard model is trained on clean images. The robust
one starts from it and is trained on single-step adversarial images from a noisy start that is not clipped to the ball
(N-FGSM, de Jorge et al. 2022, arXiv:2202.01181), which does not collapse as FGSM training without noise does. Both keep
an exponential moving average of the weights and store it in float16. scripts/measure_demo_models.py measures them.
"""

from __future__ import annotations

import argparse
import io
import json
import tarfile
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torchvision.models.regnet import BlockParams, RegNet

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)


def build_model() -> nn.Module:
    """A RegNet whose strides suit 32x32 images and whose 3x3 convolutions are not grouped: 1.3 million weights."""
    widths = [64, 128, 192]
    model: nn.Module = RegNet(
        BlockParams([2, 2, 2], widths, widths, [1.0, 1.0, 1.0], [1, 2, 2]), num_classes=len(CLASSES)
    )
    return model


def read_tar(path: Path) -> tuple[Tensor, Tensor]:
    """Images (N, 3, 32, 32) uint8 and labels (N,) from a tar of SPLIT/CLASS/NNNN.jpg."""
    images, labels = [], []
    with tarfile.open(path) as tar:
        for member in tar:
            if member.isfile() and member.name.endswith(".jpg"):
                handle = tar.extractfile(member)
                assert handle is not None
                images.append(np.asarray(Image.open(io.BytesIO(handle.read())).convert("RGB")))
                labels.append(CLASSES.index(Path(member.name).parent.name))
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the images and shift each by up to 4 pixels (reflected border)."""
    n, _, height, width = images.shape
    padded = nn.functional.pad(images, (4, 4, 4, 4), mode="reflect")
    top = torch.randint(0, 9, (n, 1, 1, 1), generator=generator)
    left = torch.randint(0, 9, (n, 1, 1, 1), generator=generator)
    mirrored = torch.rand((n, 1, 1, 1), generator=generator) < 0.5
    rows = top + torch.arange(height).view(1, 1, -1, 1)
    columns = left + torch.arange(width).view(1, 1, 1, -1)
    columns = torch.where(mirrored, columns.flip(-1), columns)
    samples = torch.arange(n).view(-1, 1, 1, 1)
    channels = torch.arange(3).view(1, -1, 1, 1)
    return padded[samples, channels, rows, columns]


def save(model: nn.Module, path: Path) -> None:
    state = {k: v.half() if v.dtype.is_floating_point else v for k, v in model.state_dict().items()}
    metadata = {
        "classes": json.dumps(CLASSES),
        "mean": json.dumps(MEAN),
        "std": json.dumps(STD),
    }
    save_file(state, path, metadata=metadata)


def follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Move averaged weights a little towards a model's; counts are copied."""
    for kept, new in zip(average.state_dict().values(), model.state_dict().values(), strict=True):
        if kept.dtype.is_floating_point:
            kept.lerp_(new, 1 - decay)
        else:
            kept.copy_(new)


def train(args: argparse.Namespace) -> None:
    """Train, and write the averaged weights to `args.out` after every epoch."""
    kind, data, epochs, lr, eps, seed = args.kind, args.data, args.epochs, args.lr, args.eps, args.seed
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    images, labels = read_tar(data / "train.tar")
    mean, std = torch.tensor(MEAN).view(1, 3, 1, 1), torch.tensor(STD).view(1, 3, 1, 1)
    batch_size = 128
    batches = len(images) // batch_size
    model = build_model().to(memory_format=torch.channels_last)
    if args.init is not None:
        model.load_state_dict(load_file(args.init))
    average = build_model().eval()
    average.load_state_dict(model.state_dict())

    def run(inputs: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=args.bfloat16):
            logits: Tensor = model(((inputs - mean) / std).contiguous(memory_format=torch.channels_last))
        return logits.float()

    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 5e-4}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=lr, momentum=0.9, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=epochs * batches, pct_start=0.2)
    criterion = nn.CrossEntropyLoss(label_smoothing=0.1 if kind == "standard" else 0.0)
    for epoch in range(epochs):
        model.train()
        order = torch.randperm(len(images), generator=generator)
        start, right, total_loss = time.perf_counter(), 0, 0.0
        for step in range(batches):
            index = order[step * batch_size : (step + 1) * batch_size]
            clean = augment(images[index].float().div(255), generator)
            target = labels[index]
            if kind == "robust":
                size = args.noise * eps
                noisy = clean + torch.empty_like(clean).uniform_(-size, size, generator=generator)
                model.requires_grad_(False)
                (gradient,) = torch.autograd.grad(criterion(run(noisy.requires_grad_(True)), target), noisy)
                model.requires_grad_(True)
                clean = noisy.detach() + eps * gradient.sign()
            logits = run(clean)
            loss = criterion(logits, target)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            schedule.step()
            with torch.no_grad():
                right += int((logits.argmax(1) == target).sum())
                total_loss += float(loss)
                decay = min(0.998, (epoch * batches + step + 1) / (epoch * batches + step + 10))
                follow(average, model, decay)
        seconds, accuracy = time.perf_counter() - start, right / (batches * batch_size)
        told = f"loss {total_loss / batches:.3f}, train accuracy {accuracy:.3f}, {seconds:.0f} s"
        print(f"{kind} epoch {epoch + 1}/{epochs}: {told}", flush=True)
        save(average, args.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--kind", choices=("standard", "robust"), required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--init", type=Path, help="weights to start from")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--lr", type=float, default=0.15)
    parser.add_argument("--eps", type=float, default=7 / 255, help="of the robust kind's training images")
    parser.add_argument("--noise", type=float, default=1.5, help="size of their noisy start, in units of eps")
    parser.add_argument("--bfloat16", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    train(args)
    print(f"wrote {args.out} ({args.out.stat().st_size / 1e6:.2f} MB)")


if __name__ == "__main__":
    main()

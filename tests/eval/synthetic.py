"""Made-up runs: folders as an evaluation leaves them, with outcomes that are known."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from orthattack.eval.storage.run_folder import RunFolder, Shard
from orthattack.eval.storage.schema import CLEAN_SCHEMA, ROW_SCHEMA

EPS = (2 / 255, 4 / 255, 8 / 255)

# label: (source, orthogonal, minimal, baselines, how much farther than the nearest adversarial it must go)
ATTACKS: dict[str, tuple[str, bool, bool, list[str], float]] = {
    "FGSM": ("orthattack", False, False, [], 1.5),
    "OrthoFGSM": ("orthattack", True, False, ["FGSM"], 1.52),
    "PGD": ("orthattack", False, False, [], 1.1),
    "OrthoPGD": ("orthattack", True, False, ["PGD", "foolbox:LinfPGD"], 1.12),
    "MinimumNorm": ("orthattack", True, True, [], 1.05),
    "foolbox:LinfPGD": ("foolbox", False, False, [], 1.12),
}


def noise(position: int, channel_size: int) -> Tensor:
    """An image, if need be."""
    generator = torch.Generator().manual_seed(position)
    coarse = torch.rand(1, 3, 4, 4, generator=generator)
    return torch.nn.functional.interpolate(coarse, size=channel_size, mode="bilinear")[0]


def make_run(
    path: Path,
    *,
    n: int = 60,
    models: Sequence[str] = ("standard", "robust"),
    attacks: dict[str, tuple[str, bool, bool, list[str], float]] = ATTACKS,
    eps: Sequence[float] = EPS,
    classes: Sequence[str] | None = ("cat", "dog", "ship", "frog"),
    chunk: int = 25,
    stored: int = 6,
    size: int = 8,
    seed: int = 0,
    status: str = "complete",
    norm: str = "linf",
    limit: int | None = None,
    picture: Callable[[int, int], Tensor] = noise,
    flaws: bool = True,
    checks: list[dict[str, str]] | None = None,
    warnings: Sequence[str] = (),
    steps: int = 10,
    prefix: str = "photo",
) -> RunFolder:
    """Write a run and return its folder.

    Args:
        path: a folder that does not exist.
        n: images that the run sets out to attack.
        limit: images it has come to, all if None; only those of whole chunks have rows.
        stored: how many images, from the first on, are stored.
        prefix: what the images' names begin with.
        flaws: with unreadable images (position 3 and 40), and for the first attack of the first model errors
            (10 to 13) and an invalid image (14).
    """
    folder = RunFolder(path)
    folder.create()
    names = list(classes) if classes is not None else None
    count = len(names) if names else 10
    folder.write_manifest(
        {
            "orthattack": "0.1.0",
            "status": status,
            "config": {
                "norm": norm,
                "eps": list(eps),
                "steps": steps,
                "batch_size": 32,
                "shard_size": chunk,
                "seed": seed,
            },
            "attacks": [
                {
                    "label": label,
                    "name": label,
                    "source": source,
                    "parameters": {"steps": steps},
                    "seed": 0,
                    "baselines": baselines,
                    "orthogonal": orthogonal,
                    "minimal": minimal,
                    "uses_gradients": True,
                }
                for label, (source, orthogonal, minimal, baselines, _) in attacks.items()
            ],
            "models": [
                {
                    "label": label,
                    "name": label,
                    "source": "a file",
                    "sha256": "0" * 64,
                    "classes": count,
                    "class_names": names,
                    "parameters": 11_000_000,
                    "data": {"name": "made up", "images": n, "mapping": "by name", "fingerprint": "f" * 64},
                }
                for label in models
            ],
            "warnings": list(warnings),
            "sessions": [
                {
                    "started": "2026-01-02T03:04:05+00:00",
                    "finished": "2026-01-02T03:14:05+00:00" if status == "complete" else None,
                    "command": ["orthattack", "eval"],
                    "versions": {"torch": "2.14"},
                    "hardware": {"device": "cpu"},
                }
            ],
        }
    )
    if checks is not None:
        folder.write_text("checks.json", json.dumps(checks))
    for number, model in enumerate(models):
        rng = np.random.default_rng([seed, number])
        labels = rng.integers(0, count, n)
        right = rng.random(n) < 0.85
        nearest = (1 + 3 * number) * 1.5 / 255 * np.exp(0.8 * rng.standard_normal(n)) * (0.6 + 0.8 * labels / count)
        for start in range(0, n if limit is None else limit, chunk):
            positions = range(start, min(start + chunk, n))
            keep = [p for p in positions if p < stored]
            bad = {p for p in positions if flaws and p in (3, 40)}
            _clean(
                folder, model, start // chunk, positions, labels, right, bad, rng, count, keep, size, picture, prefix
            )
            for order, (label, (_, orthogonal, minimal, _, factor)) in enumerate(attacks.items()):
                for radius in [None] if minimal else eps:
                    broken = flaws and number == 0 and order == 0
                    rows: dict[str, list[Any]] = {name: [] for name in ROW_SCHEMA.names}
                    images = {}
                    for p in positions:
                        jitter = np.exp(0.1 * np.random.default_rng([seed, number, order, p]).standard_normal())
                        distance = nearest[p] * factor * jitter
                        fooled = bool(right[p]) and (minimal or distance <= radius)
                        row: dict[str, Any] = dict.fromkeys(ROW_SCHEMA.names)
                        row |= {
                            "position": p,
                            "name": f"{prefix}-{p:04d}.png",
                            "label": int(labels[p]),
                            "evaluations": 1,
                        }
                        if p in bad:
                            row |= {"status": "unreadable", "message": "cannot identify image file"}
                        elif broken and 10 <= p < 14:
                            row |= {"status": "error", "message": "RuntimeError: out of memory"}
                        elif broken and p == 14:
                            row |= {"status": "invalid", "message": "norm 0.9 is over eps"}
                        else:
                            wrong = int(labels[p] + 1) % count
                            prediction = int(labels[p]) if right[p] else wrong
                            row |= {
                                "status": "ok" if right[p] else "misclassified",
                                "clean_prediction": prediction,
                                "adversarial_prediction": wrong if fooled else prediction,
                                "success": fooled if right[p] else None,
                            }
                        if row["status"] == "ok":
                            length = float(distance if minimal else radius)
                            cosine = rng.normal() * (1e-9 if orthogonal else 0.08)
                            row |= {
                                "margin": 1.0 if fooled else -1.0,
                                "l0": size * size,
                                "l1": length * 100,
                                "l2": length * 10,
                                "linf": length,
                                "cosine": float(np.clip(cosine, -1, 1)),
                                "steps": steps,
                                "forward_calls": float(steps + 1),
                                "gradient_calls": 1.0 if "FGSM" in label else float(steps) * (5 if minimal else 1),
                                "rounded_success": bool(rng.random() < 0.9) if fooled else None,
                                "seconds": 0.01,
                            }
                            if p in keep:
                                clean = picture(p, size)
                                sign = (noise(1000 + 10 * p + order, size) - noise(2000 + p, size)).sign()
                                images[p] = (clean + length * sign).clamp(0, 1)
                        for name, value in row.items():
                            rows[name].append(value)
                    folder.write(Shard(model, label, radius, start // chunk), rows, images)
    return folder


def _clean(folder, model, number, positions, labels, right, bad, rng, count, keep, size, picture, prefix):
    rows: dict[str, list[Any]] = {name: [] for name in CLEAN_SCHEMA.names}
    for p in positions:
        row: dict[str, Any] = dict.fromkeys(CLEAN_SCHEMA.names)
        row |= {"position": p, "name": f"{prefix}-{p:04d}.png", "label": int(labels[p]), "evaluations": 1}
        if p in bad:
            row |= {"status": "unreadable", "message": "cannot identify image file"}
        else:
            row |= {
                "status": "ok",
                "prediction": int(labels[p] if right[p] else (labels[p] + 1) % count),
                "margin": -1.0 if right[p] else 1.0,
                "confidence": float(rng.uniform(0.3, 1)),
                "gradient_cosine": float(np.clip(0.1 * rng.normal(), -1, 1)),
                "gradient_norm": 1.0,
                "wrong_share": 0.0 if right[p] else 1.0,
            }
        for name, value in row.items():
            rows[name].append(value)
    images = {p: picture(p, size) for p in keep if p not in bad}
    folder.write(Shard(model, "clean", None, number, "clean"), rows, images)

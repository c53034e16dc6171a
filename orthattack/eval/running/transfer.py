"""Transfer: the adversarial images that a run has kept of each model, judged by other models."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import interpolate
from tqdm import tqdm

from orthattack.eval.attacks.seeds import drawing
from orthattack.eval.data.dataset import ImageDataset
from orthattack.eval.data.readers import Dataset
from orthattack.eval.errors import EvaluationError, printable
from orthattack.eval.models.classifier import Classifier
from orthattack.eval.results.stored_run import TARGETS, Run
from orthattack.eval.running.chunk import Job, Part
from orthattack.eval.storage.run_folder import Shard
from orthattack.threat import Norm


def check_transfer(run: Run) -> None:
    """EvaluationError: the run is not complete, or has kept no adversarial images."""
    if run.status != "complete":
        raise EvaluationError(f"{run.folder} is {run.status}: complete it first, with the command that began it")
    if not any(run.folder.image_positions(model, "clean", None) for model in run.models):
        raise EvaluationError(
            f'{run.folder} has kept no images: run it again with save_images = "all" (--save-images all)'
        )


def judge(
    run: Run,
    label: str,
    target: Classifier,
    device: torch.device,
    say: Callable[[str], None] = lambda _: None,
    progress: bool = True,
) -> None:
    """Have a model, `target`, judge the adversarial images of a complete run's other models, and store that, chunk by
    chunk: what is there is not judged again.

    `label` is what the results call it; one of the run's own must be the same model. Images of another size than its
    input are resized to it, bilinearly, clean ones too. EvaluationError: it has other classes than a source, or is not
    the model that had its label before."""
    sources = [source for source in run.models if source != label]
    for source in sources:
        _check_classes(run, source, label, target)
    _register(run, label, target)
    config = run.manifest["config"]
    size, batch_size = int(config.get("shard_size", 128)), int(config.get("batch_size", 32))
    often = 0.1 if sys.stderr.isatty() else 30.0  # a log file is no place for an animation
    for source in sources:
        positions = sorted(run.folder.image_positions(source, "clean", None))
        who = printable(f"{source} -> {label}")
        with (
            drawing(0),
            tqdm(desc=who, total=len(positions), unit="img", mininterval=often, disable=not progress) as bar,
        ):
            job = Job(label, target, _dataset(run, source), device, run.folder, batch_size, say)
            for number, chunk in groupby(positions, lambda position: position // size):
                own = list(chunk)
                _judge_chunk(run, source, job, number, own)
                bar.update(len(own))


def _judge_chunk(run: Run, source: str, job: Job, number: int, positions: list[int]) -> None:
    todo = [
        (attack, Shard(job.label, attack, eps, number, "transfer", source), norm)
        for attack, eps, norm in _attacks(run)
        if not run.folder.is_done(Shard(job.label, attack, eps, number, "transfer", source), len(positions))
    ]
    if not todo:
        return
    size = job.classifier.preprocessing.crop

    def stored(attack: str, eps: float | None) -> dict[int, Tensor]:
        return {k: _resized(image, size) for k, image in sorted(run.folder.images(source, attack, eps, positions))}

    part = Part(job, number, stored("clean", None), frozenset(), "transfer")
    part.look()
    for attack, shard, norm in todo:
        # The ball is that of the source's images, which have been judged; a resized one has another norm.
        part.transfer(shard, norm, None, stored(attack, shard.eps))


def _attacks(run: Run) -> Iterator[tuple[str, float | None, Norm]]:
    """Every attack of a run at every radius, with its norm."""
    for view in (run, *map(run.in_norm, run.other_norms)):
        for attack in view.attacks:
            for eps in view.radii_of(attack):
                yield attack, eps, cast("Norm", view.norm)


def _resized(image: Tensor, size: int) -> Tensor:
    if image.shape[-2:] == (size, size):
        return image
    smooth = interpolate(image[None], size=(size, size), mode="bilinear", antialias=True, align_corners=False)
    return smooth[0].clamp(0, 1)


def _dataset(run: Run, source: str) -> ImageDataset:
    """Names and labels of a source's images; the images come from the run's folder."""
    names, labels = [""] * run.images(source), [-1] * run.images(source)
    rows = run.clean(source, ["position", "name", "label"])
    for position, name, label in rows.itertuples(index=False, name=None):
        names[position], labels[position] = str(name), int(label)
    return ImageDataset(
        str(run.folder), tuple(names), tuple(labels), None, "as the run has them", Dataset([], "", True), ()
    )


def _check_classes(run: Run, source: str, label: str, target: Classifier) -> None:
    about = run.models[source]
    names, count = about.get("class_names"), int(about.get("num_classes") or 0)
    if target.num_classes != count:
        raise EvaluationError(
            f"{label} has {target.num_classes} classes and {source} {count}: it cannot judge its images"
        )
    if names and target.classes and list(target.classes) != list(names):
        k = next(k for k, (own, theirs) in enumerate(zip(target.classes, names, strict=True)) if own != theirs)
        raise EvaluationError(
            f"{label} has other classes than {source}: class {k} is {target.classes[k]!r} and {names[k]!r}"
        )


def _register(run: Run, label: str, target: Classifier) -> None:
    """Note which model judges, unless it has begun to; EvaluationError: it was another."""
    about, known = target.describe(), run.judges()
    before: Mapping[str, object] | None = run.models.get(label) or known.get(label)
    if before is not None and before.get("sha256") != about["sha256"]:
        raise EvaluationError(
            f"{label} is not the model that has this name in {run.folder}: its weights differ; give it another label"
        )
    if label not in known:
        entry = {"label": label, **{key: about[key] for key in ("name", "source", "sha256", "num_classes")}}
        run.folder.write_text(TARGETS, json.dumps([*known.values(), entry], indent=1) + "\n")

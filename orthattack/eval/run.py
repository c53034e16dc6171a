"""The evaluation itself: every attack on every model over every photograph, measured on what the attacks return."""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import Tensor
from tqdm import tqdm

from orthattack.eval.attacks import ATTACKS, CallCounter, Runner, Settings
from orthattack.eval.data import Batch, Photographs, Unreadable
from orthattack.eval.metrics import DEFINITIONS, Rate, attack_success_rate, clean_accuracy, robust_accuracy
from orthattack.eval.models import Classifier
from orthattack.projection import alignment
from orthattack.threat import perturbation_norm

__all__ = ["Evaluation", "Example", "Result", "evaluate"]

EXAMPLES = 8


@dataclass
class Result:
    """One attack on one model: per image, in order, what was measured; all of it from the returned images.

    Attributes:
        model: name of the model.
        attack: name of the attack.
        names: the photographs.
        labels: their classes.
        clean: predictions on the clean images.
        adversarial: predictions on the adversarial images, by the model in its own precision.
        norm: norms of the perturbations in the evaluation's norm, computed in float64.
        cosine: |cos(perturbation, image)|, computed in float64.
        forward_calls: evaluations of the model, samples counted singly.
        gradient_calls: differentiations, counted likewise.
        seconds: the attack's own time.
        errors: messages of batches the attack failed on; their images are in none of the above.
        unscored: how many images those are.
    """

    model: str
    attack: str
    names: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    clean: list[int] = field(default_factory=list)
    adversarial: list[int] = field(default_factory=list)
    norm: list[float] = field(default_factory=list)
    cosine: list[float] = field(default_factory=list)
    forward_calls: int = 0
    gradient_calls: int = 0
    seconds: float = 0.0
    errors: list[str] = field(default_factory=list)
    unscored: int = 0

    @property
    def clean_accuracy(self) -> Rate:
        return clean_accuracy(self._right(self.clean))

    @property
    def robust_accuracy(self) -> Rate:
        return robust_accuracy(self._right(self.clean), self._right(self.adversarial))

    @property
    def success_rate(self) -> Rate:
        return attack_success_rate(self._right(self.clean), self._right(self.adversarial))

    def _right(self, predictions: list[int]) -> Tensor:
        return torch.tensor(predictions) == torch.tensor(self.labels)

    def summary(self) -> dict[str, Any]:
        """The row of the table, as JSON."""
        n = len(self.names)

        def mean(values: list[float]) -> float | None:
            return sum(values) / n if n else None

        return {
            "model": self.model,
            "attack": self.attack,
            "images": n,
            "clean_accuracy": self.clean_accuracy.value,
            "robust_accuracy": self.robust_accuracy.value,
            "robust_accuracy_interval": self.robust_accuracy.interval(),
            "attack_success_rate": self.success_rate.value,
            "attack_success_interval": self.success_rate.interval(),
            "mean_norm": mean(self.norm),
            "max_norm": max(self.norm, default=None),
            "mean_abs_cosine": mean(self.cosine),
            "max_abs_cosine": max(self.cosine, default=None),
            "forward_calls_per_image": self.forward_calls / n if n else None,
            "gradient_calls_per_image": self.gradient_calls / n if n else None,
            "seconds": self.seconds,
            "unscored": self.unscored,
            "errors": self.errors,
        }


@dataclass(frozen=True)
class Example:
    """A photograph before and after an attack, for the picture. Images (3, H, W)."""

    model: str
    attack: str
    clean: Tensor
    adversarial: Tensor
    label: str
    clean_prediction: str
    adversarial_prediction: str


@dataclass
class Evaluation:
    """All results of a run."""

    settings: Settings
    data: str
    models: list[dict[str, Any]] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    examples: list[Example] = field(default_factory=list)
    unreadable: dict[str, str] = field(default_factory=dict)
    complete: bool = False

    def as_json(self) -> dict[str, Any]:
        return {
            "orthattack": version("orthattack"),
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "command": sys.argv,
            "complete": self.complete,
            "settings": asdict(self.settings),
            "data": self.data,
            "unreadable": self.unreadable,
            "definitions": DEFINITIONS,
            "models": self.models,
            "environment": {
                "python": platform.python_version(),
                "platform": platform.platform(),
                **{name: version(name) for name in ("torch", "torchvision", "foolbox", "numpy")},
            },
            "results": [result.summary() for result in self.results],
        }


def evaluate(
    classifiers: Iterable[tuple[Classifier, Photographs]],
    attacks: list[str],
    settings: Settings,
    *,
    out: Path,
    batch_size: int = 32,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> Evaluation:
    """Run every attack on every classifier and measure what it returns.

    Args:
        classifiers: models with their photographs.
        attacks: keys of `ATTACKS`.
        settings: eps, norm, steps and seed for all of them.
        out: an existing folder. images.jsonl gets a line per image and attack as soon as it is measured, so a run
            that is stopped loses nothing that was finished; results.json the settings, when a model's turn begins, and
            the summary, at the end or when interrupted.
        batch_size: images per batch.
        device: where to run.
        progress: show a progress bar on standard error.

    Returns:
        The results; `complete` is false if the run was interrupted from the keyboard.
    """
    evaluation = Evaluation(settings, "")
    with (out / "images.jsonl").open("x", encoding="utf-8") as log:
        try:
            for classifier, photographs in classifiers:
                evaluation.data = photographs.name
                _evaluate_model(evaluation, classifier, photographs, attacks, out, log, batch_size, device, progress)
            evaluation.complete = True
        except KeyboardInterrupt:
            pass
    _write(evaluation, out)
    return evaluation


def _write(evaluation: Evaluation, out: Path) -> None:
    temporary = out / "results.json.partial"
    temporary.write_text(json.dumps(evaluation.as_json(), indent=2) + "\n", encoding="utf-8")
    temporary.replace(out / "results.json")


def _evaluate_model(
    evaluation: Evaluation,
    classifier: Classifier,
    photographs: Photographs,
    attacks: list[str],
    out: Path,
    log: TextIO,
    batch_size: int,
    device: torch.device | str,
    progress: bool,
) -> None:
    model, preprocessing = classifier.model.to(device), classifier.preprocessing
    counters = {name: CallCounter(model).eval() for name in attacks}
    runners = {name: ATTACKS[name](counters[name], evaluation.settings) for name in attacks}
    results = {name: Result(classifier.name, name) for name in attacks}
    evaluation.results.extend(results.values())
    evaluation.models.append(
        {
            "name": classifier.name,
            "weights": classifier.source,
            "classes": classifier.num_classes,
            "preprocessing": {**asdict(preprocessing), "interpolation": preprocessing.interpolation.value},
        }
    )
    _write(evaluation, out)  # so that a run that is killed tells what its images.jsonl was measured with
    shown = "OrthoPGD" if "OrthoPGD" in attacks else attacks[-1]
    examples = _Examples(classifier.name, shown, classifier.classes or photographs.classes)
    total = len(photographs) * len(attacks)
    often = 0.1 if sys.stderr.isatty() else 30.0  # a log file is no place for an animation
    with tqdm(
        total=total, desc=classifier.name, unit="img", disable=not progress, leave=False, mininterval=often
    ) as bar:
        try:
            for batch in photographs.batches(batch_size, preprocessing):
                if isinstance(batch, Unreadable):
                    evaluation.unreadable[batch.name] = batch.reason
                    bar.update(len(attacks))
                    continue
                images, labels = batch.images.to(device), batch.labels.to(device)
                clean = _predict(model, images)
                for name in attacks:
                    result = results[name]
                    adversarials = _attack(runners[name], images, labels, counters[name], result)
                    if adversarials is not None:
                        _measure(
                            result, batch, images, adversarials, clean, _predict(model, adversarials), evaluation, log
                        )
                        if name == shown:
                            examples.offer(batch, images, adversarials, result)
                        accuracy = result.robust_accuracy.value or 0.0
                        bar.set_postfix_str(f"{name}: robust accuracy {100 * accuracy:.1f} %", refresh=False)
                    bar.update(len(labels))
        finally:
            evaluation.examples.extend(examples.chosen())


def _predict(model: torch.nn.Module, images: Tensor) -> Tensor:
    with torch.inference_mode():
        predictions: Tensor = model(images).argmax(1).cpu()
    return predictions


def _attack(runner: Runner, images: Tensor, labels: Tensor, counter: CallCounter, result: Result) -> Tensor | None:
    """The adversarial images, or None, with the reason in `result`, if the attack failed or returned something else."""
    before = counter.forward_calls, counter.gradient_calls
    start = _now(images)
    try:
        adversarials = runner(images, labels)
        problem = _problem(adversarials, images)
    except Exception as error:  # whatever a model or a foreign attack may raise: the other attacks go on
        problem = f"{type(error).__name__}: {error}"
    if problem is not None:
        result.unscored += len(images)
        if problem not in result.errors:
            result.errors.append(problem)
        return None
    result.seconds += _now(images) - start
    result.forward_calls += counter.forward_calls - before[0]
    result.gradient_calls += counter.gradient_calls - before[1]
    return adversarials


def _now(images: Tensor) -> float:
    if images.is_cuda:
        torch.cuda.synchronize(images.device)
    return time.perf_counter()


def _problem(adversarials: Tensor, images: Tensor) -> str | None:
    if adversarials.shape != images.shape or adversarials.dtype != images.dtype:
        return (
            f"returned {tuple(adversarials.shape)} of {adversarials.dtype} for {tuple(images.shape)} of {images.dtype}"
        )
    if not bool(adversarials.isfinite().all()) or float(adversarials.min()) < 0 or float(adversarials.max()) > 1:
        return "returned images outside [0, 1]"
    return None


def _measure(
    result: Result,
    batch: Batch,
    images: Tensor,
    adversarials: Tensor,
    clean: Tensor,
    predictions: Tensor,
    evaluation: Evaluation,
    log: TextIO,
) -> None:
    """Add a batch to `result` and, a line per image, to the log."""
    delta = adversarials.double() - images.double()
    columns = {
        "name": batch.names,
        "label": batch.labels.tolist(),
        "clean_prediction": clean.tolist(),
        "adversarial_prediction": predictions.tolist(),
        "norm": perturbation_norm(delta, evaluation.settings.norm).tolist(),
        "abs_cosine": alignment(delta, images.double()).abs().tolist(),
    }
    result.names += columns["name"]
    result.labels += columns["label"]
    result.clean += columns["clean_prediction"]
    result.adversarial += columns["adversarial_prediction"]
    result.norm += columns["norm"]
    result.cosine += columns["abs_cosine"]
    for values in zip(*columns.values(), strict=True):
        row = {"model": result.model, "attack": result.attack, **dict(zip(columns, values, strict=True))}
        log.write(json.dumps(row) + "\n")
    log.flush()


class _Examples:
    """A few photographs of one attack: newly fooled ones first, of as many classes as there are."""

    def __init__(self, model: str, attack: str, classes: tuple[str, ...] | None) -> None:
        self._model, self._attack, self._classes = model, attack, classes
        self._fooled: dict[int, Example] = {}  # one per class
        self._more: list[Example] = []
        self._others: list[Example] = []

    def offer(self, batch: Batch, images: Tensor, adversarials: Tensor, result: Result) -> None:
        first = len(result.names) - len(batch.names)
        for k in range(len(batch.names)):
            label, clean, adversarial = (v[first + k] for v in (result.labels, result.clean, result.adversarial))
            names = (self._name(index) for index in (label, clean, adversarial))
            is_fooled = clean == label and adversarial != label
            if is_fooled and label not in self._fooled and len(self._fooled) < EXAMPLES:
                self._fooled[label] = Example(self._model, self._attack, images[k].cpu(), adversarials[k].cpu(), *names)
            elif len(group := self._more if is_fooled else self._others) < EXAMPLES:
                group.append(Example(self._model, self._attack, images[k].cpu(), adversarials[k].cpu(), *names))

    def chosen(self) -> list[Example]:
        return [*self._fooled.values(), *self._more, *self._others][:EXAMPLES]

    def _name(self, index: int) -> str:
        return str(index) if self._classes is None else self._classes[index]

"""The evaluation from Python: `evaluate` with names or with objects that are at hand, and suites read from files."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orthattack.attacks.base import Attack
from orthattack.attacks.bisection import Bisection
from orthattack.eval.attacks.kind import AttackKind, described
from orthattack.eval.attacks.load import attack_kind
from orthattack.eval.attacks.seeds import drawing
from orthattack.eval.attacks.user import user_attack
from orthattack.eval.data.dataset import ImageDataset, Unreadable
from orthattack.eval.data.load import load_dataset
from orthattack.eval.errors import EvaluationError, say
from orthattack.eval.models.classifier import Classifier, checked
from orthattack.eval.models.load import load_classifier
from orthattack.eval.report.text import reported, reported_once
from orthattack.eval.results.stored_run import Run
from orthattack.eval.running.detector import DetectorMaker
from orthattack.eval.running.run import run_suite, suite_inputs
from orthattack.eval.running.transfer import check_transfer, judge
from orthattack.eval.running.worker import OnStep
from orthattack.eval.storage.run_folder import RunFolder
from orthattack.eval.suite import AttackSpec, ModelSpec, is_json, make_suite


def evaluate(
    models: str | Sequence[str | Mapping[str, Any] | Classifier] | Mapping[str, Classifier],
    data: str | Mapping[str, Any] | ImageDataset,
    attacks: Sequence[str | Mapping[str, Any]]
    | Mapping[str, str | Mapping[str, Any] | Callable[..., Any]]
    | None = None,
    *,
    out: Path | str | None = None,
    device: torch.device | str = "cpu",
    shard: tuple[int, int] | None = None,
    progress: bool = True,
    report: bool = True,
    on_step: OnStep | None = None,
    detector: DetectorMaker | str | None = None,
    **options: Any,
) -> Run:
    """Run attacks on models and measure what they return: `orthattack eval` as a function.

    Args:
        models: names (see `load_classifier`), tables as in a suite (``{"name": "resnet18", "weights": "my.pt"}``), or
            `Classifier` objects, whose models are evaluated in evaluation mode and come back as they were; a mapping
            gives them labels.
        data: a source by name, a table as in a suite, or `ImageDataset`.
        attacks: names, tables as in a suite (``{"name": "PGD", "steps": 50}``), in which options may also be tensors
            and functions (``directions``, ``normal``, ``loss``, and ``detector`` of ``DetectorEvasion``), or, in a
            mapping from labels, also functions: ``attack(model)(images, labels)`` returns adversarial images. What a
            function draws at random is seeded for each batch.
        out: the run's folder, or its URL in a store that fsspec knows; the same call resumes it. By
            default a new one under ``runs/``.
        device: where to compute.
        shard: (i, n), 1 <= i <= n: do every n-th unit of work from the i-th on, while other processes do the others
            with the same `out`. The last one writes the report.
        progress: show a bar on standard error, where what a person should know at once is written in any case.
        report: write the report at the end.
        on_step: a function of (model, attack, eps, step), labels, a radius, or None of what minimises, and an
            `orthattack.attacks.ScoredStep`: it is told of each batch of points that an attack of this package, or a
            function that takes ``on_step``, has scored. `orthattack.eval.tensorboard.TensorBoard` is one.
        detector: makes of a model a detector, a function of images (N, 3, H, W) to scores (N,), larger is more
            suspicious; or its name, ``package.module:function``. `Run.detection` has how many images evade it, at
            ``false_positive_rates`` on the clean ones.
        **options: `eps` (a radius or several, in pixel units), `norm`, `steps`, `seeds`, `batch_size`, `shard_size`,
            `save_images`, `attack_misclassified`, `early_stop` (by default not with `on_step`), `checks`,
            `check_images`, `targets`, `queries`: see `orthattack.eval.suite.Suite`.

    Returns:
        The run, complete or, if it was interrupted from the keyboard, not.

    Raises:
        EvaluationError: something to fix; the message says what.
    """
    classifiers, listed = _models(models)
    wanted = attacks.items() if isinstance(attacks, Mapping) else [(None, attack) for attack in attacks or ()]
    at_hand, tables = _attacks(wanted)
    dataset = data if isinstance(data, ImageDataset) else None
    maker = None if isinstance(detector, str) else detector
    if detector is not None:
        options["detector"] = detector if maker is None else f"function:{described(maker, with_source=True)}"
    if on_step is not None:  # which is told of all steps, unless that is not wanted
        options.setdefault("early_stop", False)
    content: dict[str, Any] = {"models": listed, "data": {"source": dataset.name} if dataset else data, **options}
    suite = make_suite(content if attacks is None else {**content, "attacks": tables}, "evaluate")
    kinds = {spec.label: _kind(spec, at_hand.get(spec.label, {})) for spec in suite.attacks}
    inputs = suite_inputs(suite, kinds, classifiers, dataset, maker)
    if shard is not None and out is None:
        raise EvaluationError("shard needs out, the folder that all shards share")
    folder = run_folder(out, say=say)
    how: dict[str, Any] = {"device": device, "share": shard, "progress": progress, "on_step": on_step}
    with _kept_modes(classifiers):
        run_suite(suite, inputs, folder, command=sys.argv, say=say, **how)
    manifest = folder.manifest()
    if report and (shard is None or manifest["status"] == "complete"):
        return reported_once(folder)
    return Run(folder, manifest)


def load(
    model: str | Classifier,
    data: str | ImageDataset,
    limit: int | None = None,
    *,
    device: torch.device | str = "cpu",
) -> tuple[nn.Module, Tensor, Tensor]:
    """A model with images and their labels, to attack at once: what a script or a notebook begins with.

    Args:
        model: a name (see `load_classifier`), or a `Classifier`.
        data: a source by name (see `load_dataset`), or an `ImageDataset`. All of it is held in memory.
        limit: at most this many images, evenly spaced.
        device: where to put all three.

    Returns:
        The model, in evaluation mode, which takes images in [0, 1]; images (B, C, H, W), resized and cropped as the
        model expects; labels (B,) as int64.

    Raises:
        EvaluationError: something to fix, such as an image that cannot be read; the message says what.

    >>> from orthattack.eval import load
    >>> model, images, labels = load("cifar10-robust", "cifar10-samples")
    >>> tuple(images.shape), tuple(labels.shape)
    ((20, 3, 32, 32), (20,))
    """
    classifier = model if isinstance(model, Classifier) else load_classifier(model)
    dataset = (data if isinstance(data, ImageDataset) else load_dataset(data, classifier)).limited(limit)
    for batch in dataset.batches(len(dataset), classifier.preprocessing):
        if isinstance(batch, Unreadable):
            raise EvaluationError(f"{batch}; take it out, or use evaluate(), which leaves such images out and says so")
        module = classifier.model.eval().to(device)
        return module, batch.images.to(device), batch.labels.to(device)
    raise EvaluationError(f"no images in {dataset.name}")


def transfer(
    run: Path | str,
    models: str | Sequence[str | Mapping[str, Any] | Classifier] | Mapping[str, Classifier] | None = None,
    *,
    device: torch.device | str = "cpu",
    progress: bool = True,
    report: bool = True,
) -> Run:
    """Have models judge the adversarial images that a complete run has kept: `orthattack transfer` as a function.

    Args:
        run: the run's folder, or its URL; made with ``save_images="all"``, or it is of the few that it has kept. What
            has been judged before is not judged again.
        models: the targets, as for `evaluate`; the label of one of the run's models is that model. By default all of
            the run's.
        device: where to compute.
        progress: show a bar on standard error.
        report: write the report again, with the matrix of sources and targets.

    Returns:
        The run, whose `Run.transfer` has the rates with intervals.

    Raises:
        EvaluationError: something to fix; the message says what.
    """
    found = Run.open(run)
    check_transfer(found)
    classifiers, listed = _models([*found.models] if models is None else models)
    own = {spec["label"]: spec for spec in found.manifest["config"].get("models", ())}
    with _kept_modes(classifiers):
        for entry in listed:
            spec = ModelSpec.model_validate(own.get(entry, entry) if isinstance(entry, str) else entry)
            with drawing(0):  # making a model draws its initial weights
                target = classifiers.get(spec.label) or load_classifier(spec.name, spec.weights, spec.image_size)
            judge(found, spec.label, checked(target), torch.device(device), say, progress)
    return reported(RunFolder(run)) if report else Run.open(run)


@contextmanager
def _kept_modes(classifiers: Mapping[str, Classifier]) -> Iterator[None]:
    """Put models back into training or evaluation mode, as they came."""
    modes = [(module, module.training) for model in classifiers.values() for module in model.model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def _models(models: Any) -> tuple[dict[str, Classifier], list[Any]]:
    """Those at hand, by label, and all as a suite has them."""
    if isinstance(models, str | Classifier | nn.Module):
        models = [models]
    classifiers: dict[str, Classifier] = {}
    listed: list[Any] = []
    for label, model in models.items() if isinstance(models, Mapping) else [(None, model) for model in models]:
        if isinstance(model, Classifier):
            classifiers[label or model.name] = model
            listed.append({"name": model.name, "label": label or model.name})
        elif isinstance(model, nn.Module):
            raise EvaluationError(
                "a model at hand must be an orthattack.eval.models.Classifier, which says what its input is: "
                "Classifier('mine', model, Preprocessing(resize=256, crop=224)), the default one"
            )
        else:
            listed.append(_labelled(label, model))
    return classifiers, listed


def _attacks(wanted: Iterable[tuple[str | None, Any]]) -> tuple[dict[str, Any], list[Any]]:
    """By label the functions, and the options that a manifest can only describe; and all as a suite has them."""
    at_hand: dict[str, Any] = {}
    tables: list[Any] = []
    for label, attack in wanted:
        if isinstance(attack, Attack | Bisection):
            raise EvaluationError(
                f"{type(attack).__name__} is bound to a model already; name it, or give a function that makes it for a "
                'model: attacks={"mine": lambda model, eps, steps: OrthoPGD(model, eps=eps, steps=steps)}'
            )
        if callable(attack):
            if label is None:
                raise EvaluationError('a function needs a label: attacks={"mine": function}')
            at_hand[label] = attack
            name = getattr(attack, "__qualname__", type(attack).__name__)
            tables.append({"name": f"function:{name}", "label": label})
            continue
        table = _labelled(label, attack)
        if isinstance(table, Mapping):
            own = {key for key, value in table.items() if key not in AttackSpec.model_fields and not is_json(value)}
            at_hand[str(table.get("label", table.get("name")))] = {key: table[key] for key in own}
            table = {key: described(value) if key in own else value for key, value in table.items()}
        tables.append(table)
    return at_hand, tables


def run_folder(
    out: Path | str | None, name: str | None = None, say: Callable[[str], None] = lambda _: None
) -> RunFolder:
    """The folder of a run: the one asked for, the one of a suite's name, or a new one that says when."""
    if out is not None:
        return RunFolder(out, say)
    if name is not None:
        return RunFolder(Path("runs") / name, say)
    path = Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")
    while path.exists():  # another run has started in the same second
        path = path.with_name(path.name + "-2")
    return RunFolder(path, say)


def _kind(spec: AttackSpec, own: Any) -> AttackKind:
    """An attack of the suite, with a function, or options, that were at hand."""
    if isinstance(own, dict):
        return attack_kind(spec.name, spec.parameters | own)
    return user_attack(spec.name, own, spec.parameters)


def _labelled(label: str | None, value: Any) -> Any:
    if label is None:
        return value
    return {"name": value, "label": label} if isinstance(value, str) else {**value, "label": label}

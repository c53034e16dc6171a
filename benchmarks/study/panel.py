"""What the study looks at: groups of models that share images, and how much of everything is measured."""

from __future__ import annotations

import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from orthattack.eval import evaluate
from orthattack.eval.data.dataset import ImageDataset, evenly
from orthattack.eval.data.load import load_dataset
from orthattack.eval.errors import EvaluationError
from orthattack.eval.models.classifier import Classifier
from orthattack.eval.models.load import load_classifier
from orthattack.eval.models.preprocessing import IMAGENET_MEAN, IMAGENET_STD
from orthattack.eval.results.stored_run import Run

__all__ = ["Budget", "Group", "Study", "own_study", "shared_study"]


@dataclass(frozen=True)
class Group:
    """Models that are shown the same images.

    Attributes:
        key: what the results call it.
        title: what the page calls it.
        models: by label, what `load_classifier` takes: name, weights, image_size.
        data: a source for `load_dataset`; or a tar of SPLIT/CLASS/NAME.jpg, which is unpacked when it is needed.
        eps: the L-infinity radius wherever there is only one.
        images: by stage, how many images, evenly spaced; a stage that is not named is left out.
        linf, l2: the radii of the stage "cost".
        labels: a CSV file with the images' classes, where their folders do not say them.
        resize: the shorter side that images get before they are cropped, where the models' own sides differ.
        batch: how many images at once.
        trials: radii that the bisection of the stage "smallest" tries, `eps` first.
    """

    key: str
    title: str
    models: Mapping[str, Mapping[str, Any]]
    data: str
    eps: float
    images: Mapping[str, int]
    linf: tuple[float, ...] = ()
    l2: tuple[float, ...] = ()
    labels: str | None = None
    resize: int | None = None
    batch: int = 50
    trials: int = 12


@dataclass(frozen=True)
class Budget:
    """How much of what the groups do not say.

    Attributes:
        tuned: images on which the fine-tuned models are tested.
        steps: of the attacks.
        scratch_epochs: of the small networks that are trained from scratch.
        train_images: how many they see per epoch, and fine-tuning draws from.
        seeds: training runs of each kind.
        tuning_steps: of fine-tuning, each on `tuning_batch` images with `tuning_attack_steps` of the attack.
    """

    tuned: int = 100
    steps: int = 10
    scratch_epochs: int = 4
    train_images: int = 10_000
    seeds: int = 3
    tuning_steps: int = 40
    tuning_batch: int = 64
    tuning_attack_steps: int = 2


QUICK = Budget(8, 2, 1, 320, 2, 2, 16, 1)


SMALL_IMAGES = {
    "gradients": 400,
    "slopes": 400,
    "contrast": 200,
    "sensitivity": 32,
    "depth": 400,
    "cost": 200,
    "smallest": 32,
    "likeness": 64,
    "transfer": 64,
}
IMAGENET_IMAGES = {
    "gradients": 60,
    "slopes": 195,
    "contrast": 15,
    "sensitivity": 15,
    "depth": 15,
    "cost": 12,
    "smallest": 12,
    "likeness": 8,
}


@dataclass(frozen=True)
class Study:
    """All of it. `train` is the CIFAR-10 training set of the stages that train; without it they are left out."""

    groups: tuple[Group, ...]
    budget: Budget
    work: Path
    train: Path | None = None

    def settings(self) -> dict[str, Any]:
        """What two studies must share for one to go on with the other's results, as JSON without paths."""
        groups = [
            {key: value for key, value in asdict(group).items() if key not in ("data", "labels", "models")}
            | {"models": {label: spec["name"] for label, spec in group.models.items()}}
            for group in self.groups
        ]
        return {"groups": groups, "budget": asdict(self.budget), "trains": self.train is not None}

    def check(self, stages: Iterable[str]) -> None:
        """Raise EvaluationError, before anything is computed, for what a later one of these stages would fail at."""
        if find_spec("piq") is None and any(name.startswith("likeness") for name in stages):
            raise EvaluationError("the study measures how alike images look with piq: pip install 'orthattack[study]'")
        for group in self.groups:
            shapes = {
                label: replace(classifier.preprocessing, mean=IMAGENET_MEAN, std=IMAGENET_STD)
                for label, classifier in self.classifiers(group).items()
            }
            if len(set(shapes.values())) > 1:
                raise EvaluationError(
                    "models are compared on the same pixels, but these prepare images differently: "
                    + "; ".join(f"{label}: {shape.describe()}" for label, shape in shapes.items())
                    + ". Give the study one of them at a time, or --image-size"
                )
            self.dataset(group, next(iter(self.classifiers(group).values())), 1)

    def classifiers(self, group: Group) -> dict[str, Classifier]:
        """The group's models by label."""
        found = {label: load_classifier(**spec) for label, spec in group.models.items()}
        if group.resize is None:
            return found
        return {
            label: replace(model, preprocessing=replace(model.preprocessing, resize=group.resize))
            for label, model in found.items()
        }

    def source(self, group: Group) -> str:
        """The group's images as a source."""
        return str(unpacked(Path(group.data), self.work)) if group.data.endswith(".tar") else group.data

    def dataset(self, group: Group, classifier: Classifier, count: int) -> ImageDataset:
        """At most `count` of the group's images, evenly spaced."""
        labels = None if group.labels is None else Path(group.labels)
        return load_dataset(self.source(group), classifier, labels).limited(count)

    def attack(
        self,
        name: str,
        group: Group,
        attacks: Sequence[Mapping[str, Any]] | Mapping[str, Callable[..., Any]],
        count: int,
        models: Mapping[str, Classifier] | None = None,
        keep_images: bool = False,
        **options: Any,
    ) -> Run:
        """A run of the evaluation on the group, kept in the work folder; if it is there, whole or not, it goes on."""
        run = evaluate(
            dict(models or self.classifiers(group)),
            {"source": self.source(group), "limit": count, **({"labels": group.labels} if group.labels else {})},
            attacks,
            out=self.work / "runs" / name,
            report=False,
            progress=False,
            early_stop=False,
            checks=False,
            steps=self.budget.steps,
            batch_size=max(1, group.batch // 3),  # an attack keeps several of what a gradient does
            save_images="all" if keep_images else "none",
            **options,
        )
        if run.status != "complete":
            raise KeyboardInterrupt
        return run


def shared_study(shared: Path, work: Path, quick: bool) -> Study:
    """The study of docs/study.md: networks for ImageNet, and two pairs of small ones, a standard and a robust one each.

    Raises:
        EvaluationError: the data and weights are not there.
    """
    data, weights = shared / "data", shared / "weights"
    tiny, cifar, photographs = data / "tiny-imagenet-20" / "val", data / "cifar10", data / "imagenet-sample"
    fitted = {kind: weights / f"resnet18-tiny20-{kind}.safetensors" for kind in ("standard", "robust-linf-4")}
    for path in (tiny, cifar / "test.tar", cifar / "train.tar", photographs / "labels.csv", *fitted.values()):
        if not path.exists():
            raise EvaluationError(
                f"{path} is missing: the study needs the shared data beside the checkout (or ORTHATTACK_SHARED), "
                "or your own --model and --data"
            )
    radii, lite = tuple(k / 255 for k in (0.5, 1, 2, 4, 8)), ("lite0", "lite1", "lite2")
    networks = {label: {"name": f"efficientnet-{label}", "image_size": 224} for label in lite}
    groups: tuple[Group, ...] = (
        Group(
            "imagenet",
            "EfficientNet-lite, ImageNet, 224×224",
            networks,
            str(photographs),
            0.25 / 255,
            IMAGENET_IMAGES,
            tuple(k / 255 for k in (0.0625, 0.125, 0.25)),
            (0.15,),
            labels=str(photographs / "labels.csv"),
            resize=256,
            batch=15,
            trials=6,
        ),
        Group(
            "samples",
            "the same on Foolbox's ImageNet samples",
            {f"{label}, Foolbox's images": spec for label, spec in networks.items()},
            "imagenet-samples",
            0.25 / 255,
            {"slopes": 20},
            resize=256,
            batch=10,
        ),
        Group(
            "tiny",
            "ResNet-18, 20 classes of Tiny ImageNet, 64×64",
            {
                f"tiny-{label}": {"name": "resnet18", "weights": str(fitted[file]), "image_size": 64}
                for label, file in (("standard", "standard"), ("robust", "robust-linf-4"))
            },
            str(tiny),
            4 / 255,
            SMALL_IMAGES,
            radii,
            (0.25, 0.5, 1.0),
        ),
        Group(
            "cifar10",
            "RegNet, CIFAR-10, 32×32",
            {name: {"name": name} for name in ("cifar10-standard", "cifar10-robust")},
            str(cifar / "test.tar"),
            8 / 255,
            SMALL_IMAGES,
            radii,
            (0.25, 0.5, 1.0),
        ),
    )
    if quick:
        groups = tuple(_quick(group) for group in groups)
    return Study(groups, QUICK if quick else Budget(), work, cifar / "train.tar")


def _quick(group: Group) -> Group:
    """A few images and one radius per norm; of ImageNet's networks, the smallest."""
    few = 4 if group.key in ("imagenet", "samples") else 8
    images = {stage: 2 * few if stage in ("gradients", "slopes") else few for stage in group.images}
    models = dict(list(group.models.items())[:1]) if few == 4 else group.models
    return replace(group, models=models, images=images, linf=group.linf[-2:][:1], l2=group.l2[:1], trials=2)


def own_study(
    models: Sequence[str], data: str, eps: float, limit: int, work: Path, weights: str | None, image_size: int | None
) -> Study:
    """The same questions about other models and images, but for those that take training."""
    group = Group(
        "own",
        f"{', '.join(models)} on {Path(data).name}",
        {name: {"name": name, "weights": weights, "image_size": image_size} for name in models},
        data,
        eps,
        dict.fromkeys(SMALL_IMAGES, limit),
        (eps / 4, eps / 2, eps, 2 * eps),
        (0.25, 0.5, 1.0),
    )
    return Study((group,), Budget(), work)


def unpacked(archive: Path, work: Path, count: int | None = None) -> Path:
    """The folder of class folders in a tar, with all images or `count` evenly spaced ones.

    It is unpacked in the work folder unless it is there already.
    """
    target = work / "data" / f"{archive.parent.name}-{archive.stem}{'' if count is None else f'-{count}'}"
    if not target.exists():
        partial = target.with_name(target.name + ".partial")  # a stop leaves this, not something that looks whole
        partial.mkdir(parents=True, exist_ok=True)
        with tarfile.open(archive) as tar:
            members = sorted((member for member in tar if member.isfile()), key=lambda member: member.name)
            chosen = range(len(members)) if count is None else evenly(min(count, len(members)), len(members))
            tar.extractall(partial, [members[k] for k in chosen], filter="data")
        (partial / archive.stem).rename(target)
        partial.rmdir()
    return target

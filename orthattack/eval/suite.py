"""What a run consists of: models, data, attacks, radii. Read from a TOML file or made of the command line's flags.

Each key is described once, by `_key`: what it is, what it may be, and the flag that sets it. Nothing heavy is imported.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from orthattack.eval.errors import EvaluationError, first_line, nearest
from orthattack.eval.models import BUNDLED

if TYPE_CHECKING:
    from orthattack.eval.attacks.kind import AttackKind

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEFAULT_ATTACKS: list[str | dict[str, str]] = [
    "FGSM", "OrthoFGSM", "foolbox:FGSM", "PGD", "OrthoPGD",
    # what Foolbox's is to be compared with
    {"name": "OrthoPGD", "label": "OrthoPGD,loss=ce,schedule=fixed", "loss": "ce", "schedule": "fixed"},
    "foolbox:PGD",
]  # fmt: skip


def parse_fraction(value: object) -> object:
    """A number from "4/255"; anything else as it is."""
    if isinstance(value, str) and (match := re.fullmatch(r"\s*([0-9.eE+-]+)\s*/\s*([0-9.eE+-]+)\s*", value)):
        try:
            return float(match[1]) / float(match[2])
        except (ValueError, ZeroDivisionError):
            return value
    return value


def _number(value: object) -> object:
    """A radius from a fraction; true and false are no numbers."""
    if isinstance(value, bool):
        raise ValueError(f"must be a number >= 0 or a fraction such as 4/255; got {value}")
    return parse_fraction(value)


def _radius(value: float) -> float:
    if not (math.isfinite(value) and value >= 0):
        raise ValueError("must be a finite radius >= 0, such as 4/255")
    return value


Norm = Literal["linf", "l2", "l1", "l0"]  # `orthattack.threat.Norm`, which would bring torch
Radius = Annotated[float, BeforeValidator(_number), AfterValidator(_radius)]
Whole = Annotated[int, Field(strict=True, gt=-(2**63), lt=2**63)]
Count = Annotated[int, Field(strict=True, ge=1)]
Share = Annotated[float, BeforeValidator(_number), Field(gt=0, lt=1)]
Kept = Literal["gallery", "all", "none"]

_NAME = "text: see orthattack models and orthattack attacks"
_SHARES = "one share or more, each between 0 and 1, such as 0.05"
_IMAGES = "a whole number of images, at least 1"
_EPS = "one radius or more, each a number >= 0 or a fraction such as 4/255: leave it out for the default one"


def _key(default: Any, says: str, accepted: str, flag: str | None = None, of: Any = None, **more: Any) -> Any:
    """A key of a suite.

    Args:
        default: what it is if not said, or a function that makes it; ... if it must be said.
        says: what it is, for help and documentation.
        accepted: what it may be, for who says something else.
        flag: of the command line, and what its value is called there; none for a flag without a value.
        of: the type of one of its values.
        **more: for pydantic; or, of the flag, for argparse: ``nargs``, ``action``, ``const``, ``help``.
    """
    about = {name: more.pop(name) for name in ("nargs", "action", "const", "help") if name in more}
    extra = {"accepted": accepted, "flag": flag, "of": of, "argparse": about}
    default = {"default_factory" if callable(default) else "default": default}
    return Field(**default, description=says, json_schema_extra=extra, **more)


def _labelled(value: Any) -> Any:
    """A table with a name, which is its label too if it has no other, for a bare name or a table."""
    if isinstance(value, str):
        value = {"name": value}
    if isinstance(value, dict) and "label" not in value and "name" in value:
        value = {**value, "label": value["name"]}
    return value


def is_json(value: object) -> bool:
    """Whether a value can be kept in a manifest; others come from Python, or are TOML's dates."""
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_json(item) for key, item in value.items())
    if isinstance(value, list | tuple):
        return all(map(is_json, value))
    return value is None or isinstance(value, str | int) or (isinstance(value, float) and math.isfinite(value))


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSpec(_Strict):
    """A classifier."""

    name: str = _key(
        ..., "one or several: see `orthattack models`, timm:, hf: or robustbench:NAME, or module:function",
        _NAME, "--model NAME", nargs="+", action="extend",
    )  # fmt: skip
    label: str = _key(..., "what the results call it; unique", "text")
    weights: str | None = _key(
        None, "state dict, or name of torchvision weights (default: the model's own)",
        "text: a file, or the name of torchvision weights", "--weights FILE",
    )  # fmt: skip
    image_size: Count | None = _key(
        None, "pixels of the model's square input, if not the weights' own", "a whole number of pixels, at least 1",
        "--image-size N", Count,
    )  # fmt: skip

    @model_validator(mode="before")
    @classmethod
    def _with_label(cls, value: Any) -> Any:
        return _labelled(value)


class DataSpec(_Strict):
    """Images."""

    source: str = _key(
        ..., "folder of class folders, Parquet, tar or Arrow files, imagenet-samples, cifar10-samples, torchvision:...",
        "text: a folder, imagenet-samples, cifar10-samples, Parquet, tar or Arrow files, torchvision:NAME or "
        "module:function",
        "--data SOURCE",
    )  # fmt: skip
    labels: str | None = _key(
        None, "columns file and label, for folders that are not the class list",
        "text: a CSV file with columns file and label", "--labels CSV",
    )  # fmt: skip
    classes: str | None = _key(
        None, "columns folder and label; or text or numbers, what sorts class folders",
        "text: a CSV file with columns folder and label, or text or numbers, the order of class folders",
        "--classes CSV",
    )  # fmt: skip
    subset: str | None = _key(
        None, "names of images, one a line: only these, in that order",
        "text: a file with names of images, one a line", "--subset FILE",
    )  # fmt: skip
    limit: Count | None = _key(None, "only N images, evenly spaced", _IMAGES, "--limit N", Count)

    @model_validator(mode="before")
    @classmethod
    def _with_source(cls, value: Any) -> Any:
        return {"source": value} if isinstance(value, str) else value


class AttackSpec(BaseModel):
    """An attack: a name, and its options beside it."""

    model_config = ConfigDict(extra="allow", frozen=True)

    name: str = _key(..., "see `orthattack attacks`", _NAME)
    label: str = _key(..., "what the results call it; unique", "text")
    norm: Norm | None = _key(None, "another norm than the suite's, with radii of its own", "linf, l2, l1 or l0")
    eps: tuple[Radius, ...] | None = _key(None, "those radii", _EPS, min_length=1)
    levels: Literal[256] | None = _key(None, "256: exact in 8 bits, if the suite is not", "256")
    baselines: tuple[str, ...] | None = _key(
        None, "labels of the attacks to compare it with; by default those of its family",
        "a list of other attacks' labels",
    )  # fmt: skip

    @model_validator(mode="before")
    @classmethod
    def _with_label(cls, value: Any) -> Any:
        value = _labelled(value)
        if isinstance(value, dict) and isinstance(value.get("eps"), str | int | float):
            value = {**value, "eps": [value["eps"]]}
        return value

    @model_validator(mode="after")
    def _is_whole(self) -> AttackSpec:
        if self.norm is not None and self.eps is None:
            raise ValueError("an attack with its own norm needs its own eps, for radii differ from norm to norm")
        for key, value in (self.model_extra or {}).items():
            if not is_json(value):
                raise ValueError(
                    f"{key} must be text, a finite number, true or false, or a list of these; got {value!r}"
                )
        return self

    @property
    def parameters(self) -> dict[str, Any]:
        """The options, fractions as numbers."""
        return {key: parse_fraction(value) for key, value in (self.model_extra or {}).items()}

    def kind(self) -> AttackKind:
        """The attack; EvaluationError if there is none."""
        from orthattack.eval.attacks.load import attack_kind

        return attack_kind(self.name, self.parameters)


@dataclass(frozen=True)
class Entry:
    """One row of the results: an attack at a radius, with the seed of its random numbers."""

    attack: AttackSpec
    kind: AttackKind
    norm: Norm
    eps: float | None
    seed: int
    label: str
    levels: int | None = None
    targets: str | None = None
    early_stop: bool = False  # whether it leaves an image once it is fooled
    queries: int | None = None


class Suite(_Strict):
    """A whole benchmark: every attack at every radius on every model."""

    models: tuple[ModelSpec, ...] = _key(
        ..., "what to attack: names, or tables of name, label, weights and image_size",
        "a list of one model or more, each a name or a table with a name: leave no empty list", min_length=1,
    )  # fmt: skip
    data: DataSpec = _key(
        ..., "on what: a source, or a table of source, labels, classes, subset and limit",
        "a source by name, such as a folder, or a table with a source",
    )  # fmt: skip
    attacks: tuple[AttackSpec, ...] = _key(
        lambda: tuple(AttackSpec.model_validate(name) for name in DEFAULT_ATTACKS),
        "see `orthattack attacks`; options as NAME,key=value,...",
        "a list of one attack or more, each a name or a table with a name: leave it out for the default ones",
        "--attacks NAME", nargs="+", min_length=1,
    )  # fmt: skip
    norm: Norm = _key("linf", "norm of the perturbation", "linf, l2, l1 or l0", "--norm", Norm)
    eps: tuple[Radius, ...] = _key(
        ...,
        "radii in [0, 1] pixels (default: 4/255, l2: 0.5); l0: numbers of pixels",
        _EPS,
        "--eps E",
        Radius,
        nargs="+",
        min_length=1,
    )
    levels: Literal[256] | None = _key(
        None, "256: adversarials that 8 bits hold exactly, judged as stored; other attacks' are rounded first", "256",
        "--levels 256", int,
    )  # fmt: skip
    targets: str | None = _key(
        None, "classes to reach: random, least-likely, or a CSV file with columns file and target",
        "random, least-likely, or a CSV file with columns file and target", "--targets HOW",
    )  # fmt: skip
    queries: Count | None = _key(
        None, "evaluations of the model per image; an image fooled with more counts as not fooled",
        "a whole number, at least 1", "--queries N", Count,
    )  # fmt: skip
    steps: Count = _key(
        10, "steps of iterative attacks that do not set their own", "a whole number, at least 1",
        "--steps N", Count,
    )  # fmt: skip
    seeds: tuple[Whole, ...] = _key(
        (0,), "seeds of the random numbers; each attack runs once with each seed",
        "one whole number or more, below 2**63: leave it out for 0", "--seed N", Whole, nargs="+", min_length=1,
    )  # fmt: skip
    batch_size: Count = _key(32, "images at a time", _IMAGES, "--batch-size N", Count)
    shard_size: Count = _key(
        128, "images per file, and per piece of work of several processes", _IMAGES, "--shard-size N", Count
    )
    save_images: Kept = _key("gallery", "adversarial images to keep", "gallery, all or none", "--save-images", Kept)
    attack_misclassified: bool = _key(
        False, "attack initially misclassified images too; no rate changes, since they are not robust anyway",
        "true or false", "--attack-misclassified", action="store_const", const=True,
    )  # fmt: skip
    early_stop: bool = _key(
        True, "our attacks leave an image at its first success: no rate changes; by default unless all images are kept",
        "true or false", "--no-early-stop", help="take every step, also on images that are already fooled",
        action="store_const", const=False,
    )  # fmt: skip
    detector: str | None = _key(
        None, "module:function that makes a detector for each model; the report says how many images evade it",
        "text: module:function", "--detector NAME", pattern=r"^[^:]+:[^:]+$",
    )  # fmt: skip
    false_positive_rates: tuple[Share, ...] | None = _key(
        None, "shares of clean images that the detector may flag (default: 0.01 0.05)", _SHARES,
        "--false-positive-rates P", Share, nargs="+", min_length=1,
    )  # fmt: skip
    checks: bool = _key(
        True, "run the trust checks", "true or false", "--no-checks", help="leave out the trust checks",
        action="store_const", const=False,
    )  # fmt: skip
    check_images: Count = _key(32, "on how many images of each model", _IMAGES)

    @model_validator(mode="before")
    @classmethod
    def _lists(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        value = dict(value)
        if "seed" in value and "seeds" not in value:
            value["seeds"] = [value.pop("seed")]
        # Where it is kept, for transfer, say, where a detector scores it, or where a first success says nothing, the
        # best adversarial is asked for.
        best = value.get("save_images") == "all" or value.get("attack_misclassified") or value.get("detector")
        value.setdefault("early_stop", not best)
        for key in ("eps", "models", "attacks", "seeds", "false_positive_rates"):
            if isinstance(value.get(key), str | int | float):
                value[key] = [value[key]]
        if "eps" not in value:
            models = value.get("models")
            bundled = isinstance(models, Sequence) and all(_name(model) in [*BUNDLED] for model in models)
            value["eps"] = {"linf": [8 / 255 if bundled else 4 / 255], "l2": [0.5], "l1": [12.0], "l0": [24]}.get(
                str(value.get("norm", "linf")), []
            )
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Suite:
        for what, labels in (
            ("model", [model.label for model in self.models]),
            ("attack", [attack.label for attack in self.attacks]),
        ):
            for label in labels:
                if label != label.encode("utf-8", "replace").decode():
                    raise ValueError(f"a {what} is called {label!r}, which is no text: give it a label")
            twice = sorted({label for label in labels if labels.count(label) > 1})
            if twice:
                raise ValueError(f"two {what}s are called {twice[0]!r}: give one of them another label")
            if "clean" in labels and what == "attack":
                raise ValueError('an attack cannot be called "clean", the name of the images as they are')
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError("seeds has a value twice")
        for of, norm, radii in (("", self.norm, self.eps), *((f" of {a.label}", a.norm, a.eps) for a in self.attacks)):
            if len({f"{eps:.9g}" for eps in radii or ()}) < len(radii or ()):  # as they name the files of a run
                raise ValueError(f"eps{of} has a value twice")
            largest = max(radii or (0.0,))
            if (norm or self.norm) == "linf" and largest > 1:
                raise ValueError(
                    f"eps{of} is in units of [0, 1] pixels; got {largest:g}: did you mean {largest:g}/255?"
                )
        known = {attack.label for attack in self.attacks}
        for attack in self.attacks:
            for label in attack.baselines or ():
                if label not in known or label == attack.label:
                    raise ValueError(f"{attack.label} has a baseline {label!r}, which is not another attack here")
        return self

    def kinds(self) -> dict[str, AttackKind]:
        """The attacks by label; EvaluationError if there is no such attack."""
        return {attack.label: attack.kind() for attack in self.attacks}

    def _aimed(self, kinds: Mapping[str, AttackKind] | None) -> Mapping[str, AttackKind]:
        """The attacks by label, as they are in this run: towards a class some climb another loss."""
        kinds = self.kinds() if kinds is None else kinds
        if self.targets is None:
            return kinds
        return {label: replace(kind, card=kind.aimed_card or kind.card) for label, kind in kinds.items()}

    def entries(self, kinds: Mapping[str, AttackKind] | None = None) -> list[Entry]:
        """Every attack at every radius, in order; EvaluationError if an attack cannot be made."""
        kinds = self._aimed(kinds)
        found: list[Entry] = []
        for attack in self.attacks:
            kind, norm = kinds[attack.label], attack.norm or self.norm
            kind.check(norm, self.steps, attack.levels or self.levels, self.targets is not None, self.queries)
            for seed in self.seeds:
                label = attack.label if len(self.seeds) == 1 else f"{attack.label} (seed {seed})"
                radii = (None,) if kind.card.minimal else attack.eps or self.eps
                levels = attack.levels or self.levels
                early = self.early_stop if kind.early_stop is None else kind.early_stop
                shared = (seed, label, levels, self.targets, early, self.queries)
                found += [Entry(attack, kind, norm, eps, *shared) for eps in radii]
        return found

    def baselines(self, kinds: Mapping[str, AttackKind] | None = None) -> dict[str, list[str]]:
        """For each attack's label, those it is compared with: as said, or, of its family and its loss, first the same
        without the orthogonality, then other libraries'. Only ours have any."""
        kinds = self._aimed(kinds)
        chosen: dict[str, list[str]] = {}
        for attack in self.attacks:
            kind, norm = kinds[attack.label], attack.norm or self.norm
            if attack.baselines is not None:
                chosen[attack.label] = list(attack.baselines)
                continue
            chosen[attack.label] = []
            if kind.source != "orthattack":
                continue
            for other in self.attacks:
                theirs = kinds[other.label]
                plain = theirs.source != "orthattack" or (kind.card.is_orthogonal and not theirs.card.is_orthogonal)
                alike = theirs.card.family == kind.card.family and (
                    None in (theirs.climbs, kind.climbs) or theirs.climbs == kind.climbs
                )
                if other is not attack and alike and (other.norm or self.norm) == norm and plain:
                    chosen[attack.label].append(other.label)
        return chosen

    def config(self) -> dict[str, Any]:
        """All of it as JSON: what two runs must share to be the same run."""
        config: dict[str, Any] = self.model_dump(mode="json", exclude_none=True)
        return config


def _name(model: Any) -> Any:
    return model.get("name") if isinstance(model, dict) else getattr(model, "name", model)


def read_suite(path: Path) -> Suite:
    """Read a suite from a TOML file; paths in it are relative to the file. EvaluationError: no TOML, an unknown key
    (the message names the nearest), or a value that does not fit."""
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        hint = "" if path.suffix == ".toml" else ": models are passed with --model, and images with --data"
        raise EvaluationError(f"could not read the suite {path} ({error.strerror or error}){hint}") from error
    except ValueError as error:  # TOML's own, not text, or a number of more digits than Python reads
        raise EvaluationError(f"{path} is not TOML ({first_line(error)})") from error
    except RecursionError as error:
        raise EvaluationError(f"{path} is nested too deeply to be read") from error
    return make_suite(_anchor(content, path.parent), str(path))


def make_suite(content: Mapping[str, Any], origin: str) -> Suite:
    """Validate a suite; EvaluationError, in one line that says where and what, if it does not fit."""
    try:
        return Suite.model_validate(dict(content))
    except ValidationError as error:
        # A key that nobody knows first: what seems to be missing may only be misspelt.
        first = min(error.errors(), key=lambda found: found["type"] != "extra_forbidden")
        where = "".join(f"[{part + 1}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
        if first["type"] == "extra_forbidden":
            within: dict[str, type[BaseModel]] = {"models": ModelSpec, "data": DataSpec, "attacks": AttackSpec}
            word = str(first["loc"][-1])
            model = within.get(str(first["loc"][0]), Suite) if len(first["loc"]) > 1 else Suite
            known = [*model.model_fields]
            close = nearest(word, known, cutoff=0.4)
            message = "unknown key; " + (f"did you mean {close[0]}?" if close else f"there are {', '.join(known)}")
        else:
            message = wrong(first)
        raise EvaluationError(f"{origin}: {where or 'suite'}: {message}") from error


def wrong(error: Any, accepted: str | None = None) -> str:
    """What is accepted, where pydantic found something else, and what it is."""
    if error["type"] == "value_error":  # one of ours
        return str(error["msg"].removeprefix("Value error, "))
    key = next((part for part in reversed(error["loc"]) if isinstance(part, str)), "")
    if accepted is None:
        known: dict[str, Any] = {**AttackSpec.model_fields, **KEYS}
        everything = f"a table of the keys {', '.join(Suite.model_fields)}"
        accepted = known[key].json_schema_extra["accepted"] if key in known else everything
    if error["type"] == "missing":
        return f"is missing: it must be {accepted}"
    value = repr(error["input"])
    brackets = isinstance(error["input"], dict) and "list" in accepted
    table = f": each is a table of its own, [[{key}]] in two brackets" if brackets else ""
    return f"must be {accepted}; got {value if len(value) <= 80 else f'{value[:77]}...'}{table}"


KEYS: dict[str, Any] = {**ModelSpec.model_fields, **DataSpec.model_fields, **Suite.model_fields}
"""The keys that the flags of the command line set, among others."""

Suite.__doc__ = f"{Suite.__doc__}\n\nAttributes:\n" + "".join(
    f"    {name}: {field.description}.\n" for name, field in Suite.model_fields.items()
)


def _anchor(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Relative paths made relative to `folder`, where they are meant as paths."""

    def moved(table: Any, *keys: str) -> Any:
        if not isinstance(table, dict):
            return table
        return {
            key: str(folder / value) if key in keys and isinstance(value, str) and _is_path(folder, value) else value
            for key, value in table.items()
        }

    content = moved(content, "targets")
    data = content.get("data")
    content["data"] = moved(
        {"source": data} if isinstance(data, str) else data, "source", "labels", "classes", "subset"
    )
    if isinstance(content.get("models"), list):
        content["models"] = [_anchor_folder(moved(model, "weights"), folder) for model in content["models"]]
    return content


def _anchor_folder(model: Any, folder: Path) -> Any:
    """A model with its folder, "hf:./FOLDER", made relative to `folder`; what it is called stays."""
    table = _labelled(model)
    name = table.get("name") if isinstance(table, dict) else None
    if not isinstance(name, str) or not name.startswith(("hf:./", "hf:../")):
        return model
    place = folder / name.removeprefix("hf:")
    return {**table, "name": f"hf:{'' if place.is_absolute() else './'}{place}"}


def _is_path(folder: Path, value: str) -> bool:
    """Whether a value is meant as a path, not as a name: what exists is, and what has a slash or a file's ending."""
    try:
        exists = (folder / value).exists()
    except OSError:
        return False
    return exists or (":" not in value and ("/" in value or bool(Path(value).suffix)))


def differences(before: Mapping[str, Any], after: Mapping[str, Any], form: str = "{}: {} there, {} now") -> list[str]:
    """What differs between two configurations, a line each: where, what it was, and what it is."""
    old, new = dict(_flat(before)), dict(_flat(after))
    both = {key: (old.get(key, "not set"), new.get(key, "not set")) for key in dict.fromkeys([*old, *new])}
    return [form.format(key, *values) for key, values in both.items() if values[0] != values[1]]


def _flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from _flat(item, f"{prefix}.{key}".lstrip("."))
    elif isinstance(value, list | tuple) and any(isinstance(item, Mapping) for item in value):
        for number, item in enumerate(value, 1):
            yield from _flat(item, f"{prefix}[{number}]")
    else:
        yield prefix, list(value) if isinstance(value, tuple) else value

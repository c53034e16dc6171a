"""The forms of a run's records: the columns of its Parquet files, and what its JSON files must hold to be used."""

from __future__ import annotations

import json
import math
from collections.abc import Container
from typing import Annotated, Any, Literal

import pandas as pd
import pyarrow as pa
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, RootModel, ValidationError, model_validator

Norm = Literal["linf", "l2", "l1", "l0"]  # `orthattack.threat.Norm`, which would bring torch
Kind = Literal["clean", "shards", "checks", "transfer"]
STATUSES = ("ok", "misclassified", "unreadable", "error", "invalid")

_KEY = [("position", pa.int32()), ("name", pa.string()), ("label", pa.int32()), ("status", pa.string())]

CLEAN_SCHEMA = pa.schema(
    [
        *_KEY,  # status: ok, unreadable, error
        ("message", pa.string()),
        ("prediction", pa.int32()),
        ("margin", pa.float32()),  # largest other logit minus the label's: negative where right
        ("confidence", pa.float32()),  # largest softmax probability
        ("gradient_cosine", pa.float64()),  # of the cross-entropy's gradient with the image, on a sample
        ("gradient_norm", pa.float64()),  # L2; 0 or NaN where the gradient is masked
        ("logit_min", pa.float32()),
        ("logit_max", pa.float32()),
        ("logit_sum", pa.float32()),
        ("image_min", pa.float32()),
        ("image_max", pa.float32()),
        ("wrong_share", pa.float32()),  # of the evaluations; 0 or 1 for a model that always answers alike
        ("evaluations", pa.int32()),
    ]
)
"""The columns of clean/."""

ROW_SCHEMA = pa.schema(
    [
        *_KEY,  # status: ok, misclassified (the clean image, which is not attacked), unreadable, error, invalid
        ("message", pa.string()),  # why it is unreadable, an error or invalid
        ("clean_prediction", pa.int32()),
        ("adversarial_prediction", pa.int32()),
        ("success", pa.bool_()),  # newly fooled: clean correctly classified, adversarial not
        ("margin", pa.float32()),  # at the adversarial image: largest other logit minus the label's
        ("l0", pa.int32()),  # pixels changed, of the H W
        ("l1", pa.float64()),
        ("l2", pa.float64()),
        ("linf", pa.float64()),
        ("cosine", pa.float64()),  # of perturbation and image, signed, in float64
        ("cosine_red", pa.float64()),
        ("cosine_green", pa.float64()),
        ("cosine_blue", pa.float64()),
        ("promised_cosine", pa.float64()),  # largest |cos| with all that the attack says it is orthogonal to
        ("steps", pa.int32()),  # that the adversarial took, where the attack says so
        ("forward_calls", pa.float32()),  # of the model on this image; a batch's mean where the attack does not say
        ("gradient_calls", pa.float32()),
        ("rounded_success", pa.bool_()),  # still fooled after rounding to 8 bits; of successes only
        ("rounded_cosine", pa.float64()),
        ("rounded_norm", pa.float64()),  # in the norm of the attack
        ("wrong_share", pa.float32()),
        ("evaluations", pa.int32()),
        ("seconds", pa.float64()),  # the batch's time over its images; the one column that differs between two runs
    ]
)
"""The columns of shards/, checks/ and transfer/."""

SCHEMAS: dict[Kind, pa.Schema] = {
    "clean": CLEAN_SCHEMA,
    "shards": ROW_SCHEMA,
    "checks": ROW_SCHEMA,
    "transfer": ROW_SCHEMA,
}

SCORE = pa.field("detector_score", pa.float64())
"""The last column of clean/ and shards/ in a run with a detector, and in no other."""


def schema_of(kind: Kind, names: Container[str]) -> pa.Schema:
    """The columns of a file, with the detector's score if that is among `names`."""
    return SCHEMAS[kind].append(SCORE) if SCORE.name in names else SCHEMAS[kind]


NULLABLE = {
    pa.int32(): pd.Int32Dtype(),
    pa.bool_(): pd.BooleanDtype(),
    pa.float32(): pd.Float32Dtype(),
    pa.float64(): pd.Float64Dtype(),
    pa.string(): pd.StringDtype(),
}


class _Record(BaseModel):
    """What must be so; more keys are allowed, and those of other versions may lack what has a default."""

    model_config = ConfigDict(extra="allow", strict=True)


class SessionRecord(_Record):
    """A file of sessions/."""

    outcome: str
    id: str = Field(default="", pattern=r"^[^/]*$")  # which is its file's name
    host: str = ""
    process: int = 0
    started: str = ""
    warnings: list[str] = []
    notes: list[str] = []
    command: list[str] = []
    shard: Any = None
    finished: str | None = None


class _OldSession(SessionRecord):
    outcome: str = ""


def text(value: str) -> str:
    """The same; ValueError if it holds bytes that are no text, as names of files and arguments may."""
    value.encode()
    return value


_Label = Annotated[str, AfterValidator(text)]
_Eps = Annotated[float, Field(ge=0, le=1e12)]


class _Data(_Record):
    images: int = Field(ge=0, le=2 * 10**7)  # there are tables by position


class _Model(_Record):
    label: _Label
    num_classes: int = Field(default=0, ge=0, le=10**7)
    data: _Data
    class_names: list[str] | None = None
    published_accuracy: float | None = None


class _Attack(_Record):
    label: _Label
    norm: Norm | None = None
    eps: list[_Eps | None] = []
    parameters: dict[str, Any] = {}
    baselines: list[str] | None = None
    scope: str | None = None
    directions: str | list[Any] | None = None
    orthogonal: bool = False
    minimal: bool = False


class _Probe(_Record):
    model: str
    label: str
    eps: _Eps | None
    norm: Norm | None = None


class _Config(_Record):
    norm: Norm
    eps: list[_Eps]
    checks: bool = False


class ManifestRecord(_Record):
    """manifest.json."""

    config: _Config
    models: list[_Model]
    attacks: list[_Attack]
    probes: list[_Probe] = []
    warnings: list[str] = []
    sessions: list[_OldSession] = []
    status: str = "running"

    @model_validator(mode="after")
    def _fit(self) -> ManifestRecord:
        for listed in (self.models, self.attacks):
            labels = [one.label for one in listed]
            if len(set(labels)) < len(labels):
                raise ValueError("a label comes twice")
        if self.config.checks and not (self.config.eps and all(model.num_classes for model in self.models)):
            raise ValueError("there are checks, but no eps, or no num_classes")
        return self


class _Check(_Record):
    model: str
    check: str
    status: Literal["passed", "warned", "not run"]
    figures: str
    why: str


class _Target(_Record):
    label: _Label
    sha256: str


class TransferRecords(RootModel[list[_Target]]):
    """transfer.json: the models that judge other models' adversarial images."""


class CheckRecords(RootModel[list[_Check]]):
    """checks.json."""


def from_json(text: str | bytes) -> Any:
    """What JSON says; ValueError if it is none, or if a number of it is none or too large."""

    def number(digits: str) -> float:
        if not math.isfinite(value := float(digits)):
            raise ValueError(f"{digits} is no number")
        return value

    return json.loads(text, parse_constant=number, parse_float=number)


def unfit(kind: type[BaseModel], content: object) -> str | None:
    """Why a record is not of that form, in a few words; None if it is."""
    try:
        kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        return ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))
    return None

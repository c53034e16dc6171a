"""The columns of a run's Parquet files, and the nullable types that they are read as."""

from __future__ import annotations

from typing import Literal

import pandas as pd
import pyarrow as pa

Kind = Literal["clean", "shards", "checks"]

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
        *_KEY,  # status: ok, misclassified (not attacked: wrong to begin with), unreadable, error, invalid
        ("message", pa.string()),  # why it is unreadable, an error or invalid
        ("clean_prediction", pa.int32()),
        ("adversarial_prediction", pa.int32()),
        ("success", pa.bool_()),  # newly fooled: right on the clean image, wrong on the adversarial one
        ("margin", pa.float32()),  # at the adversarial image: largest other logit minus the label's
        ("l0", pa.int32()),  # numbers changed, of the 3 H W
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
"""The columns of shards/ and checks/."""

SCHEMAS: dict[Kind, pa.Schema] = {"clean": CLEAN_SCHEMA, "shards": ROW_SCHEMA, "checks": ROW_SCHEMA}

NULLABLE = {
    pa.int32(): pd.Int32Dtype(),
    pa.bool_(): pd.BooleanDtype(),
    pa.float32(): pd.Float32Dtype(),
    pa.float64(): pd.Float64Dtype(),
    pa.string(): pd.StringDtype(),
}

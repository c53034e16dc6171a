"""Adversarial attacks whose perturbation is kept orthogonal to the image.

>>> from orthattack import OrthoPGD
>>> adversarials = OrthoPGD(model, eps=4 / 255)(images, labels)  # doctest: +SKIP

Names are imported on first use, so that the command line answers before torch is loaded.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orthattack.attacks import (
        APGD,
        FGSM,
        MIFGSM,
        NIFGSM,
        PGD,
        AttackResult,
        AutoAttack,
        DetectorEvasion,
        MinimumNorm,
        OrthoAPGD,
        OrthoAutoAttack,
        OrthoFGSM,
        OrthoMIFGSM,
        OrthoNIFGSM,
        OrthoPGD,
        OrthoSquare,
        Square,
    )
    from orthattack.lending import (
        ModelChangedError,
    )
    from orthattack.models import (
        Ensemble,
        Normalized,
        fooled,
    )
    from orthattack.projection import (
        alignment,
        orthogonalize,
        orthonormal_basis,
        remove_directions,
    )
    from orthattack.threat import (
        ThreatModel,
    )

__version__ = "0.2.0.dev0"

__all__ = [
    "APGD",
    "FGSM",
    "MIFGSM",
    "NIFGSM",
    "PGD",
    "AttackResult",
    "AutoAttack",
    "DetectorEvasion",
    "Ensemble",
    "MinimumNorm",
    "ModelChangedError",
    "Normalized",
    "OrthoAPGD",
    "OrthoAutoAttack",
    "OrthoFGSM",
    "OrthoMIFGSM",
    "OrthoNIFGSM",
    "OrthoPGD",
    "OrthoSquare",
    "Square",
    "ThreatModel",
    "__version__",
    "alignment",
    "fooled",
    "orthogonalize",
    "orthonormal_basis",
    "remove_directions",
]

_HOME = {
    **dict.fromkeys(
        [
            "APGD",
            "FGSM",
            "MIFGSM",
            "NIFGSM",
            "PGD",
            "AttackResult",
            "AutoAttack",
            "DetectorEvasion",
            "MinimumNorm",
            "OrthoAPGD",
            "OrthoAutoAttack",
            "OrthoFGSM",
            "OrthoMIFGSM",
            "OrthoNIFGSM",
            "OrthoPGD",
            "OrthoSquare",
            "Square",
        ],
        "orthattack.attacks",
    ),
    **dict.fromkeys(["Ensemble", "Normalized", "fooled"], "orthattack.models"),
    **dict.fromkeys(["alignment", "orthogonalize", "orthonormal_basis", "remove_directions"], "orthattack.projection"),
    "ModelChangedError": "orthattack.lending",
    "ThreatModel": "orthattack.threat",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'orthattack' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

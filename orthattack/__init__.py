"""Adversarial attacks whose perturbation is kept orthogonal to the image.

>>> from orthattack import OrthoPGD
>>> adversarials = OrthoPGD(model, eps=4 / 255)(images, labels)  # doctest: +SKIP

Names are imported on first use, so that the command line answers before torch is loaded.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orthattack.attacks import FGSM, PGD, AttackResult, OrthoFGSM, OrthoPGD
    from orthattack.model import Normalized
    from orthattack.projection import alignment, orthogonalize, orthonormal_basis, remove_directions
    from orthattack.threat import ThreatModel

__version__ = "0.1.0"

__all__ = [
    "FGSM",
    "PGD",
    "AttackResult",
    "Normalized",
    "OrthoFGSM",
    "OrthoPGD",
    "ThreatModel",
    "__version__",
    "alignment",
    "orthogonalize",
    "orthonormal_basis",
    "remove_directions",
]

_HOME = {
    **dict.fromkeys(["FGSM", "PGD", "AttackResult", "OrthoFGSM", "OrthoPGD"], "orthattack.attacks"),
    **dict.fromkeys(["alignment", "orthogonalize", "orthonormal_basis", "remove_directions"], "orthattack.projection"),
    "Normalized": "orthattack.model",
    "ThreatModel": "orthattack.threat",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'orthattack' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)

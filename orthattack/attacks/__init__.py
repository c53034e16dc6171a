"""The attacks, with and without the orthogonality; `attack` has what they share, `climb` the loop."""

from orthattack.attacks.apgd import APGD, OrthoAPGD
from orthattack.attacks.auto import AutoAttack, OrthoAutoAttack
from orthattack.attacks.base import AttackResult
from orthattack.attacks.detector import DetectorEvasion
from orthattack.attacks.minimum import MinimumNorm
from orthattack.attacks.pgd import FGSM, MIFGSM, NIFGSM, PGD, OrthoFGSM, OrthoMIFGSM, OrthoNIFGSM, OrthoPGD
from orthattack.attacks.square import OrthoSquare, Square

__all__ = [
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
]

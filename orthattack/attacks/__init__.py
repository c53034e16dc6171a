"""The attacks, with and without the orthogonality, and what a new one is made of."""

from orthattack.attacks.apgd import APGD, OrthoAPGD
from orthattack.attacks.ascent import Climb
from orthattack.attacks.auto import AutoAttack, OrthoAutoAttack
from orthattack.attacks.base import Attack, Card
from orthattack.attacks.detector import DetectorEvasion
from orthattack.attacks.fgsm import FGSM, OrthoFGSM
from orthattack.attacks.mifgsm import MIFGSM, OrthoMIFGSM
from orthattack.attacks.minimum import MinimumNorm
from orthattack.attacks.nifgsm import NIFGSM, OrthoNIFGSM
from orthattack.attacks.pgd import PGD, OrthoPGD
from orthattack.attacks.scoring import Draws
from orthattack.attacks.square import OrthoSquare, Square
from orthattack.attacks.task import AttackResult, ScoredStep, Task

__all__ = [
    "APGD",
    "FGSM",
    "MIFGSM",
    "NIFGSM",
    "PGD",
    "Attack",
    "AttackResult",
    "AutoAttack",
    "Card",
    "Climb",
    "DetectorEvasion",
    "Draws",
    "MinimumNorm",
    "OrthoAPGD",
    "OrthoAutoAttack",
    "OrthoFGSM",
    "OrthoMIFGSM",
    "OrthoNIFGSM",
    "OrthoPGD",
    "OrthoSquare",
    "ScoredStep",
    "Square",
    "Task",
]

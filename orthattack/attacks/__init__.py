"""The attacks: FGSM, PGD and their orthogonal forms, through one loop."""

from orthattack.attacks.attack import AttackResult
from orthattack.attacks.pgd import FGSM, PGD, OrthoFGSM, OrthoPGD

__all__ = ["FGSM", "PGD", "AttackResult", "OrthoFGSM", "OrthoPGD"]

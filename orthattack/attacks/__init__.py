"""The attacks, with and without the orthogonality, and what a new one is made of; step rules are in `rules`."""

from orthattack.attacks.apgd import APGD as APGD
from orthattack.attacks.apgd import OrthoAPGD as OrthoAPGD
from orthattack.attacks.ascent import Climb as Climb
from orthattack.attacks.auto import AutoAttack as AutoAttack
from orthattack.attacks.auto import OrthoAutoAttack as OrthoAutoAttack
from orthattack.attacks.base import Attack as Attack
from orthattack.attacks.base import Card as Card
from orthattack.attacks.detector import DetectorEvasion as DetectorEvasion
from orthattack.attacks.fab import FAB as FAB
from orthattack.attacks.fab import OrthoFAB as OrthoFAB
from orthattack.attacks.fgsm import FGSM as FGSM
from orthattack.attacks.fgsm import OrthoFGSM as OrthoFGSM
from orthattack.attacks.mifgsm import MIFGSM as MIFGSM
from orthattack.attacks.mifgsm import OrthoMIFGSM as OrthoMIFGSM
from orthattack.attacks.minimum import MinimumNorm as MinimumNorm
from orthattack.attacks.nifgsm import NIFGSM as NIFGSM
from orthattack.attacks.nifgsm import OrthoNIFGSM as OrthoNIFGSM
from orthattack.attacks.pgd import PGD as PGD
from orthattack.attacks.pgd import OrthoPGD as OrthoPGD
from orthattack.attacks.scoring import Draws as Draws
from orthattack.attacks.square import OrthoSquare as OrthoSquare
from orthattack.attacks.square import Square as Square
from orthattack.attacks.task import AttackResult as AttackResult
from orthattack.attacks.task import ScoredStep as ScoredStep
from orthattack.attacks.task import Task as Task

from orthattack.attacks import APGD as APGD
from orthattack.attacks import FGSM as FGSM
from orthattack.attacks import MIFGSM as MIFGSM
from orthattack.attacks import NIFGSM as NIFGSM
from orthattack.attacks import PGD as PGD
from orthattack.attacks import AttackResult as AttackResult
from orthattack.attacks import AutoAttack as AutoAttack
from orthattack.attacks import DetectorEvasion as DetectorEvasion
from orthattack.attacks import MinimumNorm as MinimumNorm
from orthattack.attacks import OrthoAPGD as OrthoAPGD
from orthattack.attacks import OrthoAutoAttack as OrthoAutoAttack
from orthattack.attacks import OrthoFGSM as OrthoFGSM
from orthattack.attacks import OrthoMIFGSM as OrthoMIFGSM
from orthattack.attacks import OrthoNIFGSM as OrthoNIFGSM
from orthattack.attacks import OrthoPGD as OrthoPGD
from orthattack.attacks import OrthoSquare as OrthoSquare
from orthattack.attacks import Square as Square
from orthattack.lending import ModelChangedError as ModelChangedError
from orthattack.models import Ensemble as Ensemble
from orthattack.models import Normalized as Normalized
from orthattack.models import fooled as fooled
from orthattack.projection import alignment as alignment
from orthattack.projection import orthogonalize as orthogonalize
from orthattack.projection import orthonormal_basis as orthonormal_basis
from orthattack.projection import remove_directions as remove_directions
from orthattack.threat import ThreatModel as ThreatModel

__version__: str

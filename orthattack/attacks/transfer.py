"""Attacks whose adversarials are made to fool other models: MI- and NI-FGSM with gradients that are less one model's.

Each is `MIFGSM` or `NIFGSM` with another default, so all arguments are theirs, and what one of them adds another takes
too: ``DIFGSM(model, links=[smooth(gaussian())])`` is DI-TI-MI-FGSM. The papers report the last iterate, which is
``keep="last"``.
"""

from __future__ import annotations

from orthattack.attacks.mifgsm import MIFGSM, NIFGSM
from orthattack.attacks.rules import gaussian, smooth, variance
from orthattack.attacks.transforms import diversity, scales


class DIFGSM(MIFGSM, family="DIFGSM", transform=diversity()):
    """`MIFGSM` with input diversity (Xie et al. 2019, arXiv:1803.06978): gradients at images resized at random, by
    ``transform=diversity()``, of `orthattack.attacks.transforms`. Arguments as for `MIFGSM`.
    """


class OrthoDIFGSM(DIFGSM, scope="image"):
    """`DIFGSM` whose perturbation stays orthogonal to the image. Arguments as for `OrthoMIFGSM`."""


class TIFGSM(MIFGSM, family="TIFGSM", links=(smooth(gaussian()),)):
    """`MIFGSM` with translation invariance (Dong et al. 2019, arXiv:1904.02884): gradients smoothed by a Gaussian, by
    ``links=[smooth(gaussian())]``, of `orthattack.attacks.rules`. Arguments as for `MIFGSM`.
    """


class OrthoTIFGSM(TIFGSM, scope="image"):
    """`TIFGSM` whose perturbation stays orthogonal to the image. Arguments as for `OrthoMIFGSM`."""


class SINIFGSM(NIFGSM, family="SINIFGSM", transform=scales()):
    """`NIFGSM` with scale invariance (Lin et al. 2020, arXiv:1908.06281): gradients averaged over darker copies, by
    ``transform=scales(5)``, of `orthattack.attacks.transforms`. Arguments as for `NIFGSM`.
    """


class OrthoSINIFGSM(SINIFGSM, scope="image"):
    """`SINIFGSM` whose perturbation stays orthogonal to the image. Arguments as for `OrthoMIFGSM`."""


class VMIFGSM(MIFGSM, family="VMIFGSM", links=(variance(),)):
    """`MIFGSM` with variance tuning (Wang & He 2021, arXiv:2103.15571): gradients tuned by the neighbours' before, by
    ``links=[variance(20)]``, of `orthattack.attacks.rules`: 20 gradients more at each step but the last. Arguments as
    for `MIFGSM`.
    """


class OrthoVMIFGSM(VMIFGSM, scope="image"):
    """`VMIFGSM` whose perturbation stays orthogonal to the image. Arguments as for `OrthoMIFGSM`."""


class VNIFGSM(NIFGSM, family="VNIFGSM", links=(variance(),)):
    """`NIFGSM` with variance tuning (Wang & He 2021, arXiv:2103.15571), the neighbours those of the point itself.
    Arguments as for `VMIFGSM`.
    """


class OrthoVNIFGSM(VNIFGSM, scope="image"):
    """`VNIFGSM` whose perturbation stays orthogonal to the image. Arguments as for `OrthoMIFGSM`."""

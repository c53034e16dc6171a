"""NI-FGSM: iterated FGSM with Nesterov's momentum, with and without the orthogonality."""

from __future__ import annotations

from orthattack.attacks.mifgsm import MIFGSM


class NIFGSM(MIFGSM, family="NIFGSM"):
    """Iterated FGSM with Nesterov's momentum (Lin et al. 2020, arXiv:1908.06281)::

        v_{t+1} = decay · v_t + ∇L(y_t) / mean|∇L(y_t)|,   y_t = project(x_t + alpha · decay · v_t)
        x_{t+1} = project(x_t + alpha * sign(v_{t+1}))

    for L-infinity. In L2 and L1 both moves have the size of the norm: x_{t+1} is a step of size alpha from x_t along
    v_{t+1}, as `PGD` takes it, and y_{t+1} one of size alpha · decay from x_{t+1}.

    Arguments as for `MIFGSM`. The points y_t are candidates too.
    """

    _looks_ahead = True


class OrthoNIFGSM(NIFGSM, scope="image"):
    """`NIFGSM` whose perturbation stays orthogonal to the image. Arguments as for `OrthoMIFGSM`."""

"""A template: an attack, its orthogonal form, and a use of both. docs/how-to/add-an-attack.md says what to do with it.

python examples/attack_template.py
"""

from __future__ import annotations

from torch import Tensor
from typing_extensions import Unpack

from orthattack.attacks.ascent import Climb, rate
from orthattack.attacks.base import Attack, GradientOptions
from orthattack.attacks.rules import chain, momentum, normalize
from orthattack.models import Model
from orthattack.threat import Norm


class MyAttack(Attack):
    """What it does in one sentence (Authors year, arXiv:...)::

        v_{t+1} = decay · v_t + ∇L(x_t) / ‖∇L(x_t)‖₂
        x_{t+1} = step of size alpha from x_t along v_{t+1}

    Args:
        model: as for `PGD`, like `norm` and `eps`.
        steps: gradient steps, at least 1.
        decay: how much of the momentum is kept at each step, at least 0.
        **options: as for `PGD`.
    """

    def __init__(
        self,
        model: Model,
        norm: Norm = "linf",
        eps: float | Tensor = 4 / 255,
        steps: int = 10,
        decay: float = 0.9,
        **options: Unpack[GradientOptions],
    ) -> None:
        rule = chain(normalize("l2"), momentum(decay))
        super().__init__(model, norm, eps, Climb(rule, steps, rate(2.0, steps)), **options)


class OrthoMyAttack(MyAttack, scope="image"):
    """`MyAttack` whose perturbation stays orthogonal to the image. Arguments as for `MyAttack`."""


if __name__ == "__main__":
    import torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 4))
    images = torch.rand(16, 3, 8, 8)
    labels = model(images).argmax(1)
    for kind in (MyAttack, OrthoMyAttack):
        print(kind.__name__, kind(model, eps=16 / 255).run(images, labels))

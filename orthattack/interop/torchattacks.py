"""torchattacks: its FGSM, PGD, PGDL2, MIFGSM, NIFGSM and APGD, by the same names and arguments, done by our attacks.

Change the import and nothing else; torchattacks itself is not needed::

    from orthattack.interop import torchattacks

    atk = torchattacks.PGD(model, eps=8/255, alpha=2/255, steps=10)
    adv_images = atk(images, labels)

and, with one argument more, the perturbation is orthogonal to the image: ``torchattacks.PGD(model, scope="image")``.

What differs: an adversarial is the best of its iterates, the image included, rather than the last one; images outside
[0, 1] are an error; nothing is printed; Nesterov's look-ahead stays in the ball; APGD starts anywhere in the ball, and
can be targeted. What else torchattacks' attacks have, such as ``save``, these have not.

Source: Kim 2020, arXiv:2010.01950, for the interface, which is that of version 3.5.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, Literal, NoReturn, final

import torch
from torch import Tensor, nn

from orthattack.arguments import plain
from orthattack.attacks.apgd import OrthoAPGD
from orthattack.attacks.base import Attack
from orthattack.attacks.fgsm import OrthoFGSM
from orthattack.attacks.mifgsm import OrthoMIFGSM
from orthattack.attacks.nifgsm import OrthoNIFGSM
from orthattack.attacks.pgd import OrthoPGD
from orthattack.lending import global_random_numbers, guarded
from orthattack.models import Normalized
from orthattack.projection import Scope
from orthattack.threat import Norm

__all__ = ["APGD", "FGSM", "MIFGSM", "NIFGSM", "PGD", "PGDL2"]

_NORMS: dict[str, Norm] = {"Linf": "linf", "L2": "l2"}


class _Compatible(ABC):
    """What the attacks share: the modes, the normalisation, and the way from a call to one of our attacks.

    The attack is made anew for each call, so that attributes such as ``eps`` can be set at any time; what the
    constructor refuses is refused there too.
    """

    def __init__(self, model: nn.Module, scope: Scope | None) -> None:
        self.model, self.scope = model, scope
        self.attack_mode, self.targeted = "default", False
        self._targets: Callable[[Tensor, Tensor], Tensor] | None = None
        self.normalization_used: dict[str, list[float]] | None = None
        parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        self.device = None if parameter is None else parameter.device
        self._made(model, None)  # refuses a wrong option now, not at the first call
        self._is_made = True

    @abstractmethod
    def _made(self, model: nn.Module, generator: torch.Generator | None) -> Attack:
        """Our attack, with the arguments translated."""

    def _generator(self) -> torch.Generator | None:
        """The random numbers of one call: if there are any, a stream drawn from the global one, as `torch.manual_seed`
        is expected to make a call repeatable and two calls differ."""
        if not vars(self).get("random_start", False):
            return None
        with global_random_numbers:
            return torch.Generator().manual_seed(int(torch.randint(2**62, ())))

    def __call__(self, images: Tensor, labels: Tensor) -> Tensor:
        """Adversarial images (N, C, H, W), on the model's device; normalised if `set_normalization_used` says so.

        Args:
            images: (N, C, H, W), in [0, 1], or normalised then.
            labels: (N,) the true classes or, in a targeted mode, what the targets are made from.

        Raises:
            ValueError: images or labels of the wrong kind (the message says what and where).
        """
        if isinstance(images, Tensor) and isinstance(labels, Tensor):  # what else they are is refused below
            device = images.device if self.device is None else self.device
            images, labels = images.to(device), labels.to(device)
        if self.normalization_used is None:
            return self._attacked(self.model, images, labels)
        model = Normalized(self.model, **self.normalization_used).to(images.device)
        mean, std = model.mean.to(images.dtype), model.std.to(images.dtype)
        return (self._attacked(model, images * std + mean, labels) - mean) / std

    def _attacked(self, model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
        goal = labels
        if self._targets is not None:
            with guarded(model, images, "the target function", may_draw=True):  # which may write into what it is given
                goal = self._targets(images.clone(), labels.clone())
        return self._made(model, self._generator())(images, goal)

    def __repr__(self) -> str:
        hidden = ("model", "device", "targeted", "normalization_used")
        shown = {name: value for name, value in vars(self).items() if name not in hidden and name[0] != "_"}
        shown["normalization_used"] = self.normalization_used is not None
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    def __getattr__(self, name: str) -> NoReturn:
        raise AttributeError(
            f"{type(self).__name__} of orthattack.interop.torchattacks has no {name!r}; of the methods there are the "
            "call, get_mode, set_mode_default, set_mode_targeted_by_label, set_mode_targeted_by_function, set_device "
            "and set_normalization_used"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name[:1] == "_" or "_is_made" not in vars(self):
            super().__setattr__(name, value)
            return
        if name not in vars(self):
            options = ", ".join(known for known in vars(self) if known[:1] != "_")
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r} to set; it has {options}")
        how = {
            "attack_mode": "set_mode_default, set_mode_targeted_by_label or set_mode_targeted_by_function",
            "targeted": "set_mode_targeted_by_label or set_mode_default",
            "normalization_used": "set_normalization_used",
        }
        if name in how:
            raise AttributeError(f"{name} cannot be set as an attribute: call {how[name]}")
        before = vars(self)[name]
        super().__setattr__(name, value)
        try:
            self._made(self.model, None)
        except BaseException:
            super().__setattr__(name, before)
            raise

    @property
    def _shared(self) -> dict[str, Any]:
        return {"scope": self.scope, "targeted": self.targeted, "loss": getattr(self, "loss", "ce")}

    def get_mode(self) -> str:
        """ "default", "targeted(label)" or "targeted(custom)"."""
        return self.attack_mode

    def set_mode_default(self) -> None:
        """Labels are the true classes."""
        self._set_mode("default", None)

    def set_mode_targeted_by_label(self, quiet: bool = False) -> None:  # noqa: ARG002
        """Labels are the classes to reach. `quiet` makes no difference."""
        self._set_mode("targeted(label)", None)

    def set_mode_targeted_by_function(
        self,
        target_map_function: Callable[[Tensor, Tensor], Tensor],
        quiet: bool = False,  # noqa: ARG002
    ) -> None:
        """The classes to reach are a function of the images, in [0, 1], and the labels, of which it gets copies.

        Should it change the model, the call raises `orthattack.ModelChangedError`.
        """
        if not callable(target_map_function):
            raise ValueError(f"target_map_function must be a function of (images, labels); got {target_map_function!r}")
        self._set_mode("targeted(custom)", target_map_function)

    def _set_mode(self, mode: str, targets: Callable[[Tensor, Tensor], Tensor] | None) -> None:
        vars(self).update(attack_mode=mode, targeted=mode != "default", _targets=targets)

    def set_device(self, device: torch.device | str) -> None:
        """Where images and labels are moved to; by default where the model is."""
        vars(self)["device"] = torch.device(device)

    def set_normalization_used(self, mean: Iterable[float], std: Iterable[float]) -> None:
        """Images come and go normalised, ``(pixels - mean) / std``, as the model takes them; eps is in pixels.

        Args:
            mean: one number per channel, in units of [0, 1] pixels.
            std: one number > 0 per channel.

        Raises:
            ValueError: the lengths differ, or a std is not positive.
        """
        used = {"mean": [float(value) for value in mean], "std": [float(value) for value in std]}
        Normalized(nn.Identity(), **used)
        vars(self)["normalization_used"] = used


@final
class FGSM(_Compatible):
    """`orthattack.OrthoFGSM` by torchattacks' arguments.

    Args:
        model: an nn.Module, images in [0, 1] to logits.
        eps: L-infinity radius in pixel units.
        scope: None, or what the perturbation is orthogonal to: "image", "channel" or "pixel" (see `PGD`).

    Raises:
        ValueError: an option out of its range.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    >>> images, labels = torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 2, 0])
    >>> bool(((FGSM(model, eps=8 / 255)(images, labels) - images).abs() <= 8 / 255 + 1e-6).all())
    True
    """

    def __init__(self, model: nn.Module, eps: float = 8 / 255, *, scope: Scope | None = None) -> None:
        self.eps = eps
        super().__init__(model, scope)

    def _made(self, model: nn.Module, generator: torch.Generator | None) -> Attack:  # noqa: ARG002
        return OrthoFGSM(model, "linf", self.eps, **self._shared)


@final
class PGD(_Compatible):
    """`orthattack.OrthoPGD` by torchattacks' arguments.

    Args:
        model: as for `FGSM`, like `scope`.
        eps: L-infinity radius in pixel units.
        alpha: step size in pixel units.
        steps: gradient steps, at least 1.
        random_start: start at a random point of the ball, drawn with torch's global random numbers.

    >>> import orthattack
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    >>> images, labels = torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 2, 0])
    >>> attack = PGD(model, eps=8 / 255, alpha=2 / 255, steps=4, scope="image")
    >>> delta = attack(images, labels).double() - images.double()
    >>> bool((orthattack.alignment(delta, images.double()).abs() <= 1e-6).all())
    True
    """

    def __init__(
        self,
        model: nn.Module,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        random_start: bool = True,
        *,
        scope: Scope | None = None,
    ) -> None:
        self.eps, self.alpha, self.steps, self.random_start = eps, alpha, steps, random_start
        super().__init__(model, scope)

    def _made(self, model: nn.Module, generator: torch.Generator | None) -> Attack:
        return OrthoPGD(
            model, "linf", self.eps, self.alpha, self.steps, self.random_start, generator=generator, **self._shared
        )


@final
class PGDL2(_Compatible):
    """`orthattack.OrthoPGD` for L2 by torchattacks' arguments, which are those of `PGD` in L2.

    Args:
        model: as for `PGD`, like `eps`, `alpha`, `steps`, `random_start` and `scope`.
        eps_for_division: makes no difference; nothing is divided by zero.
    """

    def __init__(
        self,
        model: nn.Module,
        eps: float = 1.0,
        alpha: float = 0.2,
        steps: int = 10,
        random_start: bool = True,
        eps_for_division: float = 1e-10,
        *,
        scope: Scope | None = None,
    ) -> None:
        self.eps, self.alpha, self.steps, self.random_start = eps, alpha, steps, random_start
        self.eps_for_division = eps_for_division
        super().__init__(model, scope)

    def _made(self, model: nn.Module, generator: torch.Generator | None) -> Attack:
        return OrthoPGD(
            model, "l2", self.eps, self.alpha, self.steps, self.random_start, generator=generator, **self._shared
        )


class _Momentum(_Compatible):
    """What MIFGSM and NIFGSM share: everything but the attack."""

    _attack: type[OrthoMIFGSM] | type[OrthoNIFGSM]

    def __init__(
        self,
        model: nn.Module,
        eps: float = 8 / 255,
        alpha: float = 2 / 255,
        steps: int = 10,
        decay: float = 1.0,
        *,
        scope: Scope | None = None,
    ) -> None:
        self.eps, self.alpha, self.steps, self.decay = eps, alpha, steps, decay
        super().__init__(model, scope)

    def _made(self, model: nn.Module, generator: torch.Generator | None) -> Attack:  # noqa: ARG002
        return self._attack(model, "linf", self.eps, self.alpha, self.steps, self.decay, **self._shared)


@final
class MIFGSM(_Momentum):
    """`orthattack.OrthoMIFGSM` by torchattacks' arguments.

    Args:
        model: as for `PGD`, like `eps`, `alpha`, `steps` and `scope`.
        decay: how much of the momentum is kept at each step, at least 0.
    """

    _attack = OrthoMIFGSM


@final
class NIFGSM(_Momentum):
    """`orthattack.OrthoNIFGSM` by torchattacks' arguments, which are those of `MIFGSM`."""

    _attack = OrthoNIFGSM


@final
class APGD(_Compatible):
    """`orthattack.OrthoAPGD` by torchattacks' arguments.

    Args:
        model: as for `PGD`, like `steps` and `scope`.
        norm: "Linf" or "L2".
        eps: radius in pixel units.
        n_restarts: random starts.
        seed: of the random starts, the same at each call; torch's global random numbers stay as they are.
        loss: "ce" or "dlr".
        eot_iter: evaluations to average for a model that draws at random.
        rho: share of the steps in which the loss must rise for the step size to stay, in (0, 1).
        verbose: makes no difference.

    Raises:
        ValueError: an option out of its range.
    """

    def __init__(
        self,
        model: nn.Module,
        norm: Literal["Linf", "L2"] = "Linf",
        eps: float = 8 / 255,
        steps: int = 10,
        n_restarts: int = 1,
        seed: int = 0,
        loss: Literal["ce", "dlr"] = "ce",
        eot_iter: int = 1,
        rho: float = 0.75,
        verbose: bool = False,
        *,
        scope: Scope | None = None,
    ) -> None:
        self.norm, self.eps, self.steps, self.n_restarts, self.seed = norm, eps, steps, n_restarts, seed
        self.loss, self.eot_iter, self.rho, self.verbose = loss, eot_iter, rho, verbose
        super().__init__(model, scope)

    def _generator(self) -> torch.Generator:
        seed = plain(self.seed)
        if not isinstance(seed, int) or isinstance(seed, bool) or abs(seed) >= 2**63:
            raise ValueError(f"seed must be an integer below 2**63 in size; got {seed!r}")
        return torch.Generator().manual_seed(seed)

    def _made(self, model: nn.Module, generator: torch.Generator | None) -> Attack:  # noqa: ARG002
        for name, value, choices in (("norm", self.norm, tuple(_NORMS)), ("loss", self.loss, ("ce", "dlr"))):
            if value not in choices:
                raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")
        return OrthoAPGD(
            model,
            _NORMS[self.norm],
            self.eps,
            self.steps,
            self.n_restarts,
            self.rho,
            eot_samples=self.eot_iter,
            generator=self._generator(),
            **self._shared,
        )

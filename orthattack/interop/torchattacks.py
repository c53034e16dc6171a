"""torchattacks: its attacks, by the same names, arguments and methods, done by ours.

Change the import and nothing else; torchattacks itself is not needed::

    from orthattack.interop import torchattacks

    atk = torchattacks.PGD(model, eps=8/255, alpha=2/255, steps=10)
    adv_images = atk(images, labels)

and, with one argument more, the perturbation is orthogonal to the image: ``torchattacks.PGD(model, scope="image")``.

Of the arguments, these mean the same in every class that has them; one out of its range is a ValueError:

- ``model``: an nn.Module, images in [0, 1] to logits;
- ``norm``, ``eps``: "Linf", "L2" or "L1", and the radius in pixel units; without a norm it is "Linf" (`PGDL2`: "L2");
- ``alpha``, ``steps``: step size in pixel units, and how many gradient steps there are, at least 1;
- ``random_start``: start at a random point of the ball, drawn with torch's global random numbers;
- ``decay``: how much of the momentum is kept at each step, at least 0;
- ``n_restarts``: random starts;
- ``eot_iter``: evaluations to average for a model that draws at random;
- ``seed``: of what is drawn, the same at each call; None: torch's global random numbers;
- ``n_classes``: of the model;
- ``verbose``: makes no difference but in `AutoAttack`;
- ``scope``: None, or what the perturbation is orthogonal to: "image", "channel" or "pixel".

What differs: an adversarial is the best of its iterates, the image included, rather than the last one; images outside
[0, 1] are an error; nothing is printed but the bar of ``save``; Nesterov's look-ahead stays in the ball; APGD starts
anywhere in the ball, and can be targeted.

Source: Kim 2020, arXiv:2010.01950, for the interface, which is that of version 3.5.
"""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, NoReturn, final

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import dataclass_transform

from orthattack.arguments import check_choice, check_count, plain
from orthattack.attacks.apgd import OrthoAPGD
from orthattack.attacks.auto import OrthoAutoAttack
from orthattack.attacks.base import Attack
from orthattack.attacks.configured import options_of
from orthattack.attacks.fab import OrthoFAB
from orthattack.attacks.fgsm import OrthoFGSM
from orthattack.attacks.mifgsm import OrthoMIFGSM, OrthoNIFGSM
from orthattack.attacks.pgd import OrthoPGD
from orthattack.attacks.rules import gaussian, smooth, variance
from orthattack.attacks.square import OrthoSquare
from orthattack.attacks.transfer import OrthoDIFGSM, OrthoSINIFGSM, OrthoTIFGSM, OrthoVMIFGSM, OrthoVNIFGSM
from orthattack.attacks.transforms import diversity, scales
from orthattack.lending import Model, borrowed, global_random_numbers, guarded
from orthattack.models import Normalized, fooled
from orthattack.projection import Scope
from orthattack.threat import Norm

__all__ = [
    "APGD", "APGDT", "BIM", "DIFGSM", "EOTPGD", "FAB", "FGSM", "MIFGSM", "NIFGSM", "PGD", "PGDL2", "RFGSM", "SINIFGSM",
    "TIFGSM", "TPGD", "VMIFGSM", "VNIFGSM", "AutoAttack", "MultiAttack", "Square",
]  # fmt: skip
__wrapper__ = ["MultiAttack"]

_NORMS: dict[str, Norm] = {"Linf": "linf", "L2": "l2", "L1": "l1"}
_NAMES = {"n_restarts": "restarts", "n_queries": "queries", "eot_iter": "eot_samples"}
"""What our attacks call these of torchattacks' arguments."""


class _Base(ABC):
    """What everything here shares: the modes, the normalisation, and what is done with whole data sets."""

    supported_mode: tuple[str, ...] = ("default", "targeted")

    def __init__(self, model: nn.Module) -> None:
        self.set_model(model)
        self.attack_mode, self.targeted = "default", False
        self._targets: Callable[[Model, Tensor, Tensor], Tensor] | None = None
        self.normalization_used: dict[str, list[float]] | None = None
        self.set_model_training_mode()
        parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        self.device = None if parameter is None else parameter.device
        self._check()  # refuses a wrong option now, not at the first call
        self._is_made = True

    @abstractmethod
    def _attacked(self, model: Model, images: Tensor, labels: Tensor) -> Tensor:
        """Adversarials of images in [0, 1], by a model that takes such."""

    @abstractmethod
    def _check(self) -> None:
        """Refuse options that the attack would refuse."""

    def __call__(self, images: Tensor, labels: Tensor | None = None) -> Tensor:
        """Adversarial images (N, C, H, W), on the model's device; normalised if `set_normalization_used` says so.

        Args:
            images: (N, C, H, W), in [0, 1], or normalised then.
            labels: (N,) the true classes or, in a targeted mode, what the targets are made from; by default the classes
                that the model predicts.

        Raises:
            ValueError: images or labels of the wrong kind (the message says what and where).
        """
        if isinstance(images, Tensor):  # what else they are is refused below
            images = images.to(images.device if self.device is None else self.device)
            labels = _logits(self.model, images).argmax(1) if labels is None else labels
            labels = labels.to(images.device) if isinstance(labels, Tensor) else labels
        assert labels is not None
        if self.normalization_used is None:
            return self._attacked(self.model, images, labels)
        model = Normalized(self.model, **self.normalization_used).to(images.device)
        mean, std = model.mean.to(images.dtype), model.std.to(images.dtype)
        return (self._attacked(model, images * std + mean, labels) - mean) / std

    def __repr__(self) -> str:
        hidden = ("model", "device", "targeted", "normalization_used", "attacks")
        shown = {name: value for name, value in vars(self).items() if name not in hidden and name[0] != "_"}
        shown["normalization_used"] = self.normalization_used is not None
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in shown.items())})"

    def __getattr__(self, name: str) -> NoReturn:
        methods = ", ".join(name for name in dir(type(self)) if name[0] != "_" and callable(getattr(type(self), name)))
        raise AttributeError(
            f"{type(self).__name__} of orthattack.interop.torchattacks has no {name!r}; of the methods there are the "
            f"call, {methods}"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name[:1] == "_" or "_is_made" not in vars(self):
            super().__setattr__(name, value)
            return
        if name not in vars(self):
            options = ", ".join(known for known in vars(self) if known[:1] != "_")
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r} to set; it has {options}")
        how = {
            "attack_mode": "set_mode_default or one of set_mode_targeted_by_label, _by_function, _random, ...",
            "targeted": "one of set_mode_targeted_by_label, _by_function, _random, ..., or set_mode_default",
            "normalization_used": "set_normalization_used",
        }
        if name in how:
            raise AttributeError(f"{name} cannot be set as an attribute: call {how[name]}")
        before = vars(self)[name]
        super().__setattr__(name, value)
        try:
            self._check()
        except BaseException:
            super().__setattr__(name, before)
            raise

    def get_mode(self) -> str:
        """ "default", "targeted(label)", "targeted(custom)", "targeted(random)" or "targeted(least-likely)"."""
        return self.attack_mode

    def set_mode_default(self) -> None:
        """Labels are the true classes."""
        vars(self).update(attack_mode="default", targeted=False, _targets=None)

    def set_mode_targeted_by_label(self, quiet: bool = False) -> None:  # noqa: ARG002
        """Labels are the classes to reach. `quiet` makes no difference, here and below."""
        self._set_mode("label", None)

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
        self._set_mode("custom", partial(_by_function, target_map_function))

    def set_mode_targeted_random(self, quiet: bool = False) -> None:  # noqa: ARG002
        """The classes to reach are drawn among the others, with torch's global random numbers."""
        self._set_mode("random", _random_targets)

    def set_mode_targeted_least_likely(self, kth_min: int = 1, quiet: bool = False) -> None:  # noqa: ARG002
        """The class to reach is the one with the `kth_min`-th smallest logit, counted from 1, the label left out."""
        check_count("kth_min", kth_min := plain(kth_min))
        self._set_mode("least-likely", partial(_least_likely, kth_min))

    def _set_mode(self, kind: str, targets: Callable[[Model, Tensor, Tensor], Tensor] | None) -> None:
        if "targeted" not in self.supported_mode:
            raise ValueError(f"{type(self).__name__} has no targeted mode; MultiAttack's are those of its attacks")
        vars(self).update(attack_mode=f"targeted({kind})", targeted=True, _targets=targets)

    def set_model(self, model: nn.Module) -> None:
        """Attack another model from now on."""
        self.model = model

    @property
    def model_name(self) -> str:
        """The model's class."""
        return type(self.model).__name__

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

    def set_model_training_mode(
        self, model_training: bool = False, batchnorm_training: bool = False, dropout_training: bool = False
    ) -> None:
        """The mode in which the model is attacked, and judged; it comes back as it was.

        Args:
            model_training: training mode, as recurrent layers need on GPUs, but for layers of the following kinds.
            batchnorm_training: batch norms too.
            dropout_training: dropout too.
        """
        vars(self)["_training"] = (model_training, batchnorm_training, dropout_training)

    @contextmanager
    def _in_mode(self, model: Model, images: Tensor) -> Iterator[Model]:
        """The model to attack: a module, which attacks put into evaluation mode, or a function, which they leave."""
        training, *others = vars(self)["_training"]
        if not training or not isinstance(model, nn.Module):
            yield model
            return
        with borrowed(model, images.device):  # gives the modes back, and what batch norms have counted
            for module in model.modules():
                kinds = ("BatchNorm" in type(module).__name__, "Dropout" in type(module).__name__)
                module.training = all(wanted for kind, wanted in zip(kinds, others, strict=True) if kind)
            yield model.__call__

    def save(
        self,
        data_loader: Iterable[Sequence[Tensor]],
        save_path: str | Path | None = None,
        verbose: bool = True,
        return_verbose: bool = False,
        save_predictions: bool = False,
        save_clean_inputs: bool = False,
        save_type: Literal["float", "int"] = "float",
    ) -> tuple[float, float, float] | None:
        """Attack every batch of a data loader, and store the adversarials for `load`.

        An exception, Ctrl-C among them, leaves a file with the batches that were finished.

        Args:
            data_loader: batches of images and labels, as for a call.
            save_path: the file to write; by default none.
            verbose: show a bar with robust accuracy.
            return_verbose: return figures.
            save_predictions: store the classes that the model predicts for the adversarials.
            save_clean_inputs: store the images.
            save_type: pixels in [0, 1], or "int": in 8 bits, rounded.

        Returns:
            With `return_verbose`, the robust accuracy in percent, the mean L2 norm of the perturbations that fool, in
            pixel units, and the mean seconds per batch.
        """
        check_choice("save_type", save_type, ("float", "int"))
        from tqdm import tqdm

        wanted = {"adv_inputs", "labels", *["preds"] * save_predictions, *["clean_inputs"] * save_clean_inputs}
        kept: dict[str, list[Tensor]] = defaultdict(list)
        count = right = 0
        distances, begun = [torch.zeros(0)], time.perf_counter()
        try:
            with tqdm(data_loader, "adversarials", disable=not verbose) as bar:
                for images, labels in bar:
                    adversarials = self(images, labels)
                    predicted = _logits(self.model, adversarials).argmax(1).cpu()
                    found, clean = self._pixels(adversarials), self._pixels(images)
                    row = {"adv_inputs": found, "labels": labels.cpu(), "preds": predicted, "clean_inputs": clean}
                    for key in wanted:
                        kept[key].append(_in_8_bits(row[key]) if save_type == "int" else row[key])
                    wrong = predicted != labels.cpu()
                    count, right = count + len(labels), right + int((~wrong).sum())
                    distances.append((found - clean)[wrong].flatten(1).norm(dim=1))
                    bar.set_postfix_str(f"robust accuracy {right / count:.1%}", refresh=False)
        finally:
            if save_path is not None and kept:
                stored = {key: torch.cat(tensors) for key, tensors in kept.items()}
                part = Path(f"{save_path}.part")
                torch.save(stored | {"save_type": save_type}, part)
                part.replace(save_path)
        if not return_verbose or count == 0:
            return None
        seconds = (time.perf_counter() - begun) / (len(distances) - 1)
        return 100 * right / count, float(torch.cat(distances).mean()), seconds

    @staticmethod
    def load(
        load_path: str | Path,
        batch_size: int = 128,
        shuffle: bool = False,
        normalize: Mapping[str, Sequence[float]] | None = None,
        load_predictions: bool = False,
        load_clean_inputs: bool = False,
    ) -> DataLoader[tuple[Tensor, ...]]:
        """A data loader of what `save` has stored, here or with torchattacks; nothing in the file is executed.

        Args:
            load_path: the file.
            batch_size: images per batch.
            shuffle: whether to shuffle.
            normalize: "mean" and "std", a number per channel each, to normalise the images with.
            load_predictions: what `save` stored with `save_predictions`.
            load_clean_inputs: what it stored with `save_clean_inputs`.

        Raises:
            ValueError: the file does not hold what is asked for.

        Returns:
            Batches of adversarials in [0, 1], labels and, if asked for, predictions and images.
        """
        stored = torch.load(load_path, map_location="cpu", weights_only=True)  # noqa: TID251 - tensors alone
        keys = ["adv_inputs", "labels", *["preds"] * load_predictions, *["clean_inputs"] * load_clean_inputs]
        if not isinstance(stored, dict) or (missing := [key for key in keys if key not in stored]):
            raise ValueError(
                f"{load_path} holds no {missing[0] if isinstance(stored, dict) else 'adversarials'}: see save"
            )
        for key in {"adv_inputs", "clean_inputs"} & set(keys):
            images = stored[key].float() / 255 if stored["save_type"] == "int" else stored[key]
            stored[key] = images if normalize is None else Normalized(nn.Identity(), **normalize)(images)
        return DataLoader(TensorDataset(*(stored[key] for key in keys)), batch_size, shuffle)

    def _pixels(self, images: Tensor) -> Tensor:
        """Images as they come and go, on the CPU, as pixels in [0, 1]."""
        if self.normalization_used is None:
            return images.cpu()
        model = Normalized(nn.Identity(), **self.normalization_used)
        return images.cpu() * model.std + model.mean


def _logits(model: Model, images: Tensor) -> Tensor:
    with borrowed(model, images.device) as lent, torch.no_grad():
        return lent(images)


def _in_8_bits(values: Tensor) -> Tensor:
    return (values * 255).round().to(torch.uint8) if values.is_floating_point() else values


def _by_function(function: Callable[[Tensor, Tensor], Tensor], model: Model, images: Tensor, labels: Tensor) -> Tensor:
    with guarded(model, images, "the target function", may_draw=True):  # which may write into what it is given
        return function(images.clone(), labels.clone())


def _random_targets(model: Model, images: Tensor, labels: Tensor) -> Tensor:
    classes = _logits(model, images[:1]).shape[1]
    with global_random_numbers:
        return (labels + torch.randint(1, classes, labels.shape).to(labels.device)) % classes


def _least_likely(kth: int, model: Model, images: Tensor, labels: Tensor) -> Tensor:
    others = _logits(model, images).scatter(1, labels[:, None], torch.inf)
    if kth >= others.shape[1]:
        raise ValueError(f"kth_min must be at most {others.shape[1] - 1}, the number of other classes; got {kth}")
    return others.kthvalue(kth, dim=1).indices


@dataclass_transform(eq_default=False, field_specifiers=(field,))
@dataclass(eq=False, repr=False)
class _Compatible(_Base):
    """An attack of ours by the arguments of torchattacks', which are its fields, in their order. It is made anew for
    each call, so that attributes such as ``eps`` can be set at any time; what the constructor refuses is refused there
    too."""

    model: nn.Module
    scope: Scope | None = field(default=None, kw_only=True)
    _attack: ClassVar[type[Attack]]  # ours
    _norm: ClassVar[Norm] = "linf"  # where it is no argument
    _draws: ClassVar[bool] = False  # random numbers, beside a random start
    _fixed: ClassVar[tuple[str, ...]] = ()  # arguments that have their default here, as published, and no other value

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        dataclass(eq=False, repr=False)(cls)

    def __post_init__(self) -> None:
        super().__init__(self.model)

    def _options(self) -> dict[str, Any]:
        """The arguments by the names that ours have, and what they are where torchattacks has no such argument."""
        own = {_NAMES.get(each.name, each.name): getattr(self, each.name) for each in fields(self)}
        loss = getattr(self, "loss", "ce")
        return {"norm": self._norm, "random_start": False, "loss": loss, "targeted": self.targeted, **own}

    def _made(self, model: Model, generator: torch.Generator | None) -> Attack:
        options = {**self._options(), "model": model, "generator": generator}
        known = options_of(self._attack)
        return self._attack(**{name: value for name, value in options.items() if name in known})

    def _check(self) -> None:
        for name in self._fixed:
            value = getattr(type(self), name)
            if plain(getattr(self, name)) != value:
                raise ValueError(f"{name} is {value!r} here, as published; got {getattr(self, name)!r}")
        self._made(self.model, None)

    def _generator(self) -> torch.Generator | None:
        """The random numbers of one call: if there are any, a stream drawn from the global one, as `torch.manual_seed`
        is expected to make a call repeatable and two calls differ."""
        if not self._draws and not vars(self).get("random_start", False):
            return None
        with global_random_numbers:
            return torch.Generator().manual_seed(int(torch.randint(2**62, ())))

    def _attacked(self, model: Model, images: Tensor, labels: Tensor) -> Tensor:
        goal = labels if self._targets is None else self._targets(model, images, labels)
        with self._in_mode(model, images) as taken:
            return self._made(taken, self._generator()).run(images, goal, start=self._start(images)).adversarials

    def _start(self, images: Tensor) -> Tensor | None:  # noqa: ARG002
        """Where to start, if that is neither the image nor any point of the ball."""
        return None


@final
class MultiAttack(_Base):
    """Several attacks on one model, each on the images that the ones before it left; or the same one, restarted.

    Args:
        attacks: two or more, of this module, on the same model. Their modes are their own; a normalisation is that of
            all of them.
        verbose: makes no difference.

    Raises:
        ValueError: fewer than two, or attacks on different models.
    """

    supported_mode = ("default",)

    def __init__(self, attacks: Sequence[_Base], verbose: bool = False) -> None:
        if len(attacks) < 2:
            raise ValueError(f"attacks must be two or more; got {len(attacks)}")
        if any(attack.model is not attacks[0].model for attack in attacks):
            raise ValueError("attacks must be of one model")
        self.attacks, self.verbose = list(attacks), verbose
        super().__init__(attacks[0].model)
        vars(self)["normalization_used"] = attacks[0].normalization_used

    def _check(self) -> None:
        """They have checked their options themselves."""

    def _attacked(self, model: Model, images: Tensor, labels: Tensor) -> Tensor:
        found, left = images.clone(), torch.arange(len(images), device=images.device)
        for attack in self.attacks:
            if len(left) > 0:
                found[left] = attack._attacked(model, images[left], labels[left])
                left = left[~fooled(model, found[left], labels[left])]
        found[left] = images[left]
        return found


@final
class FGSM(_Compatible):
    """`orthattack.OrthoFGSM` by torchattacks' arguments.

    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    >>> images, labels = torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 2, 0])
    >>> bool(((FGSM(model, eps=8 / 255)(images, labels) - images).abs() <= 8 / 255 + 1e-6).all())
    True
    """

    eps: float = 8 / 255
    _attack = OrthoFGSM


class _Iterated(_Compatible):
    """What takes steps of one size: `orthattack.OrthoPGD`, unless a class says otherwise."""

    eps: float = 8 / 255
    alpha: float = 2 / 255
    steps: int = 10
    _attack: ClassVar[type[Attack]] = OrthoPGD


@final
class PGD(_Iterated):
    """`orthattack.OrthoPGD` by torchattacks' arguments.

    >>> import orthattack
    >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    >>> images, labels = torch.rand(4, 3, 2, 2), torch.tensor([0, 1, 2, 0])
    >>> attack = PGD(model, eps=8 / 255, alpha=2 / 255, steps=4, scope="image")
    >>> delta = attack(images, labels).double() - images.double()
    >>> bool((orthattack.alignment(delta, images.double()).abs() <= 1e-6).all())
    True
    """

    random_start: bool = True


@final
class PGDL2(_Iterated):
    """`PGD` in L2. `eps_for_division` makes no difference: nothing is divided by zero."""

    eps: float = 1.0
    alpha: float = 0.2
    random_start: bool = True
    eps_for_division: float = 1e-10
    _norm = "l2"


@final
class BIM(_Iterated):
    """`PGD` from the image; with ``steps=0`` there are as many as Kurakin et al. 2017 (arXiv:1607.02533) take."""

    def _options(self) -> dict[str, Any]:
        if self.steps == 0:
            vars(self)["steps"] = int(min(self.eps * 255 + 4, 1.25 * self.eps * 255))
        return super()._options()


@final
class EOTPGD(_Iterated):
    """`PGD` for a model that draws at random, of which `eot_iter` gradients are averaged."""

    eot_iter: int = 2
    random_start: bool = True


@final
class RFGSM(_Iterated):
    """`PGD` from a step of random signs (Tramèr et al. 2018, arXiv:1705.07204)."""

    def _start(self, images: Tensor) -> Tensor:
        with global_random_numbers:
            return (images + self.alpha * torch.randn_like(images).sign()).clamp(0, 1)


@final
class TPGD(_Iterated):
    """`PGD` with the loss "kl" (Zhang et al. 2019, arXiv:1901.08573), from beside the image."""

    supported_mode = ("default",)
    loss = "kl"

    def _start(self, images: Tensor) -> Tensor:
        with global_random_numbers:
            return (images + 0.001 * torch.randn_like(images)).clamp(0, 1)


class _Momentum(_Iterated):
    """What the attacks with momentum share."""

    decay: float = 1.0


@final
class MIFGSM(_Momentum):
    """`orthattack.OrthoMIFGSM` by torchattacks' arguments."""

    _attack = OrthoMIFGSM


@final
class NIFGSM(_Momentum):
    """`orthattack.OrthoNIFGSM` by torchattacks' arguments."""

    _attack = OrthoNIFGSM


@final
class SINIFGSM(_Momentum):
    """`orthattack.OrthoSINIFGSM` by torchattacks' arguments; `m` is how many scales there are."""

    m: int = 5
    _attack = OrthoSINIFGSM

    def _options(self) -> dict[str, Any]:
        return {**super()._options(), "transform": scales(self.m)}


class _Tuned(_Momentum):
    N: int = 5
    beta: float = 3 / 2
    _draws = True

    def _options(self) -> dict[str, Any]:
        return {**super()._options(), "links": [variance(self.N, self.beta)]}


@final
class VMIFGSM(_Tuned):
    """`orthattack.OrthoVMIFGSM` by torchattacks' arguments; there are `N` neighbours, as far as `beta` times eps."""

    _attack = OrthoVMIFGSM


@final
class VNIFGSM(_Tuned):
    """`orthattack.OrthoVNIFGSM` by torchattacks' arguments, which are those of `VMIFGSM`."""

    _attack = OrthoVNIFGSM


class _Diverse(_Momentum):
    _draws = True

    def _start(self, images: Tensor) -> Tensor | None:
        if not vars(self)["random_start"]:
            return None
        with global_random_numbers:
            return (images + torch.empty_like(images).uniform_(-self.eps, self.eps)).clamp(0, 1)

    def _options(self) -> dict[str, Any]:
        known = vars(self)
        return {**super()._options(), "transform": diversity(known["resize_rate"], known["diversity_prob"])}


@final
class DIFGSM(_Diverse):
    """`orthattack.OrthoDIFGSM` by torchattacks' arguments.

    Args:
        resize_rate: of the sizes; each image gets its own, where torchattacks draws one for the batch.
        diversity_prob: how probable it is that an image is resized.
    """

    decay: float = 0.0
    resize_rate: float = 0.9
    diversity_prob: float = 0.5
    random_start: bool = False
    _attack = OrthoDIFGSM


@final
class TIFGSM(_Diverse):
    """`orthattack.OrthoTIFGSM` with the input diversity of `DIFGSM` by torchattacks' arguments.

    Args:
        kernel_name: "gaussian", "linear" or "uniform".
        len_kernel: its side in pixels, odd.
        nsig: at how many standard deviations a Gaussian ends.
    """

    decay: float = 0.0
    kernel_name: Literal["gaussian", "linear", "uniform"] = "gaussian"
    len_kernel: int = 15
    nsig: float = 3
    resize_rate: float = 0.9
    diversity_prob: float = 0.5
    random_start: bool = False
    _attack = OrthoTIFGSM

    def _options(self) -> dict[str, Any]:
        check_choice("kernel_name", self.kernel_name, ("gaussian", "linear", "uniform"))
        check_count("len_kernel", size := plain(self.len_kernel))
        at = torch.arange(size, dtype=torch.float64) - (size - 1) / 2
        linear = 1 - (2 * at / (size + 1)).abs()
        kernel = {"linear": linear / linear.sum(), "uniform": torch.full_like(at, 1 / size)}.get(self.kernel_name)
        links = [smooth(gaussian(size, self.nsig) if kernel is None else kernel)]
        return {**super()._options(), "links": links}


class _Seeded(_Compatible):
    """What has a norm, and a seed of its own, the same at each call; torch's global random numbers stay as they are."""

    norm: Literal["Linf", "L2", "L1"] = "Linf"
    eps: float = 8 / 255
    _norms: ClassVar[tuple[str, ...]] = ("Linf", "L2", "L1")
    _losses: ClassVar[tuple[str, ...]] = ("ce", "dlr")

    def _generator(self) -> torch.Generator | None:
        if (seed := plain(vars(self)["seed"])) is None:
            return super()._generator()
        if not isinstance(seed, int) or isinstance(seed, bool) or abs(seed) >= 2**63:
            raise ValueError(f"seed must be an integer below 2**63 in size; got {seed!r}")
        return torch.Generator().manual_seed(seed)

    def _check(self) -> None:
        check_choice("norm", self.norm, self._norms)
        if "loss" in vars(self):
            check_choice("loss", vars(self)["loss"], self._losses)
        self._generator()
        super()._check()

    def _options(self) -> dict[str, Any]:
        return {**super()._options(), "norm": _NORMS[self.norm]}


@final
class APGD(_Seeded):
    """`orthattack.OrthoAPGD`, not in L1, by torchattacks' arguments.

    Args:
        loss: "ce" or "dlr".
        rho: share of the steps in which the loss must rise for the step size to stay, in (0, 1).
    """

    steps: int = 10
    n_restarts: int = 1
    seed: int | None = 0
    loss: Literal["ce", "dlr"] = "ce"
    eot_iter: int = 1
    rho: float = 0.75
    verbose: bool = False
    _attack = OrthoAPGD
    _norms = ("Linf", "L2")


@final
class APGDT(_Seeded):
    """`APGD` with the targeted DLR loss, towards each of the `n_classes` - 1, at least 3, likeliest other classes."""

    steps: int = 10
    n_restarts: int = 1
    seed: int | None = 0
    eot_iter: int = 1
    rho: float = 0.75
    verbose: bool = False
    n_classes: int = 10
    supported_mode = ("default",)
    _attack = OrthoAPGD
    _norms = ("Linf", "L2")

    def _options(self) -> dict[str, Any]:
        check_count("n_classes", classes := plain(self.n_classes))
        return {**super()._options(), "loss": "dlr", "targeted": f"each{max(1, classes - 1)}"}


@final
class FAB(_Seeded):
    """`orthattack.OrthoFAB` by torchattacks' arguments; `alpha_max`, `eta` and `beta` are as published.

    With `multi_targeted` it goes to one class at a time, the `n_classes` - 1 likeliest others.
    """

    steps: int = 10
    n_restarts: int = 1
    alpha_max: float = 0.1
    eta: float = 1.05
    beta: float = 0.9
    verbose: bool = False
    seed: int | None = 0
    multi_targeted: bool = False
    n_classes: int = 10
    supported_mode = ("default",)
    _attack = OrthoFAB
    _fixed = ("alpha_max", "eta", "beta")

    def _options(self) -> dict[str, Any]:
        check_count("n_classes", classes := plain(self.n_classes))
        return {**super()._options(), "targets": max(1, classes - 1) if self.multi_targeted else None}


@final
class Square(_Seeded):
    """`orthattack.OrthoSquare` by torchattacks' arguments; `n_restarts`, `p_init` and `resc_schedule` are as published.

    Args:
        n_queries: calls of the model per image.
        loss: "margin" or "ce".
    """

    n_queries: int = 5000
    n_restarts: int = 1
    p_init: float = 0.8
    loss: Literal["margin", "ce"] = "margin"
    resc_schedule: bool = True
    seed: int | None = 0
    verbose: bool = False
    _attack = OrthoSquare
    _losses = ("margin", "ce")
    _fixed = ("n_restarts", "p_init", "resc_schedule")


@final
class AutoAttack(_Seeded):
    """`orthattack.OrthoAutoAttack`, of 100 iterations a part as published, not 10, by torchattacks' arguments.

    Args:
        version: "standard", "plus" or "rand".
        n_classes: of the model, of which it is asked.
        verbose: print robust accuracy after each part.
    """

    version: Literal["standard", "plus", "rand"] = "standard"
    n_classes: int = 10
    seed: int | None = None
    verbose: bool = False
    supported_mode = ("default",)
    _attack = OrthoAutoAttack
    _draws = True

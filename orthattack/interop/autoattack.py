"""AutoAttack by the arguments, attributes and methods of the official code, done by our attacks.

Change the import and nothing else; the official code itself is not needed::

    from orthattack.interop.autoattack import AutoAttack

    adversary = AutoAttack(model, norm="Linf", eps=8/255, version="standard")
    x_adv = adversary.run_standard_evaluation(x_test, y_test, bs=250)

and, with one argument more, every perturbation is orthogonal: ``AutoAttack(model, eps=8/255, scope="image")``.

What differs: images outside [0, 1] are an error; a model that draws, or has no usable gradient, is warned of; the model
comes back in the mode it was in; the global random state is left alone but for one number when ``seed`` is None. What
`orthattack.AutoAttack` does differently (docs/attacks/autoattack.md) is different here.

Source: Croce & Hein 2020, arXiv:2003.01690, for the interface.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor, nn

from orthattack.arguments import check_choice, check_count, check_flag
from orthattack.attacks.auto import VERSIONS, OrthoAutoAttack, Part, Version, checked_parts
from orthattack.lending import borrowed, global_random_numbers
from orthattack.models import fooled
from orthattack.projection import Scope
from orthattack.threat import Norm, perturbation_norm

__all__ = ["AutoAttack"]

_NORMS: dict[str, Norm] = {"Linf": "linf", "L2": "l2", "L1": "l1"}


@dataclass
class Settings:
    """Of one attack, to be set at any time.

    Attributes:
        n_restarts: random starts of APGD and FAB.
        n_iter: gradient steps.
        n_target_classes: how many of the likeliest other classes to try.
        n_queries: evaluations by Square.
        eot_iter: passes to average for a model that draws.
    """

    n_restarts: int = 1
    n_iter: int = 100
    n_target_classes: int = 9
    n_queries: int = 5000
    eot_iter: int = 1


class AutoAttack:
    """The official code's evaluation: each part on what the parts before have left.

    Args:
        model: images (N, C, H, W) in [0, 1] to logits (N, K).
        norm: "Linf", "L2" or "L1".
        eps: radius in pixel units.
        seed: of the random numbers of each part; None: a new one for each, from torch's.
        verbose: print what comes out, as it comes.
        attacks_to_run: with ``version="custom"``, the parts and their order: "apgd-ce", "apgd-dlr", "apgd-t", "fab",
            "fab-t", "square".
        version: "standard", "plus", "rand" or "custom".
        is_tf_model: only False.
        device: where images are moved to before they are attacked; by default where the model is.
        log_path: a file that what is printed is added to.
        scope: makes perturbations orthogonal to the image: "image", "channel" or "pixel".

    Attributes:
        attacks_to_run: the parts, which may be set.
        apgd, apgd_targeted, fab, square: settings of the attacks, such as ``apgd.n_restarts``, which may be set.

    Raises:
        ValueError: an argument outside these.
    """

    def __init__(
        self,
        model: nn.Module,
        norm: str = "Linf",
        eps: float = 0.3,
        seed: int | None = None,
        verbose: bool = True,
        attacks_to_run: Sequence[Part] = (),
        version: str = "standard",
        is_tf_model: bool = False,
        device: torch.device | str | None = None,
        log_path: str | Path | None = None,
        *,
        scope: Scope | None = None,
    ) -> None:
        check_choice("norm", norm, tuple(_NORMS))
        check_choice("version", version, (*get_args(Version), "custom"))
        check_flag("verbose", verbose)
        if is_tf_model:
            raise ValueError("is_tf_model must be False: models are torch's")
        if version == "custom":
            checked_parts(attacks_to_run)
        elif len(attacks_to_run) > 0:
            raise ValueError(f"attacks_to_run needs version='custom': version={version!r} has parts of its own")
        self.model, self.norm, self.epsilon, self.seed, self.verbose = model, norm, eps, seed, verbose
        self.version, self.log_path, self.scope = version, log_path, scope
        parameter = next(model.parameters(), None) if isinstance(model, nn.Module) else None
        self.device = device if device is not None else None if parameter is None else parameter.device
        self.attacks_to_run: list[Part] = list(attacks_to_run)
        self.apgd, self.fab = Settings(n_restarts=5), Settings(n_restarts=5)
        self.apgd_targeted, self.square = Settings(), Settings()
        self.set_version(version)
        self._attack("apgd-ce")  # refuses a wrong option now, not at the first call

    def set_version(self, version: str = "standard") -> None:
        """Take the parts and settings of a version; "custom" leaves them as they are."""
        check_choice("version", version, (*get_args(Version), "custom"))
        self.version = version
        for known, parts in VERSIONS.items():
            if version == known:
                self.attacks_to_run = list(parts)
        if version == "standard":
            self.apgd.n_restarts, self.fab.n_restarts = 5 if self.norm == "L1" else 1, 1
        elif version == "plus":
            self.apgd.n_restarts = self.fab.n_restarts = 5
        elif version == "rand":
            self.apgd.n_restarts, self.apgd.eot_iter = 1, 20

    def run_standard_evaluation(
        self, x_orig: Tensor, y_orig: Tensor, bs: int = 250, return_labels: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The best adversarial image of each sample, the image itself where it is misclassified or nothing fools.

        Args:
            x_orig: (N, C, H, W), in [0, 1].
            y_orig: (N,) the true classes.
            bs: how many images are attacked at a time.
            return_labels: return what the model predicts for them, too.

        Raises:
            ValueError: images or labels of the wrong kind (the message says what and where).
        """
        check_count("bs", bs)
        parts = checked_parts(self.attacks_to_run)
        self._say(f"AutoAttack, version {self.version}: {', '.join(parts)}")
        began, adversarials = time.perf_counter(), x_orig.clone()
        robust = ~self._fooled(x_orig, y_orig, bs)
        self._tell("clean accuracy", robust)
        for part in parts:
            rows = robust.nonzero().squeeze(1)
            if len(rows) == 0:
                self._say(f"nothing is left for {part}")
                break
            for number, chosen in enumerate(chunks := torch.split(rows, bs), 1):
                x, y = self._placed(x_orig[chosen]), self._placed(y_orig[chosen])
                result = self._attack(part).run(x, y)
                fallen = chosen[result.success.to(chosen.device)]
                adversarials[fallen] = result.adversarials[result.success].to(adversarials)
                robust[fallen] = False
                if len(chunks) > 1:
                    self._say(f"{part}, batch {number} of {len(chunks)}: {len(fallen)} of {len(chosen)} fooled")
            self._tell(f"robust accuracy after {part.upper()}", robust, time.perf_counter() - began)
        norm = perturbation_norm(adversarials.double() - x_orig.double(), _NORMS[self.norm])
        self._say(f"largest perturbation: {float(norm.max()) if len(norm) > 0 else 0.0:.5f} in {self.norm}")
        self._tell("robust accuracy", robust)
        return (adversarials, self._predicted(adversarials, bs).to(y_orig)) if return_labels else adversarials

    def run_standard_evaluation_individual(
        self, x_orig: Tensor, y_orig: Tensor, bs: int = 250, return_labels: bool = False
    ) -> dict[str, Tensor | tuple[Tensor, Tensor]]:
        """What each part finds alone, on all samples: arguments as for `run_standard_evaluation`, results by part."""
        parts, verbose, found = self.attacks_to_run, self.verbose, {}
        try:
            for part in checked_parts(parts):
                began, self.attacks_to_run, self.verbose = time.perf_counter(), [part], False
                found[str(part)] = self.run_standard_evaluation(x_orig, y_orig, bs, return_labels)
                self.verbose, first = verbose, found[str(part)]
                fallen = self._fooled(first if isinstance(first, Tensor) else first[0], y_orig, bs)
                self._tell(f"robust accuracy by {part.upper()}", ~fallen, time.perf_counter() - began)
        finally:
            self.attacks_to_run, self.verbose = parts, verbose
        return found

    def clean_accuracy(self, x_orig: Tensor, y_orig: Tensor, bs: int = 250) -> float:
        """The share of images (N, C, H, W) that are classified as they should be, (N,)."""
        right = ~self._fooled(x_orig, y_orig, bs)
        self._tell("clean accuracy", right)
        return float(right.double().mean())

    def get_logits(self, x: Tensor) -> Tensor:
        """The model's logits (N, K)."""
        return self.model(x)  # type: ignore[no-any-return]

    def get_seed(self) -> int:
        """The seed of the next part's random numbers."""
        if self.seed is not None:
            return self.seed
        with global_random_numbers:
            return int(torch.randint(2**62, ()))

    def _attack(self, part: Part) -> OrthoAutoAttack:
        apgd = self.apgd_targeted if part == "apgd-t" else self.fab if part in ("fab", "fab-t") else self.apgd
        return OrthoAutoAttack(
            self.model, _NORMS[self.norm], self.epsilon, apgd.n_iter, apgd.n_target_classes, self.square.n_queries,
            parts=[part], restarts=apgd.n_restarts, eot_samples=apgd.eot_iter, scope=self.scope,
            generator=torch.Generator().manual_seed(self.get_seed()),
        )  # fmt: skip

    def _placed(self, tensor: Tensor) -> Tensor:
        return tensor if self.device is None else tensor.to(self.device)

    def _fooled(self, x: Tensor, y: Tensor, bs: int) -> Tensor:
        parts = range(0, max(len(x), 1), bs)
        each = [
            fooled(self.model, self._placed(x[k : k + bs]), self._placed(y[k : k + bs]), batch_size=bs) for k in parts
        ]
        return torch.cat(each).to(x.device)

    def _predicted(self, x: Tensor, bs: int) -> Tensor:
        with borrowed(self.model, self._placed(x[:0]).device) as lent:
            return torch.cat([lent(self._placed(part)).argmax(1).to(x.device) for part in torch.split(x, bs)])

    def _tell(self, what: str, held: Tensor, taken: float | None = None) -> None:
        share = float(held.double().mean()) if len(held) > 0 else 0.0
        time_taken = "" if taken is None else f", {taken:.1f} s"
        self._say(f"{what}: {share:.2%} ({int(held.sum())} of {len(held)}{time_taken})")

    def _say(self, line: str) -> None:
        if self.verbose:
            print(line, flush=True)  # noqa: T201
            if self.log_path is not None:
                with Path(self.log_path).open("a", encoding="utf-8") as log:
                    log.write(line + "\n")

"""The command line. Nothing heavy is imported before the arguments are understood."""

from __future__ import annotations

import argparse
import math
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from orthattack import __version__

if TYPE_CHECKING:
    from orthattack.eval.attacks import Settings
    from orthattack.eval.data import Photographs
    from orthattack.eval.models import Classifier
    from orthattack.eval.run import Evaluation

__all__ = ["main"]

_EPILOG = """\
with no options: the two bundled CIFAR-10 models on 20 photographs at eps 8/255, offline, in under a minute

examples:
  orthattack eval
  orthattack eval --model resnet50 --data imagenet/val --limit 1000
  orthattack eval --model resnet50 --data imagenet-samples
  orthattack eval --model resnet18 --weights my.safetensors --data photos --labels labels.csv --eps 2/255
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 2 something to put right first, 130 interrupted."""
    options = _parser().parse_args(arguments)
    try:
        from orthattack.eval.models import EvaluationError

        try:
            return _evaluate(options)
        except EvaluationError as error:
            print(f"orthattack: {error}", file=sys.stderr)
            return 2
    except KeyboardInterrupt:
        print("orthattack: interrupted before anything was measured", file=sys.stderr)
        return 130
    except BrokenPipeError:  # whoever reads the table has seen enough; the results are in the folder
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="orthattack", description="Adversarial attacks whose perturbation is kept orthogonal to the image."
    )
    parser.add_argument("--version", action="version", version=f"orthattack {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    evaluate = commands.add_parser(
        "eval",
        help="attack a model on photographs and tabulate robust accuracy beside Foolbox's attacks",
        description="Attack models on photographs; print one table and write results and a picture.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = evaluate.add_argument
    add("--model", action="append", metavar="NAME", help="torchvision classifier, or a bundled model; may be repeated")
    add("--weights", type=Path, metavar="FILE", help="state dict (.safetensors or PyTorch) instead of a download")
    add("--data", metavar="DIR", help="folder of class folders, imagenet-samples, or cifar10-samples")
    add("--labels", type=Path, metavar="CSV", help="columns file and label, for folders that are not the class list")
    add("--image-size", type=_count, metavar="N", help="pixels of the model's input, if not the weights' own")
    add("--attacks", nargs="+", metavar="NAME", help="which attacks to run, of: " + ", ".join(_ATTACK_NAMES))
    add("--norm", choices=("linf", "l2"), default="linf", help="norm of the perturbation (default: linf)")
    add("--eps", type=_fraction, metavar="E", help="radius in [0, 1] pixels, such as 4/255 (default: 4/255, l2: 0.5)")
    add("--steps", type=_count, default=10, metavar="N", help="steps of the iterative attacks (default: 10)")
    add("--batch-size", type=_count, default=32, metavar="N", help="images at a time (default: 32)")
    add("--device", metavar="D", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    add("--seed", type=_whole, default=0, metavar="N", help="seed of the random starts (default: 0)")
    add("--limit", type=_count, metavar="N", help="only N photographs, evenly spaced")
    add("--out", type=Path, metavar="DIR", help="folder for the results (default: runs/DATE-TIME)")
    return parser


# Spelled out, since the module that has them imports torch.
_ATTACK_NAMES = (
    *(
        f"{form}{name}"
        for name in ("FGSM", "PGD", "MIFGSM", "NIFGSM", "APGD", "AutoAttack", "Square")
        for form in ("", "Ortho")
    ),
    "OrthoPGD-gradient",
    "Foolbox-FGSM",
    "Foolbox-PGD",
)


def _count(text: str) -> int:
    value = _whole(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1; got {text}")
    return value


def _whole(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a whole number; got {text!r}") from None
    if abs(value) >= 2**63:
        raise argparse.ArgumentTypeError(f"must be below 2**63; got {text}")
    return value


def _fraction(text: str) -> float:
    numerator, slash, denominator = text.partition("/")
    try:
        value = float(numerator) / (float(denominator) if slash else 1)
    except (ValueError, ZeroDivisionError):
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"must be a number or a fraction such as 4/255; got {text!r}")
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0; got {text}")
    return value


def _evaluate(options: argparse.Namespace) -> int:
    from orthattack.eval.models import BUNDLED, EvaluationError, check_name, load_classifier

    names = list(dict.fromkeys(options.model or BUNDLED))
    for name in names:
        check_name(name)
    if options.weights is not None and len(names) != 1:
        raise EvaluationError("--weights goes with one --model, the architecture of the weights")
    others = [name for name in names if name not in BUNDLED]
    data = options.data or (None if others else "cifar10-samples")
    if data is None:
        raise EvaluationError(f"--model {others[0]} needs --data: a folder of class folders, or imagenet-samples")
    settings = _settings(options, bundled=not others)
    attacks = _attacks(options.attacks)
    device = _device(options.device)
    out = _folder(options.out)

    from orthattack.eval.data import check_data, load_photographs
    from orthattack.eval.run import evaluate

    check_data(data)
    classifiers = [load_classifier(name, options.weights, options.image_size) for name in names]
    pairs: list[tuple[Classifier, Photographs]] = [
        (classifier, load_photographs(data, classifier, options.labels).limited(options.limit))
        for classifier in classifiers
    ]
    try:
        while options.out is None and out.exists():  # another run has started in the same second
            out = out.with_name(out.name + "-2")
        out.mkdir(parents=True, exist_ok=True)
        (out / "images.jsonl").touch()
        (out / "images.jsonl").unlink()
    except OSError as error:
        raise EvaluationError(f"could not make the results folder {out} ({error})") from error
    evaluation = evaluate(pairs, attacks, settings, out=out, batch_size=options.batch_size, device=device)
    return _tell(evaluation, out)


def _settings(options: argparse.Namespace, bundled: bool) -> Settings:
    from orthattack.eval.attacks import Settings
    from orthattack.eval.models import EvaluationError

    eps = options.eps
    if eps is None:
        eps = 0.5 if options.norm == "l2" else 8 / 255 if bundled else 4 / 255
    if options.norm == "linf" and eps > 1:
        raise EvaluationError(f"--eps is in units of [0, 1] pixels; got {eps:g}: did you mean {eps:g}/255?")
    return Settings(options.norm, eps, options.steps, options.seed)


def _attacks(names: list[str] | None) -> list[str]:
    from orthattack.eval.attacks import ATTACKS, DEFAULT_ATTACKS
    from orthattack.eval.models import EvaluationError

    known = {name.casefold(): name for name in ATTACKS}
    unknown = [name for name in names or [] if name.casefold() not in known]
    if unknown:
        raise EvaluationError(f"unknown attack {unknown[0]!r}; there are {', '.join(ATTACKS)}")
    return list(dict.fromkeys(known[name.casefold()] for name in names or DEFAULT_ATTACKS))


def _device(name: str | None) -> str:
    import torch

    from orthattack.eval.models import EvaluationError

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise EvaluationError(f"--device {name} cannot be used here ({str(error).splitlines()[0]})") from error
    return name


def _folder(chosen: Path | None) -> Path:
    from orthattack.eval.models import EvaluationError

    out = chosen or Path("runs") / datetime.now().strftime("%Y%m%d-%H%M%S")
    try:
        taken = chosen is not None and out.exists() and (not out.is_dir() or any(out.iterdir()))
    except OSError as error:
        raise EvaluationError(f"could not look into --out {out} ({error})") from error
    if taken:
        raise EvaluationError(f"--out {out} exists and is not an empty folder; choose another")
    return out


def _tell(evaluation: Evaluation, out: Path) -> int:
    from orthattack.eval.models import EvaluationError
    from orthattack.eval.report import save_picture, table

    scored = any(result.names for result in evaluation.results)
    tried = scored or any(result.unscored for result in evaluation.results)
    if evaluation.complete and evaluation.unreadable and not tried:
        name, reason = next(iter(evaluation.unreadable.items()))
        raise EvaluationError(f"none of the photographs could be read, the first, {name}, because of {reason}")
    for model in dict.fromkeys(example.model for example in evaluation.examples):
        save_picture([e for e in evaluation.examples if e.model == model], out / f"examples-{model}.png")
    print(table(evaluation))
    print(f"results and pictures: {out}", flush=True)
    if evaluation.complete and not scored:
        print("orthattack: no attack returned anything that could be scored", file=sys.stderr)
        return 2
    if not evaluation.complete:
        print("orthattack: interrupted; what was measured until then is kept", file=sys.stderr)
        return 130
    return 0

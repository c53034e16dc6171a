"""What an evaluation tells: a table for the terminal and a picture."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from tabulate import tabulate
from torch import Tensor

from orthattack.eval.attacks import Settings
from orthattack.eval.metrics import DEFINITIONS, Rate
from orthattack.eval.run import Evaluation, Example, Result

__all__ = ["save_picture", "table"]


def table(evaluation: Evaluation) -> str:
    """One row per model and attack, with what the columns mean below."""
    settings = evaluation.settings
    head = [
        "model",
        "attack",
        "clean",
        "robust acc. [95 %]",
        "success",
        "norm",
        "mean |cos|",
        "max |cos|",
        "grads",
        "s",
    ]
    rows = [_row(result, settings) for result in evaluation.results]
    counts = [len(result.names) for result in evaluation.results]
    if len(set(counts)) > 1:  # only then is it worth a column
        head.insert(2, "images")
        for row, count in zip(rows, counts, strict=True):
            row.insert(2, str(count))
    images = max(counts, default=0)
    eps = f"{255 * settings.eps:.4g}/255" if settings.norm == "linf" else f"{settings.eps:.4g}"
    norm = "L-infinity" if settings.norm == "linf" else "L2"
    notes = [
        f"{'' if evaluation.complete else 'INTERRUPTED: '}{images} images of {evaluation.data}, {norm}, eps {eps}, "
        f"{settings.steps} steps, seed {settings.seed}",
        *DEFINITIONS.split("; "),
        "norm: mean over the images; cos: between perturbation and image; grads: gradient calls per image",
    ]
    notes += [
        f"{result.attack} on {result.model}: {result.unscored} images not scored, left out ({'; '.join(result.errors)})"
        for result in evaluation.results
        if result.unscored
    ]
    notes += [
        f"{result.attack} on {result.model} leaves the eps-ball: largest norm {max(result.norm):.6g}"
        for result in evaluation.results
        if result.norm and max(result.norm) > settings.eps * (1 + 1e-5)
    ]
    if evaluation.unreadable:
        count = len(evaluation.unreadable)
        notes.append(f"{count} photograph{'s were' if count > 1 else ' was'} left out, unreadable:")
        notes += [f"  {_printable(f'{name} ({reason})')}" for name, reason in list(evaluation.unreadable.items())[:10]]
        notes += [f"  and {count - 10} more, see results.json"] * (count > 10)
    body = tabulate(rows, head, tablefmt="simple", stralign="right", disable_numparse=True, colalign=("left", "left"))
    return "\n".join([body, "", *notes])


def _printable(text: str) -> str:
    """`text` on one line, whatever characters a file's name may hold."""
    return "".join(c if c.isprintable() and c.isascii() else ascii(c)[1:-1] for c in text)


def _row(result: Result, settings: Settings) -> list[str]:
    summary = result.summary()
    scale, unit = (255.0, "/255") if settings.norm == "linf" else (1.0, "")

    def number(key: str, form: str, factor: float = 1.0, suffix: str = "") -> str:
        value = summary[key]
        return "-" if value is None else f"{factor * value:{form}}{suffix}"

    return [
        result.model,
        result.attack,
        _percent(result.clean_accuracy),
        f"{_percent(result.robust_accuracy)} {_interval(result.robust_accuracy)}",
        _percent(result.success_rate),
        number("mean_norm", ".3f", scale, unit),
        number("mean_abs_cosine", ".1e"),
        number("max_abs_cosine", ".1e"),
        number("gradient_calls_per_image", ".3g"),
        f"{result.seconds:.1f}",
    ]


def _percent(rate: Rate) -> str:
    return "-" if rate.value is None else f"{100 * rate.value:.1f} %"


def _interval(rate: Rate) -> str:
    interval = rate.interval()
    return "" if interval is None else f"[{100 * interval[0]:.1f}, {100 * interval[1]:.1f}]"


def save_picture(examples: list[Example], path: Path) -> None:
    """Clean image, magnified perturbation and adversarial image of each example, one column each.

    All perturbations are magnified by the same factor, which makes the largest entry among them reach black or white;
    grey is no change. A prediction in red is one that the perturbation has changed.
    """
    largest = max(float((example.adversarial - example.clean).abs().max()) for example in examples)
    factor = 0.5 / largest if largest > 0 else 1.0
    size = 1.5
    figure = Figure(figsize=(max(size * len(examples), 3.0) + 1.0, 3 * size + 1.1), layout="constrained")
    first = examples[0]
    figure.suptitle(f"{first.attack} on {first.model}")
    axes = figure.subplots(3, len(examples), squeeze=False)
    for column, example in enumerate(examples):
        delta = example.adversarial - example.clean
        panels = (example.clean, 0.5 + factor * delta, example.adversarial)
        # What the model says; the label is named only where the model is wrong about the clean image.
        wrong = f"\n(is: {example.label})" if example.clean_prediction != example.label else ""
        captions = (example.clean_prediction + wrong, "", example.adversarial_prediction)
        for axis, panel, caption in zip(axes[:, column], panels, captions, strict=True):
            axis.imshow(_pixels(panel), interpolation="nearest")
            axis.set_xlabel(_short(caption), fontsize=8, parse_math=False)
            axis.set_xticks([])
            axis.set_yticks([])
        if example.adversarial_prediction != example.clean_prediction:
            axes[2, column].xaxis.label.set_color("firebrick")
    for axis, label in zip(axes[:, 0], ("clean", f"perturbation\n× {factor:.3g}", "adversarial"), strict=True):
        axis.set_ylabel(label)
    figure.savefig(path, dpi=130)


def _pixels(image: Tensor) -> Any:
    return image.clamp(0, 1).movedim(0, -1).numpy()


def _short(caption: str) -> str:
    return "\n".join(line if len(line) <= 18 else line[:17] + "…" for line in caption.split("\n"))

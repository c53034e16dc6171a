"""The command line. Nothing heavy is imported before the arguments are understood."""

from __future__ import annotations

import argparse
import io
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin

from orthattack import __version__
from orthattack.eval.errors import EvaluationError, out_of_memory, printable, say, told

if TYPE_CHECKING:
    from orthattack.eval.results.stored_run import Run
    from orthattack.eval.running.worker import Inputs
    from orthattack.eval.storage.run_folder import RunFolder
    from orthattack.eval.suite import Suite

_EPILOG = """\
with no options: two bundled CIFAR-10 models on 20 images at eps 8/255, offline, in about a minute

examples:
  orthattack eval
  orthattack eval --model resnet50 --data imagenet/val --limit 1000 --out runs/resnet50
  orthattack eval --model resnet50 --data imagenet-samples --eps 1/255 2/255 4/255
  orthattack eval --model resnet50 vit_b_16 --data imagenet/val --limit 1000 --clean-only
  orthattack eval --model resnet18 --weights my.safetensors --data photos --labels labels.csv
  orthattack eval --attacks OrthoPGD,steps=50 torchattacks:APGD,steps=50 foolbox:LinfPGD
  orthattack eval benchmark.toml

The same command, with a suite or --out, resumes an earlier one. Several processes share the work with
--shard 1/2, --shard 2/2, or with --engine ray: see docs/how-to/cluster.md.

exit codes: 0 done; 1 done, but nothing could be scored; 2 something to fix first; 130 interrupted: finished
work is kept
"""


def main(arguments: list[str] | None = None) -> int:
    """Run the command line; returns the exit code, see the end of its help."""
    for stream in (sys.stdout, sys.stderr):  # which LANG=C lets have ASCII only, and names may have anything
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    options = _parser().parse_args(arguments)
    options.arguments, options.resume = sys.argv[1:] if arguments is None else arguments, ""
    try:
        try:
            code: int = options.run(options)
        except BrokenPipeError:
            raise
        except (EvaluationError, OSError) as error:  # of disks and stores, wherever they fail
            print(f"orthattack: {printable(str(error))}", file=sys.stderr)
            return 2
        except Exception as error:
            if not out_of_memory(error):
                raise
            sys.unraisablehook = _unless_out_of_memory  # libraries' exit handlers run short too
            print(
                f"orthattack: out of memory ({printable(told(error))}): what is finished is kept; give it more memory, "
                "and start again with the same command",
                file=sys.stderr,
            )
            return 2
        return code
    except KeyboardInterrupt:
        return _stopped(options.resume)
    except BrokenPipeError:  # whoever reads the table has seen enough; the results are in the folder
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _unless_out_of_memory(unraisable: sys.UnraisableHookArgs) -> None:
    if not issubclass(unraisable.exc_type, MemoryError):
        sys.__unraisablehook__(unraisable)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="orthattack", description="Adversarial attacks whose perturbation is kept orthogonal to the image."
    )
    parser.add_argument("--version", action="version", version=f"orthattack {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")
    _add_eval(commands)
    report = commands.add_parser("report", help="write the report of a run again, finished or not, and print its table")
    report.add_argument("folder", metavar="RUN", help="the run's folder, or its URL")
    report.add_argument("--to", type=Path, metavar="DIR", help="write it there instead of into the run's folder")
    report.set_defaults(run=_report)
    compare = commands.add_parser("compare", help="compare two runs, or two models, image by image")
    compare.add_argument(
        "folders", nargs=2, metavar="RUN", help="the runs' folders, or URLs; RUN:MODEL is one model of it"
    )
    compare.set_defaults(run=_compare)
    transfer = commands.add_parser("transfer", help="have models judge the adversarial images of others in a run")
    transfer.add_argument("folder", metavar="RUN", help="the run's folder, or its URL; with --save-images all")
    transfer.add_argument("--model", nargs="+", metavar="NAME", help="the judges (default: all models of the run)")
    transfer.add_argument("--device", metavar="D", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    transfer.set_defaults(run=_transfer)
    models = commands.add_parser("models", help="list the classifiers that can be named, with their weights")
    models.add_argument("pattern", nargs="?", default="", help="only names that contain this")
    models.set_defaults(run=_models)
    attacks = commands.add_parser("attacks", help="list the attacks that can be named, with parameters and defaults")
    attacks.add_argument("pattern", nargs="?", default="", help="only names that contain this")
    attacks.set_defaults(run=_attacks)
    return parser


def _add_eval(commands: Any) -> None:
    evaluate = commands.add_parser(
        "eval",
        help="attack models on images, beside Foolbox's attacks, and write a report",
        description="Attack models on images; print a table and write a report. Resumes where it was stopped.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    evaluate.set_defaults(run=_evaluate)
    evaluate.add_argument("suite", nargs="?", type=Path, metavar="SUITE.toml", help="a benchmark, instead of the flags")
    _add_flags(evaluate.add_argument_group("what to run"))
    how = evaluate.add_argument_group("how to run it").add_argument
    how("--device", metavar="D", help="cpu, cuda, cuda:1 ... (default: cuda if there is one)")
    how("--engine", choices=("ray",), help="let Ray hand the work to many workers (extra ray)")
    how("--workers", type=_count, metavar="N", help="how many (default: one per GPU of the cluster, else per core)")
    how("--address", metavar="A", help="of a Ray cluster, or auto (default: one on this machine, for this run)")
    how("--clean-only", action="store_true", help="attack nothing: print each model's clean accuracy, by class too")
    how("--out", metavar="DIR", help="the run's folder, or s3://... (default: runs/DATE-TIME, or runs/SUITE)")
    how("--shard", type=_share, metavar="I/N", help="do only every N-th piece of the work, from the I-th on (1 to N)")


def _add_flags(group: Any) -> None:
    """The flags of a suite's keys."""
    from orthattack.eval.suite import KEYS

    for name, field in KEYS.items():
        about = field.json_schema_extra
        flag, _, metavar = (about["flag"] or "").partition(" ")
        if flag:
            known = field.default if isinstance(field.default, str | int | tuple) else None
            shown = " ".join(map(str, known)) if isinstance(known, tuple) else known
            default = "" if known is None or isinstance(known, bool) else f" (default: {shown})"
            more: dict[str, Any] = {"dest": name, "default": None, "help": f"{field.description}{default}"}
            more |= {"metavar": metavar} if metavar else {}
            if about["of"] is not None:
                is_choice = get_origin(about["of"]) is Literal
                more |= {"choices": get_args(about["of"])} if is_choice else {"type": _typed(about)}
            group.add_argument(flag, **more | about["argparse"])


def _typed(about: dict[str, Any]) -> Callable[[str], Any]:
    """What reads a value of a flag, or refuses it."""
    from pydantic import TypeAdapter, ValidationError

    from orthattack.eval.suite import wrong

    def read(text: str) -> Any:
        try:
            return TypeAdapter(about["of"]).validate_python(_value(text))
        except ValidationError as error:
            several = ": several stand apart, with spaces" if "," in text and "nargs" in about["argparse"] else ""
            raise argparse.ArgumentTypeError(wrong(error.errors()[0], about["accepted"]) + several) from None

    return read


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number, at least 1; got {text!r}")
    return int(text)


def _share(text: str) -> tuple[int, int]:
    first, slash, count = text.partition("/")
    if not (slash and first.isdecimal() and count.isdecimal() and 1 <= int(first) <= int(count)):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 1 to N, such as 1/4 to 4/4; got {text!r}")
    return int(first), int(count)


def _evaluate(options: argparse.Namespace) -> int:
    from orthattack.eval.suite import read_suite

    suite = _from_flags(options)
    if suite is None:
        suite = read_suite(options.suite)
    if options.engine is None and (options.workers is not None or options.address is not None):
        raise EvaluationError("--workers and --address go with --engine ray")
    if options.engine is not None and options.shard is not None:
        raise EvaluationError("--shard is for processes that share the work without --engine")
    from orthattack.eval.api import run_folder
    from orthattack.eval.running.run import suite_inputs

    source = suite_inputs(suite)
    if options.clean_only:
        return _clean_only(options, suite, source)
    if options.shard is not None and options.out is None and options.suite is None:
        raise EvaluationError("--shard needs --out, the folder that all shards share")
    folder = run_folder(options.out, None if options.suite is None else options.suite.stem, say)
    options.resume = _again(options, folder)
    # Stop in order, as by Ctrl-C. Not by way of SIGINT, which a shell lets its background jobs ignore.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _carry_out(options, suite, source, folder)
    finally:  # as Python ends, nothing would catch an interrupt any more
        signal.signal(signal.SIGTERM, before)


def _clean_only(options: argparse.Namespace, suite: Suite, source: Inputs) -> int:
    from orthattack.eval.report.text import clean_text
    from orthattack.eval.running.clean import clean

    for name in ("engine", "shard", "out"):
        if getattr(options, name) is not None:
            raise EvaluationError(f"--clean-only computes here, and writes nothing: leave out --{name}")
    for k, found in enumerate(clean(suite, source, _device(options.device))):
        print("\n" * bool(k) + clean_text(found), flush=True)
    return 0


def _carry_out(options: argparse.Namespace, suite: Suite, source: Inputs, folder: RunFolder) -> int:
    """Do what is left of a run, and tell of it."""
    from orthattack.eval.running.run import run_suite

    with ExitStack() as stack:
        crew = None
        if options.engine is not None:
            from orthattack.eval.running.ray import ray_crew

            crew = stack.enter_context(ray_crew(options.address, options.workers, options.device))
        complete = run_suite(
            suite,
            source,
            folder,
            device=_device(options.device) if crew is None else crew.device,
            share=options.shard,
            engine=crew,
            command=sys.argv,
            say=say,
        )
        if not complete:
            say("stopping, writing the report")
    if options.shard is not None and complete and folder.manifest()["status"] != "complete":
        i, n = options.shard
        print(f"shard {i}/{n} is done; the last of the {n}, or the command without --shard, completes {folder}")
        return 0
    from orthattack.eval.report.text import reported, reported_once

    if complete:
        return _tell(reported_once(folder))
    _show(reported(folder))
    return _stopped(options.resume)


def _again(options: argparse.Namespace, folder: RunFolder) -> str:
    """The command that resumes a run, as one pastes it."""
    path = Path(sys.argv[0])
    program = [sys.executable, "-m", "orthattack"]
    if path.name.startswith("orthattack"):  # the installed script
        program = [path.name if shutil.which(path.name) == sys.argv[0] else sys.argv[0]]
    is_named = options.out is not None or options.suite is not None
    return shlex.join([*program, *options.arguments, *([] if is_named else ["--out", str(folder)])])


def _stopped(resume: str) -> int:
    """Say that the run was interrupted, and how it goes on; returns the exit code."""
    print("orthattack: interrupted" + (f"; to resume:\n{resume}" if resume else ""), file=sys.stderr)
    return 130


def _from_flags(options: argparse.Namespace) -> Suite | None:
    """The suite that the flags describe, or None if they name a file."""
    from orthattack.eval.models import BUNDLED
    from orthattack.eval.suite import KEYS, DataSpec, make_suite

    given = {name: value for name in KEYS if (value := getattr(options, name, None)) is not None}
    if options.suite is not None:
        if given:
            flag = KEYS[next(iter(given))].json_schema_extra["flag"].partition(" ")[0]
            if options.suite.suffix != ".toml" and not options.suite.is_file():
                raise EvaluationError(
                    f"{options.suite} stands alone, so it was taken for a suite, and there is no such file: what it "
                    "belongs to takes one value; a name with spaces needs quotes"
                )
            raise EvaluationError(f"{flag} goes into the suite: beside {options.suite} only --out and --device")
        return None
    names = list(dict.fromkeys(given.pop("name", BUNDLED)))
    suites = [name for name in names if name.endswith(".toml")]
    if suites:
        raise EvaluationError(
            f"{suites[0]} is a suite, not a model: put the models into it, as [[models]] with a name each, and run "
            f"orthattack eval {suites[0]}"
        )
    if "weights" in given and len(names) != 1:
        raise EvaluationError(
            f"--weights goes with one --model, the architecture of the weights; got {len(names)}: for several put them "
            "into a suite, each as [[models]] with name and weights"
        )
    about = {key: given.pop(key) for key in ("weights", "image_size") if key in given}
    data = {key: given.pop(key) for key in DataSpec.model_fields if key in given}
    others = [name for name in names if name not in BUNDLED]
    if others and "source" not in data:
        raise EvaluationError(f"--model {others[0]} needs --data: a folder of class folders, or imagenet-samples")
    if "attacks" in given:
        given["attacks"] = [_attack(text) for text in given["attacks"]]
    models = [{"name": name, **about} for name in names]
    return make_suite({"models": models, "data": {"source": "cifar10-samples", **data}, **given}, "options")


def _attack(text: str) -> dict[str, Any]:
    """An attack of the command line, NAME,key=value,..., as a table of a suite."""
    name, *pairs = text.split(",")
    if "=" in name:
        raise EvaluationError(
            f"--attacks: {text} stands alone; options follow an attack's name and a comma: PGD,{text}"
        )
    table: dict[str, Any] = {"name": name, "label": text}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or key in ("name", "label", "baselines", ""):
            raise EvaluationError(f"--attacks {text}: options are key=value, such as {name},steps=50; got {pair!r}")
        table[key] = _value(value)
    return table


def _value(text: str) -> Any:
    """A number, true, false or text; fractions are left to whoever knows that a number is meant."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    with suppress(ValueError):
        return int(text)
    with suppress(ValueError):
        return float(text)
    return text


def _device(name: str | None) -> str:
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()
    except (RuntimeError, AssertionError) as error:
        raise EvaluationError(f"--device {name} cannot be used here ({str(error).splitlines()[0]})") from error
    return name


def _tell(run: Run, to: Path | None = None) -> int:
    """Print the table of a run that has been reported; returns the exit code."""
    scored = [row["scored"] for view in _show(run, to) for row in view.table().to_dict("records")]
    if scored and not any(count > 0 for count in scored):
        print("orthattack: no attack returned anything that could be scored", file=sys.stderr)
        return 1
    return 0


def _show(run: Run, to: Path | None = None) -> list[Run]:
    """Print the table of a run, and where its report is; returns the run, seen in each norm."""
    from orthattack.eval.report.text import leaderboard_table

    views = [run, *map(run.in_norm, run.other_norms)]
    print(leaderboard_table(*views))
    print(f"\nreport: {to or run.folder}/report.html", flush=True)
    return views


def _report(options: argparse.Namespace) -> int:
    from orthattack.eval.report.text import reported
    from orthattack.eval.storage.run_folder import RunFolder

    return _tell(reported(RunFolder(options.folder, say), options.to), options.to)


def _compare(options: argparse.Namespace) -> int:
    from orthattack.eval.report.text import compare
    from orthattack.eval.results.comparison import opened

    print(compare(*map(opened, options.folders)))
    return 0


def _transfer(options: argparse.Namespace) -> int:
    from orthattack.eval.api import transfer
    from orthattack.eval.report.text import transfer_table

    try:
        run = transfer(options.folder, options.model, device=_device(options.device))
    except KeyboardInterrupt:
        print("orthattack: interrupted; the same command resumes", file=sys.stderr)
        return 130
    print(f"{transfer_table(run)}\n\nreport: {run.folder}/report.html")
    return 0


def _models(options: argparse.Namespace) -> int:
    from tabulate import tabulate

    from orthattack.eval.models.torchvision import list_models

    rows = [
        [model["name"], model["source"], model["input_size"], ", ".join(_weights(model))]
        for model in list_models()
        if options.pattern.casefold() in model["name"].casefold()
    ]
    print(tabulate(rows, ["model", "from", "pixels", "--weights (* by default)"], "simple"))
    if not rows:
        raise EvaluationError(f"nothing has {options.pattern!r} in its name")
    return 0


def _weights(model: dict[str, Any]) -> list[str]:
    """The names of a model's weights as --weights takes them, the default one marked."""
    names = {name: name.rpartition(".")[2] for name in model["weights"]}
    return [short + "*" * (name == model["default_weights"]) for name, short in names.items()]


def _attacks(options: argparse.Namespace) -> int:
    from tabulate import tabulate

    from orthattack.attacks.base import GradientOptions
    from orthattack.eval.attacks.load import list_attacks

    listed = {attack["name"]: attack for attack in list_attacks()}
    shared = {k: v for k, v in listed["PGD"]["parameters"].items() if k in GradientOptions.__annotations__}
    rows = []
    for name, attack in listed.items():
        if options.pattern.casefold() not in name.casefold():
            continue
        said = shared if ":" not in name else {}
        own = [f"{k}={_short(v)}" for k, v in attack["parameters"].items() if k not in said or said[k] != v]
        needs = f"(needs {attack['needs']}: pip install {attack['needs']}) " if attack["needs"] else ""
        rows.append([name, " ".join(attack["norms"]), attack["goals"], needs + ", ".join(own)])
    widths = [None, None, None, 80] if rows else None  # of no rows, tabulate 0.9 refuses any
    print(tabulate(rows, ["attack", "norms", "goals", "parameters, as a run uses them"], "simple", maxcolwidths=widths))
    if any(":" not in row[0] for row in rows):
        print(f"\nOurs have in common: {', '.join(f'{key}={value}' for key, value in shared.items())}")
    if not rows and options.pattern.casefold().startswith("torchattacks") and not find_spec("torchattacks"):
        raise EvaluationError("torchattacks is not installed: pip install 'orthattack[torchattacks]'")
    if not rows:
        raise EvaluationError(f"nothing has {options.pattern!r} in its name")
    return 0


def _short(value: object) -> object:
    return f"{value:.4g}" if isinstance(value, float) else value

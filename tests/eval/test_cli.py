from __future__ import annotations

import contextlib
import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file

from orthattack.eval import cli
from orthattack.eval.results.stored_run import WORST, Run


def orthattack(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    command = [sys.executable, "-m", "orthattack", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, cwd=cwd)


def here(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command in this process, which has loaded what it needs."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([*map(str, arguments)])
    return subprocess.CompletedProcess(arguments, code, out.getvalue(), err.getvalue())


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The line that a refused command prints."""
    assert cli.main([*map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "Traceback" not in captured.err
    line = captured.err.strip()
    assert line.startswith("orthattack: ")
    return line.removeprefix("orthattack: ")


@pytest.mark.slow
def test_with_no_arguments_it_attacks_the_bundled_models_offline(tmp_path):
    done = orthattack("eval", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    expected = {
        "manifest.json",
        "checks.json",
        "classes.json",
        "confusion.json",
        "results.json",
        "results.csv",
        "results.md",
        "report.html",
    }
    assert {path.name for path in run.iterdir() if path.is_file()} == expected
    assert done.stdout.rstrip().endswith(f"report: runs/{run.name}/report.html")
    table = Run.open(run).table().set_index(["model", "attack"])
    assert len(table) == 2 * 8
    assert table.loc[("cifar10-standard", "OrthoPGD"), "robust_accuracy"] <= 0.1
    assert table.loc[("cifar10-robust", "OrthoPGD"), "robust_accuracy"] >= 0.2
    assert (table["scored"] == 20).all()
    for (_, attack), row in table.iterrows():
        if attack.startswith("Ortho"):
            assert row["max_abs_cosine"] <= 1e-6
        elif attack != WORST:
            assert row["max_abs_cosine"] > 1e-3
    checks = json.loads((run / "checks.json").read_text())
    assert len(checks) == 2 * 12
    assert [check for check in checks if check["status"] == "warned"] == []
    manifest = json.loads((run / "manifest.json").read_text())
    assert manifest["status"] == "complete"
    assert manifest["config"]["eps"] == [8 / 255]
    assert manifest["sessions"][0]["command"][1:] == ["eval"]
    again = orthattack("report", run)
    assert again.returncode == 0
    assert again.stdout.replace(str(run), f"runs/{run.name}") == done.stdout
    assert sorted(path.suffix for path in (run / "sessions").iterdir()) == [".json", ".lock"]


@pytest.mark.slow
def test_what_is_not_said_is_the_bundled_models_and_every_attack(tmp_path, monkeypatch):
    """The test above in small."""
    monkeypatch.chdir(tmp_path)
    done = here("eval", "--limit", 2, "--steps", 2, "--no-checks")
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert done.stdout.rstrip().endswith(f"report: runs/{run.name}/report.html")
    table = Run.open(run).table()
    assert len(table) == 2 * 8
    assert set(table["model"]) == {"cifar10-standard", "cifar10-robust"}
    assert table["max_abs_cosine"][table["attack"].str.startswith("Ortho")].max() <= 1e-6
    assert Run.open(run).manifest["config"]["eps"] == [8 / 255]


def test_a_folder_with_labels_and_a_weights_file_and_the_same_command_again(tmp_path):
    torch.manual_seed(0)
    save_file(torchvision.models.resnet18(num_classes=6).state_dict(), tmp_path / "w.safetensors")
    data = tmp_path / "data"
    data.mkdir()
    for k in range(5):
        Image.effect_noise((90, 70), 60 + 10 * k).convert("RGB").save(data / f"{k}.jpg")
    (data / "4.jpg").write_bytes((data / "4.jpg").read_bytes()[:300])
    (tmp_path / "labels.csv").write_text("file,wnid,label\n" + "".join(f"{k}.jpg,x,{k}\n" for k in range(5)))
    (tmp_path / "names.txt").write_text("3.jpg\n4.jpg\n0.jpg\n1.jpg\n")
    command = [
        *("eval", "--model", "resnet18", "--weights", tmp_path / "w.safetensors", "--data", data, "--image-size", 64),
        *("--labels", tmp_path / "labels.csv", "--subset", tmp_path / "names.txt", "--eps", "1/255", "2/255"),
        *("--attacks", "orthopgd", "foolbox:LinfPGD,steps=3", "OrthoPGD,enforce=gradient", "--attack-misclassified"),
        *("--steps", 2, "--batch-size", 3, "--device", "cpu", "--seed", 1, "--out", tmp_path / "run", "--no-checks"),
    ]
    done = here(*command)
    assert done.returncode == 0, done.stderr
    assert "left out of resnet18 by every attack: 1 x unreadable: " in done.stdout
    run = Run.open(tmp_path / "run")
    rows = run.rows("resnet18", "orthopgd", 2 / 255)
    assert rows["name"].tolist() == ["3.jpg", "4.jpg", "0.jpg", "1.jpg"]
    assert rows["status"].tolist()[1] == "unreadable"
    config = run.manifest["config"]
    assert (config["steps"], config["seeds"], config["eps"]) == (2, [1], [1 / 255, 2 / 255])
    assert run.attacks["foolbox:LinfPGD,steps=3"]["parameters"] == {"steps": 3}
    assert run.rows("resnet18", "foolbox:LinfPGD,steps=3", 2 / 255)["gradient_calls"].max() == 3
    assert run.models["resnet18"]["preprocessing"]["crop"] == 64
    again = here(*command)
    assert again.returncode == 0
    assert again.stdout == done.stdout
    assert len(Run.open(tmp_path / "run").manifest["sessions"]) == 2
    other = here(*command, "--steps", 3)
    assert other.returncode == 2
    assert "steps: 2 there, 3 now" in other.stderr


def test_l2(tmp_path):
    arguments = ["--model", "cifar10-robust", "--norm", "l2", "--limit", "4", "--steps", "3", "--no-checks"]
    attacks = ["PGD", "OrthoPGD", "foolbox:L2PGD"]
    assert cli.main(["eval", *arguments, "--attacks", *attacks, "--out", str(tmp_path / "r")]) == 0
    table = Run.open(tmp_path / "r").table()
    assert table["eps"].unique().tolist() == [0.5]
    assert (table["scored"] == 4).all()
    assert (table["max_norm"].dropna() <= 0.5 * (1 + 1e-5)).all()


def test_attacks_may_all_have_another_norm_than_the_suite(tmp_path, capsys):
    (tmp_path / "l2.toml").write_text(
        'models = ["cifar10-robust"]\nattacks = [{name = "FGSM", norm = "l2", eps = [0.5]}]\nchecks = false\n'
        '[data]\nsource = "cifar10-samples"\nlimit = 3\n'
    )
    assert cli.main(["eval", str(tmp_path / "l2.toml"), "--out", str(tmp_path / "r")]) == 0
    assert "norm l2, eps 0.5" in capsys.readouterr().out


def test_a_suite_file_names_its_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.toml").write_text(
        'models = ["cifar10-robust"]\nattacks = ["FGSM", {name = "foolbox:L2PGD", norm = "l2", eps = [0.5]}]\n'
        'checks = false\nsteps = 2\n[data]\nsource = "cifar10-samples"\nlimit = 3\n'
    )
    done = here("eval", "small.toml")
    assert done.returncode == 0, done.stderr
    run = tmp_path / "runs" / "small"
    assert {"report.html", "report-l2.html", "results.csv", "results-l2.csv"} <= {path.name for path in run.iterdir()}
    assert "1 attack, norm linf, eps 8/255" in done.stdout
    assert "1 attack, norm l2, eps 0.5" in done.stdout
    assert pd.read_csv(run / "results-l2.csv")["attack"].tolist() == ["foolbox:L2PGD", WORST]
    assert 'href="report-l2.html"' in (run / "report.html").read_text()
    assert 'href="report.html"' in (run / "report-l2.html").read_text()


def test_models_judge_the_adversarial_images_of_others(tmp_path, capsys):
    arguments = ["--attacks", "PGD", "--steps", "2", "--limit", "4", "--no-checks", "--save-images", "all"]
    assert cli.main(["eval", *arguments, "--out", str(tmp_path / "r")]) == 0
    capsys.readouterr()
    assert cli.main(["transfer", str(tmp_path / "r"), "--model", "cifar10-robust"]) == 0
    lines = capsys.readouterr().out.splitlines()
    places = [line.split()[2:4] for line in lines if line.startswith("PGD ")]
    assert places == [["cifar10-standard", "cifar10-robust"], ["cifar10-robust", "cifar10-robust"]]
    assert "unknown model" in refused(capsys, "transfer", tmp_path / "r", "--model", "nothing")
    assert "is not the folder of a run" in refused(capsys, "transfer", tmp_path)


def test_two_runs_are_compared(tmp_path, capsys):
    for name, steps in (("a", "1"), ("b", "5")):
        arguments = ["--model", "cifar10-robust", "--attacks", "PGD", "--steps", steps, "--limit", "6", "--no-checks"]
        assert cli.main(["eval", *arguments, "--out", str(tmp_path / name)]) == 0
    capsys.readouterr()
    assert cli.main(["compare", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    shown = capsys.readouterr().out
    assert "PGD" in shown
    assert "steps" in shown  # what differs in configuration
    assert "is not the folder of a run" in refused(capsys, "compare", tmp_path / "a", tmp_path)
    assert cli.main(["compare", f"{tmp_path}/a:cifar10-robust", f"{tmp_path}/b"]) == 0
    assert f"first: cifar10-robust: {tmp_path}/a" in capsys.readouterr().out
    assert "has no model 'x'; it has cifar10-robust" in refused(capsys, "compare", f"{tmp_path}/a:x", tmp_path / "b")


@pytest.mark.slow
def test_weights_that_cannot_be_used_at_that_size(capsys, tmp_path):
    save_file(torchvision.models.vit_b_16(num_classes=3, image_size=224).state_dict(), tmp_path / "w.safetensors")
    (tmp_path / "data").mkdir()
    arguments = ["--model", "vit_b_16", "--weights", tmp_path / "w.safetensors", "--image-size", 32]
    message = refused(capsys, "eval", *arguments, "--data", tmp_path / "data", "--out", tmp_path / "r")
    assert "vit_b_16 does not take images of 32x32: it takes 224x224: pass --image-size 224" in message


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet"], "--model resnet needs --data"),
        (["--model", "resnet", "--data", "."], "unknown model 'resnet'; did you mean"),
        (["--attacks", "CW"], "unknown attack 'CW'; "),
        (["--attacks", "PGD,steps"], "--attacks PGD,steps: options are key=value, such as PGD,steps=50; got 'steps'"),
        (["--attacks", "PGD", "PGD"], "two attacks are called 'PGD'"),
        (["--model", "resnet50"], "--model resnet50 needs --data: a folder of class folders, or imagenet-samples"),
        (["--eps", "8"], "eps is in units of [0, 1] pixels; got 8: did you mean 8/255?"),
        (["--weights", "w.pt"], "--weights goes with one --model, the architecture of the weights"),
        (["--data", "nowhere"], "data folder nowhere does not exist; it must be a folder or"),
        (["--model", "resnet50", "--data", "nowhere"], "data folder nowhere does not exist"),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used here"),
        (["--device", "toaster"], "--device toaster cannot be used here"),
        (["--model", "resnet18", "--weights", "none.pt", "--data", "."], "weights file none.pt does not exist"),
        (["--data", "imagenet-samples"], "has 10 classes, 0 to 9: is this the right model for imagenet-samples?"),
        (["none.toml"], "could not read the suite none.toml (No such file or directory)"),
        (["resnet50"], "could not read the suite resnet50 (No such file or directory): models are passed with --model"),
        (["--data", ".", "extra"], "extra stands alone, so it was taken for a suite, and there is no such file"),
        (["--model", "resnet18", "b.toml"], "b.toml is a suite, not a model: put the models into it, as [[models]]"),
        (["--model", "resnet18", "resnet50"], "--model resnet18 needs --data"),
        (["--model", "w.pt", "--data", "."], "'w.pt' is a weights file: pass --model ARCHITECTURE --weights w.pt"),
        (["--model", "my/net.py:f", "--data", "."], "is a Python file: name a function of it, --model my.net:f"),
        (
            ["--attacks", "PGD", "steps=3"],
            "steps=3 stands alone; options follow an attack's name and a comma: PGD,steps=3",
        ),
        (["--attacks", "foolbox:PGD,steps=x"], "attack foolbox:PGD: steps must be a whole number, at least 1; got 'x'"),
        (["none.toml", "--steps", "3"], "--steps goes into the suite: beside none.toml only --out and --device"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(capsys, tmp_path, arguments, message):
    line = refused(capsys, "eval", *arguments, "--out", tmp_path / "r")
    assert message in line
    assert "\n" not in line


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("EADL1", "torchattacks:EADL1 works in l1, not in linf: choose --norm l1"),
        ("JSMA", "torchattacks:JSMA works in l0, not in linf: choose --norm l0"),
    ],
)
def test_what_of_torchattacks_cannot_work_is_refused_in_one_line(capsys, tmp_path, name, message):
    pytest.importorskip("torchattacks", reason="needs the extra torchattacks")
    line = refused(capsys, "eval", "--attacks", f"torchattacks:{name}", "--out", tmp_path / "r")
    assert message in line
    assert "\n" not in line


def test_nothing_is_overwritten(capsys, tmp_path):
    (tmp_path / "results.json").write_text("precious")
    assert "is not empty and not the folder of a run" in refused(capsys, "eval", "--out", tmp_path)
    assert (tmp_path / "results.json").read_text() == "precious"


def test_a_folder_that_cannot_be_made(capsys, tmp_path):
    (tmp_path / "file").touch()
    assert "could not make the run folder" in refused(capsys, "eval", "--out", tmp_path / "file" / "r", "--limit", 1)


def test_images_none_of_which_can_be_read(capsys, tmp_path):
    for k in range(10):
        (tmp_path / "data" / str(k)).mkdir(parents=True)
        (tmp_path / "data" / str(k) / "x.png").touch()
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(["eval", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run")]) == 1
    assert signal.getsignal(signal.SIGTERM) == before  # as Python ends, an interrupt would be a wrong exit code
    captured = capsys.readouterr()
    assert "orthattack: no attack returned anything that could be scored" in captured.err
    assert "left out of cifar10-robust by every attack: 10 x unreadable" in captured.out


def test_what_is_left_out_is_told_once_and_in_full(capsys, tmp_path, monkeypatch):
    """On the terminal, in the page and in the table, and what was found on the way in the manifest."""
    (tmp_path / "normal.py").write_text(
        "import torch\nimages = torch.rand(30, 3, 32, 32, generator=torch.Generator().manual_seed(0))\n"
        "def data(): return [((image - 0.45) / 0.225, k % 10) for k, image in enumerate(images)]"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    arguments = ["--model", "cifar10-robust", "--data", "normal:data", "--attacks", "FGSM", "PGD", "--no-checks"]
    assert cli.main(["eval", *arguments, "--out", str(tmp_path / "run")]) == 1
    text = " ".join(capsys.readouterr().out.split())
    assert text.count("left out of") == 1
    reason = "they look normalised; return them in [0, 1]: the model normalises"
    assert text.count(reason) == 1
    assert "left out of cifar10-robust by every attack: 30 x for example, unreadable: pixels lie in [-" in text
    table = json.loads((tmp_path / "run" / "results.json").read_text())["table"]
    for row in table[:2]:
        ((example, count),) = row["reasons"].items()
        assert (count, reason in example) == (30, True)
    assert "30 × for example, unreadable" in (tmp_path / "run" / "report.html").read_text()


def test_what_was_found_on_the_way_is_said_and_kept(capsys, tmp_path):
    torch.manual_seed(0)
    state = torchvision.models.get_model("squeezenet1_1", num_classes=2).state_dict()
    torch.save({"state_dict": state, "state_dict_ema": {k: v + 1 for k, v in state.items()}}, tmp_path / "w.pt")
    for name in "ab":
        (tmp_path / "data" / name).mkdir(parents=True)
        Image.effect_noise((40, 40), 60).convert("RGB").save(tmp_path / "data" / name / "x.jfif", "JPEG")
    (tmp_path / "data" / "b" / "y.npy").touch()
    arguments = ["--model", "squeezenet1_1", "--weights", tmp_path / "w.pt", "--data", tmp_path / "data"]
    more = ["--image-size", "32", "--attacks", "FGSM", "--no-checks", "--out", tmp_path / "run"]
    assert cli.main(["eval", *map(str, arguments + more)]) == 0
    told = capsys.readouterr()
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    for note in ("has averaged weights too, at 'state_dict_ema'", f"not read in {tmp_path / 'data'}: 1 .npy."):
        assert note in told.err
        assert note in " ".join(told.out.split())
        assert any(note in warning for warning in manifest["warnings"])


@pytest.mark.parametrize("eps", ["four", "1/0", "-1/255", "nan", "1e999999999", "1/2/3"])
def test_eps_is_a_fraction(capsys, eps):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["eval", f"--eps={eps}"])
    assert stopped.value.code == 2
    assert "--eps: must be" in capsys.readouterr().err


def test_models_and_attacks_are_listed(capsys):
    assert cli.main(["models", "net18"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert any(line.startswith("resnet18") and "IMAGENET1K_V1" in line and "224" in line for line in lines)
    assert cli.main(["attacks"]) == 0
    listed = capsys.readouterr().out
    for name in ("OrthoPGD", "MinimumNorm", "foolbox:LinfPGD", "foolbox:L2CarliniWagnerAttack"):
        assert f"\n{name} " in listed
    assert "random_start=True" in listed
    assert "\nOurs have in common: scope=None, directions=(), " in listed
    (row,) = (line for line in listed.splitlines() if line.startswith("OrthoAPGD "))
    assert row.split("  ")[-1].strip() == "steps=10, restarts=1, rho=0.75, scope=image"
    assert cli.main(["attacks", "nothing of the kind"]) == 2
    assert "nothing has 'nothing of the kind' in its name" in capsys.readouterr().err


def test_every_command_says_what_it_does(capsys):
    for command in ("eval", "report", "compare", "transfer", "models", "attacks"):
        with pytest.raises(SystemExit) as stopped:
            cli.main([command, "--help"])
        assert stopped.value.code == 0
        assert f"usage: orthattack {command}" in capsys.readouterr().out


def test_out_of_memory_is_one_line_also_where_exit_handlers_run_short(capsys, monkeypatch):
    def short(options):
        raise MemoryError("no room")

    monkeypatch.setattr(cli, "_models", short)
    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    assert cli.main(["models"]) == 2
    for raised in (MemoryError("as it ends"), ValueError("a fault")):
        Falls(raised)
    told = capsys.readouterr().err
    assert told.startswith("orthattack: out of memory (MemoryError: no room): what is finished is kept")
    assert "as it ends" not in told
    assert "ValueError: a fault" in told


class Falls:
    """Raises as it is deleted, as an exit handler might: Python tells of it and goes on."""

    def __init__(self, error: Exception) -> None:
        self.error = error

    def __del__(self) -> None:
        raise self.error


def test_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.startswith("orthattack 0.")


def test_clean_only_tells_the_accuracy_of_each_model_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    done = here("eval", "--model", "cifar10-standard", "cifar10-robust", "--clean-only", "--device", "cpu")
    assert done.returncode == 0, done.stderr
    assert "cifar10-standard: clean accuracy 100.0 % [83.9, 100.0] of 20 images" in done.stdout
    assert "cifar10-robust: clean accuracy 85.0 % [64.0, 94.8] of 20 images" in done.stdout
    assert "automobile  truck  2     50.0 % [9.5, 90.5]" in done.stdout
    assert not [*tmp_path.iterdir()]
    assert "leave out --out" in refused(capsys, "eval", "--clean-only", "--out", "run")

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import torchvision
from PIL import Image
from safetensors.torch import save_file

from orthattack.eval import cli
from orthattack.eval.attacks import ATTACKS


def orthattack(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "orthattack", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, cwd=cwd)


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The one line that a refused command prints."""
    assert cli.main(["eval", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    line = captured.err.strip().splitlines()[-1]
    assert line.startswith("orthattack: ")
    assert "Traceback" not in captured.err
    return line.removeprefix("orthattack: ")


def test_with_no_arguments_it_attacks_the_bundled_models_offline(tmp_path):
    done = orthattack("eval", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (run,) = (tmp_path / "runs").iterdir()
    assert {path.name for path in run.iterdir()} == {
        "results.json",
        "images.jsonl",
        "examples-cifar10-standard.png",
        "examples-cifar10-robust.png",
    }
    assert done.stdout.rstrip().endswith(f"results and pictures: runs/{run.name}")
    results = json.loads((run / "results.json").read_text())
    rows = {(row["model"], row["attack"]): row for row in results["results"]}
    assert len(rows) == 12
    assert results["settings"] == {"norm": "linf", "eps": 8 / 255, "steps": 10, "seed": 0}
    assert rows["cifar10-standard", "OrthoPGD"]["robust_accuracy"] <= 0.1
    assert rows["cifar10-robust", "OrthoPGD"]["robust_accuracy"] >= 0.2
    for (_, attack), row in rows.items():
        assert row["images"] == 20
        if "Ortho" in attack:
            assert row["max_abs_cosine"] <= 1e-6


def test_a_folder_with_labels_and_a_weights_file(tmp_path):
    torch.manual_seed(0)
    save_file(torchvision.models.resnet18(num_classes=6).state_dict(), tmp_path / "w.safetensors")
    data = tmp_path / "data"
    data.mkdir()
    for k in range(5):
        Image.effect_noise((90, 70), 60 + 10 * k).convert("RGB").save(data / f"{k}.jpg")
    (data / "4.jpg").write_bytes((data / "4.jpg").read_bytes()[:300])
    (tmp_path / "labels.csv").write_text("file,wnid,label\n" + "".join(f"{k}.jpg,x,{k}\n" for k in range(5)))
    done = orthattack(
        *("eval", "--model", "resnet18", "--weights", tmp_path / "w.safetensors", "--data", data, "--image-size", 64),
        *("--labels", tmp_path / "labels.csv", "--attacks", "orthopgd", "FOOLBOX-PGD", "--eps", "2/255"),
        *("--steps", 2, "--batch-size", 3, "--device", "cpu", "--seed", 1, "--out", tmp_path / "run"),
    )
    assert done.returncode == 0, done.stderr
    assert "1 photograph was left out, unreadable:\n  4.jpg (" in done.stdout
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert list(results["unreadable"]) == ["4.jpg"]
    assert [(row["attack"], row["images"]) for row in results["results"]] == [("OrthoPGD", 4), ("Foolbox-PGD", 4)]
    assert results["settings"] == {"norm": "linf", "eps": 2 / 255, "steps": 2, "seed": 1}
    assert results["models"][0]["preprocessing"]["crop"] == 64


def test_l2(tmp_path):
    arguments = [
        "--model",
        "cifar10-robust",
        "--norm",
        "l2",
        "--limit",
        "4",
        "--steps",
        "3",
        "--out",
        str(tmp_path / "r"),
    ]
    assert cli.main(["eval", *arguments]) == 0
    results = json.loads((tmp_path / "r" / "results.json").read_text())
    assert results["settings"]["eps"] == 0.5
    for row in results["results"]:
        assert row["images"] == 4
        assert row["max_norm"] <= 0.5 * (1 + 1e-5)


def test_a_killed_run_says_what_it_was_and_keeps_its_lines(tmp_path):
    out = tmp_path / "run"
    command = [sys.executable, "-m", "orthattack", "eval", "--steps", "2000", "--batch-size", "2", "--out", str(out)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not ((out / "images.jsonl").exists() and (out / "images.jsonl").stat().st_size > 0):
            assert time.monotonic() < deadline
            time.sleep(0.1)
        process.kill()
    results = json.loads((out / "results.json").read_text())
    assert results["complete"] is False
    assert results["settings"]["steps"] == 2000
    line = json.loads((out / "images.jsonl").read_text().splitlines()[0])
    assert (line["model"], line["attack"]) == ("cifar10-standard", "FGSM")


def test_weights_that_cannot_be_used_at_that_size(capsys, tmp_path):
    save_file(torchvision.models.vit_b_16(num_classes=3, image_size=224).state_dict(), tmp_path / "w.safetensors")
    arguments = ["--model", "vit_b_16", "--weights", tmp_path / "w.safetensors", "--image-size", 32, "--data", tmp_path]
    assert "vit_b_16 does not take images of 32x32 (Wrong image height" in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--model", "resnet"], "unknown model 'resnet'; did you mean"),
        (["--attacks", "CW"], "unknown attack 'CW'; there are FGSM, OrthoFGSM, PGD"),
        (["--model", "resnet50"], "--model resnet50 needs --data: a folder of class folders, or imagenet-samples"),
        (["--eps", "8"], "--eps is in units of [0, 1] pixels; got 8: did you mean 8/255?"),
        (["--weights", "w.pt"], "--weights goes with one --model, the architecture of the weights"),
        (["--data", "nowhere"], "data folder nowhere does not exist; it must be a folder or"),
        (["--device", "cuda:99"], "--device cuda:99 cannot be used here"),
        (["--device", "toaster"], "--device toaster cannot be used here"),
        (["--model", "resnet18", "--weights", "none.pt", "--data", "."], "weights file none.pt does not exist"),
        (["--data", "imagenet-samples"], "has 10 classes, 0 to 9: is this the right model for imagenet-samples?"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line(capsys, arguments, message):
    assert message in refused(capsys, *arguments)


def test_nothing_is_overwritten(capsys, tmp_path):
    (tmp_path / "results.json").write_text("precious")
    assert "exists and is not an empty folder; choose another" in refused(capsys, "--out", tmp_path)
    assert (tmp_path / "results.json").read_text() == "precious"


def test_a_folder_that_cannot_be_made(capsys, tmp_path):
    (tmp_path / "file").touch()
    assert "could not make the results folder" in refused(capsys, "--out", tmp_path / "file" / "run", "--limit", 1)


def test_photographs_none_of_which_can_be_read(capsys, tmp_path):
    for k in range(10):
        (tmp_path / "data" / str(k)).mkdir(parents=True)
        (tmp_path / "data" / str(k) / "x.png").touch()
    message = refused(capsys, "--data", tmp_path / "data", "--out", tmp_path / "run")
    assert message.startswith("none of the photographs could be read, the first, 0/x.png, because of")


@pytest.mark.parametrize("eps", ["four", "1/0", "-1/255", "nan", "1e999999999", "1/2/3"])
def test_eps_is_a_fraction(capsys, eps):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["eval", f"--eps={eps}"])
    assert stopped.value.code == 2
    assert "--eps: must be" in capsys.readouterr().err


def test_help_lists_every_attack(capsys):
    assert tuple(ATTACKS) == cli._ATTACK_NAMES
    with pytest.raises(SystemExit):
        cli.main(["eval", "--help"])
    text = "".join(capsys.readouterr().out.split())  # a name may be wrapped at its hyphen
    for name in ATTACKS:
        assert name in text


def test_version(capsys):
    with pytest.raises(SystemExit):
        cli.main(["--version"])
    assert capsys.readouterr().out.startswith("orthattack 0.")

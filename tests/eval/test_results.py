from __future__ import annotations

import json
from collections import Counter

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from scipy.stats import binomtest

from orthattack.eval.errors import EvaluationError
from orthattack.eval.results.comparison import CLEAN, compared, differences, opened
from orthattack.eval.results.outcomes import FOOLED, ROBUST, UNSCORED, WRONG, by_cause, cause, confusion
from orthattack.eval.results.stored_run import COSINE_EDGES, WORST, Run
from tests.eval.synthetic import ATTACKS, EPS, make_run


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    path = tmp_path_factory.mktemp("results") / "run"
    make_run(path)
    return path


@pytest.fixture(scope="module")
def run(path) -> Run:
    return Run.open(path)


@pytest.fixture(scope="module")
def everything(path) -> pd.DataFrame:
    """All rows as they lie in the files, found by their paths and read by pyarrow alone."""
    parts = []
    for file in sorted((path / "shards").rglob("*.parquet")):
        model, attack, eps = file.parent.parts[-3:]
        parts.append(pq.read_table(file).to_pandas().assign(model=model, folder=attack, stored=eps))
    return pd.concat(parts)


def rows_of(everything: pd.DataFrame, model: str, attack: str, eps: float) -> list[dict]:
    folder = next(name for name in set(everything["folder"]) if name.split("-")[0] == attack.replace(":", "_"))
    stored = "minimal" if ATTACKS[attack][2] else f"{eps:.9g}"
    part = everything[
        (everything["model"] == model) & (everything["folder"] == folder) & (everything["stored"] == stored)
    ]
    return part.to_dict("records")


def fooled(row: dict, attack: str, eps: float) -> bool:
    return row["success"] is True and (not ATTACKS[attack][2] or row["linf"] <= eps)


def test_every_row_is_what_the_files_say(run, everything):
    table = run.table()
    assert len(table) == 2 * len(EPS) * (len(ATTACKS) + 1)
    for row in table[table["attack"] != WORST].to_dict("records"):
        rows = rows_of(everything, row["model"], row["attack"], row["eps"])
        ok = [r for r in rows if r["status"] == "ok"]
        wrong = [r for r in rows if r["status"] == "misclassified"]
        hit = [r for r in ok if fooled(r, row["attack"], row["eps"])]
        assert row["rows"] == row["images"] == len(rows) == 60
        assert (row["ok"], row["misclassified"], row["fooled"]) == (len(ok), len(wrong), len(hit))
        assert row["scored"] == len(ok) + len(wrong)
        for status in ("error", "unreadable", "invalid"):
            assert row[status] == sum(r["status"] == status for r in rows)
        assert row["robust_accuracy"] == (len(ok) - len(hit)) / (len(ok) + len(wrong))
        assert row["success_rate"] == len(hit) / len(ok)
        interval = binomtest(len(ok) - len(hit), row["scored"]).proportion_ci(0.95, "wilson")
        assert (row["robust_accuracy_low"], row["robust_accuracy_high"]) == pytest.approx(tuple(interval), abs=1e-9)
        measured = hit if ATTACKS[row["attack"]][2] else ok
        assert row["mean_norm"] == pytest.approx(np.mean([r["linf"] for r in measured]))
        assert row["max_norm"] == max(r["linf"] for r in measured)
        assert row["mean_abs_cosine"] == pytest.approx(np.mean([abs(r["cosine"]) for r in ok]))
        assert row["max_abs_cosine"] == max(abs(r["cosine"]) for r in ok)
        assert row["gradient_calls"] == pytest.approx(np.mean([r["gradient_calls"] for r in ok]))
        assert row["seconds"] == pytest.approx(sum(r["seconds"] for r in rows if r["seconds"] == r["seconds"]))
        assert row["rounded_success"] == pytest.approx(np.mean([r["rounded_success"] for r in hit]))


def test_images_not_scored_are_on_neither_side(run):
    row = run.table().iloc[0]
    assert (row["attack"], row["model"]) == ("FGSM", "standard")
    assert (row["error"], row["invalid"], row["unreadable"], row["scored"]) == (4, 1, 2, 53)
    reasons = json.loads(row["reasons"])
    assert reasons["error: RuntimeError: out of memory"] == 4
    assert reasons["invalid: norm 0.9 is over eps"] == 1


def test_the_worst_case_is_per_image(run, everything):
    table = run.table()
    for row in table[table["attack"] == WORST].to_dict("records"):
        seen: dict[int, list[str]] = {}
        for attack in ATTACKS:
            for r in rows_of(everything, row["model"], attack, row["eps"]):
                if r["status"] in ("ok", "misclassified"):
                    outcome = "wrong" if r["status"] != "ok" else "fooled" if fooled(r, attack, row["eps"]) else "held"
                    seen.setdefault(r["position"], []).append(outcome)
        assert row["scored"] == len(seen)
        assert row["robust"] == sum(set(found) == {"held"} for found in seen.values())
        assert row["fooled"] == sum("fooled" in found for found in seen.values())
        assert row["scored_by_all"] == sum(len(found) == len(ATTACKS) for found in seen.values())
        others = table[(table["model"] == row["model"]) & (table["eps"] == row["eps"]) & (table["attack"] != WORST)]
        full = others[others["scored"] == row["scored"]]
        assert row["robust_accuracy"] <= full["robust_accuracy"].min()


def test_clean_accuracy_leaves_the_unreadable_out(run, path):
    for model in run.models:
        rows = pd.concat(pq.read_table(file).to_pandas() for file in sorted((path / "clean" / model).glob("*")))
        ok = rows[rows["status"] == "ok"]
        rate = run.clean_accuracy(model)
        assert (rate.total, rate.count) == (58, int((ok["prediction"] == ok["label"]).sum()))
        assert len(run.gradient_cosines(model)) == 58


def test_pairs_are_of_the_images_that_both_scored(run, everything):
    paired = run.paired()
    assert set(zip(paired["attack"], paired["baseline"], strict=True)) == {
        ("OrthoFGSM", "FGSM"),
        ("OrthoPGD", "PGD"),
        ("OrthoPGD", "foolbox:LinfPGD"),
    }
    for row in paired.to_dict("records"):
        robust = []
        for attack in (row["attack"], row["baseline"]):
            rows = rows_of(everything, row["model"], attack, row["eps"])
            robust.append(
                {
                    r["position"]: r["status"] == "ok" and not fooled(r, attack, row["eps"])
                    for r in rows
                    if r["status"] in ("ok", "misclassified")
                }
            )
        shared = sorted(set(robust[0]) & set(robust[1]))
        assert row["n"] == len(shared)
        assert row["fooled_by_attack_alone"] == sum(robust[1][p] and not robust[0][p] for p in shared)
        assert row["fooled_by_baseline_alone"] == sum(robust[0][p] and not robust[1][p] for p in shared)
        difference = np.mean([robust[0][p] for p in shared]) - np.mean([robust[1][p] for p in shared])
        assert row["difference"] == pytest.approx(difference)


def test_classes_add_up_to_the_leaderboard(run):
    table = run.table()
    for model in run.models:
        for eps in run.radii:
            classes = run.per_class(model, eps).groupby("attack")[["scored", "robust"]].sum()
            at = table[(table["model"] == model) & (table["eps"] == eps)].set_index("attack")
            assert (classes["scored"].sort_index() == at["scored"].sort_index()).all()
            assert (classes["robust"].sort_index() == at["robust"].sort_index()).all()


def test_histograms_hold_every_attacked_image_where_it_belongs(run, everything):
    found = run.cosine_histograms("robust", EPS[1])
    assert set(found) == set(ATTACKS)
    for attack, counts in found.items():
        cosines = [abs(r["cosine"]) for r in rows_of(everything, "robust", attack, EPS[1]) if r["status"] == "ok"]
        assert counts.sum() == len(cosines)
        middle = (COSINE_EDGES[:-1] + COSINE_EDGES[1:]) / 2
        assert (middle[counts > 0] < -6).all() == ATTACKS[attack][1]


def test_curves_begin_at_clean_accuracy_and_pass_through_the_leaderboard(run):
    table = run.table()
    for model in run.models:
        curves = run.curves(model)
        assert set(curves) == set(ATTACKS)
        for attack, curve in curves.items():
            assert curve["eps"].iloc[0] == 0
            assert curve["robust_accuracy"].iloc[0] == pytest.approx(run.clean_accuracy(model).value)
            assert ((curve["low"] <= curve["robust_accuracy"]) & (curve["robust_accuracy"] <= curve["high"])).all()
            at = table[(table["model"] == model) & (table["attack"] == attack)]
            for eps, accuracy in zip(at["eps"], at["robust_accuracy"], strict=True):
                nearest = curve.iloc[(curve["eps"] - eps).abs().argmin()]
                assert nearest["eps"] == pytest.approx(eps, abs=EPS[-1] / 400)
                assert nearest["robust_accuracy"] == pytest.approx(accuracy, abs=0.05 if ATTACKS[attack][2] else 0)
        assert len(curves["MinimumNorm"]) > 100
        assert curves["MinimumNorm"]["robust_accuracy"].is_monotonic_decreasing


def test_optimality_is_local_and_global(run, everything):
    table = run.optimality()
    local = table[table["model"].notna()]
    assert list(local["model"]) == ["standard", "robust"]
    assert table[table["model"].isna()]["local"].iloc[0] == pytest.approx(local["local"].mean())
    for model, value in zip(local["model"], local["local"], strict=True):
        distances: dict[str, dict[int, float]] = {attack: {} for attack in ATTACKS}
        for attack in ATTACKS:
            for eps in EPS:
                for r in rows_of(everything, model, attack, eps):
                    if r["status"] == "misclassified":
                        found = 0.0
                    elif r["status"] == "ok":
                        found = r["linf"] if r["success"] else np.inf
                    else:
                        continue
                    distances[attack][r["position"]] = min(distances[attack].get(r["position"], np.inf), found)
        own = distances["MinimumNorm"]
        best = {p: min(d[p] for d in distances.values() if p in d) for p in own}
        reach = max(best.values())
        area, least = (np.mean([min(d[p], reach) for p in own]) for d in (own, best))
        nothing = reach * np.mean([b > 0 for b in best.values()])
        assert value == pytest.approx((nothing - area) / (nothing - least))
        assert 0 < value < 1 or value == pytest.approx(1)


def test_a_run_that_has_just_started_has_no_rates_and_no_errors(tmp_path):
    make_run(tmp_path / "run", limit=0, status="running")
    run = Run.open(tmp_path / "run")
    table = run.table()
    assert (table["scored"] == 0).all()
    assert table[["robust_accuracy", "success_rate", "clean_accuracy", "mean_norm"]].isna().all().all()
    assert run.progress() == (0, 2 * 60 * (5 * len(EPS) + 1))
    assert run.paired()["difference"].isna().all()
    assert run.optimality()["local"].isna().all()
    assert run.curves("standard")["PGD"]["robust_accuracy"].isna().all()


def test_an_interrupted_run_is_of_what_there_is(tmp_path):
    make_run(tmp_path / "run", limit=25, status="interrupted")
    run = Run.open(tmp_path / "run")
    assert run.progress() == (2 * 25 * (5 * len(EPS) + 1), 2 * 60 * (5 * len(EPS) + 1))
    assert set(run.table()["rows"]) == {25, 24}  # one image is unreadable, and in no worst case
    assert run.status == "interrupted"


def test_a_run_of_minimal_attacks_alone_needs_no_radius(tmp_path):
    attacks = {"MinimumNorm": ATTACKS["MinimumNorm"]}
    make_run(tmp_path / "run", attacks=attacks, eps=())
    run = Run.open(tmp_path / "run")
    table = run.table()
    assert table["eps"].isna().all()
    assert (table["success_rate"] == 1).all()
    assert run.curves("robust")["MinimumNorm"]["robust_accuracy"].iloc[-1] == 0


def test_reading_goes_by_one_attack_at_a_time_and_by_column(run, path, monkeypatch):
    asked = []
    fresh = Run.open(path)
    read = fresh.folder.read

    def spy(kind, model, attack="clean", eps=None, columns=None, unfinished=False):
        asked.append(columns)
        assert not unfinished
        return read(kind, model, attack, eps, columns)

    monkeypatch.setattr(fresh.folder, "read", spy)
    fresh.table()
    fresh.paired()
    fresh.optimality()
    assert all(columns is not None for columns in asked)
    before = len(asked)
    fresh.table()
    fresh.paired()
    assert len(asked) == before  # kept, not read again


def test_a_manifest_that_lacks_something_says_so(tmp_path):
    folder = make_run(tmp_path / "run", limit=0)
    manifest = folder.manifest()
    del manifest["config"]
    folder.write_manifest(manifest)
    with pytest.raises(EvaluationError, match=r"manifest.json lacks what a report needs \(config: Field required\)"):
        Run.open(tmp_path / "run")
    with pytest.raises(EvaluationError, match="is not the folder of a run"):
        Run.open(tmp_path)


# Two runs beside each other


def test_a_run_compared_with_itself_does_not_differ(run, path):
    table = compared(run, Run.open(path))
    assert (table["difference"] == 0).all()
    assert (table["p"] == 1).all()
    assert set(table["attack"]) == {CLEAN, *ATTACKS}
    assert (table[table["attack"] == "PGD"]["n"] == 58).all()
    assert differences(run, Run.open(path)) == []


def test_runs_are_matched_by_name_and_label(tmp_path):
    """The second run has the same images and outcomes, in other places, but for one name and one label."""
    one = make_run(tmp_path / "one", models=("m",), flaws=False)
    two = make_run(tmp_path / "two", models=("m",), flaws=False, steps=20)
    for file in sorted(two.path.rglob("*.parquet")):
        table = pq.read_table(file).to_pandas()
        table["label"] = table["label"].astype("int32")
        table.loc[table["name"] == "photo-0005.png", "name"] = "another"
        table.loc[table["name"] == "photo-0006.png", "label"] += 1
        shuffled = table.sample(frac=1, random_state=1)
        shuffled["position"] = sorted(shuffled["position"])
        pq.write_table(pa.Table.from_pandas(shuffled, pq.read_schema(file), preserve_index=False), file)
    first, second = Run.open(one.path), Run.open(two.path)
    table = compared(first, second)
    assert (table["n"] == 58).all()
    assert (table[table["attack"] != CLEAN]["difference"] == 0).all()
    assert differences(first, second) == ["config.steps: 10 -> 20"] + [
        f"attack {attack}.parameters.steps: 10 -> 20" for attack in ATTACKS
    ]


def test_a_difference_between_runs_is_that_of_the_images(tmp_path):
    weak = dict(ATTACKS) | {"PGD": (*ATTACKS["PGD"][:4], 2.0)}
    first = Run.open(make_run(tmp_path / "one", models=("m",)).path)
    second = Run.open(make_run(tmp_path / "two", models=("m",), attacks=weak).path)
    row = compared(first, second).query("attack == 'PGD'").iloc[0]
    a = first.rows("m", "PGD", EPS[0]).set_index("position")
    b = second.rows("m", "PGD", EPS[0]).set_index("position")
    scored = a["status"].isin(["ok", "misclassified"]) & b["status"].isin(["ok", "misclassified"])
    robust_a, robust_b = ((t["status"] == "ok") & ~t["success"].fillna(False).astype(bool) for t in (a, b))
    assert row["n"] == scored.sum()
    assert row["difference"] == pytest.approx(robust_a[scored].mean() - robust_b[scored].mean())
    assert row["difference"] < 0
    assert row["second_robust_alone"] == (robust_b & ~robust_a)[scored].sum()


def test_runs_that_cannot_be_compared_say_why(tmp_path, run):
    other = Run.open(make_run(tmp_path / "l2", norm="l2", n=5, stored=0).path)
    with pytest.raises(EvaluationError, match=r"is of norm linf and .* of l2"):
        compared(run, other)
    other = Run.open(make_run(tmp_path / "models", models=("x", "y"), n=5, stored=0).path)
    with pytest.raises(
        EvaluationError,
        match=r"no model in common: standard, robust in .* and x, y in .*; say which to compare, as RUN:MODEL",
    ):
        compared(run, other)
    other = Run.open(make_run(tmp_path / "none", limit=0).path)
    with pytest.raises(EvaluationError, match="share no image that both scored"):
        compared(run, other)


def test_two_runs_of_one_model_each_are_compared_whatever_it_is_called(tmp_path):
    one = Run.open(make_run(tmp_path / "a", models=("a",), n=10, stored=0).path)
    two = Run.open(make_run(tmp_path / "b", models=("b",), n=10, stored=0).path)
    table = compared(one, two)
    assert set(table["model"]) == {"a / b"}
    assert differences(one, two) == ["model.label: a -> b", "model.name: a -> b"]


def test_two_models_of_a_run_are_compared_on_the_same_images(run):
    first, second = opened(f"{run.folder}:standard"), opened(f"{run.folder}:robust")
    table = compared(first, second)
    assert set(table["model"]) == {"standard / robust"}
    row = table[(table["attack"] == "PGD") & (table["eps"] == EPS[1])].iloc[0]
    robust = []
    for model in ("standard", "robust"):
        rows = run.rows(model, "PGD", EPS[1]).set_index("name")
        rows = rows[rows["status"].isin(["ok", "misclassified"])]
        robust.append((rows["status"] == "ok") & ~rows["success"].fillna(True).astype(bool))
    # An image is the same if its name and label are, and the made-up models differ in labels.
    labels = [run.rows(model, "PGD", EPS[1]).set_index("name")["label"] for model in ("standard", "robust")]
    same = [name for name in robust[0].index.intersection(robust[1].index) if labels[0][name] == labels[1][name]]
    a, b = (one[same].to_numpy(bool) for one in robust)
    assert row["n"] == len(same) > 5
    assert (row["first_robust_alone"], row["second_robust_alone"]) == ((a & ~b).sum(), (~a & b).sum())
    assert row["p"] == pytest.approx(binomtest(int((a & ~b).sum()), int((a != b).sum())).pvalue)


def test_a_model_is_compared_across_runs_with_one_of_another_name(run, tmp_path):
    other = make_run(tmp_path / "other:run", models=("x", "timm:y:z"), n=60, stored=0)
    assert list(opened(str(other)).models) == ["x", "timm:y:z"]  # a folder may have a colon too
    table = compared(opened(f"{run.folder}:standard"), opened(f"{other}:timm:y:z"))
    assert set(table["model"]) == {"standard / timm:y:z"}
    table = compared(opened(f"{other}:x"), opened(f"{other}:x"))
    assert (table["difference"] == 0).all()


def test_a_model_that_a_run_lacks_is_refused_with_those_that_it_has(run, tmp_path):
    with pytest.raises(EvaluationError, match=r"run has no model 'robst'; it has standard, robust$"):
        opened(f"{run.folder}:robst")
    with pytest.raises(EvaluationError, match=r"nothing:standard is not the folder of a run"):
        opened(f"{tmp_path}/nothing:standard")
    with pytest.raises(EvaluationError, match=r"s3x is not the folder of a run"):
        opened(f"{tmp_path}/s3x")


def test_reasons_are_counted_by_their_cause():
    """200 images whose pixels have other ranges were left out for one reason."""
    hint = "not in [0, 1]: they look normalised; return them in [0, 1]"
    texts = [(f"unreadable: pixels lie in [-{k / 100:.3g}, {2 + k / 100:.3g}], {hint}", 1) for k in range(200)]
    found = by_cause([*texts, ("error: ValueError: no", 3), ("unreadable: 'a/1.png' is lost", 1)])
    assert found == {
        f"for example, unreadable: pixels lie in [-0, 2], {hint}": 200,
        "error: ValueError: no": 3,
        "unreadable: 'a/1.png' is lost": 1,
    }
    assert by_cause(found.items()) == found
    assert cause("unreadable: KeyError: 'x1'") == cause("for example, unreadable: KeyError: 'y22'")
    assert cause("error: 0x7f3a") != cause("error: none")


@pytest.mark.parametrize("minimal", [False, True])
def test_what_images_are_taken_for_is_counted_and_no_more_told_than_asked_for(minimal):
    rng = np.random.default_rng(0)
    label, taken = rng.integers(0, 30, (2, 3000))
    outcome = rng.choice([UNSCORED, WRONG, ROBUST, FOOLED], 3000).astype(np.int8)
    table = pd.DataFrame({"label": label, "adversarial_prediction": taken})
    found = confusion("PGD", table, minimal, outcome)
    wanted, won = Counter(), Counter()
    for pair in zip(label.tolist(), taken.tolist(), outcome.tolist(), strict=True):
        if pair[2] == FOOLED or (pair[2] == ROBUST and pair[0] != pair[1] and not minimal):
            wanted[pair[:2]] += 1
            won[pair[:2]] += pair[2] == FOOLED
    assert {(row["label"], row["prediction"]): (row["images"], row["success"]) for row in found} == {
        pair: (count, won[pair]) for pair, count in wanted.items()
    }
    assert [row["images"] for row in found] == sorted(wanted.values(), reverse=True)
    assert confusion("PGD", table, minimal, outcome, most=100) == found[:100]
    assert confusion("PGD", table[:0], minimal, outcome[:0]) == []

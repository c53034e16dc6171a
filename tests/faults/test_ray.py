"""Workers, drivers and machines that die under `--engine ray`; and that the engine makes no difference to the rows."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from importlib.util import find_spec

import pytest
from filelock import FileLock

from orthattack.eval.running.plan import Unit
from orthattack.eval.running.ray import Queue
from tests.stored import assert_same, contents, seconds

from .runs import (
    SUITE,
    alive,
    ended,
    hold,
    manifest,
    release,
    start,
    stored,
    wait_for,
    wait_for_held,
    workers,
    workplace,
)

needs_ray = pytest.mark.skipif(find_spec("ray") is None, reason="needs the extra ray")


@pytest.fixture(autouse=True)
def one_at_a_time(tmp_path_factory):
    """Each cluster takes all the cores, and ports that another may want."""
    with FileLock(tmp_path_factory.getbasetemp().parent / "ray.lock"):
        yield


RAY = ("--engine", "ray", "--workers", "2")


@needs_ray
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])  # the latter is what Ray and clusters send
def test_a_worker_that_is_killed_is_replaced_and_the_rows_are_those_of_one_process(tmp_path, whole, how):
    place = workplace(tmp_path)
    hold(place, 4)
    driver = start(place, *RAY)
    wait_for_held(place, driver)
    wait_for(lambda: len(workers(place)) == 2, "both workers")
    victim = min(workers(place))
    os.kill(victim, how)
    wait_for(lambda: not alive(victim), "the worker's end")
    release(place)
    text = ended(driver)
    assert "a worker died at cifar10-" in text
    assert "others go on with it" in text
    assert_same(contents(place / "run"), whole)
    found = manifest(place)
    assert found["status"] == "complete"
    (session,) = found["sessions"]
    assert session["engine"] == "ray"
    assert {victim} < {worker["process"] for worker in session["workers"]} >= workers(place)
    assert not any(alive(worker) for worker in workers(place))


@needs_ray
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_driver_that_is_killed_or_interrupted_leaves_no_worker_and_the_same_command_goes_on(tmp_path, whole, how):
    place = workplace(tmp_path)
    hold(place, 4)
    driver = start(place, *RAY, start_new_session=True)
    wait_for_held(place, driver)
    if how == signal.SIGINT:
        os.killpg(driver.pid, how)  # as Ctrl-C in a terminal does
        assert "interrupted; the same command, with --out, goes on from here" in ended(driver, code=130)
    else:
        driver.send_signal(how)
        driver.communicate()
    wait_for(lambda: not any(alive(worker) for worker in workers(place)), "the workers' end")
    before = seconds(place / "run")
    assert len(before) > 0
    release(place)
    ended(start(place, *RAY))
    assert_same(contents(place / "run"), whole)
    assert before.items() <= seconds(place / "run").items()
    outcomes = [session["outcome"] for session in manifest(place)["sessions"]]
    assert outcomes == ["killed" if how == signal.SIGKILL else "interrupted", "complete"]


CLUSTER = """
import os, sys, time
from pathlib import Path

from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
lost = cluster.add_node(num_cpus=1)
cluster.wait_for_nodes()
Path("address").write_text(cluster.address)
while not Path("lose").exists():
    time.sleep(0.05)
cluster.remove_node(lost, allow_graceful=False)
Path("lost").touch()
sys.stdin.read()
cluster.shutdown()
"""


@needs_ray
def test_a_node_that_is_lost_takes_its_workers_along_and_the_others_finish(tmp_path, whole):
    place = workplace(tmp_path)
    hold(place, 4)
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1"}
    cluster = subprocess.Popen(
        [sys.executable, "-c", CLUSTER], cwd=place, stdin=subprocess.PIPE, env=environment, stderr=subprocess.DEVNULL
    )
    try:
        wait_for((place / "address").exists, "the cluster")
        wait_for(lambda: (place / "address").read_text(), "its address")
        driver = start(place, *RAY, "--address", (place / "address").read_text())
        wait_for_held(place, driver)
        wait_for(lambda: len(workers(place)) == 2, "both workers")
        both = workers(place)
        (place / "lose").touch()
        wait_for((place / "lost").exists, "the loss")
        wait_for(lambda: sum(map(alive, both)) == 1, "the end of the node's worker")
        release(place)
        text = ended(driver)
    finally:
        cluster.communicate(timeout=60)
    assert "a worker died at cifar10-" in text
    assert_same(contents(place / "run"), whole)
    assert manifest(place)["status"] == "complete"


@needs_ray
def test_a_unit_that_kills_every_worker_is_left_and_the_rest_is_done(tmp_path, whole):
    suite = SUITE.replace('"slow:attack"]', '"slow:attack", "slow:deadly"]').replace("limit = 9", "limit = 3")
    place = workplace(tmp_path, suite.replace('"cifar10-robust", "cifar10-standard"', '"cifar10-robust"'))
    text = ended(start(place, *RAY), code=2)
    assert "1 pieces of work killed 3 workers each (cifar10-robust attack 0): look for the reason" in text
    assert "Everything else is done and kept; the same command tries them again" in text
    names = {path.parent.parent.name for path in stored(place) if path.parts[-5] == "shards"}
    assert {name.split("-")[0] for name in names} == {"OrthoPGD", "slow_attack"}
    assert manifest(place)["status"] == "interrupted"


@needs_ray
def test_what_is_to_be_put_right_on_a_worker_is_said_by_the_driver(tmp_path):
    text = ended(start(workplace(tmp_path / "a"), *RAY, "--out", "memory://bucket/run"), code=2)
    assert "memory://bucket/run is not there on " in text
    assert "must be one that all machines of the cluster share" in text
    assert "Traceback" not in text
    text = ended(start(workplace(tmp_path / "b"), "--engine", "ray", "--address", "127.0.0.1:1"), code=2)
    assert "no Ray cluster at 127.0.0.1:1 (" in text
    assert "Traceback" not in text


def test_without_ray_the_extra_is_named(tmp_path):
    code = "import sys; sys.modules['ray'] = None; from orthattack.eval.cli import main; sys.exit(main(sys.argv[1:]))"
    command = [sys.executable, "-c", code, "eval", "--engine", "ray", "--out", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 2
    assert "--engine ray needs Ray (" in done.stderr
    assert "pip install 'orthattack[ray]'" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--workers", "2"], "--workers and --address go with --engine ray"),
        (["--engine", "ray", "--shard", "1/2"], "--shard is for processes that share the work without --engine"),
    ],
)
def test_options_that_do_not_go_together(capsys, options, message):
    from orthattack.eval import cli

    assert cli.main(["eval", "--out", "x", *options]) == 2
    assert message in capsys.readouterr().err


# The queue


def units(**models):
    return [Unit(model, "attack", chunk, (0,)) for model, count in models.items() for chunk in range(count)]


def test_every_unit_is_taken_once_whoever_comes_when():
    queue, taken, put_back = Queue(units(a=7, b=3, c=1)), [], 0
    while len(queue):
        for worker in (1, 2, 3, 1):
            found = queue.take(worker)
            if found is None:
                break
            if len(taken) % 4 == 3 and put_back < 3:
                queue.forget(worker)
                queue.put_back(found[0])
                put_back += 1
                continue
            taken.append(found[0])
    assert put_back == 3
    assert sorted(taken, key=str) == sorted(units(a=7, b=3, c=1), key=str)
    assert queue.take(1) is None


def test_a_worker_stays_with_its_model_and_gets_what_it_was_promised():
    queue = Queue(units(a=10, b=10))
    first, following = queue.take("x")
    other, _ = queue.take("y")
    assert {first.model, other.model} == {"a", "b"}
    for _ in range(9):
        promised = following
        unit, following = queue.take("x")
        assert unit == promised
        assert unit.model == first.model
    assert following is None
    assert queue.take("x")[0].model == other.model


def test_nobody_idles_while_a_unit_is_only_promised():
    queue = Queue(units(a=2))
    _, promised = queue.take("x")
    assert promised is not None
    assert queue.take("y") == (promised, None)
    assert queue.take("x") is None

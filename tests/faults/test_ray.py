"""Workers, drivers and machines that die under `--engine ray`; and that the engine makes no difference to the rows."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from threading import Thread
from types import SimpleNamespace

import pytest
from filelock import FileLock

from orthattack.eval.running import ray as engine
from orthattack.eval.running.chunk import Done
from orthattack.eval.running.plan import Unit
from orthattack.eval.running.ray import Queue, Telling, mailbox, pass_on, ray_crew
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
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_driver_that_is_killed_or_interrupted_leaves_no_worker_and_the_same_command_goes_on(tmp_path, whole, how):
    place = workplace(tmp_path)
    hold(place, 4)
    driver = start(place, *RAY, start_new_session=True)
    wait_for_held(place, driver)
    if how != signal.SIGKILL:
        if how == signal.SIGINT:
            os.killpg(driver.pid, how)  # as Ctrl-C in a terminal does
        else:
            driver.send_signal(how)
        text = ended(driver, code=130)
        assert "orthattack: interrupted; to resume:\n" in text
        assert "robust accuracy" in text.lower()
        assert "report: run/report.html" in text
        assert (place / "run/report.html").stat().st_size > 10_000
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


GATED = """
import time
from pathlib import Path


def attack(model):
    def run(images, labels):
        done = len(list(Path("done").glob("*")))
        while not Path(f"go-{done}").exists():
            model(images)
            time.sleep(0.05)
        Path("done", str(done)).touch()
        return images

    return run
"""


@needs_ray
def test_the_bar_moves_with_every_batch_and_step_of_an_attack(tmp_path):
    """Long before the worker keeps anything: each batch waits until the bar has shown the one before."""
    import fcntl
    import pty
    import struct
    import termios

    attacks = '["gated:attack"]\nchecks = false\nattack_misclassified = true'
    place = workplace(tmp_path, SUITE.replace('["OrthoPGD", "slow:attack"]', attacks))
    (place / "gated.py").write_text(GATED)
    (place / "done").mkdir()
    ours, its = pty.openpty()
    fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 140, 0, 0))
    command = [sys.executable, "-m", "orthattack", "eval", "suite.toml", "--out", "run", "--engine", "ray"]
    driver = subprocess.Popen([*command, "--workers", "1"], cwd=place, stdout=subprocess.DEVNULL, stderr=its)
    os.close(its)
    seen: list[str] = []

    def read():
        with suppress(OSError):  # of a terminal that nobody writes to any more
            while text := os.read(ours, 4096):
                seen.append(text.decode(errors="replace"))

    reader = Thread(target=read, daemon=True)
    reader.start()
    try:
        for batch, images in enumerate((0, 2, 3, 5)):  # of 2 images each, the last of a shard of 1
            shown = re.compile(rf" {images}/18 .*call \d+ of gated:attack at 8/255")
            wait_for(lambda shown=shown: any(map(shown.search, seen)), f"{images} images", 60)
            assert len(list((place / "done").glob("*"))) == batch
            (place / f"go-{batch}").touch()
        for batch in range(4, 12):
            (place / f"go-{batch}").touch()
        assert driver.wait(timeout=120) == 0
    except AssertionError:
        pytest.fail("".join(seen))
    finally:
        driver.kill()
        driver.wait()
        reader.join(10)
        os.close(ours)


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


@pytest.fixture
def token(monkeypatch) -> None:
    """That of the clusters here, for all who take part."""
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", "5" * 64)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextmanager
def nodes(place: Path, *cores: int, **environment: str) -> Iterator[tuple[str, list[subprocess.Popen]]]:
    """The address of a cluster made as people make one, `ray start --head` and another `ray start` for each further
    node, and the processes."""
    place.mkdir(exist_ok=True)
    environment = {**os.environ, "RAY_USAGE_STATS_ENABLED": "0", "OMP_NUM_THREADS": "1", **environment}
    # Of this cluster alone, whatever others run here.
    temporary = f"/tmp/ray-{os.getpid()}-{free_port()}"
    port, processes = free_port(), []
    try:
        for i, count in enumerate(cores):
            role = ["--head", f"--port={port}", f"--temp-dir={temporary}", "--include-dashboard=false"]
            if i > 0:
                role = [f"--address=127.0.0.1:{port}"]
            command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--num-cpus={count}", *role]
            with (place / f"node{i}.log").open("w") as log:
                node = subprocess.Popen(
                    command, cwd=place, env=environment, stdout=log, stderr=log, start_new_session=True
                )
            processes.append(node)
            wait_for(lambda i=i: "Ray runtime started" in (place / f"node{i}.log").read_text(), f"node {i}", 90)
        yield f"127.0.0.1:{port}", processes
    finally:
        for node in reversed(processes):
            node.terminate()
        for node in processes:
            with suppress(subprocess.TimeoutExpired):
                node.wait(20)
            with suppress(ProcessLookupError):
                os.killpg(node.pid, signal.SIGKILL)
            node.wait()
        shutil.rmtree(temporary, ignore_errors=True)


def raylet(node: subprocess.Popen) -> int:
    """The raylet that a `ray start` has started."""
    found = subprocess.run(
        ["pgrep", "-P", str(node.pid), "-f", "raylet/raylet "], capture_output=True, text=True, check=True
    )
    return int(found.stdout.split()[0])


@needs_ray
def test_two_nodes_of_ray_start_do_a_run_and_the_loss_of_a_raylet_is_made_up_for(tmp_path, whole, token):
    place = workplace(tmp_path)
    hold(place, 4)
    with nodes(tmp_path, 1, 1) as (address, (_, other)):
        driver = start(place, *RAY, "--address", address)
        wait_for_held(place, driver)
        wait_for(lambda: len(workers(place)) == 2, "both workers")
        os.kill(raylet(other), signal.SIGKILL)
        wait_for(lambda: sum(map(alive, workers(place))) == 1, "the end of the node's worker")
        release(place)
        text = ended(driver)
    assert "a worker died at cifar10-" in text
    assert_same(contents(place / "run"), whole)
    assert manifest(place)["status"] == "complete"


@needs_ray
def test_a_driver_that_loses_its_own_raylet_loses_nothing_that_is_finished(tmp_path, whole, token):
    place = workplace(tmp_path)
    hold(place, 4)
    with nodes(tmp_path, 2) as (address, (head,)):
        driver = start(place, *RAY, "--address", address)
        wait_for_held(place, driver)
        before = seconds(place / "run")
        os.kill(raylet(head), signal.SIGKILL)
        driver.communicate(timeout=120)
        assert driver.returncode != 0
    wait_for(lambda: not any(map(alive, workers(place))), "the workers' end")
    release(place)
    ended(start(place, *RAY))
    assert_same(contents(place / "run"), whole)
    assert before.items() <= seconds(place / "run").items()


@needs_ray
def test_a_file_that_is_missing_in_the_shared_folder_is_made_again(tmp_path, whole):
    place = workplace(tmp_path)
    ended(start(place, *RAY))
    before = seconds(place / "run")
    victim = min(path for path in stored(place) if "shards" in path.parts)
    lost = {key for key, took in before.items() if took > 0 and key[:3] == victim.parent.parts[-3:]}
    assert lost
    victim.unlink()
    ended(start(place, *RAY))
    assert_same(contents(place / "run"), whole)
    after = seconds(place / "run")
    assert {key for key in before if before[key] != after[key]} == lost


@needs_ray
def test_a_private_cluster_is_closed_to_others(tmp_path):
    """Its processes listen on loopback only, and turn away whoever has not the run's token."""
    psutil = pytest.importorskip("psutil")
    place = workplace(tmp_path)
    hold(place, 4)
    driver = start(place, *RAY)
    wait_for_held(place, driver)
    family = [psutil.Process(driver.pid), *psutil.Process(driver.pid).children(recursive=True)]
    listening = {
        process.name(): [one.laddr for one in process.net_connections() if one.status == "LISTEN"] for process in family
    }
    hosts = {at.ip.removeprefix("::ffff:") for found in listening.values() for at in found}
    assert hosts == {"127.0.0.1"}
    (gcs,) = listening["gcs_server"]
    code = f"import ray; ray.init(address='127.0.0.1:{gcs.port}'); print('inside', flush=True)"
    for token in ({}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}):
        here = {"HOME": str(tmp_path), "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0"}  # so that it knocks at 127.0.0.1
        with (tmp_path / "said").open("w") as said:
            stranger = subprocess.Popen(
                [sys.executable, "-c", code], stdout=said, stderr=said, env={**os.environ, **here, **token}
            )
            wait_for(lambda: "InvalidAuthToken" in (tmp_path / "said").read_text(), "the refusal", 60)
            with suppress(subprocess.TimeoutExpired):
                stranger.wait(10)
            stranger.kill()
            stranger.wait()
        assert "inside" not in (tmp_path / "said").read_text()
    driver.send_signal(signal.SIGTERM)
    ended(driver, code=130)


NO_PACKAGE = """
import sys

class Missing:
    def find_spec(self, name, *_):
        if name == "orthattack":
            raise ModuleNotFoundError("No module named 'orthattack'")

if any("default_worker" in word for word in sys.orig_argv):
    sys.meta_path.insert(0, Missing())
"""
NO_PROCESS = """
import sys

if any("default_worker" in word for word in sys.orig_argv):
    raise SystemExit("libcudart.so.12: cannot open shared object file")
"""


@needs_ray
@pytest.mark.parametrize(
    ("site", "reason"),
    [
        (NO_PACKAGE, "the workers cannot be started on .* (ModuleNotFoundError: No module named 'orthattack')"),
        (
            NO_PROCESS,
            "no worker could be started in 50 s: .*said last: SystemExit: libcudart.so.12: cannot open shared",
        ),
    ],
)
def test_workers_that_cannot_start_end_the_run_with_the_reason(tmp_path, monkeypatch, site, reason):
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(site)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(tmp_path / "site"), *sys.path]))
    began = time.monotonic()
    text = ended(start(workplace(tmp_path), *RAY), code=2)
    assert time.monotonic() - began < 150  # of which Ray's own start takes some, and more on a busy machine
    assert re.search(re.escape(reason).replace(r"\.\*", ".*"), text), text
    assert "Traceback" not in text


@needs_ray
def test_a_cluster_that_does_not_answer_is_said_in_a_minute(tmp_path, token):
    """Somebody else's server that says nothing, and a cluster whose processes for workers all fall over."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        began = time.monotonic()
        text = ended(start(workplace(tmp_path), *RAY, "--address", f"127.0.0.1:{silent.getsockname()[1]}"), code=2)
        assert time.monotonic() - began < 150
    assert "no Ray cluster at 127.0.0.1:" in text
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(NO_PROCESS)
    with nodes(tmp_path, 1, PYTHONPATH=os.pathsep.join([str(tmp_path / "site"), *sys.path])) as (address, _):
        began = time.monotonic()
        text = ended(start(workplace(tmp_path), *RAY, "--address", address), code=2)
        assert time.monotonic() - began < 150
    assert f"no Ray cluster at {address}: Ray does not answer, for 50 s" in text
    assert "Traceback" not in text


@needs_ray
def test_a_cluster_without_room_is_said_with_what_lacks(tmp_path, token):
    place = workplace(tmp_path)
    with nodes(tmp_path, 1) as (address, _):
        code = (
            f"import sys, ray; ray.init(address='{address}')\n"
            "@ray.remote(num_cpus=1)\nclass A:\n    def f(self): pass\n"
            "a = A.remote(); ray.get(a.f.remote()); print('there', flush=True); sys.stdin.read()"
        )
        other = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert other.stdout.readline() == b"there\n"
        text = ended(start(place, *RAY, "--address", address), code=2)
        other.communicate()
    assert "none of 2 workers could be started yet: each needs 1 CPU, and 0 of the cluster's 1 are free" in text
    assert "no worker could be started in 50 s: each needs 1 CPU, and 0 of the cluster's 1 are free" in text
    assert "Traceback" not in text


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


@pytest.mark.parametrize("stop", [KeyboardInterrupt(), SystemExit(signal.SIGTERM)])
def test_a_driver_that_is_interrupted_while_ray_starts_ends_what_has_started(monkeypatch, stop):
    """By SIGTERM too, which Ray's own handler takes until it has started: found by the soak."""
    ended = []

    def init(**_):
        raise stop

    monkeypatch.setattr(os, "environ", dict(os.environ))  # the token is for this run
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(init=init, shutdown=lambda: ended.append(True)))
    with pytest.raises(KeyboardInterrupt), ray_crew(None, 1, None):
        pass
    assert ended == [True]


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


# What workers tell


def test_news_is_told_now_and_then_and_all_of_it_arrives_at_the_watch(monkeypatch):
    now, box, watched = [0.0], mailbox()(), []
    monkeypatch.setattr(engine.time, "monotonic", lambda: now[0])
    watch = SimpleNamespace(
        begin=lambda *at: watched.append(at), step=watched.append, done=lambda *done: watched.append(done)
    )
    first, second = units(a=1, b=1)
    one, other = (Telling(unit, box.tell) for unit in (first, second))

    def arrived(*at_work):
        watched.clear()
        pass_on(box.take(), at_work, watch)
        return watched

    one.begin("a", "PGD")
    one.step("step 1")  # within the same second
    assert arrived(first, second) == [("a", "PGD"), ""]
    assert arrived(first, second) == []
    now[0] = 2.0
    one.done(first, 0, Done(2, 1, 2))
    one.done(first, 1, Done(1, 0, 1))
    now[0] = 4.0
    one.done(first, 1, Done(2, 0, 2))
    now[0] = 6.0
    one.step("step 3")
    other.begin("b", "FGSM")
    assert arrived(first, second) == [
        (first, 0, Done(2, 1, 2)), (first, 1, Done(2, 0, 2)), "step 3", ("b", "FGSM"), "",
    ]  # fmt: skip
    assert one.found == {0: Done(2, 1, 2), 1: Done(2, 0, 2)}
    now[0] = 7.0
    one.step("step 4")  # of the result before, whatever another has told since
    assert arrived(first, second) == [(first, 1, Done(2, 0, 2)), "step 4"]
    now[0] = 8.0
    one.done(first, 1, Done(3, 0, 3))
    assert arrived(second) == []  # the first has ended meanwhile, and its results say more

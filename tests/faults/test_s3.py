"""Runs in S3: a real client and server (moto's) on this machine, with a proxy between them that fails in many ways."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import fsspec
import pandas as pd
import pytest
import torch

from orthattack.eval.api import evaluate
from orthattack.eval.errors import EvaluationError
from orthattack.eval.results.stored_run import Run
from orthattack.eval.storage import files
from orthattack.eval.storage.files import open_files
from orthattack.eval.storage.run_folder import RunFolder
from tests.eval.tiny import SIZE, Net, classifier, dataset

moto = pytest.importorskip("moto.server", reason="needs moto[server] and s3fs, which bring some 60 packages")
pytest.importorskip("s3fs", reason="needs s3fs")

MODEL, DATA = "cifar10-robust", {"source": "cifar10-samples", "limit": 6}
OPTIONS = {"steps": 2, "shard_size": 2, "batch_size": 2, "checks": False, "progress": False, "report": False}
ANSWERS = {"403": "Forbidden", "500": "Internal Server Error", "503": "Slow Down"}


class Proxy:
    """Hands on what a client and a server say to each other, or does what `mode` says, once `after` requests came."""

    def __init__(self, port: int) -> None:
        self.mode, self.after, self.requests, self._server = "pass", 0, 0, port
        self.seen: list[str] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _failing(self) -> bool:
        return self.mode != "pass" and self.requests > self.after

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=[client], daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(OSError), socket.create_connection(("127.0.0.1", self._server)) as server:
            threading.Thread(target=self._answer, args=[server, client], daemon=True).start()
            while data := client.recv(2**16):
                if data.split(b" ", 1)[0] in (b"GET", b"PUT", b"HEAD", b"POST", b"DELETE"):
                    self.requests += 1
                    self.seen.append(data.split(b"\r\n", 1)[0].decode())
                if self._failing() and self.mode in ("silent", "refused"):
                    if self.mode == "refused":
                        return
                    time.sleep(300)
                if self._failing() and self.mode in ANSWERS:
                    head = (
                        f"HTTP/1.1 {self.mode} {ANSWERS[self.mode]}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
                    )
                    client.sendall(head.encode())
                    return
                server.sendall(data)

    def _answer(self, server: socket.socket, client: socket.socket) -> None:
        with suppress(OSError):
            while data := server.recv(2**16):
                if self._failing() and self.mode in ("stalled", "cut"):
                    client.sendall(data[: len(data) // 2])
                    if self.mode == "stalled":
                        time.sleep(300)
                    client.shutdown(socket.SHUT_RDWR)
                    return
                client.sendall(data)


@pytest.fixture(scope="module")
def server() -> Iterator[int]:
    running = moto.ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    running.start()
    yield running.get_host_and_port()[1]
    running.stop()


@pytest.fixture
def proxy(server, monkeypatch) -> Iterator[Proxy]:
    import s3fs

    proxy = Proxy(server)
    for name, value in (("ACCESS_KEY_ID", "x"), ("SECRET_ACCESS_KEY", "x"), ("DEFAULT_REGION", "us-east-1")):
        monkeypatch.setenv(f"AWS_{name}", value)
    s3fs.S3FileSystem.clear_instance_cache()
    monkeypatch.setitem(fsspec.config.conf, "s3", {"endpoint_url": f"http://127.0.0.1:{proxy.port}"})
    with suppress(FileExistsError):
        fsspec.filesystem("s3").mkdir("bucket")
    yield proxy
    proxy.close()


@pytest.fixture
def hasty(monkeypatch) -> None:
    """The same limits, a twentieth as long."""
    for name, value in (("DEADLINE", 3.0), ("_ANSWER", 1.0), ("_PAUSE", 0.02), ("_GONE", 0.5)):
        monkeypatch.setattr(files, name, value)


def rows(run: Run) -> pd.DataFrame:
    return run.rows(MODEL, "FGSM", 8 / 255).drop(columns="seconds")


FAULTS = ["refused", "silent", "stalled", "cut", "500", "503", "403"]


@pytest.mark.slow
@pytest.mark.parametrize("mode", FAULTS)
def test_a_store_that_fails_in_the_middle_ends_the_run_which_goes_on(proxy, hasty, mode, tmp_path, capsys):
    plain = evaluate(MODEL, DATA, ["FGSM"], out=tmp_path / "run", **OPTIONS)
    place = f"s3://bucket/{mode}"
    proxy.mode, proxy.after = mode, proxy.requests + 14
    start = time.monotonic()
    with pytest.raises(EvaluationError, match=rf"could not write to {place} \((failed \d times, the last time with|)"):
        evaluate(MODEL, DATA, ["FGSM"], out=place, **OPTIONS)
    assert time.monotonic() - start < 20  # the work itself takes some of it
    if mode != "403":  # which is final
        assert f"{place} failed (" in capsys.readouterr().err
    proxy.mode = "pass"
    there = RunFolder(place).there(files_example())
    run = evaluate(MODEL, DATA, ["FGSM"], out=place, **OPTIONS)
    assert run.status == "complete"
    assert len(there) < 3
    pd.testing.assert_frame_equal(rows(run), rows(plain), check_exact=True)


def files_example():
    from orthattack.eval.storage.run_folder import Shard

    return Shard(MODEL, "FGSM", 8 / 255, 0)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["silent", "stalled"])
def test_the_deadline_is_one_of_the_clock(proxy, mode):
    """With the limits as they are: said within 60 s, and given up soon after; the next request fails at once."""
    said: list[tuple[float, str]] = []
    start = time.monotonic()
    store = open_files("s3://bucket/x", lambda line: said.append((time.monotonic() - start, line)))
    store.write("a.txt", b"a" * 1000)
    proxy.mode = mode
    start = time.monotonic()
    with pytest.raises(OSError, match=r"failed \d times, the last time with TimeoutError|Timeout"):
        store.read("a.txt")
    assert 0 < said[0][0] < 30
    assert 50 < time.monotonic() - start < 65
    start = time.monotonic()
    with pytest.raises(OSError, match="failed"):
        store.read("a.txt")
    assert time.monotonic() - start < 10
    proxy.mode = "pass"
    assert store.read("a.txt") == b"a" * 1000


def test_a_bucket_that_is_not_there_is_said_at_once(proxy):
    start = time.monotonic()
    with pytest.raises(EvaluationError, match=r"could not write to s3://nobucket/run \(.*bucket"):
        evaluate(MODEL, DATA, ["FGSM"], out="s3://nobucket/run", **OPTIONS)
    assert time.monotonic() - start < 30
    with pytest.raises(EvaluationError, match="s3://nobucket/run is not the folder of a run"):
        Run.open("s3://nobucket/run")


@pytest.mark.slow
def test_a_finished_run_of_many_shards_goes_on_with_few_requests(proxy):
    options = {**OPTIONS, "shard_size": 1, "eps": [k / 255 for k in range(1, 26)], "steps": 1}
    images = torch.rand(20, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    data = dataset(Net().eval()(images).argmax(1).tolist(), images)
    nets = [classifier(Net(seed), f"net{seed}") for seed in range(2)]
    evaluate(nets, data, ["FGSM"], out="s3://bucket/many", **options)
    assert sum("/shards/" in path for path in fsspec.filesystem("s3").find("bucket/many")) == 1000
    before = proxy.requests
    assert evaluate(nets, data, ["FGSM"], out="s3://bucket/many", **options).status == "complete"
    assert proxy.requests - before <= 20, proxy.seen[before:]


@pytest.mark.slow
def test_two_drivers_share_a_run_in_a_store(proxy, tmp_path):
    plain = evaluate(MODEL, DATA, ["FGSM"], out=tmp_path / "run", **OPTIONS)
    outcomes = []

    def work(i: int) -> None:
        outcomes.append(evaluate(MODEL, DATA, ["FGSM"], out="s3://bucket/two", shard=(i, 2), **OPTIONS).status)

    work(1)
    work(2)
    assert outcomes == ["interrupted", "complete"]
    pd.testing.assert_frame_equal(rows(Run.open("s3://bucket/two")), rows(plain), check_exact=True)


@pytest.mark.slow
@pytest.mark.parametrize("shares", [("1/2", "2/2"), (None, None)])
def test_two_drivers_at_once_lose_no_row_and_have_none_twice(proxy, tmp_path, shares):
    """With half of the work each, or, where no lock keeps the second away, all of it."""
    (tmp_path / "suite.toml").write_text(
        f'models = ["{MODEL}"]\nattacks = ["FGSM", "PGD"]\nsteps = 2\nbatch_size = 2\nshard_size = 1\n'
        'save_images = "all"\nchecks = false\n[data]\nsource = "cifar10-samples"\nlimit = 6\n'
    )
    command = [sys.executable, "-m", "orthattack", "eval", "suite.toml", "--device", "cpu", "--out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "AWS_ENDPOINT_URL": f"http://127.0.0.1:{proxy.port}"}
    place = f"s3://bucket/at-once-{len([share for share in shares if share])}"

    def start(out: str, share: str | None = None) -> subprocess.Popen[str]:
        more = [] if share is None else ["--shard", share]
        return subprocess.Popen(
            [*command, out, *more], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE,
            text=True,
        )  # fmt: skip

    both = [start(place, share) for share in shares]
    for process in both:
        out, errors = process.communicate(timeout=400)
        assert process.returncode == 0, out + errors
    for out in (place, "plain"):  # of shares neither may have seen itself as the last
        last = start(out)
        assert last.communicate(timeout=400)[0]
        assert last.returncode == 0
    run, alone = Run.open(place), Run.open(tmp_path / "plain")
    assert run.status == "complete"
    for attack in ("FGSM", "PGD"):
        found, expected = (one.rows(MODEL, attack, 8 / 255).drop(columns="seconds") for one in (run, alone))
        assert found["position"].tolist() == list(range(6))
        pd.testing.assert_frame_equal(found, expected, check_exact=True)
        assert run.folder.image_positions(MODEL, attack, 8 / 255) == alone.folder.image_positions(
            MODEL, attack, 8 / 255
        )
    names = [path.removeprefix("bucket/") for path in fsspec.filesystem("s3").find(place.removeprefix("s3://"))]
    assert sum("/shards/" in name for name in names) == 12
    assert not [name for name in names if ".partial" in name]

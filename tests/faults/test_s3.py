"""Runs in S3: a real client and server (moto's) on this machine, with a proxy between them that fails in many ways."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import suppress

import pandas as pd
import pytest

from orthattack.eval.api import evaluate
from orthattack.eval.errors import EvaluationError
from orthattack.eval.results.stored_run import Run
from orthattack.eval.storage import files
from orthattack.eval.storage.files import open_files
from orthattack.eval.storage.run_folder import RunFolder

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
    import fsspec
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
    suite = {**OPTIONS, "shard_size": 1, "eps": [k / 255 for k in range(1, 26)]}
    data = {"source": "cifar10-samples", "limit": 20}
    evaluate([MODEL, "cifar10-standard"], data, ["FGSM"], out="s3://bucket/many", **suite)
    before = proxy.requests
    assert evaluate([MODEL, "cifar10-standard"], data, ["FGSM"], out="s3://bucket/many", **suite).status == "complete"
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

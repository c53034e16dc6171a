"""Files that are whole or not there, on a disk and in stores."""

from __future__ import annotations

import gc
import itertools
import os
from pathlib import Path

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from orthattack.eval.errors import EvaluationError
from orthattack.eval.storage import files
from orthattack.eval.storage.files import ATTEMPTS, Disk, Store, open_files


class Growing(MemoryFileSystem):
    """A store in which a file grows while it is written, as over sftp."""

    protocol = "growing"
    store: dict = {}  # noqa: RUF012
    pseudo_dirs = [""]  # noqa: RUF012

    @classmethod
    def _strip_protocol(cls, path):
        return MemoryFileSystem._strip_protocol(str(path).replace("growing://", "memory://"))


@pytest.fixture(params=["disk", "memory", "growing"])
def place(request, tmp_path, monkeypatch):
    fsspec.register_implementation("growing", Growing, clobber=True)
    for kind in (MemoryFileSystem, Growing):
        kind.store.clear()
        kind.pseudo_dirs[:] = [""]
    monkeypatch.setattr(files, "_PAUSE", 0.001)
    yield str(tmp_path / "root") if request.param == "disk" else f"{request.param}://bucket/place"
    for kind in (MemoryFileSystem, Growing):
        kind.store.clear()


@pytest.fixture
def opened(place):
    return open_files(place, pytest.fail)


def test_what_is_written_is_there_whole(opened, place):
    assert str(opened) == place
    opened.write("a/b/c.txt", b"one")
    opened.write("a/z.txt", b"two")
    opened.write("top.txt", b"three")
    assert opened.names() == ["a", "top.txt"]
    assert opened.names("a") == ["b", "z.txt"]
    assert opened.names("a/b") == ["c.txt"]
    assert opened.read("a/b/c.txt") == b"one"
    assert [path.read_bytes() for path in opened.fetch(["top.txt", "a/z.txt"])] == [b"three", b"two"]
    assert opened.exists("a/z.txt")
    opened.write("a/z.txt", b"new")
    assert opened.read("a/z.txt") == b"new"
    assert [path.read_bytes() for path in opened.fetch(["a/z.txt"])] == [b"new"]


def test_what_is_not_there(opened):
    opened.write("a/file.txt", b"")
    assert opened.names("nowhere") == []
    if isinstance(opened, Disk):
        with pytest.raises(OSError, match=r"a/file\.txt is a link or a file, where a run has a folder of its own"):
            opened.names("a/file.txt")
    else:  # a store may list a file as itself
        assert opened.names("a/file.txt") in ([], ["file.txt"])
    assert not opened.exists("a/other.txt")
    with pytest.raises(FileNotFoundError):
        opened.read("a/other.txt")


def test_a_write_that_fails_leaves_what_was_there(opened, monkeypatch):
    opened.write("a.txt", b"old")

    def fails(*_, **__):
        raise PermissionError("no")

    monkeypatch.setattr(files.os, "fsync", fails)
    for kind in (MemoryFileSystem, Growing):
        monkeypatch.setattr(kind, "pipe_file", fails)
    for name in ("a.txt", "b.txt"):
        with pytest.raises(PermissionError):
            opened.write(name, b"half")
    assert opened.read("a.txt") == b"old"
    assert opened.names() == ["a.txt"]


def test_what_exists_is_not_created_again(opened):
    assert opened.create("folder/a.txt", b"first")
    assert not opened.create("folder/a.txt", b"second")
    assert opened.read("folder/a.txt") == b"first"
    assert opened.names("folder") == ["a.txt"]


def test_a_file_is_named_when_it_is_complete(tmp_path, monkeypatch):
    disk, seen = Disk(tmp_path), []
    monkeypatch.setattr(files.os, "fsync", lambda _: seen.append(disk.names()))
    disk.write("a.txt", b"whole")
    ((name,),) = seen
    assert name.startswith(".a.txt.")
    assert name.endswith(".partial")
    assert disk.names() == ["a.txt"]


def test_a_file_in_a_growing_store_is_moved_to_its_name(place, monkeypatch):
    if not place.startswith("growing"):
        return
    piped = []
    monkeypatch.setattr(
        Growing,
        "pipe_file",
        lambda self, path, *a, **k: piped.append(path) or MemoryFileSystem.pipe_file(self, path, *a, **k),
    )
    open_files(place, pytest.fail).write("a.txt", b"one")
    (partial,) = piped
    assert partial.startswith("/bucket/place/.a.txt.")
    assert partial.endswith(".partial")


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    flushed = []

    def fsync(number):
        flushed.append((os.fstat(number).st_ino, (tmp_path / "a").exists(), (tmp_path / "b").exists()))

    monkeypatch.setattr(files.os, "fsync", fsync)
    disk = Disk(tmp_path)
    disk.write("a", b"1")
    assert disk.create("b", b"2")
    inodes = [(tmp_path / name).stat().st_ino for name in "ab"]
    assert flushed == [(inodes[0], False, False), (inodes[1], True, False)]


def test_a_disk_without_links_still_creates_once(tmp_path, monkeypatch):
    def none(*_, **__):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(files.os, "link", none)
    disk = Disk(tmp_path)
    assert disk.create("a.txt", b"first")
    assert not disk.create("a.txt", b"second")
    assert disk.read("a.txt") == b"first"
    assert disk.names() == ["a.txt"]


def test_places_are_told_apart(tmp_path):
    assert isinstance(open_files(tmp_path, pytest.fail), Disk)
    assert open_files(f"file://{tmp_path}", pytest.fail).root == tmp_path
    assert isinstance(open_files("memory://bucket/run/", pytest.fail), Store)
    assert str(open_files("memory://bucket/run/", pytest.fail)) == "memory://bucket/run"
    with pytest.raises(EvaluationError, match="nowhere://x is not a place that fsspec knows"):
        open_files("nowhere://x", pytest.fail)


def test_a_store_is_asked_six_times_and_left_alone_longer_and_longer(monkeypatch):
    pauses, said = [], []
    monkeypatch.setattr(files.time, "sleep", pauses.append)
    store = open_files("memory://bucket/run", said.append)
    count = itertools.count(1)

    def fails(*_, **__):
        raise ConnectionResetError(f"number {next(count)}")

    monkeypatch.setattr(MemoryFileSystem, "cat_file", fails)
    with pytest.raises(OSError, match=r"^failed 6 times, the last time with ConnectionResetError: number 6$"):
        store.read("a.txt")
    assert ATTEMPTS == 6
    assert pauses == [0.5, 1, 2, 4, 8]
    assert said == [
        f"memory://bucket/run failed (ConnectionResetError: number {k}); trying again, {k + 1} of 6"
        for k in range(1, 6)
    ]


def test_an_answer_that_was_lost_is_not_taken_for_another_process(monkeypatch):
    """The first attempt created the file, and only its answer was lost."""
    monkeypatch.setattr(files, "_PAUSE", 0.001)
    MemoryFileSystem.store.clear()
    store = open_files("memory://bucket/run", lambda _: None)
    pipe, lost = MemoryFileSystem.pipe_file, [True]

    def piped(self, path, value, mode="overwrite", **kwargs):
        if mode == "create" and path in self.store:
            raise FileExistsError(path)
        pipe(self, path, value)
        if lost.pop():
            lost.append(False)
            raise ConnectionResetError
        lost.append(False)

    monkeypatch.setattr(MemoryFileSystem, "pipe_file", piped)
    assert store.create("a.txt", b"mine")
    assert not store.create("a.txt", b"another's")
    MemoryFileSystem.store.clear()


def test_what_was_fetched_is_kept_while_the_store_is_open(monkeypatch):
    MemoryFileSystem.store.clear()
    store = open_files("memory://bucket/run", pytest.fail)
    store.write("a.txt", b"one")
    store.write("b.txt", b"two")
    cat, asked = MemoryFileSystem.cat_file, []
    monkeypatch.setattr(MemoryFileSystem, "cat_file", lambda self, path: asked.append(path[-5:]) or cat(self, path))
    first = store.fetch(["a.txt"])
    assert store.fetch(["b.txt", "a.txt"]) == [*store.fetch(["b.txt"]), *first]
    assert asked == ["a.txt", "b.txt"]
    temporary: Path = first[0].parent
    assert temporary.is_dir()
    del store
    gc.collect()
    assert not temporary.exists()
    MemoryFileSystem.store.clear()

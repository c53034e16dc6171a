"""Where the files of a run are: on a disk, or in any store that fsspec knows. Each file is whole or not there.

Both kinds offer the same: names in a folder, reading, writing whole files, and creating one that must not exist yet.
Names are relative to the root, with forward slashes.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from functools import partial
from itertools import count, groupby
from pathlib import Path
from typing import Any, TypeVar

from orthattack.eval.errors import EvaluationError, first_line, told
from orthattack.eval.storage import inside

ATTEMPTS, DEADLINE = 6, 60.0
"""How often a store is asked before its failure counts, and in how many seconds of the clock in all; in between it is
left alone for 0.5, 1, 2, ... seconds."""

_PAUSE, _ANSWER, _SPEED = 0.5, 20.0, 1e6  # seconds, seconds that an answer may take, and bytes a second beyond
_LARGE = 50e6  # bytes, of a file of images that is read
_GONE = 5.0  # seconds that a store has for a request which has not answered the one before
_DOWNLOADS = 16

# What a store means by these will not change by asking again.
_FINAL: tuple[type[Exception], ...] = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError)
_FINAL += (NotADirectoryError, NotImplementedError, TypeError, ValueError)

# An object appears when its upload is complete. Elsewhere (sftp, smb, hdfs ...) a file grows while it is written.
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss", "tos", "memory"}

_MAX_RECORD = 64 * 2**20  # bytes of a manifest, a session, checks

T = TypeVar("T")


def open_files(place: Path | str, say: Callable[[str], None]) -> Files:
    """The files at a path, or at a URL such as s3://bucket/run. EvaluationError: a URL of a kind that fsspec does not
    know, or for which a package is missing."""
    if isinstance(place, Path) or "://" not in place:
        return Disk(Path(place))
    kind, _, path = place.partition("://")
    return Disk(Path(path)) if kind in ("file", "local") else Store(place, say)


class Disk:
    """Files on a disk, or on a network file system that is mounted like one; the root need not exist."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def names(self, folder: str = "") -> list[str]:
        """What lies directly in a folder, files and folders alike, sorted; nothing if there is no such folder."""
        try:
            with inside.folder(self.root, folder) as place:
                return place.names()
        except FileNotFoundError:
            return []

    def exists(self, name: str) -> bool:
        """Whether there is anything by that name."""
        folder, _, last = name.rpartition("/")
        try:
            with inside.folder(self.root, folder) as place:
                return place.has(last)
        except FileNotFoundError:
            return False

    def read(self, name: str) -> bytes:
        """The content of a record; FileNotFoundError if there is none."""
        folder, _, last = name.rpartition("/")
        with inside.folder(self.root, folder) as place, os.fdopen(place.open(last, os.O_RDONLY), "rb") as stream:
            if os.fstat(stream.fileno()).st_size > _MAX_RECORD:
                raise OSError(errno.EFBIG, f"{self.root / name} is larger than any record of a run")
            return stream.read()

    def fetch(self, names: Sequence[str]) -> list[Path]:
        """Where on this machine's disks the contents of files are; they must not be changed there."""
        found = []
        for folder, group in groupby(names, key=lambda name: name.rpartition("/")[0]):
            with inside.folder(self.root, folder) as place:
                found += [place.plain(name.rpartition("/")[2]) for name in group]
        return found

    def write(self, name: str, content: bytes) -> None:
        """Write a file, in place of what there was: all of it or, on an error, nothing."""
        with self._beside(name, content) as (place, partial, last):
            place.rename(partial, last)

    def create(self, name: str, content: bytes) -> bool:
        """Write a file unless there is one already; whether it was written."""
        with self._beside(name, content) as (place, partial, last):
            try:
                place.link(partial, last)  # fails if there is one, also over NFS, where O_EXCL may not
            except FileExistsError:
                return False
            except OSError:  # a file system without links
                if place.has(last):
                    return False
                place.rename(partial, last)
            return True

    def put_aside(self, name: str) -> None:
        """Call what is damaged NAME.damaged, without its own ending."""
        folder, _, last = name.rpartition("/")
        with inside.folder(self.root, folder) as place:
            stem = last.rpartition(".")[0]
            taken = (f"{stem}.damaged" + (f"-{k}" if k else "") for k in count())
            place.rename(last, next(new for new in taken if not place.has(new)))

    def remove(self, names: Sequence[str]) -> None:
        """Remove files."""
        for folder, group in groupby(names, key=lambda name: name.rpartition("/")[0]):
            with inside.folder(self.root, folder) as place:
                for name in group:
                    place.remove(name.rpartition("/")[2])

    def remove_folder(self, name: str) -> None:
        """Remove a folder of the root, if there is one and it is empty."""
        with suppress(OSError), inside.folder(self.root) as place:
            place.remove_folder(name)

    def at_once(self) -> AbstractContextManager[None]:
        """A context in which what there is is told from one look, where that is cheaper."""
        return nullcontext()

    @contextmanager
    def _beside(self, name: str, content: bytes) -> Iterator[tuple[inside.Folder, str, str]]:
        """Content in a file of the same folder, so on the same file system, under a name that nobody else has."""
        folder, _, last = name.rpartition("/")
        with inside.folder(self.root, folder, make=True) as place:
            partial = f".{last}.{secrets.token_hex(8)}.partial"
            try:
                with os.fdopen(place.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL), "wb") as stream:
                    stream.write(content)
                    stream.flush()
                    os.fsync(stream.fileno())
                yield place, partial, last
            finally:
                place.remove(partial)


class Store:
    """Files in a store that is reached through fsspec. It may fail now and then: every request is tried a few times.

    What is fetched is kept in a temporary folder as long as this object lives: the files of a run do not change."""

    def __init__(self, url: str, say: Callable[[str], None]) -> None:
        import fsspec

        try:
            self._fs, self._root = fsspec.core.url_to_fs(url.rstrip("/"), **_options(url))
        except ImportError as error:  # fsspec says which package is missing
            raise EvaluationError(f"{url} cannot be used: {first_line(error)}") from error
        except ValueError as error:
            raise EvaluationError(f"{url} is not a place that fsspec knows ({first_line(error)})") from error
        protocol = self._fs.protocol
        protocols = {protocol} if isinstance(protocol, str) else set(protocol)
        self._puts_are_atomic = bool(protocols & _OBJECT_STORES)
        if hasattr(self._fs, "retries"):  # s3fs's own, beside those of its client
            self._fs.retries = 1
        self._url, self._say, self._is_gone = url.rstrip("/"), say, False
        self._tree: dict[str, list[str]] | None = None
        self._copies: dict[str, Path] = {}
        self._temporary = Path(tempfile.mkdtemp(prefix="orthattack-"))
        weakref.finalize(self, shutil.rmtree, self._temporary, ignore_errors=True)

    def __str__(self) -> str:
        return self._url

    def names(self, folder: str = "") -> list[str]:
        def listed() -> list[str]:
            self._fs.invalidate_cache()  # others write here too
            return [str(entry).rstrip("/").rpartition("/")[2] for entry in self._fs.ls(path, detail=False)]

        if self._tree is not None:
            return self._tree.get(folder, [])
        path = self._at(folder)
        try:
            return sorted(self._patiently(listed))
        except (FileNotFoundError, NotADirectoryError):
            return []

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """A context in which what there is is told from one look at everything: a request for each 1,000 files."""

        def listed() -> list[str]:
            self._fs.invalidate_cache()
            return [str(path).lstrip("/") for path in self._fs.find(self._root)]

        try:
            paths = self._patiently(listed, _SPEED * DEADLINE / 2)
        except FileNotFoundError:
            paths = []
        tree: dict[str, set[str]] = {}
        for path in paths:
            parts = path.removeprefix(self._root.lstrip("/")).strip("/").split("/")
            for k, part in enumerate(parts):
                tree.setdefault("/".join(parts[:k]), set()).add(part)
        self._tree = {folder: sorted(names) for folder, names in tree.items()}
        try:
            yield
        finally:
            self._tree = None

    def exists(self, name: str) -> bool:
        def found() -> bool:
            self._fs.invalidate_cache()
            self._fs.info(self._at(name))  # not `exists`, which takes any failure for an absence
            return True

        if self._tree is not None:
            folder, _, last = name.rpartition("/")
            return last in self._tree.get(folder, ())
        try:
            return self._patiently(found)
        except FileNotFoundError:
            return False

    def read(self, name: str) -> bytes:
        return self._patiently(
            lambda: bytes(self._fs.cat_file(self._at(name))), _LARGE if name.endswith(".safetensors") else 0
        )

    def fetch(self, names: Sequence[str]) -> list[Path]:
        missing = [name for name in names if name not in self._copies]
        if missing:
            with ThreadPoolExecutor(min(_DOWNLOADS, len(missing))) as pool:
                self._copies.update(zip(missing, pool.map(self._copy, missing), strict=True))
        return [self._copies[name] for name in names]

    def _copy(self, name: str) -> Path:
        path = self._temporary / f"{secrets.token_hex(8)}-{name.rpartition('/')[2]}"
        path.write_bytes(self.read(name))
        return path

    def write(self, name: str, content: bytes) -> None:
        self._put(name, content)
        self._copies.pop(name, None)

    def remove(self, names: Sequence[str]) -> None:
        """Remove files."""
        for name in names:
            self._copies.pop(name, None)
            with suppress(FileNotFoundError):
                self._patiently(partial(self._fs.rm_file, self._at(name)))

    def _put(self, name: str, content: bytes) -> None:
        target = self._at(name)
        if self._puts_are_atomic:
            self._patiently(lambda: self._fs.pipe_file(target, content), len(content))
            return

        def beside_and_moved() -> None:
            folder, _, last = target.rpartition("/")
            partial = f"{folder}/.{last}.{secrets.token_hex(8)}.partial"
            self._fs.makedirs(folder, exist_ok=True)
            self._fs.pipe_file(partial, content)
            self._fs.mv(partial, target)

        self._patiently(beside_and_moved, len(content))

    def create(self, name: str, content: bytes) -> bool:
        if not self._puts_are_atomic:  # whole, but of two that start in the same moment both may think they are first
            if not self.exists(name):
                self._put(name, content)
            return self.read(name) == content

        def created() -> bool:
            try:
                self._fs.pipe_file(self._at(name), content, mode="create")
            except FileExistsError:  # perhaps by an attempt of ours whose answer was lost
                return self.read(name) == content
            return True

        return self._patiently(created)

    def _at(self, name: str) -> str:
        return f"{self._root}/{name}" if name else self._root

    def _patiently(self, action: Callable[[], T], size: float = 0) -> T:
        """What `action` returns, tried `ATTEMPTS` times within `DEADLINE`, and longer for so many bytes; OSError that
        says so if it never succeeds. The clients' own attempts are off, so that this is the time it takes."""
        from tenacity import Retrying, retry_if_exception, stop_after_attempt, stop_after_delay, wait_exponential

        limit, attempts = (_GONE, 1) if self._is_gone else (DEADLINE + size / _SPEED, ATTEMPTS)
        until = time.monotonic() + limit

        def said(state: Any) -> None:
            found, following = told(state.outcome.exception()), state.attempt_number + 1
            self._say(f"{self._url} failed ({found}); trying again, {following} of {attempts}")

        def failed(state: Any) -> T:
            self._is_gone = True
            times = f"{state.attempt_number} times, the last time with" if state.attempt_number > 1 else "with"
            raise OSError(f"failed {times} {told(state.outcome.exception())}") from state.outcome.exception()

        retrying = Retrying(
            retry=retry_if_exception(lambda error: isinstance(error, Exception) and not isinstance(error, _FINAL)),
            stop=stop_after_attempt(attempts) | stop_after_delay(limit - 0.5),
            wait=wait_exponential(_PAUSE),
            sleep=lambda seconds: time.sleep(seconds),
            before_sleep=said,
            retry_error_callback=failed,
        )
        answer: T = retrying(lambda: _in_time(action, min(_ANSWER + size / _SPEED, until - time.monotonic())))
        self._is_gone = False
        return answer


def _in_time(action: Callable[[], T], seconds: float) -> T:
    """What `action` returns; TimeoutError if it takes longer by the clock. Clients limit single reads and connections,
    but not a server that sends a byte now and then; the thread that waits for it ends with the process."""
    answer: Future[T] = Future()

    def work() -> None:
        try:
            answer.set_result(action())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=work, daemon=True).start()
    if not wait([answer], max(0.1, seconds)).done:
        raise TimeoutError(f"no answer in {seconds:.0f} s")
    return answer.result()


def _options(url: str) -> dict[str, Any]:
    """How a store's client is to be made so that it does not try again by itself; what the person has set is kept."""
    import fsspec

    if url.partition("://")[0] not in ("s3", "s3a"):
        return {}
    once = {"retries": {"total_max_attempts": 1}, "connect_timeout": 10, "read_timeout": _ANSWER}
    return {"config_kwargs": once | fsspec.config.conf.get("s3", {}).get("config_kwargs", {})}


Files = Disk | Store

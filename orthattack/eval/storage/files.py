"""Where the files of a run are: on a disk, or in any store that fsspec knows. Each file is whole or not there.

Both kinds offer the same: names in a folder, reading, writing whole files, and creating one that must not exist yet.
Names are relative to the root, with forward slashes.
"""

from __future__ import annotations

import os
import secrets
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from orthattack.eval.errors import EvaluationError, first_line

ATTEMPTS = 6
"""How often a store is asked before its failure counts; in between it is left alone for 0.5, 1, 2, ... seconds."""

_PAUSE = 0.5
_DOWNLOADS = 16

# What a store means by these will not change by asking again.
_FINAL: tuple[type[Exception], ...] = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError)
_FINAL += (NotADirectoryError, NotImplementedError, TypeError, ValueError)

# An object appears when its upload is complete. Elsewhere (sftp, smb, hdfs ...) a file grows while it is written.
_OBJECT_STORES = {"s3", "s3a", "gs", "gcs", "abfs", "abfss", "az", "adl", "oci", "oss", "tos", "memory"}

T = TypeVar("T")


def open_files(place: Path | str, say: Callable[[str], None]) -> Files:
    """The files at a path, or at a URL such as s3://bucket/run. EvaluationError: a URL of a kind that fsspec does not
    know, or for which a package is missing."""
    if isinstance(place, Path) or "://" not in place:
        return Disk(Path(place))
    if place.startswith("file://"):
        return Disk(Path(place.removeprefix("file://")))
    return Store(place, say)


class Disk:
    """Files on a disk, or on a network file system that is mounted like one; the root need not exist."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def __str__(self) -> str:
        return str(self.root)

    def names(self, folder: str = "") -> list[str]:
        """What lies directly in a folder, files and folders alike, sorted; nothing if there is no such folder."""
        try:
            return sorted(os.listdir(self.root / folder))  # noqa: PTH208 - a path for each of thousands costs
        except (FileNotFoundError, NotADirectoryError):
            return []

    def exists(self, name: str) -> bool:
        """Whether there is such a file."""
        return (self.root / name).is_file()

    def read(self, name: str) -> bytes:
        """The content of a file; FileNotFoundError if there is none."""
        return (self.root / name).read_bytes()

    def fetch(self, names: Sequence[str]) -> list[Path]:
        """Where on this machine's disks the contents of files are; they must not be changed there."""
        return [self.root / name for name in names]

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        """A context with a path to write to; at its end that becomes the file, all of it or, on an error, nothing."""
        path = self.root / name
        with self._beside(path) as partial:
            yield partial
            _flush(partial)
            partial.replace(path)

    def create(self, name: str, content: bytes) -> bool:
        """Write a file unless there is one already; whether it was written."""
        path = self.root / name
        with self._beside(path) as partial:
            partial.write_bytes(content)
            _flush(partial)
            try:
                os.link(partial, path)  # fails if there is one, also over NFS, where O_EXCL may not
            except FileExistsError:
                return False
            except OSError:  # a file system without links
                if path.exists():
                    return False
                partial.replace(path)
            return True

    @contextmanager
    def _beside(self, path: Path) -> Iterator[Path]:
        """A name in the same folder, so on the same file system, that nobody else has, on no machine."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{secrets.token_hex(8)}.partial")
        try:
            yield partial
        finally:
            with suppress(OSError):
                partial.unlink(missing_ok=True)


def _flush(path: Path) -> None:
    with path.open("rb+") as stream:
        os.fsync(stream.fileno())


class Store:
    """Files in a store that is reached through fsspec. It may fail now and then: every request is tried a few times.

    What is fetched is kept in a temporary folder as long as this object lives: the files of a run do not change."""

    def __init__(self, url: str, say: Callable[[str], None]) -> None:
        import fsspec

        try:
            self._fs, self._root = fsspec.core.url_to_fs(url.rstrip("/"))
        except ImportError as error:  # fsspec says which package is missing
            raise EvaluationError(f"{url} cannot be used: {first_line(error)}") from error
        except ValueError as error:
            raise EvaluationError(f"{url} is not a place that fsspec knows ({first_line(error)})") from error
        protocol = self._fs.protocol
        protocols = {protocol} if isinstance(protocol, str) else set(protocol)
        self._puts_are_atomic = bool(protocols & _OBJECT_STORES)
        self._url, self._say = url.rstrip("/"), say
        self._copies: dict[str, Path] = {}
        self._temporary = Path(tempfile.mkdtemp(prefix="orthattack-"))
        weakref.finalize(self, shutil.rmtree, self._temporary, ignore_errors=True)

    def __str__(self) -> str:
        return self._url

    def names(self, folder: str = "") -> list[str]:
        def listed() -> list[str]:
            self._fs.invalidate_cache()  # others write here too
            return [str(entry).rstrip("/").rpartition("/")[2] for entry in self._fs.ls(path, detail=False)]

        path = self._at(folder)
        try:
            return sorted(self._patiently(listed))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def exists(self, name: str) -> bool:
        def found() -> bool:
            self._fs.invalidate_cache()
            self._fs.info(self._at(name))  # not `exists`, which takes any failure for an absence
            return True

        try:
            return self._patiently(found)
        except FileNotFoundError:
            return False

    def read(self, name: str) -> bytes:
        return self._patiently(lambda: bytes(self._fs.cat_file(self._at(name))))

    def fetch(self, names: Sequence[str]) -> list[Path]:
        missing = [name for name in names if name not in self._copies]
        if missing:
            with ThreadPoolExecutor(min(_DOWNLOADS, len(missing))) as pool:
                self._copies.update(zip(missing, pool.map(self._copy, missing), strict=True))
        return [self._copies[name] for name in names]

    def _copy(self, name: str) -> Path:
        path = self._scratch(name)
        path.write_bytes(self.read(name))
        return path

    @contextmanager
    def writing(self, name: str) -> Iterator[Path]:
        path = self._scratch(name)
        try:
            yield path
            self._put(name, path.read_bytes())
        finally:
            self._copies.pop(name, None)
            path.unlink(missing_ok=True)

    def _put(self, name: str, content: bytes) -> None:
        target = self._at(name)
        if self._puts_are_atomic:
            self._patiently(lambda: self._fs.pipe_file(target, content))
            return

        def beside_and_moved() -> None:
            folder, _, last = target.rpartition("/")
            partial = f"{folder}/.{last}.{secrets.token_hex(8)}.partial"
            self._fs.makedirs(folder, exist_ok=True)
            self._fs.pipe_file(partial, content)
            self._fs.mv(partial, target)

        self._patiently(beside_and_moved)

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

    def _scratch(self, name: str) -> Path:
        return self._temporary / f"{secrets.token_hex(8)}-{name.rpartition('/')[2]}"

    def _patiently(self, action: Callable[[], T]) -> T:
        """What `action` returns, tried `ATTEMPTS` times; OSError that says so if it never succeeds."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return action()
            except _FINAL:
                raise
            except Exception as error:  # every store raises its own
                found = f"{type(error).__name__}: {first_line(error)}"
                if attempt == ATTEMPTS:
                    raise OSError(f"failed {ATTEMPTS} times, the last time with {found}") from error
            self._say(f"{self._url} failed ({found}); trying again, {attempt + 1} of {ATTEMPTS}")
            time.sleep(_PAUSE * 2 ** (attempt - 1))
        raise AssertionError("unreachable")


Files = Disk | Store

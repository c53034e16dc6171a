"""Files inside a folder, reached name by name without following a link, so that nothing outside it is touched.

The folder itself may be a link: it is what a person named. Below it, links, and whatever is not of the expected kind,
are an OSError whose `strerror` names the place and says what to do.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

_RELATIVE = os.open in os.supports_dir_fd  # all but Windows: a folder that is open cannot be exchanged for another
_CAREFUL = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)  # a pipe that nobody writes to does not wait
_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0)


class Folder:
    """An open folder: names are looked up in it, wherever it may be moved to meanwhile."""

    def __init__(self, path: Path, fd: int | None) -> None:
        self.path, self.fd = path, fd

    def _at(self, name: str) -> str:
        return name if self.fd is not None else str(self.path / name)

    def names(self) -> list[str]:
        """What lies in it, sorted."""
        return sorted(os.listdir(self.path if self.fd is None else self.fd))  # noqa: PTH208

    def has(self, name: str) -> bool:
        """Whether there is anything by that name, whatever it is."""
        try:
            os.stat(self._at(name), dir_fd=self.fd, follow_symlinks=False)
        except FileNotFoundError:
            return False
        return True

    def open(self, name: str, flags: int) -> int:
        """A descriptor of a plain file; one that is to be written to has no second name elsewhere."""
        try:
            fd = os.open(self._at(name), flags | _CAREFUL, 0o666, dir_fd=self.fd)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
                raise self._odd(name) from error
            raise
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or (flags & (os.O_WRONLY | os.O_RDWR) and found.st_nlink > 1):
            os.close(fd)
            raise self._odd(name)
        return fd

    def plain(self, name: str) -> Path:
        """The path of a plain file, to be read."""
        if not stat.S_ISREG(os.stat(self._at(name), dir_fd=self.fd, follow_symlinks=False).st_mode):
            raise self._odd(name)
        return self.path / name

    def rename(self, old: str, new: str) -> None:
        """Give a file another name, in place of what has it."""
        os.replace(self._at(old), self._at(new), src_dir_fd=self.fd, dst_dir_fd=self.fd)

    def link(self, old: str, new: str) -> None:
        """Give a file a second name; FileExistsError if something has it."""
        os.link(self._at(old), self._at(new), src_dir_fd=self.fd, dst_dir_fd=self.fd)

    def remove(self, name: str) -> None:
        """Remove a file, if there is one."""
        with suppress(OSError):
            os.unlink(self._at(name), dir_fd=self.fd)

    def remove_folder(self, name: str) -> None:
        """Remove a folder in it, which must be empty."""
        os.rmdir(self._at(name), dir_fd=self.fd)

    def _odd(self, name: str) -> OSError:
        return OSError(errno.ELOOP, f"{self.path / name} is a link, or no plain file: remove it, it is no run's")


@contextmanager
def folder(root: Path, name: str = "", make: bool = False) -> Iterator[Folder]:
    """A folder inside `root`, open; FileNotFoundError if there is none and none is to be made."""
    if make:
        root.mkdir(parents=True, exist_ok=True)
    path, fd = root, os.open(root, _FOLDER) if _RELATIVE else None
    try:
        for part in filter(None, name.split("/")):
            path = path / part
            if part in (".", ".."):
                raise OSError(errno.ELOOP, f"{path} is outside of {root}")
            below = _step(path, fd, make)
            if fd is not None:
                os.close(fd)
            fd = below
        yield Folder(path, fd)
    finally:
        if fd is not None:
            os.close(fd)


def _step(path: Path, fd: int | None, make: bool) -> int | None:
    if make:
        with suppress(FileExistsError):
            os.mkdir(path if fd is None else path.name, dir_fd=fd)
    try:
        if fd is not None:
            return os.open(path.name, _FOLDER | _CAREFUL, dir_fd=fd)
        if not stat.S_ISDIR(path.lstat().st_mode):
            raise NotADirectoryError(errno.ENOTDIR, "")
    except OSError as error:
        if error.errno in (errno.ENOTDIR, errno.ELOOP):
            text = f"{path} is a link or a file, where a run has a folder of its own: remove it"
            raise OSError(errno.ELOOP, text) from error
        raise
    return None

"""Who may work in a run's folder at the same time: one whole run, or several processes that each do a share of it.

Locks are the operating system's (flock), so that a process which dies, however it dies, leaves none behind. Linux
passes them on to the server of a network file system (NFS 4, or 3 with its lock service; Lustre mounted with flock),
and then they hold between machines. Where there are none at all, that is said, and nobody is kept out; the rows are
right even so, only computed twice.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from orthattack.eval.errors import EvaluationError
from orthattack.eval.storage import inside

try:
    import fcntl

    _HAS_LOCKS = True
except ImportError:  # not a POSIX system
    _HAS_LOCKS = False

Share = tuple[int, int]  # share i of n, 1 <= i <= n: --shard i/n

_PATIENCE = 0.5  # seconds: whoever looks who holds a lock holds it for a moment


class _Taken(Exception):  # noqa: N818 - a value rather than an error
    pass


@contextmanager
def working_in(
    folder: Path, share: Share | None, about: Mapping[str, Any], say: Callable[[str], None]
) -> Iterator[bool]:
    """Hold a run's folder, on a disk: all of it, or, with `share`, that share of the work, beside others.

    `about` is what whoever is refused should know of this process: host, process, started, shard. Yields whether the
    lock is really held; where the file system has none, `say` is told. EvaluationError: another is at work there."""
    with ExitStack() as stack:
        try:
            with inside.folder(folder, "sessions", make=True) as locks:
                if share is None:
                    held = _hold(stack, locks, "whole.lock", True, about)
                else:
                    own = f"shard-{share[0]}-of-{share[1]}.lock"
                    held = _hold(stack, locks, "whole.lock", False, about) and _hold(stack, locks, own, True, about)
        except _Taken:
            raise EvaluationError(_refusal(folder, share)) from None
        except OSError as error:
            raise EvaluationError(f"could not lock {folder} ({error.strerror or error})") from error
        if not held:
            say(f"{folder} is on a file system without locks: see to it that no two processes do the same work")
        yield held


def _hold(stack: ExitStack, locks: inside.Folder, name: str, exclusive: bool, about: Mapping[str, Any]) -> bool:
    """Lock a file until the stack is closed; False where there are no locks, _Taken if somebody else has it."""
    if not _HAS_LOCKS:
        return False
    fd = locks.open(name, os.O_RDWR | os.O_CREAT | os.O_APPEND)
    stream = stack.enter_context(os.fdopen(fd, "r+", encoding="utf-8"))
    until = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.flock(stream, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > until:
                raise _Taken from None
            time.sleep(0.02)
        except OSError:
            return False
    if exclusive:
        stream.truncate(0)
        stream.write(json.dumps(about))
        stream.flush()
    return True


def _refusal(folder: Path, share: Share | None) -> str:
    with inside.folder(folder, "sessions") as locks:
        names = [name for name in locks.names() if name.endswith(".lock")]
        holders = [about for name in names if (about := _holder(locks, name)) is not None]
    who = ", ".join(
        f"process {about.get('process')} on {about.get('host')}, since {about.get('started')}"
        + (f" (shard {about['shard']})" if about.get("shard") else "")
        for about in holders
    )
    advice = "wait until it has finished, or stop it; or choose another folder"
    if share is None and any(about.get("shard") for about in holders):
        advice = "wait until they have finished, or do a shard that nobody does with --shard i/n"
    elif share is None or not any(about.get("shard") for about in holders):
        advice += "; to share the work, start every process with --shard i/n"
    return f"{folder} is at work already: {who or 'another process'}. {advice[0].upper()}{advice[1:]}"


def _holder(locks: inside.Folder, name: str) -> dict[str, Any] | None:
    """What whoever holds a lock says of itself, None if nobody holds it alone."""
    try:
        with os.fdopen(locks.open(name, os.O_RDONLY), encoding="utf-8") as stream:
            try:
                fcntl.flock(stream, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except OSError:
                return dict(json.loads(stream.read() or "{}"))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}
    return None

"""Images decoded in the background, a little ahead of whoever attacks them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial

from torch import Tensor

WORKERS = 2


class Decoder:
    """Decodes chunks of images in threads: the one that is taken, and one that may come next.

    `load` decodes one image; decoders leave the interpreter to others while they work. Where it is a user's code, which
    may change the process under an attack, it is called by whoever takes the chunk, and nothing is decoded `ahead`."""

    def __init__(self, load: Callable[[int], Tensor], ahead: bool = True) -> None:
        self._load, self._ahead = load, ahead
        self._pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="decode")
        self._begun: dict[int, Future[Tensor]] = {}

    def begin(self, chunk: Sequence[int]) -> None:
        """Decode what will probably be taken next; what was begun before, and is not among it, is given up."""
        if not self._ahead:
            return
        before, self._begun = self._begun, {}
        for item in chunk:
            self._begun[item] = before.pop(item) if item in before else self._pool.submit(self._load, item)
        for future in before.values():
            future.cancel()

    def take(self, chunk: Sequence[int]) -> dict[int, Tensor | Exception]:
        """The images of a chunk by position, or what went wrong with them."""
        if not self._ahead:
            return {item: _outcome(partial(self._load, item)) for item in chunk}
        self.begin(chunk)
        futures, self._begun = self._begun, {}
        return {item: _outcome(future.result) for item, future in futures.items()}

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown(wait=True, cancel_futures=True)


def _outcome(load: Callable[[], Tensor]) -> Tensor | Exception:
    try:
        return load()
    except Exception as error:  # decoders raise whatever they like
        return error

"""Photographs decoded in the background, a little ahead of whoever attacks them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

__all__ = ["ahead"]

WORKERS = 2


def ahead(chunks: Sequence[Sequence[int]], load: Callable[[int], Tensor]) -> Iterator[dict[int, Tensor | Exception]]:
    """The images of each chunk, those of the next one decoded by threads meanwhile; two chunks in memory at most.

    Args:
        chunks: positions of photographs.
        load: decodes one; it is called by several threads. Decoders leave the interpreter to others while they work.

    Yields:
        For each chunk, its images by position, or what went wrong with them.
    """
    pool = ThreadPoolExecutor(WORKERS, thread_name_prefix="decode")
    waiting: deque[dict[int, Future[Tensor]]] = deque()
    try:
        for chunk in chunks:
            waiting.append({item: pool.submit(load, item) for item in chunk})
            if len(waiting) == 2:
                yield {item: _outcome(future) for item, future in waiting.popleft().items()}
        if waiting:
            yield {item: _outcome(future) for item, future in waiting.popleft().items()}
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _outcome(future: Future[Tensor]) -> Tensor | Exception:
    try:
        return future.result()
    except Exception as error:  # decoders raise whatever they like
        return error

"""The error that a person can put right, which the command line prints on one line."""

from __future__ import annotations

import difflib
import heapq
import itertools
import sys
import time
from collections.abc import Iterable

FAILURES = (Exception, SystemExit)
"""What the code of other people may raise. A model that calls ``sys.exit`` does not end the run."""


class EvaluationError(Exception):
    """Something the person who started the evaluation can put right; the message says what and how."""


def first_line(error: BaseException) -> str:
    """What a foreign error says, short enough to be quoted in ours."""
    return _text(error).partition("\n")[0] or type(error).__name__


def told(error: BaseException) -> str:
    """The kind of a foreign error and what it says; where its first line only announces what follows, that too."""
    lines = [line.strip() for line in _text(error).splitlines() if line.strip()]
    text = ""
    for line in lines:
        text = f"{text} {line}".strip()
        if not line.endswith(":"):
            break
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the machine gives no more memory, or no thread for want of it."""
    kinds, text = {kind.__name__ for kind in type(error).__mro__}, _text(error)
    return bool(kinds & {"MemoryError", "OutOfMemoryError"}) or (
        bool(kinds & _FOREIGN) and any(sign in text for sign in _NO_MEMORY)
    )


_FOREIGN = {"RuntimeError", "ImportError", "OSError", "ArrowException", "SafetensorError"}
_NO_MEMORY = (
    "can't allocate memory",  # PyTorch
    "Cannot allocate memory",  # the system
    "failed to map segment",  # a library that is to be loaded
    "can't start new thread",
    "Failed to launch worker thread",  # Arrow
)


def _text(error: BaseException) -> str:
    try:
        return str(error).strip()
    except Exception:  # a foreign error may fail even at that
        return ""


def printable(text: str, keep: str = "\n") -> str:
    r"""`text` with whatever cannot be seen escaped, commands to a terminal and marks of direction among it; its lines
    stay lines, unless nothing is to be kept.

    >>> printable("a\x1b[31m\nb")
    'a\\x1b[31m\nb'
    """
    return text if text.isprintable() else "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in text)


def say(line: str) -> None:
    """Tell a person something at once, on one line, beside whatever bar there is."""
    from tqdm import tqdm

    tqdm.write(f"orthattack: {printable(line, keep='')}", file=sys.stderr)


def nearest(word: str, known: Iterable[str], count: int = 1, cutoff: float = 0.6) -> list[str]:
    """The names most like a word, the likest first, in at most about 0.1 s however many and long they are.

    >>> nearest("0/cta.png", ["0/dog.png", "0/cat.png", "1/x.png"])
    ['0/cat.png']
    """
    until, word = time.monotonic() + 0.1, word[:_COMPARED]
    grams = {word[k : k + 2] for k in range(len(word) - 1)}

    def alike(name: str) -> int:
        return sum(gram in name for gram in grams)

    in_time = itertools.takewhile(lambda found: found[0] % 64 or time.monotonic() < until, enumerate(known))
    likely = heapq.nlargest(50, (name for _, name in in_time), key=alike)
    ratios = [(difflib.SequenceMatcher(None, name[:_COMPARED], word).ratio(), name) for name in likely]
    return [name for ratio, name in sorted(ratios, reverse=True) if ratio >= cutoff][:count]


_COMPARED = 80  # characters: comparing two texts takes up to the product of their lengths

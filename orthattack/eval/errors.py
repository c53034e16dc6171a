"""The error that a person can put right, which the command line prints on one line."""

from __future__ import annotations

import sys

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


def _text(error: BaseException) -> str:
    try:
        return str(error).strip()
    except Exception:  # a foreign error may fail even at that
        return ""


def printable(text: str) -> str:
    r"""`text` without what a terminal takes for a command; its lines stay lines.

    >>> printable("a\x1b[31m\nb")
    'a\\x1b[31m\nb'
    """
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)


def say(line: str) -> None:
    """Tell a person something at once, beside whatever bar there is."""
    from tqdm import tqdm

    tqdm.write(f"orthattack: {printable(line)}", file=sys.stderr)

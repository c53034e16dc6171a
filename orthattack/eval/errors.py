"""The error that a person can put right, which the command line prints on one line."""

from __future__ import annotations

__all__ = ["FAILURES", "EvaluationError", "first_line", "printable"]

FAILURES = (Exception, SystemExit)
"""What the code of other people may raise. A model that calls ``sys.exit`` does not end the run."""


class EvaluationError(Exception):
    """Something the person who started the evaluation can put right; the message says what and how."""


def first_line(error: BaseException) -> str:
    """What a foreign error says, short enough to be quoted in ours."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def printable(text: str) -> str:
    r"""`text` without what a terminal takes for a command; its lines stay lines.

    >>> printable("a\x1b[31m\nb")
    'a\\x1b[31m\nb'
    """
    return "".join(c if c.isprintable() or c == "\n" else ascii(c)[1:-1] for c in text)

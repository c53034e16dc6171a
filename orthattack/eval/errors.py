"""The error that a person can put right, which the command line prints on one line."""

from __future__ import annotations

__all__ = ["EvaluationError", "first_line"]


class EvaluationError(Exception):
    """Something the person who started the evaluation can put right; the message says what and how."""


def first_line(error: BaseException) -> str:
    """What a foreign error says, short enough to be quoted in ours."""
    return str(error).strip().partition("\n")[0] or type(error).__name__

"""Refusals: what makes no sense is said in one line, and the command ends with exit code 2."""

from __future__ import annotations


class UserError(ValueError):
    """A request, file or model that cannot be used.

    The message is one line: what was found, what was expected, which option to change. Every refusal that ends a command with
    exit code 2 derives from this, so the command line asks for no list of classes.
    """


class BadRequest(UserError):
    """Options that make no sense, or not together."""


def first_line(error: BaseException, most: int | None = None) -> str:
    """The first line of an exception's message, at most `most` characters; its type's name where it says nothing."""
    lines = str(error).strip().splitlines()
    return lines[0][:most] if lines else type(error).__name__

"""Mistakes of the user, told apart from bugs: the command prints the one and traces the other."""

from __future__ import annotations


class UserError(ValueError):
    """Something that was given cannot be used; the message says what is allowed and what to do."""


class UserTypeError(UserError, TypeError):
    """Something of the wrong type was given."""


class ExportError(UserError, RuntimeError):
    """What was exported is loaded as something else than was trained; nothing was kept of it."""

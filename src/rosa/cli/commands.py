"""All commands, in the order of the help: they parse and call. Heavy imports wait for a call."""

from rosa.cli import training, exporting, comparing  # noqa: I001  # in that order
from rosa.cli.app import app

__all__ = ["app", "comparing", "exporting", "training"]

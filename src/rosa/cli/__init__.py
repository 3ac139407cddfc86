"""The command line."""

from rosa.cli.commands import main

__all__ = ["main"]

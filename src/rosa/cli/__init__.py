"""The command line."""

import sys

try:
    import rosa.bench  # noqa: F401  # says so if packages are missing
except ImportError as error:
    sys.exit(str(error))

from rosa.cli.program import main

__all__ = ["main"]

"""The command: runs what was asked for, and says what went wrong."""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable
from typing import Any

from rich.console import Console

from rosa.bench import processes
from rosa.cli.commands import app
from rosa.errors import UserError, is_disk_full, is_of_another_process, is_out_of_memory

GRACE = 10
"""Seconds that another process than the first waits before it tells its error: if the first has
failed too, it has told the same, and torchrun ends all others."""


def main() -> None:
    """Run the command.

    A mistake of the user is one clear line and exit code 2; a bug is a trace, what to do with it,
    and exit code 1; an interrupt is exit code 130.
    """
    debug = "--debug" in sys.argv or os.environ.get("ROSA_DEBUG") == "1"
    if not debug:  # what transformers says of its own inner workings is no news to a user
        from transformers.utils import logging

        warnings.simplefilter("ignore", FutureWarning)
        logging.set_verbosity_error()
    if "--debug" in sys.argv:
        sys.argv.remove("--debug")
    if not processes.is_first():
        _be_silent()
    try:
        with processes.cleaning_up():
            app()
    except SystemExit as stop:
        if (lost := _cause(stop, is_of_another_process)) is not None:  # and it was told to end
            _complain(f"error: {_lost(lost)}")
        interrupt: Any = _cause(stop, lambda error: isinstance(error, KeyboardInterrupt))
        if interrupt is None:
            raise
        saved = (
            "stopped; `rosa train` goes on from its last checkpoint with --resume, a comparison by "
            "the same command"
        )
        _complain(str(interrupt) or saved)
        sys.exit(getattr(interrupt, "code", 130))
    except Exception as error:
        if _cause(error, is_of_another_process):
            # Torchrun asks all others to end then, and they would say nothing.
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        elif not processes.is_first():
            time.sleep(GRACE)
        mistake = _mistake(error)
        if mistake is None or debug:
            traceback.print_exception(error)
        if mistake is None:
            _complain(
                "this is a bug in rosa or in a library that it uses, not a mistake of yours: "
                "please report it with the lines above and the command"
            )
            sys.exit(1)
        _complain(f"error: {mistake}")
        sys.exit(2)


def _mistake(error: Exception) -> str | None:
    """What the user can do about an error, in a line; None if it is a bug."""
    if is_out_of_memory(error):
        return (
            "out of memory: to train, lower --batch-size (and raise --gradient-accumulation as "
            "much, for the same steps) or --max-length; to merge, give --low-memory "
            f"({_first_line(error)})"
        )
    if is_disk_full(error):
        return (
            "the disk is full, or has no place for a file as large "
            f"({_first_line(error)}): make room. What was whole before still is, and --resume "
            "goes on from a training's last checkpoint"
        )
    if (lost := _cause(error, is_of_another_process)) is not None:
        return _lost(lost)
    if isinstance(error, ImportError):
        if (error.name or "").partition(".")[0] == "rosa":
            return None
        return f"{error}: run pip install 'rosa-finetune[cli]' (--debug shows where)"
    if type(error).__name__ == "SafetensorError":
        return f"a weights file is damaged or cut short ({error}): copy or save it again"
    return str(error) if isinstance(error, (UserError, OSError)) else None


def _lost(error: BaseException) -> str:
    return (
        "another process of this training has ended, or does not answer: what it said itself "
        f"tells why ({_first_line(error)}). --resume goes on from the last checkpoint"
    )


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _cause(error: BaseException, is_it: Callable[[BaseException], bool]) -> BaseException | None:
    """The error that this one came of, itself or further back; None if there is no such one."""
    cause: BaseException | None = error
    while cause is not None and not is_it(cause):
        cause = cause.__cause__ or cause.__context__
    return cause


def _be_silent() -> None:
    """Of several processes the first prints; this is another."""
    import datasets
    from transformers.utils import logging

    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115  # until the process ends
    logging.disable_progress_bar()
    datasets.disable_progress_bars()


def _complain(text: str) -> None:
    Console(stderr=True, highlight=False, markup=False).print(text, soft_wrap=True)

"""Mistakes of the user, told apart from bugs: the command prints the one and traces the other."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from peft.utils.error import NoMatchingPeftModuleError

READERS = (
    *("peft", "transformers", "tokenizers", "huggingface_hub", "safetensors", "torch", "trl"),
    *("deepspeed", "pydantic"),
)
"""The libraries that read what a user gave, besides Python's own (`json`)."""


_LONGEST_REASON = 1000
"""Characters of a library's message that are passed on: some have all that was given in them."""


class UserError(ValueError):
    """Something that was given cannot be used; the message says what is allowed and what to do."""


class UserTypeError(UserError, TypeError):
    """Something of the wrong type was given."""


_LONGEST = 32
"""Characters of a value that a message shows: fewer than PEFT looks for in a TypeError's, to tell
whether it is of a field that a config does not have."""


class NothingToAdaptError(UserError, NoMatchingPeftModuleError):
    """No module is what `target_modules` names; PEFT's own error, for those who catch that."""


class ExportError(UserError, RuntimeError):
    """What was exported is loaded as something else than was trained; nothing was kept of it."""


def shown(value: object, longest: int = _LONGEST) -> str:
    """A value as a message shows it: whatever was given, in a line that can be printed."""
    try:
        text = ascii(value) if isinstance(value, str) and not value.isprintable() else repr(value)
    except (RecursionError, ValueError):  # nested deep; an integer of thousands of digits
        return f"a very large {type(value).__name__}"
    return text if len(text) <= longest else f"{text[:longest]}..."


@contextmanager
def blame(what: str, *kinds: type[Exception]) -> Iterator[None]:
    """Turn a library's error about something that the user gave into a `UserError`.

    Only what a library raised: what this package raises, it raises as it means it.

    Args:
        what: is of no use, as a sentence's beginning: "the model in x cannot be loaded".
        kinds: of errors to turn; all but being out of memory if left out.
    """
    try:
        yield
    except Exception as error:
        ours = isinstance(error, UserError) or not _by_a_reader(error)
        if ours or is_out_of_memory(error) or not isinstance(error, kinds or Exception):
            raise
        reason = " ".join(str(error).split())[:_LONGEST_REASON]
        raise UserError(f"{what}: {type(error).__name__}: {reason}") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the machine has no memory left."""
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, MemoryError) or should_reduce_batch_size(error)  # type: ignore[arg-type]


_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def is_disk_full(error: BaseException) -> bool:
    """Whether a file could not be written, since the disk is full or the file too large for it."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    # The libraries that write weights say it in words only, torch not even that.
    text = str(error)
    return any(os.strerror(number) in text for number in _FULL) or (
        "inline_container.cc" in text and "unexpected pos" in text
    )


_PEER_GONE = (
    *("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Socket Timeout"),
    *("Timed out waiting", "remote process exited", "communicator was aborted"),
)
"""What gloo and NCCL say where the process at the other end is no more, or does not answer."""


def is_of_another_process(error: BaseException) -> bool:
    """Whether a process of the same training has ended, or does not answer."""
    return isinstance(error, RuntimeError) and any(words in str(error) for words in _PEER_GONE)


def _by_a_reader(error: BaseException) -> bool:
    """Whether the code that raised it is a library's that reads what users give."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    where = "" if trace is None else trace.tb_frame.f_globals.get("__name__", "")
    package = where.partition(".")[0]
    return package in READERS or package in sys.stdlib_module_names

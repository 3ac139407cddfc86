"""Regexes that a config names modules by: told if they are none, or could be matched for ever."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from typing import Any

from rosa.errors import UserError, shown

with warnings.catch_warnings():
    warnings.simplefilter(
        "ignore"
    )  # it has another name since Python 3.11, which warns of this one
    import sre_parse

_MANY = 5
"""So many repeats may share what they match; each one more takes as many times as long as a name
has letters."""
_REPEATS = {"MAX_REPEAT", "MIN_REPEAT"}
_FIXED = {"LITERAL", "POSSESSIVE_REPEAT", "ATOMIC_GROUP"}
"""What keeps the repeats before it from those after it: it is where it is."""


def check_pattern(field: str, pattern: str) -> None:
    """Raise UserError unless a regex can be matched against any module's name in no time.

    Python's matching tries every way of sharing out a name among repeats. Refused are a repeat of
    what is of no length of its own, as in ``(a+)+``, and more than five repeats in a row.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what may be read otherwise one day
            re.compile(pattern)
            slow = _in_a_row(sre_parse.parse(pattern).data, 0) > _MANY
    except (re.error, RecursionError, OverflowError) as error:
        reason = "it is nested too deep" if isinstance(error, RecursionError) else error
        raise UserError(
            f"{field}={shown(pattern)} is not a regex: {reason}. Names are matched as Python's re "
            r"does, where a dot in a name is written \. and brackets have to be closed"
        ) from None
    if slow:
        raise UserError(
            f"{field}={shown(pattern)} can take for ever to match, since it repeats a repeat: "
            "write .* where it has (.*)*, or name the modules in a list"
        )


def _in_a_row(items: Iterable[Any], before: int) -> int:
    """How many long repeats stand side by side at the end of a parsed regex, or too many anywhere.

    Args:
        items: what it is made of.
        before: as many stand before it.
    """
    row = before
    for operator, value in items:
        kind = str(operator)
        if kind in _FIXED:
            row = 0
        elif kind in _REPEATS and value[1] > _MANY:
            row = _MANY + 1 if _is_open(value[2]) else max(row + 1, _in_a_row(value[2], 0))
        else:
            row = max((_in_a_row(inside, row) for inside in _parts(kind, value)), default=row)
        if row > _MANY:
            return row
    return row


def _is_open(items: Iterable[Any]) -> bool:
    """Whether what is repeated can be of several lengths, and nothing in it is where it is."""
    found = False
    for operator, value in items:
        kind = str(operator)
        if kind in _FIXED:
            return False
        if kind == "SUBPATTERN" and _has_fixed(value[-1]):
            return False
        inside = [_is_open(part) for part in _parts(kind, value)]
        if kind in _REPEATS:
            found |= value[0] != value[1] or any(inside)
        elif kind == "BRANCH":  # of which one without letters may be as long as another
            found |= not all(map(_has_fixed, value[1]))
        else:
            found |= any(inside)
    return found


def _has_fixed(items: Iterable[Any]) -> bool:
    return any(
        str(operator) in _FIXED
        or (str(operator) == "SUBPATTERN" and any(map(_has_fixed, _parts("SUBPATTERN", value))))
        for operator, value in items
    )


def _parts(kind: str, value: Any) -> list[Any]:
    """The parsed regexes inside one operation."""
    if kind in _REPEATS:
        return [value[2]]
    if kind == "SUBPATTERN":
        return [value[-1]]
    if kind == "BRANCH":
        return list(value[1])
    if kind in ("ASSERT", "ASSERT_NOT"):
        return [value[1]]
    return [part for part in value[1:] if part] if kind == "GROUPREF_EXISTS" else []

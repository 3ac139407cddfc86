"""What a comparison is of: methods with settings of their own, ranks, learning rates, seeds."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any
from urllib.parse import quote

from rosa.bench.setup.checking import check_meant
from rosa.bench.setup.methods import METHODS, find_method
from rosa.bench.setup.settings import RunSettings, convert
from rosa.bench.tasks.task import DataSettings
from rosa.errors import UserError

LR_FACTORS = (0.3, 1.0, 3.0)
"""Learning rates that are tried unless some are named: these, times the method's own default."""
HALF_DECADES = tuple(float(f"{digit}e{power}") for power in range(-8, 2) for digit in (1, 3))
"""Where a search for a learning rate can go."""

OF_A_CELL = ("output", "method", "rank", "lr", "seed", "versions")
"""Settings that make one cell differ from another; the comparison's are all else."""
OF_THE_DATA = (
    *("model", "max_length", "loss_on", "chat_template", "packing"),
    *(field.name for field in fields(DataSettings) if field.name != "seed"),
)
"""Settings that say what is learned and scored, which no method of a comparison has for itself."""


@dataclass(frozen=True)
class Variant:
    """A method with settings of its own: `rosa+directions=orthonormal+resample_every=never`."""

    name: str
    method: str
    options: Mapping[str, Any]

    @classmethod
    def parse(cls, text: str) -> Variant:
        """Read a variant; ValueError lists the methods and the settings that there are."""
        method, *options = text.split("+")
        find_method(method)
        types = {f.name: str(f.type) for f in fields(RunSettings) if f.name not in OF_A_CELL}
        values = {}
        for option in options:
            name, equals, value = option.partition("=")
            if not equals or name not in types:
                raise UserError(
                    f"{text!r}: {option!r} is not setting=value with a setting of a run; there "
                    f"are: {', '.join(types)}"
                )
            if name in OF_THE_DATA:
                raise UserError(
                    f"{text!r}: all methods are compared on one model and the same data: {name} is "
                    "no setting of one of them"
                )
            check_meant(method, name, repr(text))
            if name == "set":  # of which there may be several, each a value of YAML
                values[name] = (*values.get(name, ()), value)
            else:
                values[name] = convert(f"{text!r}: {name}", value, types[name])
        return cls(text, method, values)


@dataclass(frozen=True)
class Cell:
    """One run of a comparison."""

    variant: Variant
    rank: int | None
    lr: float
    seed: int

    @property
    def name(self) -> str:
        """The name of its folder, for people and to find it again; its record says what it is."""
        rank = "" if self.rank is None else f"-r{self.rank}"
        variant = re.sub(r"[/\\%]", lambda sign: quote(sign[0], safe=""), self.variant.name)
        return f"{variant}{rank}-lr{self.lr:g}-s{self.seed}"

    @property
    def group(self) -> tuple[str, int | None]:
        """What shares a learning rate, and is a row of the table."""
        return self.variant.name, self.rank


@dataclass(frozen=True)
class Grid:
    """What to compare: every variant at every rank (if it has one), rate and seed.

    `lrs` holds rates by method's or variant's name, and for all others under "".
    """

    variants: tuple[Variant, ...]
    ranks: tuple[int, ...]
    lrs: Mapping[str, tuple[float, ...]]
    seeds: tuple[int, ...]

    def rates(self, variant: Variant) -> tuple[float, ...]:
        """The learning rates to try for a variant."""
        named = self.lrs.get(variant.name) or self.lrs.get(variant.method) or self.lrs.get("")
        default = METHODS[variant.method].lr
        return named or tuple(float(f"{factor * default:g}") for factor in LR_FACTORS)

    def groups(self) -> Iterator[tuple[Variant, int | None]]:
        """The rows of the table."""
        for variant in self.variants:
            has_rank = METHODS[variant.method].has_rank
            for rank in self.ranks if has_rank else (None,):
                yield variant, rank


def make_grid(
    methods: Sequence[str],
    ranks: Sequence[int],
    lrs: Sequence[str],
    seeds: Sequence[int],
    usual: Sequence[int] = (8,),
) -> Grid:
    """A grid from the command line's words; `lrs` are "1e-4,1e-3" or "full=1e-5,3e-5".

    Without `ranks` the methods that have one are compared at the usual ones.

    Raises:
        ValueError: something is missing, unknown or given twice.
    """
    if not methods:
        raise UserError(f"no methods: name some of {', '.join(METHODS)}")
    if not seeds:
        raise UserError("no seeds: name at least one, or three for a spread")
    for name, values in (("methods", methods), ("ranks", ranks), ("seeds", seeds)):
        if len(set(values)) != len(values):
            raise UserError(f"{name} has one twice: {', '.join(map(str, values))}")
    variants = tuple(Variant.parse(text) for text in methods)
    ranked = [v.name for v in variants if METHODS[v.method].has_rank]
    if ranks and not ranked:
        raise UserError(f"none of the methods has a rank ({', '.join(methods)}): leave --ranks out")
    rates: dict[str, tuple[float, ...]] = {}
    for text in lrs:
        name, equals, values = text.rpartition("=")
        # A variant's own settings have an = too: "rosa+moments=keep=1e-3" names rosa+moments=keep.
        known = {v.name for v in variants} | {v.method for v in variants}
        if equals and name not in known:
            raise UserError(f"--lrs {text}: {name!r} is none of the methods compared")
        if name in rates:
            raise UserError(
                f"--lrs {text}: {name or 'all others'} had rates before: name them together, as in "
                f"--lrs {name}{equals}1e-4,1e-3"
            )
        try:
            rates[name] = tuple(sorted({float(value) for value in values.split(",")}))
        except ValueError:
            raise UserError(f"--lrs {text}: {values!r} are not numbers, as in 1e-4,1e-3") from None
    return Grid(variants, tuple(ranks or usual), rates, tuple(seeds))


def rate_beyond(tried: Sequence[float], best: float | None) -> float | None:
    """The rate to try next, where the best is the lowest or the highest one tried; else None."""
    if best == min(tried) and (lower := [rate for rate in HALF_DECADES if rate < min(tried)]):
        return max(lower)
    if best == max(tried) and (higher := [rate for rate in HALF_DECADES if rate > max(tried)]):
        return min(higher)
    return None

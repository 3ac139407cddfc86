"""What no run can do whose weights or optimizer lie in parts over processes: FSDP's or ZeRO's."""

from __future__ import annotations

from rosa.bench import processes
from rosa.bench.setup.methods import find_method
from rosa.bench.setup.settings import RunSettings
from rosa.errors import UserError


def check_in_parts(settings: RunSettings, option: str) -> None:
    """Raise UserError for that.

    Args:
        settings: of the run.
        option: that asks for the parts.
    """
    if not processes.launched():
        raise UserError(
            f"{option} is for processes that torchrun starts, be it one: "
            "torchrun --nproc-per-node 2 -m rosa train ..."
        )
    method = find_method(settings.method)
    if method.optimizer or method.optim or settings.method == "adalora":
        raise UserError(
            f"method {settings.method} needs whole gradients or an optimizer of its own: leave "
            f"{option} out"
        )
    if settings.record_changes:
        raise UserError(f"--record-changes needs whole weights: leave it or {option} out")

"""ROSA: Random Subspace Adaptation, as a PEFT method.

Importing this package registers the method: `peft.get_peft_model(model, rosa.RosaConfig(r=8))`.
"""

from typing import TYPE_CHECKING, Any

from rosa.config import RosaConfig
from rosa.export import export_lora, export_merged, export_rosa
from rosa.layers.base import RosaLayer
from rosa.mapping import map_pretrained
from rosa.model import RosaModel
from rosa.resampling.resample import resample
from rosa.resampling.watching import watch

if TYPE_CHECKING:
    from rosa.resampling.callback import RosaCallback

__version__ = "0.2.0"

__all__ = [
    "RosaCallback",
    "RosaConfig",
    "RosaLayer",
    "RosaModel",
    "__version__",
    "export_lora",
    "export_merged",
    "export_rosa",
    "map_pretrained",
    "resample",
    "watch",
]


def __dir__() -> list[str]:
    """The public names, `RosaCallback` too."""
    return __all__


def __getattr__(name: str) -> Any:
    """`RosaCallback`, when it is first asked for: it needs transformers' Trainer."""
    if name == "RosaCallback":
        from rosa.resampling.callback import RosaCallback

        return RosaCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

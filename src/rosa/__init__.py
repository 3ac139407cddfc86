"""ROSA: Random Subspace Adaptation, as a PEFT method.

Importing this package registers the method: `peft.get_peft_model(model, rosa.RosaConfig(r=8))`.
"""

from rosa.callback import RosaCallback
from rosa.config import RosaConfig
from rosa.export import export_lora, export_merged
from rosa.model import RosaModel
from rosa.resample import resample

__version__ = "0.1.0"

__all__ = [
    "RosaCallback",
    "RosaConfig",
    "RosaModel",
    "__version__",
    "export_lora",
    "export_merged",
    "resample",
]

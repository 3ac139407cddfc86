"""A trained model for where ROSA is unknown: as a LoRA adapter, or as a plain model."""

from rosa.export.lora import export_lora
from rosa.export.merged import export_merged

__all__ = ["export_lora", "export_merged"]

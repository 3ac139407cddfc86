"""A trained adapter as others take it: a LoRA adapter, a plain model, a smaller file of its own."""

from rosa.export.compact import export_rosa
from rosa.export.lora import export_lora
from rosa.export.merged import export_merged

__all__ = ["export_lora", "export_merged", "export_rosa"]

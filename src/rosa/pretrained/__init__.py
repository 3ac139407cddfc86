"""A pretrained weight's life: what stands in memory, who wrote there, how to get it back."""

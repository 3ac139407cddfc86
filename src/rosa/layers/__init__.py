"""One weight's life: what stands in memory, its adapters, what it computes, what is saved."""

"""An adapted layer: its adapters, what it computes, what of it is saved. Kinds are in `kinds`."""

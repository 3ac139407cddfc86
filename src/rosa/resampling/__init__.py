"""A model's draws: when, of what, and what becomes of the optimizer's state."""

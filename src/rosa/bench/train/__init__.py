"""One training, from settings to a result."""

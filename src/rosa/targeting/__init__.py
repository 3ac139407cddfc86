"""Which modules of a model are adapted, and what is refused before any is."""

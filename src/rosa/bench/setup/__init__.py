"""What a run is set up with: its settings, checked, and the methods to choose from."""

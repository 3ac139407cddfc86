"""Comparisons: many runs, a cell each."""

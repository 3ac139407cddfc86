"""Comparisons read back: tables, pictures, a page."""

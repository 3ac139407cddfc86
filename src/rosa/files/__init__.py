"""Adapters' files: what they hold, and how they are loaded, all of one or nothing."""

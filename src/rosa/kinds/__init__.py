"""The kinds of layers that can be adapted, one a file: its view as a matrix, and its arithmetic."""

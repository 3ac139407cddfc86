"""Plain tensors: products kept as factors, subspaces of a matrix, where a gradient lies."""

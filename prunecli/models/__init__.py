"""Models: building, loading, their weights, tensors, layers and outputs."""

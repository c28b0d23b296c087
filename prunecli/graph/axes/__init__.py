"""Axis inference: which axes of which tensors must shrink together, found by tracing (no per-family code)."""

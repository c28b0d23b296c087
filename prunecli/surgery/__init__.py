"""Cutting a model by a plan, and the structure that is left."""

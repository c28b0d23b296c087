"""Measurements of a model: cost, accuracy, singular values."""

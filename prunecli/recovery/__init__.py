"""Recovery of a cut model without training."""

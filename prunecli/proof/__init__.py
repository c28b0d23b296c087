"""The proof that a cut model computes what the masked one computes."""

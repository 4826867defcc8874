"""Recovery training."""

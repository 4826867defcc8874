"""Which neurons and layers go, and what becomes of the rest."""

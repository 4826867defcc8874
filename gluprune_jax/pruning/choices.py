"""What can be chosen by name when a model is pruned, and defaults: known before JAX is imported."""

# In the order of `gluprune_jax.pruning.criteria`, where each is a function of its name.
CRITERION_NAMES = ("ppm", "vow", "pon", "l2", "random", "hybrid", "activation", "wanda", "taylor", "entropy")
ALLOCATIONS = ("uniform", "global", "measured")  # see `gluprune_jax.pruning.allocation`
MIN_KEEP = 0.2  # the least share of its neurons that a layer keeps, where layers differ

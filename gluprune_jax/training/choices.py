"""What can be chosen by name when a model is trained: known before JAX is imported."""

TRAINABLE = ("all", "mlp", "lora")  # see `gluprune_jax.training.trainable.Trainable`
COMPUTE_DTYPES = ("float32", "bfloat16")  # of activations and matrix products

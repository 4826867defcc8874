"""`python -m gluprune_jax.prune`."""

import sys

from gluprune_jax.prune import main

if __name__ == "__main__":
    sys.exit(main())

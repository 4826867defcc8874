"""How the next token is chosen: the likeliest, or a draw."""

from collections.abc import Sequence
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

from gluprune_jax.parallel.sharding import constrain

# In place of a token, where the model computes NaN or infinities: what it left in the cache would spoil what follows.
NON_FINITE = -2
_EOS_BUCKET = 8


class Sampling(NamedTuple):
    """How tokens are chosen; all numbers are arrays, so that no value of them recompiles anything.

    Attributes:
      eos_ids: `[E]` int32, tokens that end a sequence; -1 fills up.
      temperature: float32, above 0; None takes the most likely token (greedy decoding), by programs that cannot draw
        and compile sooner.
      top_p: float32; the smallest set of most likely tokens that holds this probability is drawn from.
      seed: uint32. A draw depends on it, on the number of the prompt and on the position, and on nothing else:
        neither on the slot nor on what else is decoded.
    """

    eos_ids: ArrayLike
    temperature: ArrayLike | None
    top_p: ArrayLike
    seed: ArrayLike

    @classmethod
    def of(cls, eos_ids: Sequence[int], temperature: float, top_p: float, seed: int) -> "Sampling":
        """These, with so many end tokens that few programs serve all numbers of them; a temperature of 0 is none."""
        ends = np.full(-(-max(1, len(eos_ids)) // _EOS_BUCKET) * _EOS_BUCKET, -1, np.int32)
        ends[: len(eos_ids)] = eos_ids
        greedy = temperature < np.finfo(np.float32).tiny  # to which processors round what is less to 0
        return cls(ends, None if greedy else np.float32(temperature), np.float32(top_p), np.uint32(seed))


def choose(logits: Array, sampling: Sampling, numbers: Array, positions: Array) -> Array:
    """The next token `[B]` int32 of logits `[B, V]`: the likeliest, or a draw (nucleus sampling, arXiv 1904.09751).

    `NON_FINITE` where the logits are not finite.

    Args:
      logits: float32.
      sampling: how to choose.
      numbers: `[B]` int32, the prompt of each row.
      positions: `[B]` int32, where each token will stand.
    """
    chex.assert_rank(logits, 2)
    chex.assert_shape([numbers, positions], logits.shape[:1])
    logits = constrain(logits, "batch", None)  # a vocabulary that is divided would be sorted piece by piece
    if sampling.temperature is None:
        token = jnp.argmax(logits, axis=-1)
    else:
        token = _draw(logits, sampling, jnp.asarray(sampling.temperature, jnp.float32), numbers, positions)
    logit = jnp.take_along_axis(logits, token[:, None], axis=-1)[:, 0]  # NaN if any is: argmax takes it for the largest
    return constrain(jnp.where(jnp.isfinite(logit), token, NON_FINITE).astype(jnp.int32))


def _draw(logits: Array, sampling: Sampling, temperature: Array, numbers: Array, positions: Array) -> Array:
    top_p = jnp.asarray(sampling.top_p, jnp.float32)
    likeliest = jnp.max(logits, axis=-1, keepdims=True)

    def nucleus() -> Array:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        probabilities = jax.nn.softmax((ordered - likeliest) / temperature, axis=-1)
        before = jnp.cumsum(probabilities, axis=-1)[:, :-1]  # probability of all that are likelier
        before = jnp.pad(before, ((0, 0), (1, 0)))  # exactly 0 for the first, which is thus never left out
        # A logit and not a probability: XLA computes those twice, and not always to the same last bit.
        return jnp.min(jnp.where(before < top_p, ordered, jnp.inf), axis=-1, keepdims=True)

    # To sort a vocabulary takes longer than all else here, and where every token may come it leaves out none.
    least = jax.lax.cond(top_p < 1, nucleus, lambda: jnp.full_like(likeliest, -jnp.inf))
    key = jax.random.key(jnp.asarray(sampling.seed, jnp.uint32))
    keys = jax.vmap(lambda n, p: jax.random.fold_in(jax.random.fold_in(key, n), p))(numbers, positions)
    noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[-1:]))(keys)
    noisy = (logits - likeliest) / temperature + noise
    return jnp.argmax(jnp.where(logits >= least, noisy, -jnp.inf), axis=-1)

"""What an evaluation needs the memory of the devices for, before it is known what the benchmarks ask."""

import jax

from gluprune_jax.memory.plan import Evaluation

# The longest page of WikiText, and the longest answer with its prompt.
DOCUMENT_TOKENS, ANSWER_TOKENS = 16896, 2048


def evaluation_uses(batch_size: int | None, context_length: int | None, device_memory: str | None) -> list[Evaluation]:
    """What is wanted first, then less.

    Without a batch size the engine takes smaller batches where there is no room; few benchmarks have long documents.

    Args:
      batch_size: rows of a replica; None leaves them to the engine.
      context_length: tokens of the window, if fewer than the model's.
      device_memory: as `MeshRequest` takes it; None where it is that of the devices that are there.
    """
    on_cpu = device_memory is None and jax.default_backend() == "cpu"
    uses = [
        Evaluation(cached=cached, decoded=ANSWER_TOKENS, rows=rows, slots=slots, on_cpu=on_cpu)
        for cached in (DOCUMENT_TOKENS, ANSWER_TOKENS)
        for rows, slots in ([(4, 8), (1, 1)] if batch_size is None else [(batch_size,) * 2])
    ]
    return uses if context_length is None else [use.within(context_length) for use in uses]

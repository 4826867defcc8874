"""How layers of different widths are written to a GGUF file."""

from collections.abc import Sequence
from typing import Literal

from convert.families.family import GGUFTable
from gluprune_jax.errors import RequestError
from gluprune_jax.models.config import ModelConfig

WIDTHS = ("per-layer", "uniform")
# What rows of quantised types, and so widths, must be divided by. Of no other multiple are layers of different widths
# smaller in llama.cpp: what does not divide stays in F16.
BLOCK = 32

Widths = Literal["per-layer", "uniform"]


def choose_widths(
    table: GGUFTable, config: ModelConfig, wanted: Widths | None, multiple: int | None
) -> tuple[GGUFTable, tuple[int, ...], list[str]]:
    """The table of the architecture that a model is written under, the width of each layer there, and notes.

    Args:
      table: of the model's family.
      config: of the model.
      wanted: as `gguf_widths` of `convert.gguf.writer.plan_gguf`.
      multiple: as its `width_multiple`.

    Raises:
      RequestError: widths of layers that cannot be written as they are.
    """
    sizes, why_not = config.intermediate_sizes, _why_not_per_layer(table, config)
    if wanted == "per-layer" and why_not:
        raise RequestError(
            f"layers of different widths cannot be written as they are: {why_not}; give `gguf_widths` uniform"
        )
    widths = _rounded(sizes, multiple or (1 if len(set(sizes)) == 1 else BLOCK))
    if len(set(widths)) == 1:
        return table, widths, []
    if wanted != "uniform" and table.per_layer and not why_not:
        return table.per_layer, widths, []
    reason = f" ({why_not})" if why_not else ""
    note = (
        f"layers of {min(sizes)} to {max(sizes)} neurons were all filled up to {max(widths)} with zero neurons{reason}"
    )
    return table, (max(widths),) * len(widths), [note]


def _rounded(sizes: Sequence[int], multiple: int) -> tuple[int, ...]:
    return tuple(-(-size // multiple) * multiple for size in sizes)


def _why_not_per_layer(table: GGUFTable, config: ModelConfig) -> str | None:
    if table.per_layer is None:
        return f"llama.cpp's architecture {table.architecture!r} has one width for all layers"
    name = table.per_layer.architecture
    if any(layer.window is not None for layer in config.attention):
        return f"llama.cpp's architecture {name!r} has no windows"
    return None

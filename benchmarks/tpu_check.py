"""Compiles the programs for Llama-3.2-1B with the real TPU compiler, for one v5e chip, without a TPU.

    pip install 'gluprune-jax[tpu]' && python benchmarks/tpu_check.py [--json]

Fails if a program does not compile or does not fit into the memory of the chip.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any

# Before jax is imported: this process drives the CPU and only borrows the TPU's compiler.
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["TPU_SKIP_MDS_QUERY"] = "1"
os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from llama_3_2_1b import CONFIG
from rich.console import Console
from rich.table import Table

from evals.engine import SCORED_TOKENS, rows, score_tokens
from gluprune_jax.generation import Sampling, admit, decode, empty_state
from gluprune_jax.importance import CRITERIA, mlp_extents, score_layer
from gluprune_jax.model import KVCache, abstract_model
from gluprune_jax.prefill import append, extend
from gluprune_jax.slicing import slice_neurons

HBM_BYTES = 16 * 2**30  # of a v5e chip
KEPT = 4916  # 40 % pruned
LONG = 16896  # tokens of one long document


def programs() -> dict[str, tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Each program with the shapes it is run on."""
    D, F = CONFIG.hidden_size, CONFIG.intermediate_sizes[0]
    gate = jax.ShapeDtypeStruct((F, D), jnp.bfloat16)
    down = jax.ShapeDtypeStruct((D, F), jnp.bfloat16)
    graphdef, params = nnx.split(abstract_model(CONFIG, jnp.bfloat16))
    masks = tuple(jax.ShapeDtypeStruct((F,), jnp.float32) for _ in CONFIG.intermediate_sizes)

    def integers(*shape: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    def cache(slots: int) -> Any:
        return jax.eval_shape(lambda: KVCache.empty(CONFIG, 1, slots, jnp.bfloat16))

    hidden = jax.ShapeDtypeStruct((16 * 512, D), jnp.bfloat16)
    state = jax.eval_shape(lambda: empty_state(CONFIG, 8, 1024, jnp.bfloat16))
    number = jax.ShapeDtypeStruct((), jnp.float32)
    sampling = Sampling(integers(8), number, number, jax.ShapeDtypeStruct((), jnp.uint32))
    return {
        **{f"score, {name}": (score_layer, (function, F, gate, gate)) for name, function in CRITERIA.items()},
        "fingerprint": (mlp_extents, (F, gate, gate, down)),
        f"slice gate to {KEPT}": (slice_neurons, (0, 0, gate, integers(KEPT))),
        f"slice down to {KEPT}": (slice_neurons, (1, 0, down, integers(KEPT))),
        "16 rows of 512 on a cached header": (
            rows,
            (graphdef, params, cache(2048 + 512), *(integers(16, 512),) * 3, masks),
        ),
        f"512 tokens of a text of {LONG:,}": (
            extend,
            (graphdef, params, cache(32768 + 512), integers(1, 512), masks),
        ),
        f"scores of {SCORED_TOKENS[-1]} tokens": (
            score_tokens,
            (graphdef, params, hidden, *(integers(SCORED_TOKENS[-1]),) * 2),
        ),
        "prefill, 512 tokens of a prompt": (extend, (graphdef, params, cache(2048 + 512), integers(1, 512), masks)),
        "prefill, their keys and values": (append, (cache(2048 + 512), cache(512).layers, integers(1))),
        "prefill, a prompt into one of 8 slots": (
            admit,
            (graphdef, params, state, cache(2048 + 512), hidden, *(integers(),) * 4, sampling),
        ),
        "decode, 8 slots": (decode, (graphdef, params, state, sampling, masks)),
    }


def compile_for(sharding: NamedSharding, program: Callable[..., Any], args: tuple[Any, ...]) -> dict[str, float]:
    """Compiles a program with every array on the chip of `sharding`; returns seconds and bytes."""

    def place(leaf: Any) -> Any:
        return leaf.update(sharding=sharding) if isinstance(leaf, jax.ShapeDtypeStruct) else leaf

    start = time.perf_counter()
    memory = program.lower(*jax.tree.map(place, args)).compile().memory_analysis()  # type: ignore[attr-defined]
    total = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return {
        "compile_seconds": time.perf_counter() - start,
        "argument_bytes": memory.argument_size_in_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "hbm_bytes": total + memory.temp_size_in_bytes,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of a table")
    as_json = parser.parse_args().json
    chip = topologies.get_topology_desc(platform="tpu", topology_name="v5e:1x1", chips_per_host_bounds=(1, 1, 1))
    sharding = NamedSharding(Mesh(np.array(chip.devices), ("chip",)), PartitionSpec())
    results = {name: compile_for(sharding, *program) for name, program in programs().items()}
    if as_json:
        print(json.dumps({"chip": "v5e:1x1", "model": "Llama-3.2-1B, bfloat16", "programs": results}, indent=1))
    else:
        table = Table(title="Llama-3.2-1B, bfloat16, on one v5e chip", title_justify="left")
        for column in ("program", "compile s", "arguments GB", "temporary GB", "HBM GB", "of the chip"):
            table.add_column(column, justify="left" if column == "program" else "right", no_wrap=True)
        for name, result in results.items():
            sizes = (f"{result[key] / 1e9:.3f}" for key in ("argument_bytes", "temporary_bytes", "hbm_bytes"))
            table.add_row(name, f"{result['compile_seconds']:.1f}", *sizes, f"{result['hbm_bytes'] / HBM_BYTES:.1%}")
        Console(width=120).print(table)
    too_large = [name for name, result in results.items() if result["hbm_bytes"] > HBM_BYTES]
    if too_large:
        print(f"does not fit into {HBM_BYTES / 1e9:.1f} GB: {', '.join(too_large)}", file=sys.stderr)
    return len(too_large)


if __name__ == "__main__":
    sys.exit(main())

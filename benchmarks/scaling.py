"""How scoring and slicing grow: seconds and memory against the size of the model, and against the number of devices.

    python benchmarks/scaling.py [--models ...] [--devices 1 2 4 8] [--runs 3] [--json]

Each case is a process of its own, with so many devices (on a CPU simulated ones, which share its cores: they show that
nothing is done twice, not that it gets faster). The model has random bfloat16 weights in the shapes of SmolLM2-135M,
Llama-3.2-1B and Llama-3.2-3B, one replica over all devices. Scoring is `score` with PPM (fingerprint included), slicing
`slice_model` to 60 % of the neurons; both are run once before they are timed. Memory is the largest resident set of the
process beyond what it is with the weights in place, and the compiler's analysis of the programs, per device.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

# hidden size, intermediate size, layers, query heads, key/value heads, head dim, vocabulary
SHAPES = {
    "SmolLM2-135M": (576, 1536, 30, 9, 3, 64, 49152),
    "Llama-3.2-1B": (2048, 8192, 16, 32, 8, 64, 128256),
    "Llama-3.2-3B": (3072, 8192, 28, 24, 8, 128, 128256),
}


def measure(name: str, devices: int, runs: int) -> dict[str, Any]:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from flax import nnx

    from gluprune_jax import make_plan, score
    from gluprune_jax.models.config import ModelConfig
    from gluprune_jax.models.decoder import Decoder
    from gluprune_jax.models.parameters import abstract_model
    from gluprune_jax.parallel.mesh import MeshShape, make_mesh, parameter_sharding, use_mesh
    from gluprune_jax.pruning.criteria import WEIGHT_CRITERIA
    from gluprune_jax.pruning.device_scores import matrix_extents, score_layer
    from gluprune_jax.pruning.slicing import slice_model, slice_neurons

    D, F, L, N, K, H, V = SHAPES[name]
    config = ModelConfig(V, D, (F,) * L, N, K, H, 8192, 1e-5, 5e5, tie_word_embeddings=True, width_multiple=devices)
    mesh = make_mesh(MeshShape(1, devices), K)
    graphdef, state = nnx.split(abstract_model(config, jnp.bfloat16))
    fill = jax.jit(
        lambda key, shape: 0.02 * jax.random.normal(key, shape, jnp.bfloat16), static_argnums=1, out_shardings=None
    )
    flat = []
    for i, (path, variable) in enumerate(nnx.to_flat_state(state)):
        leaf = variable.get_value()
        values = jax.device_put(fill(jax.random.key(i), leaf.shape), parameter_sharding(mesh, path, leaf.shape))
        flat.append((path, variable.replace(values)))
    model: Decoder = nnx.merge(graphdef, nnx.from_flat_state(flat))
    del flat, values
    with use_mesh(mesh):
        gate, down = model.layers[0].mlp.gate_proj[...], model.layers[0].mlp.down_proj[...]
        kept = np.arange(int(0.6 * F), dtype=np.int32)
        padding = -len(kept) % devices
        programs = {
            "score": score_layer.lower(WEIGHT_CRITERIA["ppm"], gate, gate),
            "fingerprint": matrix_extents.lower(down, 0),
            "slice gate": slice_neurons.lower(0, padding, gate, kept),
            "slice down": slice_neurons.lower(1, padding, down, kept),
        }
        temporary = {what: lowered.compile().memory_analysis().temp_size_in_bytes for what, lowered in programs.items()}
    plan = make_plan(score(model), width=len(kept))
    jax.block_until_ready(nnx.state(slice_model(model, plan)))
    peak, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024, {"score": [], "slice": []}
    for _ in range(runs):
        start = time.perf_counter()
        score(model)
        scored = time.perf_counter()
        jax.block_until_ready(nnx.state(slice_model(model, plan)))
        seconds["score"].append(scored - start)
        seconds["slice"].append(time.perf_counter() - scored)
    weights = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))
    mlp = sum(
        sum(matrix[...].nbytes for matrix in (m.gate_proj, m.up_proj, m.down_proj)) for m in map(_mlp, model.layers)
    )
    medians = {what: statistics.median(values) for what, values in seconds.items()}
    return {
        "model": name,
        "devices": devices,
        "device": jax.devices()[0].device_kind,
        "weight_bytes": weights,
        "mlp_bytes": mlp,
        "score_seconds": medians["score"],
        "slice_seconds": medians["slice"],
        "score_bytes_per_second": mlp / medians["score"],
        "slice_bytes_per_second": mlp / medians["slice"],
        "peak_rss_bytes": peak,
        "temporary_bytes_per_device": temporary,
    }


def _mlp(layer: Any) -> Any:
    return layer.mlp


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=[*SHAPES])
    parser.add_argument("--devices", nargs="+", type=int, default=[1, 2, 4, 8])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--case", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.case:
        print(json.dumps(measure(args.case[0], int(args.case[1]), args.runs)))
        return
    # Each size on one device, and the one in the middle on every number of them.
    cases = [(name, args.devices[0]) for name in args.models]
    cases += [(args.models[len(args.models) // 2], count) for count in args.devices[1:]]
    results = []
    for name, count in cases:
        environment = dict(os.environ)
        if environment.get("JAX_PLATFORMS", "cpu") == "cpu":
            environment["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={count}"
        command = [sys.executable, str(Path(__file__)), "--case", name, str(count), "--runs", str(args.runs)]
        output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
        results.append(json.loads(output.splitlines()[-1]))
    if args.json:
        print(json.dumps(results, indent=1))
        return
    table = Table(title=f"PPM scoring and slicing to 60 %, bfloat16, {results[0]['device']}", title_justify="left")
    for column in ("model", "devices", "weights GB", "score s", "GB/s", "slice s", "GB/s", "temporaries MB a device"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for result in results:
        table.add_row(
            result["model"],
            str(result["devices"]),
            f"{result['weight_bytes'] / 1e9:.2f}",
            f"{result['score_seconds']:.2f}",
            f"{result['score_bytes_per_second'] / 1e9:.1f}",
            f"{result['slice_seconds']:.2f}",
            f"{result['slice_bytes_per_second'] / 1e9:.1f}",
            f"{max(result['temporary_bytes_per_device'].values()) / 1e6:.1f}",
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()

"""What a device achieves against what it could: prefill, scored tokens, decoding, PPM scoring and slicing.

    python benchmarks/throughput.py [--model llama-3.2-1b llama-3.2-3b] [--peer] [--json]

Random bfloat16 weights in the exact shapes, on JAX's default device, compilation left out (each program runs once
before it is timed; medians of `--runs`). Measured in the same run, as bounds:

- the matrix rate: a bfloat16 product of 8192 x 8192 matrices (on CPUs 1024), in FLOP/s;
- the copy rate: integers incremented in place, bytes read plus bytes written a second.

Model FLOPs are 2 for each weight of a matrix and token, and 4 x tokens seen x heads x head dim a layer for attention;
utilisation is theirs over the matrix rate. Decoding cannot be faster than reading weights and caches once a step:
`of bound` compares its tokens a second with that at half the copy rate's bytes (reads alone). `--peer` runs
`transformers` on the same device (PyTorch must be installed): prefill of the same rows, and decoding of the same slots
with its static cache, step by step.
"""

import argparse
import functools
import json
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table
from scoring_bandwidth import median_seconds
from shapes import HF_CONFIGS, shapes_of

from gluprune_jax.inference.device_loop import STEPS_PER_CALL, decode, empty_state, store
from gluprune_jax.inference.engine import SCORED_TOKENS, rows, score_tokens
from gluprune_jax.inference.sampling import Sampling
from gluprune_jax.models.cache import KVCache
from gluprune_jax.models.config import ModelConfig
from gluprune_jax.models.decoder import Decoder
from gluprune_jax.models.parameters import abstract_model
from gluprune_jax.pruning.criteria import WEIGHT_CRITERIA
from gluprune_jax.pruning.device_scores import score_layer
from gluprune_jax.pruning.slicing import slice_neurons

ROW, FILLED = 512, 1024  # tokens of a row, and of each sequence that is decoded


def bounds(runs: int) -> dict[str, float]:
    size = 1024 if jax.default_backend() == "cpu" else 8192
    a = jnp.ones((size, size), jnp.bfloat16)
    product = jax.jit(lambda a: a @ a)
    words = [jnp.zeros(1 << 26, jnp.int32)]
    increment = jax.jit(lambda words: words + 1, donate_argnums=0)

    def rewrite() -> jax.Array:
        words[0] = increment(words[0])
        return words[0]

    return {
        "matrix_flops_per_second": 2 * size**3 / median_seconds(lambda: product(a), runs),
        "copy_bytes_per_second": 2 * words[0].nbytes / median_seconds(rewrite, runs),
    }


def random_model(config: ModelConfig) -> Decoder:
    fill = jax.jit(lambda key, shape: 0.02 * jax.random.normal(key, shape, jnp.bfloat16), static_argnums=1)
    graphdef, state = nnx.split(abstract_model(config, jnp.bfloat16))
    flat = [
        (path, variable.replace(fill(jax.random.key(i), variable.get_value().shape)))
        for i, (path, variable) in enumerate(nnx.to_flat_state(state))
    ]
    model: Decoder = nnx.merge(graphdef, nnx.from_flat_state(flat))
    return model


def matrix_weights(config: ModelConfig) -> int:
    """Weights of the matrices that every token is multiplied with, without embedding and output projection."""
    attention = 2 * config.hidden_size * config.head_dim * (config.num_attention_heads + config.num_key_value_heads)
    return sum(attention + 3 * config.hidden_size * width for width in config.intermediate_sizes)


def measure(name: str, runs: int, batch: int, slots: int, limits: dict[str, float]) -> dict[str, float]:
    model = random_model(shapes_of(name))
    forward = measure_forward(model, runs, batch, limits["matrix_flops_per_second"])
    return forward | measure_decoding(model, runs, slots, limits) | measure_pruning(model, runs, limits)


def measure_forward(model: Decoder, runs: int, batch: int, matrix_rate: float) -> dict[str, float]:
    config, params = model.config, nnx.state(model, nnx.Param)
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, config.vocab_size, (batch, ROW)), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(ROW, dtype=jnp.int32), tokens.shape)
    ends = jnp.full(tokens.shape, ROW, jnp.int32)
    cache = KVCache.empty(config, 1, 2048 + ROW, jnp.bfloat16)
    forward = functools.partial(rows, config, params, cache, tokens, positions, ends, ones(config))
    seconds = median_seconds(forward, runs)
    attention = 4 * config.num_hidden_layers * config.num_attention_heads * config.head_dim
    flops = batch * ROW * (2 * matrix_weights(config) + attention * (ROW + 1) / 2)
    hidden, Q = forward(), SCORED_TOKENS[-1]
    where = jnp.arange(Q, dtype=jnp.int32)[None]
    scoring = median_seconds(functools.partial(score_tokens, config, params, hidden, where, where), runs)
    return {
        "prefill_tokens_per_second": batch * ROW / seconds,
        "prefill_utilisation": flops / seconds / matrix_rate,
        "scored_tokens_per_second": Q / scoring,
        "scored_utilisation": 2 * Q * config.hidden_size * config.vocab_size / scoring / matrix_rate,
    }


def measure_decoding(model: Decoder, runs: int, slots: int, limits: dict[str, float]) -> dict[str, float]:
    config, params, masks = model.config, nnx.state(model, nnx.Param), ones(model.config)
    sampling = Sampling.of((), 0, 1, 0)
    states = [empty_state(config, slots, 2048, jnp.bfloat16)]

    def call() -> jax.Array:
        cache = states[0].cache.holding(np.full(slots, FILLED, np.int32))
        state = states[0]._replace(cache=cache, remaining=jnp.full((slots,), FILLED, jnp.int32))
        state, recent, out = decode(config, params, state, sampling, masks)
        states[0] = store(state, recent)
        return out

    seconds = median_seconds(call, runs) / STEPS_PER_CALL
    cached = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * FILLED * slots
    read = 2 * (matrix_weights(config) + config.vocab_size * config.hidden_size + cached)
    return {
        "decode_tokens_per_second": slots / seconds,
        "decode_of_bound": read / (limits["copy_bytes_per_second"] / 2) / seconds,
    }


def measure_pruning(model: Decoder, runs: int, limits: dict[str, float]) -> dict[str, float]:
    layers = [(layer.mlp.gate_proj[...], layer.mlp.up_proj[...], layer.mlp.down_proj[...]) for layer in model.layers]
    kept = np.arange(0, model.config.intermediate_sizes[0], 2, dtype=np.int32)

    def scores() -> list[jax.Array]:
        return [score_layer(WEIGHT_CRITERIA["ppm"], gate, up) for gate, up, _ in layers]

    def slices() -> list[jax.Array]:
        return [slice_neurons(int(i == 2), 0, w, kept) for layer in layers for i, w in enumerate(layer)]

    scored = sum(gate.nbytes + up.nbytes for gate, up, _ in layers) / median_seconds(scores, runs)
    # Half of the neurons are read, and as many bytes written.
    sliced = sum(w.nbytes for layer in layers for w in layer) / median_seconds(slices, runs)
    return {
        "scoring_bytes_per_second": scored,
        "scoring_of_copy_rate": scored / limits["copy_bytes_per_second"],
        "slicing_bytes_per_second": sliced,
        "slicing_of_copy_rate": sliced / limits["copy_bytes_per_second"],
    }


def ones(config: ModelConfig) -> tuple[jax.Array, ...]:
    return tuple(jnp.ones(width, jnp.float32) for width in config.intermediate_sizes)


def measure_peer(name: str, runs: int, batch: int, slots: int) -> dict[str, float]:
    """`transformers` on PyTorch's accelerator, or on the CPU."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, StaticCache

    device = "cuda" if torch.cuda.is_available() else "cpu"
    config = AutoConfig.for_model(**HF_CONFIGS[name])
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
        tokens = torch.randint(0, config.vocab_size, (batch, ROW))
        step = torch.randint(0, config.vocab_size, (slots, 1))

    def timed(function: Callable[[], Any]) -> float:
        def run() -> None:
            function()
            if device == "cuda":
                torch.cuda.synchronize()

        return median_seconds(run, runs)

    results = {}
    with torch.no_grad():
        seconds = timed(lambda: model.model(tokens))
        results["prefill_tokens_per_second"] = batch * ROW / seconds
        cache = StaticCache(config=config, max_cache_len=2048)
        model.model(torch.zeros((slots, FILLED), dtype=torch.long, device=device), past_key_values=cache)
        position = torch.tensor([FILLED], device=device)
        seconds = timed(
            lambda: model(step, past_key_values=cache, cache_position=position, position_ids=position[None])
        )
        results["decode_tokens_per_second"] = slots / seconds
    return results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=HF_CONFIGS, default=["llama-3.2-1b", "llama-3.2-3b"])
    parser.add_argument("--batch", type=int, default=16, help=f"rows of {ROW} tokens")
    parser.add_argument("--slots", type=int, default=16, help="sequences decoded together, 1,024 tokens each")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--peer", action="store_true", help="also transformers, on the same device")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    limits = bounds(args.runs)
    results: dict[str, dict[str, float]] = {}
    for name in args.model:
        results[name] = measure(name, args.runs, args.batch, args.slots, limits)
        if args.peer:
            results[f"{name}, transformers"] = measure_peer(name, args.runs, args.batch, args.slots)
    if args.json:
        print(json.dumps({"device": jax.devices()[0].device_kind, "bounds": limits, "models": results}, indent=1))
        return
    rates = f"{limits['matrix_flops_per_second'] / 1e12:.2f} TFLOP/s, {limits['copy_bytes_per_second'] / 1e9:.0f} GB/s"
    table = Table(title=f"{jax.devices()[0].device_kind}: measured {rates}", title_justify="left")
    table.add_column("")
    for name in results:
        table.add_column(name, justify="right")
    for key in next(iter(results.values())):
        share = key.endswith(("utilisation", "bound", "rate"))
        cells = (result.get(key) for result in results.values())
        table.add_row(
            key.replace("_", " "),
            *("" if value is None else f"{value:.1%}" if share else f"{value:,.0f}" for value in cells),
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    main()

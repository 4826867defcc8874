"""PPM scoring alone: bytes of weights read per second, against the machine's memory copy rate.

    python benchmarks/scoring_bandwidth.py [--criterion vow] [--dtype float32] [--json]

Runs on JAX's default device over the gate and up matrices of Llama-3.2-1B (16 layers of 2 x [8192, 2048]).
Compilation is left out: one untimed pass goes first. The copy rate is that of adding one to as many bytes of integers
in place (as STREAM's scale kernel does it, without the page faults of fresh memory), counting the bytes read plus the
bytes written. Scoring only reads. The check for NaN and the fingerprint, which `score` adds, are not part of it.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from shapes import shapes_of

from gluprune_jax.pruning.criteria import WEIGHT_CRITERIA


def median_seconds(function: Callable[[], Any], runs: int) -> float:
    jax.block_until_ready(function())
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        jax.block_until_ready(function())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--criterion", choices=WEIGHT_CRITERIA, default="ppm")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    config = shapes_of("llama-3.2-1b")

    def weights(seed: int) -> jax.Array:
        shape = (config.intermediate_sizes[0], config.hidden_size)
        return 0.02 * jax.random.normal(jax.random.key(seed), shape, jnp.dtype(args.dtype))

    layers = [(weights(2 * i), weights(2 * i + 1)) for i in range(config.num_hidden_layers)]
    read = sum(gate.nbytes + up.nbytes for gate, up in layers)
    score = jax.jit(WEIGHT_CRITERIA[args.criterion])
    scoring = read / median_seconds(lambda: [score(gate, up) for gate, up in layers], args.runs)
    increment = jax.jit(lambda words: words + 1, donate_argnums=0)
    words = [jnp.zeros(w.nbytes // 4, jnp.int32) for pair in layers for w in pair]

    def rewrite() -> list[jax.Array]:
        words[:] = map(increment, words)
        return words

    copying = 2 * read / median_seconds(rewrite, args.runs)
    device = jax.devices()[0]
    report = {
        "device": device.device_kind,
        "criterion": args.criterion,
        "dtype": args.dtype,
        "scoring_bytes_per_second": scoring,
        "copy_bytes_per_second": copying,
        "share_of_copy_rate": scoring / copying,
    }
    if args.json:
        print(json.dumps(report, indent=1))
        return
    print(f"{args.criterion}, {args.dtype}, {device.platform} ({device.device_kind}), {read / 1e9:.2f} GB of weights")
    print(f"scoring reads   {scoring / 1e9:7.2f} GB/s")
    print(f"copying moves   {copying / 1e9:7.2f} GB/s (in place, read and written)")
    print(f"scoring reaches {scoring / copying:7.1%} of the copy rate")


if __name__ == "__main__":
    main()

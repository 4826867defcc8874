"""How near scoring a text comes to the machine's own rate of matrix products, in float32 and bfloat16.

    python benchmarks/roofline.py [--tokens 8192] [--runs 5] [--json]

The wall: the products of one SmolLM2-135M layer, and of its logits, for as many rows as we run tokens at once, each by
itself, timed in JAX and in PyTorch. What a program takes on top is attention, norms, softmax and memory. Scored is a
random text, every token of which is asked about, in windows of 2,048 tokens: our `evals.perplexity`, and the same
windows in transformers. Compilation is left out. Each dtype and side is a process of its own.
"""

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

WINDOW, ROWS = 2048, 1024
DTYPES, SIDES = ("float32", "bfloat16"), ("jax", "torch")


def median_seconds(function: Callable[[], Any], runs: int) -> float:
    """The median seconds of a call, after one that is not counted."""
    function()
    seconds = []
    for _ in range(runs):
        start = time.perf_counter()
        function()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def products(config: dict[str, Any]) -> list[tuple[int, int, int]]:
    """Outputs, inputs and how often a token needs each product of a weight matrix."""
    D, F, L = config["hidden_size"], config["intermediate_size"], config["num_hidden_layers"]
    kv = D // config["num_attention_heads"] * config["num_key_value_heads"]
    return [(D, D, 2 * L), (kv, D, 2 * L), (F, D, 2 * L), (D, F, L), (config["vocab_size"], D, 1)]


def measure(side: str, folder: str, dtype: str, tokens: int, runs: int) -> dict[str, float]:
    """Operations of a token, and seconds of its products alone and of scoring it."""
    with open(f"{folder}/config.json", encoding="utf-8") as file:
        config = json.load(file)
    needed = products(config)
    rng = np.random.default_rng(0)
    text = rng.integers(0, config["vocab_size"], tokens).tolist()
    alone = 0.0
    if side == "jax":
        import jax
        import jax.numpy as jnp

        import convert
        from evals.perplexity import perplexity

        model = convert.load(folder, dtype=dtype).model
        product = jax.jit(lambda x, w: x @ w.T)

        def multiply(x: Any, w: Any) -> None:
            jax.block_until_ready(product(x, w))

        for outputs, inputs, times in needed:
            x, w = (jnp.ones((n, inputs), dtype) for n in (ROWS, outputs))
            alone += times * median_seconds(functools.partial(multiply, x, w), runs)
        scoring = median_seconds(lambda: perplexity(model, text, sequence_length=WINDOW), runs)
    else:
        import torch
        from transformers import AutoModelForCausalLM

        kind = getattr(torch, dtype)
        module = AutoModelForCausalLM.from_pretrained(folder, dtype=kind)

        def score() -> None:
            for start in range(0, tokens, WINDOW):
                window = torch.tensor([text[start : start + WINDOW]])
                logits = module(window, use_cache=False).logits[0, :-1]
                torch.log_softmax(logits.float(), -1).gather(1, window[0, 1:, None]).sum().item()

        with torch.inference_mode():
            for outputs, inputs, times in needed:
                x, w = (torch.ones((n, inputs), dtype=kind) for n in (ROWS, outputs))
                alone += times * median_seconds(functools.partial(torch.nn.functional.linear, x, w), runs)
            scoring = median_seconds(score, runs)
    operations = sum(2 * outputs * inputs * times for outputs, inputs, times in needed)
    return {"operations": operations, "products": alone / ROWS, "scoring": scoring / tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        prepare = f"import convert; convert.save(convert.load('demo', dtype='float32'), {folder + '/model'!r})"
        subprocess.run([sys.executable, "-c", prepare], check=True, env=environment)
        for dtype in DTYPES:
            for side in SIDES:
                rest = [f"{folder}/model", dtype, str(args.tokens), str(args.runs)]
                argv = [sys.executable, __file__, "--measure", side, *rest]
                done = subprocess.run(argv, check=True, env=environment, stdout=subprocess.PIPE, text=True)
                results[f"{dtype}, {side}"] = json.loads(done.stdout.splitlines()[-1])
    if args.json:
        print(json.dumps(results, indent=1))
        return
    title = f"SmolLM2-135M, {args.tokens} tokens, all scored (medians of {args.runs})"
    table = Table(title=title, title_justify="left")
    for column in ("", "products alone, GFLOP/s", "tokens/s at that rate", "tokens/s scored", "of the wall"):
        table.add_column(column, justify="right" if column else "left")
    for name, result in results.items():
        rate = result["operations"] / result["products"] / 1e9
        wall, scored = 1 / result["products"], 1 / result["scoring"]
        table.add_row(name, f"{rate:.0f}", f"{wall:.0f}", f"{scored:.0f}", f"{scored / wall:.0%}")
    Console().print(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(sys.argv[2], sys.argv[3], sys.argv[4], int(sys.argv[5]), int(sys.argv[6]))))
    else:
        main()

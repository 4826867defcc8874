"""Perplexity of the demo model by criterion and share of neurons removed, beside random choices of as many.

    python benchmarks/criteria.py [--model demo] [--tokens 8192] [--json]

Everything runs under masks, in one compiled program.
"""

import argparse
import dataclasses
import json
import statistics

import numpy as np
from rich.console import Console
from rich.table import Table

import convert
from convert.tokenizer import encode_text, load_tokenizer
from evals.perplexity import PYTHON_REFERENCE, perplexity, read_text
from gluprune_jax import CRITERIA, Scores, make_plan, score
from gluprune_jax.importance import random_values

SEEDS = 5


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", default=PYTHON_REFERENCE)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--percent", type=float, nargs="+", default=[10, 20, 40])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    checkpoint = convert.load(args.model)
    model, config = checkpoint.model, checkpoint.config
    tokens = encode_text(load_tokenizer(checkpoint), read_text(args.text))[: args.tokens]

    def under(masks: tuple[np.ndarray, ...]) -> float:
        return perplexity(model, tokens, neuron_masks=masks).value

    def pruned(scores: Scores, percent: float) -> float:
        return under(make_plan(scores, prune_percent=percent).masks(config))

    dense = under(tuple(np.ones(width, np.float32) for width in config.intermediate_sizes))
    scores = {name: score(model, name) for name in CRITERIA}
    rows = {name: [pruned(scores[name], percent) for percent in args.percent] for name in CRITERIA}
    random = [dataclasses.replace(scores["ppm"], values=random_values(config, seed)) for seed in range(SEEDS)]
    spread = [[pruned(one, percent) for one in random] for percent in args.percent]
    rows[f"random, median of {SEEDS}"] = [statistics.median(values) for values in spread]
    if args.json:
        report = {"dense": dense, "percent": args.percent, "perplexity": rows, "random": spread}
        print(json.dumps(report, indent=1))
        return
    table = Table(title=f"token perplexity of {args.model} (dense {dense:.2f})", title_justify="left")
    table.add_column("criterion")
    for percent in args.percent:
        table.add_column(f"{percent:g} %", justify="right")
    for name, values in rows.items():
        table.add_row(name, *(f"{value:,.1f}" for value in values))
    Console().print(table)


if __name__ == "__main__":
    main()

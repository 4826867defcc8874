"""Seconds per decoded token, of prefill and of a run of both, of this tree and of another one, in alternating pairs.

    git worktree add /tmp/before COMMIT && python benchmarks/decode_step.py --against /tmp/before

The demo model in float32 continues equal prompts (`--slots` of `--context` tokens, greedily) with `generate`, whose
callback is the clock, read every 16 tokens: the first 17, with compilation and prompts, are left out. Prefill is of 512
tokens behind 512 others. The run of both is of twice as many prompts as slots, which share nothing and end after 16 to
79 tokens (with 4 calls; a tree whose loop asks every 16 tokens decodes up to 15 more); programs for fewer rows, which
the last of them need, are compiled in it. Each tree has a process of its own in each pair. Wall and CPU seconds
(medians of `--calls` calls, of prefill four times as many, of one run, and of `--pairs` pairs); beside other work the
CPU seconds are steadier.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

CHILD = """
import inspect, itertools, json, sys, time
import jax, numpy as np
from flax import nnx
import convert
try:
    from gluprune_jax.inference.generation import generate
    from gluprune_jax.inference.prefill import extend
    from gluprune_jax.models.cache import KVCache
except ImportError:
    from gluprune_jax.generation import generate
    from gluprune_jax.prefill import extend
    from gluprune_jax.model import KVCache
slots, context, calls = map(int, sys.argv[1:])
model = convert.load("demo", dtype="float32").model
prompt = np.random.default_rng(0).integers(1000, 40000, context + 1).tolist()  # the last chunk is short
laps = []
# Every token of every sequence: what a text repeats is another question (prompt_lookup.py).
options = {"prompt_lookup": False} if "prompt_lookup" in inspect.signature(generate).parameters else {}
texts = generate(
    model,
    [prompt] * slots,
    max_new_tokens=16 * calls + 17,
    slots=slots,
    on_tokens=lambda count: laps.append((count / slots, time.perf_counter(), time.process_time())),
    **options,
)
laps = [lap for lap in laps if lap[0] % 16 == 1]  # there is a call every 16 tokens, in later trees every token
steps = [[(b[i] - a[i]) / 16 for i in (1, 2)] for a, b in itertools.pairwise(laps)][:calls]
params, cache = nnx.state(model, nnx.Param), KVCache.empty(model.config, 1, 1024, "float32")
cache, tokens = cache.holding(np.array([512], np.int32)), np.array([prompt[:512]], np.int32)
prefills = []
for _ in range(4 * calls + 1):
    before = time.perf_counter(), time.process_time()
    jax.block_until_ready(extend(model.config, params, cache, tokens, None)[0])
    prefills.append([time.perf_counter() - before[0], time.process_time() - before[1]])
prompts = np.random.default_rng(1).integers(1000, 40000, (2 * slots, context + 1)).tolist()
most = 16 * calls + 17
end = lambda tokens: 16 + tokens[0] % (most - 17)
before = time.perf_counter(), time.process_time()
texts += generate(
    model,
    prompts,
    max_new_tokens=most,
    slots=slots,
    should_stop=lambda tokens: len(tokens) >= end(tokens),
    **options,
)
run = [time.perf_counter() - before[0], time.process_time() - before[1]]
# The loop of earlier trees asks `should_stop` every 16 tokens.
texts[slots:] = [tokens[: end(tokens)] for tokens in texts[slots:]]
print(json.dumps({"steps": steps, "prefills": prefills[1:], "runs": [run], "tokens": texts}))
"""

ROWS = ("wall, ms a step", "CPU, ms a step", "prefill, wall, ms", "prefill, CPU, ms", "run, wall, ms", "run, CPU, ms")


class Decoded(NamedTuple):
    """What a tree did: wall and CPU seconds of a step, of a prefill (medians) and of a run, and all tokens."""

    wall: float
    cpu: float
    prefill_wall: float
    prefill_cpu: float
    run_wall: float
    run_cpu: float
    tokens: list[list[int]]


def measure(tree: Path, args: argparse.Namespace) -> Decoded:
    command = [sys.executable, "-c", CHILD, *map(str, (args.slots, args.context, args.calls))]
    environment = os.environ | {"PYTHONPATH": str(tree)}
    result = subprocess.run(command, env=environment, cwd=tree, capture_output=True, text=True, check=True)
    found = json.loads(result.stdout.splitlines()[-1])
    laps = (values for key in ("steps", "prefills", "runs") for values in zip(*found[key], strict=True))
    medians = [statistics.median(values) for values in laps]
    return Decoded(*medians, found["tokens"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--against", type=Path, required=True, help="another tree of this project")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--context", type=int, default=1024)
    parser.add_argument("--calls", type=int, default=4, help="timed calls of a process, 16 tokens each")
    parser.add_argument("--pairs", type=int, default=5)
    args = parser.parse_args()
    here = Path(__file__).resolve().parents[1]
    pairs = []
    for _ in range(args.pairs):
        pairs.append((measure(args.against.resolve(), args), measure(here, args)))
        print(
            *("{:.4f} s, CPU {:.4f}; prefill {:.4f}, {:.4f}; run {:.1f}, {:.1f}".format(*side) for side in pairs[-1]),
            file=sys.stderr,
        )
    table = Table(title=f"{args.slots} sequences, {args.context} tokens before them", title_justify="left")
    for heading in ("", "before", "now", "ratio (smallest to largest)"):
        table.add_column(heading)
    for i, name in enumerate(ROWS):
        before, now = ([1e3 * pair[j][i] for pair in pairs] for j in (0, 1))
        ratios = sorted(b / a for a, b in zip(before, now, strict=True))
        cells = f"{statistics.median(before):.1f}", f"{statistics.median(now):.1f}"
        table.add_row(name, *cells, f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})")
    console = Console(width=110)
    console.print(table)
    console.print(f"the same tokens: {all(a.tokens == b.tokens for a, b in pairs)}")


if __name__ == "__main__":
    main()

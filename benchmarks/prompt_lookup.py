"""What prompt lookup decoding gains on one CPU: the same answers with and without it, in alternating pairs.

    python benchmarks/prompt_lookup.py --data-dir DIR [--tasks ifeval gsm8k] [--items 16] [--pairs 3]
        [--prune-percent 20 [--criterion ppm]]

The demo model in float32, dense or pruned, answers the requests of lm-eval's tasks, each side in a process of its own.
Seconds are those of `generate`: prompts and compilation are in them, the cache of compiled programs is off. A pass runs
the model once for all sequences. The two texts of an answer differ where rounding decides.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lm_eval_peer import answers, load_requests, save_requests
from rich.console import Console
from rich.table import Table


def answer(requests: str, prompt_lookup: bool, prune_percent: float, criterion: str) -> dict[str, Any]:
    """Answers requests in this process."""
    import convert
    from evals.harness.backend import GlupruneLM
    from gluprune_jax import prune_model
    from gluprune_jax.inference import engine
    from gluprune_jax.inference.generation import generate

    checkpoint = convert.load("demo", dtype="float32")
    if prune_percent:
        checkpoint = prune_model(checkpoint, criterion, prune_percent=prune_percent)
    found: dict[str, Any] = {"seconds": 0.0, "passes": 0, "texts": []}

    def timed(model: Any, prompts: Any, *, on_tokens: Any = None, **options: Any) -> list[list[int]]:
        def count(total: int) -> None:
            found["passes"] += 1

        start = time.perf_counter()
        texts = generate(model, prompts, prompt_lookup=prompt_lookup, on_tokens=count, **options)
        found["seconds"] += time.perf_counter() - start
        found["texts"] += texts
        return texts

    engine.generate = timed
    answers(GlupruneLM.from_checkpoint(checkpoint, add_bos_token=False), load_requests(Path(requests)))
    return found


def measure(requests: Path, prompt_lookup: bool, args: argparse.Namespace) -> dict[str, Any]:
    argv = [sys.executable, __file__, "--answer", str(requests), str(int(prompt_lookup)), str(args.prune_percent)]
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false", "JAX_PLATFORMS": "cpu"}
    result = subprocess.run([*argv, args.criterion], env=environment, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SystemExit(f"{argv} ended with status {result.returncode}:\n{result.stderr[-4000:]}")
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    return found


def prepare(folder: Path, data_dir: Path, task: str, items: int) -> Path:
    from evals_parity import build_requests, evenly

    from evals.harness.task_data import task_datasets

    with task_datasets(data_dir):
        save_requests(folder / f"{task}.json", build_requests(task, evenly(items), None))
    return folder / f"{task}.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="JSON-lines copies of the data sets")
    parser.add_argument("--tasks", nargs="+", default=["ifeval", "gsm8k"])
    parser.add_argument("--items", type=int, default=16)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--prune-percent", type=float, default=0)
    parser.add_argument("--criterion", default="ppm")
    args = parser.parse_args()
    name = f"{args.criterion}, {args.prune_percent:g} % removed" if args.prune_percent else "dense"
    table = Table(title=f"SmolLM2-135M-Instruct, {name}, {args.items} items", title_justify="left")
    for heading in ("", "tokens", "seconds without", "with", "times as fast", "passes without", "with", "same texts"):
        table.add_column(heading)
    with tempfile.TemporaryDirectory() as folder:
        for task in args.tasks:
            requests = prepare(Path(folder), args.data_dir, task, args.items)
            pairs = []
            for i in range(args.pairs):
                order = (False, True) if i % 2 else (True, False)
                sides = {lookup: measure(requests, lookup, args) for lookup in order}
                pairs.append((sides[False], sides[True]))
                print(task, *(f"{side['seconds']:.1f} s" for side in pairs[-1]), file=sys.stderr)
            ratios = sorted(without["seconds"] / with_["seconds"] for without, with_ in pairs)
            without, with_ = pairs[0]
            texts = zip(without["texts"], with_["texts"], strict=True)
            # One may go on a few tokens longer behind a stop string.
            same = sum(all(a == b for a, b in zip(*pair, strict=False)) for pair in texts)
            table.add_row(
                task,
                str(sum(map(len, without["texts"]))),
                *(f"{statistics.median(pair[i]['seconds'] for pair in pairs):.1f}" for i in (0, 1)),
                f"{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})",
                str(without["passes"]),
                str(with_["passes"]),
                f"{same} of {len(without['texts'])}",
            )
    Console(width=130).print(table)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--answer"]:
        print(json.dumps(answer(sys.argv[2], sys.argv[3] == "1", float(sys.argv[4]), sys.argv[5])))
    else:
        main()

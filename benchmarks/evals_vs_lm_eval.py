"""Speed and memory of the evaluation against lm-eval's own `hf` backend: same machine, same requests, same dtype.

    python benchmarks/evals_vs_lm_eval.py --data-dir DIR [--tasks mmlu hellaswag] [--items mmlu=200] [--pairs 3]
        [--peer-batch-sizes 1,8,16] [--dtype bfloat16] [--json]

The model is SmolLM2-135M-Instruct as a Hugging Face folder in float32, which both sides load as `--dtype`. lm-eval
builds the requests of each benchmark once: of documents at even distances, of MMLU from two whole subjects that are
together as the average one. Each side answers them in a process of its own, now one first, now the other. Measured is
the time from the first request to the last answer, tokenization and compilation included; JAX's persistent cache of
compiled programs is off. Imports and the loading of weights are left out. Peak memory is that of the whole process;
ours runs as where PyTorch is not installed (`transformers` imports it wherever it is).

The peer runs batches of 8, or the best of --peer-batch-sizes; on WikiText batches of 1, because 8 windows of 8192
tokens would have 13 GB of logits and as much of their softmax, which 24 GiB do not hold.

The suite as a whole is the sum of seconds per item times the official number of items. Compilation counts in it as
often as the official number is larger than the measured one; the second figure counts it once for each benchmark.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lm_eval_peer import PEER_BATCH, answers, count_items, load_requests, peer_lm, save_requests
from rich.console import Console
from rich.table import Table

SIDES = ("gluprune_jax", "lm_eval")


class Score(NamedTuple):
    """A benchmark: how many items are measured (of each lm-eval task), how many there are, and the ratio aimed at."""

    items: int | None  # all
    official: int
    target: float


TASKS = {
    "mmlu": Score(None, 14042, 4),
    "arc_challenge": Score(240, 1172, 2),
    "hellaswag": Score(240, 10042, 2),
    "winogrande": Score(480, 1267, 1.2),
    "piqa": Score(400, 1838, 1.2),
    "boolq": Score(160, 3270, 1),
    "truthfulqa_mc1": Score(48, 817, 5),
    "truthfulqa_mc2": Score(36, 817, 5),
    "gsm8k": Score(32, 1319, 2),
    "ifeval": Score(8, 541, 2),
    "leaderboard_musr": Score(6, 756, 2),
    "wikitext": Score(6, 62, 1.2),
    "lambada_openai": Score(640, 5153, 1.2),
}
SUITE_TARGET = 3.0
# Whole subjects. Their prompts are as those of all 57: 734 tokens on average (723), 114 of them not shared (108).
PARTS = {"mmlu": ("mmlu_formal_logic", "mmlu_college_computer_science")}
PEER_BATCHES = {"wikitext": (1,)}  # for the others as asked


# ------------------------------------------------------------------------------------------------------ one side


def answer(side: str, model: str, requests: str, batch_size: int, dtype: str) -> dict[str, Any]:
    """Answers requests in this process. Returns seconds by part, and what was compiled.

    `batch_size` is for the peer; ours chooses its own.
    """
    compile_seconds, programs = 0.0, set[str]()

    def listen(event: str, seconds: float, **details: str | int) -> None:
        nonlocal compile_seconds
        if event.startswith("/jax/core/compile/"):
            compile_seconds += seconds
            programs.add(str(details.get("fun_name")))

    laps = [time.perf_counter()]
    instances = load_requests(Path(requests))
    if side == "lm_eval":
        lm = peer_lm(model, batch_size=batch_size, dtype=dtype)
    else:
        sys.modules["torch"] = None  # type: ignore[assignment]  # importing it fails
        import jax

        import convert
        from evals.harness.backend import GlupruneLM

        jax.monitoring.register_event_duration_secs_listener(listen)
        lm = GlupruneLM.from_checkpoint(convert.load(model, dtype=dtype), add_bos_token=False)
    laps.append(time.perf_counter())
    answers(lm, instances)
    laps.append(time.perf_counter())
    return {
        "load_seconds": laps[1] - laps[0],
        "seconds": laps[2] - laps[1],
        "compile_seconds": compile_seconds,
        "programs": sorted(programs),
    }


def measure(side: str, model: Path, requests: Path, batch_size: int, dtype: str) -> dict[str, Any]:
    """Runs `answer` in a process of its own; adds the process's peak resident memory in bytes."""
    argv = [sys.executable, __file__, "--answer", side, str(model), str(requests), str(batch_size), dtype]
    # No second run may profit from what the first has compiled.
    environment = os.environ | {"JAX_ENABLE_COMPILATION_CACHE": "false", "JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(argv, stdout=out, stderr=err, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        if process.returncode:
            raise SystemExit(f"{argv} ended with status {process.returncode}:\n{err.read()[-4000:]}")
        result: dict[str, Any] = json.loads(out.read().splitlines()[-1])
    return result | {"peak_bytes": usage.ru_maxrss * 1024, "batch_size": batch_size}


# -------------------------------------------------------------------------------------------------- preparations


def prepare(folder: str, data_dir: str, items: Mapping[str, int | None]) -> dict[str, tuple[int, int]]:
    """Writes the model and the requests of each benchmark; returns the numbers of items and requests."""
    from evals_parity import build_requests, evenly

    import convert
    from evals.harness.task_data import task_datasets

    convert.save(convert.load("demo", dtype="float32"), Path(folder) / "model")
    counts = {}
    with task_datasets(Path(data_dir)):
        for name, number in items.items():
            instances = build_requests(name, evenly(sys.maxsize if number is None else number), PARTS.get(name))
            save_requests(Path(folder) / f"{name}.json", instances)
            counts[name] = (count_items(instances), len(instances))
    return counts


def parse_items(entries: Sequence[str], tasks: Sequence[str]) -> dict[str, int | None]:
    """Items of each task: the defaults, changed by entries such as `piqa=100`."""
    items: dict[str, int | None] = {name: TASKS[name].items for name in tasks}
    for entry in entries:
        name, _, number = entry.partition("=")
        if name not in items or not number.isdecimal() or int(number) < 1:
            raise SystemExit(f"--items has {entry!r}; write TASK=NUMBER, with a task of {', '.join(items)}")
        items[name] = int(number)
    return items


# ------------------------------------------------------------------------------------------------------- figures


def compare(runs: Mapping[str, Sequence[Sequence[Mapping[str, Any]]]]) -> dict[str, Any]:
    """From the runs of both sides, pair by pair (of the peer one for each batch size), to what is reported.

    The peer is taken at the batch size at which the median of its times is the shortest.
    """
    by_batch = list(zip(*runs["lm_eval"], strict=True))
    best = min(by_batch, key=lambda results: statistics.median(result["seconds"] for result in results))
    ours = [pair[0] for pair in runs["gluprune_jax"]]
    pairs = [they["seconds"] / we["seconds"] for we, they in zip(ours, best, strict=True)]

    def medians(results: Sequence[Mapping[str, Any]]) -> dict[str, float]:
        keys = ("seconds", "compile_seconds", "load_seconds", "peak_bytes", "batch_size")
        return {key: statistics.median(result[key] for result in results) for key in keys}

    return {
        "gluprune_jax": medians(ours),
        "lm_eval": medians(best),
        "lm_eval_seconds_by_batch_size": {
            results[0]["batch_size"]: statistics.median(result["seconds"] for result in results) for results in by_batch
        },
        "times_as_fast": statistics.median(pairs),
        "pairs": pairs,
        "programs": ours[0]["programs"],
    }


def whole_suite(results: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Seconds of every official item on both sides, and their ratio, with compilation scaled and counted once."""
    scaled, once = (dict.fromkeys(SIDES, 0.0) for _ in range(2))
    for name, result in results.items():
        scale = TASKS[name].official / result["items"]
        for side in SIDES:
            compiling = result[side]["compile_seconds"]
            scaled[side] += scale * result[side]["seconds"]
            once[side] += scale * (result[side]["seconds"] - compiling) + compiling
    return {
        "seconds": scaled,
        "times_as_fast": scaled["lm_eval"] / scaled["gluprune_jax"],
        "seconds_compiled_once": once,
        "times_as_fast_compiled_once": once["lm_eval"] / once["gluprune_jax"],
        "programs": sorted({program for result in results.values() for program in result["programs"]}),
    }


def show(results: Mapping[str, Mapping[str, Any]], suite: Mapping[str, Any], dtype: str) -> None:
    table = Table(title=f"SmolLM2-135M-Instruct, {dtype}: seconds to answer the same requests", title_justify="left")
    for column in ("", "items", "requests", "ours", "of it compiling", "lm-eval", "batch", "times as fast", "target"):
        table.add_column(column, justify="right" if column else "left")
    table.add_column("peak GB, ours / lm-eval", justify="right")
    for name, result in results.items():
        ours, peer, ratio = result["gluprune_jax"], result["lm_eval"], result["times_as_fast"]
        spread = f" ({min(result['pairs']):.2f} to {max(result['pairs']):.2f})" if len(result["pairs"]) > 1 else ""
        table.add_row(
            name,
            str(result["items"]),
            str(result["requests"]),
            f"{ours['seconds']:.1f}",
            f"{ours['compile_seconds']:.1f}",
            f"{peer['seconds']:.1f}",
            f"{peer['batch_size']:g}",
            f"{ratio:.2f}{spread}",
            f"{TASKS[name].target:g}{'' if ratio >= TASKS[name].target else ' missed'}",
            f"{ours['peak_bytes'] / 1e9:.2f} / {peer['peak_bytes'] / 1e9:.2f}",
        )
    Console(width=140).print(table)
    part = "the suite" if len(results) == len(TASKS) else f"these {len(results)} of {len(TASKS)} benchmarks"
    hours = {side: seconds / 3600 for side, seconds in suite["seconds"].items()}
    print(
        f"{part}, all items: {hours['gluprune_jax']:.2f} h against {hours['lm_eval']:.2f} h, "
        f"{suite['times_as_fast']:.2f} times as fast (target of the suite: {SUITE_TARGET:g}; "
        f"{suite['times_as_fast_compiled_once']:.2f} with compilation counted once for each benchmark); "
        f"{len(suite['programs'])} programs compiled in all"
    )
    above = [n for n, r in results.items() if r["gluprune_jax"]["peak_bytes"] >= r["lm_eval"]["peak_bytes"]]
    print(f"peak memory below the peer's: {'no: ' + ', '.join(above) if above else 'everywhere'}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="JSON-lines copies of the data sets")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--items", nargs="+", default=[], metavar="TASK=N", help="other numbers of items")
    parser.add_argument("--pairs", type=int, default=1, help="pairs of runs; medians are reported")
    parser.add_argument("--peer-batch-sizes", default=str(PEER_BATCH), help="comma-separated; the best one counts")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of both sides")
    parser.add_argument("--work", type=Path, help="where to make a temporary folder for the checkpoint")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    items = parse_items(args.items, args.tasks)
    sizes = tuple(int(size) for size in args.peer_batch_sizes.split(","))
    results: dict[str, Any] = {}
    if args.work:
        args.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        # In a process of its own: the kernel counts the memory of this one as that of its children before they start.
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            counts = pool.submit(prepare, work, str(args.data_dir), items).result()
        model = Path(work) / "model"
        for name in args.tasks:
            requests = Path(work) / f"{name}.json"
            runs: dict[str, list[list[dict[str, Any]]]] = {side: [] for side in SIDES}
            for i in range(args.pairs):
                for side in SIDES[:: -1 if i % 2 else 1]:  # now one first, now the other
                    batches = PEER_BATCHES.get(name, sizes) if side == "lm_eval" else (PEER_BATCH,)
                    runs[side].append([measure(side, model, requests, batch, args.dtype) for batch in batches])
                    best = min(run["seconds"] for run in runs[side][-1])
                    print(f"{name}, pair {i + 1} of {args.pairs}: {side} {best:.1f} s", file=sys.stderr, flush=True)
            results[name] = {"items": counts[name][0], "requests": counts[name][1], **compare(runs)}
            ours, peer = (results[name][side]["seconds"] for side in SIDES)
            print(f"{name}: {ours:.1f} s, lm-eval {peer:.1f} s", file=sys.stderr, flush=True)
    suite = whole_suite(results)
    if args.json:
        targets = {name: TASKS[name].target for name in results} | {"suite": SUITE_TARGET}
        print(json.dumps({"dtype": args.dtype, "tasks": results, "suite": suite, "targets": targets}, indent=1))
    else:
        show(results, suite, args.dtype)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--answer"]:
        print(json.dumps(answer(*sys.argv[2:5], int(sys.argv[5]), sys.argv[6])))
    else:
        main()

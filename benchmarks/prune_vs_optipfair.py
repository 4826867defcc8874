"""Load, prune 40 % by PPM, save: this package against OptiPFair 0.4.2, whole processes, in pairs.

    pip install 'gluprune-jax[parity]' && python benchmarks/prune_vs_optipfair.py --model llama-1b --runs 5

`--baseline CHECKOUT` measures an older version of this package, in a folder, in the place of OptiPFair.

Imports are part of the time, and compilation where an older version compiles; that of Python's modules, which pip does
when it installs, is not: both programs have run once before. `llama-1b` is a random bfloat16 checkpoint of
Llama-3.2-1B's exact shapes (2.5 GB); `smollm2` is the demo model as a float32 Hugging Face folder (0.5 GB). Both
programs read the same folder; at the end the scores of the neurons that they kept are compared.
"""

import argparse
import concurrent.futures
import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from shapes import write_checkpoint

import convert
from gluprune_jax import score

PERCENT = 40
NO_PARTS = ("seconds", "cpu", "peak_bytes", "bytes_read", "bytes_written")  # of what `run` gives
OPTIPFAIR = f"""
import pathlib, sys, time
parts, last = {{}}, time.perf_counter()
def lap(part):
    global last
    parts[part], last = time.perf_counter() - last, time.perf_counter()
import optipfair, torch, transformers
lap("import")
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype="auto")
lap("load")
model = optipfair.prune_model(model, neuron_selection_method="MAW", pruning_percentage={PERCENT}, show_progress=False)
lap("prune")
model.save_pretrained(sys.argv[2])
if (pathlib.Path(sys.argv[1]) / "tokenizer.json").exists():  # the random checkpoint has none
    transformers.AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])
lap("save")
import json; print(json.dumps({{"seconds": parts}}))
"""


def prepare(name: str, folder: Path) -> None:
    if name == "llama-1b":
        write_checkpoint(folder)
    else:
        convert.save(convert.load("demo"), folder)


def command(program: str, model: Path, output: Path, baseline: Path | None) -> list[str]:
    if program == "optipfair":
        return [sys.executable, "-c", OPTIPFAIR, str(model), str(output)]
    target = ["--model", str(model), "--prune-percent", str(PERCENT), "--output", str(output), "--json"]
    if program == "baseline":
        there = ["env", "-C", str(baseline), f"PYTHONPATH={baseline}"]
        return [*there, sys.executable, "-m", "gluprune_jax.prune", *target]
    return [sys.executable, "-m", "gluprune_jax.prune", *target]


def transferred(pid: int) -> dict[str, float]:
    """Bytes that a process has read and written, from wherever they came; none where the system does not count them."""
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    try:
        lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    except OSError:
        return {}
    counts = {name: int(count) for name, count in (line.split(": ") for line in lines)}
    return {"bytes_read": counts["rchar"], "bytes_written": counts["wchar"]}


# Without it Python would compile thousands of modules anew in each run: it took the imports from 1 s to 3.5.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def run(argv: list[str]) -> dict[str, float]:
    """Runs a program; seconds in all and by part, its peak resident memory, and the bytes that it read and wrote."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(argv, stdout=out, stderr=err, env=ENVIRONMENT)
        counts = transferred(process.pid)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        if process.returncode:
            raise SystemExit(f"{argv} failed:\n{err.read()}")
        parts = json.loads(out.read())["seconds"]
    cpu = usage.ru_utime + usage.ru_stime
    start = seconds - sum(parts.values())
    return {"seconds": seconds, **parts, "start": start, "cpu": cpu, "peak_bytes": usage.ru_maxrss * 1024, **counts}


def same_choice(a: Path, b: Path) -> bool:
    """Whether both kept neurons of the same PPM scores: they may differ in which of several equal ones they keep."""
    ours, theirs = (convert.load(folder).model for folder in (a, b))
    return all(
        np.array_equal(np.sort(x), np.sort(y)) for x, y in zip(score(ours).values, score(theirs).values, strict=True)
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=("smollm2", "llama-1b"), default="smollm2")
    parser.add_argument("--runs", type=int, default=5, help="pairs of runs; medians are reported")
    parser.add_argument("--baseline", type=Path, help="checkout of an older version, to compare with instead")
    parser.add_argument("--work", type=Path, help="where to make a temporary folder for the checkpoints")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.work:
        args.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        model = Path(work) / args.model
        # In a process of its own: the kernel counts the memory of this one as that of its children before they start.
        with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            pool.submit(prepare, args.model, model).result()
        other = "optipfair" if args.baseline is None else "baseline"
        size = sum(file.stat().st_size for file in model.iterdir())
        runs: dict[str, list[dict[str, float]]] = {"gluprune_jax": [], other: []}
        for i in range(-1, args.runs):
            for program, results in list(runs.items())[:: 1 if i % 2 else -1]:  # now one first, now the other
                output = Path(work) / program
                shutil.rmtree(output, ignore_errors=True)
                os.sync()  # what the other one left to be written is not this one's time
                result = run(command(program, model, output, args.baseline))
                if i >= 0:
                    results.append(result)
        same = same_choice(Path(work) / "gluprune_jax", Path(work) / other)
    medians = {
        program: {key: statistics.median(result[key] for result in results) for key in results[0]}
        for program, results in runs.items()
    }
    ratios = [o["seconds"] / g["seconds"] for g, o in zip(runs["gluprune_jax"], runs[other], strict=True)]
    report = {"model": args.model, "runs": args.runs, "medians": medians, "times_as_fast": statistics.median(ratios)}
    report |= {"pairs": ratios, "same_choice": same}
    if args.json:
        print(json.dumps(report, indent=1))
        return
    table = Table(title=f"{args.model}: load, prune {PERCENT} %, save ({args.runs} pairs)", title_justify="left")
    for column in ("", "seconds", "of CPU", "by part", "read", "peak memory"):
        table.add_column(column, justify="left" if column in ("", "by part") else "right")
    for program, result in medians.items():
        parts = {key: value for key, value in result.items() if key not in NO_PARTS}
        spelled = ", ".join(f"{part} {value:.2f}" for part, value in parts.items())
        times = f"{result['bytes_read'] / size:.3f} x the model" if "bytes_read" in result else ""
        seconds, cpu, peak = f"{result['seconds']:.2f}", f"{result['cpu']:.2f}", f"{result['peak_bytes'] / 1e9:.2f} GB"
        table.add_row(program, seconds, cpu, spelled, times, peak)
    Console().print(table)
    spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
    print(f"{report['times_as_fast']:.2f} times as fast (pairs: {spread}); same choice up to ties: {same}")


if __name__ == "__main__":
    main()

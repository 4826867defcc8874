"""From file to file: pruning a random checkpoint of Llama-3.1-8B's exact shapes, against a plain copy of its files.

    python benchmarks/stream_8b.py --pairs 2 [--work FOLDER] [--json]     # 33 GB of disk
    python benchmarks/stream_8b.py --compare [--json]                     # 7 GB of disk

A pair is the copy (`shutil`, every file flushed to the disk) and `python -m gluprune_jax.prune --stream` as a whole
process, imports and compilation and flush included, now one first, now the other. Before each of them the system is
told to forget the files that it reads (`posix_fadvise`); what lies below the system, such as the cache of a
virtual machine's host, is not emptied, so both may read faster than the disk.

`--compare` prunes Llama-3.2-1B's shapes with `--stream` and with `--no-stream`, by every criterion, and compares the
two outputs byte by byte.
"""

import argparse
import concurrent.futures
import filecmp
import json
import multiprocessing
import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from prune_vs_optipfair import NO_PARTS, run
from rich.console import Console
from rich.table import Table
from shapes import write_checkpoint

from gluprune_jax.pruning.criteria import WEIGHT_CRITERIA

MOST_MEMORY, MOST_TIMES = 1.0e9, 3.0  # what is promised


def write_model(folder: Path, name: str) -> None:
    """In a process of its own: the kernel counts the memory of this one as that of its children before they start."""
    with concurrent.futures.ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        pool.submit(write_checkpoint, folder, name).result()


def prune(model: Path, output: Path, *options: str) -> dict[str, float]:
    argv = [sys.executable, "-m", "gluprune_jax.prune", "--model", str(model), "--output", str(output), "--json"]
    return run([*argv, *options])


def copy(model: Path, output: Path) -> dict[str, float]:
    start = time.perf_counter()
    output.mkdir()
    for file in sorted(model.iterdir()):
        shutil.copyfile(file, output / file.name)
        descriptor = os.open(output / file.name, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return {"seconds": time.perf_counter() - start}


def forget(folder: Path) -> None:
    """Writes out what the system has yet to write, and drops its copies of the files of a folder."""
    os.sync()
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def bytes_in(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


def pairs(work: Path, count: int, ratio: str) -> dict[str, Any]:
    """Seconds of copies and prunings, and the peak resident memory of the latter."""
    model, output = work / "model", work / "output"
    write_model(model, "llama-3.1-8b")
    runs: dict[str, list[dict[str, float]]] = {"copy": [], "prune": []}
    written = {}
    for i in range(count):
        for program, results in list(runs.items())[:: -1 if i % 2 else 1]:
            forget(model)
            if program == "copy":
                results.append(copy(model, output))
            else:
                results.append(prune(model, output, "--expansion-ratio", ratio, "--stream"))
            written[program] = bytes_in(output)
            shutil.rmtree(output)
    times = [p["seconds"] / c["seconds"] for p, c in zip(runs["prune"], runs["copy"], strict=True)]
    return {
        "model_bytes": bytes_in(model),
        "written_bytes": written,
        "expansion_ratio": ratio,
        "runs": runs,
        "times_the_copy": times,
        "peak_bytes": max(result["peak_bytes"] for result in runs["prune"]),
        "load_average": os.getloadavg(),
    }


def compare(work: Path) -> dict[str, Any]:
    """Which files differ between the two ways, by criterion; the model cards do, which quote the command."""
    model = work / "model"
    write_model(model, "llama-3.2-1b")
    report: dict[str, Any] = {"model_bytes": bytes_in(model)}
    for criterion in WEIGHT_CRITERIA:
        outputs = {flag: work / flag for flag in ("--stream", "--no-stream")}
        results = {
            flag: prune(model, output, "--prune-percent", "40", "--criterion", criterion, flag)
            for flag, output in outputs.items()
        }
        names = sorted({file.name for output in outputs.values() for file in output.iterdir()} - {"README.md"})
        _, differing, missing = filecmp.cmpfiles(*outputs.values(), names, shallow=False)
        report[criterion] = {"compared": names, "differing": [*differing, *missing], **results}
        for output in outputs.values():
            shutil.rmtree(output)
    return report


def show_pairs(report: dict[str, Any]) -> None:
    table = Table(title="Llama-3.1-8B's shapes, from file to file", title_justify="left")
    for column in ("", "seconds", "of these", "read once", "written", "peak memory"):
        table.add_column(column, justify="left" if column in ("", "of these") else "right")
    for program, results in report["runs"].items():
        for result in results:
            parts = {key: value for key, value in result.items() if key not in NO_PARTS}
            table.add_row(
                program,
                f"{result['seconds']:.1f}",
                ", ".join(f"{part} {value:.1f}" for part, value in parts.items()),
                f"{report['model_bytes'] / result['seconds'] / 1e9:.2f} GB/s",
                f"{report['written_bytes'][program] / result['seconds'] / 1e9:.2f} GB/s",
                f"{result['peak_bytes'] / 1e9:.2f} GB" if "peak_bytes" in result else "",
            )
    Console().print(table)
    times = report["times_the_copy"]
    print(
        f"{statistics.median(times):.2f} times the copy (pairs: {', '.join(f'{t:.2f}' for t in times)}; promised: at "
        f"most {MOST_TIMES:g}); peak {report['peak_bytes'] / 1e9:.2f} GB (promised: under {MOST_MEMORY / 1e9:g})"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3, help="pairs of runs")
    parser.add_argument("--expansion-ratio", default="2.4", help="of the pruned model; 3.5 before")
    parser.add_argument("--compare", action="store_true", help="instead: the 1B shapes, streamed and in memory")
    parser.add_argument("--work", type=Path, help="where to make a temporary folder for the checkpoints")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.work:
        args.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        report = compare(Path(work)) if args.compare else pairs(Path(work), args.pairs, args.expansion_ratio)
    if args.compare:
        kept = all(not report[criterion]["differing"] for criterion in WEIGHT_CRITERIA)
    else:
        kept = report["peak_bytes"] < MOST_MEMORY and statistics.median(report["times_the_copy"]) <= MOST_TIMES
    if args.json:
        print(json.dumps(report, indent=1))
    elif args.compare:
        for criterion in WEIGHT_CRITERIA:
            result = report[criterion]
            same = f"differ in {', '.join(result['differing'])}" if result["differing"] else "are equal to the byte"
            peaks = " and ".join(f"{result[flag]['peak_bytes'] / 1e9:.2f} GB" for flag in ("--stream", "--no-stream"))
            print(f"{criterion}: the {len(result['compared'])} files {same}; peak memory {peaks} (streamed, loaded)")
    else:
        show_pairs(report)
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())

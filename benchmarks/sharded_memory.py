"""Memory of the host while a model is loaded onto a mesh of several processes, and while it is saved from it.

    python benchmarks/sharded_memory.py [--processes 1 2 4] [--json]

Each process has one CPU device of a mesh `model=N` and loads a random bfloat16 checkpoint of Llama-3.2-1B's exact
shapes (2.5 GB); then all save it as safetensors, gathering tensor by tensor (the embedding is 525 MB). On the CPU the
memory of a device is the host's, so a process must hold what its device holds. Resident sets are the kernel's (VmHWM,
reset before each step), and so include Python, JAX and the compiler, which are also given alone: as they are after
imports, connecting and a first collective. Linux only.
"""

import argparse
import json
import socket
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from shapes import write_checkpoint

WORKER = """
import json, sys
from pathlib import Path
import jax
jax.config.update("jax_num_cpu_devices", 1)
port, processes, index, model, output = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4], sys.argv[5]
jax.distributed.initialize(f"127.0.0.1:{port}", processes, index)
import convert
from gluprune_jax.models.parameters import parameters_of
from gluprune_jax.parallel.distributed import gather_from_all
from gluprune_jax.parallel.mesh import MeshShape, make_mesh

def memory(key):
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(key))
    return 1024 * int(line.split()[1])

def peak(function):
    Path("/proc/self/clear_refs").write_text("5")
    result = function()
    return result, memory("VmHWM")

mesh = lambda model: make_mesh(MeshShape(1, processes), model.config.num_key_value_heads)
gather_from_all(b"connected")
report = {"imports": memory("VmRSS")}
checkpoint, report["loading"] = peak(lambda: convert.load(model, mesh=mesh))
arrays = list(parameters_of(checkpoint.model).values())
report["weights"] = sum(shard.data.nbytes for array in arrays for shard in array.addressable_shards)
_, report["saving"] = peak(lambda: convert.save(checkpoint, output))
print(json.dumps(report))
"""


def measure(processes: int, model: Path, output: Path) -> list[dict[str, int]]:
    """Bytes of each process."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(port), str(processes), str(index), str(model), str(output)],
            stdout=subprocess.PIPE,
            text=True,
        )
        for index in range(processes)
    ]
    outputs = [worker.communicate()[0] for worker in workers]
    if any(worker.returncode for worker in workers):
        raise SystemExit(f"a process of {processes} failed")
    return [json.loads(output.splitlines()[-1]) for output in outputs]  # what connects them talks on stdout too


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()

    report: dict[int, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch) / "model"
        write_checkpoint(model)
        for processes in args.processes:
            report[processes] = measure(processes, model, Path(scratch) / f"saved-{processes}")
    if args.json:
        print(json.dumps(report, indent=1))
        return
    table = Table("processes", "process", title="resident set in MB (of it beyond imports)")
    for column in ("imports", "weights of its device", "peak while loading", "per weight byte", "peak while saving"):
        table.add_column(column, justify="right")
    for processes, rows in report.items():
        for index, row in enumerate(rows):
            beyond = {step: row[step] - row["imports"] for step in ("loading", "saving")}
            table.add_row(
                str(processes),
                str(index),
                f"{row['imports'] / 1e6:,.0f}",
                f"{row['weights'] / 1e6:,.0f}",
                f"{row['loading'] / 1e6:,.0f} ({beyond['loading'] / 1e6:,.0f})",
                f"{beyond['loading'] / row['weights']:.2f}",
                f"{row['saving'] / 1e6:,.0f} ({beyond['saving'] / 1e6:,.0f})",
            )
    Console(width=120).print(table)


if __name__ == "__main__":
    main()

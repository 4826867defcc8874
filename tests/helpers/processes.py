"""Starts a command in several processes of two devices each, as a cluster would."""

import os
import socket
import subprocess
import sys
import time

import quick_compiler

HEARTBEAT = 10


def start(*argv: object, processes: int, environment: dict[str, str]) -> list[subprocess.Popen[str]]:
    """Starts the same command in processes with two devices each; a list among the arguments has one for each."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    own = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    own["XLA_FLAGS"] = quick_compiler.FLAGS
    own |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2", "JAX_DEFAULT_MATMUL_PRECISION": "highest"} | environment
    options = ["--distributed", "--coordinator", f"127.0.0.1:{port}", "--num-processes", str(processes)]
    options += ["--heartbeat-timeout", str(HEARTBEAT)]
    return [
        subprocess.Popen(
            [
                *(sys.executable, "-m"),
                *(str(arg[i] if isinstance(arg, list) else arg) for arg in argv),
                *options,
                *("--process-id", str(i)),
            ],
            env=own,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]


def finish(workers: list[subprocess.Popen[str]], timeout: float = 240) -> list[tuple[int, str, str]]:
    """Status, output and errors of each."""
    deadline, results = time.monotonic() + timeout, []
    try:
        for worker in workers:
            out, err = worker.communicate(timeout=deadline - time.monotonic())
            # Gloo writes its line in pieces, between which other lines may come.
            lines = [line for line in err.splitlines() if "[Gloo]" not in line and "connected peer ranks" not in line]
            results.append((worker.returncode, out, "\n".join(lines)))
    finally:
        for worker in workers:
            worker.kill()
            worker.wait()
    return results


def done(results: list[tuple[int, str, str]]) -> str:
    """What the first of several processes says; the others are silent."""
    assert [status for status, _, _ in results] == [0] * len(results), results
    assert [out for _, out, _ in results[1:]] == [""] * (len(results) - 1)
    return results[0][1]

"""Layers of different widths in llama.cpp: a GGUF file of their true widths beside one that is filled up with zeros.

    python benchmarks/gguf_true_widths.py --text FILE [--model demo] [--percent 20] [--pairs 5] [--json]

The model is pruned with `hybrid` and `--allocation global`, calibrated on `python-reference`, and written twice in
F32: each layer up to a multiple of 32 (architecture `deci`), and all up to the widest (`llama`). llama.cpp's library
(`pip install gluprune-jax[llama-cpp]`) quantises both, and is asked, in processes of its own, with its defaults and two
threads: for the seconds of 128 tokens that are decoded one by one after a prompt of 128, for the perplexity of windows
of 512 tokens of a text, and how far the logits of the two F32 files are apart. Perplexity is asked of ours as well.
"""

import argparse
import ctypes
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

import convert

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))
import llama_cpp

WINDOW, PROMPT, DECODED, THREADS = 512, 128, 128, 2
WAYS = {"true": "per-layer", "padded": "uniform"}


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--percent", default="20")
    parser.add_argument("--text", type=Path, required=True, help="plain text for the perplexity")
    parser.add_argument("--windows", type=int, default=8, help=f"of {WINDOW} tokens (default: 8)")
    parser.add_argument("--types", default="F32,Q8_0,Q4_K_M,Q4_0")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(Path(folder), args)
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"{'type':8}{'MB true':>10}{'padded':>10}{'tokens/s true':>16}{'padded':>10}{'ratio':>22}{'perplexity':>14}")
    for kind, row in rows["types"].items():
        true, padded = row["true"], row["padded"]
        ratios = sorted(t / p for t, p in zip(true["tokens_per_second"], padded["tokens_per_second"], strict=True))
        speed = [statistics.median(found["tokens_per_second"]) for found in (true, padded)]
        print(
            f"{kind:8}{true['bytes'] / 1e6:>10.1f}{padded['bytes'] / 1e6:>10.1f}{speed[0]:>16.1f}{speed[1]:>10.1f}"
            f"{f'{statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})':>22}"
            f"{true['perplexity']:>9.3f}, {padded['perplexity']:.3f}"
        )
    print(f"logits of the F32 files: at most {rows['largest_difference']:.1e} apart")
    print(f"perplexity of the F32 file with ours: {rows['ours']:.4f}")


def measure(folder: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Bytes, tokens per second, perplexities, and the largest difference between the logits of the two ways."""
    files = {way: folder / f"{way}.gguf" for way in WAYS}
    for way, widths in WAYS.items():
        command = [sys.executable, "-m", "gluprune_jax.prune", "--model", args.model, "--prune-percent", args.percent]
        command += ["--criterion", "hybrid", "--allocation", "global", "--calibration-data", "python-reference"]
        command += ["--calibration-tokens", "8192", "--gguf-widths", widths, "--gguf-type", "F32", "--json"]
        subprocess.run([*command, "--output", str(files[way])], check=True, stdout=subprocess.DEVNULL)
    (ids,) = llama_cpp.tokenize(files["true"], [args.text.read_text()])
    rows = np.array(ids[: args.windows * WINDOW], np.int32).reshape(args.windows, WINDOW)
    found: dict[str, Any] = {"types": {}}
    for kind in args.types.split(","):
        row = found["types"][kind] = {}
        for way, source in files.items():
            file = source if kind == "F32" else llama_cpp.quantize(source, folder / f"{way}.{kind}.gguf", kind)
            logits = llama_cpp.logits(file, rows.tolist(), flash_attention=True)
            row[way] = {"bytes": file.stat().st_size, "perplexity": perplexity(logits, rows), "tokens_per_second": []}
        for i in range(args.pairs):
            for way in list(WAYS)[:: -1 if i % 2 else 1]:
                file = files[way] if kind == "F32" else folder / f"{way}.{kind}.gguf"
                row[way]["tokens_per_second"].append(DECODED / ask(file, rows[0, : PROMPT + DECODED].tolist()))
        if kind != "F32":
            for way in WAYS:
                (folder / f"{way}.{kind}.gguf").unlink()
    true, padded = (llama_cpp.logits(file, [rows[0].tolist()])[0] for file in files.values())
    return found | {
        "largest_difference": float(np.abs(true - padded).max()),
        "ours": our_perplexity(files["true"], rows),
    }


def perplexity(logits: list[np.ndarray], rows: np.ndarray) -> float:
    """Of all tokens of the windows but the first of each."""
    losses = []
    for found, row in zip(logits, rows, strict=True):
        scores = found[:-1].astype(np.float64)
        top = scores.max(-1, keepdims=True)
        normalizer = np.log(np.exp(scores - top).sum(-1)) + top[:, 0]
        losses.append(normalizer - scores[np.arange(len(row) - 1), row[1:]])
    return math.exp(np.concatenate(losses).mean())


def our_perplexity(file: Path, rows: np.ndarray) -> float:
    """That which our own forward pass gives, in float32."""
    model = convert.load(file, dtype="float32").model
    return perplexity([np.asarray(model.logits(model(row[None])[0]))[0] for row in rows], rows)


def ask(file: Path, tokens: list[int]) -> float:
    """Seconds for the tokens after the prompt, one by one."""
    command = [sys.executable, __file__, "--ask", str(file), json.dumps(tokens)]  # this script in another process
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def decode_seconds(path: str, tokens: list[int]) -> float:
    """In this process: it may be ended by llama.cpp."""
    module = llama_cpp.libllama_module()
    llama = module.load(module.find())
    model = llama_cpp.open_model(llama, path, vocab_only=False)
    llama.llama_context_default_params.restype = llama_cpp.ContextParameters
    parameters = llama.llama_context_default_params()
    parameters.n_ctx = len(tokens)
    parameters.n_threads = parameters.n_threads_batch = THREADS
    context = ctypes.c_void_p(llama.llama_init_from_model(model, parameters))

    def decode(first: int, ids: list[int]) -> None:
        T = len(ids)
        batch = llama_cpp.Batch(T, (ctypes.c_int32 * T)(*ids), None, (ctypes.c_int32 * T)(*range(first, first + T)))
        batch.wanted = (ctypes.c_int8 * T)(*[0] * (T - 1), 1)
        if llama.llama_decode(context, batch):
            raise SystemExit("llama_decode fails")

    decode(0, tokens[:PROMPT])
    llama.llama_synchronize(context)
    start = time.perf_counter()
    for i in range(PROMPT, len(tokens)):
        decode(i, tokens[i : i + 1])
    llama.llama_synchronize(context)
    return time.perf_counter() - start


if __name__ == "__main__":
    if "--ask" in sys.argv:
        print(decode_seconds(sys.argv[-2], json.loads(sys.argv[-1])))
    else:
        main()

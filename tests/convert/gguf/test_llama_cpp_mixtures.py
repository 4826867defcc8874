"""Mixtures of experts that we write, in the real llama.cpp: the logits of transformers, and the sizes that it says."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import pytest
from commands import report, run
from gguf_mixtures import SMALL
from numpy.typing import NDArray
from tiny_mixtures import CONFIGS, write_mixture

import convert
from convert.__main__ import main
from convert.gguf import libllama
from convert.gguf.export import GGUFOptions
from convert.gguf.sizes import FILE_TYPES, forecast_mixture, mixture_metadata_bytes, mixture_tensor_bytes
from gluprune_jax import make_plan
from gluprune_jax.prune import main as prune
from gluprune_jax.pruning.scores import score_mixture

pytestmark = pytest.mark.skipif(libllama.find() is None, reason="runs llama.cpp: gluprune-jax[llama-cpp]")
Capture = pytest.CaptureFixture[str]
ROW = np.random.default_rng(0).integers(3, 128, 24).tolist()
# Rows that k-quants can hold, and eight layers, of which some get more bits.
LARGE = {
    "hidden_size": 256,
    "head_dim": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 512,
    "num_hidden_layers": 8,
}


def opened(path: Path) -> convert.MixtureCheckpoint:
    checkpoint = convert.open_mixture(path)
    assert checkpoint is not None
    return checkpoint


def pruned(checkpoint: convert.MixtureCheckpoint, width: int) -> convert.MixtureCheckpoint:
    return checkpoint.pruned(make_plan(score_mixture(checkpoint.mlp_weights(), checkpoint.sizes, "ppm"), width=width))


def large(name: str, width: int, **changes: Any) -> dict[str, Any]:
    key = "moe_intermediate_size" if name == "qwen3_moe" else "intermediate_size"
    config = {**SMALL[name], **LARGE, key: width, **changes}
    return config if name == "qwen3_moe" else {k: value for k, value in config.items() if k != "head_dim"}


@pytest.fixture
def transformers_logits(load_reference: Callable[[str | Path], Any]) -> Callable[[Path], NDArray[np.float32]]:
    def found(folder: Path) -> NDArray[np.float32]:
        import torch

        with torch.no_grad():
            logits: NDArray[np.float32] = load_reference(folder)(torch.tensor([ROW])).logits[0].numpy()
        return logits

    return found


def off(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """The largest difference, as a part of the largest logit."""
    return float(np.abs(found - expected).max() / np.abs(expected).max())


def typically_off(found: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """The root mean square of the differences, as a part of that of the logits."""
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("width", [None, 17])
@pytest.mark.parametrize("name", SMALL)
def test_logits_of_every_family(
    name: str, width: int | None, tmp_path: Path, transformers_logits: Callable[[Path], NDArray[np.float32]]
) -> None:
    """Whole, and pruned to a width that nothing divides."""
    checkpoint = opened(write_mixture(tmp_path / "dense", SMALL[name]))
    if width is not None:
        checkpoint = pruned(checkpoint, width)
    convert.save(checkpoint, tmp_path / "out", formats=["hf", "gguf"])
    expected = transformers_logits(tmp_path / "out")
    (found,) = llama_cpp.logits(tmp_path / "out" / "model.gguf", [ROW])
    assert off(found, expected) < 1e-5
    convert.save(opened(tmp_path / "out" / "model.gguf"), tmp_path / "read")
    assert off(transformers_logits(tmp_path / "read"), expected) < 1e-6


@pytest.mark.torch
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("kind", "bound"), [("Q8_0", 8e-2), ("Q4_K_M", 0.8)])
@pytest.mark.parametrize("name", ["qwen3_moe", "olmoe", "mixtral"])
def test_quantised_by_llama_cpp(
    name: str,
    kind: str,
    bound: float,
    tmp_path: Path,
    capsys: Capture,
    transformers_logits: Callable[[Path], NDArray[np.float32]],
) -> None:
    # All experts are used: a token that quantisation sends to another expert would say nothing of the file.
    folder = write_mixture(tmp_path / "hf", large(name, 288, num_hidden_layers=2, num_experts_per_tok=6))
    found = report(prune, capsys, "--model", folder, "--width", 256, "--output", tmp_path / "out")
    assert run(main, capsys, tmp_path / "out", tmp_path / "out.gguf", "--quantize", kind)[0] == 0
    (logits,) = llama_cpp.logits(tmp_path / "out.gguf", [ROW])
    expected = transformers_logits(tmp_path / "out")
    assert bound / 20 < typically_off(logits, expected) < bound
    convert.save(opened(tmp_path / "out.gguf"), tmp_path / "read")
    # What is left is that llama.cpp quantises activations as well.
    assert typically_off(logits, transformers_logits(tmp_path / "read")) < 8e-2
    assert (tmp_path / "out.gguf").stat().st_size == pytest.approx(found["after"]["gguf_bytes"][kind], rel=0.01)


@pytest.mark.parametrize(
    ("name", "width", "changes"),
    [
        ("qwen3_moe", 256, {}),
        ("qwen3_moe", 352, {"num_experts": 8}),
        ("olmoe", 333, {}),
        ("mixtral", 256, {}),
        ("mixtral", 512, {"num_local_experts": 8}),
        ("mixtral", 480, {"num_local_experts": 8, "tie_word_embeddings": True}),
    ],
)
def test_forecasts_are_what_its_dry_run_says(name: str, width: int, changes: dict[str, Any], tmp_path: Path) -> None:
    checkpoint = opened(write_mixture(tmp_path / "hf", large(name, width, **changes)))
    path = tmp_path / "f16.gguf"
    convert.save(checkpoint, path, formats=["gguf"], gguf=GGUFOptions("F16"))
    for file_type in FILE_TYPES.keys() & llama_cpp.FILE_TYPES.keys():
        found = mixture_tensor_bytes(checkpoint.config, checkpoint.sizes, file_type)
        assert found == pytest.approx(llama_cpp.quantized_bytes(path, file_type), rel=0.002), file_type
    metadata = mixture_metadata_bytes(checkpoint.config, checkpoint.assets)
    whole = forecast_mixture(checkpoint.config, checkpoint.sizes, metadata)["F16"]
    assert whole == pytest.approx(path.stat().st_size, abs=4096)


def test_the_table_says_the_sizes_of_the_files(tmp_path: Path, capsys: Capture) -> None:
    folder = write_mixture(tmp_path / "hf", large("mixtral", 320, num_local_experts=8))
    argv = ("--model", folder, "--width", 256, "--output", tmp_path / "out.gguf", "--quantize", "Q4_K_M")
    found = report(prune, capsys, *argv)
    tensors = gguf.GGUFReader(tmp_path / "out.gguf").tensors
    assert found["after"]["file_bytes"]["gguf"] == sum(-(-int(tensor.n_bytes) // 32) * 32 for tensor in tensors)
    before = tmp_path / "dense.gguf"
    assert run(main, capsys, folder, before, "--quantize", "Q4_K_M")[0] == 0
    assert before.stat().st_size == pytest.approx(found["before"]["gguf_bytes"]["Q4_K_M"], abs=4096)
    status, out, err = run(prune, capsys, *argv, "--dry-run", "--overwrite")
    assert (status, "GGUF Q4_K_M, forecast" in out) == (0, True)
    # 250 neurons are in no whole block: the stacks of down projections would stay in F16.
    status, _, err = run(prune, capsys, "--model", folder, "--width", 250, "--dry-run")
    assert "because width 250 is no multiple of 256; give --multiple-of 256" in err


def test_of_what_llama_cpp_cannot_express_nothing_is_forecast(tmp_path: Path, capsys: Capture) -> None:
    folder = write_mixture(tmp_path / "hf", CONFIGS["olmoe"])
    found = report(prune, capsys, "--model", folder, "--width", 8, "--dry-run")
    assert "gguf_bytes" not in found["after"]

"""Tiny random Hugging Face checkpoints, written without any code of ours, so that reading them tests that code."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

DTYPES = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16}

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 32.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def hf_config(**changes: Any) -> dict[str, Any]:
    """A `config.json` in the spelling of transformers 4; a value of None removes the key."""
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": None,
        "tie_word_embeddings": False,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "initializer_range": 0.02,
        "torch_dtype": "float32",
    } | changes
    return {key: value for key, value in config.items() if value is not None or key == "rope_scaling"}


def hf_tensors(config: Mapping[str, Any], dtype: str = "float32", seed: int = 0) -> dict[str, np.ndarray]:
    """Random weights under their Hugging Face names, large enough that every part of the model matters."""
    rng = np.random.default_rng(seed)
    D, F, V = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    NH = config["num_attention_heads"] * config["head_dim"]
    KH = config["num_key_value_heads"] * config["head_dim"]

    def normal(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * 0.2).astype(DTYPES[dtype])

    def gain() -> np.ndarray:
        return (1 + 0.1 * rng.standard_normal(D)).astype(DTYPES[dtype])

    tensors = {"model.embed_tokens.weight": normal(V, D), "model.norm.weight": gain()}
    for i in range(config["num_hidden_layers"]):
        layer = f"model.layers.{i}"
        tensors |= {
            f"{layer}.input_layernorm.weight": gain(),
            f"{layer}.self_attn.q_proj.weight": normal(NH, D),
            f"{layer}.self_attn.k_proj.weight": normal(KH, D),
            f"{layer}.self_attn.v_proj.weight": normal(KH, D),
            f"{layer}.self_attn.o_proj.weight": normal(D, NH),
            f"{layer}.post_attention_layernorm.weight": gain(),
            f"{layer}.mlp.gate_proj.weight": normal(F, D),
            f"{layer}.mlp.up_proj.weight": normal(F, D),
            f"{layer}.mlp.down_proj.weight": normal(D, F),
        }
    if not config.get("tie_word_embeddings"):
        tensors["lm_head.weight"] = normal(V, D)
    return tensors


def write_folder(
    folder: Path,
    config: Mapping[str, Any] | None = None,
    tensors: Mapping[str, np.ndarray] | None = None,
    shards: int = 1,
) -> Path:
    """Writes `config.json` and safetensors, in one file or in several with an index."""
    config = hf_config() if config is None else config
    tensors = hf_tensors(config) if tensors is None else tensors
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for shard, names in enumerate(np.array_split(sorted(tensors), shards), start=1):
        file = f"model-{shard:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in names.tolist()}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names.tolist(), file)
    index = {"metadata": {"total_size": sum(t.nbytes for t in tensors.values())}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder

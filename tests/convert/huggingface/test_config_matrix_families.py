"""What transformers 4 and 5 make of the `config.json` that we write, in every family: their classes, and logits.

Transformers 5 makes the random weights, so that nothing here but configs is ours.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from family_configs import GEMMA3, LINEAR, LONG, MULTIMODAL, PUBLISHED, SPARSE, YARN, tiny

from convert.families.family import FULL, SLIDING
from convert.huggingface.config import read_config, write_config
from gluprune_jax.models.config import LayerAttention, ModelConfig

pytestmark = pytest.mark.torch

TOKENS = np.random.default_rng(5).integers(0, 97, (1, 40))

# Configs in the old spelling, each with another base than the default and with windows shorter than the text.
WINDOWS = {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}
GRANITE = {
    "embedding_multiplier": 12.0,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.22,
    "logits_scaling": 3.0,
}
TRANSLATE = {FULL: {"rope_type": "linear", "factor": 8.0}, SLIDING: {"rope_type": "default"}}
CASES: dict[str, dict[str, Any]] = {
    "llama with YaRN": tiny("llama", rope_theta=500.0, rope_scaling=YARN),
    "mistral": tiny("mistral", rope_theta=500.0, sliding_window=8),
    "qwen2": tiny("qwen2", rope_theta=500.0, use_sliding_window=False, sliding_window=4),
    "qwen2 with YaRN": tiny("qwen2", rope_theta=500.0, rope_scaling={"type": "yarn", **YARN}),
    "qwen2 with windows": tiny("qwen2", rope_theta=500.0, **WINDOWS),
    "qwen3": tiny("qwen3", rope_theta=500.0, head_dim=16, **WINDOWS),
    "smollm3": tiny("smollm3", rope_theta=500.0, no_rope_layers=[1, 0, 1, 1, 0]),
    "smollm3 with windows": tiny("smollm3", rope_theta=500.0, use_sliding_window=True, sliding_window=5),
    "gemma": tiny("gemma", rope_theta=500.0, head_dim=16),
    "gemma2": tiny("gemma2", rope_theta=500.0, head_dim=16, sliding_window=8, query_pre_attn_scalar=24)
    | {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gemma2 without caps": tiny("gemma2", head_dim=16, attn_logit_softcapping=None, final_logit_softcapping=None),
    "gemma3": tiny("gemma3_text", rope_theta=5000.0, rope_local_base_freq=50.0, rope_scaling=LINEAR, head_dim=16)
    | {"sliding_window": 8, "sliding_window_pattern": 2, "query_pre_attn_scalar": 24},
    "granite": tiny("granite", rope_theta=500.0, **GRANITE),
    "granite 4": tiny("granitemoehybrid", rope_theta=500.0, **GRANITE),
    "granite 4 without RoPE": tiny("granitemoehybrid", **GRANITE) | {"position_embedding_type": "nope"},
    "phi3": tiny("phi3", rope_theta=500.0, sliding_window=9),
    # The factor lists of transformers count the dimensions of D / N, which is 8 here.
    "phi3 short": tiny("phi3", rope_theta=500.0, rope_scaling={"type": "longrope", **LONG})
    | {"original_max_position_embeddings": 64},
    "phi3 long and partial": tiny("phi3", rope_theta=500.0, partial_rotary_factor=0.5)
    | {"rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.5], "long_factor": [1.0, 3.0]}}
    | {"original_max_position_embeddings": 32},
    "olmo2": tiny("olmo2", rope_theta=500.0),
    "olmo3": tiny("olmo3", rope_theta=2000.0, sliding_window=8, rope_scaling=YARN),
}
for _case in CASES.values():
    _case["pad_token_id"] = 0  # the default of some classes lies beyond a tiny vocabulary

# What one of the two reads otherwise than the models' authors meant, and what we write does not.
MISREAD = {("olmo3", 5)}  # the base, in layers with a window

SCRIPT = """
import json, sys
import torch, transformers
from pathlib import Path
transformers.logging.set_verbosity_error()
torch.set_num_threads(1)
five = transformers.__version__.startswith("5")

def said(folder):
    config = transformers.AutoConfig.from_pretrained(folder)
    layers, kinds = config.num_hidden_layers, getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if not kinds or kinds[0] == "attention":
        kinds = ["full_attention" if window is None else "sliding_attention"] * layers
    rotate = getattr(config, "no_rope_layers", None) or [1] * layers
    if config.model_type == "granitemoehybrid" and config.position_embedding_type != "rope":
        rotate = [0] * layers
    def rope(kind):
        if five:
            found = config.rope_parameters.get(kind, config.rope_parameters)
            return found["rope_theta"], found["rope_type"]
        scaling = config.rope_scaling or {}
        name = scaling.get("rope_type", scaling.get("type", "default"))
        if config.model_type == "gemma3_text" and kind == "sliding_attention":
            return config.rope_local_base_freq, "default"
        return config.rope_theta, "default" if config.model_type == "olmo3" and kind == "sliding_attention" else name
    windows = [window if kind == "sliding_attention" else None for kind in kinds]
    ropes = [rope(kind) if rotates else None for kind, rotates in zip(kinds, rotate)]
    return {
        "layers": list(zip(windows, ropes)),
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        **{key: getattr(config, key, None) for key in KEYS},
    }

KEYS = '''num_key_value_heads vocab_size tie_word_embeddings rms_norm_eps max_position_embeddings attention_bias
query_pre_attn_scalar attn_logit_softcapping final_logit_softcapping attention_multiplier embedding_multiplier
residual_multiplier logits_scaling hidden_act hidden_activation'''.split()

answers = {"version": transformers.__version__, "said": {}, "logits": {}}
tokens = torch.tensor(json.loads(sys.argv[1]))
for folder in sorted(Path("said").iterdir()):
    answers["said"][folder.name] = said(folder)
for folder in sorted(Path("out").iterdir()):
    name, weights = folder.name, Path("weights") / folder.name
    if not weights.exists():
        torch.manual_seed(0)
        config = transformers.AutoConfig.from_pretrained(folder)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        for parameter in model.parameters():
            parameter.data = 0.3 * torch.randn(parameter.shape)
        model.tie_weights()
        model.save_pretrained(weights)
    for side in ("in", "out"):
        if not (Path(side) / name).exists():
            continue
        target = Path(side) / name / "model.safetensors"
        if not target.exists():
            target.symlink_to((weights / "model.safetensors").resolve())
        model = transformers.AutoModelForCausalLM.from_pretrained(
            Path(side) / name, dtype=torch.float32, attn_implementation="eager").eval()
        with torch.no_grad():
            answers["logits"][side + "/" + name] = model(tokens).logits.tolist()
json.dump(answers, sys.stdout)
"""


def written(data: dict[str, Any], layers: list[int] | None = None) -> dict[str, Any]:
    config, rest = read_config(data)
    return write_config(config.with_layers(layers) if layers else config, rest, np.dtype(np.float32))


SAID = {name: data for name, (data, *_) in PUBLISHED.items()}
SAID |= {
    "a text half": MULTIMODAL | {"text_config": SPARSE},
    "TranslateGemma": MULTIMODAL | {"text_config": SPARSE | {"rope_scaling": None, "rope_parameters": TRANSLATE}},
    "gemma-3 cut": GEMMA3 | {key: PUBLISHED["gemma-3-1b"][0][key] for key in tiny("llama").keys() - {"model_type"}},
}
CUT = {"gemma-3 cut": [0, 1, 5, 6, 11]}
PRUNED = {"gemma3": [1, 2, 3], "olmo3": [1, 3], "smollm3": [0, 1], "gemma2": [0, 2], "qwen2 with windows": [1, 2]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`in/NAME` as given, `out/NAME` as we write it, also after layers are gone, and `said/NAME` without weights."""
    folder = tmp_path_factory.mktemp("families")
    files = {f"in/{name}": data for name, data in CASES.items()}
    files |= {f"out/{name}": written(data) for name, data in CASES.items()}
    files |= {f"out/{name} pruned": written(CASES[name], layers) for name, layers in PRUNED.items()}
    files |= {f"said/{name}": written(data, CUT.get(name)) for name, data in SAID.items()}
    for name, data in files.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "config.json").write_text(json.dumps(data))
    return folder


def read_by(python: str, major: int, folder: Path) -> dict[str, Any]:
    """What the `transformers` of an interpreter makes of all folders, in one process."""
    command = [python, "-c", SCRIPT, json.dumps(TOKENS.tolist())]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
    assert done.returncode == 0, done.stderr[-2000:]
    answer: dict[str, Any] = json.loads(done.stdout)
    if int(answer["version"].split(".")[0]) != major:
        pytest.skip(f"transformers of {python} is {answer['version']}")
    return answer


@pytest.fixture(scope="module")
def by_5(folder: Path) -> dict[str, Any]:
    return read_by(sys.executable, 5, folder)


@pytest.fixture(scope="module")
def by_4(folder: Path, by_5: dict[str, Any]) -> dict[str, Any]:
    python = os.environ.get("GLUPRUNE_TRANSFORMERS4_PYTHON")
    if not python:
        pytest.skip("GLUPRUNE_TRANSFORMERS4_PYTHON names no Python with transformers 4")
    return read_by(python, 4, folder)


def rope_type(layer: LayerAttention) -> str:
    return type(layer.rope and layer.rope.scaling).__name__.removesuffix("Rope").lower().replace("nonetype", "default")


def assert_said(said: dict[str, Any], name: str) -> None:
    config, rest = read_config(SAID[name])
    config = config.with_layers(CUT[name]) if name in CUT else config
    names = {"long": "longrope"}
    layers = [
        [layer.window, layer.rope and [layer.rope.theta, names.get(rope_type(layer), rope_type(layer))]]
        for layer in config.attention
    ]
    assert said["layers"] == layers
    for field in ("head_dim", "num_key_value_heads", "vocab_size", "tie_word_embeddings", "rms_norm_eps"):
        assert said[field] == getattr(config, field), field
    assert said["max_position_embeddings"] == config.max_position_embeddings
    assert_numbers(said, config, rest["model_type"])


def assert_numbers(said: dict[str, Any], config: ModelConfig, model_type: str) -> None:
    scale = config.attention_scale or config.head_dim**-0.5
    if model_type in ("gemma2", "gemma3_text"):
        assert said["query_pre_attn_scalar"] ** -0.5 == scale
        assert said["final_logit_softcapping"] == config.logit_soft_cap
    if model_type == "gemma2":
        assert said["attn_logit_softcapping"] == config.attention_soft_cap
    if model_type.startswith("granite"):
        assert said["attention_multiplier"] == scale
        assert said["embedding_multiplier"] == config.embedding_scale
        assert said["residual_multiplier"] == config.residual_scale
        assert said["logits_scaling"] == 1 / config.logit_scale
    act = said["hidden_activation"] or said["hidden_act"]
    assert act == {"silu": "silu", "gelu_tanh": "gelu_pytorch_tanh"}[config.activation]


@pytest.mark.parametrize("name", SAID)
def test_the_classes_of_transformers_5_say_what_we_wrote(name: str, by_5: dict[str, Any]) -> None:
    assert_said(by_5["said"][name], name)


@pytest.mark.parametrize("name", SAID)
def test_the_classes_of_transformers_4_say_what_we_wrote(name: str, by_4: dict[str, Any]) -> None:
    assert_said(by_4["said"][name], name)


def assert_close(got: Any, wanted: Any) -> None:
    np.testing.assert_allclose(np.array(got), np.array(wanted), rtol=0, atol=2e-4 * max(1, np.abs(wanted).max()))


@pytest.mark.parametrize("name", CASES)
def test_transformers_5_reads_what_we_write_as_what_we_read(name: str, by_5: dict[str, Any]) -> None:
    ours, given = by_5["logits"][f"out/{name}"], by_5["logits"][f"in/{name}"]
    if (name, 5) in MISREAD:
        assert np.abs(np.array(ours) - np.array(given)).max() > 0.01
    else:
        assert_close(given, ours)


@pytest.mark.parametrize("name", CASES)
def test_transformers_4_reads_both_as_transformers_5_reads_what_we_write(
    name: str, by_4: dict[str, Any], by_5: dict[str, Any]
) -> None:
    for side in ("in", "out"):
        assert_close(by_4["logits"][f"{side}/{name}"], by_5["logits"][f"out/{name}"])


@pytest.mark.parametrize("name", PRUNED)
def test_both_read_alike_what_is_left_of_a_model(name: str, by_4: dict[str, Any], by_5: dict[str, Any]) -> None:
    assert_close(by_4["logits"][f"out/{name} pruned"], by_5["logits"][f"out/{name} pruned"])

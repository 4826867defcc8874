#!/usr/bin/env bash
# mlx-lm 0.32.2: a Llama saved by transformers 5 runs with RoPE base 10000, whatever its config.json says.
#
# Expected: transformers 5 writes base and scaling as `rope_parameters`, and no longer as `rope_theta` and `rope_scaling`.
#   mlx-lm 0.32.2, which itself installs transformers 5, reads them, or refuses a config without the keys that it knows.
# Happens: `rope_parameters` are not looked at. Base and scaling are the defaults, 10000 and none. With `rope_theta` put at the
#   top of the same config.json by hand, the base is right.
# Matters: weights load, nothing is said, and the model answers nonsense: SmolLM2 (base 100000) completes "The capital of France
#   is" with other words, Llama 3 has base 500000. Whoever fine-tunes or prunes with transformers 5 and serves with mlx-lm will
#   look for the fault in the training. Remedy: both spellings in config.json, as transformers 4 readers need them too.
# Versions: mlx-lm 0.32.2, mlx 0.32.4, transformers 5.24.0. Seen, Python 3.11, largest logit difference on 200 tokens:
#   to the same config with "rope_theta": 500000 as well:  43.0
#   to the same config with "rope_theta": 10000 as well:   0.0
# Exits 1 once this is no longer so.
set -euo pipefail
export HF_HUB_OFFLINE=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet 'mlx[cpu]==0.32.4' mlx-lm==0.32.2 transformers==5.24.0 # configs need no torch

cat >"$work/show.py" <<'EOF'
import json, pathlib, sys
import mlx.core as mx
import numpy as np
from mlx_lm.utils import load_model
from safetensors.numpy import save_file
from transformers import LlamaConfig

folder = pathlib.Path(sys.argv[1])
D, F, V = 64, 96, 128
LlamaConfig(
    vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=4,
    max_position_embeddings=4096, tie_word_embeddings=True, architectures=["LlamaForCausalLM"],
    rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
).save_pretrained(folder)
written = json.loads((folder / "config.json").read_text())
assert written["rope_parameters"]["rope_theta"] == 500000.0 and "rope_theta" not in written
rng = np.random.default_rng(0)
tensors = {"model.norm.weight": np.ones(D), "model.embed_tokens.weight": rng.standard_normal((V, D))}
shapes = {f"self_attn.{name}_proj": (D, D) for name in "qkvo"}
shapes |= {"mlp.gate_proj": (F, D), "mlp.up_proj": (F, D), "mlp.down_proj": (D, F)}
for i in range(2):
    tensors |= {f"model.layers.{i}.{name}.weight": rng.standard_normal(shape) * 0.3 for name, shape in shapes.items()}
    tensors |= {f"model.layers.{i}.{name}_layernorm.weight": np.ones(D) for name in ("input", "post_attention")}
tensors = {name: values.astype(np.float32) for name, values in tensors.items()}
save_file(tensors, folder / "model.safetensors", {"format": "pt"})
row = mx.array([rng.integers(0, V, 200).tolist()])


def logits(**keys):
    (folder / "config.json").write_text(json.dumps(written | keys))
    return np.array(load_model(folder)[0](row))


as_written = logits()
far, near = (float(np.abs(as_written - logits(rope_theta=base)).max()) for base in (500000.0, 10000.0))
print(f'to the same config with "rope_theta": 500000 as well:  {far:.1f}')
print(f'to the same config with "rope_theta": 10000 as well:   {near:.1f}')
sys.exit(0 if far > 1 and near == 0 else 1)
EOF
"$work/venv/bin/python" "$work/show.py" "$work/llama"

#!/usr/bin/env bash
# transformers 4.57.6: a tied Llama whose file holds the pair as `lm_head.weight` loads without complaint, and without weights.
#
# Expected: `safetensors.torch.save_model` is the documented way to save a model with shared tensors: of each shared pair it
#   keeps one name. For a tied Llama that name is `lm_head.weight`; the file is complete. Loading should give that model, or say
#   which tensor is missing.
# Happens: 4.57.6 reports no missing, unexpected or mismatched key, raises nothing, and leaves both `lm_head` and the token
#   embeddings on the meta device, without values. The first forward pass fails with a message about scalar types that names
#   neither. 5.24.0 loads the same folder with identical logits.
# Matters: tools that prune a torch module and save it with `save_model` produce such files, and so does any that keeps one of
#   two equal tensors by the order of their names. "It loads" is no evidence: check for parameters on `meta`.
# Versions: transformers 4.57.6 and 5.24.0, safetensors 0.8.0, torch 2.13.0 on CPU. Seen, Python 3.11:
#   the file holds lm_head.weight but not model.embed_tokens.weight
#   transformers 4.57.6: problems reported 0, embed_tokens on meta, lm_head on meta
#     forward pass: RuntimeError: unsupported scalarType
#   transformers 5.24.0: problems reported 0, embed_tokens on cpu, lm_head on cpu
#     forward pass: largest difference of logits 0.0
# Exits 1 once this is no longer so.
set -euo pipefail
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
for version in 4.57.6 5.24.0; do
  "$work/venv/bin/pip" install --quiet --target "$work/$version" "transformers==$version" safetensors==0.8.0 numpy==2.4.6
done

cat >"$work/show.py" <<'EOF'
import sys
import torch, transformers
from safetensors.torch import load_file, save_model
from transformers import LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity_error()
torch.manual_seed(0)
folder = sys.argv[1]
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    max_position_embeddings=128, initializer_range=0.5, tie_word_embeddings=True,
)
saved = LlamaForCausalLM(config).eval()
config.save_pretrained(folder)
save_model(saved, f"{folder}/model.safetensors", metadata={"format": "pt"})
names = load_file(f"{folder}/model.safetensors").keys()
assert "lm_head.weight" in names and "model.embed_tokens.weight" not in names

loaded, report = LlamaForCausalLM.from_pretrained(folder, output_loading_info=True)
problems = sum(len(found) for found in report.values())
devices = loaded.model.embed_tokens.weight.device.type, loaded.lm_head.weight.device.type
places = f"embed_tokens on {devices[0]}, lm_head on {devices[1]}"
print(f"transformers {transformers.__version__}: problems reported {problems}, {places}")
prompt = torch.randint(1, 64, (1, 24))
try:
    outcome = (saved(prompt).logits - loaded.eval()(prompt).logits).abs().max().item()
    print("  forward pass: largest difference of logits", outcome)
except RuntimeError as error:
    outcome = None
    print(f"  forward pass: RuntimeError: {error}")
empty = transformers.__version__ == "4.57.6"
expected = (0, ("meta", "meta"), None) if empty else (0, ("cpu", "cpu"), 0.0)
sys.exit(0 if (problems, devices, outcome) == expected else 1)
EOF
for version in 4.57.6 5.24.0; do
  PYTHONPATH="$work/$version" "$work/venv/bin/python" "$work/show.py" "$work/llama-$version"
done

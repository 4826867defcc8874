#!/usr/bin/env bash
# transformers 5.24.0 and 4.57.6: a key that LlamaConfig does not define changes what `generate` writes, and nothing else.
#
# Expected: `sliding_window` or `attention_chunk_size` in the config of a Llama, which has neither, is kept as an unknown
#   attribute and has no effect; or it has the same effect everywhere.
# Happens: attention itself ignores it: a forward pass over the prompt gives identical logits. But the default
#   cache of `generate` reads these attributes off any config and keeps only the last so many keys: greedy text differs from
#   the second token on, and is right again with `use_cache=False`. No warning, no exception.
# Matters: folders that were turned from Mistral or Qwen2 into Llama keep such keys. Perplexity and multiple-choice scores
#   (forward passes) say that the pruned or converted model is right, while every generated answer is of another model.
#   Remedy: drop keys that the model's own config does not define.
# Versions: transformers 5.24.0 and 4.57.6, torch 2.13.0 on CPU. Seen, Python 3.11, with both:
#   plain:                  [57, 35, 32, 53, 45, 8, 33, 2, 13, 10, 51, 63]
#   sliding_window 8:       logits identical, no cache: same text, default: [57, 13, 8, 50, 13, 8, 10, 52, 6, 25, 16, 25]
#   attention_chunk_size 8: logits identical, no cache: same text, default: [57, 13, 8, 50, 13, 8, 10, 52, 6, 25, 16, 25]
# Exits 1 once this is no longer so.
set -euo pipefail
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
for version in 4.57.6 5.24.0; do
  "$work/venv/bin/pip" install --quiet --target "$work/$version" "transformers==$version" numpy==2.4.6
done

cat >"$work/show.py" <<'EOF'
import json, pathlib, sys
import torch, transformers
from transformers import LlamaConfig, LlamaForCausalLM

transformers.logging.set_verbosity_error()
torch.manual_seed(0)
folder = pathlib.Path(sys.argv[1])
config = LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=128, initializer_range=0.5, bos_token_id=None, eos_token_id=None, pad_token_id=0,
)
plain = LlamaForCausalLM(config).eval()
prompt = torch.randint(1, 64, (1, 24))

def text(model, **options):
    mask = torch.ones_like(prompt)
    return model.generate(prompt, attention_mask=mask, max_new_tokens=12, do_sample=False, **options)[0, 24:].tolist()

print(f"transformers {transformers.__version__}, plain: {text(plain)}")
for key in ("sliding_window", "attention_chunk_size"):
    plain.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    assert key not in written
    (folder / "config.json").write_text(json.dumps(written | {key: 8}))
    model = LlamaForCausalLM.from_pretrained(folder).eval()
    logits = all(torch.equal(plain(prompt).logits, model(prompt, use_cache=c).logits) for c in (True, False))
    uncached, default = text(model, use_cache=False), text(model)
    print(f"  {key} 8: logits identical {logits}, no cache: same text {uncached == text(plain)}, default: {default}")
    if not logits or uncached != text(plain) or default == text(plain):
        sys.exit(1)
EOF
for version in 4.57.6 5.24.0; do
  PYTHONPATH="$work/$version" "$work/venv/bin/python" "$work/show.py" "$work/llama"
done

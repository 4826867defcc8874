#!/usr/bin/env bash
# transformers 5.24.0 and 4.57.6: the logits of a Phi-3 with LongRoPE depend on what stands beside a text in the batch.
#
# Expected: rows of a batch, padded and masked, have the logits that they have alone, to rounding.
# Happens: the short or the long factors are chosen once for a whole batch, by its longest row. A row of 10 tokens gets the short
#   ones alone, and the long ones beside a row of 24 (the original context here is 16).
# Matters: perplexities and benchmark scores of Phi-3-128k and Phi-4-mini change with the batch size and with the order of the
#   items, by more than pruning a few per cent does. Remedy: rows up to the original context, or one at a time.
# Versions: transformers 5.24.0 and 4.57.6, torch 2.13.0 on CPU, eager attention, float32. Seen, Python 3.11:
#   transformers 4.57.6: the same row alone and beside a longer one: logits up to 0.99 apart, 2 of 10 predictions differ
#   transformers 5.24.0: the same row alone and beside a longer one: logits up to 0.99 apart, 2 of 10 predictions differ
# Exits 1 once this is no longer so.
set -euo pipefail
export HF_HUB_OFFLINE=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
for version in 4.57.6 5.24.0; do
  "$work/venv/bin/pip" install --quiet --target "$work/$version" "transformers==$version" numpy==2.4.6
done

cat >"$work/show.py" <<'EOF'
import sys
import torch, transformers
from transformers import Phi3Config, Phi3ForCausalLM

torch.manual_seed(0)
scaling = {
    "type": "longrope",
    "short_factor": [1.0 + 0.1 * i for i in range(8)],
    "long_factor": [1.0 + 0.7 * i for i in range(8)],
}
config = Phi3Config(
    vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=128, original_max_position_embeddings=16, rope_scaling=scaling, pad_token_id=0, eos_token_id=1,
)
config._attn_implementation = "eager"
model = Phi3ForCausalLM(config).eval()
for weight in model.parameters():
    if weight.ndim > 1:
        weight.data = 0.15 * torch.randn(weight.shape)
rows = torch.randint(2, 64, (2, 24))
batch, mask = rows.clone(), torch.ones(2, 24, dtype=torch.long)
batch[0, 10:], mask[0, 10:] = 0, 0
with torch.no_grad():
    alone = model(rows[:1, :10]).logits[0]
    beside = model(batch, attention_mask=mask).logits[0, :10]
apart = float((alone - beside).abs().max())
differ = int((alone.argmax(-1) != beside.argmax(-1)).sum())
print(
    f"transformers {transformers.__version__}: the same row alone and beside a longer one: logits up to {apart:.2f} apart, "
    f"{differ} of 10 predictions differ"
)
sys.exit(0 if apart > 0.5 else 1)
EOF
for version in 4.57.6 5.24.0; do
  PYTHONPATH="$work/$version" "$work/venv/bin/python" -W ignore "$work/show.py" "$work/model-$version" 2>/dev/null
done

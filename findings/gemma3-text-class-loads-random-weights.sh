#!/usr/bin/env bash
# transformers 5.24.0: `Gemma3ForCausalLM.from_pretrained` of a multimodal Gemma 3 folder gives random weights.
#
# Expected: the text class reads the text half of a multimodal folder, as in 4.57.6, or refuses it.
# Happens: 4.57.6 loads every weight of the text half. 5.24.0 finds none of them under the names it looks for, fills the model
#   with random numbers, and says so in a warning alone; the call succeeds.
# Matters: whoever prunes or scores the text half of a 4B, 12B or 27B model with the class made for it works on noise.
#   Remedy: look at `missing_keys` of `output_loading_info=True`, or save the text half as gemma3_text first.
# Versions: transformers 5.24.0 and 4.57.6, torch 2.13.0 on CPU; every weight of the folder is 0.125. Seen, Python 3.11:
#   transformers 4.57.6: gate_proj is as saved, 0 missing keys
#   transformers 5.24.0: gate_proj is not as saved, 29 missing keys
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
from transformers import Gemma3Config, Gemma3ForCausalLM, Gemma3ForConditionalGeneration

text = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16,
}
vision = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 28,
    "patch_size": 14,
}
config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=1, image_token_index=63)
whole = Gemma3ForConditionalGeneration(config)
for weight in whole.parameters():
    weight.data = torch.full_like(weight, 0.125)
whole.save_pretrained(sys.argv[1])
half, report = Gemma3ForCausalLM.from_pretrained(sys.argv[1], output_loading_info=True)
same = bool((half.model.layers[0].mlp.gate_proj.weight == 0.125).all())
missing = len(report["missing_keys"])
print(f"transformers {transformers.__version__}: gate_proj is {'' if same else 'not '}as saved, {missing} missing keys")
sys.exit(0 if (same, missing) == {"4.57.6": (True, 0), "5.24.0": (False, 29)}[transformers.__version__] else 1)
EOF
for version in 4.57.6 5.24.0; do
  PYTHONPATH="$work/$version" "$work/venv/bin/python" -W ignore "$work/show.py" "$work/model-$version" 2>/dev/null
done

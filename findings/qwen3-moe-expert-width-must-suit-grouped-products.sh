#!/usr/bin/env bash
# transformers 5.24.0 with torch 2.13.0: a Qwen3-MoE whose experts have a width like 21 loads and cannot run.
#
# Expected: the width of the experts is free, as it is in 4.57.6 and in dense models.
# Happens: by default all experts are multiplied in one grouped product, which torch refuses, on CPUs too, unless the rows of its
#   operands are a multiple of 16 bytes: the width must be a multiple of 8 in bfloat16 and of 4 in float32. The folder loads,
#   and the first forward pass ends in a RuntimeError about strides that names no tensor.
# Matters: pruning a share of an expert's neurons gives just such widths. Remedy: round the width to a multiple of 8, or
#   `experts_implementation="eager"` in the config.
# Versions: transformers 5.24.0 and 4.57.6, torch 2.13.0 on CPU. Seen, Python 3.11:
#   transformers 4.57.6: width 24 float32 runs, bfloat16 runs; width 20 float32 runs, bfloat16 runs; width 21 float32 runs, bfloat16 runs
#   transformers 5.24.0: width 24 float32 runs, bfloat16 runs; width 20 float32 runs, bfloat16 fails; width 21 float32 fails, bfloat16 fails
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
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

found = {}
for width in (24, 20, 21):
    config = Qwen3MoeConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, moe_intermediate_size=width, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=4, num_experts_per_tok=2,
    )
    for dtype in (torch.float32, torch.bfloat16):
        model = Qwen3MoeForCausalLM(config).to(dtype).eval()
        try:
            with torch.no_grad():
                model(torch.tensor([[1, 2, 3]]))
            found[width, str(dtype).removeprefix("torch.")] = "runs"
        except RuntimeError as error:
            found[width, str(dtype).removeprefix("torch.")] = "fails" if "16 bytes" in str(error) else str(error)
said = (
    f"width {width} float32 {found[width, 'float32']}, bfloat16 {found[width, 'bfloat16']}" for width in (24, 20, 21)
)
print(f"transformers {transformers.__version__}: {'; '.join(said)}")
failing = {key for key, state in found.items() if state == "fails"}
expected = {(20, "bfloat16"), (21, "float32"), (21, "bfloat16")} if transformers.__version__ == "5.24.0" else set()
sys.exit(0 if failing == expected else 1)
EOF
for version in 4.57.6 5.24.0; do
  PYTHONPATH="$work/$version" "$work/venv/bin/python" -W ignore "$work/show.py" "$work/model-$version" 2>/dev/null
done

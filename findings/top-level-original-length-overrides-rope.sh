#!/usr/bin/env bash
# transformers 5.24.0 and 4.57.6: one config.json with llama3 RoPE, two sets of frequencies.
#
# Expected: llama3 scaling takes `original_max_position_embeddings` from `rope_scaling`, where it is required, whatever else the
#   config says; at least one folder is one function in all releases that load it without complaint.
# Happens: where a key of that name is also at the top level (the place where Phi-3 has it), 5.24.0 overwrites the one in
#   `rope_scaling` with it, and 4.57.6 ignores it. Neither warns. Frequencies between the two bounds differ, so logits do.
# Matters: merged and hand-edited configs hold both. A model pruned and scored under one release is another under the next,
#   and the difference looks like damage done by pruning. Remedy: keep the key in one place, or equal in both.
# Versions: transformers 5.24.0 and 4.57.6, torch 2.13.0 on CPU; 64 in `rope_scaling`, 256 at the top. Seen, Python 3.11:
#   transformers 4.57.6: 1.0000 0.0794 0.0047 0.0009 without the key at the top, 1.0000 0.0794 0.0047 0.0009 with it
#   transformers 5.24.0: 1.0000 0.0794 0.0047 0.0009 without the key at the top, 1.0000 0.1939 0.0105 0.0009 with it
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
import json, pathlib, sys
import torch, transformers
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

folder = pathlib.Path(sys.argv[1])
folder.mkdir(exist_ok=True)
config = {
    "model_type": "llama", "head_dim": 16, "max_position_embeddings": 512, "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}

def frequencies(config):
    (folder / "config.json").write_text(json.dumps(config))
    return LlamaRotaryEmbedding(LlamaConfig.from_pretrained(folder)).inv_freq

without, both = frequencies(config), frequencies(config | {"original_max_position_embeddings": 256})
words = [" ".join(f"{value:.4f}" for value in f[:4]) for f in (without, both)]
print(f"transformers {transformers.__version__}: {words[0]} without the key at the top, {words[1]} with it")
overridden = transformers.__version__ == "5.24.0"
sys.exit(0 if torch.equal(without, both) != overridden else 1)
EOF
for version in 4.57.6 5.24.0; do
  PYTHONPATH="$work/$version" "$work/venv/bin/python" "$work/show.py" "$work/llama"
done

#!/usr/bin/env bash
# transformers 5.24.0: adding `rope_scaling` to a config.json that 5.24.0 wrote resets the RoPE base to 10000.
#
# Expected: 5.x still reads `rope_scaling`, the key in which all documentation of 4.x says to put llama3 or YaRN scaling by
#   hand. Added beside the `rope_parameters` that 5.x writes, it is merged into them, or the two together are an error.
# Happens: `rope_scaling` replaces `rope_parameters` whole, the `rope_theta` that lies in there with it, and the default base
#   takes its place: 10000 instead of 500000. The same edit of a config from 4.x, with `rope_theta` at the top, keeps the base.
#   No exception, no warning.
# Matters: the usual step to a longer context turns a Llama 3 into a model with all its frequencies wrong. Shapes and weights
#   are fine, so it shows only as bad perplexity, which is then blamed on what else was done to the model, such as pruning.
#   Remedy: add the keys inside `rope_parameters`.
# Versions: transformers 5.24.0. Seen, Python 3.11:
#   written by 5.24.0:    base 500000.0, default
#   + rope_scaling:       base 10000.0, llama3
#   4.x + rope_scaling:   base 500000.0, llama3
# Exits 1 once this is no longer so.
set -euo pipefail
export HF_HUB_OFFLINE=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet transformers==5.24.0 # configs need no torch

cat >"$work/show.py" <<'EOF'
import json, pathlib, sys
from transformers import LlamaConfig

folder = pathlib.Path(sys.argv[1])
llama3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
plain = {"rope_type": "default", "rope_theta": 500000.0}
LlamaConfig(rope_parameters=plain, max_position_embeddings=65536).save_pretrained(folder)
written = json.loads((folder / "config.json").read_text())
assert written["rope_parameters"]["rope_theta"] == 500000.0 and "rope_theta" not in written
older = {key: value for key, value in written.items() if key != "rope_parameters"} | {"rope_theta": 500000.0}
edits = {
    "written by 5.24.0:": written,
    "+ rope_scaling:": written | {"rope_scaling": llama3},
    "4.x + rope_scaling:": older | {"rope_scaling": llama3},
}
seen = []
for name, config in edits.items():
    (folder / "config.json").write_text(json.dumps(config))
    rope = LlamaConfig.from_pretrained(folder).rope_parameters
    seen.append((rope["rope_theta"], rope["rope_type"]))
    print(f"{name:21} base {rope['rope_theta']}, {rope['rope_type']}")
sys.exit(0 if seen == [(500000.0, "default"), (10000.0, "llama3"), (500000.0, "llama3")] else 1)
EOF
"$work/venv/bin/python" "$work/show.py" "$work/llama"

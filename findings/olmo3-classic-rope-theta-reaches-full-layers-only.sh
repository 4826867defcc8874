#!/usr/bin/env bash
# transformers 5.24.0: `rope_theta` of an OLMo 3 config.json reaches one layer in four.
#
# Expected: the RoPE base that a config.json of the 4.x spelling names is that of all layers, as in 4.57.6 and in the models.
# Happens: 5.24.0 gives it to the layers with full attention alone. Those with a sliding window, three of four, get the class
#   default of 500000. The released models have just that base, so nobody sees it there. Saving writes the mixture down.
# Matters: a continued or tiny OLMo 3 with another base is another model under the next release, and pruning is blamed for it.
#   Remedy: nested `rope_parameters` with the base in both entries, beside the old key.
# Versions: transformers 5.24.0 and 4.57.6, torch 2.13.0 on CPU. Seen, Python 3.11:
#   transformers 4.57.6: all layers 10000
#   transformers 5.24.0: full_attention 10000, sliding_attention 500000
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
import transformers
from transformers import Olmo3Config

folder = pathlib.Path(sys.argv[1])
folder.mkdir()
config = {"model_type": "olmo3", "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "rope_theta": 10000.0}
(folder / "config.json").write_text(json.dumps(config))
read = Olmo3Config.from_pretrained(folder)
nested = getattr(read, "rope_parameters", None)
bases = {kind: rope["rope_theta"] for kind, rope in nested.items()} if nested else {"all layers": read.rope_theta}
print(f"transformers {transformers.__version__}:", ", ".join(f"{kind} {base:g}" for kind, base in sorted(bases.items())))
expected = {"4.57.6": {"all layers": 1e4}, "5.24.0": {"full_attention": 1e4, "sliding_attention": 5e5}}
sys.exit(0 if bases == expected[transformers.__version__] else 1)
EOF
for version in 4.57.6 5.24.0; do
  PYTHONPATH="$work/$version" "$work/venv/bin/python" -W ignore "$work/show.py" "$work/model-$version" 2>/dev/null
done

#!/usr/bin/env bash
# optipfair 0.4.2: which neurons data-driven pruning keeps depends on how the calibration texts were batched, and on padding.
#
# Expected: the score of a neuron is documented as the L2 norm of its activation over batch and sequence, from CFSP: a sum over
#   tokens, the same however the same tokens are divided into batches, with the padding that `attention_mask` marks left out.
# Happens: the square root is taken within each batch, and the roots are added up, so batches are weighted by how their
#   norms fall out; and positions that the mask excludes count like any other. The same eight texts of one length, in batches
#   of 1 or of 8, keep other neurons. With padding to the longest in a batch, more of them change.
# Matters: batch size is chosen by what fits in memory. Here it chooses the pruned model as well, so nobody reproduces another's
#   selection without knowing it. Remedy: state the batch size with the result, and pack texts so that nothing is padded.
# Versions: optipfair 0.4.2, transformers 5.24.0, torch 2.13.0 on CPU; 2 layers, 32 of 64 neurons kept. Seen, Python 3.11:
#   one length, batches of 1 and of 8: neurons in common, by layer: [29, 31] of 32
#   padded texts, batches of 1 and of 4: neurons in common, by layer: [26, 29] of 32
#   batches of 1, mask of ones and the same texts padded to 64: neurons in common, by layer: [25, 28] of 32
# Exits 1 once this is no longer so.
set -euo pipefail
export HF_HUB_OFFLINE=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.24.0 optipfair==0.4.2

cat >"$work/show.py" <<'EOF'
import copy, logging, sys
import torch
from optipfair import prune_model
from transformers import LlamaConfig, LlamaForCausalLM

logging.disable(logging.WARNING)
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
    max_position_embeddings=128, initializer_range=0.5, bos_token_id=None, eos_token_id=None, pad_token_id=0,
)).eval()
mixed = [torch.randint(1, 64, (length,)) for length in (5, 9, 17, 32, 7, 11, 24, 32)]
equal = [torch.randint(1, 64, (16,)) for _ in range(8)]

def kept(texts, size, length=None):
    batches = []
    for start in range(0, len(texts), size):
        group = texts[start : start + size]
        ids = torch.zeros(len(group), length or max(map(len, group)), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, text in enumerate(group):
            ids[row, : len(text)], mask[row, : len(text)] = text, 1
        batches.append({"input_ids": ids, "attention_mask": mask})
    pruned = prune_model(
        copy.deepcopy(model), pruning_type="MLP_GLU", neuron_selection_method="MAW", pruning_percentage=50,
        dataloader=batches, show_progress=False,
    )
    return [{tuple(row.tolist()) for row in layer.mlp.gate_proj.weight} for layer in pruned.model.layers]

def common(name, one, other):
    shared = [len(a & b) for a, b in zip(one, other)]
    print(f"{name}: neurons in common, by layer: {shared} of {len(one[0])}")
    return shared != [32, 32]

assert kept(equal, 1) == kept(equal, 1)
surprising = [
    common("one length, batches of 1 and of 8", kept(equal, 1), kept(equal, 8)),
    common("padded texts, batches of 1 and of 4", kept(mixed, 1), kept(mixed, 4)),
    common("batches of 1, mask of ones and the same texts padded to 64", kept(mixed, 1), kept(mixed, 1, 64)),
]
sys.exit(0 if all(surprising) else 1)
EOF
"$work/venv/bin/python" "$work/show.py"

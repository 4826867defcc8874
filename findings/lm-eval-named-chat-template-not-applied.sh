#!/usr/bin/env bash
# lm-eval 0.4.13: `apply_chat_template NAME` is recorded as applied, while prompts are made with the template `default`.
#
# Expected: for a tokenizer with several named templates, `--apply_chat_template NAME` formats requests with that template; the
#   option's help says so ("optional template name"), and a name that does not exist is an error.
# Happens: NAME decides which template is looked up and written into the results file, text and hash. The `hf` model then
#   formats every request by a call to the tokenizer without the name, which takes the template called `default`.
# Matters: two runs with two templates give the same scores, and the record says that they had other prompts. Comparisons of
#   a pruned chat model with its parent rest on that record. Remedy: save the tokenizer with only the template wanted.
# Versions: lm_eval 0.4.13, transformers 5.24.0, torch 2.13.0 on CPU. Seen, Python 3.11:
#   recorded: {% for m in messages %}<terse>{{ m['content'] }}{% endfor %}
#   prompt:   <plain>The quick
# Exits 1 once this is no longer so.
set -euo pipefail
export HF_HUB_OFFLINE=1 HF_HUB_DISABLE_PROGRESS_BARS=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
export HF_HOME="$work/cache"
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6 transformers==5.24.0 accelerate==1.15.0 peft==0.21.2 \
  lm_eval==0.4.13 datasets==5.2.0

cat >"$work/show.py" <<'EOF'
import json, sys
import lm_eval, torch
from lm_eval.loggers import EvaluationTracker
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

folder = sys.argv[1]
words = Tokenizer(models.WordLevel({"</s>": 0, "<unk>": 1, "The": 2, "quick": 3, "fox": 4}, unk_token="<unk>"))
words.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>", pad_token="</s>", unk_token="<unk>")
template = "{{% for m in messages %}}<{}>{{{{ m['content'] }}}}{{% endfor %}}"
tokenizer.chat_template = {"default": template.format("plain"), "terse": template.format("terse")}
tokenizer.save_pretrained(folder)
tokenizer = AutoTokenizer.from_pretrained(folder)
assert set(tokenizer.chat_template) == {"default", "terse"}
torch.manual_seed(0)
model = LlamaForCausalLM(LlamaConfig(
    vocab_size=5, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=64,
    bos_token_id=None, eos_token_id=0, pad_token_id=0,
)).eval()
with open(f"{folder}/test.jsonl", "w") as file:
    file.write(json.dumps({"question": "The quick", "answer": " fox"}) + "\n")
task = {
    "task": "fox", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": f"{folder}/test.jsonl"}},
    "test_split": "test", "output_type": "loglikelihood", "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
}
tracker = EvaluationTracker()
results = lm_eval.simple_evaluate(
    HFLM(pretrained=model, tokenizer=tokenizer, batch_size=1), tasks=[task], apply_chat_template="terse", bootstrap_iters=0,
    task_manager=TaskManager(include_defaults=False), evaluation_tracker=tracker,
)
recorded = tracker.general_config_tracker.chat_template
prompt = results["samples"]["fox"][0]["arguments"][0][0]
print("recorded:", recorded)
print("prompt:  ", prompt)
sys.exit(0 if "<terse>" in recorded and prompt.startswith("<plain>") else 1)
EOF
"$work/venv/bin/python" "$work/show.py" "$work/tokenizer" 2>"$work/log" || { tail -5 "$work/log"; exit 1; }

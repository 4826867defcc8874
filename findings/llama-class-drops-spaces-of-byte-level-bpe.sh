#!/usr/bin/env bash
# transformers 5.3.0: a byte-level tokenizer.json under the class name LlamaTokenizer loses every space.
#
# Expected: `AutoTokenizer` on a folder with a tokenizer.json gives the ids of that file. 4.57.6 and 5.24.0 do.
# Happens: where tokenizer_config.json names `LlamaTokenizer` or `LlamaTokenizerFast`, 5.3.0 keeps vocabulary and merges of
#   tokenizer.json but puts the pre-tokenizer and decoder of Llama 2 in place of the file's own. Spaces become a character
#   that a byte-level vocabulary does not have and vanish from the ids: decoding gives "Thequickfox". No warning, no exception.
# Matters: fine-tunes and conversions of Llama-3-type models carry that class name from older tools. Under this release they,
#   and what is pruned from them, score near chance, and a calibration text is not the text that was given.
#   Remedy: another release, or `tokenizer_class: PreTrainedTokenizerFast` in tokenizer_config.json.
# Versions: transformers 5.3.0, 4.57.6 and 5.24.0. Seen, Python 3.11, with both class names:
#   transformers 4.57.6: ['The', 'Ġquick', 'Ġfox'] -> 'The quick fox'
#   transformers 5.3.0: ['The', 'qu', 'ick', 'fo', 'x'] -> 'Thequickfox'
#   transformers 5.24.0: ['The', 'Ġquick', 'Ġfox'] -> 'The quick fox'
# Exits 1 once this is no longer so.
set -euo pipefail
export HF_HUB_OFFLINE=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
for version in 4.57.6 5.3.0 5.24.0; do # tokenizers need no torch
  "$work/venv/bin/pip" install --quiet --target "$work/$version" "transformers==$version"
done

cat >"$work/show.py" <<'EOF'
import json, pathlib, sys
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

folder = pathlib.Path(sys.argv[1])
folder.mkdir(exist_ok=True)
made = Tokenizer(models.BPE())
made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
made.decoder = decoders.ByteLevel()
trainer = trainers.BpeTrainer(
    vocab_size=400, special_tokens=["<|begin_of_text|>", "<|end_of_text|>"], show_progress=False,
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
)
made.train_from_iterator(["The quick brown fox jumps over the lazy dog."] * 9, trainer)
made.save(str(folder / "tokenizer.json"))
(folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
transformers.logging.set_verbosity_error()
wrong = transformers.__version__ == "5.3.0"
text = "The quick fox"
for name in ("LlamaTokenizer", "LlamaTokenizerFast"):
    config = {"tokenizer_class": name, "bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = transformers.AutoTokenizer.from_pretrained(folder)
    ids = loaded.encode(text, add_special_tokens=False)
    print(f"transformers {transformers.__version__}: {loaded.convert_ids_to_tokens(ids)} -> {loaded.decode(ids)!r} ({name})")
    if wrong != (ids != made.encode(text).ids) or loaded.decode(ids) != (text.replace(" ", "") if wrong else text):
        sys.exit(1)
EOF
for version in 4.57.6 5.3.0 5.24.0; do
  PYTHONPATH="$work/$version" "$work/venv/bin/python" "$work/show.py" "$work/folder"
done

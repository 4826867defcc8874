#!/usr/bin/env bash
# transformers 5.24.0: a tokenizer.json of the Llama 2 kind loses a leading space, and the space after a special token.
#
# Expected: `AutoTokenizer` gives the ids of tokenizer.json. Its normalizer, Prepend "▁" then Replace " " by "▁", adds a space
#   to every text, so " The fox" and "The fox" differ and both come back from decoding as they were. 4.57.6 does that.
# Happens: 5.24.0 puts a Metaspace pre-tokenizer in place of the file's normalizer. It adds nothing where a text begins with a
#   space: " The fox" and "The fox" get the same ids, and decoding returns neither space. After "</s>" it adds none either,
#   where tokenizer.json does. `tokenizer.json` is the same file, and the `tokenizers` package alone still gives the old ids.
# Matters: multiple-choice scoring and few-shot prompts encode continuations such as " Paris"; ids and scores move with the
#   release, not with the model. Whoever compares a pruned model with published numbers, or serves it by tokenizer.json alone,
#   compares different inputs.
# Versions: transformers 4.57.6 and 5.24.0. Seen, Python 3.11:
#   transformers 4.57.6, ' The fox': ['▁', '▁The', '▁fox'] -> ' The fox'
#   transformers 4.57.6, 'fox</s>The': ['▁fox', '</s>', '▁The'] -> 'fox</s> The'
#   transformers 5.24.0, ' The fox': ['▁The', '▁fox'] -> 'The fox'
#   transformers 5.24.0, 'fox</s>The': ['▁fox', '</s>', 'The'] -> 'fox</s>The'
# Exits 1 once this is no longer so.
set -euo pipefail
export HF_HUB_OFFLINE=1
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
for version in 4.57.6 5.24.0; do # tokenizers need no torch
  "$work/venv/bin/pip" install --quiet --target "$work/$version" "transformers==$version"
done

cat >"$work/show.py" <<'EOF'
import json, pathlib, sys
import transformers
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

folder = pathlib.Path(sys.argv[1])
folder.mkdir(exist_ok=True)
trained = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
trained.pre_tokenizer = pre_tokenizers.Metaspace()
special = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=special, show_progress=False)
trained.train_from_iterator(["The quick brown fox jumps over the lazy dog."] * 9, trainer)
made = Tokenizer.from_str(json.dumps(json.loads(trained.to_str()) | {"pre_tokenizer": None}))
made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
strip = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
made.decoder = decoders.Sequence(strip)
made.save(str(folder / "tokenizer.json"))
(folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "legacy": False}
(folder / "tokenizer_config.json").write_text(json.dumps(config))
transformers.logging.set_verbosity_error()
loaded = transformers.AutoTokenizer.from_pretrained(folder)
wrong = transformers.__version__ == "5.24.0"
for text in (" The fox", "fox</s>The"):
    ids = loaded.encode(text, add_special_tokens=False)
    tokens = loaded.convert_ids_to_tokens(ids)
    print(f"transformers {transformers.__version__}, {text!r}: {tokens} -> {loaded.decode(ids)!r}")
    if wrong == (ids == made.encode(text, add_special_tokens=False).ids):
        sys.exit(1)
EOF
for version in 4.57.6 5.24.0; do
  PYTHONPATH="$work/$version" "$work/venv/bin/python" "$work/show.py" "$work/folder"
done

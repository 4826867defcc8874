"""A tiny model with a tokenizer that merges letters, has special tokens and a chat template."""

import json
from pathlib import Path
from typing import Any

from tiny_models import hf_config, write_folder
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

LICENSE = (Path(__file__).parents[2] / "LICENSE").read_text(encoding="utf-8")
VOCABULARY, WINDOW = 320, 64
SPECIAL = ("<s>", "</s>", "<|call|>")
CHAT = (
    "{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('no system here') }}{% endif %}"
    "<s>{{ m.role }}: {{ m.content }}{% if not loop.last or add_generation_prompt %}</s>{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<s>assistant:{% endif %}"
)


def write_tiny(
    folder: Path, generation_config: dict[str, Any] | None = None, around: str | None = None, **changes: Any
) -> Path:
    """A tiny random model with a byte-level tokenizer that merges some letters.

    `around` is what the tokenizer makes of a text `$A` by itself, such as "<s> $A".
    """
    config = {"vocab_size": VOCABULARY, "max_position_embeddings": WINDOW, "bos_token_id": 0, "eos_token_id": 1}
    write_folder(folder, hf_config(**config))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([LICENSE], trainer)
    if around is not None:
        ends = [(token, SPECIAL.index(token)) for token in SPECIAL[:2] if token in around]
        tokenizer.post_processor = processors.TemplateProcessing(single=around, special_tokens=ends)
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT,
    }
    settings = {key: value for key, value in (settings | changes).items() if value is not None}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    if generation_config is not None:
        (folder / "generation_config.json").write_text(json.dumps(generation_config))
    return folder

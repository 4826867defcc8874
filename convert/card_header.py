"""The licence and the base model of a model, as the header of its card on the Hugging Face hub says them.

A card is a README.md that begins with YAML between two lines of dashes:

    ---
    license: llama3.2
    base_model: meta-llama/Llama-3.2-1B
    tags: [gluprune, pruned, llama]
    ---

Only these plain keys are looked at, and nothing in a card keeps a model from being loaded.
"""

import re
from collections.abc import Mapping

from gluprune_jax.errors import OperationError, first_line
from gluprune_jax.files.object_store import Folder

CARD_FILE = "README.md"
LICENCE_KEYS = ("license", "license_name", "license_link")
UNKNOWN = "unknown"  # as the hub spells it
_MOST = 1 << 16  # characters of a file that are looked at
# What the text of a licence says of itself in its first lines.
_TEXTS = (
    (re.compile(r"Apache License\s+Version 2\.0"), "apache-2.0"),
    (re.compile(r"MIT License"), "mit"),
)
_LLAMA = re.compile(r"LLAMA ([0-9](?:\.[0-9])?) COMMUNITY LICENSE", re.IGNORECASE)


def read_header(folder: Folder) -> dict[str, str]:
    """What the card in a folder says of licence and base model; without one, what the licence file shows.

    Returns:
      The keys of `LICENCE_KEYS` that are known, and `base_model` if the card is one of ours: in others it is what that
      model was made from.

    Raises:
      OperationError: a file cannot be read.
    """
    try:
        names = {path.name: path for path in sorted(folder.iterdir())}
        card = _text(names[CARD_FILE]) if CARD_FILE in names else ""
        header = parse_header(card)
        texts = [_text(path) for name, path in names.items() if name.startswith("LICENSE") and "license" not in header]
    except OSError as error:
        raise OperationError(f"the licence of {folder} cannot be read: {first_line(error)}") from error
    known = next((found for text in texts if (found := recognise(text))), None)
    return header | ({} if known is None else {"license": known})


def parse_header(card: str) -> dict[str, str]:
    """`read_header` of the text of a card."""
    match = re.match(r"\ufeff?---[ \t]*\r?\n(.*?)\n---", card, re.DOTALL)
    if match is None:
        return {}
    pairs = re.findall(r"^([a-z_]+):[ \t]*([^\r\n]*?)[ \t]*\r?$", match[1], re.MULTILINE)
    found = {key: value.strip("\"'") for key, value in pairs}
    kept = (*LICENCE_KEYS, "base_model") if "gluprune" in found.get("tags", "") else LICENCE_KEYS
    return {key: found[key] for key in kept if found.get(key, "").isprintable() and found.get(key)}


def recognise(text: str) -> str | None:
    """The licence whose text this is, as the hub spells it."""
    beginning = text[:2000]
    if match := _LLAMA.search(beginning):
        return f"llama{match[1]}"
    return next((name for pattern, name in _TEXTS if pattern.search(beginning)), None)


def format_licence(header: Mapping[str, str]) -> str:
    """The licence in words for people: "llama3.2", "other (nvidia-open-model-license, https://...)", "unknown"."""
    name = header.get("license", UNKNOWN)
    more = [header[key] for key in LICENCE_KEYS[1:] if key in header]
    return f"{name} ({', '.join(more)})" if more else name


def _text(path: Folder) -> str:
    if not path.is_file():
        return ""
    return path.read_bytes()[:_MOST].decode("utf-8", errors="replace")

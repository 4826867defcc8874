"""Text to calibrate and train on: files, folders and data sets of plain texts, or of conversations.

JSON lines hold a document each, and .json files an array of such records, a single one, or lines too:

{"text": "..."}
{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
"""

import collections
import importlib
import itertools
import json
import math
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from gluprune_jax.errors import OperationError, RequestError, shortened, unreadable

# Names the English text that every Python carries: the language reference, as `help()` shows it. Its halves are of
# different topics, to calibrate on one and to measure on the other.
PYTHON_REFERENCE = "python-reference"
CALIBRATION_HALF, HELD_OUT_HALF = f"{PYTHON_REFERENCE}:calibration", f"{PYTHON_REFERENCE}:held-out"
_BUILT_IN = (PYTHON_REFERENCE, CALIBRATION_HALF, HELD_OUT_HALF)
# Names the text that a model writes itself (arXiv 2512.02185); another number is another text.
SELF = "self"
SELF_HELP = (
    f"'{SELF}' (or '{SELF}@SEED') for text that the model writes itself; several sources may have weights that add up "
    f"to 1, as '{SELF}:0.5 corpus.txt:0.5'"
)
# Characters of a paragraph that two topics do not have in common by chance.
_PARAGRAPH = 40
# Documents of a hub data set that are looked at: more text than a calibration needs, less than a pre-training corpus.
_MOST_HUB_DOCUMENTS = 100_000
DATA_HELP = (
    "text files, each one document; .jsonl and .json files of records, "
    '{"text": ...} or {"messages": [...]} for the model\'s chat template; folders of these; hub data sets as '
    f"hub:OWNER/NAME[/CONFIG][@SPLIT] (their first {_MOST_HUB_DOCUMENTS:,} documents); "
    f"'{PYTHON_REFERENCE}' is a text that every Python carries, and '{CALIBRATION_HALF}' and '{HELD_OUT_HALF}' are "
    f"halves of it without a paragraph in common"
)

_JSON_LINES = (".jsonl", ".ndjson", ".jsonlines")
_OF_FOLDERS = (".txt", ".md", *_JSON_LINES, ".json")
_TABLES = (".csv", ".tsv", ".parquet", ".arrow", ".feather", ".xls", ".xlsx")
_COMPRESSED = (".gz", ".bz2", ".xz", ".zst", ".lz4", ".zip", ".tar", ".tgz", ".7z")

Messages = list[dict[str, Any]]
# A whole file, the text of a record, the same beside messages, or the messages of a record.
Kind = Literal["text", "record", "both", "chat"]
_READ_AS: dict[Kind, str] = {
    "text": "plain text",
    "record": 'records with "text"',
    "both": 'the "text" of records whose "messages" are not looked at',
    "chat": "chats",
}


class Document(NamedTuple):
    """A text or a conversation.

    Attributes:
      content: the text, or the messages.
      kind: how it was read.
      where: the file, with the line or the record, for errors.
      source: the name that it was found under, and the share of the tokens that this has; None where no text has one.
    """

    content: str | Messages
    kind: Kind
    where: str
    source: tuple[str, float] | None = None


def read_text(name: str) -> str:
    """Reads a UTF-8 text file, or a built-in text (`python-reference` and its halves differ between Python versions).

    A byte order mark at its beginning is no part of the text.

    Raises:
      RequestError: there is no such file, it is not UTF-8, or it is binary.
      OperationError: it cannot be read.
    """
    if name in _BUILT_IN:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
        halves = dict(zip((CALIBRATION_HALF, HELD_OUT_HALF), split_topics(topics), strict=True))
        return "\n".join(topics[key] for key in halves.get(name, sorted(topics)))
    if name.startswith(f"{PYTHON_REFERENCE}:") and not Path(name).exists():
        raise RequestError(f"there is no text {name}; built in are {', '.join(_BUILT_IN)}")
    try:
        text = Path(name).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(f"the text {name}", error) from error
    if "\0" in text:
        raise RequestError(f"the text {name} holds NUL bytes, as binary files and UTF-16 do; give text in UTF-8")
    return text


def split_topics(topics: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """The names of texts in two halves of about the same length, such that no paragraph stands in both.

    Texts that share a paragraph (the reference tells some things twice: "compound" holds all of "for", "if" and "try")
    stay together. The groups are dealt out from the longest on, each to the half that is shorter so far.

    Args:
      topics: texts by name.

    Returns:
      The names of either half, sorted.
    """
    groups: dict[str, list[str]] = {name: [name] for name in topics}  # of each name, those that stay with it
    first: dict[str, str] = {}  # who had a paragraph first
    for name in sorted(topics):
        for paragraph in topics[name].split("\n\n"):
            words = " ".join(paragraph.split())
            other = first.setdefault(words, name) if len(words) >= _PARAGRAPH else name
            if groups[other] is not groups[name]:
                groups[other] += groups[name]
                groups |= dict.fromkeys(groups[name], groups[other])
    lengths = {min(group): sum(len(topics[name]) for name in group) for group in groups.values()}
    halves: tuple[list[str], list[str]] = ([], [])
    sizes = [0, 0]
    for name in sorted(lengths, key=lambda name: (-lengths[name], name)):
        shorter = int(sizes[1] < sizes[0])
        halves[shorter].extend(groups[name])
        sizes[shorter] += lengths[name]
    return sorted(halves[0]), sorted(halves[1])


def read_documents(names: Iterable[str], flag: str, note: Callable[[str], None] | None = None) -> list[Document]:
    """The documents of files, folders and hub data sets.

    Args:
      names: as `DATA_HELP` says. Of a folder, the files below it that end in .txt, .md, .jsonl and .json, by name.
      flag: that they were given with, for errors and notes.
      note: called for each name with a sentence that says how many documents it has and how they were read.

    Raises:
      RequestError: there is nothing of a name, it is not what its name says, or it holds no text.
      OperationError: it cannot be read.
    """
    found: list[Document] = []
    for name in names:
        documents, others = _named_documents(name, flag)
        if not any(document.content for document in documents):
            raise RequestError(f"{flag} {name} is empty; give text")
        found += documents
        if note:
            left_out = f"; files of other kinds are left out ({others:,})" if others else ""
            note(f"{flag} {name}: {_described(documents)}{left_out}")
    return found


def read_calibration(names: Sequence[str], flag: str, note: Callable[[str], None] | None = None) -> list[Document]:
    """The documents of calibration texts, which may have weights, and may be what the model is to write itself.

    Args:
      names: as for `read_documents`, `self` or `self@SEED`; all or none with a weight behind a colon.
      flag: as for `read_documents`.
      note: as for `read_documents`.

    Returns:
      the documents; where texts have weights, each with its `source`. What the model is still to write is a
      conversation without a message, for `convert.own_text`, where `self` stands.

    Raises:
      RequestError: as for `read_documents`; weights of some texts and not of all, that are not above 0 or do not add
        up to 1; several texts without weights, one of which the model writes.
      OperationError: as for `read_documents`.
    """
    weighted = [_weighted(name) for name in names]
    weights = [weight for _, weight in weighted if weight is not None]
    is_own = [self_seed(name) is not None for name in names]
    if any(is_own) and len(names) > 1 and not weights:
        raise RequestError(
            f"{flag} has {SELF} beside other texts, and nothing says how much of each: give weights, such as "
            f"{SELF}:0.5 {next((name for name, own in zip(names, is_own, strict=True) if not own), SELF)}:0.5"
        )
    if weights and len(weights) < len(names):
        without = next(name for name, weight in weighted if weight is None)
        raise RequestError(f"{flag} {without} has no weight and others have; give all of them one, or none")
    if weights and not (all(weight > 0 for weight in weights) and math.isclose(sum(weights), 1, abs_tol=1e-6)):
        raise RequestError(
            f"the weights of {flag} are {' + '.join(f'{weight:g}' for weight in weights)} = {sum(weights):g}; they "
            f"must be above 0 and add up to 1"
        )
    if len(set(names)) < len(names) and weights:
        raise RequestError(f"{flag} names a text twice; give it once, with the sum of the weights")
    found: list[Document] = []
    for text, weight in weighted:
        own = self_seed(text) is not None
        documents = [Document([], "chat", text)] if own else read_documents([text], flag, note)
        found += [document._replace(source=None if weight is None else (text, weight)) for document in documents]
    return found


def _weighted(name: str) -> tuple[str, float | None]:
    """A name without its weight, and the weight, if it has one; a file that is called so is a file."""
    match = re.fullmatch(r"(.+):([0-9]*\.?[0-9]+)", name)
    return (name, None) if match is None or os.path.exists(name) else (match[1], float(match[2]))


def self_seed(name: str) -> int | None:
    """The seed of the text that a model writes itself; None of the name of another text. A weight is not looked at."""
    match = re.fullmatch(rf"{SELF}(?:@([0-9]+))?", _weighted(name)[0])
    return None if match is None or os.path.exists(name) else int(match[1] or 0)


def evaluation_text(name: str, note: Callable[[str], None] | None = None) -> str:
    """The documents of a file, folder or data set as one text, each on lines of its own.

    Args:
      name: as for `read_documents`.
      note: as for `read_documents`.

    Raises:
      RequestError, OperationError: as for `read_documents`; and conversations, which are no text.
    """
    texts = plain_texts(read_documents([name], "`eval_data`", note), f"`eval_data` {name}")
    # A file is taken as it is.
    return texts[0] if len(texts) == 1 else "".join(text.removesuffix("\n") + "\n" for text in texts)


def plain_texts(documents: Sequence[Document], what: str) -> list[str]:
    """The texts of documents that are no conversations.

    Raises:
      RequestError: one is; `what` names them.
    """
    for document in documents:
        if not isinstance(document.content, str):
            raise RequestError(f"{what} holds conversations; give plain text (the first is {document.where})")
    return [f"{document.content}" for document in documents]


def contents(documents: Iterable[Document]) -> Iterator[bytes]:
    """What documents hold, for `distributed.check_same`."""
    return (json.dumps(document.content).encode() for document in documents)


def _described(documents: Sequence[Document]) -> str:
    kinds = collections.Counter(document.kind for document in documents)
    empty = sum(not document.content for document in documents)
    ways = [
        text if len(kinds) == 1 else f"{text} ({kinds[kind]:,})" for kind, text in _READ_AS.items() if kind in kinds
    ]
    return (
        f"{len(documents):,} document{'s' * (len(documents) != 1)}, read as {', '.join(ways)}"
        f"{f', {empty:,} of them empty' if empty else ''}"
    )


def _named_documents(name: str, flag: str) -> tuple[list[Document], int]:
    """The documents of a name, and how many files of a folder are none."""
    if not name:
        raise RequestError(f"{flag} has an empty name; give a file, a folder or a data set")
    if name.startswith("hub:"):
        return _hub_documents(name), 0
    if name in _BUILT_IN or not os.path.isdir(name):
        return _file_documents(name), 0
    files = sorted(path for path in Path(name).rglob("*") if path.is_file())
    ours = [path for path in files if path.suffix.lower() in _OF_FOLDERS]
    if not ours:
        raise RequestError(f"{flag} {name} holds no files that end in {', '.join(_OF_FOLDERS)}; give others by name")
    others = sum(not path.name.startswith(".") for path in files) - sum(not path.name.startswith(".") for path in ours)
    return [document for path in ours for document in _file_documents(str(path))], others


def _file_documents(name: str) -> list[Document]:
    if name in _BUILT_IN or name.startswith(f"{PYTHON_REFERENCE}:"):
        return [Document(read_text(name), "text", name)]
    suffix = Path(name).suffix.lower()
    if suffix in _COMPRESSED:
        raise RequestError(f"{name} ends in {suffix}, and what is compressed is not read; unpack it first")
    if suffix in _TABLES:
        raise RequestError(
            f'{name} ends in {suffix}, and tables are not read; give JSON lines of {{"text": ...}} records, or plain '
            f"text in files that end in .txt"
        )
    text = read_text(name)
    if suffix in _JSON_LINES:
        return parse_json_lines(text, name)
    if suffix == ".json":
        return parse_json(text, name)
    if _begins_with_record(text):
        raise RequestError(
            f"{name} begins with a JSON record, and by its name it would be read as plain text; give it the ending "
            f".jsonl or .json"
        )
    return [Document(text, "text", name)]


def _begins_with_record(text: str) -> bool:
    """Whether a text begins with a JSON object, or an array of them, that `_document` would know."""
    start = text.lstrip()
    if not start.startswith(("{", "[")):
        return False
    try:
        value, _ = json.JSONDecoder().raw_decode(start)
    except (ValueError, RecursionError):
        return False
    record = value[0] if isinstance(value, list) and value else value
    return isinstance(record, dict) and (
        isinstance(record.get("text"), str) or isinstance(record.get("messages"), list)
    )


def _hub_documents(name: str) -> list[Document]:
    match = re.fullmatch(r"hub:([\w.-]+/[\w.-]+)(?:/([\w.-]+))?(?:@([\w.-]+))?", name)
    if match is None:
        raise RequestError(f"{name} is no hub data set; write hub:OWNER/NAME, hub:OWNER/NAME/CONFIG or hub:...@SPLIT")
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise RequestError(f"{name} is read by the package datasets; pip install 'gluprune-jax[evals]'") from error
    try:
        rows: Iterator[Any] = iter(datasets.load_dataset(match[1], match[2], split=match[3] or "train", streaming=True))
        found = list(itertools.islice(rows, _MOST_HUB_DOCUMENTS))
    except Exception as error:  # of the network, the hub and whatever reads the files
        first_line = next(iter(str(error).splitlines()), type(error).__name__)
        raise OperationError(f"the data set {name} cannot be read: {first_line}") from error
    return [_document(row, f"{name}, row {number}") for number, row in enumerate(found)]


def parse_json(text: str, name: str) -> list[Document]:
    """The documents of a .json file: an array of records, a single one, or one a line.

    Args:
      text: of the file.
      name: of the file, for errors.

    Raises:
      RequestError: it is not JSON, or holds something else, named by its line or its place in the array.
    """
    if not text.strip():
        return []
    try:
        whole = json.loads(text)
    except (ValueError, RecursionError) as error:
        first = next(line for line in text.split("\n") if line.strip())
        try:
            has_lines = isinstance(json.loads(first), dict)
        except (ValueError, RecursionError):
            has_lines = False
        if has_lines:
            return parse_json_lines(text, name)
        raise RequestError(
            f"{name} is not JSON: {error}; give an array of records, or one JSON object a line"
        ) from error
    if isinstance(whole, list):
        return [_document(record, f"{name}, record {number}") for number, record in enumerate(whole, start=1)]
    return [_document(whole, name)]


def parse_json_lines(text: str, name: str) -> list[Document]:
    """The documents of a file, one a line; other keys of a line are not looked at.

    Args:
      text: of the file.
      name: of the file, for errors.

    Raises:
      RequestError: a line that is not like this, named by its number.
    """
    lines = enumerate(text.split("\n"), start=1)
    return [_line(line, f"{name}, line {number}") for number, line in lines if line.strip()]


def _line(line: str, where: str) -> Document:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where}, is not JSON: {error}; give one JSON object a line") from error
    return _document(record, where)


def _document(record: Any, where: str) -> Document:
    messages = record.get("messages") if isinstance(record, dict) else None
    has_messages = isinstance(messages, list) and bool(messages)
    # "page" is what the WikiText of lm-eval calls it.
    for key in ("text", "page"):
        if isinstance(record, dict) and isinstance(text := record.get(key), str) and (text or not has_messages):
            return Document(_checked(text, where), "both" if has_messages else "record", where)
    if not isinstance(messages, list) or not messages:
        raise RequestError(f'{where}, is {shortened(record)}; it must hold "text", a string, or "messages", a list')
    for message in messages:
        if not (isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))):
            raise RequestError(
                f"{where}, has the message {shortened(message)}; it must hold role and content, as strings"
            )
        for key in ("role", "content"):
            _checked(message[key], where)
    return Document(messages, "chat", where)


def _checked(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{where}, has half of a surrogate pair, \\u{ord(text[error.start]):x}, which is no text"
        ) from error
    return text

"""Text to calibrate and train on: files, folders and data sets of plain texts, or of conversations.

JSON lines hold a document each:

{"text": "..."}
{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
"""

import importlib
import itertools
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gluprune_jax.errors import OperationError, RequestError, shortened, unreadable

# Names the English text that every Python carries: the language reference, as `help()` shows it.
PYTHON_REFERENCE = "python-reference"
# Documents of a hub data set that are looked at: more text than a calibration needs, less than a pre-training corpus.
_MOST_HUB_DOCUMENTS = 100_000
DATA_HELP = (
    "text files, each one document; .jsonl files with a document a line, "
    '{"text": ...} or {"messages": [...]} for the model\'s chat template; folders of these; hub data sets as '
    f"hub:OWNER/NAME[/CONFIG][@SPLIT] (their first {_MOST_HUB_DOCUMENTS:,} documents); "
    f"'{PYTHON_REFERENCE}' is a text that every Python carries"
)

Messages = list[dict[str, Any]]


def read_text(name: str) -> str:
    """Reads a UTF-8 text file, or the built-in text `python-reference` (it differs between Python versions).

    Raises:
      RequestError: there is no such file, or it is not UTF-8.
      OperationError: it cannot be read.
    """
    if name == PYTHON_REFERENCE:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
        return "\n".join(topics[key] for key in sorted(topics))
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise unreadable(f"the text {name}", error) from error


def read_documents(name: str, flag: str) -> list[str | Messages]:
    """The documents of a file, a folder or a hub data set.

    Args:
      name: as `DATA_HELP` says. Of a folder, the files below it that end in .txt, .md and .jsonl, by name.
      flag: that it was given with, for errors.

    Raises:
      RequestError: there is nothing of that name, it is not what its name says, or it holds no text.
      OperationError: it cannot be read.
    """
    if not name:
        raise RequestError(f"{flag} has an empty name; give a file, a folder or a data set")
    if name.startswith("hub:"):
        documents = _hub_documents(name)
    elif name != PYTHON_REFERENCE and os.path.isdir(name):
        suffixes = (".txt", ".md", ".jsonl")
        files = sorted(path for path in Path(name).rglob("*") if path.suffix in suffixes and path.is_file())
        if not files:
            raise RequestError(f"{flag} {name} holds no files that end in {', '.join(suffixes)}; give others by name")
        documents = [document for path in files for document in _file_documents(str(path))]
    else:
        documents = _file_documents(name)
    if not any(documents):
        raise RequestError(f"{flag} {name} is empty; give text")
    return documents


def evaluation_text(name: str) -> str:
    """The documents of a file, folder or data set as one text, each on lines of its own.

    Raises:
      RequestError, OperationError: as for `read_documents`; and conversations, which are no text.
    """
    documents = read_documents(name, "--evaluate")
    if any(not isinstance(document, str) for document in documents):
        raise RequestError(f"--evaluate {name} holds conversations; give plain text")
    # A file is taken as it is.
    texts = [f"{document}" for document in documents]
    return texts[0] if len(texts) == 1 else "".join(text.removesuffix("\n") + "\n" for text in texts)


def _file_documents(name: str) -> list[str | Messages]:
    text = read_text(name)
    return parse_json_lines(text, name) if name.endswith(".jsonl") else [text]


def _hub_documents(name: str) -> list[str | Messages]:
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
    return [_document(row, f"{name}, row {number},") for number, row in enumerate(found)]


def parse_json_lines(text: str, name: str) -> list[str | Messages]:
    """The documents of a file, one a line; other keys of a line are not looked at.

    Args:
      text: of the file.
      name: of the file, for errors.

    Raises:
      RequestError: a line that is not like this, named by its number.
    """
    lines = enumerate(text.split("\n"), start=1)
    return [_line(line, f"{name}, line {number},") for number, line in lines if line.strip()]


def _line(line: str, where: str) -> str | Messages:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise RequestError(f"{where} is not JSON: {error}; give one JSON object a line") from error
    return _document(record, where)


def _document(record: Any, where: str) -> str | Messages:
    # "page" is what the WikiText of lm-eval calls it.
    for key in ("text", "page"):
        if isinstance(record, dict) and isinstance(text := record.get(key), str):
            return _checked(text, where)
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
        raise RequestError(f'{where} is {shortened(record)}; it must hold "text", a string, or "messages", a list')
    for message in messages:
        if not (isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))):
            raise RequestError(
                f"{where} has the message {shortened(message)}; it must hold role and content, as strings"
            )
        _checked(message["content"], where)
    return messages


def _checked(text: str, where: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RequestError(
            f"{where} has half of a surrogate pair, \\u{ord(text[error.start]):x}, which is no text"
        ) from error
    return text

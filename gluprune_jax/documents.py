"""Training documents in JSON lines: plain texts, or conversations for the chat template of a model.

{"text": "..."}
{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}
"""

import json
from typing import Any

from gluprune_jax.errors import RequestError, shortened

Messages = list[dict[str, Any]]


def parse_json_lines(text: str, name: str) -> list[str | Messages]:
    """The documents of a file, one a line; other keys of a line are not looked at.

    Args:
      text: of the file.
      name: of the file, for errors.

    Raises:
      RequestError: a line that is not like this, named by its number.
    """
    lines = enumerate(text.split("\n"), start=1)
    return [_document(line, f"{name}, line {number},") for number, line in lines if line.strip()]


def _document(line: str, where: str) -> str | Messages:
    try:
        record = json.loads(line)
    except ValueError as error:
        raise RequestError(f"{where} is not JSON: {error}; give one JSON object a line") from error
    if isinstance(record, dict) and isinstance(text := record.get("text"), str):
        return text
    messages = record.get("messages") if isinstance(record, dict) else None
    if not isinstance(messages, list) or not messages:
        raise RequestError(f'{where} is {shortened(record)}; it must hold "text", a string, or "messages", a list')
    for message in messages:
        if not (isinstance(message, dict) and all(isinstance(message.get(key), str) for key in ("role", "content"))):
            raise RequestError(
                f"{where} has the message {shortened(message)}; it must hold role and content, as strings"
            )
    return messages

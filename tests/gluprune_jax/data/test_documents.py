"""What is given as data is read as what it is, or refused in a sentence, and the output says how it was read."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from convert.tokenizer import encode_documents
from gluprune_jax.data.documents import Document, evaluation_text, read_documents, read_text
from gluprune_jax.errors import OperationError, RequestError

RECORDS: list[dict[str, Any]] = [
    {"text": "one"},
    {"messages": [{"role": "user", "content": "two"}]},
    {"text": "three", "id": 3},
]
CONTENTS = ["one", [{"role": "user", "content": "two"}], "three"]
LINES = "\n".join(map(json.dumps, RECORDS)) + "\n"


def read(path: Path, notes: list[str] | None = None) -> list[Document]:
    return read_documents([str(path)], "--data", None if notes is None else notes.append)


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("x.jsonl", LINES),
        ("x.JSONL", LINES),
        ("x.ndjson", LINES),
        ("x.jsonl", "\ufeff" + LINES.replace("\n", "\r\n\r\n")),
        ("x.json", LINES),
        ("x.json", json.dumps(RECORDS)),
        ("x.json", "\ufeff" + json.dumps(RECORDS, indent=1)),
        ("x.Json", "\n" + LINES.removesuffix("\n")),
    ],
)
def test_records_are_read_in_every_spelling(tmp_path: Path, name: str, data: str) -> None:
    (tmp_path / name).write_bytes(data.encode())
    notes: list[str] = []
    found = read(tmp_path / name, notes)
    assert [document.content for document in found] == CONTENTS
    assert [document.kind for document in found] == ["record", "chat", "record"]
    assert notes == [f'--data {tmp_path / name}: 3 documents, read as records with "text" (2), chats (1)']


def test_the_output_says_how_data_was_read(tmp_path: Path) -> None:
    (tmp_path / "one.json").write_text(json.dumps(RECORDS[0], indent=2))
    both = {**RECORDS[0], **RECORDS[1]}
    (tmp_path / "both.jsonl").write_text(f'{json.dumps(both)}\n{{"text": null, "messages": {json.dumps(CONTENTS[1])}}}')
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n' * 2 + LINES)
    (tmp_path / "text").write_text("{not JSON} and [1] is a text")
    mixed = tmp_path / "mixed"
    mixed.mkdir()
    for name, text in {"a.txt": "a", "b.JSON": json.dumps(RECORDS), "c.md": "", "d.csv": "x", ".hidden": ""}.items():
        (mixed / name).write_text(text)
    notes: list[str] = []
    names = [str(tmp_path / name) for name in ("one.json", "both.jsonl", "empty.jsonl", "text", "mixed")]
    read_documents([*names, "python-reference"], "--data", notes.append)
    assert [note.partition(": ")[2] for note in notes] == [
        '1 document, read as records with "text"',
        '2 documents, read as the "text" of records whose "messages" are not looked at (1), chats (1)',
        '5 documents, read as records with "text" (4), chats (1), 2 of them empty',
        "1 document, read as plain text",
        '5 documents, read as plain text (2), records with "text" (2), chats (1), 1 of them empty; files of other '
        "kinds are left out (1)",
        "1 document, read as plain text",
    ]
    evaluation_text(names[3], notes.append)
    assert notes[-1] == f"`eval_data` {names[3]}: 1 document, read as plain text"


BOMB = "[" * 100_000


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.json", '{"a": 1', "x.json is not JSON: Expecting ',' delimiter: line 1 column 8"),
        (
            "x.json",
            "plain text",
            "x.json is not JSON: Expecting value: line 1 column 1 (char 0); give an array of reco",
        ),
        ("x.json", '[{"text": "a"}, {"text"', "x.json is not JSON: "),
        ("x.json", '{"text": "a"}\n{"text"', "x.json, line 2, is not JSON"),
        ("x.json", '[{"text": "a"}, [{"text": "b"}]]', "x.json, record 2, is [{'text': 'b'}]; it must hold"),
        ("x.json", '{"data": [{"text": "a"}]}', "x.json, is {'data': [{'text': 'a'}]}; it must hold"),
        ("x.json", '"text"', "x.json, is 'text'; it must hold"),
        ("x.json", BOMB, "x.json is not JSON: maximum recursion depth exceeded"),
        ("x.json", "[]", "x.json is empty; give text"),
        ("x.json", " \n", "x.json is empty; give text"),
        ("x.jsonl", json.dumps(RECORDS), "x.jsonl, line 1, is [{'text': 'one'}, "),
        ("x.jsonl", '{"text": "a"}\n\n{"text": "b"} x', "x.jsonl, line 3, is not JSON: Extra data"),
        ("x.jsonl", '{"text": ' + "9" * 5000 + "}", "x.jsonl, line 1, is not JSON: Exceeds the limit (4300 digits)"),
        ("x.jsonl", '{"text": 12}', "x.jsonl, line 1, is {'text': 12}; it must hold"),
        ("x.jsonl", '{"messages": "hi"}', "it must hold"),
        ("x.jsonl", '{"messages": [{"role": "user", "content": null}]}', "it must hold role and content, as strings"),
        ("x.jsonl", '{"messages": [{"role": "\\ud83d", "content": ""}]}', "line 1, has half of a surrogate pair"),
        ("x.txt", "", "x.txt is empty; give text"),
        ("x.txt", LINES, "x.txt begins with a JSON record, and by its name it would be read as plain text; give it"),
        ("data", json.dumps(RECORDS, indent=1), "data begins with a JSON record"),
        (
            "x.jsonl.gz",
            gzip.compress(LINES.encode(), mtime=0),
            "ends in .gz, and what is compressed is not read; unpack it",
        ),
        ("x.parquet", b"PAR1", "ends in .parquet, and tables are not read; give JSON lines"),
        ("x.csv", "text\na\n", "ends in .csv, and tables are not read"),
        ("x.bin", b"\x93\xff\x00", "x.bin is not UTF-8 text"),
        ("x.txt", "text".encode("utf-16-le"), "x.txt holds NUL bytes, as binary files and UTF-16 do"),
    ],
)
def test_what_is_no_data(tmp_path: Path, name: str, data: str | bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    with pytest.raises(RequestError) as caught:
        read(tmp_path / name)
    assert message in str(caught.value)
    assert len(str(caught.value).replace(str(tmp_path), "")) < 400
    assert "\n" not in str(caught.value)


def test_folders_without_data(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a")
    with pytest.raises(RequestError, match=r"holds no files that end in \.txt, \.md, \.jsonl, .*\.json; give others"):
        read(tmp_path)


def test_a_byte_order_mark_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_bytes(b"\xef\xbb\xbftext")
    assert read_text(str(tmp_path / "x.txt")) == "text"


class Alternating:
    """As much of a tokenizer as conversations need, with a template that takes no two turns of one role in a row."""

    chat_template = "..."

    def __init__(self, refuse: Callable[[], None]):
        self._refuse = refuse

    def apply_chat_template(self, messages: list[dict[str, str]], **_: Any) -> str:
        if len({message["role"] for message in messages}) < len(messages):
            self._refuse()
        return "text"

    def encode(self, text: str, **_: Any) -> list[int]:
        return [len(text)]


def test_the_conversation_that_a_template_refuses_is_named(tmp_path: Path) -> None:
    import jinja2

    def refuse() -> None:
        raise jinja2.TemplateError("roles must alternate\n" + "x" * 1000)

    def fail() -> None:
        raise jinja2.UndefinedError("x" * 1000)

    user = {"role": "user", "content": "hello"}
    records = [{"messages": [user]}, {"text": "text"}, {"messages": [user, user]}]
    (tmp_path / "x.jsonl").write_text("\n\n".join(map(json.dumps, records)))
    (tmp_path / "x.json").write_text(json.dumps(records))
    for name, place in (("x.jsonl", "line 5"), ("x.json", "record 3")):
        found = read(tmp_path / name)
        for stop, kind, reason in ((refuse, RequestError, "roles must alternate"), (fail, OperationError, "x" * 300)):
            with pytest.raises(kind) as caught:
                encode_documents(Alternating(stop), found)
            where = f"{tmp_path / name}, {place}"
            assert str(caught.value) == f"{where}: the chat template of the tokenizer fails: {reason}"
    without = Alternating(refuse)
    without.chat_template = ""
    with pytest.raises(RequestError, match=r"x\.json, record 1: the model's tokenizer has no chat template"):
        encode_documents(without, found)

"""Made-up lm-eval tasks of every kind of request, and a model that answers them from hashes, as slowly as told."""

import hashlib
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.model import LM

from evals.results.journal import Journal

NAMES = ("tiny_choice", "tiny_words", "tiny_pages", "tiny_sums")
ITEMS = 12  # of each task; the group tiny_choice has two

_CHOICE = """\
task: {name}
output_type: multiple_choice
doc_to_text: "Question: {{{{question}}}}\\nAnswer:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
fewshot_split: dev
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
  - {{metric: acc_norm, aggregation: mean, higher_is_better: true}}
"""
_GROUP = """\
group: tiny_choice
task: [tiny_choice_a, tiny_choice_b]
aggregate_metric_list:
  - {metric: acc, weight_by_size: true}
metadata: {version: 1}
"""
_WORDS = """\
task: tiny_words
output_type: loglikelihood
doc_to_text: "{{question}}"
doc_to_target: " {{choices[0]}}"
metric_list:
  - {metric: perplexity, aggregation: perplexity, higher_is_better: false}
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
_PAGES = """\
task: tiny_pages
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}} {{choices[1]}}"
metric_list:
  - {metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
"""
_SUMS = """\
task: tiny_sums
output_type: generate_until
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_target: "{{choices[0]}}"
num_fewshot: 0
generation_kwargs: {until: ["\\n"], do_sample: false, max_gen_toks: 8}
filter_list:
  - {name: strict, filter: [{function: regex, regex_pattern: "^(\\\\w+)"}, {function: take_first}]}
  - {name: loose, filter: [{function: take_first}]}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""


def write_tasks(folder: Path, version: int = 1, seed: int = 0) -> Path:
    """Writes task definitions and their data; `seed` makes the data."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)

    def word() -> str:
        return "".join(rng.choices("abcdefghij", k=rng.randint(2, 6)))

    for split, count in (("dev", 3), ("test", ITEMS)):
        rows = [
            {
                "question": " ".join(word() for _ in range(5)),
                "choices": [word() for _ in range(3)],
                "answer": rng.randrange(3),
            }
            for _ in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    files = {split: str(folder / f"{split}.jsonl") for split in ("dev", "test")}
    data = (
        f"dataset_path: json\ndataset_kwargs: {{data_files: {json.dumps(files)}}}\n"
        f"test_split: test\nmetadata: {{version: {version}}}\n"
    )
    for name in ("tiny_choice_a", "tiny_choice_b"):
        (folder / f"{name}.yaml").write_text(_CHOICE.format(name=name) + data)
    for name, text in (("words", _WORDS), ("pages", _PAGES), ("sums", _SUMS)):
        (folder / f"{name}.yaml").write_text(text + data)
    (folder / "group.yaml").write_text(_GROUP)
    return folder


class HashLM(LM):
    """Answers with numbers and texts made of the request's hash, and counts what it was asked."""

    def __init__(self, journal: Journal | None = None, seconds: float = 0.0, salt: str = "", log: Path | None = None):
        super().__init__()
        self.journal, self.seconds, self.salt, self.log = journal, seconds, salt, log
        self.asked: list[tuple[str, tuple[Any, ...]]] = []

    def loglikelihood(self, requests: Sequence[Any]) -> list[Any]:
        return [self._answer("loglikelihood", request.args) for request in requests]

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[Any]:
        return [self._answer("loglikelihood_rolling", request.args) for request in requests]

    def generate_until(self, requests: Sequence[Any]) -> list[Any]:
        return [self._answer("generate_until", request.args) for request in requests]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return "".join(f"<{turn['role']}>{turn['content']}" for turn in chat_history)

    @property
    def tokenizer_name(self) -> str:
        return "hash"

    def _answer(self, kind: str, arguments: tuple[Any, ...]) -> Any:
        known = self.journal.get(kind, arguments) if self.journal else None
        if known is not None:
            return known
        time.sleep(self.seconds)
        self.asked.append((kind, arguments))
        digest = hashlib.sha256(json.dumps([self.salt, kind, arguments]).encode()).digest()
        number = -int.from_bytes(digest[:7], "big") / 2**52
        answer = {
            "loglikelihood": (number, digest[0] < 128),
            "loglikelihood_rolling": number * 3,
            "generate_until": f"{digest.hex()[:4]} {digest.hex()[4:9]}",
        }[kind]
        if self.journal:
            self.journal.add(kind, arguments, answer, truncated=digest[1] < 32)
        if self.log:
            with self.log.open("a") as file:
                file.write(f"{kind} {json.dumps(arguments)}\n")
        return answer

"""What is generated when efficiency is measured: prompts as token ids, and how many tokens follow each.

The paper's six workloads are three benchmarks at batch sizes 1 and 8. How long its answers were depended on the model,
so that pruned models that rambled did more work; here every answer has the same length, near the published means.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from evals.harness.suites import find_benchmark, task_manager
from gluprune_jax.errors import RequestError

# Prompts and new tokens: 1 from the prompt's own run and a multiple of the decode loop's steps. The paper's answers had
# 5, 43 and 88 tokens on average.
PAPER = {"hellaswag": (100, 17), "mmlu": (100, 49), "ifeval": (30, 97)}
BATCHES = (1, 8)
SYNTHETIC, SYNTHETIC_PROMPTS = "synthetic", 8


@dataclasses.dataclass(frozen=True)
class Workload:
    """Prompts that are continued.

    Attributes:
      name: for tables.
      prompts: token ids of each.
      new_tokens: of each answer, whatever its content.
    """

    name: str
    prompts: Sequence[Sequence[int]]
    new_tokens: int


def synthetic(vocab_size: int, prompt_tokens: int, new_tokens: int, count: int = SYNTHETIC_PROMPTS) -> Workload:
    """Prompts of random tokens, all of the same length."""
    drawn = np.random.default_rng(0).integers(0, vocab_size, (count, prompt_tokens))
    return Workload(f"{prompt_tokens} random tokens", drawn.tolist(), new_tokens)


def from_texts(name: str, texts: Sequence[str], tokenize: Callable[[str], Sequence[int]], new_tokens: int) -> Workload:
    """Prompts of your own.

    Raises:
      RequestError: there are none.
    """
    prompts = [list(ids) for text in texts if (ids := tokenize(text))]
    if not prompts:
        raise RequestError(f"{name} has no prompts; give a text file with one a line, or JSON lines")
    return Workload(name, prompts, new_tokens)


def of_paper(
    tokenize: Callable[[str], Sequence[int]], benchmark_data: Path | None, most: int | None = None
) -> list[Workload]:
    """The prompts of the paper's workloads: questions of HellaSwag, MMLU (spread over its subjects) and IFEval.

    Args:
      tokenize: the model's tokenizer.
      benchmark_data: as for `evals.harness.run.load_benchmarks`.
      most: prompts of each, if fewer than the paper's.

    Raises:
      RequestError, OperationError: as for `evals.harness.run.load_benchmarks`.
    """
    from evals.harness.run import load_benchmarks, quiet_lm_eval

    benchmarks = [dataclasses.replace(find_benchmark(name), num_fewshot=0) for name in PAPER]
    found = []
    for loaded in load_benchmarks(benchmarks, task_manager(PAPER), benchmark_data=benchmark_data):
        count, new_tokens = PAPER[loaded.benchmark.name]
        count = min(count, most or count)
        tasks: Sequence[Any] = list(loaded.tasks["tasks"].values())
        each = math.ceil(count / len(tasks))
        texts: list[str] = []
        with quiet_lm_eval():
            for task in tasks:
                task.build_all_requests(limit=each)
                texts += dict.fromkeys(str(instance.args[0]) for instance in task.instances)
        spread = [texts[i * len(texts) // count] for i in range(count)]
        found.append(from_texts(loaded.benchmark.title, spread, tokenize, new_tokens))
    return found

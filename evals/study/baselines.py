"""No-knowledge baselines: what a model scores that knows nothing, computed on the same items as the models.

Read every score against these baselines. A model whose answers have become noise does not score zero: it guesses right,
prefers short answers, or writes texts that pass a checker of form. So "holds" and "improves" mean something above the
baselines only, and a score that moves toward them is information lost, from above and from below alike.

Multiple choice: a uniform guess, each answer always (where all items have the same choices, such as the letters of
MMLU), the shortest and the longest choice. Metrics of all log-likelihoods (TruthfulQA MC2): equal ones, such by length
alone (one nat a character), random ones. Generated answers: nothing, one common word 200 times, common words at random
in one line and in many, the prompt once and three times. Perplexity: every token of the vocabulary equally likely.

All go through the benchmark's own checker. Ties are not broken by position but shared: a rule that leaves two choices
gets the mean of what they are worth.
"""

import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from lm_eval.api.model import LM

from evals.harness.decoding import DEFAULT_NEW_TOKENS
from evals.harness.run import LoadedBenchmark, evaluate, quiet_lm_eval, task_documents
from evals.results.outcomes import Outcomes, outcomes_of_items
from evals.study.study import Baseline

Tokenize = Callable[[str], Sequence[int]]

_WORDS = """the of and to a in is it you that he was for on are with as his they be at one have this from or had by
not but what all were we when your can said there use an each which she do how their if will up other about out many
then them these so some her would make like him into time has look two more go see no way could people my than first
water been call who its now find long down day did get come made may part""".split()
_REPEATS, _LINE_WORDS = 200, 10

_DRAWS = 100
# Of random log-likelihoods, in nats: enough that one choice usually takes it all, as with a model's own.
_SPREAD = 10.0
# A choice's log-likelihood that makes another one the best, also after division by lengths.
_NEVER = -1e6


def baselines(
    loaded: LoadedBenchmark,
    metric: str,
    *,
    limit: int | float | None = None,
    tokenize: Tokenize | None = None,
    vocab_size: int | None = None,
) -> list[Baseline]:
    """The no-knowledge baselines of a benchmark.

    Args:
      loaded: from `evals.harness.run.load_benchmarks`.
      metric: lm-eval's key of the metric, such as "acc_norm,none".
      limit: as for `evals.harness.run.evaluate`.
      tokenize: the tokenizer, which perplexities need for a baseline, and for the length of texts.
      vocab_size: tokens that are equally likely.

    Returns:
      The baselines; none where the benchmark asks for something else.
    """
    kinds = {task.OUTPUT_TYPE for task in loaded.tasks["tasks"].values()}
    if kinds == {"multiple_choice"}:
        return _of_choices(loaded, metric, limit)
    if kinds == {"generate_until"}:
        return [_played(loaded, metric, limit, name, _Texts(text, tokenize)) for name, text in _TEXTS.items()]
    if kinds <= {"loglikelihood", "loglikelihood_rolling"} and tokenize is not None and vocab_size is not None:
        lm = _UniformTokens(tokenize, math.log(vocab_size))
        return [_played(loaded, metric, limit, f"all {vocab_size:,} tokens equally likely", lm)]
    return []


def chance_of(loaded: LoadedBenchmark, metric: str, *, limit: int | float | None = None) -> float | None:
    """What a uniform guess scores on the items; None where items have no choices. Arguments as for `baselines`."""
    if {task.OUTPUT_TYPE for task in loaded.tasks["tasks"].values()} != {"multiple_choice"}:
        return None
    guess = [one.outcomes for one in baselines(loaded, metric, limit=limit) if one.name == "a uniform guess"]
    return guess[0].mean if guess else None


# ------------------------------------------------------------------------------------------------------- choices


def _of_choices(loaded: LoadedBenchmark, metric: str, limit: int | float | None) -> list[Baseline]:
    name, _, _ = metric.partition(",")
    of_likelihood = any(callable(task.config.process_results) for task in loaded.tasks["tasks"].values())
    by_rule: dict[str, dict[tuple[str, int], float]] = {}
    with quiet_lm_eval():
        for task_name, doc_id, task, doc in _documents(loaded, limit):
            choices = [str(choice) for choice in task.doc_to_choice(doc)]
            if of_likelihood:
                rules = _likelihoods(task, doc, name, choices, doc_id)
            else:
                rules = _credits(task, doc, name, choices)
            for rule, value in rules.items():
                by_rule.setdefault(rule, {})[task_name, doc_id] = value
        everything = (task.doc_to_choice(doc) for _, _, task, doc in _documents(loaded, None))
        have_labels = not of_likelihood and len({tuple(map(str, choices)) for choices in everything}) == 1
    rules_kept = by_rule
    if not have_labels:  # a position that no model can see is no answer
        rules_kept = {rule: values for rule, values in by_rule.items() if not rule.startswith("always ")}
    return [Baseline(rule, Outcomes.of(values)) for rule, values in rules_kept.items()]


def _credits(task: Any, doc: Any, metric: str, choices: Sequence[str]) -> dict[str, float]:
    """What each rule is worth on an item, from what each choice is worth."""
    worth = [
        _score(task, doc, metric, np.where(np.arange(len(choices)) == i, 0.0, _NEVER)) for i in range(len(choices))
    ]
    lengths = [len(choice) for choice in choices]
    return {
        "a uniform guess": float(np.mean(worth)),
        **{f"always {choice.strip()!r}": value for choice, value in zip(choices, worth, strict=True)},
        "the shortest choice": float(np.mean([w for w, n in zip(worth, lengths, strict=True) if n == min(lengths)])),
        "the longest choice": float(np.mean([w for w, n in zip(worth, lengths, strict=True) if n == max(lengths)])),
    }


def _likelihoods(task: Any, doc: Any, metric: str, choices: Sequence[str], seed: int) -> dict[str, float]:
    """What an item is worth to a rule that gives log-likelihoods, for metrics that depend on more than the best."""
    draws = np.random.default_rng(seed).normal(scale=_SPREAD, size=(_DRAWS, len(choices)))
    return {
        "equal log-likelihoods": _score(task, doc, metric, np.zeros(len(choices))),
        "log-likelihoods by length": _score(task, doc, metric, -np.array([float(len(choice)) for choice in choices])),
        "random log-likelihoods": float(np.mean([_score(task, doc, metric, draw) for draw in draws])),
    }


def _score(task: Any, doc: Any, metric: str, log_likelihoods: Iterable[float]) -> float:
    results = [(float(value), False) for value in log_likelihoods]
    if "acc_mutual_info" in getattr(task, "_metric_fn_list", {}):  # the choices without the question: all alike
        results += [(0.0, False)] * len(task.doc_to_choice(doc))
    return float(task.process_results(doc, results)[metric])


def _documents(loaded: LoadedBenchmark, limit: int | float | None) -> Iterator[tuple[str, int, Any, Any]]:
    for name, documents in task_documents(loaded, limit):
        for doc_id, doc in documents:
            yield name, doc_id, loaded.tasks["tasks"][name], doc


# --------------------------------------------------------------------------------------------------- what is played


def _played(loaded: LoadedBenchmark, metric: str, limit: int | float | None, rule: str, lm: LM) -> Baseline:
    (result,) = evaluate(lm, [loaded], limit=limit, bootstrap_iterations=0)
    return Baseline(rule, outcomes_of_items(result.items, metric))


def _line(rng: random.Random, count: int) -> str:
    return " ".join(rng.choices(_WORDS, k=count))


_TEXTS: Mapping[str, Callable[[str, random.Random], str]] = {
    "nothing": lambda prompt, rng: "",
    "one word repeated": lambda prompt, rng: " ".join(["the"] * _REPEATS),
    "random words in one line": lambda prompt, rng: _line(rng, _REPEATS),
    "random words in many lines": lambda prompt, rng: "\n\n".join(
        _line(rng, _LINE_WORDS) for _ in range(_REPEATS // _LINE_WORDS)
    ),
    "the prompt": lambda prompt, rng: prompt,
    "the prompt three times": lambda prompt, rng: "\n\n".join([prompt] * 3),
}


class _Texts(LM):  # type: ignore[misc]
    """Writes the same kind of text whatever is asked, ended where the task says that answers end.

    With a tokenizer no text is longer than the task allows.
    """

    def __init__(self, text: Callable[[str, random.Random], str], tokenize: Tokenize | None) -> None:
        super().__init__()
        self._text, self._tokenize = text, tokenize

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        answers = []
        for number, request in enumerate(requests):
            prompt, settings = request.args
            answer = self._text(prompt, random.Random(number))
            stops = settings.get("until") or []
            for stop in [stops] if isinstance(stops, str) else stops:
                answer = answer.split(stop)[0] if stop else answer
            answers.append(self._cut(answer, settings.get("max_gen_toks") or DEFAULT_NEW_TOKENS))
        return answers

    def _cut(self, answer: str, most: int) -> str:
        while self._tokenize is not None and (count := len(self._tokenize(answer))) > most:
            answer = answer[: len(answer) * most // count]
        return answer

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        raise NotImplementedError("it writes texts")

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        raise NotImplementedError("it writes texts")


class _UniformTokens(LM):  # type: ignore[misc]
    """Finds every token equally likely."""

    def __init__(self, tokenize: Tokenize, nats: float) -> None:
        super().__init__()
        self._tokenize, self._nats = tokenize, nats

    def loglikelihood(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        return [
            (-self._nats * (len(self._tokenize(context + continuation)) - len(self._tokenize(context))), False)
            for context, continuation in (request.args for request in requests)
        ]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        return [-self._nats * len(self._tokenize(request.args[0])) for request in requests]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        raise NotImplementedError("it writes no texts")

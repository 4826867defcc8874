"""Item by item: our lm-eval backend against lm-eval's own `hf` backend (PyTorch, CPU), both in float32.

    python benchmarks/evals_parity.py --data-dir DIR [--limit 8] [--tasks gsm8k piqa] [--pruned-percent 10]
        [--max-gen-toks N] [--json]

SmolLM2-135M-Instruct, dense and pruned by PPM, is exported as a Hugging Face folder that both sides read. lm-eval
builds the requests of the paper's 13 benchmarks (MMLU and GSM8K with 5 examples) once, and both answer the same ones:
first in the model's own window of 8192 tokens, then some of them in one of 512, so that contexts are cut. To them come
hand-made requests for what the benchmarks do not have, such as empty contexts. MMLU is three subjects here: one with
short questions, one with middling ones, one with long ones.

Log-likelihoods may differ by 1e-3 + 2e-5 for each scored token, those of rolling documents by 1e-5 of their value.
Greedy flags and texts are equal, except where the torch model's top two logits are within 1e-3: for each flag or text
that differs, the torch model is run at the place where the two part, and the gap is shown. The exit status is 1 if
anything is out of bounds, or if a kind of request that should be there is not.
"""

import argparse
import collections
import copy
import dataclasses
import functools
import json
import math
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from lm_eval_peer import PEER_BATCH, Instance, answers, count_items, peer_lm
from rich.console import Console
from rich.table import Table

import convert
from convert.tokenizer import load_tokenizer
from evals.harness.backend import GlupruneLM
from evals.harness.run import load_benchmarks
from evals.harness.suites import SUITES, find_benchmark, task_manager
from evals.harness.task_data import task_datasets
from gluprune_jax import make_plan, score

ABSOLUTE, PER_TOKEN, ROLLING, TOP_TWO = 1e-3, 2e-5, 1e-5, 1e-3
PAPER = tuple(benchmark.name for benchmark in SUITES["paper"].benchmarks)
SHORT_WINDOW = 512
CUT = ("mmlu", "leaderboard_musr", "boolq", "gsm8k", "wikitext")  # have contexts longer than that
EDGE_CASES = "hand-made"
PARTS = {"mmlu": ("mmlu_world_religions", "mmlu_machine_learning", "mmlu_high_school_us_history")}
MARGIN = 16  # tokens that a text is followed beyond the place where two texts part

Choice = Callable[[Sequence[Mapping[str, Any]]], Sequence[int]]


# ------------------------------------------------------------------------------------------------------ requests


def build_requests(name: str, choose: Choice, parts: Sequence[str] | None = None) -> list[Instance]:
    """The requests that lm-eval makes of a benchmark of the paper.

    Args:
      name: of the benchmark.
      choose: from the documents of an lm-eval task to the indices of those to ask about.
      parts: the lm-eval tasks to load; all of a group when None.
    """
    task = find_benchmark(name)
    loaded = load_benchmarks([dataclasses.replace(task, name=part) for part in parts or [name]], paper_tasks())
    instances: list[Instance] = []
    for part in (part for benchmark in loaded for part in benchmark.tasks["tasks"].values()):
        part.build_all_requests(samples=sorted(choose(list(part.eval_docs))))
        instances += part.instances
    return instances


@functools.cache
def paper_tasks() -> Any:
    return task_manager(PAPER)


def evenly(count: int) -> Choice:
    """Documents at even distances, the first among them."""

    def choose(docs: Sequence[Mapping[str, Any]]) -> Sequence[int]:
        taken = min(count, len(docs))
        return [i * len(docs) // taken for i in range(taken)]

    return choose


def by_length(count: int) -> Choice:
    """Documents at even ranks of length, the shortest and (of more than one) the longest among them."""

    def choose(docs: Sequence[Mapping[str, Any]]) -> Sequence[int]:
        ranked = sorted(range(len(docs)), key=lambda i: len(str(docs[i])))
        steps = max(min(count, len(docs)) - 1, 1)
        return sorted({ranked[i * (len(docs) - 1) // steps] for i in range(min(count, len(docs)))})

    return choose


def shortest(count: int) -> Choice:
    """The documents with the least text."""
    return lambda docs: sorted(range(len(docs)), key=lambda i: len(str(docs[i])))[:count]


def edge_cases(tokenizer: Any, window: int = SHORT_WINDOW) -> list[Instance]:
    """Requests that no benchmark makes: empty contexts, spaces before the continuation, texts that fill `window`."""
    from lm_eval.api.instance import Instance as Request

    # Not to be guessed: of a document that is, nearly nothing remains as value, and the error is that of its length.
    words = "a time sea of night day house and with for his who red small ever".split()
    salad = " ".join(random.Random(0).choices(words, k=window + 50))
    filling, beyond = (tokenizer.decode(tokenizer.encode(salad)[:length]) for length in (window, window + 1))
    pairs = [
        ("", "The sea is wide."),
        ("", "A"),
        ("", f"{tokenizer.bos_token}Hello there"),  # begins with the token that stands for an empty context
        ("", filling),
        ("The answer is ", "forty-two."),  # the space goes to the continuation
        ("The answer is\n\n", "Yes"),
        ("The answer is", " Yes"),
        ("The answer is", " Yes"),
        ("The answer is", " No"),
        ("The answer is", " Yes, it is"),
        # Not " is": as both requests then run the same tokens, lm-eval 0.4.13 looks it up where " Yes" belongs.
        ("The answer is Yes, it", " is not"),
        ("The capital of France is", " Paris"),
        ("x", " y"),
        ("naïve café, 東京", " 🙂🙃"),
        (salad, " a small red house"),
        (salad, " sea"),
        ("It was", f" {filling[: window // 2]}"),
    ]
    documents = ["", "A", "It was a dark night. It was the best of nights.", filling, beyond, f"{salad} {salad}"]
    greedy = {"do_sample": False, "max_gen_toks": 24}
    prompts = [
        ("The capital of France is", greedy | {"until": [".", "\n"]}),
        ("Once upon a time there was", greedy | {"until": [" and", "zebra"]}),
        (salad, greedy | {"until": []}),
    ]
    kinds = ("loglikelihood", pairs), ("loglikelihood_rolling", [(d,) for d in documents]), ("generate_until", prompts)
    asked = [(kind, arguments) for kind, rows in kinds for arguments in rows]
    return [Request(kind, {}, arguments, 0, (EDGE_CASES, i, 1)) for i, (kind, arguments) in enumerate(asked)]


def with_gen_toks(instances: Sequence[Instance], most: int) -> list[Instance]:
    """The requests with answers of at most so many tokens."""
    return [
        dataclasses.replace(instance, arguments=(instance.args[0], instance.args[1] | {"max_gen_toks": most}))
        if instance.request_type == "generate_until"
        else instance
        for instance in instances
    ]


# ---------------------------------------------------------------------------------------------------- comparison


@dataclasses.dataclass(frozen=True)
class Difference:
    """A greedy flag or a text that is not the same on both sides.

    Attributes:
      where: the request.
      gap: between the torch model's top two logits where the sides part; infinite if it is not there that they do.
    """

    where: str
    gap: float

    @property
    def excused(self) -> bool:
        return self.gap <= TOP_TWO


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What the two backends make of the same requests.

    Attributes:
      items: documents asked about.
      requests: made of them.
      error: the largest difference of log-likelihoods, in nats.
      rolling_error: that of rolling documents, relative.
      error_over_bound: the largest ratio of a difference to what is allowed.
      flags: greedy flags that differ.
      texts: generated texts that differ.
    """

    items: int
    requests: int
    error: float
    rolling_error: float
    error_over_bound: float
    flags: tuple[Difference, ...]
    texts: tuple[Difference, ...]

    @property
    def within_bounds(self) -> bool:
        return self.error_over_bound <= 1 and all(d.excused for d in (*self.flags, *self.texts))


def compare(peer: Any, instances: Sequence[Instance], theirs: Sequence[Any], ours: Sequence[Any]) -> Comparison:
    """Holds our answers against those of `peer`, which is also asked how close a differing choice was."""
    errors, rolling_errors, shares, flags, texts = [0.0], [0.0], [0.0], [], []
    for instance, they, we in zip(instances, theirs, ours, strict=True):
        where = f"{instance.task_name}, document {instance.doc_id}, request {instance.idx}"
        if instance.request_type == "generate_until":
            if they != we:
                texts.append(Difference(where, text_gap(peer, instance, (they, we))))
        elif instance.request_type == "loglikelihood_rolling":
            rolling_errors.append(_distance(they, we) / (abs(they) or 1))
            shares.append(rolling_errors[-1] / ROLLING)
        else:
            context, continuation = encode(peer, instance)
            errors.append(_distance(they[0], we[0]))
            shares.append(errors[-1] / (ABSOLUTE + PER_TOKEN * len(continuation)))
            if bool(they[1]) != bool(we[1]):
                flags.append(Difference(where, flag_gap(peer, context, continuation)))
    return Comparison(
        items=count_items(instances),
        requests=len(instances),
        error=max(errors),
        rolling_error=max(rolling_errors),
        error_over_bound=max(shares),
        flags=tuple(flags),
        texts=tuple(texts),
    )


def _distance(a: float, b: float) -> float:
    # A NaN would pass for less than anything.
    return abs(a - b) if math.isfinite(a - b) else math.inf


def encode(peer: Any, instance: Instance) -> tuple[list[int], list[int]]:
    """Token ids of context and continuation, as lm-eval makes them."""
    recorded: list[tuple[list[int], list[int]]] = []

    def record(requests: Any, **_: Any) -> list[tuple[float, bool]]:
        recorded.extend((context, continuation) for _, context, continuation in requests)
        return []

    recorder = copy.copy(peer)
    recorder._loglikelihood_tokens = record
    recorder.loglikelihood([instance], disable_tqdm=True)
    return recorded[0]


def flag_gap(peer: Any, context: Sequence[int], continuation: Sequence[int]) -> float:
    """How far the torch model is from the other answer to "is this continuation the greedy one?"."""
    import torch

    tokens = [*context, *continuation][-(peer.max_length + 1) :]
    logits = peer._model_call(torch.tensor([tokens[:-1]]))[0, -len(continuation) :].float()
    top = logits.topk(2).values
    asked = logits.gather(1, torch.tensor(continuation)[:, None])[:, 0]
    behind = top[:, 0] - asked
    # Greedy: one close rival would do. Not greedy: every token that is not the first would have to become it.
    return float(behind.max() if behind.max() > 0 else (top[:, 0] - top[:, 1]).min())


def text_gap(peer: Any, instance: Instance, texts: tuple[str, str]) -> float:
    """The gap between the torch model's top two logits where two texts part, or infinity if they part elsewhere.

    The torch model answers the prompt once more, alone and unpadded. A text that leaves this answer must leave it at a
    token where the model's second choice leads on along the text.
    """
    import torch
    from lm_eval.models.utils import normalize_gen_kwargs, postprocess_generated_text

    context, settings = instance.args
    settings = normalize_gen_kwargs(settings, peer.max_gen_toks)
    ends = peer.model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    stops = [*settings["until"], peer.tok_decode(peer.eot_token_id, skip_special_tokens=False)]
    most = settings["max_gen_toks"]
    common = next((i for i, (a, b) in enumerate(zip(*texts, strict=False)) if a != b), min(map(len, texts)))
    prompt, mask = peer.tok_batch_encode([context], left_truncate_len=peer.max_length - most)
    answer = peer.model.generate(
        input_ids=prompt,
        attention_mask=mask,
        max_new_tokens=min(most, len(peer.tok_encode(texts[0][:common])) + MARGIN),
        do_sample=False,
        pad_token_id=peer.tokenizer.pad_token_id,
        return_dict_in_generate=True,
        output_logits=True,
    )
    path = answer.sequences[0, prompt.shape[1] :].tolist()
    tops = [torch.topk(logits[0].float(), 2) for logits in answer.logits]

    def follows(text: str, ids: Sequence[int]) -> bool:
        raw = peer.tok_decode(ids).rstrip("\N{REPLACEMENT CHARACTER}")  # of a character's first bytes
        if ids and ids[-1] in ends:
            return text == postprocess_generated_text(raw, stops, None)
        begun = raw.startswith(text) and any(stop.startswith(raw[len(text) :]) for stop in stops)
        return begun or text.startswith(raw) or text == postprocess_generated_text(raw, stops, None)

    gaps = []
    for text in texts:
        if follows(text, path):
            continue
        close = [math.inf]
        for i, top in enumerate(tops):
            if follows(text, [*path[:i], int(top.indices[1])]):
                close.append(float(top.values[0] - top.values[1]))
        gaps.append(min(close))
    return max(gaps, default=math.inf)


# ------------------------------------------------------------------------------------------------------ coverage


def coverage(peer: Any, instances: Sequence[Instance]) -> dict[str, int]:
    """How many requests of each kind there are."""
    kinds: collections.Counter[str] = collections.Counter()
    contexts: collections.Counter[tuple[int, ...]] = collections.Counter()
    for instance in instances:
        if instance.request_type == "loglikelihood":
            context, continuation = encode(peer, instance)
            contexts[tuple(context)] += 1
            kinds["single-token continuations"] += len(continuation) == 1
            kinds["multi-token continuations"] += len(continuation) > 1
            kinds["contexts cut to the window"] += len(context) + len(continuation) > peer.max_length + 1
            kinds["empty contexts"] += instance.args[0] == ""
        elif instance.request_type == "loglikelihood_rolling":
            windows = -(-len(peer.tok_encode(instance.args[0])) // peer.max_length)
            kinds["documents of one window"] += windows == 1
            kinds["documents of several windows"] += windows > 1
        else:
            kinds["prompts to be answered"] += 1
            room = peer.max_length - instance.args[1].get("max_gen_toks", peer.max_gen_toks)
            kinds["prompts cut to the window"] += len(peer.tok_encode(instance.args[0])) > room
    kinds["contexts of several requests"] = sum(times > 1 for times in contexts.values())
    kinds["contexts of one request"] = sum(times == 1 for times in contexts.values())
    return dict(kinds)


# ----------------------------------------------------------------------------------------------------- the script


def export(folder: Path, percent: float) -> dict[str, Path]:
    """Writes the demo model, dense and pruned by PPM, as Hugging Face folders."""
    dense = convert.load("demo", dtype="float32")
    pruned = dense.pruned(make_plan(score(dense.model), prune_percent=percent))
    paths = {}
    for name, checkpoint in (("dense", dense), (f"pruned {percent:g} %", pruned)):
        paths[name] = folder / name.split()[0]
        convert.save(checkpoint, paths[name])
    return paths


def ask_both(model: Path, requests: Mapping[str, Sequence[Instance]]) -> Iterator[dict[str, Any]]:
    """Both backends on one model, task by task and window by window: a row of the report for each."""
    checkpoint = convert.load(model)
    loaded = peer_lm(str(model))
    for window, names in ((None, list(requests)), (SHORT_WINDOW, [*CUT, EDGE_CASES])):
        ours = GlupruneLM.from_checkpoint(checkpoint, context_length=window, add_bos_token=False)
        for name in [name for name in names if name in requests]:
            instances = requests[name]
            # Eight windows of 8192 tokens would have 13 GB of logits in the peer, and as much of their softmax.
            batch = 1 if name == "wikitext" else PEER_BATCH
            peer = peer_lm(loaded.model, tokenizer=loaded.tokenizer, window=window, batch_size=batch)
            start = time.perf_counter()
            theirs = answers(peer, instances)
            between = time.perf_counter()
            result = compare(peer, instances, theirs, answers(ours, instances))
            yield {
                "window": peer.max_length,
                "task": name,
                **dataclasses.asdict(result),
                "within_bounds": result.within_bounds,
                "covered": coverage(peer, instances),
                "seconds": {"lm_eval": between - start, "both": time.perf_counter() - start},
            }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    everything = (*PAPER, EDGE_CASES)
    parser.add_argument("--data-dir", type=Path, required=True, help="JSON-lines copies of the data sets")
    parser.add_argument("--limit", type=int, default=8, help="items of each lm-eval task, from short to long ones")
    parser.add_argument("--tasks", nargs="+", choices=everything, default=everything)
    parser.add_argument("--pruned-percent", type=float, default=10)
    parser.add_argument(
        "--max-gen-toks", type=int, metavar="N", help="shorter answers than GSM8K's 256 and IFEval's 1280"
    )
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    for flag, value in (("limit", args.limit), ("max-gen-toks", args.max_gen_toks)):
        if value is not None and value < 1:
            parser.error(f"--{flag} is {value}; it must be at least 1")
    rows: list[dict[str, Any]] = []
    covered: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as work:
        models = export(Path(work), args.pruned_percent)
        with task_datasets(args.data_dir):
            requests = {
                name: build_requests(name, by_length(args.limit), PARTS.get(name))
                for name in args.tasks
                if name != EDGE_CASES
            }
        if EDGE_CASES in args.tasks:
            requests[EDGE_CASES] = edge_cases(load_tokenizer(convert.load(models["dense"], stream=True)))
        if args.max_gen_toks is not None:
            requests = {name: with_gen_toks(instances, args.max_gen_toks) for name, instances in requests.items()}
        for model, folder in models.items():
            for row in ask_both(folder, requests):
                rows.append({"model": model, **row})
                covered.update(row["covered"])
                print(f"{model}, window {row['window']}, {row['task']}: {verdict(row)}", file=sys.stderr, flush=True)
    report(rows, covered, as_json=args.json)
    missing = [kind for kind, count in covered.items() if not count]
    if missing and set(args.tasks) == set(everything):
        print(f"no requests of a kind that should be there: {', '.join(missing)}", file=sys.stderr)
        return 1
    return 0 if all(row["within_bounds"] for row in rows) else 1


def verdict(row: Mapping[str, Any]) -> str:
    """In words, with every difference of a flag or text."""
    lines = ["within bounds" if row["within_bounds"] else "OUT OF BOUNDS"]
    for kind, what in (("flags", "greedy flag"), ("texts", "text")):
        lines += [
            f"  {what} of {d['where']} differs where the top two logits are {d['gap']:.1e} apart" for d in row[kind]
        ]
    return "\n".join(lines)


def describe(differences: Sequence[Mapping[str, Any]]) -> str:
    gaps = ", ".join(f"{difference['gap']:.0e}" for difference in differences)
    return f"{len(differences)} ({gaps})" if differences else "0"


def report(rows: Sequence[Mapping[str, Any]], covered: Mapping[str, int], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({"rows": rows, "covered": covered}, indent=1))
        return
    table = Table(title="our lm-eval backend against lm-eval's hf backend, float32", title_justify="left")
    columns = ("model", "window", "task", "items", "requests", "nats", "rolling", "of the bound", "flags", "texts")
    for column in columns:
        table.add_column(column, justify="left" if column in ("model", "task") else "right")
    for row in rows:
        table.add_row(
            row["model"],
            str(row["window"]),
            row["task"],
            str(row["items"]),
            str(row["requests"]),
            f"{row['error']:.1e}" if row["error"] else "",
            f"{row['rolling_error']:.1e}" if row["rolling_error"] else "",
            f"{row['error_over_bound']:.2f}",
            *(describe(row[kind]) for kind in ("flags", "texts")),
            style=None if row["within_bounds"] else "bold red",
        )
    Console(width=130).print(table)
    print("nats, rolling: the largest difference of a log-likelihood, and of a rolling document relative to its value")
    print("flags, texts: how many differ, and how far apart the torch model's top two logits are where they do")
    print("asked, in all: " + ", ".join(f"{count} {kind}" for kind, count in covered.items()))


if __name__ == "__main__":
    sys.exit(main())

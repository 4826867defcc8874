"""Everything that lm-eval's tasks report, tried on a model without their data.

    python benchmarks/lm_eval_tasks.py --model MODEL [--every N] [--json FILE]

It reads the definition of every task and group that lm-eval ships, and takes one task of each kind: the same output
type, metrics with their aggregations, and filters. Each is run with a few made-up items in place of its data, and with
made-up outcomes where the task computes them from columns of its data, through what `python -m evals` and a study do:
load, evaluate, store, test. A kind is scored, or scored and refused by studies, or refused before anything is
computed, or refused when lm-eval itself fails; each refusal is one sentence. Anything else is a fault, and the exit
status is 1.

Groups whose members report none of their metrics are listed, too.
"""

import argparse
import collections
import json
import re
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

import convert
from convert.tokenizer import encode_text, load_tokenizer
from evals.harness.backend import GlupruneLM
from evals.harness.run import check_testable, evaluate, load_benchmarks
from evals.harness.suites import resolve_tasks
from evals.results.describe import describe_setting
from evals.results.outcomes import check_is_mean
from evals.results.store import load_items, load_result, open_setting
from evals.study.baselines import baselines
from gluprune_jax.errors import GlupruneError

OUTCOMES = ("scored", "no study", "refused", "lm-eval fails", "FAULT")

_CHOICES = ["the sea", "a word", "lazy", "quick brown"]
_ROWS = [
    {"q": f"question {i} of the fox", "choices": _CHOICES, "idx": i % 4, "answer": _CHOICES[i % 4]} for i in range(6)
]

# In place of what a task says of its data.
_MADE_UP = {
    "dataset_path": "json",
    "dataset_name": None,
    "test_split": "test",
    "num_fewshot": 0,
    "description": "",
    "tag": [],
    **dict.fromkeys(
        (
            "custom_dataset",
            "training_split",
            "validation_split",
            "fewshot_split",
            "fewshot_config",
            "process_docs",
            "doc_to_choice",
            "gen_prefix",
            "use_prompt",
            "process_results",
        )
    ),
}


class Kind(NamedTuple):
    """What distinguishes tasks here; functions by their names."""

    output_type: str
    metrics: tuple[tuple[str, str], ...]
    filters: tuple[str, ...]
    computes: bool
    flags: tuple[str, ...]

    def __str__(self) -> str:
        metrics = ", ".join(f"{metric} ({aggregation})" for metric, aggregation in self.metrics) or "default metrics"
        filters = f"; filters {', '.join(self.filters)}" if self.filters else ""
        computes = "; computes its outcomes" if self.computes else ""
        return f"{self.output_type}: {metrics}{filters}{computes}" + "".join(f"; {flag}" for flag in self.flags)


def definitions() -> Iterator[tuple[str, str, Path, Mapping[str, Any]]]:
    """Name, sort ("TASK", "GROUP", ...), file and content of every definition; functions stay names."""
    from lm_eval.tasks import TaskManager
    from lm_eval.tasks._yaml_loader import load_yaml

    for name, entry in TaskManager().task_index.items():
        if entry.yaml_path is not None and entry.kind.name != "TAG":
            yield name, entry.kind.name, entry.yaml_path, load_yaml(entry.yaml_path, resolve_func=False, recursive=True)


def kind_of(config: Mapping[str, Any]) -> Kind:
    metrics = tuple((_leaf(m.get("metric")), _leaf(m.get("aggregation"))) for m in config.get("metric_list") or ())
    filters = tuple(
        "+".join(str(step.get("function")) for step in one["filter"]) for one in config.get("filter_list") or ()
    )
    flags = [name for name in ("doc_to_image", "doc_to_audio", "unsafe_code") if config.get(name)]
    flags += ["repeats"] * (config.get("repeats", 1) != 1)
    computes = config.get("process_results") is not None
    return Kind(config.get("output_type", "generate_until"), metrics, filters, computes, tuple(flags))


def groups_without_score(
    groups: Mapping[str, Any], tasks: Mapping[str, Any], tags: Mapping[str, Any]
) -> dict[str, list[str]]:
    """Groups whose metrics no member declares, with these; members that compute theirs may report any."""
    found = {}
    for name, group in groups.items():
        wanted = group.get("aggregate_metric_list") or []
        metrics = [_leaf(one["metric"]) for one in ([wanted] if isinstance(wanted, dict) else wanted)]
        members = list(_members(group, groups, tasks, tags))
        if not metrics or not members or any("class" in one or one.get("process_results") for one in members):
            continue
        declared = {_leaf(m["metric"]) for one in members for m in one.get("metric_list") or ()}
        if all("metric_list" in one for one in members) and not declared & set(metrics):
            found[name] = metrics
    return found


def _members(group: Any, groups: Mapping[str, Any], tasks: Mapping[str, Any], tags: Mapping[str, Any]) -> Iterator[Any]:
    for member in group.get("task") or ():
        name = member if isinstance(member, str) else member.get("task") or member.get("group")
        more = {} if isinstance(member, str) else member
        if isinstance(name, str) and name in tasks:
            yield {**tasks[name], **more}
        elif isinstance(name, str) and name in groups and name != group.get("group"):
            yield from _members(groups[name], groups, tasks, tags)
        elif isinstance(name, str) and name in tags:
            yield from (tasks[one] for one in tags[name] if one in tasks)
        elif isinstance(name, list):
            yield from _members({"task": name}, groups, tasks, tags)


def write_tasks(folder: Path, kinds: Mapping[Kind, Path]) -> dict[str, Kind]:
    """Writes a task of each kind with made-up items, and returns them by name."""
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in _ROWS))
    functions, written = [], {}
    for number, (kind, path) in enumerate(kinds.items()):
        name = f"kind_{number}"
        config = {"include": str(path), "task": name, **_MADE_UP, "metadata": {"version": 1}}
        config["dataset_kwargs"] = {"data_files": {"test": str(folder / "rows.jsonl")}}
        config["doc_to_text"], config["doc_to_target"] = "Q: {{q}} A:", "{{answer}}"
        if kind.output_type == "multiple_choice":
            config |= {"doc_to_choice": "choices", "doc_to_target": "idx"}
        if kind.output_type == "loglikelihood_rolling":
            config |= {"doc_to_text": "", "doc_to_target": "{{q}}"}
        if kind.output_type == "generate_until":
            config["generation_kwargs"] = {"until": ["\n"], "max_gen_toks": 4, "do_sample": False}
        text = yaml.safe_dump(config)
        if kind.computes:
            outcomes = {metric: _outcome(metric) for metric, _ in kind.metrics}
            functions.append(f"def outcomes_{number}(doc, results):\n    return {outcomes!r}\n")
            text = text.replace("process_results: null", f"process_results: !function made_up.outcomes_{number}")
        (folder / f"{name}.yaml").write_text(text)
        written[name] = kind
    (folder / "made_up.py").write_text("\n".join(functions))
    return written


def _outcome(metric: str) -> Any:
    return (-3.0, 2) if metric in ("word_perplexity", "byte_perplexity", "bits_per_byte") else 0.5


def _leaf(name: Any) -> str:
    """A function's own name, without file and module."""
    return re.split(r"[/.]", str(name))[-1]


def try_task(name: str, manager: Any, model: convert.Checkpoint, lm: GlupruneLM, store: Any) -> tuple[str, str]:
    """How it goes (one of `OUTCOMES`), and the sentence or the score."""
    stage = "refused"
    try:
        (loaded,) = load_benchmarks(resolve_tasks([name], manager), manager)
        stage = "lm-eval fails"
        (result,) = evaluate(lm, [loaded], limit=4, bootstrap_iterations=10, journal=store.journal)
        saved = store.save(result)
        load_items(store.path, load_result(store.path / f"{saved.file_stem}.json"))
        stage = "no study"
        check_testable(loaded, 4)
        check_is_mean(result)
        tokenizer = load_tokenizer(model)
        found = baselines(
            loaded,
            result.metric,
            limit=4,
            tokenize=lambda text: encode_text(tokenizer, text),
            vocab_size=model.config.vocab_size,
        )
        return "scored", f"{result.metric} {result.value:g}, {len(found)} baselines"
    except GlupruneError as error:
        sentence = str(error)
        if len(sentence) > 500 or "\n" in sentence:
            return "FAULT", f"no sentence: {sentence}"
        return stage, sentence
    except Exception as error:
        return "FAULT", f"{type(error).__name__}: {error}"


def main(argv: Sequence[str] | None = None) -> int:
    from lm_eval.tasks import TaskManager

    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", required=True, help="any model that `python -m evals` takes; a tiny one will do")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="only every Nth kind")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all there too")
    args = parser.parse_args(argv)
    kinds: dict[Kind, Path] = {}
    counts: collections.Counter[Kind] = collections.Counter()
    tasks: dict[str, Any] = {}
    groups: dict[str, Any] = {}
    tags: dict[str, list[str]] = {}
    classes = []
    for name, sort, path, config in definitions():
        if sort == "GROUP":
            groups[name] = config
            continue
        tasks[name] = config
        for tag in [config.get("tag") or []] if isinstance(config.get("tag"), str) else config.get("tag") or []:
            tags.setdefault(tag, []).append(name)
        if "class" in config:
            classes.append(name)
            continue
        kind = kind_of(config)
        kinds.setdefault(kind, path)
        counts[kind] += 1
    print(f"{len(tasks):,} tasks of {len(kinds)} kinds, {len(classes)} written in Python, {len(groups)} groups")
    absent = groups_without_score(groups, tasks, tags)
    for name, metrics in absent.items():
        print(f"group without a score: {name} ({', '.join(metrics)})")
    chosen = dict(sorted(kinds.items(), key=str)[:: args.every])
    model = convert.load(args.model)
    lm = GlupruneLM.from_checkpoint(model, add_bos_token=False)
    report = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "tasks"
        folder.mkdir()
        written = write_tasks(folder, chosen)
        manager = TaskManager(include_path=str(folder), include_defaults=False)
        with open_setting(Path(scratch) / "results", describe_setting(model, lm.tokenizer)) as store:
            for name, kind in written.items():
                outcome, sentence = try_task(name, manager, model, lm, store)
                report.append({"kind": str(kind), "tasks": counts[kind], "outcome": outcome, "sentence": sentence})
                print(f"{outcome}: {kind}: {sentence}", flush=True)
    totals = collections.Counter(row["outcome"] for row in report)
    print(", ".join(f"{totals[outcome]} {outcome}" for outcome in OUTCOMES))
    if args.json:
        args.json.write_text(json.dumps({"groups_without_score": absent, "kinds": report}, indent=1))
    return 1 if totals["FAULT"] else 0


if __name__ == "__main__":
    sys.exit(main())

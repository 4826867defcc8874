"""What `gluprune efficiency` does once it has been understood: see `evals.efficiency.__main__`."""

import datetime
import functools
import importlib.metadata
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.table import Table
from rich.text import Text

import convert
from convert.chat import fix_date, template_of
from convert.tokenizer import check_ids, encode_prompt, load_tokenizer, tokens_beyond
from evals.cli import options as eval_options
from evals.efficiency.__main__ import ALIGNMENT, NEW_TOKENS, PERCENTS, PROMPT_TOKENS, EfficiencyRequest
from evals.efficiency.energy import EnergyMeter
from evals.efficiency.measure import DEFINITIONS, measure
from evals.efficiency.workloads import SYNTHETIC, SYNTHETIC_PROMPTS, Workload, from_texts, of_paper, synthetic
from evals.study.folder import EFFICIENCY_FILE, EFFICIENCY_FORMAT, VERSION
from evals.study.grid import sizes
from gluprune_jax import make_plan, score
from gluprune_jax.cli import terminal
from gluprune_jax.data.documents import plain_texts, read_documents
from gluprune_jax.errors import RequestError, check_at_least
from gluprune_jax.files.atomic import check_file, write_file_atomic
from gluprune_jax.memory.mesh_choice import mesh_chooser
from gluprune_jax.memory.plan import Evaluation
from gluprune_jax.parallel.distributed import is_main, synchronize_errors
from gluprune_jax.pruning.choices import is_data_driven
from gluprune_jax.pruning.plan import PruningPlan
from gluprune_jax.pruning.scores import Scores
from gluprune_jax.pruning.targets import TARGETS, format_target

IDLE_SECONDS = 5.0


def measure_all(request: EfficiencyRequest) -> None:
    """Measures the model in all sizes at all workloads, and writes and shows the table.

    Raises:
      RequestError, OperationError: it cannot be done as asked, or something underneath failed.
    """
    batches = tuple(dict.fromkeys(request.batch_sizes))
    wanted = _check_request(request)
    path = None if request.output is None else request.output / EFFICIENCY_FILE
    with synchronize_errors():
        if path is not None and is_main():
            check_file(path, overwrite=request.overwrite)
    eval_options.use_compilation_cache()
    longest = (request.prompt_tokens or PROMPT_TOKENS) + (request.new_tokens or NEW_TOKENS)
    on_cpu = jax.default_backend() == "cpu"
    use = Evaluation(cached=longest, decoded=longest, slots=max(batches), on_cpu=on_cpu, has_replicas=False)
    with terminal.byte_progress() as progress:
        checkpoint = convert.load(
            request.model,
            dtype=request.dtype,
            revision=request.revision,
            mesh=mesh_chooser(request.devices, [use]),
            progress=progress,
        )
    with synchronize_errors():
        texts = _prompts(request)
        tokenizer = load_tokenizer(checkpoint, request.chat_template) if texts else None
        tokenizer = tokenizer if tokenizer is not None and template_of(tokenizer) else None
    date = fix_date(tokenizer, request.date, note=terminal.note)
    with synchronize_errors():
        workloads = _workloads(request, checkpoint, batches, texts, date)
        _check_workloads(checkpoint, workloads, max(batches))
        targets = _targets(score(checkpoint.model, request.criterion), wanted, aligned=not request.no_aligned)
    used = checkpoint.model.embed_tokens[...].sharding.device_set
    meter = EnergyMeter(used)
    idle = meter.idle_watts(IDLE_SECONDS)
    rows = []
    total = len(targets) * len(workloads) * len(batches)
    with terminal.count_progress("measuring", total, "settings") as progress:
        for target, plan in targets:
            model = checkpoint.model if plan is None else checkpoint.pruned(plan).model
            for workload in workloads:
                for batch in batches:
                    found = measure(model, workload, batch, request.repeats, meter, idle)
                    rows.append({**target, "width": model.config.intermediate_sizes[0], **found})
                    progress(len(rows))
    report = {
        "format": EFFICIENCY_FORMAT,
        "version": VERSION,
        "model": request.model,
        "dtype": checkpoint.model.embed_tokens[...].dtype.name,
        "devices": f"{len(used)} x {jax.devices()[0].device_kind}",
        "jax": importlib.metadata.version("jax"),
        "repeats": request.repeats,
        **({} if date is None else {"date": date.isoformat()}),
        "energy": {"sources": meter.sources, "unavailable": meter.unavailable, "idle_watts": idle},
        "definitions": DEFINITIONS,
        "rows": rows,
    }
    with synchronize_errors():
        if path is not None and is_main():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file_atomic(path, json.dumps(report, indent=1).encode(), overwrite=request.overwrite)
    if request.json:
        print(json.dumps(report, indent=1))
    else:
        _print(report)


# ------------------------------------------------------------------------------------------------- what is asked


def _check_request(request: EfficiencyRequest) -> list[dict[str, Any]]:
    """Refuses early what could only fail late; returns the sizes, of which an empty one is the dense model."""
    check_at_least(1, prompt_tokens=request.prompt_tokens, repeats=request.repeats, most_prompts=request.most_prompts)
    check_at_least(2, new_tokens=request.new_tokens)
    asked: dict[str, Sequence[Any] | None] = {name: getattr(request, name) for name in TARGETS}
    if not any(asked.values()):
        asked["prune_percent"] = PERCENTS
    wanted = sizes(multiple_of=1, **asked)
    if 0 in (asked["prune_percent"] or ()):
        wanted.insert(list(asked["prune_percent"] or ()).index(0), {})
    if wrong := [batch for batch in request.batch_sizes if batch < 1]:
        raise RequestError(f"--batch-sizes has {wrong[0]}; whole numbers from 1 are accepted")
    for flag, has_use in (
        ("prompt_tokens", request.prompts is None and request.workload == SYNTHETIC),
        ("new_tokens", request.workload == SYNTHETIC),
        ("benchmark_data", request.workload != SYNTHETIC),
        ("chat_template", request.prompts is not None),
    ):
        if getattr(request, flag) is not None and not has_use:
            what = "these prompts" if request.prompts else f"the {request.workload} workload"
            raise RequestError(f"`{flag}` has no effect with {what}; leave it out")
    if request.most_prompts is not None and request.most_prompts < max(request.batch_sizes):
        raise RequestError(
            f"--most-prompts is {request.most_prompts}, and --batch-sizes has {max(request.batch_sizes)}, which takes "
            f"as many"
        )
    if is_data_driven(request.criterion):
        raise RequestError(
            f"--criterion {request.criterion} needs activations on text; give one of weights alone, such as ppm"
        )
    if request.workload == "paper":
        eval_options.check_installed()
    return wanted


def _prompts(request: EfficiencyRequest) -> list[str]:
    """Those of `--prompts`: documents, and of a text file lines."""
    if request.prompts is None:
        return []
    documents = read_documents([request.prompts], "--prompts", terminal.note)
    texts = plain_texts(documents, f"--prompts {request.prompts}")
    if len(texts) == 1 and documents[0].kind == "text" and Path(request.prompts).is_file():
        texts = [line for line in texts[0].splitlines() if line]
    return texts[: request.most_prompts]


def _workloads(
    request: EfficiencyRequest,
    checkpoint: convert.Checkpoint,
    batches: Sequence[int],
    texts: Sequence[str],
    date: datetime.date | None,
) -> list[Workload]:
    """What is generated: from prompts of one's own, `texts`, or others."""
    if request.prompts is None and request.workload == SYNTHETIC:
        count = max(min(request.most_prompts or SYNTHETIC_PROMPTS, SYNTHETIC_PROMPTS), *batches)
        lengths = request.prompt_tokens or PROMPT_TOKENS, request.new_tokens or NEW_TOKENS
        return [synthetic(checkpoint.config.vocab_size, *lengths, count)]
    tokenizer = load_tokenizer(checkpoint, request.chat_template)
    if beyond := tokens_beyond(tokenizer, checkpoint.config.vocab_size):
        terminal.note(beyond)
    if request.prompts is None:
        tokenize = functools.partial(tokenizer.encode, add_special_tokens=False)
        workloads = of_paper(tokenize, eval_options.data_folder(request.benchmark_data), request.most_prompts)
    else:
        tokenize = functools.partial(encode_prompt, tokenizer, date=date)
        workloads = [from_texts(request.prompts, texts, tokenize, request.new_tokens or NEW_TOKENS)]
    for prompt in (prompt for workload in workloads for prompt in workload.prompts):
        check_ids(tokenizer, prompt, checkpoint.config.vocab_size)
    return workloads


def _check_workloads(checkpoint: convert.Checkpoint, workloads: Sequence[Workload], batch: int) -> None:
    window = checkpoint.config.context_length
    for workload in workloads:
        longest = max(map(len, workload.prompts)) + workload.new_tokens
        if longest > window:
            raise RequestError(
                f"{workload.name}: a prompt with its answer has {longest:,} tokens, and the model's window {window:,}; "
                f"give shorter ones"
            )
        if len(workload.prompts) < batch:  # a prompt that is given twice is run once
            raise RequestError(
                f"{workload.name} has {len(workload.prompts)} prompts, fewer than the {batch} of --batch-sizes; give "
                f"more, or smaller batches"
            )


def _targets(
    scores: Scores, wanted: Sequence[Mapping[str, Any]], *, aligned: bool
) -> list[tuple[dict[str, Any], PruningPlan | None]]:
    """Each size, and beside odd widths those that are multiples of `ALIGNMENT`; None stands for the dense model."""
    found: list[tuple[dict[str, Any], PruningPlan | None]] = []
    for target in wanted:
        if not target:
            found.append(({"level": "dense", "removed": 0.0, "aligned": False}, None))
            continue
        name, plan = format_target(target), make_plan(scores, **target)
        found.append(({"level": name, "removed": _removed(plan), "aligned": False}, plan))
        if aligned and any(width % ALIGNMENT for width in plan.widths) and min(plan.widths) >= ALIGNMENT:
            plan = make_plan(scores, **{**target, "multiple_of": ALIGNMENT})
            label = f"{name}, multiple of {ALIGNMENT}"
            found.append(({"level": label, "removed": _removed(plan), "aligned": True}, plan))
    return found


def _removed(plan: PruningPlan) -> float:
    return 1 - sum(plan.widths) / sum(plan.intermediate_sizes)


# -------------------------------------------------------------------------------------------------------- showing


def _print(report: dict[str, Any]) -> None:
    console = terminal.console()
    has_energy = bool(report["energy"]["sources"])
    settings = dict.fromkeys((row["workload"], row["batch"]) for row in report["rows"])
    for workload, batch in settings:
        rows = [row for row in report["rows"] if (row["workload"], row["batch"]) == (workload, batch)]
        shape = f"{rows[0]['mean_prompt_tokens']:.0f} + {rows[0]['new_tokens']} tokens"
        table = Table(title=Text(f"{workload}, batch {batch}: {shape}"), title_justify="left")
        columns = ["first, ms"] * (batch == 1) + ["each, ms", "all, ms", "prefill/s", "decode/s", "MB"]
        table.add_column("model", min_width=max(len(word) for row in rows for word in row["level"].split(", ")))
        for column in columns + ["J/token"] * has_energy:
            table.add_column(column, justify="right", no_wrap=True)
        for row in rows:
            cells = [_milliseconds(row["time_to_first_token"])] * (batch == 1)
            cells += [_milliseconds(row["time_per_output_token"]), _milliseconds(row["latency"])]
            rate = row["decode_tokens_per_second"]
            cells += [f"{row['prefill_tokens_per_second']:,.0f}", "" if rate is None else f"{rate:,.1f}"]
            cells.append("" if row["memory_bytes"] is None else f"{row['memory_bytes'] / 1e6:,.0f}")
            if has_energy:
                cells.append(f"{row['energy_per_token']:.3f}")
            table.add_row(row["level"], *cells)
        console.print(table)
    notes = [
        f"{report['devices']}, {report['dtype']}; medians of {report['repeats']} repeats ± half the quartiles' range"
    ]
    notes.append("first: time to first token; each: time per output token; all: latency of the whole answers")
    if not has_energy:
        notes.append(f"energy: not available ({report['energy']['unavailable']})")
    for note in notes:
        console.print(note, style="dim", markup=False)


def _milliseconds(timing: dict[str, float] | None) -> str:
    if timing is None:
        return ""
    spread = 1e3 * (timing["high"] - timing["low"]) / 2
    digits = 0 if timing["median"] >= 1 else 1
    return f"{1e3 * timing['median']:,.{digits}f} ± {spread:.{digits}f}"

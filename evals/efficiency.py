"""Latency, throughput, memory and energy of a model and of its pruned versions: `python -m evals.efficiency`."""

import argparse
import dataclasses
import functools
import importlib.metadata
import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from rich.console import Console
from rich.table import Table
from rich.text import Text

import convert
from convert.store import DTYPE_NAMES, MODEL_HELP
from convert.tokenizer import encode_prompt, load_tokenizer
from evals.__main__ import check_installed, data_folder, use_compilation_cache
from evals.costs import bytes_per_token, flops_per_token
from evals.energy import EnergyMeter
from evals.study_files import EFFICIENCY_FILE, EFFICIENCY_FORMAT, VERSION
from evals.workloads import BATCHES, SYNTHETIC, SYNTHETIC_PROMPTS, Workload, from_texts, of_paper, synthetic
from gluprune_jax import devices, generate, make_plan, score, terminal
from gluprune_jax.atomic import check_file, write_file_atomic
from gluprune_jax.criteria import find_criterion
from gluprune_jax.distributed import failing_together, is_main
from gluprune_jax.documents import PYTHON_REFERENCE, read_documents
from gluprune_jax.errors import OperationError, RequestError
from gluprune_jax.generation import STEPS_PER_CALL, Sampling, decode, empty_state, slots_for
from gluprune_jax.importance import Scores, is_data_driven
from gluprune_jax.memory import Evaluation
from gluprune_jax.mesh import mesh_of, on, shape_of
from gluprune_jax.model import Llama
from gluprune_jax.plan import PruningPlan

ALIGNMENT = 128  # lanes of a TPU's vector unit; tensor cores too like multiples of it
IDLE_SECONDS = 5.0
PROMPT_TOKENS, NEW_TOKENS = 128, 65

DEFINITIONS = {
    "time to first token": "seconds from a prompt's token ids at the host to its first new token there: prefill "
    "and one token, at batch size 1",
    "time per output token": "seconds of all new tokens but the first, over their number, at that batch size",
    "latency": "seconds from the prompts' token ids to the last new token of all of them",
    "output tokens/s": "new tokens of all prompts over the latency",
    "prefill tokens/s": "prompt tokens over the seconds to the first tokens of all prompts",
    "decode tokens/s": "new tokens but the first of each prompt, over the seconds that they take",
    "memory": "bytes of one device that the decode program holds: weights, caches and workspace, by the compiler's "
    "analysis",
    "FLOPs per token": "two for each weight of a matrix, and attention over prompt and answer",
    "bytes per token": "what decoding a token must read: its share of the weights, and its keys and values",
    "energy per token": "joules of all counters while answers are generated, over new tokens; net: without the power "
    "of the idle machine, measured before",
}

DESCRIPTION = """\
Measures how fast a model and its pruned versions generate, how much memory they take, and what energy where the
hardware tells. Answers have a fixed length, so that all models do the same work; programs are compiled and run once
before anything is timed; numbers are medians with quartiles over repeats.

examples:
  python -m evals.efficiency --model demo --levels 0,20,40
  python -m evals.efficiency --model meta-llama/Llama-3.2-1B --dtype bfloat16 --workload paper --output study
  python -m evals.efficiency --model llama-1b --levels 40 --prompts questions.txt --new-tokens 129 --batch-sizes 1,8,32
"""


@dataclasses.dataclass(frozen=True)
class Timing:
    """Seconds of repeats.

    Attributes:
      median: of them.
      low: first quartile.
      high: third quartile.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, seconds: Sequence[float]) -> "Timing":
        """Of at least one repeat."""
        low, median, high = np.quantile(seconds, [0.25, 0.5, 0.75]).tolist()
        return cls(median, low, high)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = terminal.ArgumentParser("python -m evals.efficiency", DESCRIPTION)
    parser.add_argument("--model", required=True, metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, help="cast all weights as they are read, and compute in it")
    parser.add_argument("--levels", default="0,20,40,60", metavar="LIST", help="percent of the neurons to remove")
    parser.add_argument(
        "--criterion",
        default="ppm",
        metavar="NAME",
        help="how neurons are chosen, by weights alone; it changes no speed",
    )
    parser.add_argument(
        "--no-aligned", action="store_true", help=f"leave out the rows with widths that are multiples of {ALIGNMENT}"
    )
    work = parser.add_argument_group("what is generated")
    which = work.add_mutually_exclusive_group()
    which.add_argument(
        "--workload",
        choices=(SYNTHETIC, "paper"),
        default=SYNTHETIC,
        help="random tokens, or the paper's six workloads: prompts of HellaSwag, MMLU and IFEval at batches 1 and 8",
    )
    which.add_argument(
        "--prompts",
        metavar="TEXT",
        help='prompts of your own: a text file with one a line, a .jsonl file with {"text": ...} lines, a folder or a '
        "data set of documents",
    )
    work.add_argument(
        "--prompt-tokens", type=int, metavar="N", help=f"tokens of each random prompt (default: {PROMPT_TOKENS})"
    )
    work.add_argument(
        "--new-tokens",
        type=int,
        metavar="N",
        help=f"tokens of each answer, but for the paper's workloads, which have their own (default: {NEW_TOKENS}; one "
        f"more than a multiple of {STEPS_PER_CALL} is timed best)",
    )
    work.add_argument(
        "--batch-sizes", default=",".join(map(str, BATCHES)), metavar="LIST", help="prompts generated together"
    )
    work.add_argument(
        "--most-prompts",
        type=int,
        metavar="N",
        help=f"of each workload, no more than N prompts (random ones: {SYNTHETIC_PROMPTS}, or the largest batch)",
    )
    work.add_argument("--data-dir", metavar="DIR", help="data of the paper's workloads, as for python -m evals")
    how = parser.add_argument_group("how")
    how.add_argument("--repeats", type=int, default=5, metavar="N", help="of everything")
    how.add_argument(
        "--output", type=Path, metavar="DIR", help=f"folder for {EFFICIENCY_FILE}, such as that of a study"
    )
    how.add_argument("--overwrite", action="store_true", help=f"replace {EFFICIENCY_FILE}")
    how.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    how.add_argument("--debug", action="store_true", help="show the traceback of an error")
    devices.add_arguments(parser, "the fewest devices that hold the model; all of several processes")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    args = parser().parse_args(sys.argv[1:] if argv is None else argv)
    return terminal.run("evals.efficiency", lambda: _efficiency(args), debug=args.debug, processes=args)


def _efficiency(args: argparse.Namespace) -> None:
    levels, batches = _check_request(args)
    path = None if args.output is None else args.output / EFFICIENCY_FILE
    with failing_together():
        if path is not None and is_main():
            check_file(path, overwrite=args.overwrite)
    use_compilation_cache()
    longest = (args.prompt_tokens or PROMPT_TOKENS) + (args.new_tokens or NEW_TOKENS)
    on_cpu = jax.default_backend() == "cpu"
    use = Evaluation(cached=longest, decoded=longest, slots=max(batches), on_cpu=on_cpu, has_replicas=False)
    with terminal.byte_progress() as progress:
        checkpoint = convert.load(
            args.model,
            dtype=args.dtype,
            revision=args.revision,
            mesh=devices.chooses(args, [use]),
            progress=progress,
        )
    with failing_together():
        workloads = _workloads(args, checkpoint, batches)
        _check_workloads(checkpoint, workloads, max(batches))
        targets = _targets(score(checkpoint.model, args.criterion), levels, aligned=not args.no_aligned)
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
                    found = measure(model, workload, batch, args.repeats, meter, idle)
                    rows.append({**target, "width": model.config.intermediate_sizes[0], **found})
                    progress(len(rows))
    report = {
        "format": EFFICIENCY_FORMAT,
        "version": VERSION,
        "model": args.model,
        "dtype": checkpoint.model.embed_tokens[...].dtype.name,
        "devices": f"{len(used)} x {jax.devices()[0].device_kind}",
        "jax": importlib.metadata.version("jax"),
        "repeats": args.repeats,
        "energy": {"sources": meter.sources, "unavailable": meter.unavailable, "idle_watts": idle},
        "definitions": DEFINITIONS,
        "rows": rows,
    }
    with failing_together():
        if path is not None and is_main():
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file_atomic(path, json.dumps(report, indent=1).encode(), overwrite=args.overwrite)
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        _print(report)


# ------------------------------------------------------------------------------------------------- what is asked


def _check_request(args: argparse.Namespace) -> tuple[list[float], list[int]]:
    for flag, least in (("prompt_tokens", 1), ("new_tokens", 2), ("repeats", 1), ("most_prompts", 1)):
        value = getattr(args, flag)
        if value is not None and value < least:
            raise RequestError(f"--{flag.replace('_', '-')} is {value}; it must be at least {least}")
    levels = _numbers("--levels", args.levels)
    if wrong := [level for level in levels if not 0 <= level < 100]:
        raise RequestError(f"--levels has {wrong[0]:g}; percent from 0 and below 100 are accepted")
    batches = _numbers("--batch-sizes", args.batch_sizes)
    if wrong := [batch for batch in batches if not (math.isfinite(batch) and batch >= 1 and batch == int(batch))]:
        raise RequestError(f"--batch-sizes has {wrong[0]:g}; whole numbers from 1 are accepted")
    for flag, has_use in (
        ("prompt_tokens", args.prompts is None and args.workload == SYNTHETIC),
        ("new_tokens", args.workload == SYNTHETIC),
        ("data_dir", args.workload != SYNTHETIC),
    ):
        if getattr(args, flag) is not None and not has_use:
            what = "these prompts" if args.prompts else f"the {args.workload} workload"
            raise RequestError(f"nothing looks at --{flag.replace('_', '-')} with {what}; leave it out")
    if args.most_prompts is not None and args.most_prompts < max(batches):
        raise RequestError(
            f"--most-prompts is {args.most_prompts}, and --batch-sizes has {max(batches):g}, which takes as many"
        )
    if is_data_driven(find_criterion(args.criterion)[1]):
        raise RequestError(f"--criterion {args.criterion} looks at activations; give one of weights alone, such as ppm")
    if args.workload == "paper":
        check_installed()
    return levels, [int(batch) for batch in batches]


def _numbers(flag: str, text: str) -> list[float]:
    try:
        return list(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        raise RequestError(f"{flag} is {text!r}; give numbers, comma-separated") from None


def _workloads(args: argparse.Namespace, checkpoint: convert.Checkpoint, batches: Sequence[int]) -> list[Workload]:
    if args.prompts is None and args.workload == SYNTHETIC:
        count = max(min(args.most_prompts or SYNTHETIC_PROMPTS, SYNTHETIC_PROMPTS), *batches)
        lengths = args.prompt_tokens or PROMPT_TOKENS, args.new_tokens or NEW_TOKENS
        return [synthetic(checkpoint.config.vocab_size, *lengths, count)]
    tokenizer = load_tokenizer(checkpoint)
    if args.prompts is None:
        tokenize = functools.partial(tokenizer.encode, add_special_tokens=False)
        return of_paper(tokenize, data_folder(args.data_dir), args.most_prompts)
    texts = []
    for document in read_documents(args.prompts, "--prompts"):
        if not isinstance(document, str):
            raise RequestError(f"--prompts {args.prompts} holds conversations; give plain text")
        texts.append(document)
    if args.prompts != PYTHON_REFERENCE and Path(args.prompts).is_file() and not args.prompts.endswith(".jsonl"):
        texts = [line for text in texts for line in text.splitlines() if line]
    texts = texts[: args.most_prompts]
    tokenize = functools.partial(encode_prompt, tokenizer)
    return [from_texts(args.prompts, texts, tokenize, args.new_tokens or NEW_TOKENS)]


def _check_workloads(checkpoint: convert.Checkpoint, workloads: Sequence[Workload], batch: int) -> None:
    window = checkpoint.config.max_position_embeddings
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
    scores: Scores, levels: Sequence[float], *, aligned: bool
) -> list[tuple[dict[str, Any], PruningPlan | None]]:
    """Each size, and beside odd widths those that are multiples of `ALIGNMENT`; None stands for the dense model."""
    found: list[tuple[dict[str, Any], PruningPlan | None]] = []
    for level in levels:
        name = f"{level:g} %"
        if level == 0:
            found.append(({"level": "dense", "removed": 0.0, "aligned": False}, None))
            continue
        plan = make_plan(scores, prune_percent=level)
        found.append(({"level": name, "removed": _removed(plan), "aligned": False}, plan))
        if aligned and any(width % ALIGNMENT for width in plan.widths) and min(plan.widths) >= ALIGNMENT:
            plan = make_plan(scores, prune_percent=level, multiple_of=ALIGNMENT)
            label = f"{name}, multiple of {ALIGNMENT}"
            found.append(({"level": label, "removed": _removed(plan), "aligned": True}, plan))
    return found


def _removed(plan: PruningPlan) -> float:
    return 1 - sum(plan.widths) / sum(plan.intermediate_sizes)


# ------------------------------------------------------------------------------------------------------ measuring


def measure(
    model: Llama, workload: Workload, batch: int, repeats: int, meter: EnergyMeter, idle_watts: float | None
) -> dict[str, Any]:
    """Everything about one model, workload and batch size.

    Args:
      model: dense or sliced.
      workload: its prompts are taken in groups of `batch`, the last group filled up from the first.
      batch: prompts generated together.
      repeats: of every group.
      meter: the energy counters.
      idle_watts: power of the idle machine, if it is known.

    Returns:
      A row of the report, as JSON; times are in seconds.
    """
    groups = _groups(workload.prompts, batch)

    def no_memory(_: int) -> None:
        raise OperationError(
            f"the devices have no memory for {batch} sequences of {workload.name}; give --batch-sizes less"
        )

    def answer(new_tokens: int) -> float:
        """Seconds to generate so many tokens for every prompt, group by group."""
        start = time.perf_counter()
        for group in groups:
            # No token ends an answer: all models do the same work.
            generate(model, group, max_new_tokens=new_tokens, slots=batch, on_out_of_memory=no_memory)
        return time.perf_counter() - start

    warm_up = answer(1) + answer(workload.new_tokens)
    firsts = [answer(1) / len(groups) for _ in range(repeats)]
    wholes: list[float] = []
    energy = meter.measure(lambda: wholes.extend(answer(workload.new_tokens) / len(groups) for _ in range(repeats)))
    first, whole = Timing.of(firsts), Timing.of(wholes)
    rest = [(whole - first.median) / (workload.new_tokens - 1) for whole in wholes]
    prompt_tokens = sum(len(prompt) for group in groups for prompt in group) / len(groups)
    context = round(prompt_tokens / batch) + workload.new_tokens // 2
    decoded = batch * (workload.new_tokens - 1)
    # Where noise is larger than what the other tokens take, there is no rate.
    per_token = Timing.of(rest) if min(rest) > 0 else None
    found: dict[str, Any] = {
        "workload": workload.name,
        "batch": batch,
        "prompts": len(workload.prompts),
        "mean_prompt_tokens": prompt_tokens / batch,
        "new_tokens": workload.new_tokens,
        "warm_up": warm_up,
        "time_to_first_token": dataclasses.asdict(first) if batch == 1 else None,
        "time_per_output_token": None if per_token is None else dataclasses.asdict(per_token),
        "latency": dataclasses.asdict(whole),
        "output_tokens_per_second": batch * workload.new_tokens / whole.median,
        "prefill_tokens_per_second": prompt_tokens / first.median,
        "decode_tokens_per_second": None if per_token is None else decoded / (whole.median - first.median),
        "memory_bytes": decode_memory(model, batch, max(map(len, workload.prompts)) + workload.new_tokens),
        "flops_per_token": flops_per_token(model.config, context),
        "bytes_per_token": bytes_per_token(model.config, context, batch, model.embed_tokens[...].dtype.itemsize),
        "energy_per_token": None,
        "net_energy_per_token": None,
    }
    if energy is not None:
        tokens = repeats * len(groups) * batch * workload.new_tokens
        found["energy_per_token"] = energy.joules / tokens
        if idle_watts is not None:
            found["net_energy_per_token"] = (energy.joules - idle_watts * energy.seconds) / tokens
    return found


def _groups(prompts: Sequence[Sequence[int]], batch: int) -> list[list[Sequence[int]]]:
    count = math.ceil(len(prompts) / batch)
    return [[prompts[(number * batch + i) % len(prompts)] for i in range(batch)] for number in range(count)]


def decode_memory(model: Llama, batch: int, longest: int) -> int | None:
    """Bytes of one device that the decode program holds, by the compiler; None where it does not say."""
    config, params = model.config, nnx.state(model, nnx.Param)
    dtype = model.embed_tokens[...].dtype
    mesh = mesh_of(model)
    slots = math.ceil(batch / shape_of(mesh).data) * shape_of(mesh).data  # as many in each replica
    with on(mesh):
        state = jax.eval_shape(lambda: empty_state(config, slots, slots_for(longest), dtype))
        sampling = Sampling(np.full(8, -1, np.int32), np.float32(0), np.float32(1), np.uint32(0))
        analysis = decode.lower(config, params, state, sampling, None).compile().memory_analysis()
    if analysis is None:
        return None
    held = analysis.argument_size_in_bytes + analysis.output_size_in_bytes + analysis.temp_size_in_bytes
    return int(held - analysis.alias_size_in_bytes)


# -------------------------------------------------------------------------------------------------------- showing


def _print(report: dict[str, Any]) -> None:
    console = Console(highlight=False, soft_wrap=True, emoji=False)
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


if __name__ == "__main__":
    sys.exit(main())

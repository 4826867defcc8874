"""What `gluprune evaluate` does once it has been understood: see `evals.__main__`."""

import dataclasses
import json
from typing import Any

import jax

import convert
from convert.chat import fix_date, parse_date
from convert.tokenizer import load_tokenizer, tokens_beyond
from evals.__main__ import EvaluateRequest
from evals.cli import options as eval_options
from evals.cli.tables import format_value, results_json, results_table
from evals.harness.footprint import evaluation_uses
from evals.harness.suites import choose_benchmarks, find_suite, with_num_fewshot
from evals.results.describe import describe_setting
from evals.results.setting import GIVEN, Setting
from evals.results.store import Result, SettingResults, check_output, open_setting, recorded_dates
from gluprune_jax.cli import terminal
from gluprune_jax.cli.memory import show_plan
from gluprune_jax.errors import RequestError, check_at_least
from gluprune_jax.memory.mesh_choice import mesh_chooser
from gluprune_jax.memory.plan import Evaluation
from gluprune_jax.parallel.distributed import check_same, is_main, synchronize_errors
from gluprune_jax.pruning.plan import PruningPlan
from gluprune_jax.pruning.scores import fingerprint


def evaluate_model(request: EvaluateRequest, command: str) -> None:
    """Asks the model all benchmarks, stores the results, and shows their table; `command` is kept with each.

    Raises:
      RequestError, OperationError: it cannot be done as asked, or something underneath failed.
    """
    with synchronize_errors():
        _check_request(request)
        eval_options.check_installed()
        plan = None if request.plan is None else PruningPlan.load(request.plan)
        if plan is not None:
            plan.check_maskable()
        if request.dry_run:
            _show_memory(request)
    if request.dry_run:
        return
    check_same(f"--plan {request.plan}", [] if plan is None else [plan.to_json().encode()])
    _run(request, plan, command)


def _check_request(request: EvaluateRequest) -> None:
    """Refuses early what could only fail late."""
    check_at_least(0, num_fewshot=request.num_fewshot)
    check_at_least(1, batch_size=request.batch_size)
    check_at_least(2, context_length=request.context_length)
    if request.chat_template is not None and not request.apply_chat_template:
        raise RequestError(
            f"--chat-template {request.chat_template} says which template to apply, and none is applied; give "
            f"--apply-chat-template too, or leave it out"
        )
    if request.thinking is not None and not request.apply_chat_template:
        raise RequestError(
            f"--thinking {request.thinking} is a mode of the chat template, and none is applied; give "
            f"--apply-chat-template too, or leave it out"
        )
    eval_options.check_include_path(request.include_path)
    if is_main():
        check_output(request.output)


def _run(request: EvaluateRequest, plan: PruningPlan | None, command: str) -> None:
    from evals.harness.backend import GlupruneLM
    from evals.harness.run import evaluate, load_benchmarks

    with synchronize_errors():
        benchmarks, manager = choose_benchmarks(request.suite, request.tasks, request.include_path)
        if request.num_fewshot is not None:
            benchmarks = with_num_fewshot(benchmarks, request.num_fewshot)
        names = [benchmark.name for benchmark in benchmarks]
        limits = eval_options.parse_limit(request.limit, names)
        suite_limit = find_suite(request.suite).limit if request.suite and limits is None else None
        benchmark_data = eval_options.data_folder(request.benchmark_data)
        with terminal.count_progress("loading the data", len(benchmarks), "benchmarks") as progress:
            loaded = load_benchmarks(
                benchmarks, manager, benchmark_data=benchmark_data, note=terminal.note, on_loaded=progress
            )
    eval_options.use_compilation_cache()
    checkpoint, setting = _load_model(request, plan)
    with open_setting(request.output, setting, resume=request.resume) as folder:
        GlupruneLM.progress = staticmethod(terminal.count_progress)
        lm = GlupruneLM.from_checkpoint(
            checkpoint,
            neuron_masks=None if plan is None else plan.masks(checkpoint.config),
            batch_size=request.batch_size,
            context_length=request.context_length,
            date=None if setting.date is None else parse_date(setting.date),
            # No BOS is the paper's protocol; `describe_setting` records which.
            add_bos_token=checkpoint.family.needs_bos,
            journal=folder.journal,
            note=terminal.note,
            chat_template=request.chat_template,
            thinking=request.thinking,
        )
        results = []
        about = {
            "command": command,
            "revision": request.revision,
            "data": request.benchmark_data,
            "batch_size": request.batch_size,
        }
        for result in evaluate(
            lm,
            loaded,
            limit={
                one.benchmark.name: suite_limit if limits is None else eval_options.items_per_task(limits, one, loaded)
                for one in loaded
            },
            apply_chat_template=request.apply_chat_template,
            journal=folder.journal,
            about=about,
        ):
            results.append(folder.save(result))
            _report(results[-1], setting)
    finished = [SettingResults(folder.path, setting, tuple(results))]
    if request.json:
        print(json.dumps(results_json(finished)[0], indent=1))
    else:
        terminal.console().print(results_table(finished))


def _load_model(request: EvaluateRequest, plan: PruningPlan | None) -> tuple[convert.Checkpoint, Setting]:
    with terminal.byte_progress() as progress:
        checkpoint = convert.load(
            request.model,
            dtype=request.dtype,
            revision=request.revision,
            mesh=mesh_chooser(request.devices, _uses(request)),
            progress=progress,
        )
        for note in checkpoint.notes:
            terminal.note(note)
        tokenizer = load_tokenizer(checkpoint, request.chat_template, request.thinking)
        if beyond := tokens_beyond(tokenizer, checkpoint.config.vocab_size):
            terminal.note(beyond)
        setting = describe_setting(
            checkpoint,
            tokenizer,
            plan=plan,
            context_length=request.context_length,
            apply_chat_template=request.apply_chat_template,
            progress=progress,
        )
    setting = _dated(setting, tokenizer if request.apply_chat_template else None, request)
    if plan is not None:
        plan.check_fits(checkpoint.config, fingerprint(checkpoint.model))
    if setting.dtype != "float32" and jax.default_backend() == "cpu":
        terminal.note(
            f"the weights are {setting.dtype}, in which CPUs compute slowly; --dtype float32 is faster and more exact"
        )
    return checkpoint, setting


def _dated(setting: Setting, tokenizer: Any | None, request: EvaluateRequest) -> Setting:
    """The setting on the day that its prompts name, if they name one: asked for, that of an earlier run, or today."""
    recorded = recorded_dates(request.output, setting) if is_main() and request.date is None else {}
    setting = setting.on(fix_date(tokenizer, request.date, recorded, terminal.note))
    if request.date is None or setting.date is None:
        return setting
    return dataclasses.replace(setting, about={**setting.about, "date": GIVEN})


def _uses(request: EvaluateRequest) -> list[Evaluation]:
    return evaluation_uses(request.batch_size, request.context_length, request.devices.device_memory)


def _show_memory(request: EvaluateRequest) -> None:
    model = convert.describe(request.model, dtype=request.dtype, revision=request.revision)
    size = request.devices.capacity()
    memory = request.devices.plan(model, _uses(request), size)
    if not request.json:
        show_plan(memory, size, terminal.console())
    request.devices.check(model, memory, size)
    if request.json:
        print(json.dumps({"model": request.model, "memory": memory.summary(size)}, indent=1))


def _report(result: Result, setting: Setting) -> None:
    terminal.note(
        f"{result.title}: {result.metric} {format_value(result)} ({result.num_items:,} items, {result.seconds:.1f} s)"
    )
    if result.truncated:
        terminal.note(
            f"{result.truncated:,} of {result.requests:,} contexts were longer than the window of "
            f"{setting.decides['window']} tokens; they were cut on the left"
        )

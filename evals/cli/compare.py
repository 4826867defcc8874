"""What `gluprune compare` does once it has been understood: see `evals.compare`."""

import csv
import dataclasses
import functools
import hashlib
import importlib.metadata
import importlib.util
import io
import json
import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.table import Table

import convert
from convert.calibration_text import calibration_windows
from convert.chat import fix_date
from convert.pypi import cache_folder
from convert.tokenizer import beginning, check_ids, encode_text, load_tokenizer, tokens_beyond
from evals.cli import options as eval_options
from evals.cli.overview import captions, is_single_size, overview
from evals.compare import FORMAT, PLOT_FILES, RESULTS_FILE, TABLE_FILE, VERSION, CompareRequest
from evals.harness.suites import choose_benchmarks
from evals.perplexity import perplexity, spelled_beginning
from evals.study.grid import Chooses, Grid, parse_methods, sizes
from evals.study.rows import ResumableRows, check_rows, check_texts, recorded_dates
from evals.study.samples import PROMPT_TOKENS, Sampler
from gluprune_jax.cli import method_options, terminal
from gluprune_jax.data.documents import contents, evaluation_text, read_calibration
from gluprune_jax.errors import RequestError, check_at_least
from gluprune_jax.files.atomic import check_file, write_file_atomic
from gluprune_jax.memory.mesh_choice import mesh_chooser
from gluprune_jax.memory.plan import Evaluation
from gluprune_jax.models.parameters import checksum
from gluprune_jax.parallel.distributed import check_same, is_main, synchronize_errors
from gluprune_jax.pruning import methods
from gluprune_jax.pruning.chooser import Chooser
from gluprune_jax.pruning.methods import Method, Pruned
from gluprune_jax.pruning.plan import check_targets
from gluprune_jax.pruning.scores import fingerprint
from gluprune_jax.pruning.statistics import describe_windows

_PERPLEXITY = "token perplexity of "
_WORST = "perplexity over that of the dense model, on the text where it rose most"


def compare(request: CompareRequest) -> None:
    """Prunes the model in all ways, measures each, and writes and shows the tables.

    Raises:
      RequestError, OperationError: it cannot be done as asked, or something underneath failed.
    """
    wanted = parse_methods(request.methods, request.min_keep)
    targets = sizes(
        multiple_of=request.multiple_of,
        prune_percent=request.prune_percent,
        expansion_ratio=request.expansion_ratio,
        width=request.width,
    )
    given = request.calibration
    request = dataclasses.replace(request, calibration=methods.calibration_texts(wanted, given))
    _check_request(request, wanted, targets)
    method_options.note_own_text(given, request.calibration)
    path = None if request.output is None else request.output / RESULTS_FILE
    with synchronize_errors():
        if is_main() and request.output is not None:
            _check_output(request.output, request.overwrite)
        if is_main() and request.resume:
            check_rows(path)
        if is_main() and not request.overwrite:
            check_texts(path, request.calibration)
        tasks, limits = None, None
        if request.tasks is not None:
            eval_options.check_installed()
            tasks = choose_benchmarks(None, request.tasks)
            limits = eval_options.parse_limit(request.limit, [benchmark.name for benchmark in tasks[0]])
        texts = {name: evaluation_text(name, terminal.note) for name in request.eval_data}
        documents = read_calibration(request.calibration, "--calibration-data", terminal.note)
    check_same("the texts of --eval-data", (text.encode() for text in texts.values()))
    check_same("the texts of --calibration-data", contents(documents))
    with terminal.byte_progress() as progress:
        checkpoint = convert.load(
            request.model,
            dtype=request.dtype,
            revision=request.revision,
            mesh=mesh_chooser(request.devices, [_use(request)]),
            progress=progress,
        )
    if request.by_layer:
        targets = [{**target, "layers": (i,)} for target in targets for i in range(checkpoint.config.num_hidden_layers)]
    has_chats = any(document.kind == "chat" for document in documents)
    with synchronize_errors():
        tokenizer = load_tokenizer(checkpoint, request.chat_template) if has_chats else None
    date = fix_date(tokenizer, request.date, recorded_dates(path), terminal.note)
    with synchronize_errors():
        windows = None
        if documents:
            windows = calibration_windows(
                checkpoint,
                documents,
                tokens=request.calibration_tokens,
                sequence_length=request.sequence_length,
                chat_template=request.chat_template,
                date=date,
                progress=terminal.count_progress,
            )
        check_targets(checkpoint.config, targets)
    meter = _Meter(request, checkpoint, texts, tasks, limits)
    chooser = Chooser(
        checkpoint.model,
        checkpoint.mlp_weights,
        windows=windows,
        names=request.calibration,
        date=date,
        refits=any(method.needs_grams for method in wanted),
        cache=cache_folder(),
        progress=terminal.count_progress,
    )
    results = ResumableRows.open(
        path,
        {
            "format": FORMAT,
            "version": VERSION,
            "model": request.model,
            "weights": [fingerprint(checkpoint.model), checksum(checkpoint.model, mlps=False), request.dtype],
            "gluprune_jax": importlib.metadata.version("gluprune-jax"),
            "data_dir": request.benchmark_data,
            "calibration": None if windows is None else describe_windows(windows, request.calibration, date),
            "evaluation": meter.about(),
            "multiple_of": request.multiple_of,
            "floor": request.min_keep,
            "by_layer": request.by_layer,
        },
        is_row=_is_row,
        overwrite=request.overwrite,
        optional=("calibration",),
        resume=request.resume,
    )
    grid = Grid(wanted, targets, {"method": "dense", "target": None, "seed": None}, "target", request.seeds)
    for row in run(grid, chooser, meter, results):
        if not request.json:
            terminal.note(_sentence(row))
    report = results.document
    if request.output is not None:
        with synchronize_errors():
            if is_main():
                _write_tables(report, request.output)
    if request.json:
        print(json.dumps(report, indent=1))
    else:
        console = terminal.console()
        for table in shown_tables(report):
            console.print(table)
        for caption in captions(report, checkpoint.notes):
            console.print(caption, style="dim", markup=False)


def _write_tables(report: Mapping[str, Any], folder: Path) -> None:
    write_file_atomic(folder / TABLE_FILE, as_csv(report).encode(), overwrite=True)
    if importlib.util.find_spec("altair") and importlib.util.find_spec("vl_convert"):
        from evals.report.drawing import drawings

        drawn = drawings(plot(report))
        for name in PLOT_FILES:
            write_file_atomic(folder / name, drawn[name.rpartition(".")[2]], overwrite=True)
    else:
        terminal.note("no plot, for it needs Altair and vl-convert: pip install 'gluprune-jax[study]'")


# ------------------------------------------------------------------------------------------------- what is asked


def _check_request(request: CompareRequest, wanted: Sequence[Method], targets: Sequence[Mapping[str, Any]]) -> None:
    if not request.eval_data and request.tasks is None:
        raise RequestError("nothing to measure: give --evaluate, --eval-data TEXT or --tasks LIST")
    if request.tasks is None and (request.limit is not None or request.benchmark_data is not None):
        raise RequestError("--limit and --benchmark-data are of benchmarks; give --tasks LIST too")
    check_at_least(2, eval_tokens=request.eval_tokens, sequence_length=request.sequence_length)
    check_at_least(1, seeds=request.seeds, multiple_of=request.multiple_of, sample_tokens=request.sample_tokens)
    _check_tasks_for(request.tasks_for, request.tasks, wanted)
    if request.sample is None and request.sample_tokens != 64:
        raise RequestError("--sample-tokens is of an answer; give --sample PROMPT too")
    if request.chat_template is not None and not request.calibration:
        raise RequestError("--chat-template has no effect; give --calibration-data with conversations, or leave it out")
    if request.by_layer and len(targets) > 1:
        raise RequestError("--by-layer prunes each layer to one size; give a single one")
    if request.by_layer and (uneven := [str(method) for method in wanted if method.allocation != "uniform"]):
        raise RequestError(f"--by-layer prunes one layer at a time, and {uneven[0]} divides a budget over several")
    method_options.check_calibration(request, wanted)


def _check_tasks_for(methods: Sequence[str] | None, tasks: str | None, wanted: Sequence[Method]) -> None:
    """Refuses `--tasks-for` without benchmarks, and methods that are not compared."""
    if methods is None:
        return
    if tasks is None:
        raise RequestError("--tasks-for chooses who is asked the benchmarks; give --tasks LIST too")
    if strange := [name for name in methods if name not in map(str, wanted)]:
        raise RequestError(f"--tasks-for has {strange[0]!r}; --methods has {', '.join(map(str, wanted))}")


def _check_output(folder: Path, overwrite: bool) -> None:
    """Refuses what could not be written, and files that are of no comparison."""
    for name in (RESULTS_FILE, TABLE_FILE, *PLOT_FILES):
        file = check_file(folder / name, overwrite=True)
        if file.exists() and not (overwrite or (folder / RESULTS_FILE).exists()):
            raise RequestError(f"{file} is there, and no {RESULTS_FILE} that it could be of; choose another --output")


def _use(request: CompareRequest) -> Evaluation:
    on_cpu = request.devices.device_memory is None and jax.default_backend() == "cpu"
    decoded = 0 if request.sample is None else PROMPT_TOKENS + request.sample_tokens
    return Evaluation(cached=max(request.sequence_length, decoded), decoded=decoded, slots=1, on_cpu=on_cpu)


# -------------------------------------------------------------------------------------------------------------- rows


def _is_row(number: int, row: Any) -> bool:
    """Whether a row of a file is one that could have been written there: the dense model's comes first."""
    if not isinstance(row, dict) or not isinstance(row.get("method"), str) or not {"target", "seed"} <= row.keys():
        return False
    perplexities, benchmarks = row.get("perplexity"), row.get("benchmarks", {})
    if (row["method"] == "dense") != (number == 0):
        return False
    if not isinstance(perplexities, dict) or not isinstance(benchmarks, dict):
        return False
    if not isinstance(row.get("answer", ""), str):
        return False
    values = [row.get("expansion_ratio"), *perplexities.values()]
    for about in benchmarks.values():
        if not isinstance(about, dict) or not {"metric", "items", "value"} <= about.keys():
            return False
        values += [about["value"], about.get("chance", 0.0)]
    return all(isinstance(value, float) and math.isfinite(value) for value in values)


def run(grid: Grid, chooser: Chooses, meter: "_Meter", results: ResumableRows) -> Iterator[Mapping[str, Any]]:
    """Measures what is not in `results` yet, and yields each row as it is added; the dense model comes first."""
    for key, target, pruned in grid.missing(chooser, results):
        about: dict[str, Any] = {"expansion_ratio": meter.expansion_ratio(pruned)}
        if pruned is not None:
            about |= {"widths": list(pruned.plan.widths), **pruned.record()}
            if "layers" in target:
                about["layer"] = target["layers"][0]
        results.add({**key, **about, **meter.measure(str(key["method"]), pruned)})
        yield results.document["rows"][-1]


class _Meter:
    """What is measured of each model."""

    def __init__(
        self,
        request: CompareRequest,
        checkpoint: convert.Checkpoint,
        texts: Mapping[str, str],
        tasks: Any | None,
        limits: Mapping[str, eval_options.Limit] | None,
    ) -> None:
        self._request, self._checkpoint, self._tasks, self._limits = request, checkpoint, tasks, limits
        tokenizer = load_tokenizer(checkpoint)
        self._sampler = None
        if request.sample is not None:
            self._sampler = Sampler(
                checkpoint, request.sample, max_new_tokens=request.sample_tokens, progress=terminal.count_progress
            )
        if beyond := tokens_beyond(tokenizer, checkpoint.config.vocab_size):
            terminal.note(beyond)
        self._begin = beginning(checkpoint, tokenizer)
        self._tokens = {name: encode_text(tokenizer, text)[: request.eval_tokens] for name, text in texts.items()}
        for tokens in self._tokens.values():
            check_ids(tokenizer, tokens, checkpoint.config.vocab_size)

    def about(self) -> dict[str, Any]:
        """Definitions of what is measured."""
        window = self._request.sequence_length
        described = {
            name: f"token perplexity of {name} (first {len(tokens):,} tokens, sha256 "
            f"{hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:12]}): disjoint windows of {window} tokens, "
            f"all but the first of each predicted, {spelled_beginning(self._begin)}"
            for name, tokens in self._tokens.items()
        }
        # One number for all is stored as it always was; others by the names of their benchmarks.
        limits = set((self._limits or {}).values())
        limit = self._limits if len(limits) > 1 else next(iter(limits), None)
        tasks = self._request.tasks and {"tasks": self._request.tasks, "limit": limit}
        about: dict[str, Any] = {"perplexity": described, "benchmarks": tasks}
        # Entries that there were not always: a comparison without them is one of before, and is resumed.
        if self._request.tasks_for is not None:
            about["benchmarks_of"] = list(self._request.tasks_for)
        if self._sampler is not None:
            about["sample"] = {"prompt": self._request.sample, "tokens": self._request.sample_tokens}
        return about

    @functools.cached_property
    def _loaded(self) -> list[Any]:
        """The benchmarks with their data."""
        from evals.harness.run import load_benchmarks

        with synchronize_errors():
            assert self._tasks is not None
            with terminal.count_progress("loading the data", len(self._tasks[0]), "benchmarks") as progress:
                return load_benchmarks(
                    *self._tasks,
                    benchmark_data=eval_options.data_folder(self._request.benchmark_data),
                    note=terminal.note,
                    on_loaded=progress,
                )

    def expansion_ratio(self, pruned: Pruned | None) -> float:
        config = self._checkpoint.config
        widths = config.intermediate_sizes if pruned is None else pruned.plan.widths
        return sum(widths) / len(widths) / config.hidden_size

    def measure(self, method: str, pruned: Pruned | None) -> dict[str, Any]:
        """Perplexities, benchmarks and answer of the dense model (None) or of one pruned by a method."""
        if pruned is not None and not self._request.json:
            for note in pruned.notes():
                terminal.note(f"{method}: {note}")
        config = self._checkpoint.config
        model = self._checkpoint.model if pruned is None else pruned.apply(self._checkpoint.model)
        # Without masks the model runs in the same programs, under masks that keep everything.
        masks = None if pruned is None else pruned.plan.masks(config)
        found: dict[str, Any] = {"perplexity": {}}
        for name, tokens in self._tokens.items():
            with terminal.count_progress("perplexity", len(tokens), "tokens") as progress:
                result = perplexity(
                    model,
                    tokens,
                    sequence_length=self._request.sequence_length,
                    begin=self._begin,
                    neuron_masks=masks,
                    texts=[name],
                    on_tokens=progress,
                )
            found["perplexity"][name] = result.value
        if self._sampler is not None:
            found["answer"] = self._sampler.answer(model, masks)
        asked = self._request.tasks_for is None or pruned is None or method in self._request.tasks_for
        if self._tasks is not None and asked:
            checkpoint = self._checkpoint.with_model(model)
            found["benchmarks"] = _benchmarks(self._loaded, self._limits, checkpoint, masks)
        return found


def _benchmarks(
    loaded: Sequence[Any],
    limits: Mapping[str, eval_options.Limit] | None,
    checkpoint: convert.Checkpoint,
    masks: Any,
) -> dict[str, Any]:
    """The main metric of each benchmark, with its standard error."""
    from evals.harness.backend import GlupruneLM
    from evals.harness.run import evaluate
    from evals.study.baselines import chance_of

    GlupruneLM.progress = staticmethod(terminal.count_progress)
    lm = GlupruneLM.from_checkpoint(checkpoint, neuron_masks=masks, add_bos_token=checkpoint.family.needs_bos)
    found = {}
    for one in loaded:
        limit = eval_options.items_per_task(limits, one, loaded)
        (result,) = evaluate(lm, [one], limit=limit)
        found[result.title] = {"metric": result.metric, "items": result.num_items, **result.metrics[result.metric]}
        if masks is None and (chance := chance_of(one, result.metric, limit=limit)) is not None:
            found[result.title]["chance"] = chance
    return found


# --------------------------------------------------------------------------------------------------------- showing


def summary(report: Mapping[str, Any], value: Callable[[Mapping[str, Any]], float | None]) -> dict[str, dict[str, Any]]:
    """A value by method and target; of several seeds the median."""
    found: dict[str, dict[str, list[float]]] = {}
    for row in report["rows"]:
        number = value(row)
        if row["method"] != "dense" and number is not None:
            found.setdefault(row["method"], {}).setdefault(row["target"], []).append(number)
    return {
        method: {target: statistics.median(values) for target, values in by_target.items()}
        for method, by_target in found.items()
    }


def measures(report: Mapping[str, Any]) -> list[tuple[str, Callable[[Mapping[str, Any]], float | None]]]:
    """What was measured: a title, and how to find it in a row."""

    def of_text(name: str) -> Callable[[Mapping[str, Any]], float | None]:
        return lambda row: row["perplexity"].get(name)

    def of_benchmark(name: str) -> Callable[[Mapping[str, Any]], float | None]:
        return lambda row: row.get("benchmarks", {}).get(name, {}).get("value")

    dense = report["rows"][0]

    def of_worst(row: Mapping[str, Any]) -> float:
        ratios: list[float] = [value / dense["perplexity"][name] for name, value in row["perplexity"].items()]
        return max(ratios)

    texts = [(f"{_PERPLEXITY}{name}", of_text(name)) for name in report["evaluation"]["perplexity"]]
    if len(texts) > 1:
        texts.append((_WORST, of_worst))
    return texts + [
        (f"{name}, {about['metric']} ({about['items']} items)", of_benchmark(name))
        for name, about in dense.get("benchmarks", {}).items()
    ]


def tables(report: Mapping[str, Any]) -> Iterator[Table]:
    """A table for each measure: methods by targets."""
    targets = list(dict.fromkeys(row["target"] for row in report["rows"] if row["target"] is not None))
    for title, value in measures(report):
        dense = value(report["rows"][0])
        assert dense is not None
        digits = 2 if title.startswith((_PERPLEXITY, _WORST)) else 4
        table = Table(title=f"{title} (dense {dense:,.{digits}f})", title_justify="left")
        found = summary(report, value)
        cells = {
            (method, target): "" if number is None else f"{number:,.{digits}f}"
            for method, by_target in found.items()
            for target in targets
            for number in [by_target.get(target)]
        }
        table.add_column("" if report["by_layer"] else "method")
        if report["by_layer"]:  # of layers there are more than fit beside each other
            for method in found:
                table.add_column(_named(report, method), justify="right")
            for target in targets:
                table.add_row(target, *(cells[method, target] for method in found))
        else:
            for target in targets:
                table.add_column(target, justify="right")
            for method in found:
                table.add_row(_named(report, method), *(cells[method, target] for target in targets))
        yield table


def shown_tables(report: Mapping[str, Any]) -> Iterator[Table]:
    """At a single size all of it side by side, else a table for each measure."""
    if not is_single_size(report):
        return tables(report)

    def median(method: str, value: Callable[[Mapping[str, Any]], float | None]) -> float | None:
        found = [value(row) for row in report["rows"] if row["method"] == method]
        numbers = [number for number in found if number is not None]
        return statistics.median(numbers) if numbers else None

    return overview(report, lambda method: _named(report, method), median)


def _named(report: Mapping[str, Any], method: str) -> str:
    seeds = len({row["seed"] for row in report["rows"] if row["method"] == method})
    return f"{method} (median of {seeds})" if seeds > 1 else method


def as_csv(report: Mapping[str, Any]) -> str:
    """Every row and measure as comma-separated values, with a heading."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    found = measures(report)
    writer.writerow(["method", "target", "seed", "expansion_ratio", *(title for title, _ in found)])
    for row in report["rows"]:
        cells = [row[key] for key in ("method", "target", "seed", "expansion_ratio")]
        writer.writerow([*cells, *(value(row) for _, value in found)])
    return buffer.getvalue()


def plot(report: Mapping[str, Any]) -> dict[str, Any]:
    """Each measure against the expansion ratio or the layer, a line a method; perplexities on a log axis. Vega-Lite."""
    from evals.report.comparison import Panel, comparison

    rows, by_layer = report["rows"], report["by_layer"]
    places = {row["target"]: row["layer"] if by_layer else row["expansion_ratio"] for row in rows if row["target"]}
    model = Path(report["model"]).name
    panels = []
    for title, value in measures(report):
        dense = value(rows[0])
        assert dense is not None
        points = [
            {"method": _named(report, method), "place": places[target], "value": number}
            for method, by_target in summary(report, value).items()
            for target, number in by_target.items()
        ]
        is_perplexity = title.startswith(_PERPLEXITY)
        what = f"perplexity of {Path(title.removeprefix(_PERPLEXITY)).name}" if is_perplexity else title
        panels.append(Panel(f"{model}: {what}", dense, points, is_perplexity))
    return comparison(panels, by_layer=by_layer)


def _sentence(row: Mapping[str, Any]) -> str:
    seed = "" if row["seed"] is None else f" (seed {row['seed']})"
    values = [f"perplexity of {name} {value:,.2f}" for name, value in row["perplexity"].items()]
    values += [f"{name} {about['value']:.4f}" for name, about in row.get("benchmarks", {}).items()]
    return f"{row['method']}{seed}{'' if row['target'] is None else ', ' + row['target']}: {', '.join(values)}"

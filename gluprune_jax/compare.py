"""Compares ways to prune one model: `python -m gluprune_jax.compare`."""

import argparse
import csv
import dataclasses
import hashlib
import importlib
import importlib.metadata
import importlib.util
import io
import json
import math
import statistics
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from rich.console import Console
from rich.table import Table

import convert
from convert.store import DTYPE_NAMES, MODEL_HELP
from convert.tokenizer import encode_text, load_tokenizer
from evals.__main__ import check_installed, data_folder
from evals.perplexity import perplexity
from evals.suites import choose_benchmarks
from gluprune_jax import devices, method_options, methods, terminal
from gluprune_jax.activation_statistics import describe_windows
from gluprune_jax.allocation import FLOOR
from gluprune_jax.atomic import check_file, write_file_atomic
from gluprune_jax.criteria import find_criterion, inputs_of
from gluprune_jax.distributed import check_same, failing_together, is_main
from gluprune_jax.documents import DATA_HELP, evaluation_text, read_documents
from gluprune_jax.errors import RequestError
from gluprune_jax.importance import fingerprint
from gluprune_jax.memory import Evaluation
from gluprune_jax.methods import Method, Pruned
from gluprune_jax.plan import TARGETS, check_targets, spell_target, target_width
from gluprune_jax.rows import Rows
from gluprune_jax.trainable import checksum

RESULTS_FILE, TABLE_FILE = "comparison.json", "comparison.csv"
PLOT_FILES = ("comparison.png", "comparison.svg")
FORMAT, VERSION = "gluprune-comparison", 1

DESCRIPTION = """\
Prunes one model in several ways to several sizes, and compares the perplexities (and benchmarks) of all of them.
Nothing is sliced: neurons are scored once, each choice is a mask of the same compiled programs. A method is a
criterion, and behind it what else is done: hybrid, ppm+least-squares, hybrid+global+least-squares+in-order.

With --output, each model's numbers are written down as soon as they are known; the same command goes on from there.

examples:
  python -m gluprune_jax.compare --model demo --methods ppm l2 random --prune-percent 10 20 40 \\
      --evaluate python-reference
  python -m gluprune_jax.compare --model demo --methods ppm hybrid hybrid+least-squares --prune-percent 20 40 \\
      --calibration corpus.txt --evaluate held-out.txt --tasks piqa --limit 100 --data-dir demo --output comparison
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = terminal.ArgumentParser("python -m gluprune_jax.compare", DESCRIPTION)
    parser.add_argument("--model", required=True, metavar="MODEL", help=MODEL_HELP)
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id")
    parser.add_argument("--dtype", choices=DTYPE_NAMES, help="cast all weights as they are read")
    ways = parser.add_argument_group("what is compared")
    ways.add_argument("--methods", nargs="+", required=True, metavar="METHOD", help="see above")
    targets = ways.add_mutually_exclusive_group(required=True)
    targets.add_argument("--prune-percent", type=float, nargs="+", metavar="P", help="shares of the neurons to remove")
    targets.add_argument("--expansion-ratio", nargs="+", metavar="R", help="intermediate size over hidden size")
    targets.add_argument("--width", type=int, nargs="+", metavar="N", help="neurons kept in each layer")
    ways.add_argument("--multiple-of", type=int, default=1, metavar="M", help="floor widths to a multiple of M")
    ways.add_argument(
        "--floor", type=float, default=FLOOR, metavar="X", help="the least share a layer keeps, if they differ"
    )
    ways.add_argument("--by-layer", action="store_true", help="prune each layer alone: which layers a method harms")
    ways.add_argument("--seeds", type=int, default=5, metavar="N", help="of random neurons; tables show the median")
    method_options.add_calibration_arguments(parser)
    measure = parser.add_argument_group("what is measured")
    measure.add_argument("--evaluate", nargs="+", metavar="TEXT", default=[], help=f"token perplexity of: {DATA_HELP}")
    measure.add_argument("--evaluate-tokens", type=int, default=8192, metavar="N", help="tokens of each text to use")
    measure.add_argument("--window", type=int, default=512, metavar="N", help="tokens a perplexity window holds")
    measure.add_argument("--tasks", metavar="LIST", help="benchmarks, as for python -m evals")
    measure.add_argument("--limit", type=int, metavar="N", help="the first N items of each task")
    measure.add_argument("--data-dir", metavar="DIR", help="data of the benchmarks, as for python -m evals")
    output = parser.add_argument_group("what to write")
    output.add_argument(
        "--output", type=Path, metavar="DIR", help=f"folder for {RESULTS_FILE}, {TABLE_FILE} and {PLOT_FILES[0]}"
    )
    output.add_argument("--overwrite", action="store_true", help=f"start anew where DIR has another {RESULTS_FILE}")
    output.add_argument("--json", action="store_true", help="print one JSON document instead of tables")
    devices.add_arguments(parser, "as many replicas as fit")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit status."""
    args = parser().parse_args(sys.argv[1:] if argv is None else argv)
    return terminal.run("gluprune-compare", lambda: _compare(args), debug=args.debug, processes=args)


def _compare(args: argparse.Namespace) -> None:
    wanted = [Method.parse(text, floor=args.floor) for text in args.methods]
    targets = _targets(args)
    _check_request(args, wanted, targets)
    with failing_together():
        if is_main() and args.output is not None:
            _check_output(args.output, args.overwrite)
        tasks = None
        if args.tasks is not None:
            check_installed()
            tasks = choose_benchmarks(None, args.tasks)
        texts = {name: evaluation_text(name) for name in args.evaluate}
        documents = [document for name in args.calibration or () for document in read_documents(name, "--calibration")]
    check_same("the texts of --evaluate", (text.encode() for text in texts.values()))
    check_same("the texts of --calibration", (json.dumps(document).encode() for document in documents))
    with terminal.byte_progress() as progress:
        checkpoint = convert.load(
            args.model,
            dtype=args.dtype,
            revision=args.revision,
            mesh=devices.chooses(args, [_use(args)]),
            progress=progress,
        )
    if args.by_layer:
        targets = [{**targets[0], "layers": (i,)} for i in range(checkpoint.config.num_hidden_layers)]
    with failing_together():
        windows = method_options.calibration_windows(checkpoint, documents, args) if documents else None
        check_targets(checkpoint.config, targets)
    meter = _Meter(args, checkpoint, texts, tasks)
    chooser = methods.Chooser(
        checkpoint.model,
        checkpoint.mlp_weights,
        windows=windows,
        names=args.calibration or (),
        refits=any(method.needs_grams for method in wanted),
    )
    results = Rows.open(
        None if args.output is None else args.output / RESULTS_FILE,
        {
            "format": FORMAT,
            "version": VERSION,
            "model": args.model,
            "weights": [fingerprint(checkpoint.model), checksum(checkpoint.model, mlps=False), args.dtype],
            "gluprune_jax": importlib.metadata.version("gluprune-jax"),
            "data_dir": args.data_dir,
            "calibration": None if windows is None else describe_windows(windows, args.calibration),
            "evaluation": meter.about(),
            "multiple_of": args.multiple_of,
            "floor": args.floor,
            "by_layer": args.by_layer,
        },
        is_row=_is_row,
        overwrite=args.overwrite,
        optional=("calibration",),
    )
    for row in run(wanted, targets, args.seeds, chooser, meter, results):
        if not args.json:
            terminal.stderr().print(f"note: {_sentence(row)}", style="dim", markup=False)
    report = results.document
    if args.output is not None:
        with failing_together():
            if is_main():
                _write_tables(report, args.output)
    if args.json:
        print(json.dumps(report, indent=1))
    else:
        console = Console(highlight=False, soft_wrap=True, emoji=False)
        for table in tables(report):
            console.print(table)
        for definition in report["evaluation"]["perplexity"].values():
            console.print(definition, style="dim", markup=False)


def _write_tables(report: Mapping[str, Any], folder: Path) -> None:
    write_file_atomic(folder / TABLE_FILE, as_csv(report).encode(), overwrite=True)
    if importlib.util.find_spec("matplotlib"):
        for name in PLOT_FILES:
            plot(report, folder / name)
    else:
        terminal.stderr().print("note: no plot, for it needs matplotlib: pip install 'gluprune-jax[plots]'")


# ------------------------------------------------------------------------------------------------- what is asked


def _targets(args: argparse.Namespace) -> list[dict[str, Any]]:
    (kind,) = (name for name in TARGETS if getattr(args, name) is not None)
    targets = [{kind: value, "multiple_of": args.multiple_of} for value in getattr(args, kind)]
    for value in getattr(args, kind):
        target_width(100, 100, **{kind: value})  # what is no such number is refused before a model is loaded
    return targets


def _check_request(args: argparse.Namespace, wanted: Sequence[Method], targets: Sequence[Mapping[str, Any]]) -> None:
    if not args.evaluate and args.tasks is None:
        raise RequestError("nothing to measure: give --evaluate TEXT or --tasks LIST")
    if args.tasks is None and (args.limit is not None or args.data_dir is not None):
        raise RequestError("--limit and --data-dir are of benchmarks; give --tasks LIST too")
    for flag, least in (("evaluate_tokens", 2), ("window", 2), ("seeds", 1), ("multiple_of", 1), ("limit", 1)):
        value = getattr(args, flag)
        if value is not None and value < least:
            raise RequestError(f"--{flag.replace('_', '-')} is {value}; it must be at least {least}")
    if doubled := [text for text in args.methods if args.methods.count(text) > 1]:
        raise RequestError(f"--methods has {doubled[0]} twice; give each once")
    spelled = [spell_target(target) for target in targets]
    if doubled := [text for text in spelled if spelled.count(text) > 1]:
        raise RequestError(f"{doubled[0]} is asked for twice; give each size once")
    if args.by_layer and len(targets) > 1:
        raise RequestError("--by-layer prunes each layer to one size; give a single one")
    if args.by_layer and (uneven := [str(method) for method in wanted if method.allocation != "uniform"]):
        raise RequestError(f"--by-layer prunes one layer at a time, and {uneven[0]} divides a budget over several")
    method_options.check_calibration_request(args, wanted)


def _check_output(folder: Path, overwrite: bool) -> None:
    """Refuses what could not be written, and files that are of no comparison."""
    for name in (RESULTS_FILE, TABLE_FILE, *PLOT_FILES):
        file = check_file(folder / name, overwrite=True)
        if file.exists() and not (overwrite or (folder / RESULTS_FILE).exists()):
            raise RequestError(f"{file} is there, and no {RESULTS_FILE} that it could be of; choose another --output")


def _use(args: argparse.Namespace) -> Evaluation:
    on_cpu = args.device_memory is None and jax.default_backend() == "cpu"
    return Evaluation(cached=args.window, decoded=0, slots=1, on_cpu=on_cpu)


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
    values = [row.get("expansion_ratio"), *perplexities.values()]
    for about in benchmarks.values():
        if not isinstance(about, dict) or not {"metric", "items", "value"} <= about.keys():
            return False
        values.append(about["value"])
    return all(isinstance(value, float) and math.isfinite(value) for value in values)


def run(
    wanted: Sequence[Method],
    targets: Sequence[Mapping[str, Any]],
    seeds: int,
    chooser: methods.Chooser,
    meter: "_Meter",
    results: Rows,
) -> Iterator[Mapping[str, Any]]:
    """Measures what is not in `results` yet, and yields each row as it is added; the dense model comes first."""
    dense = {"method": "dense", "target": None, "seed": None}
    if results.find(dense) is None:
        results.add({**dense, "expansion_ratio": meter.expansion_ratio(None), **meter.measure(None)})
        yield results.document["rows"][-1]
    for method in wanted:
        draws = "key" in inputs_of(find_criterion(method.criterion)[1])
        for seed in range(seeds) if draws else (None,):
            keys = [{"method": str(method), "target": spell_target(target), "seed": seed} for target in targets]
            missing = [number for number, key in enumerate(keys) if results.find(key) is None]
            seeded = dataclasses.replace(method, seed=seed or 0)
            # In order, nothing is shared between targets: each is written down before the next is computed.
            batches = [[number] for number in missing] if method.in_order else [missing] * bool(missing)
            for batch in batches:
                for number, pruned in zip(batch, chooser.choose(seeded, [targets[n] for n in batch]), strict=True):
                    about = {"expansion_ratio": meter.expansion_ratio(pruned), "widths": list(pruned.plan.widths)}
                    if "layers" in targets[number]:
                        about["layer"] = targets[number]["layers"][0]
                    results.add({**keys[number], **about, **pruned.record(), **meter.measure(pruned)})
                    yield results.document["rows"][-1]


class _Meter:
    """What is measured of each model."""

    def __init__(
        self, args: argparse.Namespace, checkpoint: convert.Checkpoint, texts: Mapping[str, str], tasks: Any | None
    ):
        self._args, self._checkpoint, self._tasks = args, checkpoint, tasks
        tokenizer = load_tokenizer(checkpoint)
        self._tokens = {name: encode_text(tokenizer, text)[: args.evaluate_tokens] for name, text in texts.items()}

    def about(self) -> dict[str, Any]:
        """Definitions of what is measured."""
        window = self._args.window
        described = {
            name: f"token perplexity of {name} (first {len(tokens):,} tokens, sha256 "
            f"{hashlib.sha256(json.dumps(tokens).encode()).hexdigest()[:12]}): disjoint windows of {window} tokens, "
            f"all but the first of each predicted, no BOS added"
            for name, tokens in self._tokens.items()
        }
        tasks = self._args.tasks and {"tasks": self._args.tasks, "limit": self._args.limit}
        return {"perplexity": described, "benchmarks": tasks}

    def expansion_ratio(self, pruned: Pruned | None) -> float:
        config = self._checkpoint.config
        widths = config.intermediate_sizes if pruned is None else pruned.plan.widths
        return sum(widths) / len(widths) / config.hidden_size

    def measure(self, pruned: Pruned | None) -> dict[str, Any]:
        """Perplexities and benchmarks of the dense model (None) or of a pruned one."""
        config = self._checkpoint.config
        model = self._checkpoint.model if pruned is None else pruned.apply(self._checkpoint.model)
        # Without masks the model runs in the same programs, under masks that keep everything.
        masks = None if pruned is None else pruned.plan.masks(config)
        found: dict[str, Any] = {"perplexity": {}}
        for name, tokens in self._tokens.items():
            with terminal.count_progress("perplexity", len(tokens), "tokens") as progress:
                result = perplexity(
                    model, tokens, window=self._args.window, neuron_masks=masks, texts=[name], on_tokens=progress
                )
            found["perplexity"][name] = result.value
        if self._tasks is not None:
            checkpoint = dataclasses.replace(self._checkpoint, model=model)
            found["benchmarks"] = _benchmarks(self._args, self._tasks, checkpoint, masks)
        return found


def _benchmarks(args: argparse.Namespace, tasks: Any, checkpoint: convert.Checkpoint, masks: Any) -> dict[str, Any]:
    """The main metric of each benchmark, with its standard error."""
    from evals.backend import GlupruneLM
    from evals.run import evaluate, load_benchmarks

    with failing_together():
        loaded = load_benchmarks(*tasks, data_dir=data_folder(args.data_dir))
    lm = GlupruneLM.from_checkpoint(checkpoint, neuron_masks=masks)
    return {
        result.title: {"metric": result.metric, "items": result.num_items, **result.metrics[result.metric]}
        for result in evaluate(lm, loaded, limit=args.limit)
    }


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

    texts = [(f"token perplexity of {name}", of_text(name)) for name in report["evaluation"]["perplexity"]]
    dense = report["rows"][0]
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
        digits = 2 if title.startswith("token perplexity") else 4
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


def plot(report: Mapping[str, Any], path: Path) -> None:
    """Draws each measure against the expansion ratio or the layer, a line a method; perplexities on a log axis."""
    figure_module, canvas = (importlib.import_module(f"matplotlib.{name}") for name in ("figure", "ticker"))
    found = measures(report)
    figure = figure_module.Figure(figsize=(6.4, 4.2 * len(found)), layout="constrained")
    for axes, (title, value) in zip(figure.subplots(len(found), 1, squeeze=False)[:, 0], found, strict=True):
        rows, dense = report["rows"], value(report["rows"][0])
        by_layer = report["by_layer"]
        places = {row["target"]: row["layer"] if by_layer else row["expansion_ratio"] for row in rows if row["target"]}
        for number, (method, by_target) in enumerate(summary(report, value).items()):
            points = sorted((places[target], cell) for target, cell in by_target.items())
            axes.plot(*zip(*points, strict=True), marker="os^Dv<>P*X"[number % 10], label=_named(report, method))
        axes.axhline(dense, color="gray", linestyle="--", linewidth=1, label="dense")
        if title.startswith("token perplexity"):
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(canvas.StrMethodFormatter("{x:g}"))
        if not by_layer:
            axes.invert_xaxis()
        axes.set(title=title, xlabel="layer" if by_layer else "expansion ratio (intermediate size / hidden size)")
        axes.legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150, format=path.suffix[1:])
    write_file_atomic(path, buffer.getvalue(), overwrite=True)


def _sentence(row: Mapping[str, Any]) -> str:
    seed = "" if row["seed"] is None else f" (seed {row['seed']})"
    values = [f"perplexity of {name} {value:,.2f}" for name, value in row["perplexity"].items()]
    values += [f"{name} {about['value']:.4f}" for name, about in row.get("benchmarks", {}).items()]
    return f"{row['method']}{seed}{'' if row['target'] is None else ', ' + row['target']}: {', '.join(values)}"


if __name__ == "__main__":
    sys.exit(main())

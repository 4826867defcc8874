"""What a pruning changed, as data and as tables."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from gluprune_jax.errors import format_bytes
from gluprune_jax.models.config import ModelConfig
from gluprune_jax.pruning.mixture import MixtureSizes
from gluprune_jax.pruning.plan import PruningPlan, ranks_neurons
from gluprune_jax.pruning.targets import format_layers, padded_width

FORMAT_NAMES = {"hf": "safetensors", "orbax": "Orbax", "gguf": "GGUF"}

# Bytes of the weights of a model with only some of its layers, by index, each with so many neurons.
NumBytes = Callable[[Mapping[int, int]], int]


def changes(dense: ModelConfig, num_bytes: NumBytes, plan: PruningPlan, pad_to: int = 1) -> dict[str, Any]:
    """Layers, widths, parameters and bytes before and after `plan`.

    `bytes` are those of the weights without any padding, `file_bytes` those in files of each format, in which padding
    is counted: in safetensors all layers have one width, `file_width`.

    Args:
      dense: the architecture of the dense model.
      num_bytes: gives the bytes of its weights.
      plan: what is kept.
      pad_to: the width in safetensors is rounded up to a multiple of this, of the pruned model.

    Raises:
      RequestError: the plan was made for a model of another shape.
    """
    pruned = plan.pruned_config(dense)
    before = dict(enumerate(dense.intermediate_sizes))
    after = {i: plan.widths[i] for i in plan.remaining_layers}
    return {
        "plan": plan.summary(),
        "hidden_size": dense.hidden_size,
        "before": _sizes(dense, num_bytes(before)) | _file_sizes(num_bytes, before, 1),
        "after": _sizes(pruned, num_bytes(after)) | _file_sizes(num_bytes, after, pad_to),
    }


def mixture_changes(sizes: MixtureSizes, num_bytes: Mapping[str, int], plan: PruningPlan) -> dict[str, Any]:
    """As `changes`, of a mixture of experts: `num_bytes` are those "before" and "after"."""
    found = {"before": sizes, "after": plan.pruned_sizes(sizes)}
    return {"plan": plan.summary(), "hidden_size": sizes.hidden_size} | {
        when: _sizes(of, num_bytes[when]) | {"file_bytes": {"hf": num_bytes[when]}} for when, of in found.items()
    }


def _sizes(config: ModelConfig | MixtureSizes, num_bytes: int) -> dict[str, Any]:
    experts = {"experts": list(config.experts)} if isinstance(config, MixtureSizes) else {}
    return {
        "layers": config.num_hidden_layers,
        **experts,
        "intermediate_sizes": list(config.intermediate_sizes),
        "expansion_ratio": config.expansion_ratio,
        "parameters": config.num_parameters,
        "bytes": num_bytes,
    }


def _file_sizes(num_bytes: NumBytes, widths: Mapping[int, int], pad_to: int) -> dict[str, Any]:
    """The bytes of the weights of a model in files, with only these of its layers, and the width of all in safetensors.

    What files hold beside weights, some kilobytes and the tokenizer, is not counted.
    """
    width = padded_width(max(widths.values()), pad_to)
    nbytes = {"hf": num_bytes(dict.fromkeys(widths, width)), "orbax": num_bytes(widths)}
    return {"file_width": width, "file_bytes": nbytes}


def show(report: Mapping[str, Any], console: Console) -> None:
    """Prints a report of `gluprune_jax.prune` as tables."""
    before, after, plan = report["before"], report["after"], report["plan"]
    dropped = plan.get("dropped_layers", [])
    choices = [plan["criterion"]] * ranks_neurons(plan) + [f"{format_layers(dropped)} dropped"] * bool(dropped)
    table = Table(title=Text(f"{report['model']}: {', '.join(choices)}"), title_justify="left")
    for column in ("", "before", "after", "change"):
        table.add_column(column, justify="left" if not column else "right")

    def compared(label: str, key: str, spell: Callable[[Any], str]) -> tuple[str, str, str, str]:
        return label, spell(before[key]), spell(after[key]), f"{after[key] / before[key] - 1:+.1%}"

    written = {key: FORMAT_NAMES[key] for key in report.get("formats", ["hf"]) if key in after["file_bytes"]}
    forecasts = before.get("gguf_bytes", {})
    rows = [
        *([compared("layers", "layers", str)] * bool(dropped)),
        ("intermediate size", _span(before["intermediate_sizes"]), _span(after["intermediate_sizes"]), ""),
        compared("expansion ratio", "expansion_ratio", "{:.4g}".format),
        compared("parameters", "parameters", "{:,}".format),
        *(_compared_bytes(name, before["file_bytes"][key], after["file_bytes"][key]) for key, name in written.items()),
        *(_compared_bytes(f"GGUF {key}, forecast", size, after["gguf_bytes"][key]) for key, size in forecasts.items()),
    ]
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if "hf" in written and (padding := padding_note(after)):
        console.print(padding, markup=False)
    if experts := after.get("experts"):
        pruned = "; dense layers lose the same share" * (0 in experts)
        console.print(f"{max(experts)} experts in {len(experts) - experts.count(0)} layers{pruned}", style="dim")
    elif len(set(after["intermediate_sizes"])) > 1 or len(set(before["intermediate_sizes"])) > 1:
        console.print(_layer_table(report))
    if evaluation := report.get("evaluation"):
        console.print(_perplexity_table(evaluation))
        console.print(f"{evaluation['definition']}", style="dim", markup=False)
    if sample := report.get("sample"):
        console.print(f"\nPrompt: {sample['prompt']}", markup=False, style="bold")
        for stage, answer in sample["answers"].items():
            console.print(f"{stage}:", style="bold")
            console.print(answer, markup=False)
    if report.get("plan_out"):
        console.print(f"\nplan saved to {report['plan_out']}", markup=False)
    if report.get("output"):
        parts = ", ".join(f"{part} {seconds:.1f} s" for part, seconds in report["seconds"].items())
        console.print(f"\nwrote {' and '.join(report['formats'])} to {report['output']} ({parts})", markup=False)
    if report.get("pushed_to"):
        console.print(f"uploaded to https://huggingface.co/{report['pushed_to']}", markup=False)


def padding_note(sizes: Mapping[str, Any]) -> str | None:
    """What safetensors hold beside the neurons of a model whose sizes these are (of `changes`); None if nothing."""
    width, widths = sizes.get("file_width"), sizes["intermediate_sizes"]
    if width is None or set(widths) == {width}:
        return None
    nbytes = sizes["file_bytes"]["hf"] - sizes["bytes"]
    why = "a Hugging Face config holds one intermediate size" if len(set(widths)) > 1 else "that was asked for"
    return (
        f"the safetensors are zero-padded to {width} ({format_bytes(nbytes)} of zeros), because {why}; the "
        f"parameters are counted without, and Orbax has the true widths"
    )


def _compared_bytes(name: str, before: int, after: int) -> tuple[str, str, str, str]:
    return name, format_bytes(before), format_bytes(after), f"{after / before - 1:+.1%}"


def _layer_table(report: Mapping[str, Any]) -> Table:
    table = Table(title="by layer", title_justify="left")
    for column in ("layer", "before", "after", "expansion ratio"):
        table.add_column(column, justify="right")
    before, after = report["before"]["intermediate_sizes"], report["plan"]["widths"]
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        ratio = f"{new / report['hidden_size']:.4g}" if new else ""
        table.add_row(str(i), str(old), str(new) if new else "dropped", ratio)
    return table


def _perplexity_table(evaluation: Mapping[str, Any]) -> Table:
    values = evaluation["perplexity"]
    table = Table(title="token perplexity", title_justify="left")
    for column in ("model", "perplexity", "times dense"):
        table.add_column(column, justify="left" if column == "model" else "right")
    for stage, value in values.items():
        table.add_row(stage, f"{value:,.2f}", f"{value / values['dense']:,.2f}")
    return table


def _span(sizes: Sequence[int]) -> str:
    return str(sizes[0]) if len(set(sizes)) == 1 else f"{min(sizes)} to {max(sizes)}"

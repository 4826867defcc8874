"""What a pruning changed, as data and as tables."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flax import nnx
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gluprune_jax.model import Llama, ModelConfig
from gluprune_jax.plan import PruningPlan, ranks_neurons, spell_layers
from gluprune_jax.terminal import format_bytes


def changes(model: Llama, plan: PruningPlan) -> dict[str, Any]:
    """Layers, widths, parameters and bytes before and after `plan`; bytes are those of the weights without padding.

    `model` may be abstract.

    Raises:
      RequestError: the plan was made for a model of another shape.
    """
    dense, pruned = model.config, plan.pruned_config(model.config)
    return {
        "plan": plan.summary(),
        "hidden_size": dense.hidden_size,
        "before": _sizes(dense, _num_bytes(model, dict(enumerate(dense.intermediate_sizes)))),
        "after": _sizes(pruned, _num_bytes(model, {i: plan.widths[i] for i in plan.remaining_layers})),
    }


def _sizes(config: ModelConfig, num_bytes: int) -> dict[str, Any]:
    return {
        "layers": config.num_hidden_layers,
        "intermediate_sizes": list(config.intermediate_sizes),
        "expansion_ratio": config.expansion_ratio,
        "parameters": config.num_parameters,
        "bytes": num_bytes,
    }


def _num_bytes(model: Llama, widths: Mapping[Any, int]) -> int:
    """Bytes of the weights of `model` with only these of its layers, each with so many neurons."""
    total = 0
    for path, variable in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        weight = variable.get_value()
        size = weight.size
        if path[0] == "layers":
            if path[1] not in widths:
                continue
            if path[2] == "mlp":
                size = widths[path[1]] * model.config.hidden_size
        total += size * weight.dtype.itemsize
    return total


def show(report: Mapping[str, Any], console: Console) -> None:
    """Prints a report of `gluprune_jax.prune` as tables."""
    before, after, plan = report["before"], report["after"], report["plan"]
    dropped = plan.get("dropped_layers", [])
    choices = [plan["criterion"]] * ranks_neurons(plan) + [f"{spell_layers(dropped)} dropped"] * bool(dropped)
    table = Table(title=Text(f"{report['model']}: {', '.join(choices)}"), title_justify="left")
    for column in ("", "before", "after", "change"):
        table.add_column(column, justify="left" if not column else "right")

    def compared(label: str, key: str, spell: Callable[[Any], str]) -> tuple[str, str, str, str]:
        return label, spell(before[key]), spell(after[key]), f"{after[key] / before[key] - 1:+.1%}"

    rows = [
        *([compared("layers", "layers", str)] * bool(dropped)),
        ("intermediate size", _span(before["intermediate_sizes"]), _span(after["intermediate_sizes"]), ""),
        compared("expansion ratio", "expansion_ratio", "{:.4g}".format),
        compared("parameters", "parameters", "{:,}".format),
        compared("weights", "bytes", format_bytes),
    ]
    for row in rows:
        table.add_row(*row)
    console.print(table)
    if len(set(after["intermediate_sizes"])) > 1 or len(set(before["intermediate_sizes"])) > 1:
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
        widths = set(after["intermediate_sizes"])
        if len(widths) > 1 and "hf" in report["formats"]:
            console.print(
                f"the layers differ in width: the safetensors are zero-padded to {max(widths)}, because a Hugging "
                f"Face config holds one intermediate size (Orbax keeps the true widths)",
                markup=False,
            )


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

"""What a pruning changed, as data and as tables."""

from collections.abc import Mapping, Sequence
from typing import Any

from flax import nnx
from rich.console import Console
from rich.table import Table
from rich.text import Text

from gluprune_jax.model import Llama
from gluprune_jax.plan import PruningPlan
from gluprune_jax.terminal import format_bytes


def changes(model: Llama, plan: PruningPlan) -> dict[str, Any]:
    """Widths, parameters and bytes before and after `plan`; bytes are those of the weights without padding.

    `model` may be abstract.
    """
    dense = model.config
    weights = [variable.get_value() for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    stored = sum(weight.size * weight.dtype.itemsize for weight in weights)
    removed = padding = parameters = 0
    for layer, width, before, after in zip(
        model.layers, dense.stored_intermediate_sizes, dense.intermediate_sizes, plan.widths, strict=True
    ):
        for weight in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj):
            neuron_bytes = dense.hidden_size * weight.get_value().dtype.itemsize
            padding += (width - before) * neuron_bytes
            removed += (before - after) * neuron_bytes
            parameters += (before - after) * dense.hidden_size
    layers = len(plan.widths)
    return {
        "plan": plan.summary(),
        "hidden_size": dense.hidden_size,
        "before": {
            "intermediate_sizes": list(dense.intermediate_sizes),
            "expansion_ratio": dense.expansion_ratio,
            "parameters": dense.num_parameters,
            "bytes": stored - padding,
        },
        "after": {
            "intermediate_sizes": list(plan.widths),
            "expansion_ratio": sum(plan.widths) / layers / dense.hidden_size,
            "parameters": dense.num_parameters - parameters,
            "bytes": stored - padding - removed,
        },
    }


def show(report: Mapping[str, Any], console: Console) -> None:
    """Prints a report of `gluprune_jax.prune` as tables."""
    before, after, plan = report["before"], report["after"], report["plan"]
    table = Table(title=Text(f"{report['model']}: {plan['criterion']}"), title_justify="left")
    for column in ("", "before", "after", "change"):
        table.add_column(column, justify="left" if not column else "right")
    rows = [
        ("intermediate size", _span(before["intermediate_sizes"]), _span(after["intermediate_sizes"]), ""),
        *(
            (label, spell(before[key]), spell(after[key]), f"{after[key] / before[key] - 1:+.1%}")
            for label, key, spell in (
                ("expansion ratio", "expansion_ratio", "{:.4g}".format),
                ("parameters", "parameters", "{:,}".format),
                ("weights", "bytes", format_bytes),
            )
        ),
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
    before, after = (report[key]["intermediate_sizes"] for key in ("before", "after"))
    table = Table(title="by layer", title_justify="left")
    for column in ("layer", "before", "after", "expansion ratio"):
        table.add_column(column, justify="right")
    for i, (old, new) in enumerate(zip(before, after, strict=True)):
        table.add_row(str(i), str(old), str(new), f"{new / report['hidden_size']:.4g}")
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

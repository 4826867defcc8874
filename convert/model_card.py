"""The README.md of a pruned or trained checkpoint: what it is, what was done to it, and how to do it again."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.checkpoint import Checkpoint
from convert.hub import looks_like_hub_id
from gluprune_jax.model import ModelConfig
from gluprune_jax.plan import ranks_neurons, spell_layers


def model_card(checkpoint: Checkpoint, dense: ModelConfig, evaluation: Mapping[str, Any] | None, command: str) -> str:
    """Markdown with the YAML header that the Hugging Face hub reads.

    Args:
      checkpoint: the pruned model; the last record of its history describes the pruning.
      dense: the architecture before.
      evaluation: perplexities as `gluprune_jax.prune` reports them, or None if none were measured.
      command: what reproduces the checkpoint.
    """
    config, record = checkpoint.config, checkpoint.history[-1]
    header = ["---", "library_name: transformers", "tags: [gluprune, pruned, llama]"]
    if looks_like_hub_id(checkpoint.source) and not Path(checkpoint.source).exists():
        header.append(f"base_model: {checkpoint.source}")
    dropped, ranked = record.get("dropped_layers", []), ranks_neurons(record)
    rows = [
        *([("layers", str(dense.num_hidden_layers), str(config.num_hidden_layers))] * bool(dropped)),
        ("intermediate size", _span(dense.intermediate_sizes), _span(config.intermediate_sizes)),
        ("expansion ratio", f"{dense.expansion_ratio:.4g}", f"{config.expansion_ratio:.4g}"),
        ("parameters", f"{dense.num_parameters:,}", f"{config.num_parameters:,}"),
    ]
    reached = [f"{config.num_hidden_layers} layers"] * bool(dropped)
    reached += [f"expansion ratio {config.expansion_ratio:.4g}"] * ranked
    methods = ["width pruning of the GLU-MLP layers (arXiv 2512.22671)"] * ranked
    methods += ["depth pruning (decoder layers removed whole)"] * bool(dropped)
    lines = [
        *header,
        "---",
        "",
        f"# {checkpoint.source}, pruned to {' and '.join(reached)}",
        "",
        f"Structured {' and '.join(methods)} with gluprune_jax.",
        "",
        "| | before | after |",
        "|---|---|---|",
        *(f"| {name} | {before} | {after} |" for name, before, after in rows),
        "",
        f"- Base model: {checkpoint.source}",
        *(_choice_of_neurons(record) if ranked else []),
        *([f"- Dropped: {spell_layers(dropped)} of the base model; the others were renumbered"] * bool(dropped)),
        f"- Fingerprint of the dense MLP weights: `{record['source']['fingerprint']}`",
        f"- Parameters removed: {1 - config.num_parameters / dense.num_parameters:.1%}",
    ]
    if len(set(config.intermediate_sizes)) > 1:
        lines.append(
            f"- The layers differ in width ({', '.join(map(str, config.intermediate_sizes))}); the safetensors are "
            f"zero-padded to {max(config.intermediate_sizes)}, because a Hugging Face config holds one width"
        )
    if evaluation:
        lines += ["", "## Perplexity", "", f"{evaluation['definition'][:1].upper()}{evaluation['definition'][1:]}.", ""]
        lines += [f"- {name}: {value:.4g}" for name, value in evaluation["perplexity"].items()]
    lines += ["", "## Reproduce", "", "```", command, "```", ""]
    return "\n".join(lines)


def _choice_of_neurons(record: Mapping[str, Any]) -> list[str]:
    request = record["request"]
    target = [f"{key} {value}" for key, value in request.items() if key not in ("multiple_of", "layers", "drop_layers")]
    return [
        f"- Criterion: `{record['criterion']}` on {record['source']['weights_dtype']} weights, scores in float32; "
        f"{record['tie_rule']}",
        f"- Target: {', '.join(target)}, multiple of {request['multiple_of']}, layers {json.dumps(request['layers'])}",
    ]


def recovery_card(checkpoint: Checkpoint, record: Mapping[str, Any], last: Mapping[str, float], command: str) -> str:
    """Markdown for a model after recovery training.

    Args:
      checkpoint: the trained model.
      record: steps, tokens, teacher and settings.
      last: the last line of the log.
      command: what reproduces the checkpoint.
    """
    settings = {name: value for name, value in record["settings"].items() if value is not None}
    lines = [
        "---",
        "library_name: transformers",
        "tags: [gluprune, pruned, llama]",
        "---",
        "",
        f"# {checkpoint.source}, after recovery training",
        "",
        f"{record['tokens']:,} tokens in {record['steps']:,} steps with gluprune_jax, "
        + (f"distilled from {record['teacher']}." if record["teacher"] else "plain language modelling."),
        "",
        "| option | value |",
        "|---|---|",
        *(f"| `{name}` | {value} |" for name, value in settings.items()),
        "",
    ]
    if last:
        terms = (f"{name} {last[name]:.4g}" for name in ("loss", "kl", "ce", "hidden") if name in last)
        lines += [f"The last step: {', '.join(terms)}.", ""]
    return "\n".join([*lines, "## Reproduce", "", "```", command, "```", ""])


def _span(sizes: tuple[int, ...]) -> str:
    return str(sizes[0]) if len(set(sizes)) == 1 else f"{min(sizes)} to {max(sizes)}"

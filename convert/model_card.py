"""The README.md of a pruned or trained checkpoint: what it is, what was done to it, and how to do it again."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from convert.card_header import LICENCE_KEYS, UNKNOWN, format_licence
from convert.checkpoint import Checkpoint
from convert.huggingface.config import file_width
from convert.huggingface.hub import looks_like_hub_id
from convert.huggingface.mixture import MixtureCheckpoint
from convert.huggingface.mixture_config import one_by_one
from gluprune_jax.errors import format_bytes
from gluprune_jax.models.config import ModelConfig
from gluprune_jax.pruning.mixture import MixtureSizes
from gluprune_jax.pruning.plan import ranks_neurons
from gluprune_jax.pruning.targets import TARGETS, format_layers


def model_card(
    checkpoint: Checkpoint | MixtureCheckpoint,
    dense: ModelConfig | MixtureSizes,
    evaluation: Mapping[str, Any] | None,
    command: str,
    *,
    sizes: Mapping[str, tuple[int, int]] | None = None,
    pad_to: int = 1,
) -> str:
    """Markdown with the YAML header that the Hugging Face hub reads.

    Args:
      checkpoint: the pruned model; the last record of its history describes the pruning.
      dense: the architecture before.
      evaluation: perplexities as `gluprune_jax.prune` reports them, or None if none were measured.
      command: what reproduces the checkpoint.
      sizes: bytes before and after, by the name of the files that have them.
      pad_to: the width in safetensors is rounded up to a multiple of this.
    """
    config = checkpoint.sizes if isinstance(checkpoint, MixtureCheckpoint) else checkpoint.config
    record = checkpoint.history[-1]
    dropped, ranked = record.get("dropped_layers", []), ranks_neurons(record)
    rows = [
        ("intermediate size", _span(dense.intermediate_sizes), _span(config.intermediate_sizes)),
        ("expansion ratio", f"{dense.expansion_ratio:.4g}", f"{config.expansion_ratio:.4g}"),
        ("parameters", f"{dense.num_parameters:,}", f"{config.num_parameters:,}"),
    ]
    rows += [(name, format_bytes(before), format_bytes(after)) for name, (before, after) in (sizes or {}).items()]
    if isinstance(dense, MixtureSizes) and isinstance(config, MixtureSizes):
        rows[:1] = _mixture_rows(dense, config)
    reached, methods = [], []
    if ranked:
        reached.append(f"expansion ratio {config.expansion_ratio:.4g}")
        what = "experts, which are GLU MLPs" if isinstance(config, MixtureSizes) else "GLU-MLP layers"
        methods.append(f"width pruning of the {what} (arXiv 2512.22671)")
    if dropped:
        rows.insert(0, ("layers", str(dense.num_hidden_layers), str(config.num_hidden_layers)))
        reached.insert(0, f"{config.num_hidden_layers} layers")
        methods.append("depth pruning (decoder layers removed whole)")
    lines = [
        *_header(checkpoint),
        f"# {checkpoint.source}, pruned to {' and '.join(reached)}",
        "",
        f"Structured {' and '.join(methods)} with gluprune_jax.",
        "",
        "| | before | after |",
        "|---|---|---|",
        *(f"| {name} | {before} | {after} |" for name, before, after in rows),
        "",
        *_origin(checkpoint),
        *(_choice_of_neurons(record) if ranked else []),
    ]
    if dropped:
        lines.append(f"- Dropped: {format_layers(dropped)} of the base model; the others were renumbered")
    if text := record.get("calibration"):
        lines.append(f"- Calibration text: {_texts(text)}")
    lines += [
        f"- Fingerprint of the dense MLP weights: `{record['source']['fingerprint']}`",
        f"- Parameters removed: {1 - config.num_parameters / dense.num_parameters:.1%}",
    ]
    if not isinstance(config, MixtureSizes):
        lines += _padding(config.intermediate_sizes, file_width(config.intermediate_sizes, pad_to))
    if isinstance(config, MixtureSizes) and (slower := one_by_one(config)):
        lines.append(f"- {slower}")
    lines += _steps_before(checkpoint.history[:-1])
    if evaluation:
        lines += ["", "## Perplexity", "", f"{evaluation['definition'][:1].upper()}{evaluation['definition'][1:]}.", ""]
        lines += [f"- {name}: {value:.4g}" for name, value in evaluation["perplexity"].items()]
    lines += ["", "## Reproduce", "", "```", command, "```", ""]
    return "\n".join(lines)


def recovery_card(checkpoint: Checkpoint, record: Mapping[str, Any], last: Mapping[str, float], command: str) -> str:
    """Markdown for a model after recovery training.

    Args:
      checkpoint: the trained model; the last record of its history is of the training.
      record: steps, tokens, teacher and settings.
      last: the last line of the log.
      command: what reproduces the checkpoint.
    """
    settings = {name: value for name, value in record["settings"].items() if value is not None}
    lines = [
        *_header(checkpoint),
        f"# {checkpoint.source}, after recovery training",
        "",
        f"{record['tokens']:,} tokens in {record['steps']:,} steps with gluprune_jax, "
        + (f"distilled from {record['teacher']}." if record["teacher"] else "plain language modelling."),
        "",
        *_origin(checkpoint),
        *_steps_before(checkpoint.history[:-1]),
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


def _padding(widths: Sequence[int], width: int) -> list[str]:
    """What safetensors of this width hold beside the neurons of the layers."""
    if set(widths) == {width}:
        return []
    zeros = f"the safetensors are zero-padded to {width}"
    if len(set(widths)) > 1:
        true = ", ".join(map(str, widths))
        return [f"- The layers differ in width ({true}); {zeros}, because a Hugging Face config holds one width"]
    return [f"- Neurons of zeros: {zeros}, as was asked for; parameters are counted without them"]


def _mixture_rows(dense: MixtureSizes, config: MixtureSizes) -> list[tuple[str, str, str]]:
    """The widths of experts and of dense layers, where there are any."""
    rows = []
    for name, has_experts in (("intermediate size of an expert", True), ("intermediate size of a dense layer", False)):
        layers = [i for i, count in enumerate(dense.experts) if (count > 0) == has_experts]
        if layers:
            before, after = (tuple(of.intermediate_sizes[i] for i in layers) for of in (dense, config))
            rows.append((name, _span(before), _span(after)))
    return rows


# ------------------------------------------------------------------------------------------------------- what it is


def _header(checkpoint: Checkpoint | MixtureCheckpoint) -> list[str]:
    """The YAML that the hub reads: the licence of the base model, and its name if it is a repository of the hub."""
    known = {"license": UNKNOWN, **checkpoint.card}
    lines = [f"{key}: {json.dumps(known[key])}" for key in LICENCE_KEYS if key in known]
    if base := hub_base_model(checkpoint):
        lines.append(f"base_model: {base}")
    if isinstance(checkpoint, MixtureCheckpoint):
        model_type = checkpoint.config.mixture.family.model_type
    else:
        model_type = checkpoint.family.model_type
    return ["---", "library_name: transformers", *lines, f"tags: [gluprune, pruned, {model_type}]", "---", ""]


def hub_base_model(checkpoint: Checkpoint | MixtureCheckpoint) -> str | None:
    """The hub id of the model that this was made from, if it is a repository of the hub."""
    # A path can look like a hub id. What a card of ours says was found to be one when the dense model was loaded.
    if "base_model" in checkpoint.card:
        return checkpoint.card["base_model"]
    source = checkpoint.source
    return source if looks_like_hub_id(source) and not Path(source).exists() else None


def _origin(checkpoint: Checkpoint | MixtureCheckpoint) -> list[str]:
    """The model that all began with, and the one that this was made from where that is another; the licence."""
    first = next((str(record["base_model"]) for record in checkpoint.history if "base_model" in record), None)
    base = checkpoint.card.get("base_model") or first or checkpoint.source
    lines = [f"- Base model: {base}"]
    if base != checkpoint.source:
        lines.append(f"- Made from: {checkpoint.source}")
    return [*lines, f"- Licence of the base model: {format_licence(checkpoint.card)}"]


# ------------------------------------------------------------------------------------------------ what was done to it


def _choice_of_neurons(record: Mapping[str, Any]) -> list[str]:
    request = record["request"]
    target = ", ".join(f"{key} {request[key]}" for key in TARGETS if key in request)
    lines = [
        f"- Criterion: `{record['criterion']}` on {record['source']['weights_dtype']} weights, scores in float32; "
        f"{record['tie_rule']}",
        f"- Target: {target}, multiple of {request['multiple_of']}, layers {json.dumps(request['layers'])}",
    ]
    if allocation := request.get("allocation"):
        lines.append(
            f"- Allocation: {allocation['method']}, one budget over the layers; each keeps at least "
            f"{allocation['floor']:.0%} of its neurons"
        )
    if request.get("in_order"):
        lines.append("- Sequential: each layer was pruned on the outputs of the layers already pruned")
    if "compensation" in record:
        lines.append(f"- Refit of down_proj: {_refit(record['compensation'])}")
    if "reconstruction" in record:
        lines.append(f"- Reconstruction: {_reconstruction(record['reconstruction'])}")
    return lines


def _refit(compensation: Mapping[str, Any] | None) -> str:
    """What was done to the down projections."""
    if compensation is None:
        return "none, although the plan was made with one"
    errors = _mean_errors(compensation["output_error_without"], compensation["output_error"])
    if errors is None:
        return f"{compensation['method']}, of no layer"
    before, after = errors
    return (
        f"{compensation['method']} (damping {compensation['damping']:g}); the error of a layer's output on the "
        f"calibration text, relative and squared, is {after:.3g} in the mean of the layers, {before:.3g} without"
    )


def _reconstruction(record: Mapping[str, Any]) -> str:
    """How the matrices of the MLPs were fitted to what the dense layers give."""
    errors = _mean_errors(record["held_out_error_without"], record["held_out_error"])
    if errors is None:
        return f"{record['method']}, of no layer"
    before, after = errors
    left = f"; left as pruned: layers {record['left_as_pruned']}" if record["left_as_pruned"] else ""
    return (
        f"{record['method']} of gate, up and down projections ({record['steps']} steps a layer, learning rate "
        f"{record['learning_rate']:g} of a matrix's root mean square); the error of a layer's output on windows that "
        f"were held out, relative and squared, is {after:.3g} in the mean of the layers, {before:.3g} without{left}"
    )


def _mean_errors(without: Sequence[float | None], remaining: Sequence[float | None]) -> tuple[float, float] | None:
    """The errors without and with a repair in the mean of the layers that have any."""
    pairs = zip(without, remaining, strict=True)
    errors = [(before, after) for before, after in pairs if before is not None and after is not None]
    if not errors:
        return None
    before, after = (sum(values) / len(errors) for values in zip(*errors, strict=True))
    return before, after


def _texts(text: Mapping[str, Any]) -> str:
    """The calibration text, as `describe_windows` records it."""
    names = ", ".join(text.get("texts") or ()) or "unnamed"
    dated = f", chats dated {text['date']}" if "date" in text else ""
    return f"{names}; {text['tokens']:,} tokens in windows of {text['window']}{dated}, `{text['digest']}`"


def _steps_before(history: Sequence[Mapping[str, Any]]) -> list[str]:
    """The prunings and trainings that this model had been through before, one line each."""
    lines = []
    for number, record in enumerate(history, start=1):
        if isinstance(training := record.get("recovery"), Mapping):
            what = f"recovery training, {training.get('tokens', '?')} tokens, teacher {training.get('teacher')}"
        else:
            request = record.get("request")
            asked = request if isinstance(request, Mapping) else {}
            parts = [str(record.get("criterion", "?")), *(f"{key} {asked[key]}" for key in TARGETS if key in asked)]
            if dropped := record.get("dropped_layers"):
                parts.append(f"layers {dropped} dropped")
            if record.get("compensation"):
                parts.append("down_proj refitted by least squares")
            if record.get("reconstruction"):
                parts.append("layers reconstructed")
            what = f"pruned: {', '.join(parts)}"
        lines.append(f"- Step {number} before this: {what}")
    return lines


def _span(sizes: tuple[int, ...]) -> str:
    return str(sizes[0]) if len(set(sizes)) == 1 else f"{min(sizes)} to {max(sizes)}"

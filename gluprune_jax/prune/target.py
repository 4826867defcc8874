"""What the options say of the size of the pruned model, as arguments of `make_plan`."""

from typing import Any

import convert
from gluprune_jax.cli import terminal
from gluprune_jax.prune.checks import formats_of
from gluprune_jax.prune.request import PruneRequest
from gluprune_jax.pruning.budget import target_within
from gluprune_jax.pruning.targets import parse_layers, width_rounding


def target_of(request: PruneRequest, checkpoint: convert.Checkpoint) -> dict[str, Any]:
    """What `Chooser` takes for a target."""
    target: dict[str, Any] = {
        "expansion_ratio": request.expansion_ratio,
        "prune_percent": request.prune_percent,
        "width": request.width,
    }
    target = {name: value for name, value in target.items() if value is not None}
    rounding = width_rounding(request.runtime, request.multiple_of)
    L = checkpoint.config.num_hidden_layers
    if request.layers is not None:
        target["layers"] = parse_layers(request.layers, L)
    if request.drop_layers is not None:
        target["drop_layers"] = parse_layers(request.drop_layers, L, "--drop-layers")
    if request.drop_least is not None:
        target["drop_least"] = request.drop_least
    target |= _target_within(request, checkpoint, rounding["multiple_of"], target)
    return {**target, **rounding}


def _target_within(
    request: PruneRequest, checkpoint: convert.Checkpoint, multiple_of: int, others: dict[str, Any]
) -> dict[str, Any]:
    """The width that --target-parameters or --target-bytes means, if one of them is given; `others` names layers."""
    if request.target_parameters is None and request.target_bytes is None:
        return {}
    from_folder, target_type = "gguf" not in formats_of(request), request.target_type or "hf"
    is_padded = request.target_bytes is not None and target_type != "orbax" and (from_folder or target_type == "hf")
    if is_padded and request.allocation != "uniform" and not request.json:
        terminal.note(
            "a Hugging Face folder has one width for all layers, so that --target-bytes counts them padded to the "
            "widest; --target-type orbax counts true widths, and so do types of GGUF files where --format is gguf"
        )
    layers, dropped = others.get("layers"), others.get("drop_layers", ())
    if count := others.get("drop_least", 0):  # which layers go does not matter here, only how many
        free = [i for i in range(checkpoint.config.num_hidden_layers) if i not in (layers or ())]
        dropped = free[-count:]
    return target_within(
        checkpoint.config,
        target_parameters=request.target_parameters,
        target_bytes=request.target_bytes,
        file_size=checkpoint.file_size(
            target_type,
            request.pad_to,
            from_folder=from_folder,
            gguf_widths=request.gguf_widths,
        ),
        multiple_of=multiple_of,
        pad_to=request.pad_to,
        layers=layers,
        drop_layers=dropped,
        allocation=request.allocation,
    )

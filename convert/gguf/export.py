"""What a GGUF file says of a checkpoint: weights, tokenizer, a description, and what the model has been through."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from convert.card_header import LICENCE_KEYS
from convert.checkpoint import Checkpoint
from convert.gguf.config import HISTORY
from convert.gguf.quantize import check_quantizer
from convert.gguf.tokenizer_writer import tokenizer_fields
from convert.gguf.widths import Widths
from convert.gguf.writer import GGUFPlan, plan_gguf, plan_gguf_mixture
from convert.huggingface.mixture import MixtureCheckpoint
from convert.huggingface.mixture_config import as_dense
from convert.huggingface.streamed import StreamedCheckpoint
from convert.model_card import hub_base_model
from convert.output import GGUF_FILE, is_gguf_file
from gluprune_jax.errors import RequestError
from gluprune_jax.files.object_store import Folder
from gluprune_jax.parallel.distributed import is_joined, process_count


@dataclasses.dataclass(frozen=True)
class GGUFOptions:
    """How a GGUF file is written.

    Attributes:
      gguf_type: see `convert.gguf.writer.plan_gguf`.
      gguf_widths: see there.
      quantize: what llama.cpp's quantiser makes of the file then, one of `convert.gguf.quantize.KINDS`, if anything.
    """

    gguf_type: str | None = None
    gguf_widths: Widths | None = None
    quantize: str | None = None


def gguf_options(
    formats: Sequence[str],
    output: Folder | None,
    gguf_type: str | None,
    gguf_widths: Widths | None,
    quantize: str | None,
) -> GGUFOptions:
    """What a command's options ask for.

    Raises:
      RequestError: they are given, and no GGUF file is written; llama.cpp is to quantise, and is not installed.
    """
    given = {"gguf_type": gguf_type, "gguf_widths": gguf_widths, "quantize": quantize}
    if "gguf" not in formats and (named := [name for name, value in given.items() if value is not None]):
        raise RequestError(f"`{named[0]}` is about GGUF files; add gguf to `format`, or leave it out")
    if quantize is not None:
        if gguf_type == "Q8_0":
            raise RequestError(
                "`quantize` begins with what is not quantised; give `gguf_type` F32, F16 or BF16, or none"
            )
        name = output.name if output is not None and is_gguf_file(output) else GGUF_FILE
        check_quantizer(Path(name), quantize)
    return GGUFOptions(gguf_type, gguf_widths, quantize)


def prepare_gguf(checkpoint: Checkpoint | MixtureCheckpoint, options: GGUFOptions, pad_to: int = 1) -> GGUFPlan:
    """All of a GGUF file but its weights, which are not looked at.

    Args:
      checkpoint: the model.
      options: how it is written.
      pad_to: widths are rounded up to a multiple of this, with neurons of zeros; 1 is 32 where layers differ. Those of
        experts are not.

    Raises:
      RequestError: llama.cpp has no architecture for the model, or no form for its tokenizer; several processes run.
      OperationError: the tokenizer's files are damaged.
    """
    if is_joined():
        raise RequestError(
            f"`format` gguf is written by one process, and these are {process_count()}; write hf, and convert that"
        )
    if isinstance(checkpoint, MixtureCheckpoint):
        plan = plan_gguf_mixture(checkpoint, options.gguf_type, options.gguf_widths)
        described, parameters = _described(checkpoint), checkpoint.sizes.num_parameters
    else:
        plan = plan_gguf(checkpoint, options.gguf_type, options.gguf_widths, None if pad_to == 1 else pad_to)
        described, parameters = checkpoint, checkpoint.config.num_parameters
    tokenizer, notes = tokenizer_fields(described, plan.table.spaces_stay_behind)
    fields = {**plan.fields, **_general_fields(described, parameters), **tokenizer}
    return dataclasses.replace(plan, fields=fields, notes=(*plan.notes, *notes))


def _described(mixture: MixtureCheckpoint) -> Checkpoint:
    """A dense model without weights, with all that a mixture has beside them."""
    return StreamedCheckpoint(
        stored={},
        stored_config=as_dense(mixture.config, mixture.sizes),
        source=mixture.source,
        hf_config=mixture.config.data,
        assets=mixture.assets,
        history=mixture.history,
        card=mixture.card,
    )


def _general_fields(checkpoint: Checkpoint, parameters: int) -> dict[str, Any]:
    fields: dict[str, Any] = {
        "general.type": "model",
        "general.name": Path(checkpoint.source).name.removesuffix(".gguf"),
        "general.size_label": _size_label(parameters),
    }
    keys = zip(LICENCE_KEYS, ("general.license", "general.license.name", "general.license.link"), strict=True)
    fields |= {key: checkpoint.card[name] for name, key in keys if name in checkpoint.card}
    if base := hub_base_model(checkpoint):
        owner, _, name = base.rpartition("/")
        fields |= {"general.base_model.count": 1, "general.base_model.0.name": name}
        fields |= {"general.base_model.0.organization": owner} if owner else {}
        fields["general.base_model.0.repo_url"] = f"https://huggingface.co/{base}"
    if checkpoint.history:
        fields[HISTORY] = json.dumps(list(checkpoint.history))
    return fields


def _size_label(parameters: int) -> str:
    """As llama.cpp's converter has it: 135M, 1.2B."""
    for unit, letter in ((10**9, "B"), (10**6, "M"), (10**3, "K")):
        if parameters >= unit:
            value = parameters / unit
            return f"{value:.1f}{letter}" if value < 10 and unit == 10**9 else f"{value:.0f}{letter}"
    return str(parameters)

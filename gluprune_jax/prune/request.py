"""What the command is asked for."""

import dataclasses
import datetime
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gluprune_jax.data.documents import Document
from gluprune_jax.files.object_store import Folder

if TYPE_CHECKING:
    from convert.gguf.widths import Widths
    from gluprune_jax.memory.mesh_choice import MeshRequest
    from gluprune_jax.pruning.plan import PruningPlan
    from gluprune_jax.pruning.statistics import Statistics

PLAN_FILE = "gluprune_plan.json"  # in an output folder


@dataclasses.dataclass(frozen=True)
class PruneRequest:
    """What is to be pruned, how, and what is measured and written; the fields are options of the same names."""

    model: str
    revision: str | None
    dtype: str | None
    stream: bool | None
    expansion_ratio: str | None
    prune_percent: float | None
    width: int | None
    target_parameters: str | None
    target_bytes: str | None
    target_type: str | None
    plan: Path | None
    drop_layers: str | None
    drop_least: int | None
    criterion: str
    multiple_of: int
    runtime: str | None
    layers: str | None
    allocation: str
    min_keep: float
    compensate: str
    sequential: bool
    calibration: tuple[str, ...]
    calibration_tokens: int
    sequence_length: int
    chat_template: str | None
    date: datetime.date | None
    statistics: Path | None
    statistics_out: Path | None
    output: Folder | None
    format: str | None
    gguf_type: str | None
    gguf_widths: "Widths | None"
    quantize: str | None
    pad_to: int
    push_to_hub: str | None
    private: bool
    plan_out: Path | None
    overwrite: bool
    dry_run: bool
    json: bool
    eval_data: tuple[str, ...]
    eval_tokens: int
    random_baseline: bool
    seed: int
    sample: str | None
    sample_tokens: int
    devices: "MeshRequest"
    distributed: bool

    @property
    def is_measured(self) -> bool:
        """Whether the model runs before and after."""
        return bool(self.eval_data) or self.sample is not None


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What was read beside the model.

    Attributes:
      texts: name and contents of what perplexity is measured on.
      documents: the calibration text.
      statistics: of calibration text, saved before.
      plan: a saved one.
      memory: what the devices will hold, of a dry run.
    """

    texts: Sequence[tuple[str, str]]
    documents: Sequence[Document]
    statistics: "Statistics | None"
    plan: "PruningPlan | None"
    memory: Mapping[str, Any] | None

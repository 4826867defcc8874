"""Structured width pruning of GLU-MLP language models in JAX: score neurons, plan, mask, slice.

import convert
from gluprune_jax import prune_model

checkpoint = convert.load("demo")
pruned = prune_model(checkpoint, "hybrid+least-squares", prune_percent=20, calibration=["python-reference"])
convert.save(pruned, "smollm2-p20")

Score once, prune many:

from gluprune_jax import make_plan, score

plan = make_plan(score(checkpoint.model), expansion_ratio=2.4)
convert.save(checkpoint.pruned(plan), "smollm2-2.4x")
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gluprune_jax.errors import GlupruneError, OperationError, RequestError
    from gluprune_jax.inference.generation import generate
    from gluprune_jax.models.config import Llama3Rope, ModelConfig
    from gluprune_jax.models.decoder import Decoder
    from gluprune_jax.models.parameters import abstract_model
    from gluprune_jax.pruning.criteria import CRITERIA
    from gluprune_jax.pruning.pipeline import prune_model
    from gluprune_jax.pruning.plan import PruningPlan, make_plan
    from gluprune_jax.pruning.scores import Scores, score
    from gluprune_jax.pruning.slicing import slice_model

__all__ = [
    "CRITERIA",
    "Decoder",
    "GlupruneError",
    "Llama3Rope",
    "ModelConfig",
    "OperationError",
    "PruningPlan",
    "RequestError",
    "Scores",
    "abstract_model",
    "generate",
    "make_plan",
    "prune_model",
    "score",
    "slice_model",
]

# Where each of these is: they are imported when they are first asked for, so that `gluprune --help` loads no JAX.
_MODULES = {
    "errors": ("GlupruneError", "OperationError", "RequestError"),
    "inference.generation": ("generate",),
    "models.config": ("Llama3Rope", "ModelConfig"),
    "models.decoder": ("Decoder",),
    "models.parameters": ("abstract_model",),
    "pruning.criteria": ("CRITERIA",),
    "pruning.pipeline": ("prune_model",),
    "pruning.plan": ("PruningPlan", "make_plan"),
    "pruning.scores": ("Scores", "score"),
    "pruning.slicing": ("slice_model",),
}
_HOME = {name: f"{__name__}.{module}" for module, names in _MODULES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)

"""Structured width pruning of GLU-MLP language models in JAX: score neurons, plan, mask, slice.

import convert
from gluprune_jax import make_plan, score

checkpoint = convert.load("demo")
plan = make_plan(score(checkpoint.model), expansion_ratio=2.4)
convert.save(checkpoint.pruned(plan), "smollm2-2.4x")
"""

from gluprune_jax.criteria import CRITERIA
from gluprune_jax.errors import GlupruneError, OperationError, RequestError
from gluprune_jax.generation import generate
from gluprune_jax.importance import Scores, score
from gluprune_jax.model import Llama, Llama3Rope, ModelConfig, abstract_model
from gluprune_jax.plan import PruningPlan, make_plan
from gluprune_jax.slicing import slice_model

__all__ = [
    "CRITERIA",
    "GlupruneError",
    "Llama",
    "Llama3Rope",
    "ModelConfig",
    "OperationError",
    "PruningPlan",
    "RequestError",
    "Scores",
    "abstract_model",
    "generate",
    "make_plan",
    "score",
    "slice_model",
]

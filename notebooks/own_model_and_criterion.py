# %% [markdown]
# # A criterion and a model of your own
#
# How to rank neurons by a function of your own, prune a model of your own, keep the choice as a plan, and write an
# Orbax checkpoint; and how to see what a TPU would hold before you have one. The "own" model here is the demo model,
# exported to a folder, so that everything runs without an account. On two CPU cores this takes about a minute.

# %%
import importlib.util
import subprocess
import sys

CHECKOUT = ".."  # on Colab, the folder that holds the checkout
if importlib.util.find_spec("gluprune_jax") is None or importlib.util.find_spec("lm_eval") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", f"{CHECKOUT}[evals]"], check=True)

# %%
import json
import shlex
from pathlib import Path

import jax
import numpy as np

import convert
from convert import __main__ as convert_command
from evals import __main__ as evals_command
from evals import compare
from gluprune_jax import PruningPlan, prune

on_accelerator = jax.default_backend() != "cpu"
REDUCED = not on_accelerator
TOKENS = 1024 if REDUCED else 8192  # that perplexity is measured on
Path("own").mkdir(exist_ok=True)


def run(command, line, status=0):
    """Runs a command line in this process: a TPU belongs to one process, and this one holds it."""
    found = command.main(shlex.split(line))
    assert found == status, f"exit status {found}"


# %% [markdown]
# ## A model
#
# A folder with `config.json`, safetensors and the tokenizer's files is a model, and so are a `.gguf` file, a hub id and
# an Orbax checkpoint. Families: Llama 2 to 3.3, SmolLM2, TinyLlama, Mistral without sliding window.

# %%
run(convert_command, "demo own/model --overwrite")
sorted(path.name for path in Path("own/model").iterdir())

# %% [markdown]
# What is not covered is refused before a weight is read, with the key of the config that says so:

# %%
wrong = Path("own/wrong")
wrong.mkdir(exist_ok=True)
config = json.loads(Path("own/model/config.json").read_text())
(wrong / "config.json").write_text(json.dumps(config | {"mlp_bias": True}))
run(prune, f"--model {wrong} --prune-percent 10 --dry-run", status=2)

# %% [markdown]
# ## A criterion
#
# A criterion is a function of one layer that gives one float32 score a neuron, higher is more important. The names of
# its parameters say what it looks at: `gate` and `up` `[F, D]`, `down` `[D, F]`, and on calibration text
# `activation_norm`, `mean_magnitude` and `sensitivity` `[F]`. This one is PPM with the down column as well.

# %%
# %%writefile own/criteria.py
"""Criteria of our own."""

from jax import Array

from gluprune_jax.pruning.criteria import peak_to_peak


def ppm_with_down(gate: Array, up: Array, down: Array) -> Array:
    """The peak-to-peak magnitudes of the gate row, the up row and the down column."""
    return peak_to_peak(gate) + peak_to_peak(up) + peak_to_peak(down, axis=0)


# %% [markdown]
# On the command line it is `package.module:function`, here the folder and the file. Python must find it: from the
# folder you are in, or installed. (If you change the file, restart the kernel: Python imports a module once.) Anything
# that takes a criterion takes it, with what may stand behind it, such as `own.criteria:ppm_with_down+least-squares`.

# %%
run(
    compare,
    "--model own/model --methods ppm,own.criteria:ppm_with_down --prune-percent 10,40 "
    f"--evaluate --eval-tokens {TOKENS}",
)

# %% [markdown]
# That is little text and one small model: a reason to look further, with `--tasks` and on other models, and not yet
# a finding. What a criterion looks at is told by `inputs_of`; a parameter that no criterion is given is refused.

# %%
from gluprune_jax.pruning.criteria import find_criterion, inputs_of

inputs_of(find_criterion("own.criteria:ppm_with_down")[1])

# %% [markdown]
# ## Prune: a plan, a Hugging Face folder and an Orbax checkpoint
#
# `--multiple-of 128` floors the width (`--for` knows what runtimes like). The plan says which neurons are kept,
# why, and of which weights.

# %%
run(
    prune,
    "--model own/model --criterion own.criteria:ppm_with_down --prune-percent 10 --multiple-of 128 "
    "--plan-out own/plan.json --format hf,orbax --output own/pruned --overwrite",
)

# %%
plan = PruningPlan.load("own/plan.json")
print(plan.criterion, plan.widths[:3], plan.kept[0][:8], plan.request)

# %% [markdown]
# A plan can be replayed on the same weights, without scoring (`--plan own/plan.json`), evaluated as a mask without
# slicing (`python -m evals --model own/model --plan own/plan.json --suite quick --benchmark-data demo`), or changed by
# a program of yours and saved again. Other weights are refused: the plan knows their fingerprint.
#
# The Orbax checkpoint holds the same bits, and restores onto any mesh of devices:

# %%
from_hf, from_orbax = convert.load("own/pruned"), convert.load("own/pruned/orbax")
pairs = zip(*(jax.tree.leaves(checkpoint.model) for checkpoint in (from_hf, from_orbax)), strict=True)
assert all(np.array_equal(a, b) for a, b in pairs)
print(f"{from_orbax.config.num_parameters:,} parameters, bit for bit the same in both")

# %% [markdown]
# ## What a TPU needs
#
# - `pip install '.[tpu]'` on a Cloud TPU VM; on Colab JAX is there.
# - Memory: `--dry-run` tells what each device would hold, also of devices that are not there. What cannot fit is
#   refused, with what would do.
# - One process holds the chips of a machine: run commands from a shell, or as here inside the notebook, not both at
#   once.
# - `--mesh auto` (the default) uses all chips. On several machines, the same command on each with `--distributed`.
# - `--dtype bfloat16` for weights that are stored in float32; `gs://` addresses with `pip install '.[gcs]'`.
#
# These are plans and compilations. Nothing has been run on a TPU yet. Here is what eight chips of 16 GiB would hold to
# evaluate this model, as four replicas of two chips each:

# %%
run(
    evals_command,
    "--model own/model --suite quick --benchmark-data demo --dry-run --device-memory 16GiB --mesh data=4,model=2",
)

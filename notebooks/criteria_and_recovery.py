# %% [markdown]
# # Criteria with text, and training a model back
#
# PPM looks at weights alone. With a little text there is more to know: what each neuron does on it. This notebook
# compares criteria, refits `down_proj` by least squares, and then distils the dense model into a pruned one for a few
# steps. Everything is small; what to look at is the direction.
#
# **On a TPU** calibration needs the model, one Gram matrix at a time and part of the residual stream: 4.0 GB with
# Llama-3.2-1B by the TPU compiler's analysis. Recovery training of all weights needs about 16 bytes a parameter for
# float32 weights, gradients and AdamW, and the teacher beside them; `--train lora` needs much less, and several chips
# divide it. `--compute-dtype bfloat16` is for accelerators. Nothing here has been run on a TPU. On two CPU cores the
# reduced setting takes about two minutes.

# %%
import importlib.util
import subprocess
import sys

CHECKOUT = ".."  # on Colab, the folder that holds the checkout
if importlib.util.find_spec("gluprune_jax") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", f"{CHECKOUT}[notebooks]"], check=True)

# %%
import json
import shlex
from pathlib import Path

import jax
import matplotlib.pyplot as plt
from IPython.display import Image

from evals import compare
from gluprune_jax import prune, recover
from gluprune_jax.data.documents import read_text

on_accelerator = jax.default_backend() != "cpu"
REDUCED = not on_accelerator
MODEL = "demo"
CALIBRATION_TOKENS = 4096 if REDUCED else 32768
EVALUATE_TOKENS = 512 if REDUCED else 8192
METHODS = "ppm,hybrid,hybrid+least-squares" + ("" if REDUCED else ",ppm+least-squares,wanda,taylor,random")
PERCENTS = "20" if REDUCED else "10,20,40"
TRAINING = (
    "--steps 6 --sequence-length 128 --batch-size 2"
    if REDUCED
    else "--steps 200 --sequence-length 512 --batch-size 8 --compute-dtype bfloat16"
)
OUTPUT = Path("recovery-output")


def run(command, line):
    """Runs a command line in this process: a TPU belongs to one process, and this one holds it."""
    status = command.main(shlex.split(line))
    assert status == 0, f"exit status {status}"


# %% [markdown]
# ## Text
#
# The text is the language reference that every Python carries, `python-reference`. It is cut in two: what is measured
# on must not have been calibrated or trained on. Text of one kind makes a model for that kind; use your own.

# %%
OUTPUT.mkdir(exist_ok=True)
text = read_text("python-reference")
(OUTPUT / "held-out.txt").write_text(text[:40_000], encoding="utf-8")
(OUTPUT / "calibration.txt").write_text(text[40_000:], encoding="utf-8")
print(f"{len(text):,} characters")

# %% [markdown]
# ## Compare
#
# A method is a criterion, and behind it what else is done. `hybrid` multiplies the extent of a neuron's weights with
# the norm of its activation; `least-squares` refits `down_proj` in closed form, so that the neurons that stay do what
# the others did. The model runs over the text layer by layer; the choices are masks of the same compiled programs.
# Every number is written down: the same command resumes it, and more methods may be added to it.

# %%
run(
    compare,
    f"--model {MODEL} --methods {METHODS} --prune-percent {PERCENTS} "
    f"--calibration-data {OUTPUT}/calibration.txt --calibration-tokens {CALIBRATION_TOKENS} "
    f"--eval-data {OUTPUT}/held-out.txt --eval-tokens {EVALUATE_TOKENS} --output {OUTPUT}/comparison",
)

# %%
Image(str(OUTPUT / "comparison" / "comparison.png"), width=520)

# %% [markdown]
# ## Prune, then train back
#
# The PPM choice without any text is the one with the most to recover.

# %%
run(prune, f"--model {MODEL} --prune-percent 20 --output {OUTPUT}/pruned --overwrite")

# %% [markdown]
# The dense model is the teacher: the loss is the KL divergence of its next-token distribution from the student's, in
# nats. A run that is killed resumes from its last checkpoint when the same command is given again; so few steps make
# none. `--train mlp` trains only what was pruned; the default trains all weights.

# %%
run(
    recover,
    f"--model {OUTPUT}/pruned --teacher {MODEL} --train-data {OUTPUT}/calibration.txt --train mlp --learning-rate 3e-4 "
    f"{TRAINING} --output {OUTPUT}/recovered --overwrite",
)

# %%
log = [json.loads(line) for line in (OUTPUT / "recovered.recovery.jsonl").read_text().splitlines()]
plt.plot([line["step"] for line in log], [line["loss"] for line in log], marker="o" if REDUCED else None)
plt.xlabel("step")
plt.ylabel("loss (KL divergence, nats)")
plt.show()
first, last = log[0], log[-1]
print(f"loss {first['loss']:.3f} before the first step, {last['loss']:.3f} before the last; {last['tokens']:,} tokens")
assert last["loss"] < first["loss"]

# %% [markdown]
# On the held-out text:

# %%
import convert
from convert.tokenizer import encode_text, load_tokenizer
from evals.perplexity import perplexity

recovered = convert.load(OUTPUT / "recovered")
tokens = encode_text(load_tokenizer(recovered), text[:40_000])[:EVALUATE_TOKENS]
rows = json.loads((OUTPUT / "comparison" / "comparison.json").read_text())["rows"]
for row in rows:
    if (row["method"], row["target"]) in (("dense", None), ("ppm", "20 %")):
        print(f"{row['method']}: token perplexity {next(iter(row['perplexity'].values())):,.1f}")
print(f"recovered: token perplexity {perplexity(recovered.model, tokens).value:,.1f}")

# %% [markdown]
# ## On
#
# Calibrate first and train then: `--criterion hybrid --compensate least-squares` gives recovery a far better start than
# the PPM choice above. `python benchmarks/recovery.py` draws perplexity against training tokens.

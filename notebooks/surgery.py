# %% [markdown]
# # Surgery: replacing layers of a trained model
#
# Must a model be trained without softmax from the start, or can it be taken from one that was trained with it? This
# notebook trains a standard model, replaces its layers, looks at what the operation costs, and trains on.
#
# Run it in the folder `notebooks/`. On two free CPU cores it takes a few minutes, most of them training.

# %%
import os
import shutil

import matplotlib
from matplotlib.figure import Figure

import deconstruct as dc

# %matplotlib inline
matplotlib.rcParams["figure.dpi"] = 80

STEPS = int(os.environ.get("STEPS", 300))
DATA, RUNS = "../prepared/notebooks", "../runs/notebooks"

# %% [markdown]
# ## The original
#
# A small standard model on the Python standard library's source (a run that the other notebooks share).

# %%
dc.prepare_text(DATA, vocab_size=512, row_length=256, max_characters=4_000_000, workers=1)
config = dc.load_config("../configs/notebook.py", steps=STEPS, data=DATA)
dc.train_run(config, f"{RUNS}/standard-0")


def perplexity(workdir, step=None):
    records = dc.evaluate_run(workdir, contexts="64", step=step)
    return next(r["value"] for r in records if r["metric"] == "perplexity" and r["context"] == 64)


original = perplexity(f"{RUNS}/standard-0")

# %% [markdown]
# ## The operation
#
# `export` writes a checkpoint as safetensors, in the format of Hugging Face; `import` reads such a folder (from here,
# or from the hub) and may replace layers on the way. A replaced layer keeps what fits: its MLP, its norms, $W_V$ and
# $W_O$, and $W_Q$ and $W_K$ where the new mixer has them in the same shape.

# %%
from deconstruct.interop.export_checkpoint import export_checkpoint
from deconstruct.interop.import_checkpoint import import_checkpoint

shutil.rmtree(f"{RUNS}/surgery", ignore_errors=True)  # an operation begins with a clean table
export_checkpoint(f"{RUNS}/standard-0", f"{RUNS}/surgery/exported")

OPERATIONS = {  # name -> (variant, layout: which layers it replaces)
    "window, uniform": ("hidden/window(size=8)", "uniform"),
    "approximate, uniform": ("approximate", "uniform"),
    "static_emb_qk, even": ("static_emb_qk", "even"),
    "static_emb_qk, uniform": ("static_emb_qk", "uniform"),
}


def workdir_of(name):
    return f"{RUNS}/surgery/{name.replace(', ', '-')}"


for name, (variant, layout) in OPERATIONS.items():
    report = import_checkpoint(f"{RUNS}/surgery/exported", workdir_of(name), variant=variant, layout=layout)
    print(f"{name:24}" + "; ".join(" ".join(line.split()) for line in report if line.startswith("initialised")))

# %% [markdown]
# ## The patients, before any rehabilitation
#
# Perplexity with 64 tokens of context, of the original and right after each operation:

# %%
after = {name: perplexity(workdir_of(name), step=0) for name in OPERATIONS}
print(f"{'original':24}{original:>10.1f}")
for name, value in after.items():
    print(f"{name:24}{value:>10.1f}")

# %% [markdown]
# TODO after
#
# ## Training on
#
# A third of the original's steps, at a third of its learning rate. The original goes on as well, as much: what it
# gains by that is owed to training, and not to any operation. A stage of rehabilitation is nothing but keys of the
# configuration, so another kind is another entry of `STAGE`.

# %%
MORE = max(STEPS // 3, 2)
STAGE = {"steps": MORE, "learning_rate": 3e-3, "optimizer.warmup_steps": min(10, MORE)}

import_checkpoint(f"{RUNS}/surgery/exported", workdir_of("original"))
PATIENTS = {"original": ("standard", "uniform"), **OPERATIONS}
curves = {}
for name, (variant, layout) in PATIENTS.items():
    config = dc.load_config(
        "../configs/notebook.py", variant=variant, layout=layout, data=DATA,
        **{"model.match_parameters": name == "original", **STAGE},
    )  # fmt: skip
    curves[name] = dc.train_run(config, workdir_of(name))
dc.draw_curves(curves)

# %% [markdown]
# TODO curves

# %%
trained = {name: perplexity(workdir_of(name)) for name in PATIENTS}

# %% [markdown]
# ## Were the old weights worth anything?
#
# The control that is easily forgotten: the same model, as many steps, from random weights.

# %%
scratch = {}
for name in ("approximate, uniform", "static_emb_qk, uniform"):
    variant, layout = OPERATIONS[name]
    stage = {**STAGE, "learning_rate": 1e-2}  # what the original was trained with
    config = dc.load_config("../configs/notebook.py", variant=variant, layout=layout, data=DATA, **stage)
    dc.train_run(config, f"{workdir_of(name)}-scratch")
    scratch[name] = perplexity(f"{workdir_of(name)}-scratch")

# %%
print(f"{'':24}{'operated':>10}{'trained on':>12}{'from scratch':>14}")
for name, value in trained.items():
    operated = after.get(name, original)
    alone = f"{scratch[name]:.1f}" if name in scratch else ""
    print(f"{name:24}{operated:>10.1f}{value:>12.1f}{alone:>14}")

# %%
figure = Figure(figsize=(6.4, 2.8), layout="constrained")
axis = figure.add_subplot()
for place, name in enumerate(reversed(PATIENTS)):
    axis.plot([after.get(name, original), trained[name]], [place, place], color="0.7", linewidth=1.2, zorder=1)
    axis.plot(after.get(name, original), place, "o", color="C3", label="operated" if not place else None)
    axis.plot(trained[name], place, "o", color="C0", label="trained on" if not place else None)
    if name in scratch:
        axis.plot(scratch[name], place, "x", color="0.3", label="from scratch, as many steps" if not place else None)
axis.axvline(original, color="0.4", linewidth=0.8, linestyle="--", label="original")
axis.set(xscale="log", xlabel="perplexity")
axis.set_yticks(range(len(PATIENTS)), reversed(PATIENTS), fontsize=8)
axis.legend(fontsize=7, frameon=False)
figure

# %% [markdown]
# TODO figure
#
# ## What has become of the maps
#
# The last layer of `approximate, uniform` over one line of code: before the operation, right after it, and trained on.

# %%
LINE = "for name in names: print(name)"
before = dc.read_maps(f"{RUNS}/standard-0", LINE)
operated = dc.read_maps(workdir_of("approximate, uniform"), LINE, step=0)
grown = dc.read_maps(workdir_of("approximate, uniform"), LINE)
panels = (("original", before), ("operated", operated), ("trained on", grown))
dc.draw_maps([[(f"{title}\nlayer 4, mean of heads", maps.layers[3].mean(0)) for title, maps in panels]], before.tokens)

# %% [markdown]
# TODO maps
#
# A checkpoint of the hub is treated alike: `deconstruct import --checkpoint=DIR --variant=... --layout=...`, then
# `deconstruct train`, which goes on from it.

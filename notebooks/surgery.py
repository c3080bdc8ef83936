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
from deconstruct.interop.export_checkpoint import export_checkpoint
from deconstruct.interop.import_checkpoint import import_checkpoint

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
    records = dc.evaluate_run(workdir, contexts="64", data=DATA, step=step)
    return next(r["value"] for r in records if r["metric"] == "perplexity" and r["context"] == 64)


original = perplexity(f"{RUNS}/standard-0")

# %% [markdown]
# ## The operation
#
# `export` writes a checkpoint as safetensors, in the format of Hugging Face; `import` reads such a folder (from here,
# or from the hub) and may replace layers on the way. A replaced layer keeps what fits: its MLP, its norms, $W_V$ and
# $W_O$, and $W_Q$ and $W_K$ where the new mixer has them in the same shape.

# %%
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


drawn = {}
for name, (variant, layout) in OPERATIONS.items():
    report = import_checkpoint(f"{RUNS}/surgery/exported", workdir_of(name), variant=variant, layout=layout)
    drawn[name] = [line.split(maxsplit=1)[1] for line in report if line.startswith("initialised")]
    print(f"{name:24} drawn anew: {', '.join(drawn[name])}")

# %% [markdown]
# ## The patients, before any rehabilitation
#
# Perplexity with 64 tokens of context, of the original and right after each operation:

# %%
after = {name: perplexity(workdir_of(name), step=0) for name in OPERATIONS}
print(f"{'original':24}{original:>10.1f}")
for name, value in after.items():
    print(f"{name:24}{value:>10.1f}  ({value - original:+.1f})")

# %% [markdown]
# The patients hardly notice. A window of eight tokens costs 0.7: almost nothing that this young model does with its
# attention reaches further. Nor does it miss the hidden states: with queries and keys of the token embeddings alone,
# in every layer, perplexity is 56.7 for 55.8. Only the polynomial hurts. $1 + x + x^2/2$ is nowhere below a half, so
# what softmax had learned to ignore is heard again.
#
# ## Training on
#
# A third of the original's steps, at three tenths of its learning rate, on the same text. The original goes on as
# well, as much: what it gains is owed to training, and not to any operation.

# %%
MORE = max(STEPS // 3, 12)
STAGE = {
    "steps": MORE,
    "learning_rate": 3e-3,
    "optimizer.warmup_steps": 4,
    "checkpoint_every": MORE // 3,
    "checkpoint.keep": 5,
}


def train_on(workdir, variant, layout, **keys):
    """An MLP that was trained keeps its width, whatever comes to stand beside it: nothing is matched."""
    keys = {"model.match_parameters": variant == "standard", **STAGE, **keys}
    return dc.train_run(
        dc.load_config("../configs/notebook.py", variant=variant, layout=layout, data=DATA, **keys), workdir
    )


import_checkpoint(f"{RUNS}/surgery/exported", workdir_of("original"))
PATIENTS = {"original": ("standard", "uniform"), **OPERATIONS}
curves = {name: train_on(workdir_of(name), variant, layout) for name, (variant, layout) in PATIENTS.items()}
trained = {name: perplexity(workdir_of(name)) for name in PATIENTS}
dc.draw_curves(curves)

# %% [markdown]
# Each line is the loss of single batches, the same for all, so they rise and fall together; `approximate` begins apart
# from the others, and closes part of the distance.
#
# ## Were the old weights worth anything?
#
# The control that is easily forgotten: the patient that lost most, from random weights, with as many steps, at the
# original's own learning rate.

# %%
WORST = "approximate, uniform"
train_on(f"{workdir_of(WORST)}-scratch", *OPERATIONS[WORST], learning_rate=1e-2)
scratch = perplexity(f"{workdir_of(WORST)}-scratch")

print(f"{'':24}{'operated':>10}{'trained on':>12}")
for name, value in trained.items():
    print(f"{name:24}{after.get(name, original):>10.1f}{value:>12.1f}")
print(f"{WORST + ', from scratch':34}{scratch:>12.1f}")

# %%
figure = Figure(figsize=(6.4, 2.6), layout="constrained")
axis = figure.add_subplot()
for place, name in enumerate(reversed(PATIENTS)):
    first = not place  # one entry in the legend each
    axis.plot([after.get(name, original), trained[name]], [place, place], color="0.7", linewidth=1.2, zorder=1)
    axis.plot(after.get(name, original), place, "o", color="C3", label="operated" if first else None)
    axis.plot(trained[name], place, "o", color="C0", label="trained on" if first else None)
    if name == WORST:
        axis.plot(scratch, place, "x", color="0.3", label="from scratch, as many steps")
axis.axvline(original, color="0.4", linewidth=0.8, linestyle="--", label="original")
axis.set_xlabel("perplexity")
axis.set_yticks(range(len(PATIENTS)), reversed(PATIENTS), fontsize=8)
axis.legend(fontsize=7, frameon=False)
figure

# %% [markdown]
# Trained on, three of four operations are within a point of the original that was trained on as well (50.3), and the
# window is ahead of it, at 49.8. `approximate` ends at 53.2: better than the original was before, not as good as it is
# now. From random weights the same steps lead to 132.5 (the cross far at the right). So most of what the original knew
# was not in its softmax, and outlived the operation.
#
# ## A teacher
#
# The original is still there, and can teach: first each new mixer by itself, to give what the old one gave at the same
# place; then all of the model, to foretell what the original foretells; then text again. A stage of distillation is
# nothing but keys of the configuration. Here each has a third of the steps, of the patient that lost most.

# %%
TAUGHT = {
    "distill.teacher": f"{RUNS}/standard-0",
    "distill.mixer_steps": MORE // 3,
    "distill.logit_steps": MORE // 3,
}
variant, layout = OPERATIONS[WORST]
import_checkpoint(f"{RUNS}/surgery/exported", f"{workdir_of(WORST)}-taught", variant=variant, layout=layout)
train_on(f"{workdir_of(WORST)}-taught", variant, layout, **TAUGHT)

steps = [0, MORE // 3, 2 * (MORE // 3), MORE]
ways = {"text alone": workdir_of(WORST), "taught, then text": f"{workdir_of(WORST)}-taught"}
recovery = {way: [(step, perplexity(workdir, step)) for step in steps] for way, workdir in ways.items()}
dc.draw_perplexity({**recovery, "original": [(0, original)]}, context=64)

# %%
print(f"{'step':20}" + "".join(f"{step:>8}" for step in steps))
for way, points in recovery.items():
    print(f"{way:20}" + "".join(f"{value:>8.1f}" for _, value in points))
print(f"{'original':20}{original:>8.1f}")

# %% [markdown]
# The teacher brings its pupil near itself, and no further: after two thirds of the steps the taught model is at 58.5,
# where text alone has passed the teacher (55.8) and is at 53.4. That is as it must be. The original had been trained
# for 300 steps and was far from what the text allows, and the pupil's own stage of text came when the learning rate
# had all but run out. A teacher pays where it is good and text is dear; here neither is so.
#
# ## What has become of the maps
#
# The last layer over one line of code, before the operation, right after it, and trained on. All panels share one
# scale.

# %%
LINE = "for name in names: print(name)"
panels = {
    "original": dc.read_maps(f"{RUNS}/standard-0", LINE),
    "operated": dc.read_maps(workdir_of(WORST), LINE, step=0),
    "trained on": dc.read_maps(workdir_of(WORST), LINE),
}
rows = [[(f"{title}\nlayer 4, mean of heads", maps.layers[3].mean(0)) for title, maps in panels.items()]]
dc.draw_maps(rows, panels["original"].tokens)

# %% [markdown]
# The operation takes out the contrast: the columns that the original looked at (`n`, `s`, `t`) are still there, pale
# among weights that are no longer near zero. Training on brings some of them back, and none of the emptiness between
# them.
#
# A checkpoint of the hub is treated alike: `deconstruct import --checkpoint=DIR --variant=... --layout=...`, then
# `deconstruct train`; [docs/surgery.md](../docs/surgery.md) has the stages and what they refuse.

# %% [markdown]
# # Look inside: what do trained heads attend to?
#
# Four small models, trained alike on the Python standard library's source, read one line of code:
#
# - `standard`: softmax over hidden states;
# - `static_emb_qk`: softmax too, but queries and keys see only the token embeddings, in every layer;
# - `non_approximate`: a weight depends on its key alone, $A_{ij} \propto \exp(s_j)$;
# - `hidden/gated_delta`: no softmax at all, but a recurrence that writes and erases. Its map is the *effective* one:
#   what each value contributes to each output.
#
# Run it in the folder `notebooks/`. On two free CPU cores it takes a few minutes, most of them training.

# %%
import os

import matplotlib
import numpy as np
from matplotlib.figure import Figure

import deconstruct as dc

# %matplotlib inline
matplotlib.rcParams["figure.dpi"] = 80

STEPS = int(os.environ.get("STEPS", 300))
DATA, RUNS = "../prepared/notebooks", "../runs/notebooks"
VARIANTS = {
    "standard": f"{RUNS}/standard-0",
    "static_emb_qk": f"{RUNS}/static_emb_qk-0",
    "non_approximate": f"{RUNS}/non_approximate-0",
    "hidden/gated_delta": f"{RUNS}/gated_delta-0",
}

# %% [markdown]
# ## Training them
#
# One call a run; run again, it finds them done (and `standard-0`, if another of the notebooks has trained it).

# %%
dc.prepare_text(DATA, vocab_size=512, row_length=256, max_characters=4_000_000, workers=1)

curves = {}
for variant, workdir in VARIANTS.items():
    config = dc.load_config("../configs/notebook.py", variant=variant, steps=STEPS, data=DATA)
    curves[variant] = dc.train_run(config, workdir)
dc.draw_curves(curves)

# %% [markdown]
# Losses are those of single batches, the same for all four, so the lines rise and fall together. `non_approximate`
# stops learning after thirty steps, the softmax over static embeddings keeps step with the one over hidden states, and
# the recurrence gets ahead of both.
#
# How much of that is owed to context? Perplexity with 4 tokens of context, and with 64:

# %%
perplexity = {}
for variant, workdir in VARIANTS.items():
    records = dc.evaluate_run(workdir, contexts="4,64")
    perplexity[variant] = {r["context"]: r["value"] for r in records if r["metric"] == "perplexity"}
for variant, of in perplexity.items():
    print(f"{variant:20} {of[4]:6.1f} -> {of[64]:6.1f}   {1 - of[64] / of[4]:+.0%} from context")

# %% [markdown]
# Context is worth 9 % of perplexity to standard attention after so little training, 18 % to the recurrence, and 1 % to
# `non_approximate`. Queries and keys that see nothing but the token embeddings are worth as much here as those that
# see hidden states.
#
# ## One line of code, two layers
#
# `dc.read_maps` gives the tokens of a text and each layer's map. Queries go down, keys across; a row says where the
# token at its left looks.

# %%
LINE = "for name in names: print(name)"
maps = {variant: dc.read_maps(workdir, LINE) for variant, workdir in VARIANTS.items()}
tokens = maps["standard"].tokens
softmax = [variant for variant in VARIANTS if variant != "hidden/gated_delta"]
dc.draw_maps(
    [
        [(f"{variant}\nlayer {layer}, mean of heads", maps[variant].layers[layer - 1].mean(0)) for variant in softmax]
        for layer in (1, 4)
    ],
    tokens,
)

# %% [markdown]
# In the first layer each token of the two softmax models looks mostly at itself (the dark diagonal); in the fourth
# they look back, and no longer in the same way. `non_approximate` can only paint columns: in the first layer its heads
# have picked out a few tokens, `n` above all, for everybody to look at. In the fourth it has given up, and spreads its
# weight evenly.
#
# Heads differ; a mean hides it. The four heads of the first and the last layer of standard attention:

# %%
dc.draw_maps(
    [
        [(f"layer {layer}, head {head + 1}", maps["standard"].layers[layer - 1][head]) for head in range(4)]
        for layer in (1, 4)
    ],
    tokens,
)

# %% [markdown]
# In the first layer head 4 keeps to its own token, and head 3 does not. In the fourth head 1 goes back to the
# beginning of the first `name`, from nearly everywhere, and head 3 looks a few tokens back, at the end of a word:
# `ame`, `s`, `t`.
#
# ## The effective map of a recurrence
#
# `gated_delta` keeps a state $S_t = a_t (I - b_t k_t k_t^\top) S_{t-1} + b_t k_t v_t^\top$ and reads it with the
# query. Unrolled, that is a map like any other, but for two things: entries may be negative, and rows need not sum to
# one.

# %%
effective = maps["hidden/gated_delta"].layers
dc.draw_maps([[(f"gated_delta, layer {i}\nhead 1", effective[i - 1][0]) for i in (1, 2, 4)]], tokens)

# %%
sums = {variant: [layer.sum(-1) for layer in maps[variant].layers] for variant in VARIANTS}
sums = {variant: (np.min(of), np.max(of)) for variant, of in sums.items()}
for variant, (least, most) in sums.items():
    print(f"{variant:20} rows sum to {least:.2f} to {most:.2f}")

below = np.tril(np.ones((len(tokens), len(tokens)), bool))
for number, of_layer in enumerate(effective, 1):
    entries = of_layer[:, below]
    print(f"gated_delta, layer {number}: {np.mean(entries < 0):.0%} of the entries are negative")

# %% [markdown]
# Red adds, blue takes away. In the second layer values are written and stay readable for a few tokens, then are gone
# (the columns end): forgotten by the gate, or erased. None of these rows sums to one, and 38 to 62 % of the entries are
# negative, which no softmax can do.
#
# ## What can a map depend on?
#
# The variants were made to give something up, and whether they do can be asked of the numbers. Two questions. Do all
# queries divide their attention among the first four tokens in the same proportions, so that a weight depends on its
# key alone? And when the same ending follows another beginning, does the last token divide its attention among the
# last four as before, so that a map knows tokens and distances but not what was made of them?

# %%
OTHER = "while not done: self.print(name)"


def key_alone(variant):
    first = maps[variant].layers[0][:, 4:, :4]  # [heads, queries, 4]
    return bool(np.ptp(first / first.sum(-1, keepdims=True), axis=1).max() < 1e-3)


def same_map(variant):
    ends = [layers[3][:, -1, -4:] for layers in (maps[variant].layers, dc.read_maps(VARIANTS[variant], OTHER).layers)]
    shares = [end / end.sum(-1, keepdims=True) for end in ends]  # [heads, 4]
    return bool(np.abs(shares[0] - shares[1]).max() < 1e-3)


depends = {variant: (key_alone(variant), same_map(variant)) for variant in VARIANTS}
print("the last four tokens:", *tokens[-4:])
for variant, (one, other) in depends.items():
    print(f"{variant:20} key alone {one!s:8} the same after another beginning {other}")

# %% [markdown]
# Each variant is what it says. `non_approximate` cannot tell two queries apart. `static_emb_qk` looks at the last four
# tokens in the fourth layer just as it would after any other beginning; the softmax over hidden states does not.
#
# ## In numbers: indicators by layer and head
#
# A line is an anecdote. `dc.evaluate_run` with the task `indicators` measures the maps over whole sequences of
# validation text: entropy (nats), the weight on the first position (the *sink*), and on the token before (`focus_1`).

# %%
METRICS = {"entropy": "entropy (nats)", "sink": "weight on the first position", "focus_1": "weight on the token before"}
records = {variant: dc.evaluate_run(workdir, "indicators", sequences=4) for variant, workdir in VARIANTS.items()}


def by_head(variant, metric):
    """[layers, heads]"""
    return np.array([r["heads"] for r in records[variant] if r["metric"] == metric])


figure = Figure(figsize=(8.4, 1.7 * len(METRICS)), layout="constrained")
grid = figure.subplots(len(METRICS), len(VARIANTS))
for row, (metric, title) in zip(grid, METRICS.items(), strict=True):
    most = max(by_head(variant, metric).max() for variant in VARIANTS)
    for axis, variant in zip(row, VARIANTS, strict=True):
        image = axis.imshow(by_head(variant, metric), cmap="Blues", vmin=0, vmax=most)
        axis.set_xticks(range(4), ["1", "2", "3", "4"], fontsize=7)
        axis.set_yticks(range(4), ["1", "2", "3", "4"], fontsize=7)
        axis.set_xlabel("head", fontsize=7)
        axis.set_ylabel("layer", fontsize=7)
        axis.set_title(variant, fontsize=8)
    bar = figure.colorbar(image, ax=row, shrink=0.8)
    bar.set_label(title, fontsize=7)
    bar.ax.tick_params(labelsize=7)
figure

# %%
for metric in METRICS:
    print(metric)
    for variant in VARIANTS:
        of_layers = ", ".join(f"{x:.2f}" for x in by_head(variant, metric).mean(1))
        print(f"  {variant:20} by layer {of_layers}")

# %%
weights = by_head("standard", "focus_1")
for number in np.argsort(weights.ravel())[::-1][:2]:
    layer, head = np.unravel_index(number, weights.shape)
    print(f"standard, layer {layer + 1}, head {head + 1}: {weights[layer, head]:.2f} on the token before")
print(f"static_emb_qk, the most of any head: {by_head('static_emb_qk', 'focus_1').max():.2f}")

# %% [markdown]
# Two heads of standard attention have become heads for the token before: head 1 of layer 3, with a weight of 0.24 on
# it, and head 2 of layer 2, with 0.21. They stand out as the dark cells of the bottom row. No head over static
# embeddings has done so; the most is 0.08.
#
# Entropy has a yardstick: a map that spreads each row evenly over what it may see.

# %%
length = 64
uniform = np.mean(np.log(np.arange(1, length + 1)))
print(f"even weights over {length} positions: {uniform:.2f} nats; the first position would get "
      f"{np.mean(1 / np.arange(1, length + 1)):.2f}")  # fmt: skip

# %% [markdown]
# Above the first layer the entropy of `non_approximate` is that of even weights: those layers average over all they
# may see. The others keep far below it. No model has made a sink of the first position; that takes longer training,
# and none of these is much above the 0.07 that even weights would give it.
#
# ## How alike are the layers?
#
# The mean cosine between a layer's map and those of the others:

# %%
for variant in VARIANTS:
    alike = [r["value"] for r in records[variant] if r["metric"] == "map_similarity"]
    print(f"{variant:20} " + "  ".join(f"{x:.2f}" for x in alike))

# %% [markdown]
# The layers of `non_approximate` are alike because they are all even. Those of the two softmax models differ from each
# other about as much whether or not queries and keys can see what the layers below have made of the text: each layer
# has its own $W_Q$ and $W_K$. Of the recurrence, whose maps have signs, layers have far less in common.
#
# What each indicator is stands in [docs/evaluation.md](../docs/evaluation.md#indicators); `deconstruct draw maps` and
# `deconstruct evaluate --tasks=indicators` do the same from the command line, for any run.

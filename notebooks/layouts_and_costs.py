# %% [markdown]
# # Layouts and costs: which layer is what, and what it takes
#
# A *variant* says what a layer does; a *layout* says which layers do it and which stay standard. This notebook shows
# the layouts, then counts parameters, floating-point operations and bytes from shapes alone, for a model of the
# paper's size that would not fit here, and lays measured time beside the count, at a size that does.
#
# Nothing is trained. Run it in the folder `notebooks/`; on two free CPU cores it takes a minute or two.

# %%
import matplotlib
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

import deconstruct as dc
from deconstruct.bench.contexts import context_speed
from deconstruct.bench.rounds import Case
from deconstruct.compare import plots
from deconstruct.costs import accounting
from deconstruct.layout import LAYOUTS, STANDARD, layer_variants

# %matplotlib inline
matplotlib.rcParams["figure.dpi"] = 80

# %% [markdown]
# ## Which layer is what
#
# Each row is a layout of twelve layers, counted from the embeddings up. Dark cells hold the variant, light ones stay
# standard.

# %%
DEPTH = 12
replaced = np.array([[name != STANDARD for name in layer_variants(layout, "mlp", DEPTH)] for layout in LAYOUTS])

figure = Figure(figsize=(5.6, 3.4), layout="constrained")
axis = figure.add_subplot()
axis.imshow(replaced, cmap=ListedColormap(["#dbe9f6", "#2171b5"]), aspect="auto")
axis.set_xticks(range(DEPTH), range(1, DEPTH + 1), fontsize=8)
axis.set_yticks(range(len(LAYOUTS)), LAYOUTS, fontsize=8)
axis.set_xticks(np.arange(DEPTH) - 0.5, minor=True)
axis.set_yticks(np.arange(len(LAYOUTS)) - 0.5, minor=True)
axis.grid(which="minor", color="white", linewidth=1.5)
axis.tick_params(which="both", length=0)
axis.set_xlabel("layer")
figure

# %%
for layout, row in zip(LAYOUTS, replaced, strict=True):
    print(f"{layout:10} {row.sum():2} of {DEPTH} replaced")

# %% [markdown]
# `even`, `odd`, `top`, `middle` and `bottom` all replace half, so what differs between them is *where*. `first`,
# `last` and `bilateral` ask whether one or two standard layers are enough. A list does too: `layout="1,5,9"` keeps
# those.
#
# ## Parameters
#
# The paper's 500m (24 layers, hidden size 896, 14 heads) with each variant in every layer. `dc.describe` computes
# shapes and allocates nothing.

# %%
VARIANTS = ["standard", "approximate", "non_approximate", "mlp", "hidden/window(size=256)", "hidden/gated_delta"]


def paper(variant, layout="uniform"):
    return dc.load_config("../configs/paper.py:size=500m", variant=variant, layout=layout, data="")


described = {variant: dc.describe(paper(variant)) for variant in VARIANTS}
print(f"{'':24}{'total':>13}{'a mixer':>12}{'to standard':>13}{'a layer, MLP too':>18}")
for variant, found in described.items():
    print(
        f"{variant:24}{found['parameters']['total']:>13,}{found['parameters']['mixer_per_layer'][0]:>12,}"
        f"{found['mixer_difference_per_layer'][0]:>+13,}{found['difference_per_layer'][0]:>+18,}"
    )

# %% [markdown]
# Where a mixer has more or fewer parameters than standard attention, the MLP of its block takes up the difference, to
# the nearest unit of its width (3 × 896 parameters). So the last column stays below half of that, and a comparison of
# variants is one at equal parameters.
#
# ## Floating-point operations by context
#
# FLOPs of a forward pass, divided by its tokens; a multiply-add counts as two, and causal attention as half of its
# square. The model is the same in all lines, and so are its MLPs and its head: what bends the lines is the mixing.

# %%
CONTEXTS = [2**n for n in range(8, 18)]


def flops_a_token(variant, context):
    return accounting.forward_flops(paper(variant).model, 1, context).needed / context


flops = {variant: np.array([flops_a_token(variant, context) for context in CONTEXTS]) for variant in VARIANTS}


def by_context(values, label):
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axis = figure.add_subplot()
    for variant, of in values.items():
        colour = f"C{VARIANTS.index(variant)}"  # the same in every picture
        axis.plot(CONTEXTS, of, "o-", markersize=3, linewidth=1.2, color=colour, label=variant)
    axis.set(xscale="log", yscale="log", xlabel="context (tokens)", ylabel=label)
    axis.set_xticks(CONTEXTS, [f"{context:,}" for context in CONTEXTS], fontsize=7, rotation=45)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:,g}")
    axis.minorticks_off()
    axis.tick_params(axis="y", labelsize=7)
    axis.grid(linewidth=0.3)
    axis.legend(fontsize=7, frameon=False)
    return figure


by_context({variant: of / 1e9 for variant, of in flops.items()}, "GFLOPs a token, forward")

# %%
ratios = {variant: of / flops["standard"] for variant, of in flops.items()}
print(f"{'of standard':24}" + "".join(f"{context:>9,}" for context in CONTEXTS[::3]))
for variant, of in ratios.items():
    print(f"{variant:24}" + "".join(f"{ratio:>9.2f}" for ratio in of[::3]))

# %% [markdown]
# Standard attention rises; everything else turns flat. `approximate` rises with it until its recurrence, whose state
# has half of $64^2$ numbers for each value channel, is the cheaper of its two programs. At 131,072 tokens all the
# others need about a seventh of standard's work, and what is left is nearly all MLP and projections: `mlp`, which
# mixes nothing, is hardly below the recurrences.
#
# Where do the lines cross? The shortest context, to the nearest 64 tokens, at which a variant needs fewer FLOPs than
# standard attention:


# %%
def crossing(variant, longest=2**17, step=64):
    """The least multiple of `step` from which on the variant needs less; None where it does not up to `longest`."""

    def wins(count):
        return flops_a_token(variant, count * step) < flops_a_token("standard", count * step)

    low, high = 0, longest // step
    if not wins(high):
        return None
    while high - low > 1:  # wins(high), and not wins(low): once it wins, it goes on to
        middle = (low + high) // 2
        low, high = (low, middle) if wins(middle) else (middle, high)
    return high * step


crossings = {variant: crossing(variant) for variant in VARIANTS if variant != "standard"}
for variant, context in crossings.items():
    print(f"{variant:24} needs fewer FLOPs than standard from {context:,} tokens on")

# %% [markdown]
# A running sum wins at once, a window as soon as the text is longer than it, `gated_delta` a little later; the exact
# second order of `approximate` pays from 4,544 tokens on. None of this is speed yet: it is work.
#
# ## Bytes of the cache
#
# What decoding keeps of one sequence, in the model's own precision: keys and values grow with the context, states do
# not.

# %%
cache = {
    variant: np.array([accounting.cache_bytes(paper(variant).model, 1, context) for context in CONTEXTS])
    for variant in VARIANTS
    if variant != "mlp"  # keeps nothing
}
by_context({variant: of / 2**20 for variant, of in cache.items()}, "cache of one sequence (MiB)")

# %%
print(f"{'MiB':24}" + "".join(f"{context:>10,}" for context in CONTEXTS[::3]))
for variant, of in cache.items():
    print(f"{variant:24}" + "".join(f"{size / 2**20:>10,.1f}" for size in of[::3]))

# %% [markdown]
# Keys and values of 2,048 tokens take 168.0 MiB, those of 131,072 tokens 10,752.0. The state of `approximate` starts
# out as heavy as those of some two thousand tokens and never grows; that of `gated_delta` is a matrix a head, and
# `non_approximate` keeps a sum and a maximum.
#
# A hybrid pays for its standard layers alone. `non_approximate` in every other layer, in all but every fourth, in all:

# %%
for layout in ("even", "quarter", "uniform"):
    model = paper("non_approximate", layout).model
    share = accounting.cache_bytes(model, 1, 2**15) / cache["standard"][CONTEXTS.index(2**15)]
    work = accounting.forward_flops(model, 1, 2**15).needed / 2**15 / flops["standard"][CONTEXTS.index(2**15)]
    print(f"non_approximate, {layout:8} at 32,768 tokens: {share:5.1%} of the cache, {work:4.0%} of the FLOPs")

# %% [markdown]
# ## Seconds beside it
#
# FLOPs are a promise; a program keeps it or does not. Milliseconds of one decoded token at a size that this machine
# can run, each variant in all layers, after as many positions. The variants take turns, so that whatever else the
# machine does falls on all of them; a ratio is the median of the rounds' ratios.

# %%
CASE = Case("notebook", 1, 256, 512, 256, 768, 4, 8)  # batch, length, vocabulary, hidden, MLP, layers, heads
TIMED = ("standard", "approximate", "non_approximate", "mlp", "hidden/gated_delta")
measured = context_speed(CASE, rounds=9, contexts=(256, 2048, 16384), variants=TIMED)
plots.time_by_length(measured)


# %%
def show(value, ratio):
    return f"{value:.2f} ({ratio:.2f})"


print(f"{'ms a token (of standard)':30}" + "".join(f"{context:>16,}" for context in measured["contexts"]))
for variant, row in measured["variants"].items():
    cells = zip(row["milliseconds"], row["ratio"], strict=True)
    print(f"{variant:30}" + "".join(f"{show(ms, ratio['median']):>16}" for ms, ratio in cells))

# %% [markdown]
# What the count says of the same model, one more token after as many:

# %%
print(f"{'MFLOPs a token (of standard)':30}" + "".join(f"{context:>16,}" for context in measured["contexts"]))
counts = {
    variant: [accounting.decode_flops(CASE.config(variant).model, 1, n).needed / 1e6 for n in measured["contexts"]]
    for variant in TIMED
}
for variant, row in counts.items():
    cells = zip(row, counts["standard"], strict=True)
    print(f"{variant:30}" + "".join(f"{show(count, count / other):>16}" for count, other in cells))

# %% [markdown]
# The machine was busy with other work when this page was made, so the digits of short times mean little. The long ones
# mean something: after 16,384 positions all four take less than a tenth of the time of standard attention.
# `approximate` takes 0.09 of it for 0.13 of the FLOPs, `gated_delta` 0.04 for 0.10. Time falls further than work does:
# a token under standard attention reads all keys and values before it, and probably waits for memory more than for
# arithmetic. The bytes counted above are a promise too.
#
# [docs/costs.md](../docs/costs.md) has the formulas beside what compiled programs do, and figures of a larger model;
# `deconstruct bench contexts` measures one, and `deconstruct describe --costs` prints the counts of any configuration.

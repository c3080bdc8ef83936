# %% [markdown]
# # A form of your own: must attention forget exponentially?
#
# A *form* turns queries and keys into weights. Softmax forgets exponentially: a key that fits a little worse gets a
# great deal less. This notebook tries a form that forgets more slowly, and lets each head choose how slowly. It goes
# the whole way: the idea, the definition, the check, training beside standard attention at equal parameters over two
# seeds, the comparison, and a look at what the new parameter has learned.
#
# Run it in the folder `notebooks/`. On two free CPU cores it takes a few minutes, most of them training.

# %%
import os

import matplotlib
import numpy as np
from IPython.display import Markdown
from matplotlib.figure import Figure

import deconstruct as dc
from deconstruct.compare import plots, tables
from deconstruct.compare.command import loss_curves

# %matplotlib inline
matplotlib.rcParams["figure.dpi"] = 80

STEPS = int(os.environ.get("STEPS", 300))
DATA, RUNS = "../prepared/notebooks", "../runs/notebooks"
os.makedirs(RUNS, exist_ok=True)

# %% [markdown]
# ## The idea
#
# Gaussian neighbourhoods crowd everything that is not near into nothing. When t-SNE met that problem in a picture, it
# replaced the Gaussian with Student's t, whose tails are heavy. The same can be done to attention. With $D_{ij} =
# \lVert q_i - k_j \rVert^2 / d_h$,
#
# $$A_{ij} = \frac{c_{ij}}{\sum_{m \le i} c_{im}}, \qquad c_{ij} = (1 + D_{ij})^{-p_h}$$
#
# Each head $h$ learns its own power $p_h > 0$. A small one has a tail so heavy that all keys count nearly alike; the
# larger it is, the sooner a far key is out of sight. Where distances are small, $(1 + D)^{-p} \approx e^{-pD}$, which
# is softmax's own way of forgetting. So the parameter is an answer to the question in the title, one a head.
#
# Before anything is trained, the two can be laid side by side: what a key keeps of its weight as it moves away.

# %%
figure = Figure(figsize=(6.4, 3.2), layout="constrained")
axis = figure.add_subplot()
distances = np.linspace(0, 10, 200)
axis.semilogy(distances, np.exp(-distances), "k--", label="exponential (softmax)")
for power in (0.5, 1, 2, 3):
    axis.semilogy(distances, (1 + distances) ** -power, label=f"Student's t, p = {power}")
axis.set(xlabel="squared distance of query and key, $D$", ylabel="weight, of that at D = 0", ylim=(1e-4, 1.2))
axis.legend(fontsize=8, frameon=False)
figure

# %% [markdown]
# The dashed line is straight and leaves the picture at $D \approx 9$; every power bends away from it and stays in
# sight.
#
# ## The definition
#
# A form must define `weights(q, k, mask)`: float32, causal, each row summing to one. `q` is `[B, L, heads, d_h]`, `k`
# is `[B, L, kv_heads, d_h]`, and `mask.dense(L, L)` says which positions see which. From that the model takes the
# training path, maps, decoding and sharding. The cell writes the form into a file, which is how a run can be opened
# again: the trainer keeps a copy of it in the run's folder.

# %%
# %%writefile ../runs/notebooks/student_t.py
import math

import jax.numpy as jnp

import deconstruct as dc


@dc.register_form
class StudentT(dc.Form):
    """A_ij = c_ij / sum_m c_im, c_ij = (1 + |q_i - k_j|^2 / d_h)^(-p), one learned p > 0 for each head."""

    name = "student_t"
    relaxes = ("mathematical form",)
    documents = True  # it keeps to the mask

    def __init__(self, config, rngs, *, start: float = 1.0):
        self.log_p = dc.constant_param(math.log(start), (config.num_heads,), ("heads",))

    def weights(self, q, k, mask):
        q, k = q.astype(jnp.float32), k.astype(jnp.float32)
        k = jnp.repeat(k, q.shape[2] // k.shape[2], axis=2)  # grouped queries share their keys
        q_square, k_square = (jnp.square(x).sum(-1).swapaxes(1, 2) for x in (q, k))  # [B, heads, L]
        products = jnp.einsum("blhd,bmhd->bhlm", q, k)
        distance = (q_square[..., :, None] + k_square[..., None, :] - 2 * products) / q.shape[-1]
        p = jnp.exp(self.log_p[...])[None, :, None, None]
        c = jnp.where(mask.dense(*distance.shape[-2:]), (1 + jnp.maximum(distance, 0)) ** -p, 0)
        return c / c.sum(-1, keepdims=True)


# %% [markdown]
# A configuration that names the file knows the form, and any source can read for it: `student_t` is
# `hidden/student_t`, and `static_embedding/student_t(start=2.0)` is a variant too. `dc.check` asks of it what the
# package's tests ask of its own forms: is it causal, do rows sum to one, is decoding equal to one pass, do gradients
# flow, does it shard?


# %%
def configuration(variant, seed=0):
    own = {"extensions": f"{RUNS}/student_t.py"} if variant == "student_t" else {}
    return dc.load_config("../configs/notebook.py", variant=variant, seed=seed, steps=STEPS, data=DATA, **own)


configuration("student_t")
checked = dc.check("student_t")
print(checked)

# %% [markdown]
# ## Three forms, two seeds, equal parameters
#
# Beside the new form stand `standard` and `approximate`, whose exponential is its Taylor polynomial of second order:
# another way of relaxing the mathematical form. The text is the Python standard library's source. All models have the
# same number of parameters but for the powers, four a layer: the MLP of a block would take up what a mixer adds, were
# it as much as a unit of its width.

# %%
VARIANTS, SEEDS = ("standard", "approximate", "student_t"), (0, 1)

dc.prepare_text(DATA, vocab_size=512, row_length=256, max_characters=4_000_000, workers=1)
parameters = {variant: dc.describe(configuration(variant))["parameters"]["total"] for variant in VARIANTS}
for variant, total in parameters.items():
    print(f"{variant:12} {total:,} parameters ({total - parameters['standard']:+} against standard)")

# %% [markdown]
# `dc.train_run` is `deconstruct train`: a folder for each run, checkpoints, the same loop as on a cluster. Run the
# cell again, and it finds everything done.

# %%
runs = {(variant, seed): f"{RUNS}/{variant}-{seed}" for seed in SEEDS for variant in VARIANTS}
for (variant, seed), workdir in runs.items():
    dc.train_run(configuration(variant, seed), workdir)

# %%
for workdir in runs.values():
    dc.evaluate_run(workdir, contexts="4,64")

# %% [markdown]
# ## What the comparison says
#
# `dc.compare_runs` puts runs that differ in their seed alone into a group. Every run was measured on the same
# validation text, document by document, so that differences are paired.

# %%
comparisons = dc.compare_runs(list(runs.values()))
groups = [row.group for row in comparisons[-1].rows]
plots.loss_curves(loss_curves(groups, "steps"), "steps")

# %%
Markdown(tables.means(comparisons))

# %% [markdown]
# Against standard attention, in nats a token of 64 of context; the interval to go by is the one over seeds *and*
# items:

# %%
Markdown(tables.differences(comparisons[-1]))

# %%
plots.differences(comparisons[-1])

# %% [markdown]
# *These runs* differ: standard attention's are better than the others', and the intervals over items (the thick bars)
# leave out zero. Whether the *forms* differ is another question, and two seeds cannot answer it. Seeds of one form are
# further apart than the forms are, so the thin bars, which are about other seeds too, lie on both sides of zero. The
# last column says what would do: 10 seeds of each for `approximate`, 84 for the new form. Whoever trains one seed of
# each and looks at the losses has a story to tell, and no evidence.
#
# For an idea of an afternoon that is good news: the new form trains as well as the old one, as far as this can tell.
#
# ## What the heads have chosen
#
# `dc.restore_model` gives the trained model back as a live `flax.nnx` module. Each dot is a head's power, in one of
# the seeds.

# %%
powers = {}
for seed in SEEDS:
    model = dc.restore_model(f"{RUNS}/student_t-{seed}")
    layers = range(model.config.num_layers)
    powers[seed] = np.array([np.exp(model.stack.layer(i).mixer.form.log_p[...]) for i in layers])  # [layers, heads]

figure = Figure(figsize=(5.2, 3.2), layout="constrained")
axis = figure.add_subplot()
for seed, of_seed in powers.items():
    places = np.arange(1, len(of_seed) + 1) + 0.12 * (seed - 0.5)
    axis.plot(places, of_seed, "o", color=f"C{seed}", markersize=5, alpha=0.8)
    axis.plot([], [], "o", color=f"C{seed}", label=f"seed {seed}")
axis.axhline(1, color="0.4", linewidth=0.8, linestyle="--", label="start")
axis.set(xlabel="layer", ylabel="power $p_h$ of each head", xticks=range(1, len(of_seed) + 1))
axis.legend(fontsize=8, frameon=False)
figure

# %%
every = np.concatenate(list(powers.values()), axis=1)  # [layers, heads of both seeds]
print(f"{(every > 1).sum()} of {every.size} heads have raised their power; from {every.min():.2f} to {every.max():.2f}")
for number, of_layer in enumerate(every, 1):
    print(f"layer {number}: {of_layer.min():.2f} to {of_layer.max():.2f}, on average {of_layer.mean():.2f}")

# %% [markdown]
# The heads of the first layer want to forget: all eight have gone far up, to 2.39 on average. Above it most stay near
# the heavy tail that they began with; 29 of 32 have gone up, but in the second layer only to 1.15 on average. So the
# answer is one of depth: the first layer forgets much faster than the others.
#
# A map shows what such a power does. Rows are queries, columns keys; a cell's colour is the root of its weight.

# %%
LINE = "for name in self.names: print(name)"
seen = {variant: dc.read_maps(f"{RUNS}/{variant}-0", LINE) for variant in ("standard", "student_t")}
tokens = seen["standard"].tokens
dc.draw_maps(
    [[(f"{variant}, layer 1\nmean of heads", maps.layers[0].mean(0)) for variant, maps in seen.items()]], tokens
)

# %% [markdown]
# In both, tokens of the first layer look at themselves first. Under softmax the diagonal is darker, and many cells are
# all but white; the heavy tail leaves a wash of small weights over all that came before.
#
# ## From here to a cluster
#
# The file is all that a run needs elsewhere:
#
#     deconstruct train --config=... --config.extensions=student_t.py --config.variant=student_t --workdir=...
#
# A form without kernels is computed by its definition, in time and memory $L^2$; [CONTRIBUTING.md](../CONTRIBUTING.md)
# shows how one joins the package, with kernels, a cache and gates. [`examples/`](../examples) has two more in files:
# ALiBi, and softmax with a learned temperature.

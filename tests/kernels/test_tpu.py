"""Kernels for TPUs, interpreted on the CPU, against the definitions in float64; compiled in tests/compile."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.experimental.pallas import tpu as pltpu

from deconstruct.kernels import recurrences, reference
from deconstruct.kernels.mask import CAUSAL, Mask
from deconstruct.kernels.per_device import mix_per_device
from deconstruct.kernels.tpu import gated_delta, gated_linear, pairwise, self_gate, splash, taylor
from deconstruct.kernels.tpu.walk import walk
from tests.tiny import quick

# What a kernel computes, and its definition. Small blocks: at least three on each axis.
KERNELS = {
    "softmax": (functools.partial(pairwise.softmax_attention, block=128), reference.softmax_weights),
    "taylor_pairwise": (functools.partial(pairwise.taylor_attention, block=128), reference.taylor_weights),
    "taylor_chunked": (functools.partial(taylor.taylor_chunked, chunk=128), reference.taylor_weights),
    "self_gate": (self_gate.self_gate_attention, reference.self_gate_weights),
    "gated_linear": (gated_linear.gated_linear_attention, recurrences.gated_linear_weights),
    "gated_delta": (functools.partial(gated_delta.gated_delta_attention, chunk=128), recurrences.gated_delta_weights),
    "splash": (functools.partial(splash.splash_attention, interpret=True), reference.softmax_weights),
}
WINDOWED = ("softmax", "taylor_pairwise", "splash")
BY_SEQUENCE = ("splash",)  # no map shared by a batch

LENGTH = 300
GROUPED = (2, 2, LENGTH, 4, 2, 32, 32)
SHARED = (1, 3, LENGTH, 2, 2, 64, 32)
DOCUMENTS = [[0, 5, 140], [0, 200, 299]]
# bf16 keeps 8 bits (4e-3); gradients go through two products of such entries.
NEAR = {"float32": oracle.FLOAT32, "bfloat16": 2e-2}


def interpreted(name, compute, arrays, dtype):
    """`vmap`, which splash attention is under, makes grids that this interpreter does not take."""
    forced = pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()) if name != "splash" else contextlib.nullcontext()
    with forced:
        return oracle.value_and_gradients(compute, arrays, dtype)


def both(name, shape, mask=CAUSAL, dtype="float32", scale=1.0, seed=3):
    """Of the kernel and of its definition in float64: the result and all gradients, of gates too."""
    kernel, weights = KERNELS[name]
    q, k, v, g = oracle.inputs(shape, seed)
    read = oracle.gates(name, shape, np.random.default_rng(seed))
    arrays = (scale * q, k, v, *read.values(), g)
    want = oracle.value_and_gradients(oracle.of_arrays(oracle.definition(weights), mask, read), arrays, "float64")
    return interpreted(name, oracle.of_arrays(kernel, mask, read), arrays, dtype), want


@pytest.mark.parametrize("name", quick(list(KERNELS), ["softmax"]))
def test_grouped_queries_and_documents(name):
    mask = Mask(jnp.asarray(oracle.begins(DOCUMENTS, LENGTH)))
    got, want = both(name, GROUPED, mask.narrowed(150) if name in WINDOWED else mask)
    oracle.assert_all_near(got, want, NEAR["float32"])


@pytest.mark.proof
@pytest.mark.parametrize("name", [name for name in KERNELS if name not in BY_SEQUENCE])
def test_one_map_for_the_batch(name):
    got, want = both(name, SHARED)
    oracle.assert_all_near(got, want, NEAR["float32"])


@pytest.mark.proof
def test_one_map_for_more_rows_than_are_mixed_at_once(monkeypatch):
    monkeypatch.setattr(pairwise, "WIDTH", 64)
    got, want = both("softmax", (1, 3, 130, 1, 1, 16, 32))
    oracle.assert_all_near(got, want, NEAR["float32"])


@pytest.mark.proof
@pytest.mark.parametrize(("dh", "dtype"), [(64, "float32"), (128, "bfloat16")])
@pytest.mark.parametrize("name", KERNELS)
def test_head_sizes_and_dtypes(name, dh, dtype):
    got, want = both(name, (1, 1, LENGTH, 2, 1, dh, dh), dtype=dtype)
    oracle.assert_all_near(got, want, NEAR[dtype])


@pytest.mark.proof
@pytest.mark.parametrize("name", ["softmax", "taylor_pairwise", "taylor_chunked", "self_gate", "splash"])
def test_logits_of_a_thousand(name):
    """Scores that are 1e3 are known to 6e-5 in float32, and the exponential with them."""
    got, want = both(name, GROUPED, scale=300)
    oracle.assert_all_near(got, want, 5e-3 if name == "self_gate" else 1e-3)


@pytest.mark.proof
@pytest.mark.parametrize("name", ["softmax", "taylor_chunked", "self_gate", "gated_linear", "gated_delta"])
def test_blocks_race_with_nobody(name):
    """Interpreted with a watch on every read and write, steps of parallel axes in a random order."""
    from jax._src.pallas.mosaic.interpret import interpret_pallas_call

    kernel, _ = KERNELS[name]
    q, k, v, _ = (jnp.asarray(x, jnp.float32) for x in oracle.inputs(GROUPED, 4))
    read = {
        key: jnp.asarray(x, jnp.float32) for key, x in oracle.gates(name, GROUPED, np.random.default_rng(0)).items()
    }
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True, random_seed=1)):
        jax.block_until_ready(jax.grad(lambda q: kernel(q, k, v, **read).sum())(q))
    assert not interpret_pallas_call.races.races_found


@pytest.mark.parametrize(
    ("sizes", "chunk"),
    [
        ((64, 64, 1, 2), 256),
        ((128, 128, 1, 2), 256),
        ((64, 64, 7, 2), 128),  # grouped queries have their products each
        ((128, 128, 1, 4), None),  # float32 does not compile for v5p
        ((64, 64 * 64, 1, 2), None),  # one map for 64 sequences
        ((256, 256, 1, 2), None),
    ],
)
def test_a_walk_of_taylor_fits_the_chip(sizes, chunk):
    """Tried with libtpu's compiler for v5p, whose chips have 64 MiB."""
    assert taylor.fitting_chunk(*sizes) == chunk


def step(state, chunk):
    """A state that is not linear in what came before."""
    state = jnp.tanh(state @ chunk["w"])
    return state, {"out": state * chunk["x"], "count": state.sum(0, keepdims=True) * chunk["n"]}


def test_a_walk_is_a_scan_of_each_row():
    """Values and gradients, also into the first state and out of the last; and a walk goes on where another stopped."""
    rng = np.random.default_rng(2)
    rows, steps = 3, 4
    state = jnp.asarray(rng.normal(size=(rows, 8, 16)), jnp.float32)
    chunks = {
        "w": jnp.asarray(rng.normal(size=(rows, steps, 16, 16)), jnp.float32),
        "x": jnp.asarray(rng.normal(size=(rows, steps, 8, 16)), jnp.float32),
        "n": jnp.asarray(rng.integers(0, 5, (rows, steps, 1, 16)), jnp.int32),
    }
    floats = {key: chunks[key] for key in ("w", "x")}

    def weighed(run):
        def total(state, floats):
            after, out = run(state, {**chunks, **floats})
            return jnp.sin(after).sum() + sum(jnp.cos(x).sum() for x in out.values()), (after, out)

        return jax.value_and_grad(total, argnums=(0, 1), has_aux=True)

    def scanned(state, chunks):
        return jax.vmap(lambda s, c: jax.lax.scan(step, s, c))(state, chunks)

    want = jax.jit(weighed(scanned))(state, floats)
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams()):
        got = jax.jit(weighed(functools.partial(walk, step)))(state, floats)
        first, early = walk(step, state, jax.tree.map(lambda x: x[:, :3], chunks))
        last, late = walk(step, first, jax.tree.map(lambda x: x[:, 3:], chunks))
    # Sums of float32 in another order, through two layers of tanh.
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5), got, want)
    after, out = want[0][1]
    np.testing.assert_allclose(last, after, rtol=1e-5, atol=1e-6)
    pieces = {key: np.concatenate([early[key], late[key]], axis=1) for key in out}
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), pieces, dict(out))


@pytest.mark.parametrize("shape", [(4, 4, 9, 8, 4, 4, 4), (1, 4, 9, 8, 4, 4, 4), (4, 4, 9, 4, 2, 4, 4)])
def test_a_mesh_divides_sequences_and_heads(shape):
    """A map of each sequence, one map for all, and heads that eight devices do not divide."""
    mesh = jax.make_mesh((2, 1, 4), ("data", "fsdp", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
    arrays = oracle.inputs(shape)
    mask = Mask(jnp.zeros((shape[0], shape[2]), jnp.int32), window=5)

    def plain(q, k, v, mask):
        return reference.apply_weights(reference.softmax_weights(q, k, mask), v)

    want = oracle.value_and_gradients(functools.partial(plain, mask=mask), arrays, "float32")
    with jax.set_mesh(mesh):
        divided = functools.partial(mix_per_device, plain, mask=mask)
        got = oracle.value_and_gradients(divided, arrays, "float32")
    oracle.assert_all_near(got, want, oracle.FLOAT32)

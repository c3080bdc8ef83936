"""What the GPU kernels refuse, and in which words; the types of what they give, also within `jax.shard_map`."""

import importlib.metadata

import jax
import jax.numpy as jnp
import pytest

from deconstruct.kernels.gpu import gated_delta, gated_linear, limits, pairwise, self_gate


def gated_linear_attention(q, k, v):
    return gated_linear.gated_linear_attention(q, k, v, log_decay=-jnp.ones(k.shape))


def gated_delta_attention(q, k, v):
    return gated_delta.gated_delta_attention(q, k, v, log_decay=-jnp.ones(k.shape[:3]), beta=jnp.ones(k.shape[:3]))


ATTENTIONS = [
    pairwise.taylor_attention,
    self_gate.self_gate_attention,
    gated_linear_attention,
    gated_delta_attention,
]


@pytest.mark.parametrize(
    ("asked", "reason"),
    [
        (("bfloat16", 64), None),
        (("bfloat16", 64, 128, "9.0"), None),
        (("bfloat16", 64, None, "10.0"), "needs a GPU of compute capability 9.0 (Hopper), not 10.0"),
        (("float32", 64), "computes in bfloat16, not float32"),
        (("bfloat16", 96), "needs heads of a width of 64 or 128, not 96"),
        (("bfloat16", 64, 32), "needs heads of a width of 64 or 128, not 32"),
    ],
)
def test_refusals(asked, reason):
    assert limits.refuses(*asked) == reason


@pytest.mark.parametrize(("version", "refused"), [("12.6.85", False), ("12.9.41", True), ("12.9.86", False)])
def test_an_assembler_that_compiles_wrongly(version, refused, monkeypatch):
    monkeypatch.setattr(importlib.metadata, "version", lambda _: version)
    reason = limits.refuses("bfloat16", 64)
    assert (reason is not None) == refused
    if refused:
        assert reason.endswith("nvidia-cuda-nvcc-cu12 12.9.41 (CUDA 12.8.0 to 12.9.0); install 12.9.86 or later")


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize(
    ("q", "k", "v", "message"),
    [
        ((2, 8, 4, 64), (2, 8, 2, 64), (3, 8, 2, 64), "queries of batch 2 and values of batch 3"),
        ((2, 8, 4, 64), (2, 9, 2, 64), (2, 8, 2, 64), "do not fit together"),
        ((2, 8, 3, 64), (2, 8, 2, 64), (2, 8, 2, 64), "do not fit together"),
        (
            (2, 8, 4, 32),
            (2, 8, 2, 32),
            (2, 8, 2, 64),
            "the kernel for GPUs needs heads of a width of 64 or 128, not 32",
        ),
    ],
)
def test_shapes_that_do_not_fit(attention, q, k, v, message):
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(attention, *(jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in (q, k, v)))


def test_a_shared_map_has_a_batch_of_one():
    q, v = (jax.ShapeDtypeStruct((2, 8, 2, 64), jnp.bfloat16) for _ in "qv")
    with pytest.raises(ValueError, match="queries of batch 2: a shared map has a batch of one"):
        jax.eval_shape(pairwise.shared_attention, q, q, v)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_shapes_of_results_and_gradients(attention):
    shapes = [(1, 200, 4, 64), (1, 200, 2, 64), (6, 200, 2, 128)]
    q, k, v = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    gradients = jax.grad(lambda *x: attention(*x).astype(jnp.float32).sum(), argnums=(0, 1, 2))
    assert jax.eval_shape(attention, q, k, v).shape == (6, 200, 4, 128)
    assert [x.shape for x in jax.eval_shape(gradients, q, k, v)] == shapes


@pytest.mark.parametrize("attention", [pairwise.shared_attention, *ATTENTIONS[1:]])
def test_gradients_of_a_shared_map_within_shard_map(attention):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    none, data = jax.sharding.PartitionSpec(), jax.sharding.PartitionSpec("data")
    mix = jax.shard_map(attention, mesh=mesh, in_specs=(none, none, data), out_specs=data)
    shapes = [(1, 200, 4, 64), (1, 200, 2, 64), (8, 200, 2, 64)]
    arrays = (jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes)
    program = jax.make_jaxpr(jax.grad(lambda *x: mix(*x).astype(jnp.float32).sum(), argnums=(0, 1, 2)))(*arrays)
    assert [x.shape for x in program.out_avals] == shapes
    assert "psum" in str(program)  # what each device's sequences give to the one map is summed

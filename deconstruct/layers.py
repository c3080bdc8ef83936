"""The parts every block is made of: linear maps, RMSNorm, SwiGLU, embeddings, RoPE.

Parameters are float32 and carry the logical names of their axes (`axes`), which `distributed.sharding` maps to mesh
axes. A stacked parameter has one leading axis more than names: the layers. Matmul inputs are in the compute dtype,
sums in float32.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deconstruct.distributed.sharding import constrain


class Frozen(nnx.Variable[Any]):
    """A constant of the model: saved with it, never trained, not counted among its parameters."""


def normal_param(
    rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], std: float, *, decay: bool = True
) -> nnx.Param:
    """Drawn from N(0, std^2). `decay`: whether weight decay pulls on it."""
    return nnx.Param(std * jax.random.normal(rngs.params(), shape, jnp.float32), axes=axes, decay=decay)


def constant_param(
    value: float, shape: tuple[int, ...], axes: tuple[str | None, ...], *, decay: bool = False
) -> nnx.Param:
    """The same value everywhere at first, as norms and biases have it: weight decay leaves it alone unless asked."""
    return nnx.Param(jnp.full(shape, value, jnp.float32), axes=axes, decay=decay)


class Linear(nnx.Module):
    """A linear map over the last `inputs` axes: [..., *inputs] -> [..., *outputs].

    The kernel is [*inputs, *outputs], so that heads stay an axis of their own, and `axes` names each of its axes.
    """

    def __init__(
        self,
        inputs: tuple[int, ...],
        outputs: tuple[int, ...],
        axes: tuple[str | None, ...],
        *,
        std: float,
        dtype: str,
        rngs: nnx.Rngs,
        bias: bool = False,
    ):
        self.kernel = normal_param(rngs, inputs + outputs, axes, std)
        self.bias = constant_param(0.0, outputs, axes[len(inputs) :]) if bias else None
        self.contracted = len(inputs)
        self.dtype = dtype

    def __call__(self, x: jax.Array) -> jax.Array:
        leading, inputs = x.shape[: x.ndim - self.contracted], x.shape[x.ndim - self.contracted :]
        x = x.astype(self.dtype)
        if len(leading) > 1 and (leading[0] > 1 or jax.sharding.get_abstract_mesh().size <= 1):
            # Tokens as one axis: from two of them, XLA's CPU backend would transpose the cotangent, element by element,
            # before it forms the kernel's gradient, which is a sum over tokens. A batch of one, which no mesh divides,
            # keeps its axes on several devices: merged, its kernel would no longer be gathered, but its partial sums
            # added up.
            x = x.reshape(-1, *inputs)
        y = jax.lax.dot_general(
            x,
            self.kernel[...].astype(self.dtype),
            ((tuple(range(x.ndim - self.contracted, x.ndim)), tuple(range(self.contracted))), ((), ())),
            preferred_element_type=jnp.float32,
        )
        y = y.reshape(*leading, *self.kernel.shape[self.contracted :])
        if self.bias is not None:
            y = y + self.bias[...].reshape((1,) * (y.ndim - self.bias.ndim) + self.bias.shape)
        return y.astype(self.dtype)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last axis, in float32 (Zhang & Sennrich 2019)."""

    def __init__(self, size: int, epsilon: float, axis: str | None = None):
        self.scale = constant_param(1.0, (size,), (axis,))
        self.epsilon = epsilon

    def __call__(self, x: jax.Array) -> jax.Array:
        y = x.astype(jnp.float32)
        y = y * jax.lax.rsqrt(jnp.mean(jnp.square(y), axis=-1, keepdims=True) + self.epsilon)
        return (y * self.scale[...].reshape((1,) * (y.ndim - 1) + (-1,))).astype(x.dtype)


class SwiGLU(nnx.Module):
    """W_down(silu(x W_gate) * (x W_up)) (Shazeer 2020), without biases: [..., d] -> [..., d]."""

    def __init__(
        self, size: int, width: int, *, std: float, dtype: str, rngs: nnx.Rngs, width_axis: str | None = "mlp"
    ):
        into, out_of = ("embed", width_axis), (width_axis, "embed")
        self.gate_proj = Linear((size,), (width,), into, std=std, dtype=dtype, rngs=rngs)
        self.up_proj = Linear((size,), (width,), into, std=std, dtype=dtype, rngs=rngs)
        self.down_proj = Linear((width,), (size,), out_of, std=std, dtype=dtype, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down_proj(jax.nn.silu(self.gate_proj(x)) * self.up_proj(x))


class Embedding(nnx.Module):
    """A table [vocab, d]; token ids [...] -> [..., d] in the compute dtype."""

    def __init__(self, count: int, size: int, *, std: float, dtype: str, rngs: nnx.Rngs):
        self.embedding = normal_param(rngs, (count, size), ("vocab", "embed"), std)
        self.dtype = dtype

    def __call__(self, tokens: jax.Array) -> jax.Array:
        # Gathered over fsdp first: a lookup in a table split along d would come out split along d.
        return jnp.take(constrain(self.embedding[...], ("vocab", None)), tokens, axis=0).astype(self.dtype)


def rope_tables(positions: jax.Array, head_dim: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """cos and sin, float32 [L, head_dim/2], of positions [L] (RoFormer, Su et al. 2021)."""
    frequencies = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles = positions.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.cos(angles), jnp.sin(angles)


def apply_rope(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates x [B, L, heads, head_dim]; halves are paired (i, i + head_dim/2), as Qwen does. float32 inside."""
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = cos[None, :, None, :], sin[None, :, None, :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)

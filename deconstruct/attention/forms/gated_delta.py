"""gated_delta: S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T, read by q_t / sqrt(dh): a memory that corrects.

Relaxes the mathematical form: before a value is written, what the memory holds for its key is taken out (Gated
DeltaNet, Yang et al. 2025, arXiv:2412.06464). q and k are brought to unit length, and for each key head

    a_t = exp(-exp(A) softplus(x_t W_a + c)),    b_t = sigmoid(x_t W_b)

x is what W_Q and W_K read, so that over a fixed source the map stays one for the batch. `weights` is its effective map
over the values. Rows do not sum to one: each head's result goes through an RMSNorm before W_O, as in the paper; its
short convolutions and its output gate are left out. No RoPE. Time B L d (dh + chunk); state dh^2 numbers per head.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deconstruct.attention.accelerators import hopper, tpu
from deconstruct.attention.form import Flops, Form, Kernel, Shape
from deconstruct.attention.registry import register_form
from deconstruct.config import ModelConfig
from deconstruct.kernels import gated_delta, recurrences, reference
from deconstruct.kernels.mask import Mask
from deconstruct.layers import Linear, RMSNorm, constant_param

# softplus(-4.6) = 0.01: a memory of about a hundred tokens at first.
FIRST_STEP = -4.6


@register_form
class GatedDelta(Form):
    name = "gated_delta"
    relaxes = ("mathematical form",)
    normalised = False
    uses_rope = False
    documents = True

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        d, heads = config.hidden_size, config.kv_heads
        sizes: dict[str, Any] = {"std": config.init_std, "dtype": config.dtype, "rngs": rngs}
        self.decay_proj = Linear((d,), (heads,), ("embed", "kv_heads"), **sizes)
        self.strength_proj = Linear((d,), (heads,), ("embed", "kv_heads"), **sizes)
        self.decay_log_rate = constant_param(0.0, (heads,), ("kv_heads",))
        self.decay_bias = constant_param(FIRST_STEP, (heads,), ("kv_heads",))
        self.norm = RMSNorm(config.head_size, config.norm_epsilon)
        self.per_token = 2 * d * heads

    def read(self, x: jax.Array) -> dict[str, jax.Array]:
        step = jax.nn.softplus(self.decay_proj(x).astype(jnp.float32) + self.decay_bias[...][None, None, :])
        return {
            "log_decay": -jnp.exp(self.decay_log_rate[...])[None, None, :] * step,
            "beta": jax.nn.sigmoid(self.strength_proj(x).astype(jnp.float32)),
        }

    def weights(self, q: jax.Array, k: jax.Array, mask: Mask, *, log_decay: jax.Array, beta: jax.Array) -> jax.Array:
        return recurrences.gated_delta_weights(q, k, mask, log_decay=log_decay, beta=beta)

    def scores(self, q: jax.Array, k: jax.Array, **read: jax.Array) -> jax.Array:
        return reference.logits(recurrences.unit(q), recurrences.unit(k))

    def finish(self, mixed: jax.Array) -> jax.Array:
        return self.norm(mixed)

    def kernels(self) -> dict[str, Kernel]:
        xla = Kernel(_mix, _extend, _init_cache)
        return {
            "pallas_gpu": hopper("gated_delta:gated_delta_attention", xla, documents=True),
            "pallas_tpu": tpu("gated_delta:gated_delta_attention", xla),
            "xla": xla,
        }

    def flops(self, shape: Shape) -> Flops:
        # The map from states with a column for each position, then applied to the values.
        pairs = 2.0 * shape.length**2 * shape.heads * shape.head_dim
        return Flops(
            pairs * (shape.qk_batch + shape.batch), _each_map(shape, gated_delta.gated_delta_flops, shape.length)
        )

    def decode_flops(self, shape: Shape) -> Flops:
        return Flops.exactly(_each_map(shape, gated_delta.gated_delta_decode_flops))

    def read_flops(self, tokens: int) -> float:
        return 2.0 * tokens * self.per_token


def _each_map(shape: Shape, flops: Callable[..., float], *length: int) -> float:
    """The kernel's own count for one map and the sequences it serves, for all maps."""
    sizes = (shape.heads, shape.kv_heads, shape.head_dim, shape.head_dim)
    return shape.qk_batch * flops(*length, *sizes, rows=shape.batch // shape.qk_batch)


def _mix(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, *, log_decay: jax.Array, beta: jax.Array) -> jax.Array:
    return gated_delta.gated_delta_attention(q, k, v, log_decay=log_decay, beta=beta, mask=mask)[0]


def _extend(
    q: jax.Array, k: jax.Array, v: jax.Array, cache: Any, mask: Mask, *, log_decay: jax.Array, beta: jax.Array
) -> tuple[jax.Array, Any]:
    return gated_delta.gated_delta_attention(q, k, v, log_decay=log_decay, beta=beta, state=cache, mask=mask)


def _init_cache(shape: Shape, dtype: Any) -> gated_delta.GatedDeltaState:
    return gated_delta.init_gated_delta_state(
        shape.qk_batch, shape.batch, shape.kv_heads, shape.head_dim, shape.head_dim
    )

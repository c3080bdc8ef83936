"""gated_linear: A_ij = sum_c q_ic k_jc exp(g_{j+1,c} + ... + g_ic) / sqrt(dh), a sum over the past that forgets.

Relaxes the mathematical form: no exp(q . k), and nothing is normalised; each key channel decays by a gate that the
token itself sets (Gated Linear Attention, Yang et al. 2024, arXiv:2312.06635):

    g_t = log sigmoid(x_t W_1 W_2 + b) / 16,    W_1 [d, rank], W_2 [rank, kv_heads dh]

x is what W_Q and W_K read, so that over a fixed source the map stays one for the batch. Rows do not sum to one: each
head's result goes through an RMSNorm of its own before W_O, as in the paper. The gates take the place of RoPE. Time
B L d (dh + chunk); state dh^2 numbers per head.
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
from deconstruct.kernels import gated_linear, recurrences
from deconstruct.kernels.mask import Mask
from deconstruct.layers import Linear, RMSNorm
from deconstruct.types import UserError

TEMPERATURE = 16.0  # the paper's: gates start near one, so that a state begins with a long memory


@register_form
class GatedLinear(Form):
    name = "gated_linear"
    relaxes = ("mathematical form",)
    normalised = False
    uses_rope = False
    documents = True

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, *, rank: int = 16):
        if rank < 1:
            raise UserError(f"rank={rank}: must be at least 1")
        d, out = config.hidden_size, (config.kv_heads, config.head_size)
        sizes: dict[str, Any] = {"std": config.init_std, "dtype": config.dtype, "rngs": rngs}
        self.gate_down = Linear((d,), (rank,), ("embed", None), **sizes)
        self.gate_up = Linear((rank,), out, (None, "kv_heads", None), bias=True, **sizes)
        self.norm = RMSNorm(config.head_size, config.norm_epsilon)
        self.per_token = d * rank + rank * out[0] * out[1]

    def read(self, x: jax.Array) -> dict[str, jax.Array]:
        gates = self.gate_up(self.gate_down(x)).astype(jnp.float32)
        return {"log_decay": jax.nn.log_sigmoid(gates) / TEMPERATURE}

    def weights(self, q: jax.Array, k: jax.Array, mask: Mask, *, log_decay: jax.Array) -> jax.Array:
        return recurrences.gated_linear_weights(q, k, mask, log_decay=log_decay)

    def finish(self, mixed: jax.Array) -> jax.Array:
        return self.norm(mixed)

    def kernels(self) -> dict[str, Kernel]:
        xla = Kernel(_mix, _extend, _init_cache)
        return {
            "pallas_gpu": hopper("gated_linear:gated_linear_attention", xla, documents=True),
            "pallas_tpu": tpu("gated_linear:gated_linear_attention", xla),
            "xla": xla,
        }

    def flops(self, shape: Shape) -> Flops:
        # The map from states with a column for each position, then applied to the values.
        pairs = 2.0 * shape.length**2 * shape.heads * shape.head_dim
        return Flops(
            pairs * (shape.qk_batch + shape.batch), _each_map(shape, gated_linear.gated_linear_flops, shape.length)
        )

    def decode_flops(self, shape: Shape) -> Flops:
        return Flops.exactly(_each_map(shape, gated_linear.gated_linear_decode_flops))

    def read_flops(self, tokens: int) -> float:
        return 2.0 * tokens * self.per_token


def _each_map(shape: Shape, flops: Callable[..., float], *length: int) -> float:
    """The kernel's own count for one map and the sequences it serves, for all maps."""
    sizes = (shape.heads, shape.kv_heads, shape.head_dim, shape.head_dim)
    return shape.qk_batch * flops(*length, *sizes, rows=shape.batch // shape.qk_batch)


def _mix(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, *, log_decay: jax.Array) -> jax.Array:
    return gated_linear.gated_linear_attention(q, k, v, log_decay=log_decay, mask=mask)[0]


def _extend(
    q: jax.Array, k: jax.Array, v: jax.Array, cache: Any, mask: Mask, *, log_decay: jax.Array
) -> tuple[jax.Array, Any]:
    return gated_linear.gated_linear_attention(q, k, v, log_decay=log_decay, state=cache, mask=mask)


def _init_cache(shape: Shape, dtype: Any) -> gated_linear.GatedLinearState:
    return gated_linear.init_gated_linear_state(
        shape.qk_batch, shape.batch, shape.kv_heads, shape.head_dim, shape.head_dim
    )

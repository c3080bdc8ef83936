"""taylor_diagonal: the paper's cheaper recurrence: each Taylor order normalised by itself, squares element-wise only.

    A_ij = ( 1/i + x_ij / sum_m x_im + y_ij / sum_m y_im ) / 3
    x_ij = q_i . k_j / sqrt(dh),    y_ij = q_i^2 . k_j^2 / dh

Relaxes the mathematical form (arXiv:2510.11602, equations 14 to 17). Equation 14 adds the three orders; here they are
averaged, so that a row sums to one: a third of the paper's output, which W_O takes up. State 2 dh^2 numbers per head.
The sum of x can come near zero or change its sign, the sum of y can come near zero. A guard of ours, not the paper's,
keeps their means at least 0.01 and 0.0001 from zero (kernels/reference.py), and acts on 24 to 82 % of the rows at
initial weights. The map is not a probability: entries can be negative and large. In bfloat16 the form is 64 to 96 %
off float64.

    taylor_diagonal(normalise=jointly):    A_ij = T_ij / sum_m T_im,    T_ij = 1 + x_ij + y_ij / 2

has the same cost and state, and one sum: `taylor` without the cross terms of its second order. Where logits are small
the mean of T is near one, and it is well conditioned; the guard of 0.01 stays, since T may fall to 1 - dh/2.
"""

from __future__ import annotations

import functools
from typing import Any, Literal

import jax
from flax import nnx

from deconstruct.attention.form import Flops, Form, Kernel, Shape
from deconstruct.attention.registry import register_form
from deconstruct.config import ModelConfig
from deconstruct.kernels import reference
from deconstruct.kernels.mask import Mask
from deconstruct.kernels.taylor_diagonal import init_taylor_diagonal_state, taylor_diagonal_attention


@register_form
class TaylorDiagonal(Form):
    name = "taylor_diagonal"
    relaxes = ("mathematical form",)
    overhead = "the maps of two orders within chunks of 64 positions"

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, *, normalise: Literal["by_order", "jointly"] = "by_order"):
        self.jointly = normalise == "jointly"

    def weights(self, q: jax.Array, k: jax.Array, mask: Mask) -> jax.Array:
        return reference.taylor_diagonal_weights(q, k, self.jointly)

    def kernels(self) -> dict[str, Kernel]:
        mix, extend = functools.partial(_mix, self.jointly), functools.partial(_extend, self.jointly)
        return {"xla": Kernel(mix, extend, _init_cache)}

    def flops(self, shape: Shape) -> Flops:
        # The dense map has two products of queries with keys, the second of their squares.
        cells = 2.0 * shape.length**2 * shape.heads * shape.head_dim
        needed = min(cells / 2 * (2 * shape.qk_batch + shape.batch), shape.length * self.decode_flops(shape).needed)
        return Flops(cells * (2 * shape.qk_batch + shape.batch), needed)

    def decode_flops(self, shape: Shape) -> Flops:
        # Two states of head_dim x head_dim, read per query head and written per key-value head.
        columns = shape.batch * shape.head_dim + shape.qk_batch
        return Flops.exactly(4.0 * shape.head_dim * columns * (shape.heads + shape.kv_heads))


def _mix(jointly: bool, q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
    return taylor_diagonal_attention(q, k, v, jointly=jointly)[0]


def _extend(jointly: bool, q: jax.Array, k: jax.Array, v: jax.Array, cache: Any, mask: Mask) -> tuple[jax.Array, Any]:
    return taylor_diagonal_attention(q, k, v, cache, jointly=jointly)


def _init_cache(shape: Shape, dtype: Any) -> Any:
    return init_taylor_diagonal_state(shape.qk_batch, shape.batch, shape.kv_heads, shape.head_dim, shape.head_dim)

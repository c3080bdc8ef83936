"""taylor_diagonal: the paper's cheaper recurrence: each Taylor order normalised by itself, squares element-wise only.

    A_ij = ( 1/i + x_ij / sum_m x_im + y_ij / sum_m y_im ) / 3,   x_ij = q_i . k_j / sqrt(dh),  y_ij = q_i^2 . k_j^2
    / dh

Relaxes the mathematical form (arXiv:2510.11602, equations 14 to 17). Equation 14 adds the three orders; here they are
averaged, so that a row sums to one: a third of the paper's output, which W_O takes up. State 2 dh^2 numbers per head.
The sum of x can come near zero or change its sign, the sum of y can come near zero: both are guarded, see
kernels/reference.py, and the map is not a probability: entries can be negative.
"""

from __future__ import annotations

from typing import Any

import jax

from deconstruct.attention.base import Flops, KernelForm, Shape, register_form
from deconstruct.kernels import reference
from deconstruct.kernels.taylor_diagonal import init_taylor_diagonal_state, taylor_diagonal_attention


@register_form
class TaylorDiagonal(KernelForm):
    name = "taylor_diagonal"
    relaxes = ("mathematical form",)
    overhead = "the maps of two orders within chunks of 64 positions"

    def weights(self, q: jax.Array, k: jax.Array) -> jax.Array:
        return reference.taylor_diagonal_weights(q, k)

    def init_cache(self, shape: Shape, dtype: Any) -> Any:
        return init_taylor_diagonal_state(shape.qk_batch, shape.batch, shape.kv_heads, shape.head_dim, shape.head_dim)

    def extend(self, q: jax.Array, k: jax.Array, v: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        return taylor_diagonal_attention(q, k, v, cache)

    def flops(self, shape: Shape) -> Flops:
        # The dense map has two products of queries with keys, the second of their squares.
        cells = 2.0 * shape.length**2 * shape.heads * shape.head_dim
        needed = min(cells / 2 * (2 * shape.qk_batch + shape.batch), shape.length * self.decode_flops(shape).needed)
        return Flops(cells * (2 * shape.qk_batch + shape.batch), needed)

    def decode_flops(self, shape: Shape) -> Flops:
        # Two states of head_dim x head_dim, read per query head and written per key-value head.
        columns = shape.batch * shape.head_dim + shape.qk_batch
        return Flops.exactly(4.0 * shape.head_dim * columns * (shape.heads + shape.kv_heads))

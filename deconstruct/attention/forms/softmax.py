"""softmax: A_ij = exp(q_i . k_j / sqrt(dh)) / sum_{m<=i} exp(q_i . k_m / sqrt(dh)).

Relaxes nothing: the standard form (Vaswani et al. 2017). Time B L^2 d; cache 2 B L d numbers.
"""

from __future__ import annotations

from typing import Any

import jax

from deconstruct.attention.base import Flops, KernelForm, Shape, register_form
from deconstruct.kernels import kv_cache, reference
from deconstruct.kernels.softmax import softmax_last


@register_form
class Softmax(KernelForm):
    name = "softmax"
    overhead = (
        "the cells above the diagonal within each chunk of queries, and, in training beyond 2,048 positions, maps that "
        "are formed again"
    )

    def weights(self, q: jax.Array, k: jax.Array) -> jax.Array:
        return reference.softmax_weights(q, k)

    def extend(self, q: jax.Array, k: jax.Array, v: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        new, cache = cache.is_new, kv_cache.append(cache, k, v)
        return (self.mix(q, k, v) if new else softmax_last(q, cache, v.shape[0])), cache

    def flops(self, shape: Shape) -> Flops:
        dense = super().flops(shape).dense
        return Flops(dense, dense / 2)  # the causal half

    def decode_flops(self, shape: Shape) -> Flops:
        return Flops.exactly(2.0 * shape.length * shape.heads * shape.head_dim * (shape.qk_batch + shape.batch))

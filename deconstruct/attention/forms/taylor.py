"""taylor: A_ij = T(x_ij) / sum_{m<=i} T(x_im), x_ij = q_i . k_j / sqrt(dh), T(x) = 1 + x + x^2/2.

Relaxes the mathematical form: exp to second order, jointly normalised; T >= 1/2, so the sum is never zero. Linear in
L through phi(x) = [1, x, vec(x x^T)/sqrt 2] (Based, Arora et al. 2024): a state of about dh^2 / 2 numbers per
value channel and head. Short sequences are mixed by the quadratic form, which is then the cheaper one.
"""

from __future__ import annotations

from typing import Any

import jax

from deconstruct.attention.accelerators import hopper, tpu
from deconstruct.attention.form import Flops, Form, Kernel, Shape
from deconstruct.attention.registry import register_form
from deconstruct.kernels import reference
from deconstruct.kernels.mask import Mask
from deconstruct.kernels.taylor import init_taylor_state, pair_count, taylor_attention, taylor_chunked


@register_form
class Taylor(Form):
    name = "taylor"
    relaxes = ("mathematical form",)
    documents = True
    overhead = (
        "the cells above the diagonal within each chunk of queries, and, in training beyond 2,048 positions, maps that "
        "are formed again; or, where the recurrence is cheaper, because XLA counts one chunk of its loop"
    )

    def weights(self, q: jax.Array, k: jax.Array, mask: Mask) -> jax.Array:
        return reference.taylor_weights(q, k, mask)

    def kernels(self) -> dict[str, Kernel]:
        xla = Kernel(taylor_attention, _extend, _init_cache)
        return {
            "pallas_gpu": hopper("taylor:taylor_attention", xla),
            "pallas_tpu": tpu("taylor:taylor_attention", xla),
            "xla": xla,
        }

    def flops(self, shape: Shape) -> Flops:
        dense = super().flops(shape).dense
        return Flops(dense, min(dense / 2, shape.length * self.decode_flops(shape).needed))

    def decode_flops(self, shape: Shape) -> Flops:
        # phi(q) against the state, per query head; phi(k) v^T into it, per key-value head; and the normaliser's,
        # whose second order is kept whole.
        few = 1 + shape.head_dim
        values = shape.batch * shape.head_dim * (few + pair_count(shape.head_dim))
        normaliser = shape.qk_batch * (few + shape.head_dim**2)
        return Flops.exactly(2.0 * (values + normaliser) * (shape.heads + shape.kv_heads))


def _extend(q: jax.Array, k: jax.Array, v: jax.Array, cache: Any, mask: Mask) -> tuple[jax.Array, Any]:
    return taylor_chunked(q, k, v, cache, mask=mask)


def _init_cache(shape: Shape, dtype: Any) -> Any:
    return init_taylor_state(shape.qk_batch, shape.batch, shape.kv_heads, shape.head_dim, shape.head_dim)

"""softmax: A_ij = exp(q_i . k_j / sqrt(dh)) / sum_{m<=i} exp(q_i . k_m / sqrt(dh)).

Relaxes nothing: the standard form (Vaswani et al. 2017). Time B L^2 d; cache 2 B L d numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax

from deconstruct.attention.accelerators import cudnn, hopper, one_map_a_sequence, one_map_for_all, tpu
from deconstruct.attention.form import Flops, Form, Kernel, Shape
from deconstruct.attention.registry import register_form
from deconstruct.kernels import kv_cache, reference
from deconstruct.kernels.mask import Mask
from deconstruct.kernels.softmax import softmax_attention, softmax_last


@register_form
class Softmax(Form):
    name = "softmax"
    documents = True
    overhead = (
        "the cells above the diagonal within each chunk of queries, and, in training beyond 2,048 positions, maps that "
        "are formed again"
    )

    def weights(self, q: jax.Array, k: jax.Array, mask: Mask) -> jax.Array:
        return reference.softmax_weights(q, k, mask)

    def kernels(self) -> dict[str, Kernel]:
        xla = Kernel(_mix, functools.partial(_extend, _mix), _init_cache)
        table = {
            "cudnn": cudnn(xla),
            "pallas_gpu": hopper("pairwise:shared_attention", xla, one_map_for_all),
            "splash": tpu("splash:splash_attention", xla, one_map_a_sequence),
            "pallas_tpu": tpu("pairwise:softmax_attention", xla),
            "xla": xla,
        }
        # A prompt is mixed by the kernel itself; a token that is decoded reads its cache by XLA's program with each.
        return {name: kernel._replace(extend=functools.partial(_extend, kernel.mix)) for name, kernel in table.items()}

    def flops(self, shape: Shape) -> Flops:
        dense = super().flops(shape).dense
        return Flops(dense, dense / 2)  # the causal half

    def decode_flops(self, shape: Shape) -> Flops:
        return Flops.exactly(2.0 * shape.length * shape.heads * shape.head_dim * (shape.qk_batch + shape.batch))


def _init_cache(shape: Shape, dtype: Any) -> kv_cache.KVCache:
    sizes = (shape.kv_heads, shape.head_dim, shape.head_dim)
    return kv_cache.init_kv_cache(shape.qk_batch, shape.batch, shape.length, *sizes, dtype)


def _mix(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
    return softmax_attention(q, k, v, mask=mask)


def _extend(
    mix: Callable[..., jax.Array], q: jax.Array, k: jax.Array, v: jax.Array, cache: kv_cache.KVCache, mask: Mask
) -> tuple[jax.Array, kv_cache.KVCache]:
    new, cache = cache.is_new, kv_cache.append(cache, k, v)
    return (mix(q, k, v, mask) if new else softmax_last(q, cache, v.shape[0], mask=mask)), cache

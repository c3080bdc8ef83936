"""window: A_ij = exp(x_ij) / sum_m exp(x_im) for i - size < j, m <= i: softmax over the last `size` positions.

Relaxes no principle, only how far it is kept to: standard attention that looks back `size` positions, its own
included (Longformer, Beltagy et al. 2020; the sliding window of Mistral). Time and memory B L size d; the cache is a
ring of `size` positions.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from flax import nnx

from deconstruct.attention.accelerators import cudnn, one_map_a_sequence, tpu
from deconstruct.attention.form import Flops, Form, Kernel, Shape
from deconstruct.attention.registry import register_form
from deconstruct.config import ModelConfig
from deconstruct.kernels import reference, ring_cache
from deconstruct.kernels.mask import Mask
from deconstruct.kernels.softmax import softmax_attention
from deconstruct.types import UserError


@register_form
class Window(Form):
    name = "window"
    documents = True
    overhead = "the cells outside the window within each chunk of queries"

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, *, size: int = 256):
        if size < 1:
            raise UserError(f"size={size}: must be at least 1, the position itself")
        self.size = size

    @property
    def reach(self) -> int:
        return self.size

    def weights(self, q: jax.Array, k: jax.Array, mask: Mask) -> jax.Array:
        return reference.softmax_weights(q, k, mask.narrowed(self.size))

    def kernels(self) -> dict[str, Kernel]:
        mix, extend = functools.partial(_mix, self.size), functools.partial(_extend, self.size)
        xla = Kernel(mix, extend, functools.partial(_init_cache, self.size))
        return {
            "cudnn": cudnn(xla, window=self.size),
            "splash": tpu("splash:splash_attention", xla, one_map_a_sequence, window=self.size),
            "pallas_tpu": tpu("pairwise:softmax_attention", xla, window=self.size),
            "xla": xla,
        }

    def flops(self, shape: Shape) -> Flops:
        size = min(self.size, shape.length)
        cells = size * (size + 1) / 2 + (shape.length - size) * size
        per_cell = 2.0 * shape.heads * shape.head_dim * (shape.qk_batch + shape.batch)
        return Flops(super().flops(shape).dense, per_cell * cells)

    def decode_flops(self, shape: Shape) -> Flops:
        cells = 2.0 * min(self.size, shape.length) * shape.heads * shape.head_dim
        return Flops.exactly(cells * (shape.qk_batch + shape.batch))


def _mix(size: int, q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
    return softmax_attention(q, k, v, mask=mask.narrowed(size))


def _extend(size: int, q: jax.Array, k: jax.Array, v: jax.Array, cache: Any, mask: Mask) -> tuple[jax.Array, Any]:
    return ring_cache.windowed_extend(q, k, v, cache, mask.narrowed(size))


def _init_cache(size: int, shape: Shape, dtype: Any) -> Any:
    sizes = (shape.kv_heads, shape.head_dim, shape.head_dim)
    return ring_cache.init_ring_cache(shape.qk_batch, shape.batch, shape.length, size, *sizes, dtype)

"""softmax: A_ij = exp(q_i . k_j / sqrt(dh)) / sum_{m<=i} exp(q_i . k_m / sqrt(dh)).

Relaxes nothing: the standard form (Vaswani et al. 2017). Time B L^2 d; cache 2 B L d numbers.
"""

from __future__ import annotations

from typing import Any

import jax

from deconstruct.attention.form import Flops, Form, Kernel, Shape, Site
from deconstruct.attention.registry import register_form
from deconstruct.kernels import kv_cache, reference
from deconstruct.kernels.mask import Mask
from deconstruct.kernels.softmax import softmax_attention, softmax_last

CUDNN_HEAD_DIM = 128


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
        # A token that is decoded reads its cache by XLA's program with either; cuDNN takes the prompt.
        return {
            "xla": Kernel(_mix, _extend, _init_cache),
            "cudnn": Kernel(_cudnn, _extend_cudnn, _init_cache, _cudnn_refuses),
        }

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
    q: jax.Array, k: jax.Array, v: jax.Array, cache: kv_cache.KVCache, mask: Mask, mix: Any = _mix
) -> tuple[jax.Array, kv_cache.KVCache]:
    new, cache = cache.is_new, kv_cache.append(cache, k, v)
    return (mix(q, k, v, mask) if new else softmax_last(q, cache, v.shape[0], mask=mask)), cache


def _extend_cudnn(
    q: jax.Array, k: jax.Array, v: jax.Array, cache: kv_cache.KVCache, mask: Mask
) -> tuple[jax.Array, kv_cache.KVCache]:
    return _extend(q, k, v, cache, mask, _cudnn)


def _cudnn(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
    del mask  # causal: `_cudnn_refuses` lets nothing else come here
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def _cudnn_refuses(site: Site) -> str | None:
    """The limits of cuDNN's program."""
    if site.platform not in (None, "gpu"):
        return f"needs an NVIDIA GPU for it, and this is {site.platform}; use auto or xla"
    if site.dtype not in ("bfloat16", "float16"):
        return f"computes with it in bfloat16 or float16, not {site.dtype}; use xla, or config.model.dtype=bfloat16"
    if site.head_dim % 8 or site.head_dim > CUDNN_HEAD_DIM:
        return (
            f"needs heads of a width that is a multiple of 8 and at most {CUDNN_HEAD_DIM} for it, not {site.head_dim}; "
            "use xla"
        )
    if site.shared:
        return "over a fixed source has one map for the batch, and cuDNN wants one for each sequence; use xla"
    if site.documents:
        return "does not keep to the borders of documents with it (config.document_mask=true); use xla"
    return None

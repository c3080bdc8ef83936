"""Attention = source x form: projections around a form, with queries and keys read where the source says.

Q, K = source W_Q, source W_K;  V = H W_V;  O = (weights(Q, K) V) W_O. Every pair has the same parameters. Biases on q,
k and v in Qwen2 blocks, RMSNorm over head_dim on q and k (before RoPE) in Qwen3 blocks.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
from flax import nnx

from deconstruct.attention.base import Context, Flops, Form, Mixer, Shape
from deconstruct.attention.source import Source
from deconstruct.config import ModelConfig
from deconstruct.distributed.sharding import constrain
from deconstruct.layers import Linear, RMSNorm, apply_rope
from deconstruct.types import Streams

HEADS = ("batch", "length", "act_heads", None)


class Attention(Mixer):
    def __init__(self, config: ModelConfig, source: type[Source], form: type[Form], rngs: nnx.Rngs):
        d, heads, kv_heads, head_dim = config.hidden_size, config.num_heads, config.kv_heads, config.head_size
        linear = functools.partial(Linear, std=config.init_std, dtype=config.dtype, rngs=rngs)
        bias = config.block == "qwen2"
        self.q_proj = linear((d,), (heads, head_dim), ("embed", "heads", None), bias=bias)
        self.k_proj = linear((d,), (kv_heads, head_dim), ("embed", "kv_heads", None), bias=bias)
        self.v_proj = linear((d,), (kv_heads, head_dim), ("embed", "kv_heads", None), bias=bias)
        self.o_proj = linear((heads, head_dim), (d,), ("heads", None, "embed"))
        normed = config.block == "qwen3"
        self.q_norm = RMSNorm(head_dim, config.norm_epsilon) if normed else None
        self.k_norm = RMSNorm(head_dim, config.norm_epsilon) if normed else None
        self.source = source
        self.form = form(impl=config.impl)
        self.fixed_source = source.name if source.fixed else None
        self.reads_static = source.static
        self.sizes = (d, heads, kv_heads, head_dim)

    def queries(self, x: jax.Array, context: Context) -> jax.Array:
        """[B, L, d] -> [B, L, heads, head_dim], normed and rotated as the block and the form have it."""
        return self._position(self.q_proj(x), self.q_norm, context)

    def keys(self, x: jax.Array, context: Context) -> jax.Array:
        return self._position(self.k_proj(x), self.k_norm, context)

    def _position(self, x: jax.Array, norm: RMSNorm | None, context: Context) -> jax.Array:
        if norm is not None:
            x = norm(x)
        if self.form.uses_rope:
            x = apply_rope(x, context.cos, context.sin)
        return constrain(x, HEADS)

    def _queries_and_keys(self, streams: Streams, static: Streams, context: Context) -> tuple[Streams, Streams]:
        inputs = self.source.read(streams, static)
        q = inputs.map(lambda x: self.queries(x, context))
        k = inputs.map(lambda x: self.keys(x, context))
        if self.source.fixed and streams.h is not None:
            q, k = Streams(q.x, q.x), Streams(k.x, k.x)
        return q, k

    def __call__(self, streams: Streams, static: Streams, context: Context) -> Streams:
        q, k = self._queries_and_keys(streams, static, context)
        v = streams.map(lambda x: constrain(self.v_proj(x), HEADS))
        mixed = q.map(self.form.mix, k, v)
        return mixed.map(lambda x: self.o_proj(constrain(x, HEADS)))

    def maps(self, streams: Streams, static: Streams, context: Context) -> jax.Array:
        q, k = self._queries_and_keys(streams, static, context)
        return self.form.weights(q.h, k.h)

    def constants(self, x: jax.Array, context: Context) -> Any:
        """Queries and keys of a fixed source at every position: they do not depend on what is decoded."""
        return {"q": self.queries(x, context), "k": self.keys(x, context)} if self.source.fixed else None

    def init_cache(self, batch: int, length: int, size: int, dtype: Any) -> Any:
        return self.form.init_cache(self.shape(batch, length), dtype)

    def extend(
        self,
        h: jax.Array,
        static: jax.Array | None,
        cache: Any,
        constants: Any,
        context: Context,
        start: int | jax.Array,
    ) -> tuple[jax.Array, Any]:
        window = functools.partial(jax.lax.dynamic_slice_in_dim, start_index=start, slice_size=h.shape[1])
        if self.source.fixed:
            q, k = window(constants["q"], axis=1), window(constants["k"], axis=1)
        else:
            inputs = self.source.read(Streams(h), Streams(static)).h
            here = context._replace(cos=window(context.cos), sin=window(context.sin))
            q, k = self.queries(inputs, here), self.keys(inputs, here)
        mixed, cache = self.form.extend(q, k, constrain(self.v_proj(h), HEADS), cache)
        return self.o_proj(constrain(mixed, HEADS)), cache

    def shape(self, batch: int, length: int) -> Shape:
        """The sizes of this layer's queries, keys and values."""
        _, heads, kv_heads, head_dim = self.sizes
        return Shape(batch, 1 if self.source.fixed else batch, length, heads, kv_heads, head_dim)

    def flops(self, batch: int, length: int) -> Flops:
        shape = self.shape(batch, length)
        return self._projections(shape.qk_batch * length, batch * length) + self.form.flops(shape)

    def decode_flops(self, batch: int, length: int) -> Flops:
        # Queries and keys of a fixed source are constants.
        return self._projections(0 if self.source.fixed else batch, batch) + self.form.decode_flops(
            self.shape(batch, length)
        )

    def _projections(self, qk_tokens: int, vo_tokens: int) -> Flops:
        d, heads, kv_heads, head_dim = self.sizes
        return Flops.exactly(2.0 * (qk_tokens + vo_tokens) * d * (heads + kv_heads) * head_dim)

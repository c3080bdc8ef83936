"""Attention = source x form: projections around a form, with queries and keys read where the source says.

Q, K = source W_Q, source W_K;  V = H W_V;  O = finish(weights(Q, K) V) W_O. Every pair has the same parameters, but for
what a form owns. Biases on q, k and v in Qwen2 blocks, RMSNorm over head_dim on q and k (before RoPE) in Qwen3 blocks.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from deconstruct.attention.form import Flops, Form, Shape, Site
from deconstruct.attention.mixer import Context, Mixer
from deconstruct.attention.source import Source
from deconstruct.config import ModelConfig
from deconstruct.distributed.sharding import KEYS, QUERIES, constrain
from deconstruct.layers import Linear, RMSNorm, apply_rope
from deconstruct.types import Streams, UserError


class Attention(Mixer):
    def __init__(
        self,
        config: ModelConfig,
        source: type[Source],
        form: type[Form],
        rngs: nnx.Rngs,
        options: Mapping[str, Any] | None = None,
    ):
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
        self.form = form(config, rngs, **(options or {}))
        self.form.impl = config.impl
        self.fixed_source = source.name if source.fixed else None
        self.reads_static = source.static
        self.shared = source.fixed and self.form.reads != "hidden"  # one map for the whole batch
        self.documents = self.form.documents
        self.normalised = self.form.normalised
        self.sizes = (d, heads, kv_heads, head_dim)
        if config.document_mask and source.fixed:
            raise UserError(
                f"config.document_mask=true: {source.name} has one map for every text, which knows no borders of "
                "documents; take another source, or leave the mask off"
            )
        self.form.check(Site(config.dtype, head_dim, self.shared, config.document_mask))

    @property
    def reach(self) -> int | None:
        return self.form.reach

    def queries(self, x: jax.Array, context: Context) -> jax.Array:
        """[B, L, d] -> [B, L, heads, head_dim], normed and rotated as the block and the form have it."""
        return constrain(self._position(self.q_proj(x), self.q_norm, context), QUERIES)

    def keys(self, x: jax.Array, context: Context) -> jax.Array:
        return constrain(self._position(self.k_proj(x), self.k_norm, context), KEYS)

    def _position(self, x: jax.Array, norm: RMSNorm | None, context: Context) -> jax.Array:
        if norm is not None:
            x = norm(x)
        if self.form.uses_rope:
            x = apply_rope(x, context.cos, context.sin)
        return x

    def _inputs(self, streams: Streams, static: Streams, context: Context) -> Streams:
        """For each stream: its queries, its keys, and what the form reads beside them."""
        inputs = self.source.read(streams, static)
        q = inputs.map(lambda x: self.queries(x, context))
        k = inputs.map(lambda x: self.keys(x, context))
        if self.source.fixed and streams.h is not None:
            q, k, inputs = (Streams(two.x, two.x) for two in (q, k, inputs))
        read = (streams if self.form.reads == "hidden" else inputs).map(self.form.read)
        return streams.map(lambda _, *own: self._over_the_batch(*own), q, k, read)

    def _over_the_batch(self, q: jax.Array, k: jax.Array, read: dict[str, jax.Array]) -> tuple[Any, ...]:
        """A form that reads the hidden states over a fixed source has a map for each sequence after all."""
        batch = max((x.shape[0] for x in read.values()), default=q.shape[0])
        if batch != q.shape[0]:
            q, k = (jnp.broadcast_to(x, (batch, *x.shape[1:])) for x in (q, k))
        return q, k, read

    def __call__(self, streams: Streams, static: Streams, context: Context) -> Streams:
        def mix(x: jax.Array, inputs: tuple[Any, ...]) -> jax.Array:
            q, k, read = inputs
            return self._output(self.form.mix(q, k, constrain(self.v_proj(x), KEYS), context.mask, **read))

        return streams.map(mix, self._inputs(streams, static, context))

    def _output(self, mixed: jax.Array) -> jax.Array:
        return self.o_proj(constrain(self.form.finish(mixed), QUERIES))

    def maps(self, streams: Streams, static: Streams, context: Context) -> jax.Array:
        q, k, read = self._inputs(streams, static, context).h
        return self.form.weights(q, k, context.mask, **read)

    def scores(self, streams: Streams, static: Streams, context: Context) -> jax.Array:
        q, k, read = self._inputs(streams, static, context).h
        return self.form.scores(q, k, **read)

    def constants(self, x: jax.Array, context: Context) -> Any:
        """Queries, keys and what the form reads of a fixed source, at every position: they do not depend on what is
        decoded."""
        if not self.source.fixed:
            return None
        read = self.form.read(x) if self.shared else {}
        return {"q": self.queries(x, context), "k": self.keys(x, context), "read": read}

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
            here = jax.tree.map(lambda x: window(x, axis=1), constants)
            read = here["read"] if self.shared else self.form.read(h)
            q, k, read = self._over_the_batch(here["q"], here["k"], read)
        else:
            inputs = self.source.read(Streams(h), Streams(static)).h
            context = context._replace(cos=window(context.cos), sin=window(context.sin))
            q, k = self.queries(inputs, context), self.keys(inputs, context)
            read = self.form.read(h if self.form.reads == "hidden" else inputs)
        mixed, cache = self.form.extend(q, k, constrain(self.v_proj(h), KEYS), cache, context.mask, **read)
        return self._output(mixed), cache

    def shape(self, batch: int, length: int) -> Shape:
        """The sizes of this layer's queries, keys and values."""
        d, heads, kv_heads, head_dim = self.sizes
        return Shape(batch, 1 if self.shared else batch, length, heads, kv_heads, head_dim, d)

    def flops(self, batch: int, length: int) -> Flops:
        qk_batch = 1 if self.source.fixed else batch
        shape = self.shape(batch, length)
        read = self.form.read_flops(shape.qk_batch * length)
        return self._projections(qk_batch * length, batch * length) + Flops.exactly(read) + self.form.flops(shape)

    def decode_flops(self, batch: int, length: int) -> Flops:
        # Queries and keys of a fixed source are constants.
        read = 0.0 if self.shared else self.form.read_flops(batch)
        projections = self._projections(0 if self.source.fixed else batch, batch)
        return projections + Flops.exactly(read) + self.form.decode_flops(self.shape(batch, length))

    def _projections(self, qk_tokens: int, vo_tokens: int) -> Flops:
        d, heads, kv_heads, head_dim = self.sizes
        return Flops.exactly(2.0 * (qk_tokens + vo_tokens) * d * (heads + kv_heads) * head_dim)

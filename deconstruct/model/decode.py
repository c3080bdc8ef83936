"""Decoding: a prompt and then token by token, each form with its own cache or state.

A decoder is made for a batch and a cache length, and extends all its sequences by the same number of positions at a
time, so that one position and one program serve the batch. Prompts of unequal length need no padding and no mask: a
sequence whose prompt is longer than the others' is fed its own tokens while those already sample (see `generate`).
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deconstruct.attention.base import Context
from deconstruct.attention.variants import reads_static
from deconstruct.layers import rope_tables
from deconstruct.model.language_model import LanguageModel
from deconstruct.model.stack import Block
from deconstruct.types import Streams


class Cache(NamedTuple):
    """What a batch of sequences has left behind: one entry per layer, and the position that comes next.

    Empty, its position is a Python 0: a sequence that is started in the program that made the cache (`prefill`) is
    compiled without a past.
    """

    layers: tuple[Any, ...]
    position: int | jax.Array  # int32 []


def init_cache(model: LanguageModel, batch: int, length: int) -> Cache:
    """Empty caches for `batch` sequences of up to `length` positions."""
    config, dtype = model.config, jnp.dtype(model.config.dtype)
    mixers = [model.stack.layer(i).mixer for i in range(len(config.layers))]
    layers = tuple(() if m is None else m.init_cache(batch, length, config.hidden_size, dtype) for m in mixers)
    return Cache(layers, 0)


def cache_bytes(cache: Any) -> int:
    """Bytes of a cache (or its shapes), positions not counted."""
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(cache) if np.ndim(x))


def decoding_constants(model: LanguageModel, length: int) -> tuple[Any, ...]:
    """What decoding up to `length` positions needs of the fixed stream, per layer: computed once, for any batch.

    The stack is run with no batch at all. Raises UserError where the stream is shorter than `length`.
    """
    x = model.fixed_stream(length)
    if x is None:
        return (None,) * len(model.config.layers)
    streams = Streams(None, x)
    context = _context(model, length, Streams(None, x) if reads_static(model.config.layers) else Streams(None))

    def record(block: Block, streams: Streams, context: Context) -> Any:
        return block.constants(streams, context)

    return tuple(model.stack(streams, context, record)[1])


def extend(
    model: LanguageModel, tokens: jax.Array, cache: Cache, constants: tuple[Any, ...], length: int
) -> tuple[jax.Array, Cache]:
    """C more tokens int32 [B, C] of each sequence -> logits of the last, float32 [B, vocab_size], and the cache.

    `length` is what the cache was made for; going beyond it is the caller's mistake and is not noticed here.
    """
    h = model.embed(tokens)
    context = _context(model, length, Streams(h) if reads_static(model.config.layers) else Streams(None))
    h, layers = model.stack.extend(h, cache.layers, constants, context, cache.position)
    last = model.norm(h[:, -1:])
    table = model.output_table().astype(last.dtype)
    logits = jnp.einsum("bld,vd->blv", last, table, preferred_element_type=jnp.float32)[:, 0]
    return logits[:, : model.config.vocab_size], Cache(layers, cache.position + tokens.shape[1])


def prefill(
    model: LanguageModel, tokens: jax.Array, constants: tuple[Any, ...], length: int
) -> tuple[jax.Array, Cache]:
    """`extend` from an empty cache for `length` positions."""
    return extend(model, tokens, init_cache(model, tokens.shape[0], length), constants, length)


def _context(model: LanguageModel, length: int, static: Streams) -> Context:
    cos, sin = rope_tables(jnp.arange(length), model.config.head_size, model.config.rope_theta)
    return Context(cos, sin, static)


class Decoder:
    """`extend` compiled for one model, batch and cache length; the cache is donated from call to call.

    decoder = Decoder(model, batch, length)
    logits, cache = decoder.prefill(prompts)
    logits, cache = decoder.extend(tokens, cache)
    """

    def __init__(self, model: LanguageModel, batch: int, length: int):
        self._graphdef, state = nnx.split(model)
        self._state = nnx.to_pure_dict(state)  # plain dicts pass into a compiled step faster
        self.batch, self.length = batch, length
        self.constants = jax.jit(lambda state: decoding_constants(self._model(state), length))(self._state)
        self._prefill = jax.jit(
            lambda state, constants, tokens: prefill(self._model(state), tokens, constants, length),
        )
        self._extend = jax.jit(
            lambda state, constants, tokens, cache: extend(self._model(state), tokens, cache, constants, length),
            donate_argnums=3,
        )

    def _model(self, state: Any) -> LanguageModel:
        return nnx.merge(self._graphdef, state)

    def prefill(self, tokens: jax.Array) -> tuple[jax.Array, Cache]:
        """The first tokens int32 [B, C], C > 0: logits of the last and the cache they leave."""
        return self._prefill(self._state, self.constants, tokens)

    def extend(self, tokens: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
        """More tokens int32 [B, C], C > 0; the cache given is used up."""
        return self._extend(self._state, self.constants, tokens, cache)

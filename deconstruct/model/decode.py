"""Decoding: a prompt and then token by token, each form with its own cache or state.

A decoder is made for a batch and a cache length, and extends all its sequences by the same number of positions at a
time, so that one position and one program serve the batch. Prompts of unequal length need no padding and no mask: a
sequence whose prompt is longer than the others' is fed its own tokens while those already sample (see `generate`).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deconstruct.attention.mixer import Context
from deconstruct.attention.variants import make_mixer
from deconstruct.config import ModelConfig
from deconstruct.distributed.sharding import Axis, constrain, fitting_spec
from deconstruct.kernels.mask import CAUSAL, Mask, document_begins
from deconstruct.model.language_model import LanguageModel
from deconstruct.model.stack import RESIDUAL, Block
from deconstruct.types import Streams


class Cache(NamedTuple):
    """What a batch of sequences has left behind: one entry per layer, and the position that comes next.

    Empty, its position is a Python 0: a sequence that is started in the program that made the cache (`prefill`) is
    compiled without a past.
    """

    layers: tuple[Any, ...]
    position: int | jax.Array  # int32 []
    begin: jax.Array | None = None  # int32 [B]: where the document of the next token begins; None without borders


def init_cache(model: LanguageModel, batch: int, length: int) -> Cache:
    """Empty caches for `batch` sequences of up to `length` positions."""
    config, dtype = model.config, jnp.dtype(model.config.dtype)
    mixers = [model.stack.layer(i).mixer for i in range(len(config.layers))]
    layers = tuple(() if m is None else m.init_cache(batch, length, config.hidden_size, dtype) for m in mixers)
    return Cache(layers, 0, jnp.zeros(batch, jnp.int32) if config.document_mask else None)


@functools.cache
def cache_axes(config: ModelConfig, name: str) -> Any:
    """Of each array in the cache of a variant: what its axes grow with, in the names of `distributed.sharding`.

    Found by asking for caches of one sequence, of two, and of twice the heads, so that a form need not say it.
    """

    def shapes(batch: int, times: int) -> Any:
        heads, kv_heads = times * config.num_heads, times * config.kv_heads
        wider = dataclasses.replace(config, num_heads=heads, num_kv_heads=kv_heads, head_dim=config.head_size)
        mixer = nnx.eval_shape(lambda: make_mixer(name, wider, nnx.Rngs(params=jax.random.key(0))))
        init = functools.partial(mixer.init_cache, batch, 8, config.hidden_size, jnp.dtype(config.dtype))
        return jax.eval_shape(init)

    def axes(one: Any, rows: Any, heads: Any) -> tuple[Axis, ...]:
        sizes = zip(one.shape, rows.shape, heads.shape, strict=True)
        grows = [{"batch": b != a, "kv_heads": c != a} for a, b, c in sizes]
        return tuple(tuple(axis for axis, does in grow.items() if does) or None for grow in grows)

    return jax.tree.map(axes, shapes(1, 1), shapes(2, 1), shapes(1, 2))


def _layer_axes(config: ModelConfig, cache: tuple[Any, ...]) -> tuple[Any, ...]:
    """`cache_axes` of each layer that has a cache."""
    pairs = zip(cache, config.layers, strict=True)
    return tuple(cache_axes(config, name) if jax.tree.leaves(own) else own for own, name in pairs)


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
    context = model.context(length, Streams(None, x), CAUSAL)

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
    mask, begin = _documents(model, tokens, cache)
    context = model.context(length, Streams(h), mask)
    h, layers = model.stack.extend(constrain(h, RESIDUAL), cache.layers, constants, context, cache.position)
    if jax.sharding.get_abstract_mesh().size > 1:
        pinned = _layer_axes(model.config, layers)
        layers = jax.tree.map(lambda x, axes: constrain(x, axes) if np.ndim(x) else x, layers, pinned)
    logits = model.logits(model.norm(h[:, -1:]))[:, 0]
    return logits, Cache(layers, cache.position + tokens.shape[1], begin)


def _documents(model: LanguageModel, tokens: jax.Array, cache: Cache) -> tuple[Mask, jax.Array | None]:
    """The mask of C more tokens, and where the document of the token after them begins."""
    if cache.begin is None:
        return CAUSAL, None
    end = model.config.end_of_text
    begins = document_begins(tokens, end, cache.begin - cache.position)
    after = cache.position + tokens.shape[1]
    return Mask(begins), jnp.where(tokens[:, -1] == end, after, begins[:, -1] + cache.position).astype(jnp.int32)


def prefill(
    model: LanguageModel, tokens: jax.Array, constants: tuple[Any, ...], length: int
) -> tuple[jax.Array, Cache]:
    """`extend` from an empty cache for `length` positions."""
    return extend(model, tokens, init_cache(model, tokens.shape[0], length), constants, length)


# (logits of the last position [B, V], the tokens given [B, C], the position that comes next, carry, inputs) -> (what
# comes out, carry): a part of the compiled step, so that it may choose the next token on the device.
Take = Callable[[jax.Array, jax.Array, Any, Any, Any], tuple[Any, Any]]


def logits_alone(logits: jax.Array, tokens: jax.Array, position: Any, carry: Any, inputs: Any) -> tuple[Any, Any]:
    """The `Take` of a decoder that gives logits."""
    return logits, carry


class Decoder:
    """`extend` compiled for one model, batch and cache length. Cache and carry are donated from call to call.

    decoder = Decoder(model, batch, length)
    logits, cache, _ = decoder.prefill(prompts)
    logits, cache, _ = decoder.extend(tokens, cache)

    `take` decides what comes out instead of logits. Raises UserError where a fixed stream is shorter than `length`.
    """

    def __init__(self, model: LanguageModel, batch: int, length: int, take: Take = logits_alone):
        graphdef, state = nnx.split(model)
        self._state = nnx.to_pure_dict(state)  # plain dicts pass into a compiled step faster
        self._config, self._mesh = model.config, _mesh_of(self._state)
        self.batch, self.length = batch, length
        model.check_length(length)

        def start(state: Any, constants: Any, tokens: jax.Array, carry: Any, inputs: Any) -> tuple[Any, Cache, Any]:
            logits, cache = prefill(nnx.merge(graphdef, state), tokens, constants, length)
            out, carry = take(logits, tokens, cache.position, carry, inputs)
            return out, cache, carry

        def step(
            state: Any, constants: Any, tokens: jax.Array, cache: Cache, carry: Any, inputs: Any
        ) -> tuple[Any, Cache, Any]:
            logits, cache = extend(nnx.merge(graphdef, state), tokens, cache, constants, length)
            out, carry = take(logits, tokens, cache.position, carry, inputs)
            return out, cache, carry

        def empty(state: Any) -> Any:
            model = nnx.merge(graphdef, state)
            return init_cache(model, batch, length), decoding_constants(model, length)

        self._start, self._step = jax.jit(start), jax.jit(step, donate_argnums=(3, 4))
        self._constants = jax.jit(lambda state: decoding_constants(nnx.merge(graphdef, state), length))
        self._empty = empty

    @functools.cached_property
    def constants(self) -> tuple[Any, ...]:
        """What is needed of the fixed stream, per layer; computed when it is first asked for."""
        with self._on_mesh():
            return self._constants(self._state)

    def abstract(self) -> tuple[Cache, tuple[Any, ...]]:
        """Shapes of an empty cache and of the constants."""
        return jax.eval_shape(self._empty, self._state)

    def prefill(self, tokens: jax.Array, carry: Any = None, inputs: Any = None) -> tuple[Any, Cache, Any]:
        """The first tokens int32 [B, C], C > 0: what `take` makes of the logits of the last, the cache, and carry."""
        constants = self.constants
        with self._on_mesh():
            return self._start(self._state, constants, tokens, carry, inputs)

    def extend(self, tokens: jax.Array, cache: Cache, carry: Any = None, inputs: Any = None) -> tuple[Any, Cache, Any]:
        """More tokens int32 [B, C], C > 0; the cache and carry given are used up."""
        constants = self.constants
        with self._on_mesh():
            return self._step(self._state, constants, tokens, cache, carry, inputs)

    def trace(self) -> jax.stages.Traced:
        """The program of one more token, without carry and inputs; the model may be one of shapes and shardings."""
        cache, constants = self.abstract()
        if self._mesh is not None:
            placed = functools.partial(_placed, self._mesh)
            cache = cache._replace(layers=jax.tree.map(placed, cache.layers, _layer_axes(self._config, cache.layers)))
        with self._on_mesh():
            tokens = jax.ShapeDtypeStruct((self.batch, 1), jnp.int32)
            return self._step.trace(self._state, constants, tokens, cache, None, None)

    def _on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)


def _mesh_of(state: Any) -> jax.sharding.Mesh | None:
    """The mesh that a model's arrays lie on; None on one device."""
    shardings = (getattr(x, "sharding", None) for x in jax.tree.leaves(state))
    meshes = (sharding.mesh for sharding in shardings if isinstance(sharding, jax.sharding.NamedSharding))
    return next((mesh for mesh in meshes if isinstance(mesh, jax.sharding.Mesh) and mesh.size > 1), None)


def _placed(mesh: jax.sharding.Mesh, x: Any, axes: tuple[Axis, ...]) -> jax.ShapeDtypeStruct:
    sharding = jax.sharding.NamedSharding(mesh, fitting_spec(axes, x.shape, mesh))
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

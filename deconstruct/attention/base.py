"""The two contracts of the attention floor, form and mixer, and their registries.

A *form* says how queries and keys become weights: subclass `Form`, define `weights`, register it, and it trains,
shards, decodes, is drawn and is counted. A *mixer* is what stands in a block where attention stands:
`attention.Attention` is the one that joins a source and a form; `gated_mlp.GatedMLP` mixes nothing.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from deconstruct.config import ModelConfig
from deconstruct.kernels import dispatch, kv_cache, reference
from deconstruct.types import Streams, UserError


class Context(NamedTuple):
    """What every layer reads and none changes; it travels beside the scan over layers, not in its carry."""

    cos: jax.Array  # [L, head_dim/2], float32
    sin: jax.Array
    static: Streams  # the token embeddings of each stream, constant over depth; Streams(None) where no layer reads them


class Flops(NamedTuple):
    """Floating-point operations, a multiply-add counted as two.

    `dense` is what the definition costs (every cell of the L x L map, as the paper's tables count it); `needed` is what
    the fast path must do: causal cells only, or a recurrence. Model FLOPs utilisation is measured against `needed`.
    """

    dense: float
    needed: float

    def __add__(self, other: Flops) -> Flops:  # type: ignore[override]
        return Flops(self.dense + other.dense, self.needed + other.needed)

    @classmethod
    def exactly(cls, count: float) -> Flops:
        return cls(count, count)


class Shape(NamedTuple):
    """The sizes that costs and caches follow from. `qk_batch` is 1 where queries and keys come from a fixed source."""

    batch: int
    qk_batch: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int


@dataclasses.dataclass(frozen=True)
class Form:
    """How queries and keys become weights. Only `weights` must be defined.

    Shapes: q [Bq, L, heads, head_dim]; k [Bq, L, kv_heads, head_dim]; v [B, L, kv_heads, head_dim]. Bq is B, or 1 where
    one map serves the whole batch. Grouped queries: head h reads the keys and values of h // (heads // kv_heads).
    """

    impl: str = "auto"

    name: ClassVar[str]
    relaxes: ClassVar[tuple[str, ...]] = ()
    uses_rope: ClassVar[bool] = True
    overhead: ClassVar[str] = ""  # what `mix` computes beyond the `needed` of `flops`, in words

    def weights(self, q: jax.Array, k: jax.Array) -> jax.Array:
        """The definition: float32 [Bq, heads, L, L], causal, rows summing to one.

        Row i may depend on q_i and on keys up to i. A form whose rows depend on earlier queries too overrides `extend`.
        """
        raise NotImplementedError

    def mix(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        """weights(q, k) @ v, [B, L, heads, head_dim] in v's dtype, by the fastest path there is."""
        return reference.apply_weights(self.weights(q, k), v)

    def init_cache(self, shape: Shape, dtype: Any) -> Any:
        """An empty cache for up to `shape.length` positions: a pytree of arrays (default: keys and values)."""
        return kv_cache.init_kv_cache(
            shape.qk_batch, shape.batch, shape.length, shape.kv_heads, shape.head_dim, shape.head_dim, dtype
        )

    def extend(self, q: jax.Array, k: jax.Array, v: jax.Array, cache: Any) -> tuple[jax.Array, Any]:
        """Mixes C more positions after those in the cache: a prompt (C = L) or one token (C = 1).

        The default is right for every form that keeps to `weights`' contract, and forms the whole map to read C rows
        of it.
        """
        start = cache.length
        cache = kv_cache.append(cache, k, v)
        keys, values = kv_cache.contents(cache, k.shape[0], v.shape[0])
        queries = jnp.zeros((q.shape[0], keys.shape[1], *q.shape[2:]), q.dtype)
        queries = jax.lax.dynamic_update_slice_in_dim(queries, q, start, axis=1)
        weights = jax.lax.dynamic_slice_in_dim(self.weights(queries, keys), start, q.shape[1], axis=2)
        return reference.apply_weights(weights, values), cache

    def flops(self, shape: Shape) -> Flops:
        """Of weights and mixing over a whole sequence; projections are counted by the mixer."""
        dense = 2.0 * shape.length**2 * shape.heads * shape.head_dim * (shape.qk_batch + shape.batch)
        return Flops(dense, dense)

    def decode_flops(self, shape: Shape) -> Flops:
        """Of `extend` by one token, with `shape.length` positions in the cache."""
        map_, rows = shape.length**2 * shape.qk_batch, shape.length * shape.batch
        return Flops.exactly(2.0 * (map_ + rows) * shape.heads * shape.head_dim)


@dataclasses.dataclass(frozen=True)
class KernelForm(Form):
    """A form with fast paths of its own under its name in `kernels.dispatch`."""

    def mix(self, q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        return dispatch.resolve(self.name, self.impl, dtype=q.dtype, head_dim=q.shape[-1])(q, k, v)


class Mixer(nnx.Module):
    """What stands in a block between its input norm and the residual sum.

    A subclass takes (config, rngs), both by position, and defines `__call__`. Every array it owns is an nnx.Param
    with the names of its axes.
    """

    name: ClassVar[str]
    relaxes: ClassVar[tuple[str, ...]] = ()
    fixed_source: str | None = None  # the fixed stream it reads, by the name of its source
    reads_static: bool = False  # whether it reads the token embeddings

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        raise NotImplementedError

    def __call__(self, streams: Streams, static: Streams, context: Context) -> Streams:
        """Normed streams (and normed token embeddings) in; what is added to each residual stream out."""
        raise NotImplementedError

    def maps(self, streams: Streams, static: Streams, context: Context) -> jax.Array | None:
        """The attention map of h, float32 [B or 1, heads, L, L]; None where nothing is mixed."""
        return None

    # Decoding. The defaults keep the mixer's inputs and run it over all of them again, which is right for whatever
    # is causal.

    def constants(self, x: jax.Array, context: Context) -> Any:
        """What of the normed fixed stream x [1, S, d] decoding needs, for all S positions at once."""
        return x if self.fixed_source else None

    def init_cache(self, batch: int, length: int, size: int, dtype: Any) -> Any:
        """An empty cache for `length` positions of `batch` sequences of width `size`: a pytree of arrays."""
        kept = {"h": jnp.zeros((batch, length, size), dtype)}
        return {**kept, "static": jnp.zeros((batch, length, size), dtype)} if self.reads_static else kept

    def extend(
        self,
        h: jax.Array,
        static: jax.Array | None,
        cache: Any,
        constants: Any,
        context: Context,
        start: int | jax.Array,
    ) -> tuple[jax.Array, Any]:
        """C more positions [B, C, d], from position `start` on, after those in the cache: what is added to the
        residual.

        `context` holds the tables of all positions the cache has room for.
        """
        update = jax.lax.dynamic_update_slice_in_dim
        cache = {**cache, "h": update(cache["h"], h.astype(cache["h"].dtype), start, axis=1)}
        if static is not None:
            cache["static"] = update(cache["static"], static.astype(cache["static"].dtype), start, axis=1)
        out = self(Streams(cache["h"], constants), Streams(cache.get("static"), None), context)
        return jax.lax.dynamic_slice_in_dim(out.h, start, h.shape[1], axis=1), cache

    def flops(self, batch: int, length: int) -> Flops:
        """Of the whole mixer, projections included, for what it adds to `batch` sequences: of the fixed stream, if it
        reads one, only the queries and keys."""
        raise NotImplementedError

    def decode_flops(self, batch: int, length: int) -> Flops:
        """Of `extend` by one token of each sequence, with `length` positions in the cache."""
        return self.flops(batch, length)


FORMS: dict[str, type[Form]] = {}
MIXERS: dict[str, type[Mixer]] = {}

F = TypeVar("F", bound=type)


def register_form(cls: F) -> F:
    """Class decorator: makes the form available under its `name`. A name twice is an error."""
    return _register(FORMS, Form, cls)


def register_mixer(cls: F) -> F:
    """Class decorator: makes the mixer available under its `name`. A name twice is an error."""
    return _register(MIXERS, Mixer, cls)


def _register(registry: dict[str, Any], base: type, cls: F) -> F:
    name = getattr(cls, "name", None)
    if not (isinstance(cls, type) and issubclass(cls, base)) or not isinstance(name, str):
        raise UserError(f"{cls!r}: expected a subclass of {base.__name__} with a `name`")
    if name in registry:
        raise UserError(f"{base.__name__.lower()} {name!r} is registered already, by {registry[name].__module__}")
    if "/" in name or "," in name:
        raise UserError(f"{base.__name__.lower()} {name!r}: a name must not contain / or ,")
    registry[name] = cls
    return cls

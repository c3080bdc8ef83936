"""The contract of a mixer: what stands in a block where attention stands.

`attention.Attention` is the one that joins a source and a form; `gated_mlp.GatedMLP` mixes nothing.
"""

from __future__ import annotations

from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deconstruct.attention.form import Flops
from deconstruct.config import ModelConfig
from deconstruct.kernels.mask import CAUSAL, Mask
from deconstruct.types import Streams


class Context(NamedTuple):
    """What every layer reads and none changes; it travels beside the scan over layers, not in its carry."""

    cos: jax.Array  # [L, head_dim/2], float32
    sin: jax.Array
    static: Streams  # the token embeddings of each stream, constant over depth; Streams(None) where no layer reads them
    mask: Mask = CAUSAL


class Mixer(nnx.Module):
    """What stands in a block between its input norm and the residual sum.

    A subclass takes (config, rngs), both by position, and its options by keyword, and defines `__call__`. Every array
    it owns is an nnx.Param with the names of its axes.
    """

    name: ClassVar[str]
    relaxes: ClassVar[tuple[str, ...]] = ()
    documents: bool = False  # it keeps to the borders of documents in `context.mask`
    fixed_source: str | None = None  # the fixed stream it reads, by the name of its source
    reads_static: bool = False  # whether it reads the token embeddings
    normalised: bool = True  # rows of its map sum to one

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        raise NotImplementedError

    def __call__(self, streams: Streams, static: Streams, context: Context) -> Streams:
        """Normed streams (and normed token embeddings) in; what is added to each residual stream out."""
        raise NotImplementedError

    @property
    def reach(self) -> int | None:
        """How many positions, its own included, it looks back at most; None: all."""
        return 1 if "token mixing" in self.relaxes else None

    def maps(self, streams: Streams, static: Streams, context: Context) -> jax.Array | None:
        """The attention map of h, float32 [B or 1, heads, L, L]; None where nothing is mixed."""
        return None

    def scores(self, streams: Streams, static: Streams, context: Context) -> jax.Array | None:
        """What the map of h is formed from, raw and unmasked: float32 [B or 1, heads, L or 1, L]; None where there is
        no such thing."""
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

        `context` holds the tables of all positions the cache has room for, and the mask of the C positions.
        """
        update = jax.lax.dynamic_update_slice_in_dim
        cache = {**cache, "h": update(cache["h"], h.astype(cache["h"].dtype), start, axis=1)}
        if static is not None:
            cache["static"] = update(cache["static"], static.astype(cache["static"].dtype), start, axis=1)
        context = context._replace(mask=context.mask.within(cache["h"].shape[1], start))
        out = self(Streams(cache["h"], constants), Streams(cache.get("static"), None), context)
        return jax.lax.dynamic_slice_in_dim(out.h, start, h.shape[1], axis=1), cache

    def flops(self, batch: int, length: int) -> Flops:
        """Of the whole mixer, projections included, for what it adds to `batch` sequences: of the fixed stream, if it
        reads one, only the queries and keys."""
        raise NotImplementedError

    def decode_flops(self, batch: int, length: int) -> Flops:
        """Of `extend` by one token of each sequence, with `length` positions in the cache."""
        return self.flops(batch, length)

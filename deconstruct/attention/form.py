"""The contract of a form: how queries and keys become weights.

Subclass `Form`, define `weights`, register it, and it trains, shards, decodes, is drawn and is counted. What is its
own (parameters, what it reads of each token beside q, k and v, fast paths, a cache, FLOPs) it says in the same file.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deconstruct.config import ModelConfig
from deconstruct.kernels import reference
from deconstruct.kernels.mask import CAUSAL, Mask
from deconstruct.types import UserError

_log = logging.getLogger(__name__)


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
    hidden_size: int = 0  # of what `read` is given


class Site(NamedTuple):
    """Where a program is to run; `platform` (cpu, gpu, tpu) is None while only the configuration is known."""

    dtype: str
    head_dim: int
    shared: bool  # one map for the whole batch: queries and keys have a batch of one
    documents: bool
    platform: str | None = None
    device: str | None = None  # its kind, as JAX names it: NVIDIA H100 80GB HBM3, TPU v5 lite


def platform() -> str:
    """Where programs run: cpu, gpu or tpu. On the mesh that is set, whose devices may be absent, else by default."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    name = device.platform if device else jax.default_backend()
    return {"cuda": "gpu", "rocm": "gpu"}.get(name, name)


def device_kind() -> str:
    """What it is that programs run on."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    return (device or jax.devices()[0]).device_kind


def _runs_anywhere(site: Site) -> str | None:
    return None


class Kernel(NamedTuple):
    """One program of a form. What it mixes and what it decodes with belong together: the cache is its own.

    mix(q, k, v, mask, **read) -> [B, L, heads, head_dim] in v's dtype
    extend(q, k, v, cache, mask, **read) -> the same for C more positions, and the cache after them
    init_cache(shape, dtype) -> an empty cache: a pytree of arrays
    refuses(site) -> why it cannot run there, in words that name what would do; None where it can
    platform: the only one it runs on; None: any
    """

    mix: Callable[..., jax.Array]
    extend: Callable[..., tuple[jax.Array, Any]]
    init_cache: Callable[[Shape, Any], Any]
    refuses: Callable[[Site], str | None] = _runs_anywhere
    platform: str | None = None

    def why_not(self, site: Site) -> str | None:
        """Why it cannot run at a site, or None."""
        if self.platform is not None and site.platform not in (None, self.platform):
            needs = {"gpu": "an NVIDIA GPU", "tpu": "a TPU"}[self.platform]
            return f"needs {needs} for it, and this is {site.platform}; use auto or xla"
        return self.refuses(site)


class Kept(NamedTuple):
    """All that came at S positions, of which the first `length` are filled."""

    q: jax.Array  # [Bq, S, heads, head_dim]
    k: jax.Array
    v: jax.Array
    read: dict[str, jax.Array]  # [Bq, S, ...]
    length: jax.Array  # int32 []


class Form(nnx.Module):
    """How queries and keys become weights. Only `weights` must be defined.

    Shapes: q [Bq, L, heads, head_dim]; k [Bq, L, kv_heads, head_dim]; v [B, L, kv_heads, head_dim]. Bq is B, or 1 where
    one map serves the whole batch. Grouped queries: head h reads the keys and values of h // (heads // kv_heads).

    Options are keyword arguments of `__init__`, with a type and a default: `def __init__(self, config, rngs, *,
    size: int = 256)` is spelled `hidden/mine(size=64)`. Parameters are made there too, with `layers.normal_param`,
    `constant_param` or `Linear`, which name their axes.
    """

    name: ClassVar[str]
    relaxes: ClassVar[tuple[str, ...]] = ()
    # Facts, which the tests and `check` read.
    normalised: ClassVar[bool] = True  # rows of `weights` sum to one
    uses_rope: ClassVar[bool] = True  # q and k are rotated by their positions
    documents: ClassVar[bool] = False  # `weights` and kernels keep to the borders of documents in `mask`
    reads: ClassVar[str] = "source"  # what `read` is given: the input of W_Q and W_K, or "hidden": that of W_V
    overhead: ClassVar[str] = ""  # what `mix` computes beyond the `needed` of `flops`, in words
    impl: str = "auto"  # set by the attention that holds it

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        """A form without parameters and options has nothing to make; how it is called is the contract."""

    @property
    def reach(self) -> int | None:
        """How many positions, its own included, a row looks back at most; None: all."""
        return None

    def read(self, x: jax.Array) -> dict[str, jax.Array]:
        """What it reads per token beside q, k and v (gates, decays, ...): x [B, L, d] -> named arrays [B, L, ...].

        They come as keyword arguments to `weights` and to the kernels. x is normed, and is what W_Q and W_K read (a
        map over a fixed source stays one for the batch), or what W_V reads where `reads` is "hidden".
        """
        return {}

    def weights(self, q: jax.Array, k: jax.Array, mask: Mask, **read: jax.Array) -> jax.Array:
        """The definition: float32 [Bq, heads, L, L], causal; of a linear recurrence, its effective map.

        `mask.dense(L, L)` is bool [B or 1, 1, L, L]. Row i may depend on what comes at positions up to i, of which
        `mask` lets it see some.
        """
        raise NotImplementedError

    def scores(self, q: jax.Array, k: jax.Array, **read: jax.Array) -> jax.Array:
        """What is normalised into weights, raw and unmasked, for those who study its size: float32 [Bq, heads, L, L],
        or [Bq, heads, 1, L] where a key has one score for all queries. Default: q_i . k_j / sqrt(dh)."""
        return reference.logits(q, k)

    def finish(self, mixed: jax.Array) -> jax.Array:
        """What is done to weights @ v, [B, L, heads, head_dim], before W_O; position by position. Default: nothing."""
        return mixed

    def kernels(self) -> dict[str, Kernel]:
        """Its fast paths by `impl` (xla, cudnn, splash, pallas_tpu, pallas_gpu); auto takes the first that can run
        where it is. They share one kind of cache. Without any, it is computed by its definition."""
        return {}

    def flops(self, shape: Shape) -> Flops:
        """Of weights and mixing over a whole sequence. Projections, and `read`, are counted apart."""
        dense = 2.0 * shape.length**2 * shape.heads * shape.head_dim * (shape.qk_batch + shape.batch)
        return Flops(dense, dense)

    def decode_flops(self, shape: Shape) -> Flops:
        """Of `extend` by one token, with `shape.length` positions in the cache."""
        map_, rows = shape.length**2 * shape.qk_batch, shape.length * shape.batch
        return Flops.exactly(2.0 * (map_ + rows) * shape.heads * shape.head_dim)

    def read_flops(self, tokens: int) -> float:
        """Of `read`, for so many tokens."""
        return 0.0

    # What the attention around it calls; `impl` says which kernel answers.

    def mix(self, q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask = CAUSAL, **read: jax.Array) -> jax.Array:
        """weights(q, k) @ v, [B, L, heads, head_dim] in v's dtype, by the kernel of `impl`."""
        return self._running(q, v, mask).mix(q, k, v, mask, **read)

    def extend(
        self, q: jax.Array, k: jax.Array, v: jax.Array, cache: Any, mask: Mask = CAUSAL, **read: jax.Array
    ) -> tuple[jax.Array, Any]:
        """Mixes C more positions after those in the cache: a prompt (C = L) or one token (C = 1)."""
        return self._running(q, v, mask).extend(q, k, v, cache, mask, **read)

    def init_cache(self, shape: Shape, dtype: Any) -> Any:
        """An empty cache for up to `shape.length` positions: a pytree of arrays."""
        table = self._table()
        return table[self.impl if self.impl in table else next(iter(table))].init_cache(shape, dtype)

    def resolved_impl(self, site: Site | None = None) -> str:
        """What `impl` means for this form at a site, or (None) on any platform: auto is the first program of its table
        that can run there. Raises UserError where there is no such program, or it cannot run there."""
        table = self._table()
        if self.impl == "auto":
            if site is None:
                return next(name for name, kernel in table.items() if kernel.platform is None)
            return next(name for name, kernel in table.items() if kernel.why_not(site) is None)
        if self.impl not in table:
            raise UserError(
                f"config.model.impl={self.impl}: form '{self.name}' has no such program; it has auto, "
                f"{', '.join(table)}"
            )
        reason = table[self.impl].why_not(site) if site else None
        if reason:
            raise UserError(f"config.model.impl={self.impl}: form '{self.name}' {reason}")
        return self.impl

    def check(self, site: Site) -> None:
        """Raises UserError where the program of `impl` cannot run at a site."""
        if site.documents and not self.documents:
            raise UserError(
                f"config.document_mask=true: form '{self.name}' does not keep to the borders of documents; take "
                "another form, or leave the mask off"
            )
        self.resolved_impl(site)

    def _table(self) -> dict[str, Kernel]:
        definition = Kernel(self._mix_by_definition, self._extend_by_definition, self._keep)
        return {**self.kernels(), "reference": definition}

    def _running(self, q: jax.Array, v: jax.Array, mask: Mask) -> Kernel:
        shared = q.shape[0] != v.shape[0]
        site = Site(str(q.dtype), q.shape[-1], shared, mask.documents, platform(), device_kind())
        self.check(site)
        table, chosen = self._table(), self.resolved_impl(site)
        passed = [] if self.impl != "auto" else list(table)[: list(table).index(chosen)]
        reasons = [f"{name} {table[name].why_not(site)}" for name in passed if table[name].platform == site.platform]
        _announce(self.name, chosen, "; ".join(reasons))
        return table[chosen]

    # The definition as a program. It keeps q, k, v and what was read, and forms the whole map to read C rows of it.

    def _mix_by_definition(self, q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, **read: jax.Array) -> jax.Array:
        return reference.apply_weights(self.weights(q, k, mask, **read), v)

    def _keep(self, shape: Shape, dtype: Any) -> Kept:
        def room(batch: int, heads: int) -> jax.Array:
            return jnp.zeros((batch, shape.length, heads, shape.head_dim), dtype)

        q, k = room(shape.qk_batch, shape.heads), room(shape.qk_batch, shape.kv_heads)
        x = jax.ShapeDtypeStruct((shape.qk_batch, shape.length, shape.hidden_size), dtype)
        read = {name: jnp.zeros(x.shape, x.dtype) for name, x in jax.eval_shape(self.read, x).items()}
        return Kept(q, k, room(shape.batch, shape.kv_heads), read, jnp.zeros((), jnp.int32))

    def _extend_by_definition(
        self, q: jax.Array, k: jax.Array, v: jax.Array, cache: Kept, mask: Mask, **read: jax.Array
    ) -> tuple[jax.Array, Kept]:
        start, count = cache.length, q.shape[1]

        def update(room: jax.Array, new: jax.Array) -> jax.Array:
            return jax.lax.dynamic_update_slice_in_dim(room, new.astype(room.dtype), start, axis=1)

        q, k, v, read = jax.tree.map(update, cache[:4], (q, k, v, read))
        cache = Kept(q, k, v, read, start + count)
        whole = mask.within(cache.q.shape[1], start)
        weights = self.weights(cache.q, cache.k, whole, **cache.read)
        rows = jax.lax.dynamic_slice_in_dim(weights, start, count, axis=2)
        return reference.apply_weights(rows, cache.v), cache


@functools.cache
def _announce(form: str, impl: str, reasons: str) -> None:
    _log.info("form %s runs with impl %s%s", form, impl, f" ({reasons})" if reasons else "")

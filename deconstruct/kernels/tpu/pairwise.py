"""Causal mixing by a map of pairwise logits, a block of queries and a block of keys at a time: no map is in memory.

    out_i = sum_j w(x_ij) v_j / n_i,    n_i = sum_j w(x_ij),    x_ij = q_i . k_j / sqrt(dh)

with w = exp (softmax, relative to a running maximum) or w = T, T(x) = 1 + x + x^2/2 (Taylor: at least 1/2, so that
nothing runs but two sums). One map may serve several rows of the batch: the rows then lie beside each other in the
width of the values, and a block of the map is formed once for all of them.

On the chip positions lie along the lanes: q, k [dh, L], values and results [w, L]. Blocks are then whole tiles
whatever dh is, what belongs to a query (maximum, normaliser, the begin of its document) is one row, and the map of a
block is formed transposed, [keys, queries]. The backward pass forms the map again,

    dL/dx_ij = A'_ij (g_i . v_j - g_i . out_i),    A'_ij = w'(x_ij) / n_i

once for dq, over the keys of a block of queries, and once for dk and dv, over the queries of a block of keys.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from deconstruct.kernels import grouped
from deconstruct.kernels.mask import CAUSAL, Mask
from deconstruct.kernels.tpu.chunks import dot

BLOCK = 512  # positions
WIDTH = 1024  # of the values that one pass takes; beyond it the map is formed again
LANES = 128
VMEM_LIMIT = 60 * 2**20  # bytes; blocks in float32 at the full width take more than the 16 MiB that go without saying

_NEVER = -1e30  # a logit that is not seen; finite, so that the maximum of a block without any subtracts


class _Plan(NamedTuple):
    """What is known when a kernel is compiled."""

    exponential: bool  # softmax, else Taylor
    window: int | None
    block: int
    length: int  # a multiple of the block
    groups: int
    documents: bool
    scale: float

    @property
    def blocks(self) -> int:
        return self.length // self.block

    @property
    def met(self) -> int:
        """Pairs of blocks that are not wholly unseen, of one head."""
        return sum(min(i + 1, self.reach) for i in range(self.blocks))

    def cost(self, heads: int, depth: int, dtype: Any) -> pl.CostEstimate:
        """Of products of `depth` multiply-adds in all for each cell; of a pair of blocks one side is fetched anew."""
        cells = heads * self.met * self.block**2
        moved = cells // self.block * depth * jnp.dtype(dtype).itemsize
        return pl.CostEstimate(flops=2 * cells * depth, transcendentals=cells, bytes_accessed=moved)

    @property
    def reach(self) -> int:
        """How many blocks of keys a block of queries meets at most, its own included."""
        if self.window is None:
            return self.blocks
        return min(self.blocks, -(-(self.window - 1) // self.block) + 1)


def softmax_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask = CAUSAL, block: int = BLOCK) -> jax.Array:
    """Causal softmax attention: q [Bq, L, H, dh], k [Bq, L, K, dh], v [Bv, L, K, dv] -> [Bv, L, H, dv] in v's dtype.

    Bq is Bv or 1. `mask` may have documents (begins [Bq, L]) and a window. Any L: what is padded is seen by nobody.
    Products take the inputs' dtype, sums and the softmax are float32. `block`: positions, a multiple of 128.
    """
    return _attention(q, k, v, mask, block, exponential=True)


def taylor_attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask = CAUSAL, block: int = BLOCK) -> jax.Array:
    """The same with T(x) = 1 + x + x^2/2 in the place of exp(x), jointly normalised."""
    return _attention(q, k, v, mask, block, exponential=False)


def _attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, block: int, *, exponential: bool) -> jax.Array:
    batch, length, heads, dh = q.shape
    kv_heads, dv = v.shape[2:]
    if block % LANES:
        raise ValueError(f"block={block}: must be a multiple of {LANES}")
    begins = mask.begins_of(q)
    block = min(block, -(-length // LANES) * LANES)
    padded = -(-length // block) * block
    plan = _Plan(exponential, mask.window, block, padded, heads // kv_heads, begins is not None, dh**-0.5)
    queries = _along_lanes(q, padded).reshape(batch * heads, dh, padded)
    keys = _along_lanes(k, padded).reshape(batch * kv_heads, dh, padded)
    borders = jnp.zeros((batch, padded), jnp.int32)
    if begins is not None:
        borders = jnp.pad(begins.astype(jnp.int32), ((0, 0), (0, padded - length)), mode="edge")
    rows = v.shape[0] // batch
    at_once = max(1, WIDTH // dv)
    split = grouped.split_rows(v, batch)
    out = []
    for first in range(0, rows, at_once):
        part = split[:, first : first + at_once]  # [b, n, L, K, dv]
        values = jnp.pad(part.transpose(0, 3, 1, 4, 2), ((0, 0),) * 4 + ((0, padded - length),))
        values = values.reshape(batch * kv_heads, -1, padded)
        mixed = _mix(plan, queries, keys, values, borders[:, None])[..., :length]
        mixed = mixed.reshape(batch, heads, -1, dv, length).transpose(0, 2, 4, 1, 3)
        out.append(grouped.merge_rows(mixed) if rows <= at_once else mixed)
    return out[0] if rows <= at_once else grouped.merge_rows(jnp.concatenate(out, axis=1))


def _along_lanes(x: jax.Array, padded: int) -> jax.Array:
    """[b, L, h, d] -> [b, h, d, padded]."""
    return jnp.pad(x.transpose(0, 2, 3, 1), ((0, 0), (0, 0), (0, 0), (0, padded - x.shape[1])))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mix(plan: _Plan, q: jax.Array, k: jax.Array, v: jax.Array, begins: jax.Array) -> jax.Array:
    """q [b H, dh, L], k [b K, dh, L], v [b K, w, L], begins int32 [b, 1, L] -> [b H, w, L]."""
    return _forward(plan, q, k, v, begins)[0]


def _forward(
    plan: _Plan, q: jax.Array, k: jax.Array, v: jax.Array, begins: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    heads, dh, length = q.shape
    width, block = v.shape[1], plan.block
    per_row = heads // begins.shape[0]
    here, there = _by_query(plan)
    out, norm = pl.pallas_call(
        functools.partial(_forward_kernel, plan),
        grid=(heads, plan.blocks, plan.reach),
        in_specs=[
            pl.BlockSpec((1, dh, block), lambda h, i, j: (h, 0, i)),
            pl.BlockSpec((1, dh, block), lambda h, i, j: (h // plan.groups, 0, there(i, j))),
            pl.BlockSpec((1, width, block), lambda h, i, j: (h // plan.groups, 0, there(i, j))),
            pl.BlockSpec((1, 1, block), lambda h, i, j: (h // per_row, 0, i)),
        ],
        out_specs=[pl.BlockSpec((1, width, block), here), pl.BlockSpec((1, 1, block), here)],
        out_shape=[
            jax.ShapeDtypeStruct((heads, width, length), v.dtype),
            jax.ShapeDtypeStruct((heads, 1, length), jnp.float32),
        ],
        scratch_shapes=[
            pltpu.VMEM((width, block), jnp.float32),
            pltpu.VMEM((1, block), jnp.float32),
            pltpu.VMEM((1, block), jnp.float32),
        ],
        compiler_params=_compiler_params(),
        cost_estimate=plan.cost(heads, dh + width, v.dtype),
        name="pairwise_forward",
    )(q, k, v, begins)
    return out, (q, k, v, begins, out, norm)


def _backward(plan: _Plan, saved: tuple[jax.Array, ...], g: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, begins, out, norm = saved
    heads, dh, _ = q.shape
    kv_heads, width = v.shape[:2]
    block = plan.block
    mean = (g.astype(jnp.float32) * out.astype(jnp.float32)).sum(1, keepdims=True)
    per_row = heads // begins.shape[0]
    here, there = _by_query(plan)
    by_query = [
        pl.BlockSpec((1, dh, block), here),
        pl.BlockSpec((1, dh, block), lambda h, i, j: (h // plan.groups, 0, there(i, j))),
        pl.BlockSpec((1, width, block), lambda h, i, j: (h // plan.groups, 0, there(i, j))),
        pl.BlockSpec((1, 1, block), lambda h, i, j: (h // per_row, 0, i)),
        pl.BlockSpec((1, width, block), here),
        pl.BlockSpec((1, 1, block), here),
        pl.BlockSpec((1, 1, block), here),
    ]
    inputs = (q, k, v, begins, g, norm, mean)
    dq = pl.pallas_call(
        functools.partial(_dq_kernel, plan),
        grid=(heads, plan.blocks, plan.reach),
        in_specs=by_query,
        out_specs=pl.BlockSpec((1, dh, block), here),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_shapes=[pltpu.VMEM((dh, block), jnp.float32)],
        compiler_params=_compiler_params(),
        cost_estimate=plan.cost(heads, 2 * dh + width, v.dtype),
        name="pairwise_dq",
    )(*inputs)

    # Of a block of keys, the groups' queries come one group after the other: step s is group s // reach.
    def query(c: int, j: int, s: int) -> tuple[Any, int, Any]:
        return c * plan.groups + s // plan.reach, 0, jnp.minimum(j + s % plan.reach, plan.blocks - 1)

    def key(c: int, j: int, s: int) -> tuple[int, int, int]:
        return c, 0, j

    def document(c: int, j: int, s: int) -> tuple[Any, int, Any]:
        return c // (kv_heads // begins.shape[0]), 0, query(c, j, s)[2]

    by_key = [
        pl.BlockSpec((1, dh, block), query),
        pl.BlockSpec((1, dh, block), key),
        pl.BlockSpec((1, width, block), key),
        pl.BlockSpec((1, 1, block), document),
        pl.BlockSpec((1, width, block), query),
        pl.BlockSpec((1, 1, block), query),
        pl.BlockSpec((1, 1, block), query),
    ]
    dk, dv = pl.pallas_call(
        functools.partial(_dkv_kernel, plan),
        grid=(kv_heads, plan.blocks, plan.groups * plan.reach),
        in_specs=by_key,
        out_specs=[pl.BlockSpec((1, dh, block), key), pl.BlockSpec((1, width, block), key)],
        out_shape=[jax.ShapeDtypeStruct(k.shape, k.dtype), jax.ShapeDtypeStruct(v.shape, v.dtype)],
        scratch_shapes=[pltpu.VMEM((dh, block), jnp.float32), pltpu.VMEM((width, block), jnp.float32)],
        compiler_params=_compiler_params(),
        cost_estimate=plan.cost(heads, 2 * (dh + width), v.dtype),
        name="pairwise_dkv",
    )(*inputs)
    return dq, dk, dv, None


_mix.defvjp(_forward, _backward)


def _compiler_params() -> pltpu.CompilerParams:
    """Heads and blocks in any order, what is summed over one after the other."""
    return pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary"), vmem_limit_bytes=VMEM_LIMIT)


def _by_query(plan: _Plan) -> tuple[Any, Any]:
    """Index maps of grid (head, block i of queries, j): of what belongs to the queries, and the block of keys that is
    the j-th a block of queries meets. Beyond its own it stays where it is, so that nothing is fetched."""

    def here(h: int, i: int, j: int) -> tuple[int, int, int]:
        return h, 0, i

    def there(i: Any, j: Any) -> Any:
        return jnp.minimum(jnp.maximum(i - (plan.reach - 1), 0) + j, i)

    return here, there


def _forward_kernel(plan: _Plan, q, k, v, begins, out, norm, mixed, sums, highest) -> None:  # type: ignore[no-untyped-def]
    i, j = pl.program_id(1), pl.program_id(2)
    at = jnp.maximum(i - (plan.reach - 1), 0) + j

    @pl.when(j == 0)
    def _() -> None:
        mixed[...] = jnp.zeros_like(mixed)
        sums[...] = jnp.zeros_like(sums)
        highest[...] = jnp.full_like(highest, _NEVER)

    @pl.when(at <= i)
    def _() -> None:
        x, seen = _logits(plan, q[0], k[0], begins[0], i, at)
        if plan.exponential:
            top = jnp.maximum(highest[...], jnp.where(seen, x, _NEVER).max(0, keepdims=True))
            weights = jnp.where(seen, jnp.exp(x - top), 0.0)
            decay = jnp.exp(highest[...] - top)
            highest[...] = top
            sums[...] *= decay
            mixed[...] *= decay
        else:
            weights = jnp.where(seen, ((1 + x) * (1 + x) + 1) * 0.5, 0.0)
        sums[...] += weights.sum(0, keepdims=True)
        mixed[...] += dot(v[0], weights.astype(v.dtype), 1, 0)

    @pl.when(j == plan.reach - 1)
    def _() -> None:
        out[0] = (mixed[...] / sums[...]).astype(out.dtype)
        norm[0] = highest[...] + jnp.log(sums[...]) if plan.exponential else sums[...]


def _dq_kernel(plan: _Plan, q, k, v, begins, g, norm, mean, dq, total) -> None:  # type: ignore[no-untyped-def]
    i, j = pl.program_id(1), pl.program_id(2)
    at = jnp.maximum(i - (plan.reach - 1), 0) + j

    @pl.when(j == 0)
    def _() -> None:
        total[...] = jnp.zeros_like(total)

    @pl.when(at <= i)
    def _() -> None:
        _, dx = _weights_and_slopes(plan, q[0], k[0], v[0], begins[0], g[0], norm[0], mean[0], i, at)
        total[...] += dot(k[0], dx.astype(k.dtype), 1, 0)

    @pl.when(j == plan.reach - 1)
    def _() -> None:
        dq[0] = (total[...] * plan.scale).astype(dq.dtype)


def _dkv_kernel(plan: _Plan, q, k, v, begins, g, norm, mean, dk, dv, total_k, total_v) -> None:  # type: ignore[no-untyped-def]
    j, s = pl.program_id(1), pl.program_id(2)
    at = j + s % plan.reach

    @pl.when(s == 0)
    def _() -> None:
        total_k[...] = jnp.zeros_like(total_k)
        total_v[...] = jnp.zeros_like(total_v)

    @pl.when(at < plan.blocks)
    def _() -> None:
        weights, dx = _weights_and_slopes(plan, q[0], k[0], v[0], begins[0], g[0], norm[0], mean[0], at, j)
        total_v[...] += dot(g[0], weights.astype(g.dtype), 1, 1)
        total_k[...] += dot(q[0], dx.astype(q.dtype), 1, 1)

    @pl.when(s == plan.groups * plan.reach - 1)
    def _() -> None:
        dk[0] = (total_k[...] * plan.scale).astype(dk.dtype)
        dv[0] = total_v[...].astype(dv.dtype)


def _logits(
    plan: _Plan, q: jax.Array, k: jax.Array, begins: jax.Array, queries: Any, keys: Any
) -> tuple[jax.Array, jax.Array]:
    """x [keys, queries] of the two blocks with these numbers, float32, and which of them are seen."""
    block = plan.block
    there = keys * block + jax.lax.broadcasted_iota(jnp.int32, (block, block), 0)
    here = queries * block + jax.lax.broadcasted_iota(jnp.int32, (block, block), 1)
    seen = there <= here
    if plan.window is not None:
        seen &= here - there < plan.window
    if plan.documents:
        seen &= there >= begins
    return dot(k, q, 0, 0) * plan.scale, seen


def _weights_and_slopes(
    plan: _Plan,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    begins: jax.Array,
    g: jax.Array,
    norm: jax.Array,
    mean: jax.Array,
    queries: Any,
    keys: Any,
) -> tuple[jax.Array, jax.Array]:
    """A and dL/dx of two blocks, [keys, queries], float32."""
    x, seen = _logits(plan, q, k, begins, queries, keys)
    if plan.exponential:
        weights = jnp.where(seen, jnp.exp(x - norm), 0.0)
        slope = weights
    else:
        share = 1 / norm
        weights = jnp.where(seen, ((1 + x) * (1 + x) + 1) * (0.5 * share), 0.0)
        slope = jnp.where(seen, (1 + x) * share, 0.0)
    return weights, slope * (dot(v, g, 0, 0) - mean)

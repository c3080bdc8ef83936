"""What is kept of a layer's map, its raw scores and its input: reduced on the device, as soon as they are there.

Arrays are float32. A map is A [B, heads, L, L], causal, B = 1 where it does not depend on the batch. All of it but B is
reduced away, except for the mean over heads, which `similarities` compares between layers.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from deconstruct.attention.mixer import Context
from deconstruct.distributed.sharding import batch_spec
from deconstruct.kernels import grouped
from deconstruct.kernels.mask import Mask
from deconstruct.model.language_model import LanguageModel
from deconstruct.model.placement import split_model
from deconstruct.model.stack import Block
from deconstruct.types import Streams

FOCUS = (0, 1, 2, 3)  # distances of local focus
# Of the histogram of scores: 0 and plus and minus the powers of two from 1/16 to 16,384.
EDGES = np.array(sorted([0.0, *(sign * 2.0**n for sign in (-1, 1) for n in range(-4, 15))]), np.float32)


class LayerStatistics:
    """Reads models of one shape; the compiled programs are kept from checkpoint to checkpoint."""

    def __init__(self, mesh: jax.sharding.Mesh):
        self._mesh = mesh
        self._programs: dict[Any, Any] = {}

    def __call__(self, model: LanguageModel, tokens: np.ndarray) -> tuple[list[dict[str, np.ndarray]], np.ndarray]:
        """tokens int32 [N, L] -> of each layer, in order, what `of_stream` says, and `of_map` and `of_scores` where
        there are any, with a row for each sequence; and the mean cosine of the maps there are, [maps, maps]."""
        graphdef, params, frozen = split_model(model)
        if graphdef not in self._programs:
            self._programs[graphdef] = jax.jit(lambda *arrays: _read(nnx.merge(graphdef, *arrays[:2]), arrays[2]))
        program, sharding = self._programs[graphdef], NamedSharding(self._mesh, batch_spec())
        size = self._mesh.shape["data"] * self._mesh.shape["fsdp"]  # a sequence for each device
        parts = []
        for start in range(0, len(tokens), size):
            rows = tokens[np.arange(start, start + size) % len(tokens)]
            out = jax.device_get(program(params, frozen, jax.device_put(rows, sharding)))
            parts.append(jax.tree.map(lambda x: np.broadcast_to(x, (size, *x.shape[1:])), out))
        layers, cosines = jax.tree.map(lambda *xs: np.concatenate(xs)[: len(tokens)].astype(np.float64), *parts)
        return layers, cosines.mean(0)


def _read(model: LanguageModel, tokens: jax.Array) -> tuple[list[dict[str, jax.Array]], jax.Array]:
    def record(block: Block, streams: Streams, context: Context) -> dict[str, jax.Array]:
        assert streams.h is not None
        found = of_stream(streams.h)
        a, x = block.maps(streams, context), block.scores(streams, context)
        if a is not None:
            found |= of_map(a)
        if x is not None:
            reach = block.mixer.reach if block.mixer is not None else None
            found |= of_scores(x, context.mask if reach is None else context.mask.narrowed(reach))
        return found

    layers = model.hidden(tokens, record)[1]
    maps = [found.pop("mean") for found in layers if "mean" in found]
    return layers, similarities(maps) if maps else jnp.zeros((1, 0, 0))


def of_map(a: jax.Array) -> dict[str, jax.Array]:
    """The indicators of arXiv:2510.11602, section 5, [B, heads] each, and what they leave out.

    entropy         mean over queries of -sum p log p, p = |a| / sum |a| (a itself where rows are probabilities), nats
    concentration   ||A||_F
    sink            mean over queries of the weight on the first position
    focus_N         mean weight at distance N
    head_diversity  [B]: mean over causal cells of the standard deviation across heads
    map_rank        (sum s^2)^2 / sum s^4 over the singular values s: how many count
    top_key         mean over queries of the weight on the key that gets most of it; `top_position` is where it stands
    mean            [B, L, L]: the mean over heads
    """
    length = a.shape[-1]
    size = jnp.abs(a)
    p = size / jnp.maximum(size.sum(-1, keepdims=True), jnp.finfo(jnp.float32).tiny)
    squares = _total(jnp.square(a))
    received = a.mean(-2)
    found = {
        "entropy": jax.scipy.special.entr(p).sum(-1).mean(-1),
        "concentration": jnp.sqrt(squares),
        "sink": received[..., 0],
        "head_diversity": _total(a.std(1)) * 2 / (length * (length + 1)),
        "map_rank": jnp.square(squares) / jnp.maximum(fourth_powers(a), jnp.finfo(jnp.float32).tiny),
        "top_key": received.max(-1),
        "top_position": received.argmax(-1),
        "mean": a.mean(1),
    }
    return found | {f"focus_{n}": jnp.diagonal(a, -n, -2, -1).mean(-1) for n in FOCUS}


def fourth_powers(a: jax.Array, rows: int = 256) -> jax.Array:
    """[B, heads]: the sum of the fourth powers of the singular values, ||A A^T||_F^2, one head at a time.

    So many rows are multiplied with themselves and all below them; nothing stands to the right of their last column.
    """
    length = a.shape[-1]

    def of_head(head: jax.Array) -> jax.Array:
        total = jnp.zeros(head.shape[0], jnp.float32)
        for begin in range(0, length, rows):
            end = min(begin + rows, length)
            products = grouped.exactly("bij,bkj->bik", head[:, begin:end, :end], head[:, begin:, :end])
            twice = jnp.square(products)  # what is below counts for what is above as well
            total += 2 * _total(twice) - _total(twice[:, :, : end - begin])
        return total

    return jax.lax.map(of_head, a.swapaxes(0, 1)).swapaxes(0, 1)


def _total(x: jax.Array) -> jax.Array:
    """The sum over the last two axes, rows first: millions of float32 in one running sum would lose digits."""
    return jax.lax.optimization_barrier(x.sum(-1)).sum(-1)


def of_scores(x: jax.Array, mask: Mask) -> dict[str, jax.Array]:
    """Of scores [B, heads, L or 1, L] where the mask lets them be seen; with one row, each key counts once.

    logit_mean, logit_std, logit_least, logit_greatest: [B, heads]. logit_below: [B, edges], the share of all heads'
    scores below each of EDGES.
    """
    length = x.shape[-1]
    seen = mask.dense(length, length) if x.shape[-2] == length else jnp.ones((1, 1, 1, length), bool)
    seen = jnp.broadcast_to(seen, (x.shape[0], 1, *x.shape[2:]))
    count = seen.sum((-2, -1))  # [B, 1]
    mean = _total(jnp.where(seen, x, 0)) / count
    variance = _total(jnp.where(seen, jnp.square(x - mean[..., None, None]), 0)) / count
    below = jax.lax.map(lambda edge: (seen & (x < edge)).sum((-2, -1)) / count, jnp.asarray(EDGES))  # [edges, B, heads]
    return {
        "logit_mean": mean,
        "logit_std": jnp.sqrt(variance),
        "logit_least": jnp.where(seen, x, jnp.inf).min((-2, -1)),
        "logit_greatest": jnp.where(seen, x, -jnp.inf).max((-2, -1)),
        "logit_below": below.mean(-1).T,
    }


def of_stream(h: jax.Array) -> dict[str, jax.Array]:
    """Of the residual stream [B, L, d] that enters a layer: the largest activation, the median of all (absolute
    values), and at which position and in which channel the largest is (Sun et al. 2024, arXiv:2402.17762). [B] each."""
    size = jnp.abs(h.astype(jnp.float32)).reshape(h.shape[0], -1)
    at = size.argmax(-1)
    return {
        "activation_largest": size.max(-1),
        "activation_median": jnp.median(size, axis=-1),
        "activation_position": at // h.shape[-1],
        "activation_channel": at % h.shape[-1],
    }


def similarities(maps: list[jax.Array]) -> jax.Array:
    """The cosine between the maps of N layers, each [B or 1, L, L]: [B or 1, N, N]."""
    batch = max(a.shape[0] for a in maps)
    units = [a / jnp.linalg.norm(a, axis=(-2, -1), keepdims=True) for a in maps]
    stacked = jnp.stack([jnp.broadcast_to(a, (batch, *a.shape[1:])) for a in units], axis=1)
    return grouped.exactly("bnij,bmij->bnm", stacked, stacked)

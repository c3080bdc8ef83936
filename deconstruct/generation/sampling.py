"""The next token from logits: greedy, or drawn after temperature, top-k, top-p, min-p and repetition penalty.

Settings are arrays, one entry per sequence, so that one program serves a batch of unlike requests.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Sampling(NamedTuple):
    """Per sequence, each [B]. A temperature of 0 is greedy; top_k 0, top_p 1, min_p 0 and penalty 1 change nothing."""

    temperature: jax.Array  # float32
    top_k: jax.Array  # int32: the most likely k
    top_p: jax.Array  # float32: the fewest whose probabilities reach p (nucleus, Holtzman et al. 2020)
    min_p: jax.Array  # float32: at least this share of the most likely one's probability
    penalty: jax.Array  # float32: divides positive logits of seen tokens, multiplies negative ones (Keskar et al. 2019)
    seed: jax.Array  # uint32


def penalise(logits: jax.Array, seen: jax.Array, penalty: jax.Array) -> jax.Array:
    """logits float32 [B, V], seen bool [B, V] (prompt and output so far), penalty [B]."""
    factor = jnp.where(logits > 0, 1 / penalty[:, None], penalty[:, None])
    return jnp.where(seen, logits * factor, logits)


def filtered(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Tempered logits [B, V] with -inf for what top-k, top-p and min-p leave out; the most likely one always stays."""
    logits = logits / jnp.maximum(sampling.temperature, 1e-6)[:, None]
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    ranks = jnp.arange(logits.shape[-1])[None, :]
    kept = (ranks < sampling.top_k[:, None]) | (sampling.top_k[:, None] == 0)
    # Those before it do not reach p yet.
    kept &= jnp.cumsum(probabilities, axis=-1) - probabilities < sampling.top_p[:, None]
    kept &= probabilities >= sampling.min_p[:, None] * probabilities[:, :1]
    kept |= ranks == 0
    # All three keep a prefix of the order: its last logit is the threshold.
    threshold = jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits >= threshold, logits, -jnp.inf)


def choose(logits: jax.Array, seen: jax.Array, sampling: Sampling, position: int | jax.Array) -> jax.Array:
    """The next token int32 [B] of each sequence; drawn from its own seed and the position alone."""
    logits = penalise(logits, seen, sampling.penalty)
    keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), position))(sampling.seed)
    drawn = jax.vmap(jax.random.categorical)(keys, filtered(logits, sampling))
    greedy = jnp.argmax(logits, axis=-1)
    return jnp.where(sampling.temperature > 0, drawn, greedy).astype(jnp.int32)


def choose_greedily(logits: jax.Array, seen: jax.Array, sampling: Sampling) -> jax.Array:
    """`choose` where every temperature is 0: without sorting the vocabulary."""
    return jnp.argmax(penalise(logits, seen, sampling.penalty), axis=-1).astype(jnp.int32)

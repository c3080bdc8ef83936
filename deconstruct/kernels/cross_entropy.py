"""Softmax cross-entropy from hidden states, without ever holding all the logits.

    nll = logsumexp_v(h . W_v) - h . W_target,  over the vocabulary ids v < vocab_size

The sequence is cut into chunks; a chunk's logits are formed once, and its gradients with respect to h and W are taken
while they are there. The backward pass only scales those: three matmuls in all, none recomputed.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

# Logits of one chunk, in elements (float32) on all devices together.
CHUNK_ELEMENTS = 1 << 26


def chunk_count(batch: int, length: int, vocab: int, elements: int = CHUNK_ELEMENTS) -> int:
    """The fewest equal chunks of a sequence whose logits stay within `elements`."""
    counts = (n for n in range(1, length + 1) if length % n == 0 and batch * (length // n) * vocab <= elements)
    return next(counts, length)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def cross_entropy(
    hidden: jax.Array, table: jax.Array, targets: jax.Array, weights: jax.Array, vocab_size: int, chunks: int
) -> jax.Array:
    """The weighted sum of token losses, float32 [].

    hidden [B, L, d] in the compute dtype; table [V, d], float32, padded to V >= vocab_size; targets int32 [B, L];
    weights float32 [B, L]. `chunks` divides L. Only hidden and table are differentiated.
    """
    table = table.astype(hidden.dtype)

    def body(total: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        nll, _, _ = _chunk(table, chunk, vocab_size)
        return total + nll, None

    total, _ = jax.lax.scan(body, jnp.zeros((), jnp.float32), split_chunks((hidden, targets, weights), chunks))
    return total


def token_losses(hidden: jax.Array, table: jax.Array, targets: jax.Array, vocab_size: int, chunks: int) -> jax.Array:
    """The loss of each token, float32 [B, L]; for evaluation."""
    table = table.astype(hidden.dtype)

    def body(_: None, chunk: tuple[jax.Array, ...]) -> tuple[None, jax.Array]:
        logits = chunk_logits(table, chunk[0], vocab_size)
        return None, jax.nn.logsumexp(logits, axis=-1) - _pick(logits, chunk[1])

    _, losses = jax.lax.scan(body, None, split_chunks((hidden, targets), chunks))
    return merge_chunks(losses, targets.shape)


def split_chunks(arrays: tuple[jax.Array, ...], chunks: int) -> tuple[jax.Array, ...]:
    """Each [B, L, ...] -> [chunks, B, L / chunks, ...]."""

    def split(x: jax.Array) -> jax.Array:
        return x.reshape(x.shape[0], chunks, x.shape[1] // chunks, *x.shape[2:]).swapaxes(0, 1)

    return tuple(split(x) for x in arrays)


def merge_chunks(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """The inverse of `split_chunks`, for one array of that shape."""
    return x.swapaxes(0, 1).reshape(shape)


def chunk_logits(table: jax.Array, hidden: jax.Array, vocab_size: int) -> jax.Array:
    """float32 [..., V]: -inf from `vocab_size` on. Table and hidden are in the compute dtype."""
    logits = jax.lax.dot_general(
        hidden, table, (((hidden.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    if vocab_size < table.shape[0]:
        padding = jnp.where(jnp.arange(table.shape[0]) < vocab_size, 0.0, -jnp.inf).astype(jnp.float32)
        logits = logits + padding.reshape((1,) * (logits.ndim - 1) + (-1,))
    return logits


def _pick(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]


def _chunk(table: jax.Array, chunk: tuple[jax.Array, ...], vocab_size: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The chunk's loss, its logits and their logsumexp."""
    hidden, targets, weights = chunk
    logits = chunk_logits(table, hidden, vocab_size)
    logsumexp = jax.nn.logsumexp(logits, axis=-1)
    return jnp.sum(weights * (logsumexp - _pick(logits, targets))), logits, logsumexp


def gradients_of_chunk(table: jax.Array, hidden: jax.Array, d_logits: jax.Array) -> tuple[jax.Array, jax.Array]:
    """From the derivatives [..., V] of a chunk's logits to those of its hidden states and of the table,
    float32."""
    d_logits = d_logits.astype(hidden.dtype)
    d_hidden = jax.lax.dot_general(
        d_logits, table, (((d_logits.ndim - 1,), (0,)), ((), ())), preferred_element_type=jnp.float32
    )
    # Tokens as one axis: from two of them, XLA's CPU backend would transpose the logits first, element by element.
    d_logits, hidden = (x.reshape(-1, x.shape[-1]) for x in (d_logits, hidden))
    d_table = jax.lax.dot_general(d_logits, hidden, (((0,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    return d_hidden, d_table


def _forward(
    hidden: jax.Array, table: jax.Array, targets: jax.Array, weights: jax.Array, vocab_size: int, chunks: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    cast = table.astype(hidden.dtype)

    def body(
        carry: tuple[jax.Array, jax.Array], chunk: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        total, d_table = carry
        h, y, w = chunk
        nll, logits, logsumexp = _chunk(cast, chunk, vocab_size)
        target = jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1) == y[..., None]
        d_logits = w[..., None] * (jnp.exp(logits - logsumexp[..., None]) - target)
        d_hidden, d_table_of_chunk = gradients_of_chunk(cast, h, d_logits)
        d_table += d_table_of_chunk
        return (total + nll, d_table), d_hidden.astype(h.dtype)

    split = split_chunks((hidden, targets, weights), chunks)
    zero = (jnp.zeros((), jnp.float32), jnp.zeros(table.shape, jnp.float32))
    if chunks == 1:
        (total, d_table), d_hidden = body(zero, tuple(x[0] for x in split))
        d_hidden = d_hidden[None]
    else:
        (total, d_table), d_hidden = jax.lax.scan(body, zero, split)
    return total, (merge_chunks(d_hidden, hidden.shape), d_table)


def _backward(
    vocab_size: int, chunks: int, residuals: tuple[jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array, jax.Array, None, None]:
    d_hidden, d_table = residuals
    return (cotangent * d_hidden).astype(d_hidden.dtype), cotangent * d_table, None, None


cross_entropy.defvjp(_forward, _backward)

"""KL(teacher || student) of next-token distributions, from hidden states, without ever holding all logits of either.

    T^2 sum_v p_v (log p_v - log q_v),  p = softmax(teacher's logits / T), q = softmax(logits / T)

over the vocabulary ids v < vocab_size. T^2 keeps gradients at one size whatever the temperature T (Hinton et al. 2015,
arXiv:1503.02531). Cut into chunks as `cross_entropy` is: both models' logits of a chunk are formed once, and the
gradients with respect to the student's h and W, T (q - p), are taken while they are there.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from deconstruct.kernels.cross_entropy import chunk_logits, gradients_of_chunk, merge_chunks, split_chunks


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6, 7))
def kl_divergence(
    hidden: jax.Array,
    table: jax.Array,
    teacher_hidden: jax.Array,
    teacher_table: jax.Array,
    weights: jax.Array,
    vocab_size: int,
    chunks: int,
    temperature: float,
) -> jax.Array:
    """The weighted sum over tokens (nats), float32 [].

    hidden [B, L, d] in the compute dtype; table [V, d], float32, padded to V >= vocab_size; the teacher's alike, of any
    d; weights float32 [B, L]. `chunks` divides L. Only hidden and table are differentiated.
    """
    table, teacher_table = table.astype(hidden.dtype), teacher_table.astype(teacher_hidden.dtype)

    def body(total: jax.Array, chunk: tuple[jax.Array, ...]) -> tuple[jax.Array, None]:
        return total + _chunk(table, teacher_table, chunk, vocab_size, temperature)[0], None

    parts = split_chunks((hidden, teacher_hidden, weights), chunks)
    return jax.lax.scan(body, jnp.zeros((), jnp.float32), parts)[0]


def _chunk(
    table: jax.Array, teacher_table: jax.Array, chunk: tuple[jax.Array, ...], vocab_size: int, temperature: float
) -> tuple[jax.Array, jax.Array]:
    """The chunk's divergence, and its derivative with respect to the student's logits; float32."""
    hidden, teacher_hidden, weights = chunk
    log_q = jax.nn.log_softmax(chunk_logits(table, hidden, vocab_size) / temperature)
    log_p = jax.nn.log_softmax(chunk_logits(teacher_table, teacher_hidden, vocab_size) / temperature)
    p = jnp.exp(log_p)
    # Of padded ids both are -inf, and their difference is no number.
    difference = jnp.where(jnp.isfinite(log_p), log_p - log_q, 0.0)
    total = temperature**2 * jnp.sum(weights * jnp.sum(p * difference, axis=-1))
    return total, temperature * weights[..., None] * (jnp.exp(log_q) - p)


def _forward(
    hidden: jax.Array,
    table: jax.Array,
    teacher_hidden: jax.Array,
    teacher_table: jax.Array,
    weights: jax.Array,
    vocab_size: int,
    chunks: int,
    temperature: float,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    cast, teacher_cast = table.astype(hidden.dtype), teacher_table.astype(teacher_hidden.dtype)

    def body(
        carry: tuple[jax.Array, jax.Array], chunk: tuple[jax.Array, ...]
    ) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
        divergence, d_logits = _chunk(cast, teacher_cast, chunk, vocab_size, temperature)
        d_hidden, d_table = gradients_of_chunk(cast, chunk[0], d_logits)
        return (carry[0] + divergence, carry[1] + d_table), d_hidden.astype(hidden.dtype)

    zero = (jnp.zeros((), jnp.float32), jnp.zeros(table.shape, jnp.float32))
    (total, d_table), d_hidden = jax.lax.scan(body, zero, split_chunks((hidden, teacher_hidden, weights), chunks))
    return total, (merge_chunks(d_hidden, hidden.shape), d_table)


def _backward(
    vocab_size: int,
    chunks: int,
    temperature: float,
    residuals: tuple[jax.Array, jax.Array],
    cotangent: jax.Array,
) -> tuple[jax.Array, jax.Array, None, None, None]:
    d_hidden, d_table = residuals
    return (cotangent * d_hidden).astype(d_hidden.dtype), cotangent * d_table, None, None, None


kl_divergence.defvjp(_forward, _backward)

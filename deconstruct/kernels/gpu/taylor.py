"""Second-order Taylor attention on a Hopper GPU: the kernel of pairs, or over long sequences XLA's recurrence."""

from __future__ import annotations

import jax

from deconstruct.kernels.gpu import pairwise
from deconstruct.kernels.gpu.pipeline import BLOCK
from deconstruct.kernels.taylor import chunked_is_cheaper, taylor_chunked

# A FLOP of the kernel is taken to be this many times as fast as one of the recurrence, which is a program of many small
# products. Reckoned, not measured: `deconstruct bench kernels --lengths=8192,16384,32768` with impl=xla beside it.
LEAD = 4


def taylor_attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """q [Bq, L, H, dh], k [Bq, L, K, dh], v [Bv, L, K, dv] give [Bv, L, H, dv] in v's dtype; Bq is Bv or 1, any L."""
    groups, rows = q.shape[2] // k.shape[2], v.shape[0] // q.shape[0]
    # What the pairs cost over the recurrence grows with the length.
    if chunked_is_cheaper(q.shape[1] // LEAD, q.shape[-1], v.shape[-1], groups, rows, query_chunk=BLOCK):
        return taylor_chunked(q, k, v)[0]
    return pairwise.taylor_attention(q, k, v)

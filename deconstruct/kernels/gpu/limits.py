"""What the kernels of this folder cannot do, in words."""

from __future__ import annotations

import jax
import jax.numpy as jnp

HEAD_DIMS = (64, 128)
DTYPES = ("bfloat16",)


def refuses(dtype: jax.typing.DTypeLike, head_dim: int, value_dim: int | None = None) -> str | None:
    """Why the kernels cannot take heads of such a dtype and such widths; None where they can."""
    name = jnp.dtype(dtype).name
    if name not in DTYPES:
        return f"computes in {' or '.join(DTYPES)}, not {name}"
    for dim in (head_dim, head_dim if value_dim is None else value_dim):
        if dim not in HEAD_DIMS:
            return f"has heads of a width of {' or '.join(map(str, HEAD_DIMS))}, not {dim}"
    return None


def refuse(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    """ValueError where the kernels cannot take these, or where they do not fit together.

    q [Bq, L, H, dh], k [Bq, L, K, dh], v [Bv, L, K, dv].
    """
    for x in (q, k, v):
        reason = refuses(x.dtype, q.shape[-1], v.shape[-1])
        if reason:
            raise ValueError(f"the GPU kernel {reason}")
    if q.shape[0] not in (1, v.shape[0]):
        raise ValueError(
            f"queries of batch {q.shape[0]} and values of batch {v.shape[0]}: the first must be the second, or 1"
        )
    if k.shape != (*q.shape[:2], v.shape[2], q.shape[3]) or v.shape[1] != q.shape[1] or q.shape[2] % v.shape[2]:
        raise ValueError(f"queries {q.shape}, keys {k.shape} and values {v.shape} do not fit together")

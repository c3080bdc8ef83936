"""What the kernels of this folder cannot do, in words."""

from __future__ import annotations

import importlib.metadata

import jax
import jax.numpy as jnp

DTYPE = "bfloat16"  # a weight of Taylor's passes float16's range where a logit is 361
HEAD_DIMS = (64, 128)
CAPABILITY = "9.0"  # Hopper: its instructions for products (wgmma) are no other's
ASSEMBLER, REPAIRED = "nvidia-cuda-nvcc-cu12", (12, 9, 86)  # the wheel of CUDA 12.9.1


def refuses(
    dtype: jax.typing.DTypeLike, head_dim: int, value_dim: int | None = None, capability: str | None = None
) -> str | None:
    """Why the kernels cannot take heads of such a dtype and widths, in words that follow a name; None where they can.

    `capability` is that of the GPU, as `device.compute_capability` has it; None where it is not known. Any length,
    batch and number of heads will do; windows will not, and documents for the gated forms only.
    """
    if capability is not None and capability != CAPABILITY:
        return f"needs a GPU of compute capability {CAPABILITY} (Hopper), not {capability}"
    if jnp.dtype(dtype).name != DTYPE:
        return f"computes in {DTYPE}, not {jnp.dtype(dtype).name}"
    for dim in (head_dim, value_dim or head_dim):
        if dim not in HEAD_DIMS:
            return f"needs heads of a width of {' or '.join(map(str, HEAD_DIMS))}, not {dim}"
    return _assembler_refuses()


def _assembler_refuses() -> str | None:
    """The ptxas of CUDA 12.8.0 to 12.9.0 compiles causal masks wrongly: jax's own attention for Hopper says so."""
    try:
        version = importlib.metadata.version(ASSEMBLER)
    except importlib.metadata.PackageNotFoundError:
        return None  # of a CUDA that is installed otherwise, nothing is known here
    if (12, 8) <= tuple(int(part) for part in version.split(".")[:3]) < REPAIRED:
        wanted = ".".join(map(str, REPAIRED))
        return f"is compiled wrongly by {ASSEMBLER} {version} (CUDA 12.8.0 to 12.9.0); install {wanted} or later"
    return None


def refuse(q: jax.Array, k: jax.Array, v: jax.Array) -> None:
    """ValueError where the kernels cannot take these, or where they do not fit together.

    q [Bq, L, H, dh], k [Bq, L, K, dh], v [Bv, L, K, dv].
    """
    for x in (q, k, v):
        reason = refuses(x.dtype, q.shape[-1], v.shape[-1])
        if reason:
            raise ValueError(f"the kernel for GPUs {reason}")
    if q.shape[0] not in (1, v.shape[0]):
        raise ValueError(
            f"queries of batch {q.shape[0]} and values of batch {v.shape[0]}: the first must be the second, or 1"
        )
    if k.shape != (*q.shape[:2], v.shape[2], q.shape[3]) or v.shape[1] != q.shape[1] or q.shape[2] % v.shape[2]:
        raise ValueError(f"queries {q.shape}, keys {k.shape} and values {v.shape} do not fit together")

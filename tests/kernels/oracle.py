"""What the tests of this folder share: seeded inputs, and the definitions evaluated in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from deconstruct.kernels import reference
from deconstruct.kernels.mask import Mask

# float32 keeps 24 bits (6e-8); sums of some 100 terms in another order lose one or two digits, relative to the largest
# entry of the array. Ten times that is still a thousand times below any mistake of scale or mask.
FLOAT32 = 5e-6

WEIGHTS = {
    "softmax": reference.softmax_weights,
    "taylor": reference.taylor_weights,
    "taylor_diagonal": reference.taylor_diagonal_weights,
    "self_gate": reference.self_gate_weights,
}

# (Bq, Bv, L, H, K, dh, dv): MHA and GQA, one map a row and one for all rows, odd lengths, dv other than dh.
SHAPES = [(2, 2, 63, 4, 2, 8, 6), (1, 3, 60, 2, 2, 8, 8), (1, 2, 130, 4, 2, 4, 6), (2, 2, 1, 2, 1, 4, 4)]

Arrays = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def inputs(shape: tuple[int, ...], seed: int = 0) -> Arrays:
    """q, k, v and a cotangent of the output, float64, of independent normal entries."""
    batch_qk, batch, length, heads, kv_heads, dh, dv = shape
    rng = np.random.default_rng(seed)
    sizes = (
        (batch_qk, length, heads, dh),
        (batch_qk, length, kv_heads, dh),
        (batch, length, kv_heads, dv),
        (batch, length, heads, dv),
    )
    q, k, v, g = (rng.normal(size=size) for size in sizes)
    return q, k, v, g


def gates(form: str, shape: tuple[int, ...], rng: np.random.Generator) -> dict[str, np.ndarray]:
    """What a gated form reads, float64: decays that forget all at once now and then, and betas. Others: nothing."""
    batch, _, length, _, kv_heads, dh, _ = shape
    size: tuple[int, ...] = (batch, length, kv_heads)
    if form == "gated_linear":
        size = (*size, dh)
    elif form != "gated_delta":
        return {}
    strong = np.where(rng.random(size) < 0.05, 30, 0.1)
    read = {"log_decay": -np.abs(rng.normal(size=size)) * strong}
    return read if form == "gated_linear" else {**read, "beta": rng.random(size)}


def begins(starts: Sequence[Sequence[int]], length: int) -> np.ndarray:
    """The `begins` of a mask, int32 [B, length], from the first positions of each row's documents."""
    return np.stack([np.repeat(row, np.diff([*row, length])) for row in starts]).astype(np.int32)


def definition(weights: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """By the map that `weights` gives: a function of q, k, v, and by name of a mask and gates, where there are any."""
    return lambda q, k, v, **given: reference.apply_weights(weights(q, k, **given), v)


def of_arrays(mix: Callable[..., jax.Array], mask: Mask, names: Iterable[str]) -> Callable[..., jax.Array]:
    """mix(q, k, v, mask=mask, **gates) as a function of q, k, v and the gates of these names, one after the other.
    Gates stay float32 beside bf16."""

    def compute(q: jax.Array, k: jax.Array, v: jax.Array, *gates: jax.Array) -> jax.Array:
        gates = tuple(x if x.dtype == jnp.float64 else x.astype(jnp.float32) for x in gates)
        return mix(q, k, v, mask=mask, **dict(zip(names, gates, strict=True)))

    return compute


def value_and_gradients(
    mix: Callable[..., jax.Array], arrays: tuple[np.ndarray, ...], dtype: str
) -> tuple[np.ndarray, ...]:
    """mix(*arrays but the last) and its gradients (out, dq, dk, dv) as float64 numpy arrays, computed in `dtype`
    (float64: in a 64-bit context). The last of `arrays` is the cotangent of the result."""

    @jax.jit
    def both(*arrays: jax.Array) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(mix, *arrays[:-1])
        return out, *pull(arrays[-1])

    with jax.enable_x64(dtype == "float64"):
        results = both(*(jnp.asarray(x, dtype) for x in arrays))
        assert all(x.dtype == jnp.dtype(dtype) for x in results)
        return tuple(np.asarray(x.astype(jnp.float64 if dtype == "float64" else jnp.float32)) for x in results)


def assert_near(got: np.ndarray, want: np.ndarray, tolerance: float, floor: float = 0.1) -> None:
    """The largest difference, relative to the largest entry wanted (or to `floor`, where all that is wanted
    cancels to about zero, though its terms are of order one)."""
    assert got.shape == want.shape
    assert np.isfinite(got).all()
    error = np.abs(got - want).max() / max(np.abs(want).max(), floor)
    assert error <= tolerance, f"relative error {error:.1e} above {tolerance:.1e}"


def assert_all_near(got: tuple[np.ndarray, ...], want: tuple[np.ndarray, ...], tolerance: float) -> None:
    for a, b in zip(got, want, strict=True):
        assert_near(a, b, tolerance)

"""Matrix products of one warpgroup: 16-bit operands, float32 sums in registers.

A warpgroup (128 threads, one "thread" to Pallas) multiplies 64 rows at a time. The second operand is in shared memory;
the first may be in registers, where what was just computed is. Everything else here speaks of products through these
functions, of which Mosaic GPU's interpreter knows the first only: it has no operands in registers (jax 0.12).
"""

from __future__ import annotations

import inspect
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp

ROWS = 64  # of a product, for one warpgroup
LANES = 64  # 16-bit numbers in 128 bytes, the widest swizzle: widths are multiples of it

# Of every kernel here. `Lane`: layouts in registers are those that are named below. Warpgroup, which infers them and is
# the default from jax 0.11 on, does not end on one of the kernels (0.12).
COMPILER = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane)


def tiles(*shape: int, dtype: jax.typing.DTypeLike) -> Any:
    """Scratch in shared memory, laid out for products: [..., rows, width], a width of 64 or a multiple."""
    transforms = (plgpu.TilingTransform((8, LANES)), plgpu.SwizzleTransform(128))  # type: ignore[abstract]
    return plgpu.SMEM(shape, dtype, transforms=transforms)


def zeros(columns: int) -> jax.Array:
    """float32 [64, columns] to sum products in."""
    return plgpu.layout_cast(jnp.zeros((ROWS, columns), jnp.float32), plgpu.Layout.WGMMA)


def of_rows(value: float) -> jax.Array:
    """float32 [64], one number for each row of a product."""
    return plgpu.layout_cast(jnp.full((ROWS,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))


def along_rows(x: jax.Array, columns: int) -> jax.Array:
    """[64] -> [64, columns], the same along each row."""
    return jax.lax.broadcast_in_dim(x, (ROWS, columns), [0])


def along_columns(ref: Any) -> jax.Array:
    """[columns] in shared memory -> [64, columns], the same in every row."""
    x = _load(ref, plgpu.Layout.WGMMA.reduce(0))
    return jax.lax.broadcast_in_dim(x, (ROWS, x.shape[0]), [1])


def row_numbers(ref: Any) -> jax.Array:
    """[64] in shared memory -> [64], one number for each row of a product."""
    return _load(ref, plgpu.Layout.WGMMA.reduce(1))


def load_tile(ref: Any) -> jax.Array:
    """A tile [64, columns] in registers, laid out as products are."""
    return _load(ref, plgpu.Layout.WGMMA)


def _load(ref: Any, layout: Any) -> jax.Array:
    # jax 0.10 asks for an index, and later ones know of none.
    index: dict[str, Any] = {"idx": ()} if "idx" in inspect.signature(plgpu.load).parameters else {}
    return plgpu.load(ref, layout=layout, **index)


def transposed(ref: Any) -> Any:
    """The tile [rows, width] as [width, rows]: it is read so, and stays where it is."""
    return ref.transpose((1, 0))


def product(a: Any, b: Any) -> jax.Array:
    """a @ b of two tiles, [64, width] and [width, columns]: float32 [64, columns]."""

    def multiply(sums: Any) -> jax.Array:
        plgpu.wgmma(sums, a, b)
        return sums[...]

    return pl.run_scoped(multiply, plgpu.ACC((ROWS, b.shape[1]), jnp.float32))


def add_products(sums: jax.Array, *pairs: tuple[Any, Any]) -> jax.Array:
    """sums + a @ b + ..., float32 [64, columns]; a [64, width] a tile, or in registers in b's dtype; b a tile."""

    def multiply(ref: Any) -> None:
        for a, b in pairs:
            plgpu.wgmma(ref, a, b)

    return pl.run_state(multiply)(plgpu.ACC.init(sums))


def causal(rows: jax.Array, columns: jax.Array, width: int, transposed: bool = False) -> jax.Array:
    """bool [64, width], of positions from `rows` on (down) and `columns` on (across): whether the query sees the key.

    Queries stand down and keys across, or `transposed`.
    """
    down, across = (
        plgpu.broadcasted_iota(jnp.int32, (ROWS, width), axis, layout=plgpu.Layout.WGMMA) for axis in (0, 1)
    )
    down += rows - columns
    return across >= down if transposed else down >= across

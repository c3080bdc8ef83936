"""Layouts: which layer is which variant.

A layout is a tuple of variant names, one per layer. The named ones are those of "Deconstructing Attention"
(arXiv:2510.11602, table 1): they say which layers stay `standard`; the others hold the variant.
"""

from __future__ import annotations

from deconstruct.spelling import split_list
from deconstruct.types import UserError

STANDARD = "standard"


def _middle(layer: int, count: int) -> bool:
    # The replaced half sits in the middle; where 4 does not divide the depth, the lower rim is the shorter one.
    return layer <= count // 4 or layer > count // 4 + (count - count // 2)


# Name -> whether layer i (ids from 1) of n stays standard.
LAYOUTS = {
    "uniform": lambda i, n: False,
    "even": lambda i, n: i % 2 == 0,
    "odd": lambda i, n: i % 2 == 1,
    "top": lambda i, n: i <= n // 2,
    "middle": _middle,
    "bottom": lambda i, n: i > n - n // 2,
    "quarter": lambda i, n: i % 4 == 0,
    "first": lambda i, n: i == 1,
    "last": lambda i, n: i == n,
    "bilateral": lambda i, n: i in (1, n),
}


def layer_variants(layout: str, variant: str, count: int) -> tuple[str, ...]:
    """The variant of each of `count` layers.

    `layout` is one of `LAYOUTS`, or a comma-separated list: of layer ids from 1 that stay standard ("1,5,9"), or
    of `count` variant names ("standard,hidden/window(size=64),..."; then `variant` is not used). Raises UserError.
    """
    if layout in LAYOUTS:
        stays = LAYOUTS[layout]
        return tuple(STANDARD if stays(i, count) else variant for i in range(1, count + 1))
    entries = split_list(layout)
    if entries and all(entry.isdigit() for entry in entries):
        ids = [int(entry) for entry in entries]
        for i in ids:
            if not 1 <= i <= count:
                raise UserError(f"layout={layout}: there is no layer {i}; layers are 1 to {count}")
        if len(set(ids)) != len(ids):
            raise UserError(f"layout={layout}: a layer is listed twice")
        return tuple(STANDARD if i in ids else variant for i in range(1, count + 1))
    if len(entries) > 1:
        if len(entries) != count:
            raise UserError(f"layout={layout}: names {len(entries)} layers, but model.num_layers={count}")
        return tuple(entries)
    raise UserError(
        f"layout={layout!r} is unknown; one of {', '.join(LAYOUTS)}, a list of the layers that stay standard "
        f'("1,5,9"), or {count} variant names'
    )


def replaced_layers(layers: tuple[str, ...]) -> tuple[int, ...]:
    """The layers (indices from 0) that are not standard: those that `skip` removes."""
    return tuple(i for i, name in enumerate(layers) if name != STANDARD)

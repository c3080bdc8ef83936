"""Attention maps of a run over a text, and as a picture: one panel a map, queries down, keys across, each position
labelled with its token."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from deconstruct.run.workdir import Workdir
from deconstruct.types import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Inches: a token's cell, the labels beside and below the panels, a title, between panels, the scale at the right.
CELL, LABELS, TITLE, GAP, SCALE = 0.2, 0.75, 0.42, 0.15, 0.7
LONGEST = 8  # characters of a label
SIGNS = {" ": "·", "\n": "↵", "\t": "→", "$": r"\$"}  # a dollar sign would begin a formula

Panel = tuple[str, Any]  # title; map [L, L], or None where nothing is mixed


class Maps(NamedTuple):
    """Over a text: its L tokens, and of each layer the map float32 [heads, L, L], or None where nothing is mixed."""

    tokens: list[str]
    layers: list[Any]


def read_maps(workdir: os.PathLike[str] | str, text: str, step: int | None = None) -> Maps:
    """The maps of a run's checkpoint (default: the latest) over a text, in the tokens of its own tokenizer. Raises
    UserError."""
    import jax
    import jax.numpy as jnp

    from deconstruct.run.restore import restore_model

    if not text:
        raise UserError("read_maps: the text is empty; give at least one character")
    run_dir = Workdir(workdir)
    step = run_dir.step(step)
    tokenizer = run_dir.load_tokenizer(step)
    ids = tokenizer.encode(text)
    model = restore_model(workdir, step)
    maps = jax.jit(lambda model, tokens: model.attention_maps(tokens))(model, jnp.array([ids]))
    pieces = [tokenizer.decode([i]) for i in ids]
    return Maps(pieces, [None if of_layer is None else np.asarray(of_layer[0]) for of_layer in maps])


def draw_maps(rows: Sequence[Sequence[Panel]], tokens: Sequence[str]) -> Figure:
    """A matplotlib figure of rows of panels. `tokens` are the L pieces of text; a space is shown as ·.

    All panels share one scale. A colour's depth follows the root of the weight, so that small weights are seen; where
    an entry is negative, as `taylor_diagonal` may have it, the weight itself, with one colour for either sign.
    """
    from matplotlib.colors import Normalize, PowerNorm
    from matplotlib.figure import Figure

    maps = [np.asarray(values) for row in rows for _, values in row if values is not None]
    most = max((float(np.abs(values).max()) for values in maps), default=1.0)
    negative = any(values.min() < 0 for values in maps)
    colours: dict[str, Any] = {
        "cmap": "RdBu_r" if negative else "Blues",
        "norm": Normalize(-most, most) if negative else PowerNorm(0.5, 0.0, most),
    }
    columns, size = max(map(len, rows)), max(7, len(tokens)) * CELL
    width = LABELS + columns * (size + GAP) + SCALE
    height = LABELS + len(rows) * (size + TITLE)
    figure = Figure(figsize=(width, height))
    names = [label(token) for token in tokens]
    image = None
    for i, row in enumerate(rows):
        for j, (title, values) in enumerate(row):
            left, bottom = LABELS + j * (size + GAP), height - (i + 1) * (size + TITLE)
            axis = figure.add_axes((left / width, bottom / height, size / width, size / height))
            axis.set_title(title, fontsize=8)
            if values is None:
                axis.text(0.5, 0.5, "nothing is mixed", ha="center", va="center", fontsize=8, transform=axis.transAxes)
                axis.set(xticks=[], yticks=[])
                continue
            image = axis.imshow(np.asarray(values), aspect="auto", **colours)
            below = i + 1 < len(rows) and j < len(rows[i + 1])
            style: dict[str, Any] = {"fontsize": 8, "family": "monospace"}
            axis.set_xticks(range(len(names)), [] if below else names, rotation=90, **style)
            axis.set_yticks(range(len(names)), [] if j else names, **style)
            axis.tick_params(length=0)
    if image is not None:
        place = (1 - 0.5 / width, LABELS / height, 0.1 / width, size / height)
        bar = figure.colorbar(image, cax=figure.add_axes(place))
        bar.ax.set_title("weight", fontsize=7)
        bar.ax.tick_params(labelsize=7, length=2)
    return figure


def label(token: str) -> str:
    """A token as it stands at an axis: with spaces and line ends to be seen, and no longer than fits."""
    shown = "".join(SIGNS.get(character, character) for character in token[:LONGEST])
    return shown + "…" if len(token) > LONGEST else shown

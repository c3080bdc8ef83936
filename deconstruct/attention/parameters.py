"""Equal parameters: what a mixer has more or less than standard attention, its block's own MLP takes up."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
from flax import nnx

from deconstruct.attention.variants import Variant, find_variant, make_mixer
from deconstruct.config import ModelConfig
from deconstruct.layout import STANDARD
from deconstruct.types import UserError


def mixer_parameters(config: ModelConfig, name: str) -> int:
    """Trained parameters of one layer's mixer."""
    return _count(config, name, find_variant(name))


@functools.lru_cache(maxsize=512)
def _count(config: ModelConfig, name: str, variant: Variant) -> int:
    del variant  # a part of the key: a class may be registered anew under its name
    return count_parameters(nnx.eval_shape(lambda: make_mixer(name, config, nnx.Rngs(params=0))))


def count_parameters(mixer: nnx.Module) -> int:
    """Trained parameters of a mixer, or of its shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(mixer, nnx.Param)))


def mlp_width(config: ModelConfig, name: str) -> int:
    """The width of the MLP in a block with this mixer: `intermediate_size`, or, with `match_parameters`, the one that
    makes the block's parameters those of a standard one, to the nearest integer (3 d parameters each).

    Raises UserError where none would be left.
    """
    if not config.match_parameters:
        return config.intermediate_size
    return width_beside(config, mixer_parameters(config, name), name)


def width_beside(config: ModelConfig, parameters: int, name: str) -> int:
    """The width that makes the parameters equal, of the MLP beside a mixer of so many; `name` is for the message."""
    # What programs and masks a standard layer could have is no matter: it is counted, and is not in the model.
    plain = dataclasses.replace(config, impl="auto", document_mask=False)
    surplus = parameters - mixer_parameters(plain, STANDARD)
    width = config.intermediate_size - round(surplus / (3 * config.hidden_size))
    if width < 1:
        raise UserError(
            f"config.model.match_parameters=true: a layer of {name} has {surplus:,} parameters more than standard "
            f"attention, more than the MLP of width {config.intermediate_size} beside it; "
            "config.model.match_parameters=false leaves it as it is"
        )
    return width

"""What a model costs: parameters, floating-point operations, bytes of cache and activations, model FLOPs utilisation.

FLOPs count a multiply-add as two. `needed` counts causal attention as half of its square and recurrences as what
they are; recomputation (remat) is not needed work. `dense` counts whole L x L maps, as the tables of
arXiv:2510.11602 do.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx

from deconstruct.attention.attention import Attention
from deconstruct.attention.form import Flops
from deconstruct.attention.parameters import mixer_parameters, mlp_width
from deconstruct.attention.variants import fixed_source
from deconstruct.config import ModelConfig
from deconstruct.costs.programs import abstract_block, block_program, kept_bytes, traceable
from deconstruct.layout import STANDARD
from deconstruct.model import decode
from deconstruct.model.language_model import abstract_model

# Peak dense bf16 FLOP/s of one device, by what its `device_kind` contains (vendors' data sheets). First match counts.
PEAK_FLOPS = {
    "TPU7x": 1153.5e12,  # a chip is two devices
    "TPU v6": 918e12,
    "TPU v5p": 459e12,
    "TPU v5": 197e12,  # "TPU v5 lite", v5e
    "TPU v4": 275e12,
    "H200": 989e12,
    "H100": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
}


def peak_flops(device: jax.Device) -> float | None:
    """FLOP/s that utilisation is measured against; None where it is not known (CPU)."""
    return next((peak for kind, peak in PEAK_FLOPS.items() if kind in device.device_kind), None)


def count(state: Any) -> int:
    """Parameters in a (possibly abstract) module or state."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(state, nnx.Param)))


def parameters(config: ModelConfig) -> dict[str, Any]:
    """Trained parameters: total, embedding (with an untied head), and the mixer and MLP of each layer. Padded ids
    count."""
    model = abstract_model(config)
    head = 0 if model.head is None else math.prod(model.head.shape)
    return {
        "total": count(model),
        "embedding": count(model.embed) + head,
        "mixer_per_layer": [mixer_parameters(config, name) for name in config.layers],
        "mlp_per_layer": [3 * config.hidden_size * mlp_width(config, name) for name in config.layers],
    }


def differences_from_standard(config: ModelConfig) -> list[int]:
    """Of each layer: parameters more (or fewer) than a layer with standard attention has, mixer and MLP together."""

    def of_layer(name: str) -> int:
        return mixer_parameters(config, name) + 3 * config.hidden_size * mlp_width(config, name)

    return [of_layer(name) - of_layer(STANDARD) for name in config.layers]


def difference_from_standard(config: ModelConfig) -> int:
    """Parameters more (or fewer) than the same model with standard attention in every layer."""
    return sum(differences_from_standard(config))


def forward_flops(config: ModelConfig, batch: int, length: int) -> Flops:
    """Of one forward pass over `batch` sequences of `length` tokens, logits at every position.

    In a model with a fixed stream, its own pass through the blocks (one sequence, whatever the batch) is included,
    up to the queries and keys of the last layer that reads it.
    """
    return sum(layer_forward_flops(config, batch, length), _head_flops(config, batch * length))


def prefill_flops(config: ModelConfig, batch: int, length: int) -> Flops:
    """Of a prompt of `length` tokens in each of `batch` sequences: a forward pass with the logits of the last token."""
    return sum(layer_forward_flops(config, batch, length), _head_flops(config, batch))


def decode_flops(config: ModelConfig, batch: int, length: int) -> Flops:
    """Of one more token of each sequence, the last that a cache for `length` positions has room for.

    What decoding needs of a fixed stream is computed beforehand and not included.
    """
    return sum(layer_decode_flops(config, batch, length), _head_flops(config, batch))


def train_flops(config: ModelConfig, batch: int, length: int) -> Flops:
    """Of one update: the backward pass takes two matmuls for each of the forward's."""
    forward = forward_flops(config, batch, length)
    return Flops(3 * forward.dense, 3 * forward.needed)


def cache_bytes(config: ModelConfig, batch: int, length: int) -> int:
    """Bytes that decoding keeps for `length` positions of `batch` sequences."""
    return sum(layer_cache_bytes(config, batch, length))


def activation_bytes(config: ModelConfig, batch: int, length: int) -> int:
    """Bytes that the layers keep between the forward and the backward pass of `batch` sequences, as `config.remat` has
    it: with it the streams entering each layer, and one layer's own while it is run again; without it those of all.
    """
    own = layer_activation_bytes(config, batch, length)
    if not config.remat:
        return sum(own)
    streams = batch * len(config.layers) + _last_reader(config) + 1
    return streams * length * config.hidden_size * jnp.dtype(config.dtype).itemsize + max(own)


def layer_forward_flops(config: ModelConfig, batch: int, length: int) -> list[Flops]:
    """Of each layer, mixer and MLP, over `batch` sequences and the fixed stream as far as it is needed."""

    def layer(name: str, x_passes: bool) -> Flops:
        sequences = batch + x_passes
        flops = _mlp_flops(config, name, sequences * length)
        mixer = abstract_block(config, name).mixer
        if mixer is not None:
            flops += mixer.flops(batch, length)
            if x_passes:
                flops += _fixed_stream_flops(mixer, length)
        return flops

    return _by_layer(config, layer)


def _mlp_flops(config: ModelConfig, name: str, tokens: int) -> Flops:
    return Flops.exactly(6.0 * tokens * config.hidden_size * mlp_width(config, name))


def _fixed_stream_flops(mixer: Any, length: int) -> Flops:
    """What x adds to a mixer: a sequence of its own, without the map where it shares one with the batch."""
    if isinstance(mixer, Attention) and mixer.source.fixed:
        two, one = mixer.flops(2, length), mixer.flops(1, length)
        return Flops(two.dense - one.dense, two.needed - one.needed)
    return mixer.flops(1, length)


def layer_decode_flops(config: ModelConfig, batch: int, length: int) -> list[Flops]:
    """Of each layer, for one more token of each sequence."""

    def layer(name: str, _: bool) -> Flops:
        mixer = abstract_block(config, name).mixer
        flops = _mlp_flops(config, name, batch)
        return flops if mixer is None else flops + mixer.decode_flops(batch, length)

    return _by_layer(config, layer)


def layer_cache_bytes(config: ModelConfig, batch: int, length: int) -> list[int]:
    """Of each layer, from the shapes of its mixer's own cache."""

    def layer(name: str, _: bool) -> int:
        mixer = abstract_block(config, name).mixer
        if mixer is None:
            return 0
        init = functools.partial(mixer.init_cache, batch, length, config.hidden_size, jnp.dtype(config.dtype))
        return decode.cache_bytes(jax.eval_shape(init))

    return _by_layer(config, layer)


def layer_activation_bytes(config: ModelConfig, batch: int, length: int) -> list[int]:
    """Of each layer, if nothing of it is recomputed: what JAX keeps when it is differentiated, with XLA's kernels."""
    config = traceable(config)
    return _by_layer(config, lambda name, x_passes: kept_bytes(block_program(config, name, batch, length, x_passes)))


T = TypeVar("T")


def _by_layer(config: ModelConfig, of: Callable[[str, bool], T]) -> list[T]:
    """`of` (variant, whether the fixed stream passes through the whole layer), asked once for like layers."""
    last = _last_reader(config)
    like = functools.cache(of)
    return [like(name, i < last) for i, name in enumerate(config.layers)]


def _last_reader(config: ModelConfig) -> int:
    """The last layer that reads the fixed stream, counted from 0; -1 where none does."""
    return max((i for i, name in enumerate(config.layers) if fixed_source((name,))), default=-1)


def _head_flops(config: ModelConfig, tokens: int) -> Flops:
    return Flops.exactly(2.0 * tokens * config.hidden_size * config.padded_vocab)

"""Blocks, and the stack that runs them: stacked parameters, a scan over each segment, remat per layer.

The parameters of a segment carry one leading axis, its repeats. Each layer's initial state follows from the seed
and its own index, so it is the same whatever the plan.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deconstruct.attention.mixer import Context
from deconstruct.attention.parameters import mlp_width
from deconstruct.attention.variants import fixed_source, make_mixer
from deconstruct.config import ModelConfig
from deconstruct.distributed.sharding import constrain
from deconstruct.layers import RMSNorm, SwiGLU
from deconstruct.layout import STANDARD
from deconstruct.plan import slots
from deconstruct.types import Streams

RESIDUAL = ("batch", "length", None)

# What may be read off every layer as it runs: (block, streams entering it, context) -> pytree of arrays, or None. Where
# something is given to the layers, theirs comes last.
Record = Callable[..., Any]


class Block(nnx.Module):
    """streams + mixer(norm(streams)), then + mlp(norm(streams)). `config.without_mixers` leaves out the first branch of
    a block that is not standard."""

    def __init__(self, config: ModelConfig, variant: str, rngs: nnx.Rngs):
        mixes = variant == STANDARD or not config.without_mixers
        self.mixer_norm = RMSNorm(config.hidden_size, config.norm_epsilon) if mixes else None
        self.mixer = make_mixer(variant, config, rngs) if mixes else None
        self.mlp_norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        width = mlp_width(config, variant)
        # A width that follows from a parameter count is often prime: tensor parallelism leaves it whole.
        axis = "mlp" if width == config.intermediate_size else "matched_mlp"
        self.mlp = SwiGLU(
            config.hidden_size, width, std=config.init_std, dtype=config.dtype, rngs=rngs, width_axis=axis
        )

    def __call__(self, streams: Streams, context: Context) -> Streams:
        if self.mixer is not None:
            streams = streams.map(jnp.add, self.mix(streams, context))
        streams = streams.map(lambda x: x + self.mlp(self.mlp_norm(x)))
        return streams.map(lambda x: constrain(x, RESIDUAL))

    def mix(self, streams: Streams, context: Context) -> Streams:
        """What the mixer adds to each stream that enters this layer."""
        assert self.mixer is not None
        return self.mixer(*self._mixer_inputs(streams, context), context)

    def extend(
        self, h: jax.Array, cache: Any, constants: Any, context: Context, start: int | jax.Array
    ) -> tuple[jax.Array, Any]:
        """C more positions of the batch [B, C, d] after those in the cache; `context.static` holds those C alone."""
        if self.mixer is not None:
            normed, static = self._mixer_inputs(Streams(h), context)
            mixed, cache = self.mixer.extend(normed.h, static.h, cache, constants, context, start)
            h = h + mixed
        return constrain(h + self.mlp(self.mlp_norm(h)), RESIDUAL), cache

    def constants(self, streams: Streams, context: Context) -> Any:
        """What decoding needs of the fixed stream entering this layer."""
        if self.mixer is None or streams.x is None or self.mixer_norm is None:
            return None
        return self.mixer.constants(self.mixer_norm(streams.x), context)

    def maps(self, streams: Streams, context: Context) -> jax.Array | None:
        """The attention map of this layer; None where nothing is mixed."""
        return None if self.mixer is None else self.mixer.maps(*self._mixer_inputs(streams, context), context)

    def scores(self, streams: Streams, context: Context) -> jax.Array | None:
        """What the map of this layer is formed from, raw and unmasked; None where there is no such thing."""
        return None if self.mixer is None else self.mixer.scores(*self._mixer_inputs(streams, context), context)

    def _mixer_inputs(self, streams: Streams, context: Context) -> tuple[Streams, Streams]:
        assert self.mixer is not None and self.mixer_norm is not None
        static = context.static.map(self.mixer_norm) if self.mixer.reads_static else Streams(None)
        return streams.map(self.mixer_norm), static


def draw_layers(config: ModelConfig, variant: str, layers: tuple[int, ...], key: jax.Array) -> tuple[Any, Any]:
    """The definition of a block, and its state with `layers` side by side, each drawn from the key of its index."""
    graphdef, _ = nnx.split(nnx.eval_shape(lambda: Block(config, variant, nnx.Rngs(params=key))))

    def draw(index: jax.Array) -> Any:
        return nnx.to_pure_dict(nnx.state(Block(config, variant, nnx.Rngs(params=jax.random.fold_in(key, index)))))

    return graphdef, jax.vmap(draw)(jnp.array(layers))


def layer_state(stacked: Any, repeat: int | jax.Array) -> Any:
    """One layer out of a stacked state."""
    return jax.tree.map(lambda x: x[repeat], stacked)


class Stack(nnx.Module):
    def __init__(self, config: ModelConfig, key: jax.Array):
        self.config = config
        where = slots(config.plan)
        # One program draws all layers of a variant, however they are then laid out.
        drawn = {}
        for variant in dict.fromkeys(config.layers):
            layers = tuple(i for i, name in enumerate(config.layers) if name == variant)
            drawn[variant] = layers, *draw_layers(config, variant, layers, key)

        def stacked(s: int, position: int, variant: str) -> Block:
            layers, graphdef, state = drawn[variant]
            rows = np.array([layers.index(i) for i, w in enumerate(where) if w[:2] == (s, position)])
            return nnx.merge(graphdef, jax.tree.map(lambda x: x[rows], state))

        self.segments = nnx.List(
            [
                nnx.List([stacked(s, position, variant) for position, variant in enumerate(segment.unit)])
                for s, segment in enumerate(config.plan)
            ]
        )

    def __call__(
        self, streams: Streams, context: Context, record: Record | None = None, given: list[Any] | None = None
    ) -> tuple[Streams, list[Any]]:
        """Runs all layers. Returns the streams and, per layer in order, what `record` read off it.

        given: for each layer in order what `record` is handed for it, a pytree of arrays or None, alike in structure
        and shapes where layers are of one variant.
        """
        plan = self.config.plan
        where = slots(plan)
        recorded: list[Any] = []
        for s, (segment, blocks) in enumerate(zip(plan, self.segments, strict=True)):
            if not any(fixed_source(later.unit) for later in plan[s:]):
                streams = Streams(streams.h, None)  # no layer reads x any more
            handed = tuple(
                [] if given is None else [_stacked([given[i] for i, w in enumerate(where) if w[:2] == (s, position)])]
                for position in range(len(segment.unit))
            )
            streams, records = _run_segment(
                blocks, segment.repeats, streams, context, record, handed, self.config.remat
            )
            recorded.append(records)
        return streams, [layer_state(recorded[s][position], repeat) for s, position, repeat in where]

    def extend(
        self,
        h: jax.Array,
        caches: tuple[Any, ...],
        constants: tuple[Any, ...],
        context: Context,
        start: int | jax.Array,
    ) -> tuple[jax.Array, tuple[Any, ...]]:
        """C more positions through all layers, one after the other: a cache that is not stacked can be updated in
        place."""
        extended = []
        for i, (cache, constant) in enumerate(zip(caches, constants, strict=True)):
            h, cache = self.layer(i).extend(h, cache, constant, context, start)
            extended.append(cache)
        return h, tuple(extended)

    def layer(self, index: int) -> Block:
        """The block of one layer, with its own parameters; for looking at, not for training."""
        s, position, repeat = slots(self.config.plan)[index]
        graphdef, state = nnx.split(self.segments[s][position])
        return nnx.merge(graphdef, layer_state(nnx.to_pure_dict(state), repeat))


def _stacked(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *xs: jnp.stack(xs), *trees)


def _run_segment(
    blocks: nnx.List,
    repeats: int,
    streams: Streams,
    context: Context,
    record: Record | None,
    handed: tuple[list[Any], ...],
    remat: bool,
) -> tuple[Streams, tuple[Any, ...]]:
    """`handed`: what each layer of the unit is given beside the streams, with the repeats in front."""
    split = [nnx.split(block) for block in blocks]
    graphdefs = [graphdef for graphdef, _ in split]
    states = tuple(nnx.to_pure_dict(state) for _, state in split)

    def apply(graphdef: Any, state: Any, streams: Streams, context: Context, own: list[Any]) -> tuple[Streams, Any]:
        block = nnx.merge(graphdef, state)
        return block(streams, context), record(block, streams, context, *own) if record else None

    if remat:
        # Per layer, never per unit: a unit under one checkpoint would keep all its layers alive in the backward
        # pass. Inside a scan the loop itself prevents CSE from undoing it.
        apply = jax.checkpoint(apply, static_argnums=(0,), prevent_cse=repeats == 1)

    def unit(streams: Streams, of_layers: tuple[Any, Any]) -> tuple[Streams, tuple[Any, ...]]:
        records = []
        for graphdef, state, own in zip(graphdefs, *of_layers, strict=True):
            streams, seen = apply(graphdef, state, streams, context, own)
            records.append(seen)
        return streams, tuple(records)

    if repeats > 1:
        return jax.lax.scan(unit, streams, (states, handed))
    streams, records = unit(streams, layer_state((states, handed), 0))
    return streams, jax.tree.map(lambda x: x[None], records)

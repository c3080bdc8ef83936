"""What `check` runs its rows on: a form or mixer in trials of several kinds, and how far two results are apart."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deconstruct.attention.form import Form
from deconstruct.attention.mixer import Context
from deconstruct.attention.trial import Inputs, Trial, compiled
from deconstruct.attention.variants import Variant
from deconstruct.config import ModelConfig
from deconstruct.kernels import reference
from deconstruct.kernels.mask import CAUSAL, Mask
from deconstruct.layout import STANDARD
from deconstruct.types import Streams

# Two pieces of seven and one of one; the caches have room that is never filled.
BATCH, LENGTH, PIECE, ROOM = 4, 15, 7, 17
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 8
# Both sides are float32 and add in another order. taylor_diagonal divides by sums that may be 1e-2, which makes a
# hundred times the rounding; what divides by nothing small keeps to a tenth of this.
NEAR = 1e-4
NEAR_BFLOAT16 = 2.0**-5  # eight bits, and a few roundings


class FailedError(Exception):
    """The row's claim does not hold; the message says where."""


class NotApplicableError(Exception):
    """There is nothing to check; the message says why."""


class Tried(Trial):
    """A trial with its programs: one pass with gradients, and decoding."""

    def __init__(self, variant: Variant, config: ModelConfig, state: Any = None):
        super().__init__(variant, config, state)
        self.inputs, self.other = self.draw(1, BATCH, ROOM), self.draw(2, BATCH, ROOM)
        shape = (BATCH, LENGTH, config.hidden_size)
        self.cotangent = np.random.default_rng(3).standard_normal(shape).astype(np.float32)
        self._programs: dict[Any, Any] = {}

    def changed(self, begin: int) -> Inputs:
        """Other inputs from position `begin` on; the fixed stream, which no sequence changes, is the same."""
        late = np.arange(ROOM)[None, :, None] >= begin
        inputs, other = self.inputs._replace(x=None), self.other._replace(x=None)
        return jax.tree.map(lambda a, b: np.where(late, b, a), inputs, other)._replace(x=self.inputs.x)

    def whole(
        self,
        inputs: Inputs | None = None,
        cotangent: np.ndarray | None = None,
        mask: Mask = CAUSAL,
        start: int = 0,
        by_definition: bool = False,
        gradients: bool = True,
    ) -> tuple[Any, Any, Any]:
        """One pass over the first positions: outputs, the map, and the gradients of parameters and inputs, or None.

        `by_definition`: weights @ v in place of the form's program, around the same projections.
        """
        key = (by_definition, gradients)
        if key not in self._programs:
            self._programs[key] = compiled(functools.partial(self.run, *key))
        inputs = (self.inputs if inputs is None else inputs).cut(0, LENGTH)
        cotangent = self.cotangent if cotangent is None else cotangent
        result = self._programs[key](self.state, inputs, cotangent, mask, self.tables(LENGTH, start))
        return jax.tree.map(np.asarray, result)

    def run(
        self,
        by_definition: bool,
        gradients: bool,
        state: Any,
        inputs: Inputs,
        cotangent: jax.Array,
        mask: Mask,
        tables: Any,
    ) -> tuple[Any, Any, Any]:
        params, rest = state

        def loss(params: Any, inputs: Inputs) -> tuple[jax.Array, Any]:
            mixer = self.mixer((params, rest))
            streams, static, context = self.streams(inputs, tables, mask)
            map_ = mixer.maps(streams, static, context)
            if by_definition:
                mixed = reference.apply_weights(map_, mixer.v_proj(streams.h))
                out = mixer.o_proj(mixer.form.finish(mixed))
            else:
                out = mixer(streams, static, context).h
            return jnp.sum(out.astype(jnp.float32) * cotangent), (out, map_)

        if not gradients:
            return *loss(params, inputs)[1], None
        found, (out, map_) = jax.grad(loss, (0, 1), has_aux=True)(params, inputs)
        return out, map_, found

    def extended(self, piece: int, begins: np.ndarray | None = None) -> np.ndarray:
        """The same outputs as decoding has them, `piece` positions at a time: the first in the program that makes the
        cache."""
        if "first" not in self._programs:
            self._programs["first"], self._programs["rest"] = compiled(self._first), compiled(self._rest)
        room, x = self.tables(ROOM), self.inputs.x
        out, parts, cache, constants = None, [], None, None
        for begin in range(0, LENGTH, piece):
            end = min(begin + piece, LENGTH)
            mask = CAUSAL if begins is None else Mask(jnp.asarray(begins[:, begin:end] - begin))
            part = self.inputs._replace(x=None).cut(begin, end)
            if begin == 0:
                out, cache, constants = self._programs["first"](self.state, part, x, mask, room)
            else:
                out, cache = self._programs["rest"](self.state, part, cache, constants, mask, room, begin)
            parts.append(np.asarray(out))
        return np.concatenate(parts, axis=1)

    def _first(self, state: Any, part: Inputs, x: Any, mask: Mask, tables: Any) -> tuple[Any, Any, Any]:
        mixer = self.mixer(state)
        constants = None if x is None else mixer.constants(x, Context(tables[0], tables[1], Streams(None, x), CAUSAL))
        cache = mixer.init_cache(BATCH, ROOM, self.config.hidden_size, jnp.dtype(self.config.dtype))
        out, cache = self._extend(mixer, part, cache, constants, mask, tables, 0)
        return out, cache, constants

    def _rest(
        self, state: Any, part: Inputs, cache: Any, constants: Any, mask: Mask, tables: Any, start: jax.Array
    ) -> tuple[Any, Any]:
        return self._extend(self.mixer(state), part, cache, constants, mask, tables, start)

    def _extend(
        self, mixer: Any, part: Inputs, cache: Any, constants: Any, mask: Mask, tables: Any, start: Any
    ) -> tuple[Any, Any]:
        context = Context(tables[0], tables[1], Streams(part.static), mask)
        return mixer.extend(part.h, part.static, cache, constants, context, start)


class Subject:
    """What is checked, its trials (each is made once), and which rows have failed so far."""

    def __init__(self, variant: Variant, name: str):
        self.variant, self.name = variant, name
        self.failed: set[str] = set()
        self._trials: dict[Any, Tried] = {}

    @property
    def form(self) -> type[Form] | None:
        return self.variant.form

    def config(self, kv_heads: int = HEADS, **changes: Any) -> ModelConfig:
        size = HEADS * HEAD_DIM
        return ModelConfig(
            hidden_size=size,
            intermediate_size=128 * size,  # room for whatever a mixer owns; nothing of the size is made
            num_layers=1,
            num_heads=HEADS,
            num_kv_heads=kv_heads,
            vocab_size=40,
            init_std=size**-0.5,  # queries and keys of a standard deviation of one
            fixed_length=ROOM,
            layers=(STANDARD,),
            **{"dtype": "float32", **changes},
        )

    def trial(self, source: Any = None, kv_heads: int = HEADS, **changes: Any) -> Tried:
        key = (source, kv_heads, tuple(changes.items()))
        if key not in self._trials:
            variant = self.variant if source is None else self.variant._replace(source=source)
            same = next((t for (_, heads, _), t in self._trials.items() if heads == kv_heads), None)
            self._trials[key] = Tried(variant, self.config(kv_heads, **changes), same and same.state)
        return self._trials[key]

    def definition(self, trial: Tried, **arguments: Any) -> tuple[Any, Any, Any]:
        """One pass by weights @ v; a mixer that is no form's is its own definition."""
        return trial.whole(by_definition=self.form is not None, **arguments)


def off(got: np.ndarray, want: np.ndarray, what: str, near: float = NEAR, least: float = 1.0) -> float:
    """The largest error. Raises FailedError where it is more than `near` times the largest value, or `least`.

    Axis 1 is that of positions, of which the first that is off is named.
    """
    if got.shape != want.shape:
        raise FailedError(f"{what}: shape {got.shape}, expected {want.shape}")
    error = np.abs(got.astype(np.float32) - want.astype(np.float32))
    wrong = ~(error <= near * max(least, float(np.abs(want).max(initial=0))))
    if wrong.any():
        first = int(np.argmax(wrong.any(axis=tuple(i for i in range(wrong.ndim) if i != 1)))) if wrong.ndim > 1 else 0
        raise FailedError(f"{what}: off by {float(error.max()):.1e}, first at position {first}")
    return float(error.max(initial=0))


def gradients_off(got: Any, want: Any, what: str, near: float = NEAR) -> float:
    """The same for gradients, by name. One that is zero but for rounding is measured by the others."""
    named = jax.tree_util.tree_leaves_with_path(got)
    wanted = jax.tree.leaves(want)
    largest = max(float(np.abs(x.astype(np.float32)).max(initial=0)) for x in wanted)
    worst = 0.0
    for (path, own), other in zip(named, wanted, strict=True):
        scale = max(float(np.abs(other.astype(np.float32)).max(initial=0)), 0.01 * largest)
        error = float(np.abs(own.astype(np.float32) - other.astype(np.float32)).max(initial=0)) / scale
        if not error <= near:
            raise FailedError(f"{what}: the gradient of {dotted(path[1:])} is off by {error:.1e} of its largest")
        worst = max(worst, error)
    return worst


def dotted(path: Any) -> str:
    return ".".join(str(getattr(entry, "key", getattr(entry, "name", entry))) for entry in path)

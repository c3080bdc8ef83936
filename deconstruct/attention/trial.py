"""A mixer tried at a small size, with parameters and inputs that hide nothing, and whether it sees the future.

`check` runs its rows on trials; a training run asks `sees_the_future` before it starts.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deconstruct.attention.mixer import Context
from deconstruct.attention.variants import Variant, find_variant, make
from deconstruct.config import MeshConfig, ModelConfig
from deconstruct.distributed.mesh import make_mesh
from deconstruct.kernels.mask import CAUSAL, Mask
from deconstruct.layers import rope_tables
from deconstruct.types import Streams

NOISE = 0.1  # added to every parameter: gates and biases that are zero at first would hide what stands behind them
POSITIONS = 80  # tried at the start of a run: more than the 64 of a chunk in the package's recurrences
HEAD_DIM = 8

_log = logging.getLogger(__name__)


@functools.cache
def _tables(head_size: int, theta: float) -> tuple[np.ndarray, np.ndarray]:
    cos, sin = compiled(lambda: rope_tables(jnp.arange(POSITIONS), head_size, theta))()
    return np.asarray(cos), np.asarray(sin)


class Inputs(NamedTuple):
    """Normed streams and token embeddings, as a block hands them to its mixer. None where the mixer reads none.

    They lie on the host as long as they can: each of the small programs that would put them together has to be
    compiled.
    """

    h: Any  # [B, L, d]
    static: Any
    x: Any  # [1, L, d]

    def cut(self, begin: int, end: int) -> Inputs:
        return jax.tree.map(lambda x: x[:, begin:end], self)


class Leak(NamedTuple):
    """A position that changes when a later one does, both from 0."""

    position: int
    future: int


@contextmanager
def alone() -> Iterator[None]:
    """On one device of this process, whatever mesh and however many processes there are around it."""
    with jax.set_mesh(make_mesh(MeshConfig(fsdp=1), jax.local_devices()[:1])):
        yield


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """jax.jit for what is run a few times on little: a CPU's program is not optimised, which is most of the time."""
    options = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    return jax.jit(function, compiler_options=options)


class Trial:
    """A mixer of its own size: `graphdef` and `state` (parameters, the rest), merged by `mixer`.

    `state`: another trial's, whose parameters have the same shapes.
    """

    def __init__(self, variant: Variant, config: ModelConfig, state: Any = None):
        self.config = config

        def build() -> nnx.Module:
            # The generator that is quickest to compile.
            return make(variant, config, nnx.Rngs(params=jax.random.key(0, impl="unsafe_rbg")))

        def draw() -> Any:
            return tuple(nnx.to_pure_dict(part) for part in nnx.split(build(), nnx.Param, ...)[1:])

        random = np.random.default_rng(0)

        def noisy(x: jax.Array) -> np.ndarray:
            return np.asarray(x) + (NOISE * random.standard_normal(x.shape)).astype(x.dtype)

        self.abstract: Any = nnx.eval_shape(build)
        self.graphdef = nnx.split(self.abstract, nnx.Param, ...)[0]
        if state is None:
            params, rest = compiled(draw)()
            state = jax.device_put((jax.tree.map(noisy, params), rest))
        self.state = state

    def mixer(self, state: Any) -> Any:
        return nnx.merge(self.graphdef, *state)

    def draw(self, seed: int, batch: int, length: int) -> Inputs:
        """Inputs of a standard deviation of one, as norms leave them."""
        random = np.random.default_rng(seed)

        def normal(rows: int) -> np.ndarray:
            return random.standard_normal((rows, length, self.config.hidden_size)).astype(jnp.dtype(self.config.dtype))

        mixer = self.abstract
        return Inputs(
            normal(batch), normal(batch) if mixer.reads_static else None, normal(1) if mixer.fixed_source else None
        )

    def tables(self, length: int, start: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin of `length` positions from `start` on."""
        cos, sin = _tables(self.config.head_size, self.config.rope_theta)
        return cos[start : start + length], sin[start : start + length]

    def streams(self, inputs: Inputs, tables: Any, mask: Mask) -> tuple[Streams, Streams, Context]:
        """What the mixer is called with."""
        static = Streams(inputs.static, inputs.x if inputs.static is not None else None)
        return Streams(inputs.h, inputs.x), static, Context(tables[0], tables[1], static, mask)


def first_leak(changed: np.ndarray) -> Leak | None:
    """changed[p, i]: whether position i changes when the positions from p on do. The first that sees the future, and
    the nearest future it sees."""
    late = np.arange(len(changed))[:, None]
    leaks = changed & (np.arange(changed.shape[1])[None, :] < late)
    if not leaks.any():
        return None
    position = int(np.argmax(leaks.any(axis=0)))
    return Leak(position, int(np.flatnonzero(leaks[:, position])[-1]))


def sees_the_future(name: str, config: ModelConfig) -> Leak | None:
    """Tries a variant of a model at a small size: the first position whose output depends on a later one, or None.

    A second or less, most of it compiling. A variant that cannot run at any size that is tried is not refused: the
    answer is None, and a warning says so.
    """
    leak, reason = _tried(find_variant(name), config, min(POSITIONS, config.fixed_length or POSITIONS))
    if reason:
        _log.warning("variant %r: not checked for the future, it does not run by itself (%s)", name, reason)
    return leak


@functools.lru_cache(maxsize=64)
def _tried(variant: Variant, config: ModelConfig, length: int) -> tuple[Leak | None, str]:
    """And why there is no answer."""
    reason = ""
    for sized in _sizes(config):
        try:
            with alone():
                return _leak(variant, sized, length), ""
        except Exception as error:  # it may want another size; if it is wrong at every size, the run itself will say so
            reason = reason or f"{type(error).__name__}: {error}".splitlines()[0]
    return None, reason


def _sizes(config: ModelConfig) -> Iterator[ModelConfig]:
    """Small in float32, small in the model's own dtype (a program may ask for it), and as wide as it is."""
    groups = config.num_heads // config.kv_heads
    kv_heads = min(config.kv_heads, 2)
    heads = groups * kv_heads
    head_dim = min(config.head_size, HEAD_DIM)
    small = replace(
        config,
        hidden_size=heads * head_dim,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        init_std=(heads * head_dim) ** -0.5,
    )
    yield replace(small, dtype="float32")
    yield small
    yield config


def _leak(variant: Variant, config: ModelConfig, length: int) -> Leak | None:
    trial = Trial(variant, config)
    before, after = (trial.draw(seed, 1, length) for seed in (1, 2))
    mask = Mask(jnp.asarray(np.zeros((length, length), np.int32))) if config.document_mask else CAUSAL
    tables = trial.tables(length)
    # Row p - 1 of the batch has other inputs from position p on; the last is as it was.
    other = (np.arange(length)[None, :] > np.arange(length)[:, None])[..., None]

    def outputs(state: Any, before: Inputs, after: Inputs) -> jax.Array:
        changed = jax.tree.map(lambda a, b: jnp.where(other, b, a), before._replace(x=None), after._replace(x=None))
        streams = trial.streams(changed._replace(x=before.x), tables, mask)
        return trial.mixer(state)(*streams).h.astype(jnp.float32)

    out = np.asarray(compiled(outputs)(trial.state, before, after))
    # Rounding may differ from row to row of a product. What looks into the future moves by far more.
    near = (1e-4 if config.dtype == "float32" else 2.0**-6) * float(np.abs(out).max())
    changed = np.abs(out - out[-1:]).max(axis=-1) > near
    return first_leak(np.concatenate([np.zeros((1, length), bool), changed]))

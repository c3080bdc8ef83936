"""Sources: where queries and keys are read.

| source           | Q, K from                                      | relaxes             |
|------------------|------------------------------------------------|---------------------|
| hidden           | this layer's (normed) hidden states            | nothing             |
| static_embedding | the token embeddings, the same at every layer  | current QK          |
| fixed_random     | a second stream: a Gaussian table at first     | sequence dependency |
| fixed_text       | a second stream: one fixed text's embeddings   | sequence dependency |

A second stream runs through the same blocks as the hidden states do. Values always come from the hidden states.
Source: arXiv:2510.11602, section 3.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

import jax
import jax.numpy as jnp

from deconstruct.attention.registry import register_source
from deconstruct.config import ModelConfig
from deconstruct.types import Streams


class Source:
    """Where queries and keys are read. `read` gives, for each stream, the input of its W_Q and W_K."""

    name: ClassVar[str]
    relaxes: ClassVar[tuple[str, ...]] = ()
    fixed: ClassVar[bool] = False  # both streams take their weights from x: one map for the whole batch
    static: ClassVar[bool] = False
    text: ClassVar[bool] = False  # its constant holds the token ids of a text, int32 [config.fixed_length]

    @staticmethod
    def read(streams: Streams, static: Streams) -> Streams:
        raise NotImplementedError


@register_source
class Hidden(Source):
    name = "hidden"

    @staticmethod
    def read(streams: Streams, static: Streams) -> Streams:
        return streams


@register_source
class StaticEmbedding(Source):
    name = "static_embedding"
    relaxes = ("current QK",)
    static = True

    @staticmethod
    def read(streams: Streams, static: Streams) -> Streams:
        return static


class FixedSource(Source):
    """A second stream x [1, L, d] that does not depend on the batch."""

    relaxes = ("sequence dependency",)
    fixed = True

    @staticmethod
    def read(streams: Streams, static: Streams) -> Streams:
        return Streams(None, streams.x)

    @staticmethod
    def constant(config: ModelConfig, key: jax.Array) -> jax.Array:
        """What is frozen into the model: one entry for each of config.fixed_length positions."""
        raise NotImplementedError

    @staticmethod
    def start(constant: jax.Array, length: int, embed: Callable[[jax.Array], jax.Array], dtype: str) -> jax.Array:
        """x before the first layer, [1, length, d]."""
        raise NotImplementedError


@register_source
class FixedRandom(FixedSource):
    name = "fixed_random"

    @staticmethod
    def constant(config: ModelConfig, key: jax.Array) -> jax.Array:
        return config.fixed_std * jax.random.normal(key, (config.fixed_length, config.hidden_size), jnp.float32)

    @staticmethod
    def start(constant: jax.Array, length: int, embed: Callable[[jax.Array], jax.Array], dtype: str) -> jax.Array:
        return constant[None, :length].astype(dtype)


@register_source
class FixedText(FixedSource):
    """Starts from the model's own embedding table, so gradients flow into it.

    Until a trainer puts the tokens of its text in place, they are drawn at random.
    """

    name = "fixed_text"
    text = True

    @staticmethod
    def constant(config: ModelConfig, key: jax.Array) -> jax.Array:
        return jax.random.randint(key, (config.fixed_length,), 0, config.vocab_size, jnp.int32)

    @staticmethod
    def start(constant: jax.Array, length: int, embed: Callable[[jax.Array], jax.Array], dtype: str) -> jax.Array:
        return embed(constant[None, :length])

"""Of each token of some rows: its log-likelihood, and whether the model would have chosen it."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from deconstruct.distributed.sharding import batch_spec
from deconstruct.kernels.cross_entropy import chunk_count
from deconstruct.model.language_model import LanguageModel
from deconstruct.model.placement import split_model


class Scores(NamedTuple):
    """Of targets [N, L]: log-likelihoods in nats, float32, and whether each has the greatest logit."""

    logliks: Any
    chosen: Any


class TokenScores:
    """Scores rows under models of one shape; the compiled programs, one a length, are kept from model to model."""

    def __init__(self, mesh: jax.sharding.Mesh, tokens_per_batch: int = 16_384):
        self._mesh, self._tokens_per_batch = mesh, tokens_per_batch
        self._programs: dict[Any, Any] = {}

    def __call__(self, model: LanguageModel, tokens: np.ndarray, targets: np.ndarray) -> Scores:
        """tokens and targets int32 [N, L]: a target is what follows the token. What stands to its right in a row has
        no influence, so rows may be padded there."""
        graphdef, params, frozen = split_model(model)
        if graphdef not in self._programs:
            self._programs[graphdef] = jax.jit(lambda *arrays: _scores(nnx.merge(graphdef, *arrays[:2]), *arrays[2:]))
        program, sharding = self._programs[graphdef], NamedSharding(self._mesh, batch_spec())
        size, parts = self.batch_size(tokens.shape[1]), []
        for start in range(0, len(tokens), size):
            rows = np.arange(start, start + size) % len(tokens)  # the last batch is filled up from the first
            batch = (jax.device_put(x[rows].astype(np.int32), sharding) for x in (tokens, targets))
            parts.append(jax.device_get(program(params, frozen, *batch)))
        return Scores(*(np.concatenate(xs)[: len(tokens)] for xs in zip(*parts, strict=True)))

    def batch_size(self, length: int) -> int:
        """How many rows of a length are scored at a time."""
        shards = self._mesh.shape["data"] * self._mesh.shape["fsdp"]
        return max(1, self._tokens_per_batch // length // shards) * shards


def _scores(model: LanguageModel, tokens: jax.Array, targets: jax.Array) -> Scores:
    hidden, _ = model.hidden(tokens)
    batch, length = targets.shape
    chunks = chunk_count(batch, length, model.config.padded_vocab)

    def cut(x: jax.Array) -> jax.Array:
        return x.reshape(batch, chunks, length // chunks, *x.shape[2:]).swapaxes(0, 1)

    def of_chunk(part: tuple[jax.Array, jax.Array]) -> Scores:
        logits = model.logits(part[0])
        own = jnp.take_along_axis(logits, part[1][..., None], axis=-1)[..., 0]
        return Scores(own - jax.nn.logsumexp(logits, axis=-1), logits.argmax(-1) == part[1])

    found = jax.lax.map(of_chunk, (cut(hidden), cut(targets)))
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(batch, length), found)

"""Loss and perplexity of a model on windows of text.

    nll = sum of token losses / tokens,  perplexity = exp(nll)

Non-overlapping windows: window n predicts the tokens n L + 1 to n L + L from what precedes them in the window, so
the first ones have little context. Sliding windows move by `stride` < L: all but the first score only their last
`stride` tokens, each seen with at least L - stride tokens of context. Every token but the very first of the text is
scored once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding

from deconstruct.config import ModelConfig
from deconstruct.distributed.sharding import batch_spec
from deconstruct.model.language_model import LanguageModel
from deconstruct.model.placement import abstract_arrays, split_model
from deconstruct.types import UserError


class Result(NamedTuple):
    """`losses`: nats, float32 [tokens], of each token that is scored, in the order of the text."""

    losses: np.ndarray

    @property
    def tokens(self) -> int:
        return len(self.losses)

    @property
    def nll(self) -> float:
        """nats a token"""
        return float(np.mean(self.losses, dtype=np.float64))

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.nll, 700.0))


def windows(stream: np.ndarray, context: int, stride: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(tokens int32 [context + 1], weights float32 [context]) covering a token stream; the last window is padded
    with zeros."""
    for start in range(0, max(len(stream) - 1, 0), stride):
        # Tokens before `scored` were targets of an earlier window.
        end = min(start + context, len(stream) - 1)
        scored = 0 if start == 0 else context - stride
        if start + scored >= len(stream) - 1:
            return
        row = np.zeros(context + 1, np.int32)
        row[: end - start + 1] = stream[start : end + 1]
        weights = np.zeros(context, np.float32)
        weights[scored : end - start] = 1.0
        yield row, weights


class WindowLosses:
    """Measures models of one shape; the compiled programs are kept from checkpoint to checkpoint."""

    def __init__(self, mesh: jax.sharding.Mesh, tokens_per_batch: int = 16_384):
        self._mesh, self._tokens_per_batch = mesh, tokens_per_batch
        self._programs: dict[Any, Any] = {}

    def __call__(self, model: LanguageModel, stream: np.ndarray, context: int, stride: int) -> Result:
        """Of a token stream int32 [N]. Raises UserError where the model cannot take `context` or there is no token
        to score."""
        if model.fixed is not None and context > model.config.fixed_length:
            raise UserError(
                f"--contexts={context}: the fixed stream ({model.fixed_source}) of this model has only "
                f"{model.config.fixed_length} positions (model.fixed_length)"
            )
        if len(stream) < 2:
            raise UserError(f"the text has {len(stream)} tokens; two are needed to score one")
        context = min(context, len(stream) - 1)  # there is no more to see, and a longer window would only be padded
        stride = min(stride, context)
        batch_size = self._batch_size(context)
        graphdef, params, frozen = split_model(model)
        program = self._program(graphdef)
        scored = []
        for rows, weights in _batches(windows(stream, context, stride), batch_size):
            sharding = NamedSharding(self._mesh, batch_spec())
            losses = program(params, frozen, jax.device_put(rows, sharding))
            scored.append(np.asarray(losses)[weights > 0])
        return Result(np.concatenate(scored))

    def trace(self, config: ModelConfig, context: int) -> jax.stages.Traced:
        """The program for one batch, from shapes alone: the devices of the mesh need not be here."""
        graphdef, params, frozen = abstract_arrays(config, self._mesh)
        sharding, batch_size = NamedSharding(self._mesh, batch_spec()), self._batch_size(context)
        rows = jax.ShapeDtypeStruct((batch_size, context + 1), jnp.int32, sharding=sharding)
        with jax.set_mesh(self._mesh):
            return self._program(graphdef).trace(params, frozen, rows)

    def _batch_size(self, context: int) -> int:
        shards = self._mesh.shape["data"] * self._mesh.shape["fsdp"]
        return max(1, self._tokens_per_batch // context // shards) * shards

    def _program(self, graphdef: Any) -> Any:
        if graphdef not in self._programs:

            def losses(params: Any, frozen: Any, rows: jax.Array) -> jax.Array:
                return nnx.merge(graphdef, params, frozen).token_losses(rows[:, :-1], rows[:, 1:])

            self._programs[graphdef] = jax.jit(losses)
        return self._programs[graphdef]


def _batches(
    pairs: Iterator[tuple[np.ndarray, np.ndarray]], batch_size: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of one size; the last is filled up with rows of weight zero."""
    rows: list[np.ndarray] = []
    weights: list[np.ndarray] = []
    for row, weight in pairs:
        rows.append(row)
        weights.append(weight)
        if len(rows) == batch_size:
            yield np.stack(rows), np.stack(weights)
            rows, weights = [], []
    if rows:
        missing = batch_size - len(rows)
        yield (
            np.concatenate([np.stack(rows), np.zeros((missing, rows[0].shape[0]), np.int32)]),
            np.concatenate([np.stack(weights), np.zeros((missing, weights[0].shape[0]), np.float32)]),
        )

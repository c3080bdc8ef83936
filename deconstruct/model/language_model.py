"""The language model: embeddings, the fixed stream where a layer reads one, the stack, the head and the loss."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deconstruct.attention.mixer import Context
from deconstruct.attention.parameters import mlp_width
from deconstruct.attention.registry import SOURCES
from deconstruct.attention.source import FixedSource
from deconstruct.attention.variants import find_variant, fixed_source, reads_static
from deconstruct.config import ModelConfig
from deconstruct.distributed.sharding import constrain
from deconstruct.kernels.cross_entropy import chunk_count, cross_entropy, token_losses
from deconstruct.kernels.mask import Mask, document_begins
from deconstruct.layers import Embedding, Frozen, RMSNorm, normal_param, rope_tables
from deconstruct.model.stack import RESIDUAL, Block, Record, Stack
from deconstruct.spelling import nearest
from deconstruct.types import Streams, UserError

IMPLS = ("auto", "reference", "xla", "cudnn", "splash", "pallas_tpu", "pallas_gpu")


class LanguageModel(nnx.Module):
    """A decoder-only transformer whose every layer holds the mixer its layout names.

    `key` seeds all parameters; the same key gives the same layer whatever the plan.
    """

    def __init__(self, config: ModelConfig, key: jax.Array):
        check_model(config)
        embed_key, layers_key, head_key, fixed_key = (jax.random.fold_in(key, i) for i in range(4))
        self.config = config
        self.fixed_source = fixed_source(config.layers)
        self.embed = Embedding(
            config.padded_vocab,
            config.hidden_size,
            std=config.init_std,
            dtype=config.dtype,
            rngs=nnx.Rngs(params=embed_key),
        )
        self.fixed = Frozen(self._source().constant(config, fixed_key), axes=()) if self.fixed_source else None
        self.stack = Stack(config, layers_key)
        self.norm = RMSNorm(config.hidden_size, config.norm_epsilon)
        # [V, d] like the embedding, so that tied and untied heads are the same product.
        self.head = (
            None
            if config.tie_embeddings
            else normal_param(
                nnx.Rngs(params=head_key),
                (config.padded_vocab, config.hidden_size),
                ("vocab", "embed"),
                config.init_std,
            )
        )

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Token ids int32 [B, L] -> logits float32 [B, L, vocab_size].

        Raises UserError for tokens of another shape, or, where their values are known, beyond the vocabulary.
        """
        self.check_tokens(tokens)
        return self.logits(self.hidden(tokens)[0])

    def logits(self, hidden: jax.Array) -> jax.Array:
        """Final normed hidden states [B, L, d] -> logits float32 [B, L, vocab_size]."""
        table = self.output_table().astype(hidden.dtype)
        logits = jnp.einsum("bld,vd->blv", hidden, table, preferred_element_type=jnp.float32)
        return constrain(logits, ("batch", "length", "act_vocab"))[..., : self.config.vocab_size]

    def check_tokens(self, tokens: Any) -> None:
        """Raises UserError unless tokens are ids of this vocabulary, [B, L]. Traced ones have no values to look at."""
        if tokens.ndim != 2 or not jnp.issubdtype(tokens.dtype, jnp.integer):
            raise UserError(
                f"tokens are {tokens.dtype}{list(tokens.shape)}; expected whole numbers [batch, length], as in "
                "tokens[None, :] for one sequence"
            )
        if isinstance(tokens, jax.core.Tracer) or (isinstance(tokens, jax.Array) and not tokens.is_fully_addressable):
            return
        values = np.asarray(tokens)  # by numpy: known values may meet us inside a traced function
        wrong = values[(values < 0) | (values >= self.config.vocab_size)]
        if wrong.size:
            raise UserError(
                f"token {int(wrong[0])} is not in the vocabulary; this model has the ids 0 to "
                f"{self.config.vocab_size - 1}"
            )

    def hidden(self, tokens: jax.Array, record: Record | None = None) -> tuple[jax.Array, list[Any]]:
        """Final normed hidden states [B, L, d], and what `record` read off each layer."""
        streams, context = self.start(tokens)
        streams, records = self.stack(streams, context, record)
        return self.norm(streams.h), records

    def attention_maps(self, tokens: jax.Array) -> list[jax.Array | None]:
        """One map per layer: float32 [B or 1, heads, L, L], batch axis 1 where the map does not depend on the input;
        None where nothing is mixed."""
        self.check_tokens(tokens)

        def record(block: Block, streams: Streams, context: Context) -> jax.Array | None:
            return block.maps(streams, context)

        return self.hidden(tokens, record)[1]

    def loss(self, tokens: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        """The weighted sum of token losses (nats), float32 []. tokens, targets int32 [B, L]; weights float32 [B, L]."""
        hidden, _ = self.hidden(tokens)
        batch, length = targets.shape
        chunks = chunk_count(batch, length, self.config.padded_vocab)
        return cross_entropy(hidden, self.output_table(), targets, weights, self.config.vocab_size, chunks)

    def token_losses(self, tokens: jax.Array, targets: jax.Array) -> jax.Array:
        """The loss of each token (nats), float32 [B, L]."""
        hidden, _ = self.hidden(tokens)
        batch, length = targets.shape
        chunks = chunk_count(batch, length, self.config.padded_vocab)
        return token_losses(hidden, self.output_table(), targets, self.config.vocab_size, chunks)

    def output_table(self) -> jax.Array:
        """[V, d], gathered over fsdp as every parameter is when it is used."""
        return constrain(self.embed.embedding[...] if self.head is None else self.head[...], ("vocab", None))

    def start(self, tokens: jax.Array) -> tuple[Streams, Context]:
        """The streams before the first layer, and what all layers read. tokens int32 [B, L]."""
        config, length = self.config, tokens.shape[1]
        streams = Streams(constrain(self.embed(tokens), RESIDUAL), self.fixed_stream(length))
        mask = Mask(document_begins(tokens, config.end_of_text) if config.document_mask else None)
        return streams, self.context(length, streams, mask)

    def context(self, length: int, static: Streams, mask: Mask) -> Context:
        """What all layers read: the tables of `length` positions, the embeddings where a layer reads them, the mask."""
        cos, sin = rope_tables(jnp.arange(length), self.config.head_size, self.config.rope_theta)
        return Context(cos, sin, static if reads_static(self.config.layers) else Streams(None), mask)

    def check_length(self, length: int, what: str = "") -> None:
        """Raises UserError where a fixed stream is shorter than `length` tokens; `what` says who wants them."""
        if self.fixed is not None and length > self.config.fixed_length:
            raise UserError(
                f"{what or f'{length} tokens'} are more than the fixed stream ({self.fixed_source}) of this model "
                f"has: {self.config.fixed_length} (model.fixed_length)"
            )

    def fixed_stream(self, length: int) -> jax.Array | None:
        """x before the first layer, [1, length, d]; None where no layer reads it. Raises UserError beyond its
        length."""
        self.check_length(length)
        if self.fixed is None:
            return None
        return self._source().start(self.fixed[...], length, self.embed, self.config.dtype)

    def _source(self) -> type[FixedSource]:
        source = SOURCES[str(self.fixed_source)]
        assert issubclass(source, FixedSource)
        return source


def check_model(config: ModelConfig) -> None:
    """Raises UserError where a name is unknown, or a setting cannot be had in a layer or would be ignored in all."""
    if config.impl not in IMPLS:
        near = nearest(config.impl, IMPLS)
        advice = f"did you mean {near}?" if near else f"expected {', '.join(IMPLS)}"
        raise UserError(f"config.model.impl={config.impl} is unknown; {advice}")
    layers = tuple(dict.fromkeys(config.layers))
    fixed_source(layers)
    for name in layers:
        mlp_width(config, name)  # makes the mixer, from shapes alone
    if config.impl != "auto" and layers and not any(find_variant(name).form for name in layers):
        raise UserError(
            f"config.model.impl={config.impl}: chooses the program of attention, and no layer has any "
            f"({', '.join(layers)}); leave it at auto"
        )


def build_model(config: ModelConfig, seed: int = 0) -> LanguageModel:
    """A live model with fresh parameters, on the default device. Raises UserError where the shape is impossible."""
    graphdef, _ = nnx.split(abstract_model(config))

    def init() -> Any:
        return nnx.to_pure_dict(nnx.state(LanguageModel(config, jax.random.key(seed))))

    return nnx.merge(graphdef, jax.jit(init, compiler_options=init_options())())


def init_options() -> dict[str, str]:
    """Compiler options of the programs that draw first parameters. They run once: on a CPU, optimising them takes many
    times as long as they do. All use the same, so that the same seed gives the same bits."""
    return {"xla_backend_optimization_level": "0"} if jax.default_backend() == "cpu" else {}


def abstract_model(config: ModelConfig) -> LanguageModel:
    """The same with shapes in place of arrays: seconds and megabytes for any size."""
    return nnx.eval_shape(lambda: LanguageModel(config, jax.random.key(0)))

"""What programs really do: FLOPs as XLA counts them, and the bytes that the backward pass keeps. Nothing is computed.

Programs are those of one layer, or of a whole model with its layers unrolled, because XLA counts the body of a loop
once. Where a kernel loops over chunks (taylor over long sequences) its count is short by the other chunks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal
from jax.interpreters import partial_eval

from deconstruct.attention.mixer import Context
from deconstruct.attention.variants import fixed_source, reads_static
from deconstruct.config import ModelConfig
from deconstruct.kernels.cross_entropy import cross_entropy
from deconstruct.model import decode
from deconstruct.model.language_model import abstract_model
from deconstruct.model.stack import Block
from deconstruct.types import Streams


class Program(NamedTuple):
    """A function of parameters, inputs and constants, and their shapes. Constants are not differentiated."""

    function: Callable[..., Any]
    parameters: Any
    inputs: tuple[Any, ...]
    constants: tuple[Any, ...] = ()


def compiled_flops(program: Program) -> float:
    """XLA's analysis of the optimised program, for the default device. Element-wise operations count one each."""
    compiled = jax.jit(program.function).lower(*_arguments(program)).compile()
    analysis = compiled.cost_analysis()
    assert analysis is not None
    return float(analysis["flops"])


def counted_flops(program: Program) -> float:
    """Of the matrix products of a program as it is traced, those in a loop times its length; nothing is compiled.

    Element-wise work does not count. Raises ValueError where a loop's length is not known (`while`).
    """
    return traced_flops(jax.make_jaxpr(program.function)(*_arguments(program)))


def traced_flops(program: ClosedJaxpr) -> float:
    """The same of any program."""
    jaxpr = program.jaxpr
    # What no result depends on is not computed.
    return _products(partial_eval.dce_jaxpr(jaxpr, [True] * len(jaxpr.outvars))[0])


def _products(jaxpr: Any) -> float:
    total = 0.0
    for equation in jaxpr.eqns:
        name, inner = equation.primitive.name, [_products(x) for x in _inside(equation.params)]
        if name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[i] for i in contracted)
            total += 2.0 * depth * math.prod(equation.outvars[0].aval.shape)
        elif name == "triangular_solve":
            size = equation.invars[0].aval.shape[-1]
            total += float(size * math.prod(equation.outvars[0].aval.shape))
        elif name == "scan":
            total += equation.params["length"] * sum(inner)
        elif name == "cond":
            total += max(inner)
        elif name == "shard_map":  # what each device does
            total += equation.params["mesh"].size * sum(inner)
        elif name == "pallas_call":
            estimate = equation.params["cost_estimate"]
            total += estimate.flops if estimate else math.prod(equation.params["grid_mapping"].grid) * sum(inner)
        elif name == "while" and any(inner):
            raise ValueError("matrix products in a `while`, whose number of turns is not known")
        else:
            total += sum(inner)
    return total


def _inside(parameters: dict[str, Any]) -> Iterator[Jaxpr]:
    """The programs that an operation holds."""
    for value in parameters.values():
        for x in value if isinstance(value, list | tuple) else [value]:
            if isinstance(x, ClosedJaxpr):
                yield x.jaxpr
            elif isinstance(x, Jaxpr):
                yield x


def kept_bytes(program: Program) -> int:
    """Bytes that differentiation keeps from the forward pass for the backward pass, parameters (and what is made of
    them alone) left out."""
    leaves = len(jax.tree.leaves(program.parameters))

    def residuals(parameters: Any, inputs: Any, constants: Any) -> list[Any]:
        return jax.tree.leaves(jax.vjp(lambda p, *x: program.function(p, *x, *constants), parameters, *inputs)[1])

    jaxpr = jax.make_jaxpr(residuals)(program.parameters, program.inputs, program.constants).jaxpr
    depends = set(jaxpr.invars[leaves:])
    for equation in jaxpr.eqns:
        if any(not isinstance(x, Literal) and x in depends for x in equation.invars):
            depends.update(equation.outvars)
    kept = {x for x in jaxpr.outvars if not isinstance(x, Literal) and x in depends}
    return sum(_bytes(x.aval) for x in kept)


def _arguments(program: Program) -> tuple[Any, ...]:
    return program.parameters, *program.inputs, *program.constants


def _bytes(x: Any) -> int:
    return math.prod(x.shape) * x.dtype.itemsize


def with_gradients(program: Program) -> Program:
    """Forward and backward pass: the result of a program, and its gradients for a cotangent of every output."""

    def both(parameters: Any, inputs: tuple[Any, ...], constants: tuple[Any, ...], cotangents: Any) -> Any:
        out, pull = jax.vjp(lambda p, *x: program.function(p, *x, *constants), parameters, *inputs)
        return out, pull(cotangents)

    out = jax.eval_shape(program.function, *_arguments(program))
    return Program(both, program.parameters, (program.inputs, program.constants, out))


def mixer_program(config: ModelConfig, name: str, batch: int, length: int) -> Program:
    """One layer's mixer over normed streams: what it adds to h. Of the fixed stream only what h reads of it is computed
    (its queries and keys), not what the layer adds to that stream itself."""
    mixer = abstract_block(config, name).mixer
    assert mixer is not None
    graphdef, parameters = _split(mixer)
    streams, static, context = _mixer_inputs(config, name, batch, length)

    def run(parameters: Any, streams: Streams, static: Streams, context: Context) -> jax.Array:
        return nnx.merge(graphdef, parameters)(streams, static, context).h

    return Program(run, parameters, (streams, static), (context,))


def mixer_decode_program(config: ModelConfig, name: str, batch: int, length: int) -> Program:
    """One more token through one layer's mixer, with a cache for `length` positions."""
    mixer = abstract_block(config, name).mixer
    assert mixer is not None
    graphdef, parameters = _split(mixer)
    _, static, context = _mixer_inputs(config, name, batch, length)
    cache = jax.eval_shape(lambda: mixer.init_cache(batch, length, config.hidden_size, jnp.dtype(config.dtype)))
    constants = _constants(config, name, batch, length)
    token = jax.ShapeDtypeStruct((batch, 1, config.hidden_size), config.dtype)

    def run(parameters: Any, h: Any, static: Any, cache: Any, constants: Any, context: Context, start: Any) -> Any:
        return nnx.merge(graphdef, parameters).extend(h, static, cache, constants, context, start)

    start = jax.ShapeDtypeStruct((), jnp.int32)
    return Program(run, parameters, (token, None if static.h is None else token, cache, constants, context, start))


def constant_bytes(config: ModelConfig, name: str, batch: int, length: int) -> int:
    """What decoding keeps of the fixed stream for one layer, beside its cache; it does not depend on the batch."""
    return sum(_bytes(x) for x in jax.tree.leaves(_constants(config, name, batch, length)))


def _constants(config: ModelConfig, name: str, batch: int, length: int) -> Any:
    graphdef, parameters = _split(abstract_block(config, name))
    streams, _, context = _mixer_inputs(config, name, batch, length)

    def constants(parameters: Any, streams: Streams, context: Context) -> Any:
        return nnx.merge(graphdef, parameters).constants(streams, context)

    return jax.eval_shape(constants, parameters, streams, context)


def block_program(config: ModelConfig, name: str, batch: int, length: int, with_x: bool = False) -> Program:
    """A whole layer as it is trained, residual streams in and out. `with_x`: the fixed stream passes through it, too;
    otherwise it comes in only where it is read, and does not go on."""
    block = abstract_block(config, name)
    graphdef, parameters = _split(block)
    streams, static, context = _mixer_inputs(config, name, batch, length, with_x)

    def run(parameters: Any, streams: Streams, static: Streams, context: Context) -> Any:
        out = nnx.merge(graphdef, parameters)(streams, context._replace(static=static))
        return out if with_x else out.h

    return Program(run, parameters, (streams, static), (context,))


def model_prefill_program(config: ModelConfig, batch: int, length: int) -> Program:
    """A prompt through the whole model, unrolled: the logits of its last token. The fixed stream passes through too."""
    graphdef, parameters = _split(abstract_model(_unrolled(config)))

    def run(parameters: Any, tokens: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, parameters)
        hidden, _ = model.hidden(tokens)
        return model.logits(hidden[:, -1:])

    return Program(run, parameters, (_tokens(batch, length),))


def model_decode_program(config: ModelConfig, batch: int, length: int) -> Program:
    """One more token of each sequence through the whole model, with caches for `length` positions."""
    graphdef, parameters = _split(abstract_model(_unrolled(config)))

    def prepare(parameters: Any) -> Any:
        model = nnx.merge(graphdef, parameters)
        return decode.init_cache(model, batch, length), decode.decoding_constants(model, length)

    cache, constants = jax.eval_shape(prepare, parameters)

    def run(parameters: Any, tokens: jax.Array, cache: Any, constants: Any) -> Any:
        return decode.extend(nnx.merge(graphdef, parameters), tokens, cache, constants, length)

    return Program(run, parameters, (_tokens(batch, 1), cache, constants))


def model_train_program(config: ModelConfig, batch: int, length: int) -> Program:
    """Loss and gradients of the whole model, unrolled, nothing recomputed; without the optimizer."""
    graphdef, parameters = _split(abstract_model(_unrolled(config)))

    def loss(parameters: Any, tokens: jax.Array, targets: jax.Array, weights: jax.Array) -> jax.Array:
        model = nnx.merge(graphdef, parameters)
        hidden, _ = model.hidden(tokens)
        return cross_entropy(hidden, model.output_table(), targets, weights, config.vocab_size, chunks=1)

    def run(parameters: Any, *batch: Any) -> Any:
        return jax.value_and_grad(loss, allow_int=True)(parameters, *batch)

    tokens = _tokens(batch, length)
    return Program(run, parameters, (tokens, tokens, jax.ShapeDtypeStruct((batch, length), jnp.float32)))


def traceable(config: ModelConfig) -> ModelConfig:
    """The same with kernels that any machine can trace: those of one kind of device are counted as XLA's."""
    return config if config.impl == "reference" else dataclasses.replace(config, impl="auto")


def abstract_block(config: ModelConfig, name: str) -> Block:
    """One layer, with shapes in place of arrays."""
    return nnx.eval_shape(lambda: Block(config, name, nnx.Rngs(params=jax.random.key(0))))


def _split(module: nnx.Module) -> tuple[Any, Any]:
    graphdef, state = nnx.split(module)
    return graphdef, nnx.to_pure_dict(state)


def _unrolled(config: ModelConfig) -> ModelConfig:
    return dataclasses.replace(config, scan=False, remat=False)


def _tokens(batch: int, length: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct((batch, length), jnp.int32)


def _mixer_inputs(
    config: ModelConfig, name: str, batch: int, length: int, with_x: bool = False
) -> tuple[Streams, Streams, Context]:
    def stream(rows: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((rows, length, config.hidden_size), config.dtype)

    with_x = with_x or fixed_source((name,)) is not None
    streams = Streams(stream(batch), stream(1) if with_x else None)
    static = streams if reads_static((name,)) else Streams(None)
    angles: Any = jax.ShapeDtypeStruct((length, config.head_size // 2), jnp.float32)
    return streams, static, Context(angles, angles, Streams(None))

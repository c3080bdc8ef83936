"""Milliseconds of mixing by each program of each form, forward and with its gradients, at growing lengths.

Beside them, in the same run, what the machine gives at most (`bench.ceilings`) and how near each program comes to it:
its share of the roofline is the least time for the FLOPs that the form needs and the bytes that must move, over the
time it took. Gradients are counted as twice the forward pass.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deconstruct.attention.form import Form, Shape, Site, platform
from deconstruct.attention.registry import FORMS
from deconstruct.bench.ceilings import Ceilings, measure_ceilings
from deconstruct.bench.rounds import Round, take_turns
from deconstruct.config import ModelConfig, default_config
from deconstruct.experiment import resolve
from deconstruct.types import UserError

SHARED = "softmax, one map for the batch"
PASSES = ("forward", "backward")  # backward: with the forward pass it needs


class Work(NamedTuple):
    """What is mixed: as many tokens at every length, up to one sequence."""

    tokens: int
    heads: int
    head_dim: int
    dtype: str
    lengths: tuple[int, ...]

    def batch(self, length: int) -> int:
        return max(1, self.tokens // length)


ON_CPU = Work(4096, 4, 64, "float32", (512, 2048, 8192))
ON_ACCELERATORS = Work(1 << 15, 16, 64, "bfloat16", (1024, 2048, 4096, 8192, 16384, 32768, 65536))


class Program(NamedTuple):
    """A form and one of its programs; with `shared`, queries and keys have a batch of one."""

    name: str
    form: Form
    impl: str
    shared: bool

    def arrays(self, work: Work, length: int) -> tuple[Any, ...]:
        """q, k, v, a cotangent of the result, and what the form reads beside them; random, the same each time."""
        batch = work.batch(length)
        qk_batch = 1 if self.shared else batch
        keys = jax.random.split(jax.random.key(length), 5)
        sizes = (qk_batch, qk_batch, batch, batch)
        rest = (length, work.heads, work.head_dim)
        q, k, v, g = (
            jax.random.normal(key, (n, *rest)).astype(work.dtype) for key, n in zip(keys, sizes, strict=False)
        )
        x = jax.random.normal(keys[4], (qk_batch, length, work.heads * work.head_dim)).astype(work.dtype)
        return q, k, v, g, self.form.read(x)

    def flops(self, work: Work, length: int) -> float:
        batch = work.batch(length)
        shape = Shape(batch, 1 if self.shared else batch, length, work.heads, work.heads, work.head_dim)
        return self.form.flops(shape).needed


def kernel_speed(work: Work, rounds: int, peers: bool = False) -> dict[str, Any]:
    """Every program that runs here, `rounds` times in turn at each length; None where it ran out of memory."""
    ceilings = measure_ceilings(work.dtype)
    rows: list[dict[str, Any]] = []
    for length in work.lengths:
        for way in PASSES:
            contenders, facts = {}, {}
            for program in programs(work):
                label = f"{program.name}: {program.impl}"
                contenders[label] = _round(program, work, length, way)
                facts[label] = (3 if way == "backward" else 1) * program.flops(work, length)
            if peers:
                contenders |= {f"torch: {name}": round_ for name, round_ in _peers(work, length, way)}
            contenders, failed = _that_run(contenders)
            seconds = take_turns(contenders, rounds, f"{way} {length:,}")
            moved = _bytes(work, length, way)
            for label in (*seconds, *failed):
                taken = statistics.median(seconds[label]) if label in seconds else None
                rows.append(_row(label, length, way, taken, facts.get(label), moved, ceilings))
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "jax": jax.__version__,
        "work": {**work._asdict(), "lengths": list(work.lengths)},
        "ceilings": ceilings._asdict(),
        "rows": rows,
    }


def programs(work: Work) -> Iterator[Program]:
    """All programs of all forms that can run on this machine, but definitions, which form the whole map."""
    config = _config(work)
    for name in FORMS:
        for shared in (False, True) if name == "softmax" else (False,):
            form = FORMS[name](config, nnx.Rngs(0))
            site = Site(work.dtype, work.head_dim, shared, False, platform())
            for impl, kernel in form.kernels().items():
                if kernel.why_not(site) is None:
                    chosen = FORMS[name](config, nnx.Rngs(0))
                    chosen.impl = impl
                    yield Program(SHARED if shared else name, chosen, impl, shared)


def _config(work: Work) -> ModelConfig:
    config = default_config()
    config.data = ""
    width = work.heads * work.head_dim
    config.model.update({"hidden_size": width, "num_heads": work.heads, "num_layers": 1, "dtype": work.dtype})
    return resolve(config).model


def _round(program: Program, work: Work, length: int, way: str) -> Round:
    def forward(q: jax.Array, k: jax.Array, v: jax.Array, read: Any) -> jax.Array:
        return program.form.mix(q, k, v, **read)

    def backward(q: jax.Array, k: jax.Array, v: jax.Array, g: jax.Array, read: Any) -> Any:
        out, pull = jax.vjp(forward, q, k, v, read)
        return out, pull(g)

    arrays: list[Any] = []
    function = jax.jit(forward if way == "forward" else backward)

    def round_() -> float:
        if not arrays:
            q, k, v, g, read = program.arrays(work, length)
            arrays.extend((q, k, v, read) if way == "forward" else (q, k, v, g, read))
            jax.block_until_ready(arrays)
        start = time.perf_counter()
        jax.block_until_ready(function(*arrays))
        return time.perf_counter() - start

    return round_


def _that_run(contenders: dict[str, Round]) -> tuple[dict[str, Round], list[str]]:
    """Those that go through once, and the names of those for which there is not enough memory."""
    fit, failed = {}, []
    for label, round_ in contenders.items():
        try:
            round_()
            fit[label] = round_
        except Exception as error:  # JAX's, PyTorch's or Triton's
            if not any(words in str(error) for words in ("RESOURCE_EXHAUSTED", "out of memory", "out of resource")):
                raise
            failed.append(label)
    return fit, failed


def _peers(work: Work, length: int, way: str) -> Iterator[tuple[str, Round]]:
    """PyTorch's attention and, on a GPU, flash-linear-attention's Triton kernels, of the same sizes and dtype."""
    try:
        import torch
    except ImportError as error:
        raise UserError("--peers needs torch: pip install 'deconstruct[peers]'") from error
    on_gpu = torch.cuda.is_available()
    device, dtype = "cuda" if on_gpu else "cpu", getattr(torch, work.dtype)
    for name, mix in _torch_kernels(on_gpu, work):
        sizes = (work.batch(length), length, work.heads, work.head_dim)
        inputs = [torch.randn(sizes, device=device, dtype=dtype, requires_grad=True) for _ in range(3)]
        g = torch.randn(sizes, device=device, dtype=dtype)

        def round_(mix: Any = mix, inputs: Any = inputs, g: Any = g) -> float:
            start = time.perf_counter()
            with torch.set_grad_enabled(way == "backward"):
                out = mix(*inputs)
                if way == "backward":
                    torch.autograd.grad(out, inputs, g)
            if on_gpu:
                torch.cuda.synchronize()
            return time.perf_counter() - start

        yield name, round_


def _torch_kernels(on_gpu: bool, work: Work) -> Iterator[tuple[str, Callable[..., Any]]]:
    import torch
    from torch.nn import functional

    def sdpa(q: Any, k: Any, v: Any) -> Any:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    yield "scaled_dot_product_attention", sdpa
    if not on_gpu:
        return
    from fla.ops.based import parallel_based
    from fla.ops.gated_delta_rule import chunk_gated_delta_rule
    from fla.ops.gla import chunk_gla

    def gated(q: Any, k: Any, v: Any) -> Any:
        return chunk_gla(q, k, v, torch.full_like(k, -0.05))[0]

    def delta(q: Any, k: Any, v: Any) -> Any:
        gates = torch.full(k.shape[:3], -0.05, device=k.device)
        beta = torch.full(k.shape[:3], 0.5, device=k.device, dtype=k.dtype)
        return chunk_gated_delta_rule(q, k, v, gates, beta, use_qk_l2norm_in_kernel=True)[0]

    yield "fla parallel_based", parallel_based
    yield "fla chunk_gla", gated
    yield "fla chunk_gated_delta_rule", delta


def _bytes(work: Work, length: int, way: str) -> float:
    """What must move: q, k, v and the result; with gradients, these and the cotangent once more, and three results."""
    array = work.batch(length) * length * work.heads * work.head_dim * jnp.dtype(work.dtype).itemsize
    return float(array * (4 if way == "forward" else 4 + 5 + 3))


def _row(
    label: str,
    length: int,
    way: str,
    taken: float | None,
    flops: float | None,
    moved: float,
    ceilings: Ceilings,
) -> dict[str, Any]:
    row: dict[str, Any] = {"program": label, "length": length, "pass": way, "milliseconds": None}
    if taken is None:
        return row
    row["milliseconds"] = round(1e3 * taken, 3)
    if flops is not None:
        row |= {"flops": flops, "bytes": moved, "share": round(ceilings.seconds(flops, moved) / taken, 3)}
    return row


def kernels_as_text(found: dict[str, Any]) -> str:
    work, ceilings, rows = Work(**found["work"]), Ceilings(**found["ceilings"]), found["rows"]
    lengths = sorted({row["length"] for row in rows})
    lines = [
        f"{found['device']}, {work.dtype}, {work.tokens:,} tokens, {work.heads} heads of {work.head_dim}; at most "
        f"{ceilings.flops / 1e12:.3g} TFLOP/s and {ceilings.bytes / 1e9:.3g} GB/s"
    ]
    for way in PASSES:
        lines += ["", f"{way + ', ms (share of the roofline)':<44}" + "".join(f"{length:>17,}" for length in lengths)]
        of_pass = [row for row in rows if row["pass"] == way]
        for label in dict.fromkeys(row["program"] for row in of_pass):
            cells = {row["length"]: row for row in of_pass if row["program"] == label}
            lines.append(f"{label:<44}" + "".join(f"{_cell(cells.get(length)):>17}" for length in lengths))
    return "\n".join(lines)


def _cell(row: dict[str, Any] | None) -> str:
    if row is None:
        return ""
    if row["milliseconds"] is None:
        return "no memory"
    share = f" ({100 * row['share']:.0f} %)" if "share" in row else ""
    return f"{row['milliseconds']:,.2f}{share}"

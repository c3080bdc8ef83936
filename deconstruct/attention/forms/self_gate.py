"""self_gate: s_j = silu(q_j) . k_j / sqrt(dh);  A_ij = exp(s_j) / sum_{m<=i} exp(s_m).

Relaxes the mathematical form altogether: no pairwise similarity, one scalar per key position, so that the output is a
softmax-weighted running mean of the values (arXiv:2510.11602, "non-approximate"). RoPE would rotate q_j and k_j by the
same angle and cancel, so it is not applied. Time B L d; the state is a running maximum, a sum and a weighted sum of
values per head. Trained in every layer its logits pass 1e3, so the maximum runs: a global one would underflow.
"""

from __future__ import annotations

from typing import Any

import jax

from deconstruct.attention.accelerators import hopper, tpu
from deconstruct.attention.form import Flops, Form, Kernel, Shape
from deconstruct.attention.registry import register_form
from deconstruct.kernels import reference
from deconstruct.kernels.mask import Mask
from deconstruct.kernels.self_gate import init_self_gate_state, self_gate_attention


@register_form
class SelfGate(Form):
    name = "self_gate"
    relaxes = ("mathematical form",)
    overhead = "the small matmuls that form prefix sums within chunks of 64 positions"
    uses_rope = False
    documents = True

    def weights(self, q: jax.Array, k: jax.Array, mask: Mask) -> jax.Array:
        return reference.self_gate_weights(q, k, mask)

    def scores(self, q: jax.Array, k: jax.Array) -> jax.Array:
        return reference.gate_scores(q, k)[:, :, None, :]

    def kernels(self) -> dict[str, Kernel]:
        xla = Kernel(_mix, _extend, _init_cache)
        return {
            "pallas_gpu": hopper("self_gate:self_gate_attention", xla),
            "pallas_tpu": tpu("self_gate:self_gate_attention", xla),
            "xla": xla,
        }

    def flops(self, shape: Shape) -> Flops:
        gates = 2.0 * shape.length * shape.heads * shape.head_dim * shape.qk_batch
        mixing = 2.0 * shape.length**2 * shape.heads * shape.head_dim * shape.batch
        return Flops(gates + mixing, shape.length * self.decode_flops(shape).needed)

    def decode_flops(self, shape: Shape) -> Flops:
        # The gate, and one scale, multiply and add of the running sum per value channel.
        return Flops.exactly(shape.heads * shape.head_dim * (2.0 * shape.qk_batch + 3.0 * shape.batch))


def _mix(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
    return self_gate_attention(q, k, v, mask=mask)[0]


def _extend(q: jax.Array, k: jax.Array, v: jax.Array, cache: Any, mask: Mask) -> tuple[jax.Array, Any]:
    return self_gate_attention(q, k, v, cache, mask=mask)


def _init_cache(shape: Shape, dtype: Any) -> Any:
    return init_self_gate_state(shape.qk_batch, shape.batch, shape.heads, shape.head_dim)

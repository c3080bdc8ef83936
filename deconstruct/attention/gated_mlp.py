"""The mixer that mixes nothing: O = W_down(silu(H W_gate) * (H W_up)), at the attention block's parameter count.

Relaxes token mixing. Time B L d^2, no cache. The width is the integer nearest to that count over 3 d: the counts
differ by less than 0.1 % of the attention block, and are exact where 3 d divides it (arXiv:2510.11602, section 3).
"""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx

from deconstruct.attention.form import Flops
from deconstruct.attention.mixer import Context, Mixer
from deconstruct.attention.registry import register_mixer
from deconstruct.config import ModelConfig
from deconstruct.layers import SwiGLU
from deconstruct.types import Streams


def attention_parameters(config: ModelConfig) -> int:
    """Parameters of a standard attention block: W_Q, W_K, W_V, W_O, with biases (qwen2) or q/k norms (qwen3)."""
    d, q, kv = config.hidden_size, config.num_heads * config.head_size, config.kv_heads * config.head_size
    extra = q + 2 * kv if config.block == "qwen2" else 2 * config.head_size
    return 2 * d * q + 2 * d * kv + extra


def matched_width(config: ModelConfig) -> int:
    return max(1, round(attention_parameters(config) / (3 * config.hidden_size)))


@register_mixer
class GatedMLP(Mixer):
    name = "mlp"
    relaxes = ("token mixing",)
    documents = True  # it sees none but its own position

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs):
        self.size, self.width = config.hidden_size, matched_width(config)
        self.mlp = SwiGLU(
            self.size, self.width, std=config.init_std, dtype=config.dtype, rngs=rngs, width_axis="matched_mlp"
        )

    def __call__(self, streams: Streams, static: Streams, context: Context) -> Streams:
        return streams.map(self.mlp)

    def init_cache(self, batch: int, length: int, size: int, dtype: Any) -> Any:
        return ()

    def extend(
        self,
        h: jax.Array,
        static: jax.Array | None,
        cache: Any,
        constants: Any,
        context: Context,
        start: int | jax.Array,
    ) -> tuple[jax.Array, Any]:
        return self.mlp(h), cache

    def flops(self, batch: int, length: int) -> Flops:
        return Flops.exactly(6.0 * batch * length * self.size * self.width)

    def decode_flops(self, batch: int, length: int) -> Flops:
        return self.flops(batch, 1)

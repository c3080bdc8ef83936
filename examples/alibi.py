"""alibi: A_ij = softmax_j( q_i . k_j / sqrt(dh) - m_h (i - j) ), m_h = 2^(-8 h / heads).

Relaxes no principle: a slope for each head instead of RoPE (ALiBi, Press et al. 2022). A form in a file of one's own,
outside the package:

    deconstruct train --config=configs/quickstart.py --workdir=runs/alibi \\
        --config.extensions=examples/alibi.py --config.variant=hidden/alibi
    deconstruct evaluate --workdir=runs/alibi --extension=examples/alibi.py

It has no kernels: it trains and decodes by its definition, in time and memory L^2.
"""

import jax
import jax.numpy as jnp

import deconstruct as dc


@dc.register_form
class Alibi(dc.Form):
    name = "alibi"
    uses_rope = False
    documents = True

    def weights(self, q, k, mask):
        x = dc.logits(q, k)  # [B, heads, L, L], float32, scaled
        heads, length = x.shape[1:3]
        slopes = 2.0 ** (-8.0 * jnp.arange(1, heads + 1) / heads)
        distance = jnp.arange(length)[:, None] - jnp.arange(length)[None, :]
        x = x - slopes[None, :, None, None] * distance[None, None]
        return jax.nn.softmax(jnp.where(mask.dense(length, length), x, -jnp.inf), axis=-1)

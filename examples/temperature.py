"""temperature: A_ij = softmax_j( t_h q_i . k_j / sqrt(dh) ), one learned t_h for each head.

Relaxes no principle. A form that owns a parameter and has an option; what it has more than standard attention (one
number a head), the MLP of its block would take up, were it as much as a unit of width.

    deconstruct train --config=configs/quickstart.py --workdir=runs/temperature \\
        --config.extensions=examples/temperature.py "--config.variant=hidden/temperature(start=0.5)"
"""

import jax
import jax.numpy as jnp

import deconstruct as dc


@dc.register_form
class Temperature(dc.Form):
    name = "temperature"
    documents = True

    def __init__(self, config, rngs, *, start: float = 1.0):
        # Weight decay leaves a constant_param alone; "heads" is the axis that tensor parallelism splits.
        self.temperature = dc.constant_param(start, (config.num_heads,), ("heads",))

    def weights(self, q, k, mask):
        x = dc.logits(q, k) * self.temperature[...][None, :, None, None]
        return jax.nn.softmax(jnp.where(mask.dense(*x.shape[-2:]), x, -jnp.inf), axis=-1)

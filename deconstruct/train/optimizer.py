"""AdamW with the paper's schedule: linear warm-up, half-cosine to zero; gradients clipped by their global norm."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax

from deconstruct.config import Config
from deconstruct.model.placement import decay_mask


def make_schedule(config: Config) -> optax.Schedule:
    """Learning rate of update number `step` (from 0): the first update has 1/warmup_steps of the peak, not zero.

    A mixer stage of distillation has a schedule to itself, and what comes after it begins as a run does.
    """
    warmup = config.optimizer.warmup_steps
    end = config.optimizer.schedule_steps or config.steps
    mixers = config.distill.mixer_steps

    def one_cycle(step: jax.Array, end: int) -> jax.Array:
        rise = (step + 1.0) / max(warmup, 1)
        progress = jnp.clip((step - warmup) / max(end - warmup, 1), 0.0, 1.0)
        fall = 0.5 * (1.0 + jnp.cos(jnp.pi * progress))
        return config.learning_rate * jnp.where(step < warmup, rise, fall)

    def schedule(step: jax.Array) -> jax.Array:
        if not mixers:
            return one_cycle(step, end)
        return jnp.where(step < mixers, one_cycle(step, mixers), one_cycle(step - mixers, end - mixers))

    return schedule


def make_optimizer(config: Config) -> optax.GradientTransformation:
    settings = config.optimizer
    adamw = optax.adamw(
        make_schedule(config),
        b1=settings.beta1,
        b2=settings.beta2,
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
        mask=decay_mask(config.model),
    )
    return optax.chain(optax.clip_by_global_norm(settings.clip_norm), adamw) if settings.clip_norm else adamw

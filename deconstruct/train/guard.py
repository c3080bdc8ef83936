"""Updates that are better not made: where the loss or its gradient is not finite, or the update is a spike.

Such an update is skipped: parameters and optimizer stay as they are, and the batch is used up. The norm of the update
is watched, and not that of the gradient, because it rises before the loss does.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

WINDOW = 128  # updates whose norms are remembered


class Guard(NamedTuple):
    """What has been skipped, and what updates have been like; a part of the saved state."""

    skipped: Any  # int32 []: updates, since the run began
    in_a_row: Any  # int32 []: the last so many of them
    norms: Any  # float32 [WINDOW]: of the last updates that were made, over the learning rate, in a ring
    made: Any  # int32 []: how many have been written into it


def new_guard() -> Guard:
    zero = jnp.zeros((), jnp.int32)
    return Guard(zero, zero, jnp.zeros(WINDOW, jnp.float32), zero)


def judge(
    guard: Guard, loss: jax.Array, grad_norm: jax.Array, update_norm: jax.Array | None, spike: float
) -> tuple[jax.Array, Guard]:
    """Whether the update is to be made (bool []), and the guard after it.

    `update_norm`: of the update over its learning rate; None where spikes are not watched. A spike is more than `spike`
    times the mean of the last WINDOW updates, and is known only once there have been as many.
    """
    good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    norms, made = guard.norms, guard.made
    if update_norm is not None:
        good &= jnp.isfinite(update_norm)
        good &= (made < WINDOW) | (update_norm <= spike * jnp.mean(norms))
        norms = jnp.where(good, norms.at[made % WINDOW].set(update_norm), norms)
        made = made + good
    return good, Guard(guard.skipped + ~good, jnp.where(good, 0, guard.in_a_row + 1), norms, made)

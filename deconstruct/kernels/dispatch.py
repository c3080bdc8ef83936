"""Which program computes a form: resolved once, logged once, never changed in silence.

    impl = auto | reference | xla | cudnn | pallas

`auto` is xla on every platform today. An explicit choice that cannot run here is the user's to mend and says so.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Protocol

import jax
import jax.numpy as jnp

from deconstruct.kernels import reference, self_gate, softmax, taylor, taylor_diagonal
from deconstruct.kernels.mask import CAUSAL, Mask
from deconstruct.types import UserError


class Kernel(Protocol):
    """(q, k, v) -> out under a mask; one that cannot serve a mask raises ValueError, which names what it cannot."""

    def __call__(self, q: jax.Array, k: jax.Array, v: jax.Array, *, mask: Mask = CAUSAL) -> jax.Array: ...


IMPLS = ("auto", "reference", "xla", "cudnn", "pallas")
CUDNN_HEAD_DIM = 128

_log = logging.getLogger(__name__)


def _reference(weights: Callable[..., jax.Array]) -> Kernel:
    def kernel(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask = CAUSAL) -> jax.Array:
        return reference.apply_weights(weights(q, k, mask), v)

    return kernel


def _causal_only(form: str, kernel: Callable[..., jax.Array]) -> Kernel:
    def checked(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask = CAUSAL) -> jax.Array:
        if not mask.is_causal:
            raise ValueError(f"'{form}' serves neither documents nor a window")
        return kernel(q, k, v)

    return checked


def _self_gate(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask = CAUSAL) -> jax.Array:
    return self_gate.self_gate_attention(q, k, v, mask=mask)[0]


def _cudnn_softmax(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask = CAUSAL) -> jax.Array:
    if not mask.is_causal:
        raise UserError("impl 'cudnn' serves neither documents nor a window; use impl 'xla'")
    if q.shape[0] != v.shape[0]:
        raise UserError(
            f"impl 'cudnn' needs q, k and v of one batch, got {q.shape[0]} and {v.shape[0]}: "
            "a form over a fixed source runs with impl 'xla', which forms the shared map once"
        )
    _check_cudnn_inputs(q.dtype, q.shape[-1])
    return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")


def _check_cudnn_inputs(dtype: jax.typing.DTypeLike | None, head_dim: int | None) -> None:
    if dtype is not None and jnp.dtype(dtype) not in (jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)):
        raise UserError(f"impl 'cudnn' computes in bfloat16 or float16, not {jnp.dtype(dtype).name}; use impl 'xla'")
    if head_dim is not None and (head_dim % 8 or head_dim > CUDNN_HEAD_DIM):
        raise UserError(
            f"impl 'cudnn' needs a head dimension that is a multiple of 8 and at most {CUDNN_HEAD_DIM}, "
            f"not {head_dim}; use impl 'xla'"
        )


_KERNELS: dict[str, dict[str, Kernel]] = {
    "softmax": {
        "reference": _reference(reference.softmax_weights),
        "xla": softmax.softmax_attention,
        "cudnn": _cudnn_softmax,
    },
    "taylor": {"reference": _reference(reference.taylor_weights), "xla": taylor.taylor_attention},
    "taylor_diagonal": {
        "reference": _causal_only(
            "taylor_diagonal", lambda q, k, v: reference.apply_weights(reference.taylor_diagonal_weights(q, k), v)
        ),
        "xla": _causal_only("taylor_diagonal", lambda q, k, v: taylor_diagonal.taylor_diagonal_attention(q, k, v)[0]),
    },
    "self_gate": {"reference": _reference(reference.self_gate_weights), "xla": _self_gate},
}


def resolve(
    form: str,
    impl: str = "auto",
    platform: str | None = None,
    dtype: jax.typing.DTypeLike | None = None,
    head_dim: int | None = None,
) -> Kernel:
    """The kernel (q, k, v) -> out of a form: q [Bq, L, H, dh], k [Bq, L, K, dh], v [Bv, L, K, dv] to [Bv, L, H, dv].

    It takes `mask` as a keyword too: documents and windows, where the form and the impl serve them.

    `platform` (cpu, gpu, tpu) is that of the default backend unless given. `dtype` and `head_dim`, where known, are
    checked now; cudnn checks its inputs again when called, and there also that q and v have one batch. UserError for
    an impl that is not known or cannot run here, and for a form that has no kernels (a form of the user's own brings
    its own fast path, and does not come here).
    """
    if impl not in IMPLS:
        raise UserError(f"impl '{impl}' is not known; there are {', '.join(IMPLS)}")
    if form not in _KERNELS:
        raise UserError(f"no kernels for form '{form}'; there are kernels for {', '.join(_KERNELS)}")
    platform = {"cuda": "gpu", "rocm": "gpu"}.get(platform or jax.default_backend(), platform or jax.default_backend())
    choice = "xla" if impl == "auto" else impl
    kernels = _KERNELS[form]
    if choice not in kernels:
        raise UserError(f"form '{form}' has no impl '{impl}' yet; it has auto, {', '.join(kernels)}")
    if choice == "cudnn":
        if platform != "gpu":
            raise UserError(f"impl 'cudnn' needs an NVIDIA GPU, and this is {platform}; use impl 'auto' or 'xla'")
        _check_cudnn_inputs(dtype, head_dim)
    _announce(form, choice)
    return kernels[choice]


@functools.cache
def _announce(form: str, choice: str) -> None:
    _log.info("form %s runs with impl %s", form, choice)

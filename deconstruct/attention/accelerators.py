"""What programs of particular hardware cannot do, said once, and the kernels of a form made for it.

Pallas takes a while to import: the modules with kernels are named here, and imported when one is called.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable

import jax

from deconstruct.attention.form import Kernel, Site
from deconstruct.kernels.gpu import limits
from deconstruct.kernels.mask import Mask
from deconstruct.kernels.per_device import mix_per_device

TPU_HEAD_DIM = 256
CUDNN_HEAD_DIM = 128
Refuses = Callable[[Site], str | None]
SMALL_VMEM = ("TPU v2", "TPU v3", "TPU v4")
HOPPER = ("H100", "H200", "H800", "H20")


def tpu(where: str, like: Kernel, refuses: Refuses | None = None, window: int | None = None) -> Kernel:
    """A kernel for TPUs, "module:function" in `deconstruct.kernels.tpu`, on each device's own part of the arrays.

    It decodes as `like` does. What it `refuses` comes on top of what all of them do.
    """

    def mix(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, **read: jax.Array) -> jax.Array:
        kernel = _imported("tpu", where)

        def on_one_device(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, **read: jax.Array) -> jax.Array:
            return kernel(q, k, v, mask=mask, **read)

        return mix_per_device(on_one_device, q, k, v, narrowed(mask, window), **read)

    return Kernel(mix, like.extend, like.init_cache, _either(_tpu_refuses, refuses), "tpu")


def hopper(where: str, like: Kernel, refuses: Refuses | None = None, documents: bool = False) -> Kernel:
    """The same for NVIDIA's H100 and its like, "module:function" in `deconstruct.kernels.gpu`.

    Where it takes `documents` it is given the mask.
    """

    def mix(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, **read: jax.Array) -> jax.Array:
        kernel = _imported("gpu", where)

        def on_one_device(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask, **read: jax.Array) -> jax.Array:
            return kernel(q, k, v, mask=mask, **read) if documents else kernel(q, k, v, **read)

        return mix_per_device(on_one_device, q, k, v, mask, **read)

    refuses_here = _hopper_refuses if documents else _either(_hopper_refuses, _one_document)
    return Kernel(mix, like.extend, like.init_cache, _either(refuses_here, refuses), "gpu")


def _either(first: Refuses, second: Refuses | None) -> Refuses:
    return first if second is None else lambda site: first(site) or second(site)


def _imported(folder: str, where: str) -> Callable[..., jax.Array]:
    module, name = where.split(":")
    return getattr(importlib.import_module(f"deconstruct.kernels.{folder}.{module}"), name)


def cudnn(like: Kernel, window: int | None = None) -> Kernel:
    """cuDNN's attention, through JAX, on NVIDIA GPUs. It decodes as `like` does."""

    def mix(q: jax.Array, k: jax.Array, v: jax.Array, mask: Mask) -> jax.Array:
        size = narrowed(mask, window).window
        back = None if size is None else (size - 1, 0)
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=back, implementation="cudnn")

    return Kernel(mix, like.extend, like.init_cache, _cudnn_refuses, "gpu")


def narrowed(mask: Mask, window: int | None) -> Mask:
    return mask if window is None else mask.narrowed(window)


def _cudnn_refuses(site: Site) -> str | None:
    if site.dtype not in ("bfloat16", "float16"):
        return f"computes with it in bfloat16 or float16, not {site.dtype}; use xla, or config.model.dtype=bfloat16"
    if site.head_dim % 8 or site.head_dim > CUDNN_HEAD_DIM:
        return (
            f"needs heads of a width that is a multiple of 8 and at most {CUDNN_HEAD_DIM} for it, not {site.head_dim}; "
            "use xla"
        )
    if site.shared:
        return "over a fixed source has one map for the batch, and cuDNN wants one for each sequence; use xla"
    if reason := _one_document(site):
        return reason
    if site.platform == "gpu" and jax.default_backend() != "gpu":
        return "cannot be compiled with it for a GPU that is not here, as cuDNN is not; use auto or xla"
    if site.platform == "gpu" and not _is_ampere_or_later():
        return (
            f"needs an NVIDIA GPU of compute capability 8.0 or more for it, and this is {site.device}; use auto or xla"
        )
    return None


def _is_ampere_or_later() -> bool:
    """AMD's GPUs, which JAX calls gpu as well, have names for capabilities."""
    try:
        return float(jax.devices()[0].compute_capability) >= 8
    except (AttributeError, ValueError):
        return False


def _hopper_refuses(site: Site) -> str | None:
    if site.device is not None and not any(name in site.device for name in HOPPER):
        return f"needs a Hopper GPU (H100, H200) for it, and this is {site.device}; use auto or xla"
    reason = limits.refuses(site.dtype, site.head_dim)
    return reason and f"{reason}; use xla"


def _one_document(site: Site) -> str | None:
    if site.documents:
        return "does not keep to the borders of documents with it (config.document_mask=true); use xla"
    return None


def _tpu_refuses(site: Site) -> str | None:
    if site.device is not None and site.device.startswith(SMALL_VMEM):
        return f"needs more memory on the chip for it than the 16 MiB of {site.device} (v5e and later); use auto or xla"
    if site.dtype not in ("bfloat16", "float32"):
        return f"computes with it in bfloat16 or float32, not {site.dtype}; use xla"
    if site.head_dim % 16 or site.head_dim > TPU_HEAD_DIM:
        return (
            f"needs heads of a width that is a multiple of 16 and at most {TPU_HEAD_DIM} for it, not {site.head_dim}; "
            "use xla"
        )
    return None


def one_map_for_all(site: Site) -> str | None:
    """What kernels for a map shared by a batch refuse."""
    return None if site.shared else "has it for one map that serves the whole batch; use auto, cudnn or xla"


def one_map_a_sequence(site: Site) -> str | None:
    """What kernels that know no map shared by a batch refuse."""
    if site.shared:
        return "over a fixed source has one map for the batch, and it wants one for each sequence; use xla"
    return None

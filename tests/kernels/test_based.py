"""Against flash-linear-attention's plain PyTorch functions. Run by `make proof`."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from deconstruct.kernels import reference, taylor
from tests.need import need

need("torch", "einops", "fla", extra="peers")

import torch  # noqa: E402

pytestmark = pytest.mark.proof
LENGTH, CHUNK = 256, 64


def based():
    """Its file of plain functions alone: the package imports Triton, which wants a GPU."""
    package = importlib.util.find_spec("fla").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location("based", Path(package) / "ops" / "based" / "naive.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def their_parallel(q, k, v):
    """Normalised by ourselves: its own division adds 1e-6 to the sum."""
    ones = torch.ones_like(v[..., :1])
    return based().naive_parallel_based(q, k, v, use_norm=False) / based().naive_parallel_based(
        q, k, ones, use_norm=False
    )


def their_chunks(q, k, v):
    """It always divides by the sum plus 1e-6; the quotient with what it makes of ones is free of that."""
    ones = torch.ones_like(v[..., :1])
    return based().naive_chunk_based(q, k, v, CHUNK) / based().naive_chunk_based(q, k, ones, CHUNK)


@pytest.mark.parametrize("scale", [1.0, 10.0])
@pytest.mark.parametrize("theirs", [their_parallel, their_chunks])
def test_taylor_is_based(theirs, scale):
    """Values in float64 against the definition, and both fast paths in float32."""
    q, k, v, _ = oracle.inputs((2, 2, LENGTH, 3, 3, 8, 6), seed=21)
    q = scale * q
    # Heads stand before positions there.
    want = theirs(*(torch.from_numpy(x).transpose(1, 2) for x in (q, k, v))).transpose(1, 2).numpy()
    with jax.enable_x64(True):
        weights = reference.taylor_weights(jnp.asarray(q), jnp.asarray(k))
        oracle.assert_near(np.asarray(reference.apply_weights(weights, jnp.asarray(v))), want, 1e-12)
    q, k, v = (jnp.asarray(x, jnp.float32) for x in (q, k, v))
    for mix in (taylor.taylor_quadratic, lambda *x: taylor.taylor_chunked(*x, chunk=48)[0]):
        oracle.assert_near(np.asarray(jax.jit(mix)(q, k, v)), want, oracle.FLOAT32)

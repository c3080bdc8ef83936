"""Against flash-linear-attention's plain PyTorch recurrences. Run by `make proof`."""

import importlib.util
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from deconstruct.kernels import gated_delta, gated_linear, recurrences, reference
from tests.need import need

need("torch", "einops", "fla", extra="peers")

import torch  # noqa: E402

pytestmark = pytest.mark.proof

SHAPE = (2, 2, 100, 3, 3, 8, 6)


def naive(folder):
    """A file of plain functions alone: the package imports Triton, which wants a GPU."""
    package = importlib.util.find_spec("fla").submodule_search_locations[0]
    spec = importlib.util.spec_from_file_location(folder, Path(package) / "ops" / folder / "naive.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def their_gla(q, k, v, decay):
    return naive("gla").naive_recurrent_gla(q, k, v, decay)[0]


def their_delta(q, k, v, decay, beta):
    """With what its layer switches on, use_qk_l2norm_in_kernel, as its l2norm has it: x / sqrt(sum x^2 + 1e-6)."""
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    return naive("gated_delta_rule").naive_recurrent_gated_delta_rule(q, k, v, beta=beta, g=decay)[0]


def their_chunked_delta(q, k, v, decay, beta):
    q, k = (x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6) for x in (q, k))
    return naive("gated_delta_rule").naive_chunk_gated_delta_rule(q, k, v, beta=beta, g=decay)[0]


def our_gla(q, k, v, decay):
    return gated_linear.gated_linear_attention(q, k, v, log_decay=decay)[0]


def our_delta(q, k, v, decay, beta):
    return gated_delta.gated_delta_attention(q, k, v, log_decay=decay, beta=beta)[0]


def defined_gla(q, k, v, decay):
    return reference.apply_weights(recurrences.gated_linear_weights(q, k, log_decay=decay), v)


def defined_delta(q, k, v, decay, beta):
    return reference.apply_weights(recurrences.gated_delta_weights(q, k, log_decay=decay, beta=beta), v)


@pytest.mark.parametrize("scale", [0.1, 3.0])
@pytest.mark.parametrize(
    ("theirs", "ours", "defined"),
    [
        (their_gla, our_gla, defined_gla),
        (their_delta, our_delta, defined_delta),
        (their_chunked_delta, our_delta, defined_delta),
    ],
    ids=["gla", "delta", "chunked_delta"],
)
def test_values_and_gradients(theirs, ours, defined, scale):
    """Theirs computes in float32 whatever it is given, so float64 of ours is compared at float32's precision too.
    Decays of about `scale` a step."""
    q, k, v, g = oracle.inputs(SHAPE, seed=22)
    rng = np.random.default_rng(23)
    gates = (-scale * np.log1p(np.exp(rng.normal(size=k.shape if theirs is their_gla else k.shape[:3]))),)
    if theirs is not their_gla:
        gates += (1 / (1 + np.exp(-rng.normal(size=k.shape[:3]))),)
    arrays = tuple(x.astype(np.float32) for x in (q, k, v, *gates))
    given = [torch.from_numpy(x).requires_grad_() for x in arrays]
    out = theirs(*given)
    out.backward(torch.from_numpy(g.astype(np.float32)))
    want = tuple(x.detach().numpy() for x in (out, *(x.grad for x in given)))

    # Their chunks subtract sums of some 200 of each other, which float32 knows to 200 x 2^-24 = 1.2e-5.
    tolerance = 10 * oracle.FLOAT32 if theirs is their_chunked_delta else oracle.FLOAT32

    def both(function):
        out, pull = jax.vjp(function, *(jnp.asarray(x) for x in cast))
        return tuple(np.asarray(x) for x in (out, *pull(jnp.asarray(g, out.dtype))))

    cast = arrays
    oracle.assert_all_near(both(jax.jit(ours)), want, tolerance)
    with jax.enable_x64(True):
        cast = tuple(x.astype(np.float64) for x in arrays)
        oracle.assert_all_near(both(jax.jit(ours)), want, tolerance)
        oracle.assert_all_near(both(jax.jit(defined)), want, tolerance)

"""Which program `auto` is, where; and that one asked for by name is that one or an error."""

import pytest
from flax import nnx

from deconstruct.attention.form import Site
from deconstruct.attention.registry import FORMS
from deconstruct.types import UserError
from tests.tiny import tiny_config

H100, A100, MI300 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-40GB", "AMD Instinct MI300X"


def make(name, impl="auto"):
    form = FORMS[name](tiny_config().model, nnx.Rngs(0))
    form.impl = impl
    return form


def site(platform, device, dtype="bfloat16", head_dim=64, shared=False, documents=False):
    return Site(dtype, head_dim, shared, documents, platform, device)


@pytest.mark.parametrize("name", FORMS)
def test_xla_wherever_no_kernel_can_run(name):
    places = [site("cpu", "cpu"), site("gpu", A100), site("gpu", MI300), site("tpu", "TPU v4")]
    places += [site("gpu", H100, dtype="float32"), site("tpu", "TPU v5 lite", head_dim=24)]
    assert {make(name).resolved_impl(place) for place in places} == {"xla"}


@pytest.mark.parametrize(
    ("name", "place", "impl"),
    [
        ("softmax", site("tpu", "TPU v5 lite"), "splash"),
        ("softmax", site("tpu", "TPU v5 lite", shared=True), "pallas_tpu"),
        ("softmax", site("tpu", "TPU v5 lite", documents=True), "splash"),
        ("window", site("tpu", "TPU v6 lite"), "splash"),
        ("taylor", site("tpu", "TPU v5", dtype="float32"), "pallas_tpu"),
        ("gated_delta", site("tpu", "TPU7x", documents=True), "pallas_tpu"),
        ("taylor_diagonal", site("tpu", "TPU v5"), "xla"),
        ("taylor", site("gpu", H100), "pallas_gpu"),
        ("self_gate", site("gpu", H100, head_dim=128), "pallas_gpu"),
        ("softmax", site("gpu", H100, shared=True), "pallas_gpu"),
        ("softmax", site("gpu", H100), "xla"),  # a GPU that is not here: cuDNN is not, either
        ("taylor", site("gpu", H100, documents=True), "xla"),
        ("gated_linear", site("gpu", H100), "pallas_gpu"),
        ("gated_delta", site("gpu", H100, head_dim=128, documents=True), "pallas_gpu"),
    ],
)
def test_the_kernel_made_for_a_place(name, place, impl):
    assert make(name).resolved_impl(place) == impl


@pytest.mark.parametrize(
    ("name", "impl", "place", "reason"),
    [
        ("softmax", "splash", site("cpu", "cpu"), "needs a TPU for it, and this is cpu"),
        ("taylor", "pallas_gpu", site("gpu", A100), "needs a Hopper GPU .* and this is NVIDIA A100"),
        (
            "taylor",
            "pallas_gpu",
            site("gpu", H100, head_dim=32),
            "needs heads of a width of 64 or 128, not 32; use xla",
        ),
        ("gated_delta", "pallas_gpu", site("gpu", H100, dtype="float32"), "computes in bfloat16, not float32; use xla"),
        ("self_gate", "pallas_gpu", site("gpu", H100, documents=True), "does not keep to the borders of documents"),
        ("softmax", "pallas_gpu", site("gpu", H100), "has it for one map that serves the whole batch"),
        ("softmax", "splash", site("tpu", "TPU v5", shared=True), "over a fixed source has one map for the batch"),
        ("self_gate", "pallas_tpu", site("tpu", "TPU v4"), "needs more memory on the chip .* 16 MiB of TPU v4"),
        ("self_gate", "pallas_tpu", site("tpu", "TPU v5", dtype="float16"), "computes with it in bfloat16 or float32"),
        ("self_gate", "cudnn", site("gpu", H100), "has no such program; it has auto, pallas_gpu, pallas_tpu, xla, ref"),
    ],
)
def test_what_is_asked_for_and_cannot_run(name, impl, place, reason):
    with pytest.raises(UserError, match=rf"config.model.impl={impl}: form '{name}' .*{reason}"):
        make(name, impl).resolved_impl(place)

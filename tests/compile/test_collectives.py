"""Collectives read off HLO: of a real program with a loop, and of the shapes that compilers for TPUs and GPUs write."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from deconstruct.compile.hlo import Sent, collectives
from deconstruct.config import MeshConfig
from deconstruct.distributed.mesh import make_mesh


def test_of_a_real_program():
    """Six weights [64, 64], split over eight devices, gathered one after the other by a loop; then one sum."""
    mesh = make_mesh(MeshConfig(data=1, fsdp=8))
    weights = jax.ShapeDtypeStruct((6, 64, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec(None, "fsdp")))
    x = jax.ShapeDtypeStruct((16, 64), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("fsdp")))

    def run(weights, x):
        def layer(x, w):
            w = jax.lax.with_sharding_constraint(w, PartitionSpec())
            return jnp.tanh(x @ w), None

        return jax.lax.scan(layer, x, weights)[0].sum()

    with jax.set_mesh(mesh):
        text = jax.jit(run).lower(weights, x).compile().as_text()
    assert collectives(text) == {"all-gather": Sent(6, 6 * 64 * 64 * 4), "all-reduce": Sent(1, 4)}


TPU = """
HloModule jit_step, is_scheduled=true

%fused.1 (p: bf16[32,64]) -> (bf16[32,64], bf16[128,64]) {
  %p = bf16[32,64]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[128,64]{1,0:T(8,128)(2,1)S(1)} all-gather(%p), channel_id=7, dimensions={0}
  ROOT %c = (bf16[32,64]{1,0}, bf16[128,64]{1,0:T(8,128)(2,1)S(1)}) custom-call(%all-gather.1), custom_call_target="x"
}

%fused.2 (q: bf16[32,64]) -> bf16[128,64] {
  %q = bf16[32,64]{1,0} parameter(0)
  ROOT %all-gather.2 = bf16[128,64]{1,0} all-gather(%q), channel_id=7, dimensions={0}
}

%all-reduce-scatter.3 (i: f32[128,8]) -> f32[32,8] {
  %i = f32[128,8]{1,0} parameter(0)
  %all-reduce.4 = f32[128,8]{1,0} all-reduce(%i), channel_id=2, to_apply=%add
  ROOT %s = f32[32,8]{1,0} dynamic-slice(%all-reduce.4), dynamic_slice_sizes={32,8}
}

%body (a: (s32[], bf16[32,64])) -> (s32[], bf16[32,64]) {
  %a = (s32[], bf16[32,64]{1,0}) parameter(0)
  %g = bf16[32,64]{1,0} get-tuple-element(%a), index=1
  %f1 = (bf16[32,64]{1,0}, bf16[128,64]{1,0}) fusion(%g), kind=kCustom, calls=%fused.1
  %f2 = bf16[128,64]{1,0} fusion(%g), kind=kOutput, calls=%fused.2
  ROOT %t = (s32[], bf16[32,64]{1,0}) tuple(%g, %g)
}

%condition (b: (s32[], bf16[32,64])) -> pred[] {
  %constant.9 = s32[]{:T(128)} constant(24)
  %b = (s32[], bf16[32,64]{1,0}) parameter(0)
  %n = s32[]{:T(128)} get-tuple-element(%b), index=0
  ROOT %lt = pred[]{:T(512)} compare(%n, %constant.9), direction=LT
}

%unused (u: f32[8]) -> f32[8] {
  %u = f32[8]{0} parameter(0)
  ROOT %r = f32[8]{0} all-reduce(%u), channel_id=99, to_apply=%add
}

ENTRY %main (x: (s32[], bf16[32,64]), y: f32[128,8]) -> f32[32,8] {
  %x = (s32[], bf16[32,64]{1,0}) parameter(0)
  %y = f32[128,8]{1,0} parameter(1)
  %w = (s32[], bf16[32,64]{1,0}) while(%x), condition=%condition, body=%body, metadata={op_name="jit(step)/while"}
  ROOT %z = f32[32,8]{1,0} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.3
}
"""

GPU = """
HloModule jit_step

%body (a: (s32[], f32[32,8])) -> (s32[], f32[32,8]) {
  %a = (s32[], f32[32,8]{1,0}) parameter(0)
  %g = f32[32,8]{1,0} get-tuple-element(%a), index=1
  %start = ((f32[32,8]{1,0}, f32[32,8]{1,0}), (f32[128,8]{1,0}, f32[128,8]{1,0})) all-gather-start(%g, %g), channel_id=1
  %done = (f32[128,8]{1,0}, f32[128,8]{1,0}) all-gather-done(%start)
  ROOT %t = (s32[], f32[32,8]{1,0}) tuple(%g, %g)
}

ENTRY %main (x: (s32[], f32[32,8]), y: bf16[64]) -> f32[32,8] {
  %x = (s32[], f32[32,8]{1,0}) parameter(0)
  %y = bf16[64]{0} parameter(1)
  %r = bf16[64]{0} all-reduce-start(%y), channel_id=3, to_apply=%add
  %s = ((bf16[64]{0}), bf16[16]{0}) reduce-scatter-start(%y), channel_id=4, dimensions={0}
  %w = (s32[], f32[32,8]{1,0}) while(%x), condition=%c, body=%body, backend_config={"known_trip_count":{"n":"28"}}
  ROOT %o = f32[32,8]{1,0} get-tuple-element(%w), index=1
}
"""


@pytest.mark.parametrize(
    ("text", "found"),
    [
        # Two fused operations of one channel are one gather; the all-reduce of a scattered sum is a reduce-scatter.
        (TPU, {"all-gather": Sent(24, 24 * 128 * 64 * 2), "reduce-scatter": Sent(1, 128 * 8 * 4)}),
        (
            GPU,
            {"all-gather": Sent(28, 28 * 2 * 128 * 8 * 4), "all-reduce": Sent(1, 128), "reduce-scatter": Sent(1, 128)},
        ),
        ("ENTRY %main (x: f32[2]) -> f32[2] {\n  ROOT %x = f32[2]{0} parameter(0)\n}\n", {}),
    ],
)
def test_as_compilers_write_them(text, found):
    assert collectives(text) == found

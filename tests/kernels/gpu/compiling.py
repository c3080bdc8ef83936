"""Compiles the GPU kernels of one path, forward and backward, for an H100 that is not here: `compiling.py PATH DIM`.

A line of JSON for each kernel: what ptxas says of its registers and spills, and its shared memory in bytes.
"""

import json
import os
import re
import sys
import tempfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from deconstruct.compile.topology import absent
from deconstruct.kernels.gpu import gated_delta, gated_linear, pairwise, self_gate

LENGTH, HEADS, KV_HEADS, BATCH = 1000, 4, 2, 8


def taylor_shared(q, k, v):
    return pairwise.shared_attention(q, k, v, pairwise.TAYLOR)


# The batch of queries and keys, and the mix.
PATHS = {
    "taylor": (BATCH, pairwise.taylor_attention),
    "taylor_shared": (1, taylor_shared),
    "softmax_shared": (1, pairwise.shared_attention),
    "self_gate": (BATCH, self_gate.self_gate_attention),
    "self_gate_shared": (1, self_gate.self_gate_attention),
    "gated_linear": (BATCH, gated_linear.gated_linear_attention),
    "gated_delta": (BATCH, gated_delta.gated_delta_attention),
}
# What a path reads beside q, k and v, float32: names, and how many axes of the keys.
READS = {"gated_linear": {"log_decay": 4}, "gated_delta": {"log_decay": 3, "beta": 3}}


def compile_for_h100(path, dim, dumps):
    os.environ |= {"MOSAIC_GPU_DUMP_TO": dumps, "MOSAIC_GPU_DUMP_PTXAS": "1"}
    mesh = jax.sharding.Mesh(np.array(absent("h100:1x1x1").devices), ("device",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    qk_batch, mix = PATHS[path]

    def program(q, k, v, read, g):
        out, pull = jax.vjp(lambda q, k, v, read: mix(q, k, v, **read), q, k, v, read)
        return out, pull(g)

    sizes = ((qk_batch, HEADS), (qk_batch, KV_HEADS), (BATCH, KV_HEADS), (BATCH, HEADS))
    q, k, v, g = (jax.ShapeDtypeStruct((b, LENGTH, h, dim), jnp.bfloat16, sharding=sharding) for b, h in sizes)
    read = {
        name: jax.ShapeDtypeStruct(k.shape[:axes], jnp.float32, sharding=sharding)
        for name, axes in READS.get(path, {}).items()
    }
    jax.jit(program).lower(q, k, v, read, g).compile()


def found(log):
    said, passes = log.read_text(), log.with_suffix(".mlir-passes.log").read_text()
    return {
        "kernel": log.stem.rpartition("_")[0],
        "architecture": re.search(r"for '(\w+)'", said)[1],
        "registers": int(re.search(r"Used (\d+) registers", said)[1]),
        "spilled": sum(int(size) for size in re.findall(r"(\d+) bytes spill", said)),
        "shared_memory": int(re.search(r"dynamic_shared_memory_size %c(\d+)_i32", passes)[1]),
    }


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as dumps:
        compile_for_h100(sys.argv[1], int(sys.argv[2]), dumps)
        for log in sorted(Path(dumps).glob("*.ptxas")):
            print(json.dumps(found(log)))

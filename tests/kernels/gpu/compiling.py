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
from deconstruct.kernels.gpu import pairwise, self_gate
from deconstruct.kernels.gpu.walk import CHUNK, walk

LENGTH, HEADS, KV_HEADS, BATCH, CHUNKS = 1000, 4, 2, 8, 5


def taylor_shared(q, k, v):
    return pairwise.shared_attention(q, k, v, pairwise.TAYLOR)


def plain_walk(decay, writes, values):
    return walk(CHUNKS, decay, None, writes, values)


def corrected_walk(decay, reads, writes, values):
    return walk(CHUNKS, decay, reads, writes, values)


# The batch of queries and keys, and the mix; of the gated forms the walk alone, as the rest is XLA's.
PATHS = {
    "taylor": (BATCH, pairwise.taylor_attention),
    "taylor_shared": (1, taylor_shared),
    "softmax_shared": (1, pairwise.shared_attention),
    "self_gate": (BATCH, self_gate.self_gate_attention),
    "self_gate_shared": (1, self_gate.self_gate_attention),
    "plain_walk": (BATCH, plain_walk),
    "corrected_walk": (BATCH, corrected_walk),
}


def shapes(path, dim):
    qk_batch, mix = PATHS[path]
    if mix not in (plain_walk, corrected_walk):
        return [(b, LENGTH, h, dim) for b, h in ((qk_batch, HEADS), (qk_batch, KV_HEADS), (BATCH, KV_HEADS))]
    rows = (CHUNKS * BATCH, KV_HEADS)
    return [(*rows, dim)] + [(*rows, CHUNK, dim)] * (3 if mix is corrected_walk else 2)


def compile_for_h100(path, dim, dumps):
    os.environ |= {"MOSAIC_GPU_DUMP_TO": dumps, "MOSAIC_GPU_DUMP_PTXAS": "1"}
    mesh = jax.sharding.Mesh(np.array(absent("h100:1x1x1").devices), ("device",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    _, mix = PATHS[path]

    def program(*arrays):
        out, pull = jax.vjp(mix, *arrays)
        return pull(out)

    # Decays, the only ones of three axes, are float32.
    arrays = [
        jax.ShapeDtypeStruct(shape, jnp.float32 if len(shape) == 3 else jnp.bfloat16, sharding=sharding)
        for shape in shapes(path, dim)
    ]
    jax.jit(program).lower(*arrays).compile()


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

"""Eight virtual CPU devices for every test, set before JAX starts; rank promotion raises.

Compiling dominates these tests. The flags make it several times faster and leave the operations what they are.
"""

import os

import jax

flags = ["--xla_backend_optimization_level=0"]
if jax.__version_info__ < (0, 11):  # later ones do not know it
    flags.append("--xla_cpu_use_fusion_emitters=false")
# Read when the first device is asked for; the environment also reaches the processes that tests start.
os.environ["XLA_FLAGS"] = " ".join(flags)
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")

"""Eight virtual CPU devices for every test, set before JAX starts; rank promotion raises."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
# Compiling dominates these tests. LLVM's lowest level is several times faster, and leaves XLA's operations as they are.
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")

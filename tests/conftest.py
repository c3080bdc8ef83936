"""Eight virtual CPU devices for every test, set before JAX starts; rank promotion raises."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAX_NUM_CPU_DEVICES"] = "8"
os.environ["XLA_FLAGS"] = (
    "--xla_backend_optimization_level=0"  # compiling dominates: four times faster, same operations
)

import jax

jax.config.update("jax_numpy_rank_promotion", "raise")

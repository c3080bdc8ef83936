"""Kernels for NVIDIA GPUs of compute capability 9.0 (Hopper), in Pallas' Mosaic GPU.

`pairwise.taylor_attention`, `pairwise.shared_attention` and `self_gate.self_gate_attention` take what XLA's programs of
these forms take, of one document and without a window, and have gradients; `limits.refuses` says where they cannot run.
No sum depends on the order in which blocks happen to run: the same inputs give the same bits.
"""

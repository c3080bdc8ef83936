"""Kernels for NVIDIA GPUs of compute capability 9.0 (Hopper), in Pallas' Mosaic GPU.

`pairwise.taylor_attention`, `pairwise.shared_attention`, `self_gate.self_gate_attention`, and with documents
`gated_linear.gated_linear_attention` and `gated_delta.gated_delta_attention` take what XLA's programs of these forms
take, without a window, and have gradients; `limits.refuses` says where they cannot run. No sum depends on the order in
which blocks happen to run: the same inputs give the same bits.
"""

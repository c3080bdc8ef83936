"""Kernels for NVIDIA GPUs of compute capability 9.0 (Hopper), in Pallas' Mosaic GPU."""

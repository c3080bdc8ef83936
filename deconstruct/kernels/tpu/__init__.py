"""Kernels for TPUs (Pallas, Mosaic): pure functions with gradients of their own, on the axes of `kernels.grouped`."""

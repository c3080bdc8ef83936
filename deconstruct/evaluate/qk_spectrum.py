"""The bilinear form of a head, W_Q W_K^T [d, d] of rank head_dim at most, by its spectrum. Positions and biases are
left out: it says what the projections alone let a query look for."""

from __future__ import annotations

import numpy as np


def singular_values(w_q: np.ndarray, w_k: np.ndarray) -> np.ndarray:
    """W_Q [d, heads, head_dim] and W_K [d, kv_heads, head_dim] -> [heads, head_dim], falling, in float64."""
    values = []
    for q, k in _heads(w_q, w_k):
        # W_Q W_K^T = Q_q R_q R_k^T Q_k^T: a product of orthonormal bases around a small matrix.
        values.append(np.linalg.svd(np.linalg.qr(q).R @ np.linalg.qr(k).R.T, compute_uv=False))
    return np.stack(values)


def eigenvalues(w_q: np.ndarray, w_k: np.ndarray) -> np.ndarray:
    """Those of W_Q W_K^T that need not be zero, complex128 [heads, head_dim]: it shares them with W_K^T W_Q."""
    return np.stack([np.linalg.eigvals(k.T @ q) for q, k in _heads(w_q, w_k)])


def effective_rank(values: np.ndarray) -> np.ndarray:
    """exp of the entropy of singular values over their sum (Roy & Vetterli 2007): [..., n] -> [...]. At most n."""
    p = values / values.sum(-1, keepdims=True)
    return np.exp(-np.sum(p * np.log(np.where(p > 0, p, 1)), axis=-1))


def _heads(w_q: np.ndarray, w_k: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
    """Each query head's own projections, float64 [d, head_dim]."""
    groups = w_q.shape[1] // w_k.shape[1]
    w_q, w_k = w_q.astype(np.float64), w_k.astype(np.float64)
    return [(w_q[:, head], w_k[:, head // groups]) for head in range(w_q.shape[1])]

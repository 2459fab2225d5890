"""PaLM (arXiv 2204.02311, section 2) in plain float64 numpy, one sequence and one head at a time."""

from __future__ import annotations

from typing import Any

import numpy as np


def logits(params: Any, tokens: np.ndarray, *, prefix: int = 0) -> np.ndarray:
    """[T, V] of one sequence, whose first `prefix` tokens see one another; `params` is Palm's unscanned tree."""
    params = _float64(params)
    table = params["token_embedder"]["embedding"]  # [V, d]
    x = table[tokens]  # [T, d]
    for i in range(sum(name.startswith("layers_") for name in params)):
        x = x + _block(params[f"layers_{i}"], x, prefix)
    return _norm(x, params["final_norm"]["scale"]) @ table.T / np.sqrt(table.shape[1])


def _block(block: Any, x: np.ndarray, prefix: int) -> np.ndarray:
    normed = _norm(x, block["norm"]["scale"])
    return _attention(block["attention"], normed, prefix) + _mlp(block["mlp"], normed)


def _mlp(mlp: Any, x: np.ndarray) -> np.ndarray:
    gate = x @ mlp["wi_0"]["kernel"]
    return (gate / (1 + np.exp(-gate)) * (x @ mlp["wi_1"]["kernel"])) @ mlp["wo"]["kernel"]


def _attention(attention: Any, x: np.ndarray, prefix: int) -> np.ndarray:
    kernels = {name: part["kernel"] for name, part in attention.items()}
    T, (_, heads, width) = len(x), kernels["query"].shape
    key, value = _rotated(x @ kernels["key"]), x @ kernels["value"]  # [T, h]
    sees = np.tril(np.ones((T, T), bool))
    sees[:prefix, :prefix] = True
    out = np.zeros_like(x)
    for head in range(heads):
        query = _rotated(x @ kernels["query"][:, head])
        scores = np.where(sees, query @ key.T / np.sqrt(width), -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        out += weights @ value @ kernels["out"][head]
    return out


def _rotated(x: np.ndarray) -> np.ndarray:
    """Each pair (i, i + h/2) as a complex number, turned by position * 10000^(-2 i / h)."""
    T, width = x.shape
    pairs = x[:, : width // 2] + 1j * x[:, width // 2 :]
    turns = np.exp(1j * np.arange(T)[:, None] * 10_000.0 ** (-2 * np.arange(width // 2) / width))
    return np.concatenate([(pairs * turns).real, (pairs * turns).imag], axis=1)


def _norm(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * scale


def _float64(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {name: _float64(value) for name, value in tree.items()}
    return np.asarray(tree, np.float64)

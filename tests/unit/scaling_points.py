"""Points of a known law, exact and with scatter; the manifest of the tokens that such runs name."""

import json
from pathlib import Path

import numpy as np

from llamagen_dist.scaling.points import Points

SIZES = np.array([111e6, 343e6, 775e6, 1.4e9, 3.1e9])
BUDGETS = np.array([2e9, 5e9, 1e10, 2e10, 5e10, 1e11])
NAMES = ("A", "B", "E", "alpha", "beta")
TRUTHS = [
    (406.4, 410.7, 1.69, 0.34, 0.28),
    (60, 300, 6.5, 0.30, 0.35),
    (1e4, 1e6, 3, 0.55, 0.65),
    (8, 10, 5, 0.12, 0.14),
]


def chinchilla(n: np.ndarray, d: np.ndarray, truth: tuple[float, ...] = TRUTHS[0]) -> np.ndarray:
    a, b, e, alpha, beta = truth
    return e + a / n**alpha + b / d**beta


def grid(sizes: np.ndarray = SIZES, budgets: np.ndarray = BUDGETS) -> tuple[np.ndarray, np.ndarray]:
    n, d = np.meshgrid(sizes, budgets, indexing="ij")
    return n.ravel(), d.ravel()


def points(n: np.ndarray, d: np.ndarray, loss: np.ndarray, runs: tuple[str, ...] | None = None) -> Points:
    return Points(n, d, loss, runs or tuple(f"r{i}" for i in range(len(n))))


def noisy(seed: int, sigma: float, truth: tuple[float, ...] = TRUTHS[0]) -> Points:
    n, d = grid()
    return points(n, d, chinchilla(n, d, truth) * np.exp(sigma * np.random.default_rng(seed).standard_normal(len(n))))


def write_token_manifest(folder: Path) -> None:
    """All that a reader of finished runs looks up in their tokens: 8 x 8 of 512 codes, two classes."""
    folder.mkdir(parents=True)
    manifest = {"format": 1, "kind": "tokens", "count": 0, "members": ["codes.npy"], "shards": [], "vocab_size": 512}
    manifest |= {"grid": [8, 8], "classes": ["a", "b"], "crops": 1}
    (folder / "manifest.json").write_text(json.dumps(manifest))

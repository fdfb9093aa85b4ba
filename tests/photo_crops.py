"""Crops of scikit-image's photographs: real images on which other evaluators' numbers are known."""

import importlib.util
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

PHOTOS = ("astronaut", "chelsea", "coffee")
SIDE = 64


def crops(n: int, seed: int) -> NDArray[np.uint8]:
    """uint8 [n, 64, 64, 3]: the photographs in turn, cut where RandomState(seed) says."""
    spec = importlib.util.find_spec("skimage")
    assert spec is not None, "scikit-image is part of the oracle extra"
    folder = Path(str(spec.origin)).parent / "data"
    photos = [np.asarray(Image.open(folder / f"{name}.png").convert("RGB")) for name in PHOTOS]
    r = np.random.RandomState(seed)
    out = np.empty((n, SIDE, SIDE, 3), np.uint8)
    for i in range(n):
        photo = photos[i % len(photos)]
        y, x = r.randint(0, photo.shape[0] - SIDE + 1), r.randint(0, photo.shape[1] - SIDE + 1)
        out[i] = photo[y : y + SIDE, x : x + SIDE]
    return out


def degrade(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Halved by the integer mean of 2 x 2 pixels and doubled again by repetition."""
    n, height, width, _ = images.shape
    small = images.reshape(n, height // 2, 2, width // 2, 2, 3).astype(np.int64).sum((2, 4)) // 4
    return small.repeat(2, 1).repeat(2, 2).astype(np.uint8)

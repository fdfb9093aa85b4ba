"""The embedded data set: the 10,000 images of Fashion-MNIST's TEST split (not its 60,000 training images).

It comes with the package so that the quickstart needs no network. ``llamagen pack builtin:fashion-mnist
--held-out 1000`` divides it into 9,000 images to train on and 1,000 held out, 100 of each class, chosen by a
keyed hash. Numbers measured on it are therefore not comparable with published Fashion-MNIST results, which
train on the other split. Licence and credit: embedded/LICENSE.fashion-mnist (MIT, Zalando SE 2017).
"""

import hashlib
import lzma
from importlib import resources

import numpy as np
from numpy.typing import NDArray

NAME = "fashion-mnist"
CLASSES = (
    "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
)  # fmt: skip
COUNT, SIDE = 10_000, 28
SHA256 = "9f1ec356a747bfe4ebab3cfb722d3694c9ca737e2570f6f90cf31d7b6fd689d4"
"""Of the decompressed bytes: all pixels, then all labels."""


def load() -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """(images uint8 [10000, 28, 28], labels int64 [10000]) in the order of the original files.

    Raises ValueError when the packaged file is not the one that was released (a broken installation).
    """
    file = resources.files("llamagen_dist.data").joinpath("embedded/fashion_mnist_test.xz")
    raw = lzma.decompress(file.read_bytes())
    digest = hashlib.sha256(raw).hexdigest()
    if digest != SHA256:
        raise ValueError(f"{file} unpacks to sha256 {digest}, not {SHA256}: install the package again")
    pixels = np.frombuffer(raw, np.uint8, COUNT * SIDE * SIDE).reshape(COUNT, SIDE, SIDE)
    return pixels, np.frombuffer(raw, np.uint8, COUNT, COUNT * SIDE * SIDE).astype(np.int64)

"""The ways to 299 x 299 against the libraries and formulas that they are named after."""

from typing import get_args

import numpy as np
import pytest
import torch
from PIL import Image

from llamagen_dist.config.evaluate import Resize
from llamagen_dist.evaluation.inception import Inception
from llamagen_dist.evaluation.resizing import RESIZES, SIDE


def pictures(side: int) -> np.ndarray:
    """Hard edges, where a bicubic filter overshoots, and noise."""
    pixels = np.random.RandomState(side).randint(0, 256, (2, side, side + 7, 3))
    pixels[:, : side // 2, ::5] = 255
    pixels[:, :, side // 3 : side // 2] = 0
    return pixels.astype(np.uint8)


def inputs(name: str, images: np.ndarray) -> np.ndarray:
    return RESIZES[name].inputs(torch.from_numpy(images)).permute(0, 2, 3, 1).numpy()


def by_pil(images: np.ndarray, rounded: bool) -> np.ndarray:
    """clean-fid's recipe: every channel as a float picture, bicubic, clipped. rounded: as 8-bit pictures instead."""
    kind = np.uint8 if rounded else np.float32
    channels = [
        [Image.fromarray(image[..., c].astype(kind)).resize((SIDE, SIDE), Image.Resampling.BICUBIC) for c in range(3)]
        for image in images
    ]
    values = np.stack([np.stack([np.asarray(c, np.float32) for c in image], -1) for image in channels])
    return (values.clip(0, 255) - 128) / 128


@pytest.mark.parametrize("side", [40, 301, 700])
def test_clean_fid_scales_as_pil_does_with_floats(side):
    images = pictures(side)
    ours, theirs = inputs("clean-fid", images), by_pil(images, rounded=False)
    assert np.abs(ours - theirs).max() < 1e-5
    assert np.abs(ours - by_pil(images, rounded=True)).max() > 1e-3, "rounding to 8 bits would be noticed"
    assert ours.max() <= 127 / 128


def test_pytorch_fid_reads_at_the_middle_of_pixels():
    image = (np.arange(4) * 10).astype(np.uint8)[None, None, :, None].repeat(4, 1).repeat(3, 3)
    row = inputs("pytorch-fid", image)[0, 0, :, 0]
    at = ((np.arange(SIDE) + 0.5) * 4 / SIDE - 0.5).clip(0, 3)
    assert np.allclose(row, 2 * at * 10 / 255 - 1, atol=1e-6)
    shifted = (np.arange(SIDE) * 4 / SIDE).clip(0, 3)
    assert not np.allclose(row, 2 * shifted * 10 / 255 - 1, atol=1e-3), "TensorFlow 1's corners would be noticed"


def test_every_rule_has_a_name_and_words_of_its_own():
    assert get_args(Resize) == tuple(RESIZES)
    assert len({rule.what for rule in RESIZES.values()}) == len(RESIZES)
    large = pictures(SIDE)[:, :, :SIDE]
    with torch.device("meta"):
        networks = {name: Inception(name) for name in RESIZES}
    for name, network in networks.items():
        assert network.resize is RESIZES[name]
        # what needs no resize is only scaled, by 128 or by 127.5
        assert np.abs(inputs(name, large) - (large - 127.75) / 127.75).max() < 0.01

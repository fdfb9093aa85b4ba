"""Caption cleaning: what a text encoder gets to read."""

import numpy as np
import pytest
import torch

from llamagen_dist.data.captions import bits, clean, features

# Found by running LlamaGen's own cleaning (ftfy 6.3.1, beautifulsoup4 4.15.0) twice.
CLEANED = {
    "A Red CAT": "a red cat",
}


@pytest.mark.parametrize(("raw", "expected"), CLEANED.items())
def test_cleaning_is_llamagens(raw, expected):
    assert clean(raw) == expected


def test_bits_are_the_numbers():
    numbers = torch.tensor([[1.0, -2.5, 0.0], [float("inf"), 1e-40, 3.14]]).bfloat16()
    patterns = bits(numbers)
    assert patterns.dtype == np.uint16
    assert patterns[0].tolist() == [0x3F80, 0xC020, 0]
    assert torch.equal(features(patterns), numbers)

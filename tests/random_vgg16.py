"""A file of torchvision's VGG16 layout with random weights: what is tested with it is structure, not perception."""

from pathlib import Path

import torch

_WIDTHS = {0: 3, 2: 64, 5: 64, 7: 128, 10: 128, 12: 256, 14: 256, 17: 256, 19: 512, 21: 512, 24: 512, 26: 512, 28: 512}


def write_vgg16(path: Path) -> Path:
    generator = torch.Generator().manual_seed(0)
    state = {}
    for number, into in _WIDTHS.items():
        out, scale = min(64 << sum(number >= pool for pool in (5, 10, 17)), 512), (2 / (9 * into)) ** 0.5
        state[f"features.{number}.weight"] = torch.randn(out, into, 3, 3, generator=generator) * scale
        state[f"features.{number}.bias"] = torch.zeros(out)
    torch.save(state, path)
    return path

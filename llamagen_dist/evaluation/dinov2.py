"""Features of a DINOv2 from a local folder, for FD-DINOv2: the Fréchet distance that follows human judgement better.

As dgm-eval and edm2 look at pictures (Stein et al. 2023): bicubic with antialiasing to 224 pixels, neither rounded nor
clamped, ImageNet's normalisation, the class token after the last layer norm. transformers stretches the position
embeddings to that size by a slightly other rule than the hub model of those two, so numbers may differ in a late digit.
"""

from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llamagen_dist.data.pretrained import load_model, model_files, sha256_of
from llamagen_dist.errors import UserError

SIDE = 224
"""Pixels that the network sees."""
_HINT = "give a local copy of a DINOv2 as transformers saves it, facebook/dinov2-large for published FD-DINOv2"
_MEANS, _DEVIATIONS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class DINOv2:
    """path: the folder. Raises UserError where it holds no DINOv2, or a damaged one."""

    def __init__(self, path: Path, device: torch.device) -> None:
        from transformers import Dinov2Model

        called = f"dinov2: {path}"
        files = model_files(path, called, "dinov2", _HINT, {})
        read = partial(
            Dinov2Model.from_pretrained, path, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
        self.model = load_model(called, files, read).to(device)
        patch = self.model.config.patch_size
        if SIDE % patch:
            raise UserError(f"{called}: {SIDE} pixels cannot be cut into its patches of {patch}; {_HINT}")
        self.sha256, self.device = sha256_of(files), device
        self.dimensions: int = self.model.config.hidden_size

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> Tensor:
        """uint8 [n, H, W, 3] -> float32 [n, dimensions]."""
        images = pixels.to(self.device).permute(0, 3, 1, 2).float()
        images = F.interpolate(images, size=(SIDE, SIDE), mode="bicubic", antialias=True)
        mean, deviation = (images.new_tensor(values).view(3, 1, 1) for values in (_MEANS, _DEVIATIONS))
        features: Tensor = self.model(pixel_values=(images / 255 - mean) / deviation).last_hidden_state[:, 0]
        return features

    def record(self) -> dict[str, Any]:
        """What decides the features."""
        return {
            "network": "DINOv2 (transformers)",
            "files_sha256": self.sha256,
            "features": f"class token [{self.dimensions}]",
            "resize": f"bicubic with antialiasing to {SIDE}, not rounded",
            "covariance": "n - 1",
            "arithmetic": "float32",
        }

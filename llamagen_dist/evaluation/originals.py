"""Whether pictures are reconstructions of the images they are compared with, seen in the pixels of a few of them.

A reconstruction looks more like its own original than like the originals of the others. Where that holds only after a
margin of one side is cut off, the two were cropped in different ways.
"""

from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from llamagen_dist.evaluation.image_sets import ImageSet

LOOKED_AT = 48
"""Pictures, spread over the set; all that is in memory besides one batch of the reference."""
FEWEST_PAIRS = 8
"""With fewer pairs a coincidence is too likely for any statement."""
_GRID, _COARSE, _BATCH = 64, 16, 64

Verdict = Literal["originals", "cropped otherwise", "other images", "unclear"]
Box = tuple[int, int, int, int]


def compare(
    images: ImageSet,
    chosen: NDArray[np.int64],
    originals: ImageSet,
    candidates: NDArray[np.int64],
    search: bool = True,
) -> tuple[Verdict, str]:
    """What the originals of some pictures are, and the numbers that show it.

    images, chosen: the pictures, int64 [n] which of them. originals, candidates: int64 [m], in the same order where
    n = m. search: whether all of them are looked through where they are others.
    """
    if len(chosen) < FEWEST_PAIRS or len(candidates) < FEWEST_PAIRS:
        return "unclear", f"{min(len(chosen), len(candidates))} images"
    at = np.unique(np.linspace(0, len(chosen) - 1, LOOKED_AT).astype(np.int64))
    shown = _small(images.read(chosen[at]))
    if len(chosen) == len(candidates):
        own, alike, cut = _paired(shown, _small(originals.read(candidates[at])))
        numbers = f"of {len(at)} pictures looked at, {own} are most like the image with their number"
        if cut >= len(at) / 4 and alike >= len(at) / 2:
            return "cropped otherwise", f"{numbers}, and {cut} become twice as like it when a margin is cut off"
        if own >= len(at) / 2:
            return "originals", numbers
    if not search:
        return "unclear", ""
    matched = _searched(shown, originals, candidates)
    numbers = f"of {len(at)} pictures looked at, {matched} have one image in the reference that stands out as theirs"
    if matched >= len(at) / 2:
        return "originals", numbers
    return ("other images" if matched <= len(at) / 8 else "unclear"), numbers


def _small(pixels: NDArray[np.uint8]) -> Tensor:
    """uint8 [n, H, W, 3] -> float32 [n, 3, 64, 64] in [0, 1]."""
    floats = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    return F.interpolate(floats, size=(_GRID, _GRID), mode="area")


def _cut(pictures: Tensor, box: Box) -> Tensor:
    """[n, 3, 64, 64] -> [n, 768]: the box (left, top, right, bottom), scaled to 16 x 16."""
    left, top, right, bottom = box
    return F.adaptive_avg_pool2d(pictures[..., top:bottom, left:right], _COARSE).flatten(1)


def _windows() -> Iterator[tuple[Box, Box]]:
    """(of the picture, of the image): a margin off both sides of one of the two, or one shifted against the other."""
    whole = (0, 0, _GRID, _GRID)
    for m in range(2, 17, 2):  # a 3:2 picture that was squeezed instead of cropped has margins of 11
        rest = _GRID - m
        for inner in ((m, 0, rest, _GRID), (0, m, _GRID, rest), (m, m, rest, rest)):
            yield whole, inner
            yield inner, whole
        for a, b in (((m, 0, _GRID, _GRID), (0, 0, rest, _GRID)), ((0, m, _GRID, _GRID), (0, 0, _GRID, rest))):
            yield a, b
            yield b, a


def _errors(pictures: Tensor, images: Tensor) -> Tensor:
    """[n, m]: mean squared difference of every pair, in units of the pictures' own variance."""
    own = pictures.var(1, keepdim=True).clamp_min(1e-4)
    return torch.cdist(pictures, images).square() / pictures.shape[1] / own


def _paired(shown: Tensor, images: Tensor) -> tuple[int, int, int]:
    """Pictures that are most like the image of their number; the same where margins may be cut off; and those whose
    difference from it is at most half as large then."""
    whole = (0, 0, _GRID, _GRID)
    plain = _errors(_cut(shown, whole), _cut(images, whole))
    best = plain.clone()
    for ours, theirs in _windows():
        best = torch.minimum(best, _errors(_cut(shown, ours), _cut(images, theirs)))
    number = torch.arange(len(plain))
    own, alike = (number == errors.argmin(1) for errors in (plain, best))
    cut = alike & (best.diagonal() < 0.5 * plain.diagonal())
    return int(own.sum()), int(alike.sum()), int(cut.sum())


def _searched(shown: Tensor, originals: ImageSet, candidates: NDArray[np.int64]) -> int:
    """Pictures for which one of all candidates is much nearer than the next; the candidates pass batch by batch."""
    whole = (0, 0, _GRID, _GRID)
    ours = _cut(shown, whole)
    nearest = torch.full((len(shown), 2), float("inf"))
    for start in range(0, len(candidates), _BATCH):
        images = _cut(_small(originals.read(candidates[start : start + _BATCH])), whole)
        nearest = torch.cat([nearest, _errors(ours, images)], 1).topk(2, largest=False).values
    return int((nearest[:, 0] < 0.5 * nearest[:, 1]).sum())

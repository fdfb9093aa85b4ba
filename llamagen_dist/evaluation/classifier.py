"""A small network that learns the classes from real images, to ask: does a sample look like the class it was asked for?

Deterministic by seed. Gradients are added up in float64 over chunks of one fixed size, so the number of ranks changes
nothing but the order of that sum.
"""

import hashlib
import itertools
from collections.abc import Callable

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from llamagen_dist.config import ClassifierSection
from llamagen_dist.data.order import position_to_sample
from llamagen_dist.errors import UserError
from llamagen_dist.parallel.topology import Topology

CHUNK = 64


class Classifier(nn.Module):
    """Three 3 x 3 convolutions with pooling and two linear layers: uint8 [n, H, W, 3] -> logits [n, classes]."""

    def __init__(self, classes: int, side: int) -> None:
        super().__init__()
        self.side = side
        widths = (3, 16, 32, 64)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise(widths))
        left = max(1, side // 8)
        self.hidden, self.head = nn.Linear(widths[-1] * left * left, 128), nn.Linear(128, classes)

    def forward(self, images: Tensor) -> Tensor:
        x = images.permute(0, 3, 1, 2).float() / 127.5 - 1.0
        if x.shape[-2:] != (self.side, self.side):
            x = F.interpolate(x, (self.side, self.side), mode="area")
        x = x.contiguous(memory_format=torch.channels_last)
        for conv in self.convs:
            x = F.max_pool2d(F.relu(conv(x)), 2, ceil_mode=True) if min(x.shape[-2:]) > 1 else F.relu(conv(x))
        return self.head(F.relu(self.hidden(F.adaptive_avg_pool2d(x, max(1, self.side // 8)).flatten(1))))

    @torch.no_grad()
    def classify(self, images: NDArray[np.uint8]) -> Tensor:
        """int64 [n]: the likeliest class of each image of uint8 [n, H, W, 3]."""
        device = self.head.weight.device
        return self(torch.from_numpy(np.ascontiguousarray(images)).to(device)).argmax(1)


def data_sha256(pixels: NDArray[np.uint8], labels: NDArray[np.int64]) -> str:
    """What the classifier learnt from, in its order."""
    return hashlib.sha256(f"{pixels.shape}|".encode() + pixels.tobytes() + labels.tobytes()).hexdigest()


def train(
    section: ClassifierSection,
    pixels: NDArray[np.uint8],
    labels: NDArray[np.int64],
    classes: int,
    topology: Topology,
    advance: Callable[[int], None] = lambda count: None,
) -> Classifier:
    """Train on the same images on every rank (collective).

    pixels: uint8 [n, H, W, 3]. labels: int64 [n], below ``classes``. advance: called with the images of each step.
    Raises UserError where training diverges: a network of NaNs answers every image with class 0.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(section.seed)
        model = Classifier(classes, section.side)
    model = model.to(topology.device)
    parameters = list(model.parameters())
    adam = torch.optim.Adam(parameters, lr=section.lr)
    steps = max(1, section.images // section.batch)
    for step in range(steps):
        adam.param_groups[0]["lr"] = section.lr * min(1.0, 10 * (step + 1) / steps) * (1 - step / steps)
        positions = np.arange(step * section.batch, (step + 1) * section.batch)
        _, samples = position_to_sample(positions, len(pixels), section.seed)
        sums = [torch.zeros_like(p, dtype=torch.float64) for p in parameters]
        for start in range(topology.rank * CHUNK, section.batch, topology.world * CHUNK):
            chosen = samples[start : start + CHUNK]
            images, truth = (torch.from_numpy(array[chosen]).to(topology.device) for array in (pixels, labels))
            loss = F.cross_entropy(model(images), truth, reduction="sum") / section.batch
            for total, gradient in zip(sums, torch.autograd.grad(loss, parameters), strict=True):
                total += gradient
        flat = torch.cat([total.flatten() for total in sums])
        if topology.world > 1:
            dist.all_reduce(flat)
        for parameter, part in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
            parameter.grad = part.view_as(parameter).to(parameter.dtype)
        adam.step()
        advance(section.batch)
    if not all(bool(torch.isfinite(parameter).all()) for parameter in parameters):
        raise UserError(f"classifier: its training diverged; set classifier.lr below {section.lr:g}")
    return model.eval()

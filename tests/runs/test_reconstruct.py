"""eval.reconstruct: the pictures and scores of the tokenizer's own, the same bytes on any number of ranks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import eval.reconstruct as reconstruct
from llamagen_dist.data import images
from llamagen_dist.data.shards import open_shards
from llamagen_dist.errors import UserError
from llamagen_dist.evaluation.image_quality import psnr
from llamagen_dist.models.vq import to_uint8
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
    assert 0 <= record["ssim"] < record["ssim_llamagen"] <= 1
    claim = f"claimed_ssim={record['ssim_llamagen']:.6f}"
    assert "was computed with data range 2" in quietly(reconstruct.main, words(work, out, claim, kind="reconstruct"))
    claimed = json.loads((out / "record.json").read_text())
    assert claimed.pop("claimed_ssim").startswith("ssim_range: ")
    assert claimed == record, "nothing else has changed"
    (out / "record.json").write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    run_ranks(reconstruct.main, 3, words(work, tmp_path / "three", kind="reconstruct"))
    assert contents(tmp_path / "three") == contents(out)
    scores = ("psnr", "ssim", "ssim_llamagen", "codebook_usage")
    again = json.loads((tmp_path / "three" / "record.json").read_text())
    assert [again[key] for key in scores] == [record[key] for key in scores]
    with pytest.raises(UserError, match=r"made in another way \(tokenizer_sha256"):
        quietly(reconstruct.main, words(work, out, f"tokenizer={work / 'tokenizer2'}", kind="reconstruct"))
    with pytest.raises(UserError, match="image_size: 6 must be a multiple of 4"):
        quietly(reconstruct.main, words(work, tmp_path / "six", "image_size=6", kind="reconstruct"))

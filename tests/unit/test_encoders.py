"""FD-DINOv2 and CLIP score: what transformers itself computes from the same folder, on any number of ranks."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import eval.compare as compare
import eval.evaluate as evaluate
from llamagen_dist.config import EvaluateConfig
from llamagen_dist.config.section import build
from llamagen_dist.errors import UserError
from llamagen_dist.evaluation.clip_score import CLIPScore
from llamagen_dist.evaluation.dinov2 import DINOv2
from llamagen_dist.sampling.chunks import write_npz
from tests.ranks.forked import run_ranks
from tests.tiny_encoders import write_clip, write_dinov2

CPU = torch.device("cpu")
CAPTIONS = ["a red fox", "two small cats sleep", "a very long caption that has no end at all"]


def pictures(n: int, seed: int) -> np.ndarray:
    r = np.random.RandomState(seed)
    coarse = r.randint(0, 256, (n, 5, 5, 3), dtype=np.uint8)
    return np.ascontiguousarray(coarse.repeat(8, 1).repeat(8, 2))


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("encoders")
    write_dinov2(folder / "dinov2")
    write_clip(folder / "clip")
    samples = folder / "samples"
    samples.mkdir()
    shown = pictures(13, 0)
    write_npz(samples / "model.npz", np.arange(13) % 3, 13, [shown])
    (samples / "captions.json").write_text(json.dumps(CAPTIONS))
    (folder / "real").mkdir()
    write_npz(folder / "real" / "real.npz", None, 14, [pictures(14, 1)])
    (folder / "evaluate.yaml").write_text("kind: evaluate\nlimit: null\nbatch: 4\nmetrics: [fd_dinov2, clip_score]\n")
    return folder


def words(work: Path, out: Path, *more: str) -> list[str]:
    sides = [f"generated={work}/samples/model.npz", f"reference={work}/real/real.npz", f"out={out}"]
    return [str(work / "evaluate.yaml"), *sides, f"dinov2={work}/dinov2", f"clip={work}/clip", *more]


def frechet(a: torch.Tensor, b: torch.Tensor) -> float:
    """By its definition, from the eigenvalues of the product of the covariances."""
    means = (a.mean(0) - b.mean(0)).square().sum()
    one, other = torch.cov(a.T), torch.cov(b.T)
    mixed = torch.linalg.eigvals(one @ other).real.clamp_min(0).sqrt().sum()
    return float(means + one.trace() + other.trace() - 2 * mixed)


def features_by_transformers(folder: Path, shown: np.ndarray) -> torch.Tensor:
    from transformers import Dinov2Model

    images = torch.from_numpy(shown).permute(0, 3, 1, 2).float() / 255
    images = F.interpolate(images, size=(224, 224), mode="bicubic", antialias=True)
    normal = (images - torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)) / torch.tensor([0.229, 0.224, 0.225]).view(
        3, 1, 1
    )
    with torch.no_grad():
        return Dinov2Model.from_pretrained(folder).eval()(pixel_values=normal).pooler_output.double()


def scores_by_transformers(folder: Path, shown: np.ndarray, captions: list[str]) -> torch.Tensor:
    from transformers import AutoTokenizer, CLIPImageProcessorPil, CLIPModel

    model = CLIPModel.from_pretrained(folder).eval()
    inputs = AutoTokenizer.from_pretrained(folder)(
        captions, padding=True, truncation=True, max_length=12, return_tensors="pt"
    )
    inputs |= CLIPImageProcessorPil.from_pretrained(folder)(list(shown), return_tensors="pt")
    with torch.no_grad():
        logits = model(**inputs).logits_per_image.diagonal() / model.logit_scale.exp()
    return 100 * logits.double().clamp_min(0)


def test_scores_are_those_of_transformers_on_one_rank_and_on_two(work, tmp_path):
    one, two = tmp_path / "one.json", tmp_path / "two.json"
    evaluate.main(words(work, one))
    run_ranks(evaluate.main, 2, words(work, two))
    results = [json.loads(file.read_text()) for file in (one, two)]
    (values, again) = (result["sets"]["generated"] for result in results)
    shown, captions = pictures(13, 0), [CAPTIONS[i % 3] for i in range(13)]
    features = [features_by_transformers(work / "dinov2", images) for images in (shown, pictures(14, 1))]
    assert values["fd_dinov2"] == pytest.approx(frechet(*features), rel=1e-4)
    expected = scores_by_transformers(work / "clip", shown, captions)
    assert 0 < expected.mean() < 100
    assert values["clip_score"] == pytest.approx(float(expected.mean()), rel=1e-5)
    shifted = scores_by_transformers(work / "clip", shown, captions[1:] + captions[:1])
    assert values["clip_score"] != pytest.approx(float(shifted.mean()), rel=1e-3), "captions of the neighbours show"
    for key in ("fd_dinov2", "clip_score"):
        assert again[key] == pytest.approx(values[key], rel=1e-9)
    metrics = results[0]["record"]["metrics"]
    assert metrics["fd_dinov2"]["features"] == "class token [8]"
    assert len(metrics["clip_score"]["files_sha256"]) == 64
    known = results[0]["record"]["sets"]["generated"]["images"]["captions"]
    assert (known["n"], known["longer_than_12_tokens"]) == (13, 8), "two of the three captions are too long for it"
    compare.main([str(one), str(two)])
    other = json.loads(one.read_text())
    other["record"]["metrics"]["clip_score"]["files_sha256"] = "0" * 64
    two.write_text(json.dumps(other))
    with pytest.raises(UserError, match=r"clip_score.files_sha256"):
        compare.main([str(one), str(two)])


def test_what_does_not_fit_at_all_scores_zero_and_not_less(tmp_path):
    against = CLIPScore(write_clip(tmp_path / "clip", sign=1), CPU)
    assert against(pictures(3, 0), CAPTIONS).tolist() == [0.0, 0.0, 0.0]


def test_more_images_than_dimensions_are_summed_as_moments(work):
    from llamagen_dist.evaluation.features import Distribution
    from llamagen_dist.parallel.topology import Topology

    features = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    few, many = Distribution(8, 8, Topology()), Distribution(40, 8, Topology())
    assert few.kept is not None
    assert few.moments is None
    assert many.kept is None
    for rows in (slice(0, 24), slice(24, 40)):
        many.add(rows, features[rows])
    gaussian = many.gaussian(work, "DINOv2")
    torch.testing.assert_close(gaussian.covariance, torch.cov(features.double().T), rtol=1e-9, atol=1e-12)
    many.add(slice(0, 1), torch.full((1, 8), torch.nan))
    with pytest.raises(UserError, match="1 images have DINOv2 features that are NaN"):
        many.gaussian(work, "DINOv2")


def test_pictures_without_captions_have_no_clip_score(work, tmp_path):
    swapped = [f"generated={work}/real/real.npz", f"reference={work}/samples/model.npz", "metrics=[clip_score]"]
    evaluate.main(words(work, tmp_path / "out.json", *swapped))
    result = json.loads((tmp_path / "out.json").read_text())
    assert "clip_score" not in result["sets"]["generated"]
    assert "no captions of" in result["absent"]["clip_score"]


@pytest.mark.parametrize("broken", ['["one"]', "{", "[1, 2, 3]"])
def test_damaged_captions_are_refused(work, tmp_path, broken):
    write_npz(tmp_path / "model.npz", np.arange(4) % 3, 4, [pictures(4, 0)])
    (tmp_path / "captions.json").write_text(broken)
    with pytest.raises(UserError, match=r"captions.json: (has 1 captions, but|cannot be read as captions)"):
        evaluate.main(words(work, tmp_path / "out.json", f"generated={tmp_path}/model.npz"))
    assert not (tmp_path / "out.json").exists()


def test_folders_of_another_kind_are_refused_in_one_sentence(work, tmp_path):
    with pytest.raises(
        UserError, match=r"dinov2: .*clip: its config.json says model_type 'clip', not 'dinov2'; give a"
    ):
        DINOv2(work / "clip", CPU)
    with pytest.raises(
        UserError, match=r"clip: .*dinov2: its config.json says model_type 'dinov2', not 'clip'; give a"
    ):
        CLIPScore(work / "dinov2", CPU)
    with pytest.raises(UserError, match=r"clip: .*absent: there is no such folder"):
        CLIPScore(tmp_path / "absent", CPU)
    bare = write_clip(tmp_path / "bare")
    (bare / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match=r"no image processor in it \(preprocessor_config.json\)"):
        CLIPScore(bare, CPU)
    half = write_dinov2(tmp_path / "half")
    data = (half / "model.safetensors").read_bytes()
    (half / "model.safetensors").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match=r"dinov2: .*model.safetensors ends too early"):
        DINOv2(half, CPU)
    with pytest.raises(UserError, match=r"fd_dinov2 needs dinov2: PATH, a local folder"):
        build(
            EvaluateConfig,
            {"kind": "evaluate", "generated": "a", "reference": "b", "out": "c", "metrics": ["fd_dinov2"]},
            "x",
        )

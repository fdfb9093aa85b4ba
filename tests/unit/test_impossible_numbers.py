"""No score is made from numbers that cannot be: statistics, features, weights, images, labels and losses."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from llamagen_dist.config import ClassifierSection, EvaluateConfig, InceptionSection
from llamagen_dist.errors import UserError
from llamagen_dist.evaluation import classifier, frechet, inception, inception_weights, kid, manifold, record
from llamagen_dist.evaluation.features import Extraction, Selection
from llamagen_dist.evaluation.image_quality import psnr, ssim, ssim_llamagen
from llamagen_dist.evaluation.image_sets import open_images
from llamagen_dist.evaluation.inception_score import ScoreSums
from llamagen_dist.evaluation.scoring import Judge
from llamagen_dist.models.vq import VQConfig, VQModel
from llamagen_dist.parallel.topology import Topology
from llamagen_dist.sampling.pictures import decode_tokens
from llamagen_dist.scaling.fit import fit_law
from llamagen_dist.scaling.points import parse_csv
from tests.unit.scaling_points import chinchilla, grid, points
from tests.unit.test_scaling_ladder import read_ladder, write_ladder

D = 12


def statistics(images: int = 40, scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    x = np.random.RandomState(0).randn(images, D) * scale
    return x.mean(0), np.cov(x, rowvar=False)


@pytest.mark.parametrize("images", [40, 5], ids=["full rank", "fewer images than dimensions"])
@pytest.mark.parametrize("dtype", [np.float64, np.float32])
@pytest.mark.parametrize("scale", [1.0, 1e-4, 1e4])
def test_real_statistics_pass_as_stored(images: int, dtype: type, scale: float) -> None:
    mean, covariance = statistics(images, scale)
    frechet.check_statistics(mean.astype(dtype), covariance.astype(dtype), D, ("mu", "sigma"))
    frechet.check_statistics(mean, np.zeros((D, D)), D, ("mu", "sigma"))  # of one image, many times


def change(array: np.ndarray, index: object, value: float) -> np.ndarray:
    other = array.copy()
    other[index] = value
    return other


MEAN, COVARIANCE = statistics()
IMPOSSIBLE = {
    "mu with a NaN": (change(MEAN, 3, np.nan), COVARIANCE, "mu: 1 of 12 values are NaN"),
    "mu with an infinity": (change(MEAN, 3, -np.inf), COVARIANCE, "mu: 1 of 12 values are NaN or infinite"),
    "sigma with a NaN": (MEAN, change(COVARIANCE, (2, 2), np.nan), "sigma: 1 of 144 values"),
    "sigma with an infinity": (MEAN, change(COVARIANCE, (2, 5), np.inf), "sigma: 1 of 144 values"),
    "a negative variance": (MEAN, change(COVARIANCE, (4, 4), -0.1), "sigma is no covariance: it holds a negative"),
    "every variance negative": (MEAN, -COVARIANCE, "sigma is no covariance: it holds a negative variance"),
    "not symmetric": (MEAN, change(COVARIANCE, (1, 7), 0.3), "sigma is no covariance: it is not symmetric"),
    "correlations above one": (MEAN, COVARIANCE + 9 * (1 - np.eye(D)), "sigma is no covariance: a weighted sum"),
    "variances alone": (MEAN, COVARIANCE.diagonal(), r"sigma is float64 \[12\], not real numbers \[12, 12\]"),
    "features themselves": (np.ones((4, D)), COVARIANCE, r"mu is float64 \[4, 12\], not real numbers \[12\]"),
    "another network's": (np.ones(8), np.eye(8), r"mu is float64 \[8\], not real numbers \[12\]"),
    "complex": (MEAN.astype(complex), COVARIANCE, r"mu is complex128"),
    "text": (MEAN.astype(str), COVARIANCE, r"mu is <U"),
}


@pytest.mark.parametrize(("mean", "covariance", "sentence"), IMPOSSIBLE.values(), ids=IMPOSSIBLE)
def test_impossible_statistics_are_refused_naming_the_array(
    mean: np.ndarray, covariance: np.ndarray, sentence: str
) -> None:
    with pytest.raises(ValueError, match=sentence):
        frechet.check_statistics(mean, covariance, D, ("mu", "sigma"))


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"mu": np.full(2048, np.nan), "sigma": np.eye(2048)}, r"bad\.npz: mu: 2048 of 2048 values are NaN"),
        ({"mu": np.zeros(2048), "sigma": -np.eye(2048)}, r"bad\.npz: sigma is no covariance"),
        ({"mu_s": np.zeros(2023), "sigma_s": np.triu(np.ones((2023, 2023)))}, r"bad\.npz: sigma_s is no covariance"),
        ({"mu": np.zeros(64), "sigma": np.eye(64)}, r"bad\.npz: mu is float64 \[64\], not real numbers \[2048\]"),
    ],
)
def test_a_reference_file_with_impossible_statistics_is_refused_naming_it(
    tmp_path: Path, arrays: dict[str, np.ndarray], sentence: str
) -> None:
    np.savez_compressed(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match=sentence):
        open_images(tmp_path / "bad.npz", reference=True)
    if "sigma" in arrays:  # beside images, too
        np.savez_compressed(tmp_path / "bad.npz", arr_0=np.zeros((2, 8, 8, 3), np.uint8), **arrays)
        with pytest.raises(UserError, match=sentence):
            open_images(tmp_path / "bad.npz", reference=True)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_no_metric_makes_a_score_of_features_that_are_not_finite(bad: float) -> None:
    x = torch.rand(20, 6, generator=torch.Generator().manual_seed(0))
    y = x.clone()
    y[7, 2] = bad
    for a, b in ((x, y), (y, x)):
        with pytest.raises(ValueError, match="NaN or infinite"):
            frechet.frechet_distance(frechet.gaussian_of(a), frechet.gaussian_of(b))
        with pytest.raises(ValueError, match="NaN or infinite"):
            kid.kid(a, b, kid.hashed_subsets(20, 20, 2, 5, 0))
        with pytest.raises(ValueError, match="NaN or infinite"):
            manifold.manifold_scores(a, b)
    moments = frechet.Moments(6)
    moments.update(y)
    with pytest.raises(ValueError, match="NaN or infinite"):
        frechet.frechet_distance(moments.gaussian(), frechet.gaussian_of(x))
    sums = ScoreSums(np.zeros(len(y), np.int64), 6)
    sums.update(slice(None), y)
    with pytest.raises(ValueError, match="NaN or infinite"):
        sums.score()
    images = torch.rand(2, 3, 9, 9)
    broken = images.clone()
    broken[1, 0, 4, 4] = bad
    for metric in (psnr, ssim, ssim_llamagen):
        for pair in ((images, broken), (broken, images)):
            with pytest.raises(ValueError, match="pixels: 1 of 486 values are NaN or infinite"):
                metric(*pair)


def test_a_negative_distance_is_no_zero() -> None:
    """Covariances that were not checked: without the bound this distance would come out as 0, the best there is."""
    mean = torch.zeros(3, dtype=torch.float64)
    a = frechet.Gaussian(mean, torch.diag(torch.tensor([1.0, 1.0, -9.0], dtype=torch.float64)))
    with pytest.raises(ValueError, match="the statistics are not those of images"):
        frechet.frechet_distance(a, frechet.Gaussian(mean, torch.eye(3, dtype=torch.float64)))


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    """Of no trained network, but of the right shapes."""
    shapes = inception_weights._expected()
    return {name: torch.full(shape, 0.01) for name, shape in shapes.items()}


def test_weights_that_are_not_finite_are_refused_naming_the_layer(
    tmp_path: Path, weights: dict[str, torch.Tensor]
) -> None:
    for name, value in (("Mixed_6a.branch3x3.conv.weight", torch.nan), ("Mixed_6a.branch3x3.bn.running_var", -1.0)):
        save_file({**weights, name: torch.full_like(weights[name], value)}, tmp_path / "bad.safetensors")
        with pytest.raises(UserError, match=r"bad\.safetensors: the weights of Mixed_6a\.branch3x3\."):
            inception_weights.open_extractor(InceptionSection(weights=tmp_path / "bad.safetensors"))


def test_an_extractor_that_overflows_gives_no_features(tmp_path: Path, weights: dict[str, torch.Tensor]) -> None:
    network = inception.assemble(weights)
    np.savez(tmp_path / "images.npz", arr_0=np.full((3, 8, 8, 3), 200, np.uint8))
    selection = Selection(open_images(tmp_path / "images.npz"), np.arange(3), np.arange(3))
    assert Extraction([selection], network, None, Topology(), batch=2).run()[0].pool is not None
    network.Mixed_7c.branch_pool.weight.fill_(3e38)
    for kept in (np.arange(3), np.arange(2)):  # features, or moments only
        selection = Selection(selection.images, np.arange(3), kept)
        with pytest.raises(UserError, match=r"images\.npz: 3 of 3 images have features that are NaN or infinite"):
            Extraction([selection], network, None, Topology(), batch=2).run()


def classifier_section(path: Path, **more: float) -> ClassifierSection:
    return ClassifierSection(train=path, validation=path, images=256, batch=64, side=8, **more)


def test_a_classifier_that_diverged_judges_nothing() -> None:
    pixels = np.random.RandomState(0).randint(0, 256, (64, 8, 8, 3)).astype(np.uint8)
    labels = np.arange(64) % 2
    assert classifier.train(classifier_section(Path(".")), pixels, labels, 2, Topology())
    with pytest.raises(UserError, match=r"classifier: its training diverged; set classifier\.lr below 1e\+30"):
        classifier.train(classifier_section(Path("."), lr=1e30), pixels, labels, 2, Topology())


@pytest.mark.parametrize(
    ("labels", "sentence"),
    [
        (np.array([0, 2**32 - 1], np.uint32), "labels holds 4294967295, which is no class number"),
        (np.array([0, 2**64 - 1], np.uint64), "labels holds 18446744073709551615, which is no class number"),
        (np.array([-1, 1]), r"classifier: .*images\.npz has labels -1 to 1, but"),
        (np.array([0.0, 1.0]), "not integers"),
    ],
)
def test_labels_that_are_no_classes_are_refused_before_memory_is_asked_for(
    tmp_path: Path, labels: np.ndarray, sentence: str
) -> None:
    path = tmp_path / "images.npz"
    np.savez(path, arr_0=np.zeros((2, 8, 8, 3), np.uint8), labels=labels)
    config = EvaluateConfig(kind="evaluate", generated=path, reference=path, out=tmp_path / "o.json")
    with pytest.raises(UserError, match=sentence):
        Judge(classifier_section(path), config, Topology())


@pytest.mark.parametrize("compressed", [False, True])
def test_a_file_cut_anywhere_is_one_sentence(tmp_path: Path, compressed: bool) -> None:
    save = np.savez_compressed if compressed else np.savez
    pixels = np.random.RandomState(0).randint(0, 256, (9, 8, 8, 3)).astype(np.uint8)
    save(tmp_path / "whole.npz", arr_0=pixels, labels=np.arange(9))
    whole = (tmp_path / "whole.npz").read_bytes()
    assert open_images(tmp_path / "whole.npz").count == 9
    for part in (0.0, 0.001, 0.1, 0.5, 0.9, 0.999):
        (tmp_path / "cut.npz").write_bytes(whole[: int(len(whole) * part)])
        with pytest.raises(UserError, match=r"cut\.npz: cannot be read as an \.npz") as refused:
            open_images(tmp_path / "cut.npz")
        assert "\n" not in str(refused.value)
    if compressed:  # damaged inside, its directory whole
        with zipfile.ZipFile(tmp_path / "whole.npz") as archive:
            at = archive.getinfo("arr_0.npy").header_offset + 400
        (tmp_path / "cut.npz").write_bytes(whole[:at] + bytes(200) + whole[at + 200 :])
        with pytest.raises(UserError, match=r"cut\.npz: cannot be read as an \.npz"):
            open_images(tmp_path / "cut.npz")


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_weights_cut_anywhere_are_one_sentence(tmp_path: Path, suffix: str) -> None:
    whole = tmp_path / f"whole.{suffix}"
    content = {f"tensor.{i}": torch.rand(50, 50) for i in range(5)}
    if suffix == "pth":
        torch.save(content, whole)
    else:
        save_file(content, whole)
    cut = tmp_path / f"cut.{suffix}"
    for part in (0.0, 0.001, 0.1, 0.5, 0.9, 0.999):
        cut.write_bytes(whole.read_bytes()[: int(whole.stat().st_size * part)])
        with pytest.raises(UserError, match=r"cut\.") as refused:
            inception_weights.read_weights_file(cut)
        assert "\n" not in str(refused.value)


def test_a_tokenizer_that_decodes_to_nan_paints_no_black_pictures() -> None:
    with torch.random.fork_rng():
        model = VQModel(VQConfig(32, (1, 1), res_blocks=1, z_channels=32, codebook_size=8))
    tokens = torch.zeros(1, 16, dtype=torch.int64)
    assert decode_tokens(model, tokens).shape == (1, 8, 8, 3)
    with torch.no_grad():
        model.post_quant_conv.bias.fill_(torch.nan)
    with pytest.raises(UserError, match="the tokenizer decodes to values that are NaN or infinite"):
        decode_tokens(model, tokens)


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_results_with_values_that_are_not_finite_are_not_compared(tmp_path: Path, value: str) -> None:
    text = json.dumps(
        {"sets": {"a": {"n": 2, "fid": 1.0}}, "record": {"format": 1, "sets": {"a": {"reference": {"sha256": "x"}}}}}
    )
    (tmp_path / "r.json").write_text(text)
    assert record.read_result(tmp_path / "r.json")["sets"]["a"]["fid"] == 1.0
    (tmp_path / "r.json").write_text(text.replace("1.0", value))
    with pytest.raises(UserError, match=r"r\.json: not a result of eval\.evaluate \(ValueError: fid of the set a is"):
        record.read_result(tmp_path / "r.json")


@pytest.mark.parametrize("value", ["NaN", "Infinity", "-1.5", "0", "null", '"2.5"', "[]"])
def test_a_ladder_with_a_loss_that_is_none_names_the_run(tmp_path: Path, value: str) -> None:
    folder = write_ladder(tmp_path)
    metrics = folder / "c" / "metrics.jsonl"
    first, *others = metrics.read_text().splitlines()
    loss = json.dumps(json.loads(first)["val_loss"])
    metrics.write_text("\n".join([first.replace(loss, value), *others]) + "\n")
    if value == '"2.5"':
        read_ladder(folder)  # a number in quotes is read as one
        return
    with pytest.raises(UserError, match=r"ladder/c/metrics\.jsonl"):
        read_ladder(folder)


def test_a_ladder_never_loses_a_point_without_a_word(tmp_path: Path) -> None:
    folder = write_ladder(tmp_path)
    metrics = folder / "c" / "metrics.jsonl"
    first, second, third = metrics.read_text().splitlines()
    for lines, sentence in (
        ([first, second[:20], third], r"c/metrics\.jsonl, line 2: is not valid JSON"),
        ([first, "[1]", third], r"c/metrics\.jsonl, line 2: is not a JSON object"),
        ([first, second.replace("6144", "NaN"), third], r"c/metrics\.jsonl, after nan images: tokens is nan"),
    ):
        metrics.write_text("\n".join(lines) + "\n")
        with pytest.raises(UserError, match=sentence):
            read_ladder(folder)


def test_a_fit_whose_parameters_overflow_is_refused() -> None:
    n, d = grid(np.geomspace(1e4, 1e6, 4), np.geomspace(1e5, 1e7, 4))
    loss = chinchilla(n, d, (1e6, 3e7, 2.0, 1.5, 1.5))
    assert fit_law(points(n, d, loss)).params
    with pytest.raises(UserError, match="leave the range of numbers"):
        fit_law(points(n * 1e290, d * 1e290, loss))


@pytest.mark.parametrize("value", ["nan", "inf", "1e400", "-3", "0"])
@pytest.mark.parametrize("column", [0, 1, 2])
def test_points_that_have_no_logarithm_are_named(value: str, column: int) -> None:
    row = ["1e6", "1e7", "3.5"]
    row[column] = value
    with pytest.raises(UserError, match=r"runs\.csv"):
        parse_csv("params,tokens,loss\n1e6,1e7,3.6\n" + ",".join(row) + "\n", "runs.csv")

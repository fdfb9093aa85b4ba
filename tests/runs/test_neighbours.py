"""eval.neighbours: a planted training image is found among the samples, and nothing is suspected without one."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval.neighbours as program
from llamagen_dist.errors import UserError
from llamagen_dist.evaluation.image_sets import open_images
from llamagen_dist.evaluation.neighbours import Nearest, nearness
from llamagen_dist.parallel.topology import Topology
from tests.image_shards import write_images
from tests.ranks.forked import run_ranks
from tests.runs.sampling_work import quietly

CONFIG = Path(program.__file__).parent.parent / "configs" / "eval" / "neighbours.yaml"
SIDE, TRAINING, SAMPLES, PLANTED = 24, 90, 30, 17


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("neighbours")
    images = open_images(write_images(folder / "images", TRAINING, SIDE, seed=0))
    drawn = open_images(write_images(folder / "drawn", SAMPLES, SIDE, seed=1)).read(np.arange(SAMPLES))
    np.savez(folder / "samples.npz", arr_0=drawn)
    copied = drawn.copy()
    # a copy as a model would draw it: a little brighter and with noise
    noise = np.random.default_rng(2).integers(-12, 13, drawn[0].shape)
    copied[PLANTED] = np.clip(images.read(np.array([42]))[0].astype(int) + 5 + noise, 0, 255)
    np.savez(folder / "planted.npz", arr_0=copied)
    return folder


def look(work: Path, samples: str, out: str, *words: str) -> tuple[dict, str]:
    paths = [f"samples={work / samples}", f"images={work / 'images'}", f"out={work / out}"]
    said = quietly(program.main, [str(CONFIG), *paths, "features=pixels", "batch=16", *words])
    return json.loads((work / out / "neighbours.json").read_text()), said


def test_a_planted_training_image_is_found_and_none_is_suspected_without_it(work):
    found, said = look(work, "planted.npz", "planted")
    assert found["suspected_copies"] == [PLANTED]
    nearest = found["samples"][0]
    assert (nearest["sample"], nearest["images"][0], nearest["real_no_larger"]) == (PLANTED, 42, 0.0)
    assert f"1 of {SAMPLES} samples are suspected copies" in said
    assert "features: pixels averaged down to 32 x 32" in said
    page = Image.open(work / "planted" / "neighbours.png")
    assert page.height > 12 * 72
    clean, said = look(work, "samples.npz", "clean")  # the twin
    assert clean["suspected_copies"] == []
    assert f"0 of {SAMPLES} samples are suspected copies" in said


def test_distances_are_those_of_a_plain_search(work):
    found, _ = look(work, "planted.npz", "plain", "k=3", "real=20")
    images, samples = open_images(work / "images"), open_images(work / "planted.npz")

    def plain(pixels: np.ndarray) -> np.ndarray:
        scaled = torch.from_numpy(pixels).permute(0, 3, 1, 2).double() / 255
        return torch.nn.functional.interpolate(scaled, size=(32, 32), mode="area").flatten(1).numpy()

    training = plain(images.read(np.arange(TRAINING)))
    for entry in found["samples"]:
        query = plain(samples.read(np.array([entry["sample"]])))
        expected = np.sqrt(((query - training) ** 2).sum(1))
        assert entry["images"] == np.argsort(expected, kind="stable")[:3].tolist()
        assert np.allclose(entry["distances"], np.sort(expected)[:3], rtol=1e-5)
    among = np.sqrt(((training[:, None] - training[None]) ** 2).sum(2))
    np.fill_diagonal(among, np.inf)
    low, high = among.min(1).min(), among.min(1).max()
    assert low * 0.99999 <= found["distances"]["real"]["0"] <= found["distances"]["real"]["1"] <= high * 1.00001


def look_on_a_rank(work: Path, out: str) -> None:
    look(work, "planted.npz", out)


def test_the_number_of_ranks_changes_nothing(work):
    run_ranks(look_on_a_rank, 3, work, "three")
    look_on_a_rank(work, "one")
    three, one = (json.loads((work / name / "neighbours.json").read_text()) for name in ("three", "one"))
    assert three.pop("record")["ranks"] == 3
    assert one.pop("record")["ranks"] == 1
    assert three == one


def test_the_image_itself_is_passed_over_and_its_twin_is_not():
    """Queries 0 and 1 are images of the stream; image 3 equals image 1."""
    stream = torch.tensor([[0.0], [5.0], [7.0], [5.0], [1.0]])
    search = Nearest(torch.tensor([[0.0], [5.0], [6.1]]), torch.tensor([0, 1, -1]), 2)
    for start in (0, 2, 4):
        numbers = torch.arange(start, min(start + 2, 5))
        search.add(stream[numbers], numbers)
    distances, numbers = search.over_ranks(Topology())
    assert numbers.tolist() == [[4, 1], [3, 2], [2, 1]]
    assert np.allclose(distances, [[1, 5], [0, 2], [0.9, 1.1]])
    assert nearness(np.array([0.9, 1.5]), np.array([1.0, 2.0]))[1].tolist() == [0, 0.5]
    with pytest.raises(ValueError, match="NaN or infinite"):
        search.add(torch.tensor([[torch.nan]]), torch.tensor([5]))


def test_without_inception_weights_pixels_are_compared_and_that_is_said(work, tmp_path):
    gone = ["inception.package=nowhere", f"inception.cache={tmp_path}"]
    found, said = look(work, "samples.npz", "auto", "features=auto", "limit=5", *gone)
    assert "features: pixels averaged down to 32 x 32, because the Inception weights are not here" in said
    assert found["record"]["features"].startswith("pixels")
    assert f"5 of the {SAMPLES} samples are looked at" in said
    for words, sentence in (
        (["features=inception", *gone], "features: the Inception weights are not here .*; or set features=pixels"),
        (["k=90"], "holds 90 images, too few for k=90 neighbours"),
        (["samples=nowhere.npz"], "no such images"),
    ):
        with pytest.raises(UserError, match=sentence):
            look(work, "samples.npz", "refused", *words)
    assert not (work / "refused").exists()

"""What a result says of its images and its reference, and which results are set side by side or refused."""

import contextlib
import copy
import io
import json
from pathlib import Path

import numpy as np
import pytest

from eval import compare
from llamagen_dist.config import load
from llamagen_dist.errors import UserError
from llamagen_dist.evaluation import passport
from llamagen_dist.evaluation.image_sets import open_images, resized
from llamagen_dist.evaluation.record import differences
from tests.image_shards import write_images

DRAWN = {
    "n": 6,
    "sets": ["model"],
    "checkpoint": "/runs/b",
    "checkpoint_sha256": "abc",
    "cfg_scale": 2.0,
    "cfg_interval": -1,
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 0.8,
    "seed": 7,
    "conditions": "sample i has class i modulo 2",
    "ranks": 8,
}


def npz(path: Path, n: int = 6, side: int = 8, **more: np.ndarray) -> Path:
    np.savez(path, arr_0=np.random.RandomState(0).randint(0, 256, (n, side, side, 3)).astype(np.uint8), **more)
    return path


def test_samples_bring_the_settings_they_were_drawn_with(tmp_path):
    (tmp_path / "record.json").write_text(json.dumps(DRAWN))
    made = passport.made_by(open_images(npz(tmp_path / "model.npz")))
    assert made is not None
    assert made["program"] == "eval.sample"
    assert {made[key] for key in ("seed", "top_p", "cfg_scale")} == {7, 0.8, 2.0}
    assert made["conditions"] == "sample i has class i modulo 2"
    assert not {"ranks", "checkpoint"} & made.keys(), "neither paths nor what decides no picture"


@pytest.mark.parametrize(("name", "n"), [("other", 6), ("model", 5)])
def test_a_record_about_other_pictures_is_not_believed(tmp_path, name, n):
    (tmp_path / "record.json").write_text(json.dumps(DRAWN))
    assert passport.made_by(open_images(npz(tmp_path / f"{name}.npz", n))) is None


def test_classes_are_counted():
    assert passport.class_policy(None) == "no labels"
    assert passport.class_policy(np.array([0, 1, 0, 1])) == "2 classes, 2 images of each"
    assert passport.class_policy(np.array([0, 1, 0, 5])) == "3 classes, 1 to 2 images of each"


def statistics(spatial: bool) -> dict[str, np.ndarray]:
    arrays = {"mu": np.zeros(2048), "sigma": np.eye(2048)}
    return arrays | ({"mu_s": np.zeros(2023), "sigma_s": np.eye(2023)} if spatial else {})


def test_adms_reference_is_recognised_by_its_structure_and_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(passport, "_PUBLISHED", {8: ("VIRTUAL_small.npz", 6)})  # the real one has 2 GB of pictures
    known = passport.provenance(open_images(npz(tmp_path / "x.npz", **statistics(True)), reference=True))
    assert (known["name"], known["split"]) == ("VIRTUAL_small.npz", "train")
    assert "its structure only" in known["known_by"]
    assert "no hash" in known["known_by"]
    for twin in (npz(tmp_path / "two.npz", **statistics(False)), npz(tmp_path / "five.npz", 5, **statistics(True))):
        unknown = passport.provenance(open_images(twin, reference=True))
        assert (unknown["name"], unknown["split"], unknown["crop"]) == (twin.name, "unknown", "unknown")


def test_image_shards_bring_their_fingerprint_and_crop(tmp_path):
    shards = open_images(write_images(tmp_path / "set" / "validation", 4, 16), image_size=8)
    known = passport.provenance(shards)
    assert (known["name"], known["split"], known["count"]) == ("set/validation", "validation", 4)
    assert known["crop"] == "stored as 16, ADM's centre crop to 8"
    other = passport.provenance(open_images(write_images(tmp_path / "set" / "b", 4, 16, seed=1)))
    assert other["split"] == "unknown"
    assert other["fingerprint"] != known["fingerprint"]


def test_the_protocol_names_every_key_that_was_overridden(tmp_path):
    (tmp_path / "p.yaml").write_text("{kind: evaluate, protocol: mine, generated: g, reference: r, out: o, limit: 9}")
    shipped = load(tmp_path / "p.yaml")
    same = load(tmp_path / "p.yaml", ["generated=x.npz", "out=y.json", "batch=7"])
    assert passport.protocol(same, shipped) == {"name": "mine", "changed": []}
    assert passport.protocol(load(tmp_path / "p.yaml", ["limit=5"]), shipped)["changed"] == ["limit: 9 -> 5"]


def test_larger_images_are_scaled_as_llamagen_scales_them(tmp_path):
    """Against the cubic kernel by hand, in one row: a = -0.75, samples at (i + 0.5) x 1.5 - 0.5, no antialiasing."""
    row = np.random.RandomState(1).randint(0, 256, 12).astype(np.uint8)
    pixels = np.broadcast_to(row[None, None, :, None], (2, 12, 12, 3)).copy()

    def kernel(x: float) -> float:
        x = abs(x)
        if x <= 1:
            return 1.25 * x**3 - 2.25 * x**2 + 1
        return -0.75 * (x**3 - 5 * x**2 + 8 * x - 4) if x < 2 else 0.0

    at = [(i + 0.5) * 1.5 - 0.5 for i in range(8)]
    expected = [sum(kernel(x - j) * float(row[min(max(j, 0), 11)]) for j in range(int(x) - 2, int(x) + 4)) for x in at]
    small = resized(pixels, 8)
    assert small.shape == (2, 8, 8, 3)
    assert small[0, 3, :, 1].tolist() == np.clip(np.round(expected), 0, 255).astype(int).tolist()
    np.savez(tmp_path / "large.npz", arr_0=pixels)
    opened = open_images(tmp_path / "large.npz", resize_to=8)
    assert (opened.height, opened.stored_size) == (8, (12, 12))
    assert (opened.read(np.array([1])) == small[1:]).all()
    assert open_images(tmp_path / "large.npz", resize_to=12).read(np.array([1])).shape[1] == 12
    np.savez(tmp_path / "wide.npz", arr_0=pixels[:, :10])
    with pytest.raises(UserError, match=r"12 x 10 pixels cannot be scaled to 8 x 8"):
        open_images(tmp_path / "wide.npz", resize_to=8)


def result(seed: int, fid: float, **images: object) -> dict:
    sides = {
        "images": {"size": [8, 8], "classes": "no labels", "made_by": {"seed": seed}, **images},
        "reference": {"n": 6, "sha256": "r"},
    }
    record = {
        "format": 1,
        "bias": "N=6",
        "protocol": {"name": "plain", "changed": []},
        "metrics": {"fid": {"arithmetic": "float32"}},
        "sets": {"generated": sides},
        "versions": {"torch": "2"},
    }
    return {"sets": {"generated": {"n": 6, "fid": fid}}, "record": record}


def compared(folder: Path, *results: dict) -> str:
    files = [folder / f"{number}.json" for number in range(len(results))]
    for file, one in zip(files, results, strict=True):
        file.write_text(json.dumps(one))
    with contextlib.redirect_stdout(io.StringIO()) as said:
        compare.main([str(file) for file in files])
    return said.getvalue()


def test_any_number_of_results_stands_side_by_side_with_what_differs(tmp_path):
    said = compared(tmp_path, result(0, 5.5), result(1, 4.25), result(2, 6.0))
    rows = [line.split() for line in said.splitlines()]
    assert ["generated:", "seed", "0", "1", "2"] in rows
    assert ["set", "metric", "A", "B", "C"] in rows
    assert ["generated", "fid", "5.5", "4.25", "6"] in rows
    assert "version of torch" not in said, "what is the same everywhere is not listed"
    assert ["generated", "fid", "5.5", "4.25", "-1.25"] in [
        line.split() for line in compared(tmp_path, result(0, 5.5), result(0, 4.25)).splitlines()
    ]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda r: r["record"]["sets"]["generated"]["images"].update(size=[16, 16]), "images, size: [8, 8] -> [16"),
        (lambda r: r["record"]["sets"]["generated"]["images"].update(resized="from 12 x 12"), "images, resized: None"),
        (
            lambda r: r["record"]["sets"]["generated"]["reference"].update(sha256_of_statistics="s"),
            "reference images, sha256_of_statistics: None -> s",
        ),
        (
            lambda r: r["record"]["sets"]["generated"]["images"].update(made_by={"perturbed": {"share": 0.5}}),
            "perturbed codes: None -> {",
        ),
        (lambda r: r["record"]["metrics"]["fid"].update(arithmetic="bfloat16"), "fid.arithmetic: float32 -> bfloat16"),
        (
            lambda r: r["record"].update(mistakes=[{"set": "generated", "mistake": "duplicates", "what": "x"}]),
            "generated: mistakes: none -> duplicates",
        ),
    ],
)
def test_the_one_unlike_result_is_refused_by_name(tmp_path, change, named):
    other = result(2, 6.0)
    assert not differences(result(0, 5.5), other), "the twin"
    change(other)
    with pytest.raises(UserError) as refused:
        compared(tmp_path, result(0, 5.5), result(1, 5.0), copy.deepcopy(other))
    assert named in str(refused.value)
    assert "2.json were not measured alike" in str(refused.value)
    assert "1.json were not" not in str(refused.value)


PROTOCOLS = {
    "plain": {"limit": 50000},
    "adm-50k": {"limit": 50000, "inception_score": "adm", "manifold": "adm", "resize_to": None, "scores": "samples"},
    "llamagen-384to256": {"limit": 50000, "inception_score": "adm", "manifold": "adm", "resize_to": 256},
    "reconstruction": {"limit": None, "scores": "reconstructions", "resize_to": 256},
    "coco-30k": {"limit": 30000, "resize_to": 256},
    "quick-5k": {"limit": 5000, "fewer": "refuse"},
}


@pytest.mark.parametrize("name", PROTOCOLS)
def test_a_shipped_protocol_prescribes_what_its_name_says(name):
    file = Path(__file__).parent.parent.parent / "configs" / "eval" / f"{name}.yaml"
    config = load(file, kind="evaluate")
    assert config.protocol == name
    assert {key: getattr(config, key) for key in PROTOCOLS[name]} == PROTOCOLS[name]
    overridden = load(file, ["seed=3", "generated=x", "reference=y", "out=z"])
    assert passport.protocol(overridden, config) == {"name": name, "changed": ["seed: 0 -> 3"]}

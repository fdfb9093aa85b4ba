"""The program on tiny sets: its output, its refusals, one rank against two, and what it says without the weights."""

import contextlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from eval import compare
from eval.evaluate import main
from llamagen_dist.errors import UserError
from llamagen_dist.evaluation import record
from tests.image_shards import write_images
from tests.ranks.forked import run_ranks

# those of the networks that are named by a folder are in tests/unit/test_encoders.py
VALUES = {metric: keys for metric, keys in record.VALUES.items() if metric not in ("fd_dinov2", "clip_score")}
ROOT = Path(__file__).parent.parent.parent
SIDE, COUNT = 16, 8  # a picture costs the same whatever its side


def pictures(n: int, seed: int, side: int = SIDE) -> np.ndarray:
    """Two classes in turn: dark ones and light ones."""
    r = np.random.RandomState(seed)
    small = r.randint(0, 120, (n, 4, 4, 3)) + 130 * (np.arange(n) % 2)[:, None, None, None]
    return np.repeat(np.repeat(small, side // 4, 1), side // 4, 2).astype(np.uint8)


@pytest.fixture(scope="module")
def work(tmp_path_factory, inception_cache) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    for name, n, seed in (("generated", COUNT, 0), ("real", 20, 1), ("held_out", COUNT, 2)):
        np.savez(folder / f"{name}.npz", arr_0=pictures(n, seed), labels=np.arange(n) % 2)
    np.savez(folder / "larger.npz", arr_0=pictures(COUNT, 3, 32))
    np.savez_compressed(folder / "compressed.npz", arr_0=pictures(COUNT, 0), labels=np.arange(COUNT) % 2)
    np.savez(folder / "floats.npz", arr_0=np.zeros((4, 8, 8, 3)))
    np.savez(folder / "other.npz", images=np.zeros(3))
    np.savez(folder / "objects.npz", arr_0=np.array([None, {}], dtype=object))
    (folder / "cut.npz").write_bytes((folder / "real.npz").read_bytes()[:-200])
    write_images(folder / "shards", COUNT, SIDE)
    settings = {
        "kind": "evaluate",
        "out": str(folder / "unused.json"),
        "metrics": list(VALUES),
        "limit": COUNT,
        "batch": 4,
        "kid": {"subsets": 5, "subset_size": 4},
        "sets": {
            "model": {"images": str(folder / "generated.npz"), "reference": str(folder / "real.npz")},
            "held_out": {"images": str(folder / "held_out.npz"), "reference": str(folder / "real.npz")},
        },
        "classifier": {
            "train": str(folder / "real.npz"),
            "validation": str(folder / "held_out.npz"),
            "images": 640,
            "batch": 64,
            "side": 16,
        },
        "inception": {"cache": str(inception_cache)},
    }
    (folder / "sets.yaml").write_text(yaml.safe_dump(settings))
    one = {**settings, "metrics": ["fid"], "generated": "g", "reference": "r"}
    del one["sets"], one["classifier"]
    (folder / "one.yaml").write_text(yaml.safe_dump(one))
    return folder


def evaluate(*words: object) -> str:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        main([str(word) for word in words])
    return said.getvalue()


def one(work: Path, generated: str, reference: str, *settings: str) -> str:
    return evaluate(work / "one.yaml", f"generated={work / generated}", f"reference={work / reference}", *settings)


@pytest.fixture(scope="module")
def result(work) -> dict:
    said = evaluate(work / "sets.yaml", f"out={work / 'new' / 'alone.json'}")
    assert f"features: {3 * COUNT}/{3 * COUNT}" in said, "the reference is looked at once, though two sets use it"
    assert f"model: n {COUNT}  fid " in said
    return json.loads((work / "new" / "alone.json").read_text())


def test_the_result_names_everything(result):
    assert result["n"] == COUNT
    assert set(result["sets"]) == {"model", "held_out"}
    for values in result["sets"].values():
        assert set(values) == {"n", *(k for m, keys in VALUES.items() if m != "inception_score" for k in keys)}
        assert values["fid"] > 0
        assert 0 <= values["precision"] <= 1
        assert values["fid_infinity"] < values["fid"]
    assert result["sets"]["model"]["class_agreement"] == result["class_agreement_real"] == 1.0
    assert list(result["absent"]) == ["inception_score"]
    assert "inception.weights=PATH" in result["absent"]["inception_score"]
    record = result["record"]
    assert record["bias"].startswith(f"N={COUNT}: FID and sFID are biased upward")
    assert record["extractor"]["canonical"] is True
    assert record["metrics"]["fid"]["weights_sha256"] == record["extractor"]["weights_sha256"]
    assert "TF1 bilinear" in record["metrics"]["fid"]["resize"]
    reference = [record["sets"][name]["reference"] for name in ("model", "held_out")]
    assert reference[0] == reference[1]
    assert reference[0]["available"] == 20
    assert reference[0]["n"] == COUNT


@pytest.mark.long
def test_conventions_of_other_evaluators_have_numbers_and_records_of_their_own(work, result, tmp_path):
    metrics = "metrics=[kid,precision_recall,density_coverage]"
    ours = ["kid.subsets=5", "kid.subset_size=4", f"out={tmp_path / 'a.json'}"]
    theirs = ["manifold=dgm-eval", "kid.draw=torch-fidelity", "seed=0"]
    one(work, "generated.npz", "real.npz", metrics, *ours, *theirs)
    a = json.loads((tmp_path / "a.json").read_text())
    values, described = a["sets"]["generated"], a["record"]["metrics"]
    assert described["precision_recall"]["k"] == 5
    assert described["density_coverage"]["inside"] == "distance < radius, float64"
    assert described["kid"]["draw"] == "torch-fidelity"
    assert described["kid"]["seed"] == 2020
    same = result["sets"]["model"]
    assert values["kid_mean"] != pytest.approx(same["kid_mean"], rel=1e-6)
    assert values["density"] != pytest.approx(same["density"], rel=1e-6)
    one(work, "generated.npz", "real.npz", metrics, *ours)
    b = json.loads((tmp_path / "a.json").read_text())["sets"]["generated"]
    assert b == pytest.approx({key: same[key] for key in b}, rel=1e-9)  # the twin: as it was without options


def test_two_ranks_write_the_same_numbers(work, result):
    run_ranks(main, 2, [str(work / "sets.yaml"), f"out={work / 'two.json'}"])
    two = json.loads((work / "two.json").read_text())
    for name, values in result["sets"].items():
        assert two["sets"][name] == pytest.approx(values, rel=1e-9)
    assert two["record"]["sets"] == result["record"]["sets"]
    assert two["record"]["ranks"] == 2
    with contextlib.redirect_stdout(io.StringIO()) as said:
        compare.main([str(work / "new" / "alone.json"), str(work / "two.json")])
    assert "class_agreement" in said.getvalue()
    assert "held_out" in said.getvalue()


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda r: r["record"]["metrics"]["fid"].update(weights_sha256="other"), "fid.weights_sha256: "),
        (lambda r: r["record"]["metrics"]["sfid"].update(resize="bicubic"), "sfid.resize: "),
        (lambda r: r["record"]["metrics"]["kid"].update(subset_size=7), "kid.subset_size: 4 -> 7"),
        (lambda r: r["sets"]["model"].update(n=13), f"model: number of images: {COUNT} -> 13"),
        (lambda r: r["record"]["sets"]["model"]["reference"].update(sha256="x"), "model: reference images, sha256: "),
        (lambda r: r["record"]["metrics"]["class_agreement"].update(seed=9), "class_agreement.seed: 0 -> 9"),
        (lambda r: r.update(sets={"another": {}}), "no set with a metric in both"),
        (lambda r: r["record"].update(format=0), "format 0 is not 1"),
    ],
)
def test_results_that_were_measured_otherwise_are_not_compared(work, result, tmp_path, change, named):
    other = json.loads(json.dumps(result))
    change(other)
    if "another" in other["sets"]:
        other["sets"]["another"] = {"n": 1}
        other["record"]["sets"]["another"] = {"reference": {"sha256": "x"}}
    (tmp_path / "other.json").write_text(json.dumps(other))
    with pytest.raises(UserError) as refused:
        compare.main([str(work / "new" / "alone.json"), str(tmp_path / "other.json")])
    assert named in str(refused.value)


@pytest.mark.long
def test_shards_compressed_files_and_published_statistics_are_read(work, result, tmp_path):
    one(work, "compressed.npz", "real.npz", f"out={tmp_path / 'a.json'}", "seed=0")
    a = json.loads((tmp_path / "a.json").read_text())
    assert a["sets"]["generated"]["fid"] == pytest.approx(result["sets"]["model"]["fid"], rel=1e-9)
    pool = np.random.RandomState(0).rand(2100, 2048)
    np.savez(tmp_path / "stored.npz", arr_0=pictures(5, 1), mu=pool.mean(0), sigma=np.cov(pool, rowvar=False))
    reference = f"reference={tmp_path / 'stored.npz'}"
    one(work, "shards", "real.npz", reference, f"out={tmp_path / 'b.json'}", "limit=4")
    b = json.loads((tmp_path / "b.json").read_text())
    assert b["sets"]["generated"]["n"] == 4
    assert b["record"]["sets"]["generated"]["reference"]["statistics"] == ["fid"]
    assert b["sets"]["generated"]["fid"] > 0


@pytest.mark.long
def test_statistics_without_images_are_a_reference(work, inception_network, tmp_path):
    """ADM's four arrays give the FID and the sFID of the images they were computed from; the rest says why not."""
    pixels = np.load(work / "real.npz")["arr_0"][:COUNT]
    features = inception_network(torch.from_numpy(pixels))
    arrays = {"mu": features.pool, "mu_s": features.spatial}
    stored = {name: x.double().mean(0).numpy() for name, x in arrays.items()}
    stored |= {name.replace("mu", "sigma"): np.cov(x.double().numpy(), rowvar=False) for name, x in arrays.items()}
    np.savez(tmp_path / "four.npz", **stored)
    np.savez(tmp_path / "two.npz", mu=stored["mu"], sigma=stored["sigma"])
    np.savez(tmp_path / "images.npz", arr_0=pixels)
    results, said = {}, {}
    for name in ("four", "two", "images"):
        asked = ["metrics=[fid,sfid,kid,precision_recall]", "limit=null", "kid.subset_size=4"]
        asked += [f"reference={tmp_path / name}.npz", f"out={tmp_path / name}.json"]
        said[name] = one(work, "held_out.npz", "real.npz", *asked)
        results[name] = json.loads((tmp_path / f"{name}.json").read_text())
    images, four, two = (results[name]["sets"]["generated"] for name in ("images", "four", "two"))
    assert set(four) == {"n", "fid", "sfid"}
    assert [four["fid"], four["sfid"]] == pytest.approx([images["fid"], images["sfid"]], rel=1e-3)
    assert two == {"n": COUNT, "fid": four["fid"]}
    assert set(results["four"]["absent"]) == {"kid", "precision_recall"}
    assert set(results["two"]["absent"]) == {"sfid", "kid", "precision_recall"}
    assert "two.npz holds mu and sigma but no images (arr_0)" in results["two"]["absent"]["sfid"]
    assert "sfid is absent: generated: its reference" in said["two"]
    assert results["two"]["record"]["sets"]["generated"]["reference"]["statistics"] == ["fid"]
    for sides in (["generated"], ["generated", "reference"]):
        with pytest.raises(UserError, match=r"four\.npz: holds statistics but no images"):
            one(work, "held_out.npz", "real.npz", *(f"{side}={tmp_path / 'four.npz'}" for side in sides))


@pytest.mark.parametrize(
    ("generated", "settings", "sentence"),
    [
        ("generated.npz", ["limit=13"], rf"generated.npz: holds {COUNT} images, but limit asks for 13"),
        ("larger.npz", [], "holds 32 x 32 pixels, but its reference .*real.npz 16 x 16"),
        ("floats.npz", [], r"arr_0 is float64 \[4, 8, 8, 3\], not uint8"),
        ("other.npz", [], "holds images, but images are called arr_0"),
        ("objects.npz", [], "arr_0 holds Python objects"),
        ("cut.npz", [], "cannot be read as an .npz"),
        ("absent.npz", [], "no such images"),
        ("generated.npz", ["metrics=[kid]", "kid.subset_size=100"], rf"100 images cannot be drawn from the {COUNT}"),
        ("generated.npz", ["metrics=[class_agreement]"], "class_agreement needs the classifier section"),
        ("generated.npz", ["inception.weights=/nowhere.pt"], "inception.weights: /nowhere.pt does not exist"),
        ("generated.npz", ["out=/"], "is a folder"),
    ],
)
def test_bad_input_gets_one_sentence(work, generated, settings, sentence):
    with pytest.raises(UserError, match=sentence) as refused:
        one(work, generated, "real.npz", *settings)
    assert "\n" not in str(refused.value)
    assert not (work / "unused.json").exists()


def test_without_the_weights_the_rest_is_measured(work, tmp_path):
    """As a process, the way a user without the extra sees it."""
    words = [
        work / "sets.yaml",
        f"out={tmp_path / 'o.json'}",
        "inception.package=absent",
        f"inception.cache={tmp_path}",
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "-m", "eval.evaluate", *map(str, words)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads((tmp_path / "o.json").read_text())
    assert result["sets"]["model"] == {"n": COUNT, "class_agreement": 1.0}
    assert set(result["absent"]) == set(VALUES) - {"class_agreement"}
    assert "pip install 'llamagen-dist[inception]'" in result["absent"]["fid"]
    assert "fid is absent" in ran.stdout


@pytest.mark.long
def test_large_sets_need_a_subsample_for_kid(work, tmp_path):
    settings = ["metrics=[kid,precision_recall]", "limit=5", "batch=5", "keep=4", "neighbours=1", "kid.subset_size=2"]
    one(work, "generated.npz", "real.npz", f"out={tmp_path / 'a.json'}", *settings)
    a = json.loads((tmp_path / "a.json").read_text())
    assert a["sets"]["generated"] == {"n": 5}
    assert "set subsample=" in a["absent"]["kid"]
    one(work, "generated.npz", "real.npz", f"out={tmp_path / 'b.json'}", *settings, "subsample=3")
    b = json.loads((tmp_path / "b.json").read_text())
    assert set(b["sets"]["generated"]) == {"n", "kid_mean", "kid_std", "precision", "recall"}
    assert b["record"]["sets"]["generated"]["images"]["features_kept"] == 3
    assert b["record"]["metrics"]["kid"]["subsample"] == 3


@pytest.mark.long
def test_fewer_images_than_asked_are_common_to_all_sets_where_that_is_wanted(work, tmp_path):
    """The twin is the refusal ``limit=13`` above."""
    more = ["limit=15", "fewer=common", "metrics=[fid,class_agreement]"]
    evaluate(work / "sets.yaml", f"out={tmp_path / 'a.json'}", *more)
    a = json.loads((tmp_path / "a.json").read_text())
    assert a["n"] == COUNT
    assert {v["n"] for v in a["sets"].values()} == {COUNT}
    assert a["record"]["sets"]["model"]["reference"]["n"] == COUNT
    assert a["record"]["choice"]["taken"] == COUNT
    np.savez(tmp_path / "few.npz", arr_0=pictures(3, 5), labels=np.arange(3) % 2)
    few = [f"sets.held_out.images={tmp_path / 'few.npz'}", "fewer=common", "kid.subset_size=null"]
    evaluate(work / "sets.yaml", f"out={tmp_path / 'b.json'}", *few)
    b = json.loads((tmp_path / "b.json").read_text())
    assert set(b["absent"]) == {"inception_score", "precision_recall", "density_coverage", "fid_infinity"}
    assert "needs more images than the 3 of" in b["absent"]["precision_recall"]
    assert set(b["sets"]["model"]) == {"n", "fid", "sfid", "kid_mean", "kid_std", "class_agreement"}
    assert b["record"]["metrics"]["kid"]["subset_size"] == 2


def test_a_single_image_is_no_distribution(work, tmp_path):
    np.savez(tmp_path / "one.npz", arr_0=pictures(1, 5), labels=np.zeros(1, np.int64))
    with pytest.raises(UserError, match=r"one.npz gives 1 images; a distribution needs at least two"):
        one(work, "generated.npz", "real.npz", f"generated={tmp_path / 'one.npz'}", "limit=null")
    single = [f"sets.held_out.images={tmp_path / 'one.npz'}", "fewer=common"]
    evaluate(work / "sets.yaml", f"out={tmp_path / 'c.json'}", *single)
    c = json.loads((tmp_path / "c.json").read_text())
    assert set(c["absent"]) == set(VALUES) - {"class_agreement"}
    assert "at least two" in c["absent"]["fid"]

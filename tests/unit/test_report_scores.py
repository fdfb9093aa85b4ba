"""Samples, scores and the scaling law in a report: exact numbers, plain words, and nothing that was not measured."""

import json
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from llamagen_dist.cli import main
from llamagen_dist.config import load
from llamagen_dist.errors import UserError
from llamagen_dist.evaluation.image_sets import open_images
from llamagen_dist.launch.stages import plan
from llamagen_dist.report import pictures
from llamagen_dist.report import results as of
from llamagen_dist.report.collect import Pictures, collect
from llamagen_dist.report.text import words
from tests.unit.quickstart_folder import SIZES
from tests.unit.report_pages import html, inside, section, series, table, text_of, titles
from tests.unit.scored_folder import CLASSES, REASON, N, add_law, finished_folder, sample

PIPELINE = Path(__file__).parents[2] / "configs/pipeline/quickstart.yaml"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_folder(tmp_path_factory.mktemp("quickstart"))


@pytest.fixture
def out(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "OUT"))


def results(out: Path) -> dict:
    return of.results(collect(out))


def change(path: Path, edit) -> None:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))


def test_results_hold_the_scores_and_the_prediction(out: Path) -> None:
    found = results(out)
    assert found["eval"] == {
        "n": N,
        "fid": 98.25,
        "sfid": 141.5,
        "kid_mean": 0.0452,
        "kid_std": 0.0031,
        "precision": 0.456,
        "recall": 0.372,
        "fid_real": 41.75,
        "rfid": 61.5,
        "fid_untrained": 372.5,
        "fid_unigram": 301.5,
        "class_agreement": 0.54,
        "class_agreement_real": 0.874,
        "absent": {"inception_score": REASON},
    }
    assert found["scaling"] == {
        "params": SIZES["g560k"],
        "tokens": 376_320,
        "predicted": 2.0,
        "ci95": [1.9, 2.1],
        "measured": 2.05,
        "naive": 2.3,
    }
    main(["report", str(out)])
    assert json.loads((out / "results.json").read_text()) == found


def test_the_anchors_are_not_mixed_up(out: Path) -> None:
    """Sabotage: two sets exchanged in the file; every number that depends on them moves with them."""

    def exchange(content: dict) -> None:
        sets = content["sets"]
        sets["held_out"], sets["untrained"] = sets["untrained"], sets["held_out"]

    change(out / "evaluation.json", exchange)
    found = results(out)["eval"]
    assert (found["fid_real"], found["fid_untrained"]) == (372.5, 41.75)


def test_what_was_not_scored_is_absent(out: Path) -> None:
    change(out / "evaluation.json", lambda content: content["sets"].pop("unigram"))
    change(out / "evaluation.json", lambda content: content["sets"]["model"].pop("sfid"))
    change(out / "scaling.json", lambda content: content["prediction"].pop("ci95"))
    found = results(out)
    assert not {"fid_unigram", "sfid"} & set(found["eval"])
    assert set(found["scaling"]) == {"params", "tokens", "predicted", "measured", "naive"}
    assert "codes by frequency" not in html(out)
    for name in ("evaluation.json", "scaling.json"):
        (out / name).unlink()
    shutil.rmtree(out / "samples")
    assert not {"eval", "scaling"} & set(results(out))
    assert not {"Samples", "The scaling law"} & set(titles(out))


def test_every_class_shows_its_first_samples_with_its_name(out: Path) -> None:
    found = collect(out)
    assert found.samples is not None
    grid = pictures.samples(found.samples)
    assert grid.captions == CLASSES
    for label, tile in enumerate(grid.images):
        assert tile.shape == (66, 134, 3)
        shown = [
            tile[34 * row : 34 * row + 32, 34 * column : 34 * column + 32] for row in (0, 1) for column in range(4)
        ]
        assert (np.stack(shown) == np.stack([sample(label, number) for number in range(8)])).all()
        assert not (shown[0] == sample((label + 1) % 3, 0)).all()  # twin: another class's picture
    text = html(out)
    assert "&lt;i&gt;coat" in text
    assert "<i>" not in text
    for phrase in (
        "the GPT g560k writes",
        "classifier-free guidance at scale 2, temperature 1, only the likeliest codes that make up 80%",
        "seed 3",
        "The first 8 samples of every class, in the order in which they were drawn",
    ):
        assert phrase in text, phrase


def test_few_samples_and_unknown_classes_still_make_a_grid(tmp_path: Path) -> None:
    np.savez(tmp_path / "model.npz", arr_0=np.zeros((3, 200, 200, 3), np.uint8), labels=np.array([4, 4, 7]))
    grid = pictures.samples(Pictures(open_images(tmp_path / "model.npz"), {}))
    assert grid.captions == ("class 4", "class 7")
    assert grid.images.shape == (2, 2 * 96 + 6, 4 * 96 + 18, 3)
    assert (grid.images[1, -1, -1] == 160).all()
    assert "How they were drawn" not in sampled({})
    assert "nothing cut off" in sampled({"cfg_scale": 1, "top_p": 1.0, "top_k": 0})


def sampled(record: dict) -> str:
    """The section's words for a record of eval.sample."""
    return words("samples", SimpleNamespace(samples=SimpleNamespace(record=record)), SimpleNamespace(condition="class"))


def test_the_scores_say_what_they_are_worth(out: Path) -> None:
    rows = table(section(out, "Scores"))
    assert rows[0] == ["images", "FID", "sFID", "KID × 1000", "precision", "recall", "class found"]
    assert rows[1] == ["real, held out", "41.8", *["–"] * 4, "86%"]
    assert rows[3] == ["samples of the GPT", "98.2", "141.5", "45.2 ± 3.1", "0.46", "0.37", "54%"]
    text = html(out)
    for phrase in (
        "500 images on either side",
        "FID from 500 images a side is biased upwards",
        "The trained model is better than both.",
        "inception score: the weights have no &lt;logits&gt; layer",
        "finds the intended class in <strong>54%</strong>",
        "real images 41.8; tokenizer alone 61.5; untrained 372.5; N = 500",
        "<details><summary>What exactly was computed",
        "feedbeef",
    ):
        assert phrase in text, phrase
    assert "<b>" not in text
    assert REASON not in text  # only escaped


def test_a_model_that_beats_no_baseline_is_not_praised(out: Path) -> None:
    change(out / "evaluation.json", lambda content: content["sets"]["model"].update(fid=350.0))
    text = html(out)
    assert "The trained model is not better than that" in text
    assert "better than both" not in text


def test_without_scores_the_page_says_how_to_get_them(out: Path) -> None:
    (out / "evaluation.json").unlink()
    made = section(out, "Scores")
    assert made["lead"].startswith("Not measured yet.")
    script = re.search(r"^```sh\n(.*?)^```$", text_of(made), flags=re.MULTILINE | re.DOTALL)
    assert script is not None
    subprocess.run(["bash", "-n", "-c", script[1]], check=True)
    root = PIPELINE.parents[2]
    words = [line.split() for line in script[1].replace("\\\n", " ").splitlines()]
    kinds = []
    for line in words[:3]:
        config = load(root / line[3], line[4:])
        kinds.append(type(config).__name__)
        assert not [value for value in line[4:] if str(out) not in value]
    assert kinds == ["SampleConfig", "ReconstructConfig", "EvaluateConfig"]
    assert words[3] == ["llamagen", "report", str(out)]


def test_without_the_inception_weights_the_rest_is_shown(out: Path) -> None:
    def strip(content: dict) -> None:
        content["sets"] = {"model": {"n": N, "class_agreement": 0.54}}
        content["absent"] = {"fid": "install llamagen-dist[inception]"}

    change(out / "evaluation.json", strip)
    assert results(out)["eval"] == {
        "n": N,
        "class_agreement": 0.54,
        "class_agreement_real": 0.874,
        "absent": {"fid": "install llamagen-dist[inception]"},
    }
    text = html(out)
    assert "fid: install llamagen-dist[inception]" in text
    assert "biased upwards" not in text
    assert "FID of the samples" not in text


def test_the_law_is_judged_by_what_came(out: Path) -> None:
    text = html(out)
    for phrase in (
        "which lies inside its 95% band",
        "the law was closer than that",
        "95% band 1.900 to 2.100; measured 2.050",
        "predicted <strong>2.000</strong> for the largest after 376 k tokens; it came to <strong>2.050</strong>",
        "L = E + A/N^α + B/D^β",
        "1.25 to 1.75",
        "says nothing about models a thousand times larger",
    ):
        assert phrase in text, phrase
    law, predicted, frontier = map(series, inside(section(out, "The scaling law"), "figure"))
    shown = {name.rpartition(", ")[2]: one["y"] for name, one in law.items()}
    assert (shown["measured"], shown["left out"]) == ([2.5, 2.3], [2.05])
    band = predicted["95% band"]
    assert [100 * (1 + band[end][0] / 100) * 2.05 for end in ("y", "to")] == pytest.approx([190, 210])
    # 10^9 to 10^11 FLOPs: no more parameters and tokens than were trained
    assert frontier["loss, trained so far"]["x"] == [1e9, 1e10, 1e11]


@pytest.mark.parametrize(
    ("measured", "inside", "closer"), [(2.05, True, True), (2.2, False, False), (1.8, False, True)]
)
def test_a_law_that_fails_is_said_to_fail(out: Path, measured: float, inside: bool, closer: bool) -> None:
    """Sabotage: the measurement moves; the words move with it."""
    add_law(out, measured)
    text = html(out)
    assert ("outside its 95% band</strong>" in text) == (not inside)
    assert ("that guess was closer than the law" in text) == (not closer)
    assert ("inside the law's band" in text) == inside


@pytest.mark.parametrize("name", ["samples/model.npz", "evaluation.json", "scaling.json"])
def test_a_damaged_file_is_named(out: Path, name: str) -> None:
    path = out / name
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=rf"{name}: "):
        main(["report", str(out)])
    assert not (out / "report.html").exists()


def test_the_full_pipeline_leaves_the_files_that_the_report_reads(tmp_path: Path) -> None:
    stages = {stage.name: stage for stage in plan(PIPELINE, tmp_path).nodes}
    assert list(stages)[-5:] == ["sample", "reconstruct", "evaluate", "scaling", "report"]
    assert stages["sample"].config.out == tmp_path / "samples"  # type: ignore[union-attr]
    evaluate = stages["evaluate"].config
    assert evaluate.sets["model"].images == tmp_path / "samples" / "model.npz"  # type: ignore[union-attr]
    text = str(evaluate)
    assert "runs/quickstart" not in text
    assert {stages["evaluate"].produces[0].name, stages["scaling"].produces[0].name} == {
        "evaluation.json",
        "scaling.json",
    }

"""Scores of checkpoints: which are due, which are kept, what trackers and the report are told of them."""

import importlib.util
import json
import math
import random
import time
from pathlib import Path

import pytest

from llamagen_dist.checkpoint.folder import complete, prune
from llamagen_dist.cli import main
from llamagen_dist.config import EvaluationSection, dump, load
from llamagen_dist.config.resume import Change, between
from llamagen_dist.config.training import TrackioSection
from llamagen_dist.errors import UserError
from llamagen_dist.launch.scoring import Scoring
from llamagen_dist.launch.status import survey
from llamagen_dist.scaling.recipes import first_at as images_to
from llamagen_dist.tracking import evaluations
from llamagen_dist.tracking.sinks import Mirror, open_sink, tracking_of
from llamagen_dist.training.run import _rewind
from tests.ranks.forked import run_ranks
from tests.runs.token_shards import write_tokens
from tests.unit.report_pages import html
from tests.unit.tracked_run import BATCH, CONFIGS, cut, finish, rows, save, tracked_run, train

OFFLINE = ("tracking.wandb.project=tests", "tracking.wandb.mode=offline")
ON = (f"evaluation.sample={CONFIGS}/eval/sample.yaml", f"evaluation.evaluate={CONFIGS}/eval/quick-5k.yaml")


def begin(run: Path, step: int) -> Path:
    folder = evaluations.folder_of(run, step)
    folder.mkdir(parents=True)
    about = {"step": step, "images_seen": step * BATCH, "weights": "trained"}
    (folder / "checkpoint.json").write_text(json.dumps(about))
    return folder


def score(run: Path, step: int, fid: float, n: int = 5000, cfg_scale: float = 2.0, begun: bool = False) -> None:
    """What an evaluation of a checkpoint leaves."""
    folder = evaluations.folder_of(run, step) if begun else begin(run, step)
    made = {"program": "eval.sample", "checkpoint_sha256": str(step), "cfg_scale": cfg_scale}
    sides = {"images": {"size": [16, 16], "made_by": made}, "reference": {"sha256": "r", "n": 5000}}
    record = {"format": 1, "metrics": {"fid": {}}, "sets": {"generated": sides}}
    result = {"n": n, "sets": {"generated": {"n": n, "fid": fid, "precision": 0.5}}, "record": record}
    (folder / "result.json").write_text(json.dumps(result))


def fail(run: Path, step: int) -> Path:
    folder = begin(run, step) / "stages/sample/launch"
    folder.mkdir(parents=True)
    (folder / "FAILED.json").write_text(json.dumps({"reason": "rank 0 died without a message"}))
    return folder


def due(run: Path, every: int, last: int = 1 << 40) -> list[int]:
    return [evaluations.step_of(folder) for folder in evaluations.due(run, every * BATCH, last)]


def test_the_first_checkpoint_at_or_after_every_multiple_is_due_once_and_the_last_one(tmp_path):
    for step in (3, 6, 7, 12, 13):
        save(tmp_path, step)
    assert due(tmp_path, 5) == [6, 12]
    assert due(tmp_path, 5, last=13 * BATCH) == [6, 12, 13]
    assert due(tmp_path, 0) == [3, 6, 7, 12, 13]
    score(tmp_path, 6, 50.0)
    fail(tmp_path, 12)
    assert due(tmp_path, 5) == [12], "what failed may be tried again"
    (tmp_path / "checkpoints/step_00000006/COMPLETE").unlink()
    assert due(tmp_path, 5) == [12], "step 6 is scored and gone: 7 does not take its place"
    (tmp_path / "evaluations/step-00000006/checkpoint.json").unlink()
    assert due(tmp_path, 5) == [7, 12], "sabotage twin: without its mark the same stretch is scored twice"


def test_what_waits_for_its_scores_is_not_removed(tmp_path):
    run = tracked_run(tmp_path / "run", *ON, f"evaluation.every_images={2 * BATCH}")
    config = load(run / "config.yaml")

    def kept(config) -> list[int]:
        prune(run, 1, 0, lambda: evaluations.unscored(run, config))
        return [evaluations.step_of(folder) for folder in complete(run)]

    for step in (1, 2, 3, 4, 5, 6):
        save(run, step)
    assert kept(config) == [2, 4, 6]
    score(run, 2, 50.0)
    assert kept(config) == [4, 6], "scored: it may go"
    fail(run, 4)
    assert kept(config) == [6], "no disk fills up with what cannot be scored"
    save(run, 7), save(run, 8)
    begin(run, 7)
    plain = config.model_copy(update={"evaluation": None})
    assert kept(plain) == [7, 8], "without the section: what is evaluated by hand"
    score(run, 7, 40.0, begun=True)
    assert kept(plain) == [8], "sabotage twin: no section and no mark, and all go"


def test_a_run_that_is_taken_back_forgets_the_scores_of_what_is_set_aside(tmp_path):
    run = tracked_run(tmp_path / "run", *ON)
    for step in (2, 4, 6):
        save(run, step), score(run, step, 50.0 - step)
    evaluations.write_lines(run)
    assert due(run, 2) == []
    _rewind(run, Change(alike_until=3 * BATCH))
    assert [json.loads(line)["step"] for line in (run / "evaluations.jsonl").read_text().splitlines()] == [2]
    assert len(list(run.glob("checkpoints/set_aside_*/evaluation-step-*/result.json"))) == 2, (
        "a result is never deleted"
    )
    save(run, 4)
    assert due(run, 2) == [4], "the new weights of step 4 are scored"


def test_off_leaves_no_trace_in_a_config_and_on_is_no_other_run(tmp_path):
    plain = load(tracked_run(tmp_path / "off") / "config.yaml")
    scored = load(tracked_run(tmp_path / "on", *ON) / "config.yaml")
    assert "evaluation" not in dump(plain)
    assert scored.evaluation.every_images == 0
    change = between(plain, scored)
    assert not change.refused
    assert any(line.startswith("evaluation.sample") for line in change.allowed)


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (["evaluation.images=400"], r"evaluation\.images: 400 pictures are drawn, but .* scores 5000 \(limit\)"),
        (["evaluation.sample=/no.yaml"], r"evaluation\.sample: /no\.yaml"),
        ([f"evaluation.sample={CONFIGS}/eval/plain.yaml"], r"evaluation\.sample: .*this program reads kind: sample"),
        (
            ["evaluation.sample={ema}", "ema.decay=0", "validation.weights=trained"],
            r"asks for the moving average .* does not keep \(ema\.decay: 0\)",
        ),
        (["evaluation.cluster=/no.yaml"], r"/no\.yaml"),
    ],
)
def test_an_evaluation_that_no_checkpoint_could_have_is_refused_before_the_training(settings, problem, tmp_path):
    (tmp_path / "ema.yaml").write_text(f"base: {CONFIGS}/eval/sample.yaml\nweights: ema\n")
    words = [word.replace("{ema}", str(tmp_path / "ema.yaml")) for word in (*ON, *settings)]
    good = load(tracked_run(tmp_path / "good", *ON) / "config.yaml")
    evaluations.check(good)
    with pytest.raises(UserError, match=problem):
        evaluations.check(load(tracked_run(tmp_path / "bad", *words) / "config.yaml"))


def test_one_evaluator_runs_beside_a_training_and_another_when_there_is_more_to_score(tmp_path):
    """A stand-in for the command: it says that it was started, and ends once ``go`` is there."""
    (tmp_path / "code/llamagen_dist").mkdir(parents=True)
    (tmp_path / "code/llamagen_dist/cli.py").write_text(
        "import os, sys, time\n"
        "open('../calls', 'a').write(' '.join(sys.argv[1:]) + f' {os.nice(0)}\\n')\n"
        "while not os.path.exists('../go'): time.sleep(0.02)\n"
    )
    run, calls, go = tmp_path / "run", tmp_path / "calls", tmp_path / "go"

    def made(**more: object) -> Scoring:
        return Scoring(run, tmp_path / "code", "here", log=tmp_path / "log", **more)

    def look(scoring: Scoring, then: int) -> list[str]:
        """Until so many have been started in all."""
        deadline = time.monotonic() + 30
        while len(said := calls.read_text().splitlines() if calls.exists() else []) < then:
            scoring._looked = 0.0
            scoring.look()
            assert time.monotonic() < deadline
            time.sleep(0.02)
        return said

    beside = made()
    beside.look()
    assert beside._child is None, "there is nothing to score"
    save(run, 2)
    assert look(beside, 1) == [f"evaluate {run} --launcher here 19"], "at the lowest priority"
    save(run, 4)
    beside._looked = 0.0
    beside.look()
    assert len(look(beside, 1)) == 1, "one at a time"
    go.touch()
    assert len(look(beside, 2)) == 2
    go.unlink()
    beside.finish(lambda: True)
    assert beside._child is not None
    assert beside._child.poll() is not None, "a stop of the launcher ends it"
    after = made(beside=False)
    after.look()
    assert after._child is None
    go.touch()
    after.finish(lambda: False)
    assert after._child is not None
    assert after._child.returncode == 0
    none = Scoring(None, tmp_path / "code", "here")
    none.look(), none.finish(lambda: False), none.stop()
    assert none._child is None, "of a run without the section nothing is started"


# --- EP_FID ---


def test_images_to_a_fid_over_many_random_runs():
    draw = random.Random(0)
    for _ in range(300):
        images = sorted(draw.sample(range(1, 10**6), draw.randint(1, 12)))
        points = [(one, draw.choice([draw.uniform(1, 60), math.nan])) for one in images]
        level = draw.uniform(1, 60)
        found = images_to(points, level)
        by_hand = None
        for seen, fid in points:  # in the order of the training, as a reader of the curve would
            if by_hand is None and fid <= level:
                by_hand = seen
        assert found == by_hand
        assert found is None or found in images, "only what was measured counts: nothing between two evaluations"
        shuffled = draw.sample(points, len(points))
        assert images_to(shuffled, level) == found
        assert images_to([*points, (10**7, 0.5)], level) == (found or 10**7), "what comes later cannot be earlier"
        easier = images_to(points, level + 5)
        assert found is None or (easier is not None and easier <= found)


def test_images_to_a_fid_that_is_reached_exactly_or_never():
    assert images_to([(10, 7.0), (20, 5.0), (30, 6.0)], 5.0) == 20
    assert images_to([(10, 7.0), (20, 5.01)], 5.0) is None
    assert images_to([], 5.0) is None
    assert images_to([(10, 7.0), (20, 5.0)], 6.0) == 20, "not 15, where a line between the two would cross"


# --- trackers ---


def send(run: Path, everything: bool = False, ends: bool = True) -> Mirror:
    (section,) = tracking_of(run).values()
    sink = open_sink(run, section)
    mirror = Mirror(run, sink)
    mirror.open()
    mirror.send(everything)
    if ends:
        mirror.close(0)
    return mirror


def scored_rows(run: Path) -> list[tuple[int, int, float]]:
    found = [row for row in rows(run) if "eval/fid" in row]
    return [(row["eval/step"], row["eval/images_seen"], row["eval/fid"]) for row in found]


def test_wandb_gets_every_evaluation_once_at_its_own_images_however_late_it_is(tmp_path):
    run = tracked_run(tmp_path / "run", *OFFLINE)
    train(run, 1, 4), save(run, 4)
    score(run, 2, 50.0)
    evaluations.write_lines(run)
    assert send(run).evaluations == 1
    assert scored_rows(run) == [(2, 2 * BATCH, 50.0)]
    score(run, 4, 40.0), score(run, 3, 45.0)
    evaluations.write_lines(run)
    assert [line["step"] for line in evaluations.lines(run)] == [2, 3, 4]
    send(run)
    assert scored_rows(run) == [(2, 2 * BATCH, 50.0)], "no row comes: it waits for the next session"
    train(run, 5, 6), finish(run)
    send(run)
    assert scored_rows(run) == [(2, 2 * BATCH, 50.0), (3, 3 * BATCH, 45.0), (4, 4 * BATCH, 40.0)]
    assert [row["loss"] for row in rows(run) if "loss" in row] == pytest.approx(
        [9 - step / 100 for step in range(1, 7)]
    )
    score(run, 6, 30.0)
    evaluations.write_lines(run)
    main(["wandb-sync", str(run)])
    assert scored_rows(run)[-1] == (6, 6 * BATCH, 30.0), "of a run that has finished: a row behind the last"
    main(["wandb-sync", str(run)])
    assert len(scored_rows(run)) == 4
    assert next(row for row in rows(run) if "eval/fid" in row)["eval/precision"] == 0.5


def test_a_resumed_run_has_its_rows_and_its_evaluations_once(tmp_path):
    run = tracked_run(tmp_path / "run", *OFFLINE)
    train(run, 1, 4), save(run, 4), score(run, 2, 50.0)
    evaluations.write_lines(run)
    train(run, 5, 5)  # its row is not sent yet: more lines of it may follow
    send(run)
    cut(run, 4)
    train(run, 5, 8), save(run, 8), score(run, 8, 40.0)
    evaluations.write_lines(run)
    send(run)
    assert [row["_step"] for row in rows(run)] == list(range(1, 9))
    assert [one[0] for one in scored_rows(run)] == [2, 8]


def test_trackio_gets_every_evaluation_once(tmp_path, monkeypatch):
    if importlib.util.find_spec("trackio") is None:
        pytest.skip("needs the extra trackio")
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    # in a process of its own: trackio takes its folder from the environment once, when it is imported
    (sent,) = run_ranks(sent_to_trackio, 1, tmp_path)
    assert sent == [(2, 50.0), (4, 40.0)]


def sent_to_trackio(folder: Path) -> list[tuple[int, float]]:
    """(step, FID) of every evaluation that trackio has, two starts of the tracker later."""
    from trackio.sqlite_storage import SQLiteStorage

    run = tracked_run(folder / "run", "tracking.trackio.project=tests-during")
    train(run, 1, 4), finish(run), score(run, 2, 50.0)
    evaluations.write_lines(run)
    (section,) = tracking_of(run).values()
    assert isinstance(section, TrackioSection)
    name = f"run.{send(run)._sink.where.rpartition('.')[2]}"
    score(run, 4, 40.0)
    evaluations.write_lines(run)
    send(run)
    logs = SQLiteStorage.get_logs("tests-during", name)
    return [(log["step"], log["eval/fid"]) for log in logs if "eval/fid" in log]


# --- the report, the status ---


def test_the_report_shows_fid_over_images_ep_fid_and_what_failed(tmp_path):
    tokens = write_tokens(tmp_path / "tokens", 2 * BATCH, 0)
    run = tracked_run(tmp_path / "run", *ON, "evaluation.ep_fid=[45,10]", f"data.train={tokens}")
    train(run, 1, 8)
    score(run, 2, 50.0), score(run, 4, 44.0), score(run, 6, 46.0, n=4000), score(run, 7, 43.0, cfg_scale=1.5)
    fail(run, 8)
    page = html(run)
    assert "Scores of checkpoints" in page
    assert f"2 epochs ({4 * BATCH:,} images)" in page
    assert "not reached (43.00 at best)" in page
    assert "step 8, has failed: rank 0 died without a message" in page
    assert "stages/sample/log" in page.replace("\\", "")
    assert "number of images: 5000 -&gt; 4000" in page
    assert "cfg_scale: 2.0 -&gt; 1.5" in page.replace("\\", "")
    (row,) = survey.look([run]).rows
    assert "evaluation step-00000008 failed: rank 0 died without a message (log: " in row.note


def test_a_sweeps_report_has_a_column_of_ep_fid_and_one_without_scores_none(tmp_path):
    for name, last in (("a", 44.0), ("b", 60.0)):
        run = tracked_run(
            tmp_path / "sweep" / name, *ON, "evaluation.ep_fid=[45]", f"train.seed={len(name) + int(last)}"
        )
        train(run, 1, 4), finish(run), score(run, 2, 70.0), score(run, 4, last)
    train(tracked_run(tmp_path / "sweep/c", "train.seed=3"), 1, 3)
    page = html(tmp_path / "sweep")
    assert "EP_FID@45" in page
    assert page.count(f"{4 * BATCH:,} images") == 2, "in the points' table and in its own"
    assert "not reached (60.00 at best)" in page
    for name in ("a", "b"):
        for file in (tmp_path / "sweep" / name / "evaluations").rglob("*"):
            if file.is_file():
                file.unlink()
    assert "EP_FID" not in html(tmp_path / "sweep")


def test_a_damaged_result_is_named_and_a_by_hand_section_needs_its_files(tmp_path):
    run = tracked_run(tmp_path / "run")
    train(run, 1, 2), score(run, 2, 50.0)
    (run / "evaluations/step-00000002/result.json").write_text("{")
    with pytest.raises(UserError, match=r"step-00000002/result\.json: is not valid JSON"):
        evaluations.write_lines(run)
    with pytest.raises(UserError, match=r"run: evaluation: sample: missing; set it in the file or as sample="):
        main(["evaluate", str(run)])
    assert EvaluationSection.model_fields["here"].default == "after"
